"""All kinds by name, in the order in which they are run."""

from benchmarks.torture.harness import Kind
from benchmarks.torture.kinds import (
    bitrot,
    configs,
    data,
    determinism,
    disk,
    hostile,
    images,
    kill,
    nan,
    signals,
    soak,
    topology,
    workers,
)

KINDS: dict[str, Kind] = {
    module.KIND.name: module.KIND
    for module in (
        *(kill, signals, bitrot, determinism, nan, images, disk, topology, workers, hostile, configs, data, soak),
    )
}
