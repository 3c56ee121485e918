"""Programs compiled for a GPU that is not here: their memory, what they move, what they copy; no times.

XLA compiles without a device once it is told what the device is. What needs one is left out: the choice among
algorithms of one operation, and Triton's matrix products with what could be fused into them. Else fusions and layouts
are those of a run there.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from mljax.bench import hlo
from mljax.bench.model import Model
from mljax.convolution import compiled_for
from mljax.errors import UserError
from mljax.types import Config

SHARE = 0.75  # of the memory, which JAX takes by itself

_HOPPER = {
    "threads_per_block_limit": 1024, "threads_per_warp": 32, "shared_memory_per_block": 49152,
    "shared_memory_per_core": 233472, "threads_per_core_limit": 2048, "core_count": 132, "fpus_per_core": 128,
    "block_dim_limit_x": 2147483647, "block_dim_limit_y": 65535, "block_dim_limit_z": 65535,
    "memory_bandwidth": 3_352_320_000_000, "l2_cache_size": 50 * 2**20, "clock_rate_ghz": 1.98,
    "device_memory_size": 84_929_347_584, "shared_memory_per_block_optin": 232448, "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
}  # fmt: skip
_AMPERE = {
    "core_count": 108, "fpus_per_core": 64, "shared_memory_per_core": 167936, "shared_memory_per_block_optin": 166912,
    "memory_bandwidth": 2_039_000_000_000, "l2_cache_size": 40 * 2**20, "clock_rate_ghz": 1.41,
    "device_memory_size": 84_986_363_904,
}  # fmt: skip
# name -> (its kind, compute capability, what XLA is told)
TARGETS: dict[str, tuple[str, int, Mapping[str, float]]] = {
    "h100": ("NVIDIA H100 80GB HBM3", 9, _HOPPER),
    "h200": (
        *("NVIDIA H200", 9),
        _HOPPER | {"memory_bandwidth": 4_800_000_000_000, "device_memory_size": 150_754_820_096},
    ),
    "a100": ("NVIDIA A100-SXM4-80GB", 8, _HOPPER | _AMPERE),
}


@contextlib.contextmanager
def elsewhere() -> Iterator[None]:
    """What is traced inside takes the forms for a GPU; JAX, which must not have looked for devices yet, finds none."""
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # we say ourselves if a program is too large for the device
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
    )
    with compiled_for("gpu"):
        yield


def memory_limit(name: str) -> int:
    """Bytes that a program may use there."""
    return int(SHARE * TARGETS[name][2]["device_memory_size"])


def description(name: str) -> str:
    """What XLA is told of a device, as the text of its GpuTargetConfigProto."""
    kind, capability, properties = TARGETS[name]
    lines = [f"  {key}: {value}" for key, value in properties.items()]
    lines.append(f"  cuda_compute_capability {{ major: {capability} }}")
    versions = "dnn_version_info { major: 9 minor: 10 }\nruntime_version { major: 13 minor: 0 }"
    return "\n".join(
        ["gpu_device_info {", *lines, "}", 'platform_name: "CUDA"', versions, f'device_description_str: "{kind}"']
    )


def devices(name: str, count: int) -> list[Any]:
    """Devices to compile for, `count` of them in one machine."""
    from jax.experimental import topologies

    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=description(name), topology=f"1x1x{count}"
        )
        return list(topology.devices)
    except (NotImplementedError, RuntimeError) as error:
        raise UserError(
            f"--target={name} needs JAX's compiler for CUDA, which needs no GPU; install it with: pip install"
            f" 'jax[cuda13]' ({str(error).splitlines()[0][:100]})."
        ) from None


def measured(config: Config, args: Any) -> dict[str, Any]:
    """Memory, traffic and copies of the programs of --only, printed."""
    kind, _, properties = TARGETS[args.target]
    figures: dict[str, Any] = {"target": kind}
    there = devices(args.target, config.devices or 1)
    print(f"compiled for {len(there)} {kind}, which is not here: no times", flush=True)
    model = Model(config, labels=args.labels, devices=there)
    size = config.optim.batch_size
    for part in (p for p in ("train", "infer") if p in args.only):
        variables, name = model.variables, part
        for folded in (False, True) if part == "infer" and args.fold else (False,):
            if folded:
                variables, name = model.folded_shapes(), "folded"
            made = model.training(size) if part == "train" else model.inference(size, variables)
            memory = made.memory or 0
            text = made.call.as_text()
            moved, share, table = hlo.traffic(text), size / len(model.devices), hlo.moves(text)
            part_figures = {
                "program_bytes": memory,
                "flops_per_image": made.flops / size,
                "moved_bytes": moved,
                "copies": hlo.counts(table),
            }
            bound = len(model.devices) * share * properties["memory_bandwidth"] / moved
            part_figures["images_per_s_bound"] = bound
            figures[name] = part_figures
            if args.hlo:
                hlo.keep(text, table, args.hlo, name)
            print(
                f"{name:<9} {memory / 1e9:.2f} GB of program for a batch of {size}; {moved / 1e9:.1f} GB moved a step,"
                f" {moved / share / 1e6:.0f} MB an image: at most {bound:,.0f} images/s by memory\n"
                f"{'':<9} {hlo.summary(part_figures['copies'])}",
                flush=True,
            )
    return figures
