"""Times of programs that take turns, so that what else the machine does falls on all alike; memory; peaks."""

import contextlib
import dataclasses
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

# device kind contains: TFLOP/s of dense products in bfloat16, and of float32 ones as XLA computes them (TF32 if there)
PEAKS: dict[str, tuple[float, float]] = {
    "H200": (989.0, 494.0),
    "H100 PCIe": (756.0, 378.0),
    "H100": (989.0, 494.0),
    "A100": (312.0, 156.0),
    "RTX 4090": (165.0, 82.6),
    "RTX 3090": (71.0, 35.6),
}


def peak_flops(kind: str, dtype: str) -> float | None:
    """FLOP/s that a device of this kind has at most, or None where it is not known."""
    for name, (half, single) in PEAKS.items():
        if name in kind:
            return 1e12 * (half if dtype == "bfloat16" else single)
    return None


@dataclasses.dataclass
class Turns:
    """Seconds of one step of each side, a value per round.

    Attributes:
      wall: side -> seconds that passed.
      cpu: side -> seconds of all cores of this process; steadier where other programs use the machine.
    """

    wall: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    cpu: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def seconds(self, side: str) -> float:
        """The median of the rounds."""
        return statistics.median(self.wall[side])

    def ratio(self, side: str, other: str, kind: str = "wall") -> float:
        """How many times the time of `other` a side takes: the median over rounds of the rounds' ratios."""
        times = getattr(self, kind)
        return statistics.median(a / b for a, b in zip(times[side], times[other], strict=True))


def alternate(sides: Mapping[str, Callable[[int], None]], rounds: int, turn: float = 0.5) -> Turns:
    """Time several programs in turns.

    Args:
      sides: name -> `run(steps)`, which returns when the device is done; its first step is not timed.
      rounds: in each every side gets one turn; odd rounds go through the sides backwards.
      turn: seconds that a turn lasts at least, but always one step.
    """
    counts = {}
    for name, run in sides.items():
        began = time.perf_counter()
        run(1)
        counts[name] = max(1, math.ceil(turn / max(time.perf_counter() - began, 1e-9)))
    turns = Turns({name: [] for name in sides}, {name: [] for name in sides})
    for i in range(rounds):
        for name in list(sides)[:: 1 if i % 2 == 0 else -1]:
            wall, cpu = time.perf_counter(), time.process_time()
            sides[name](counts[name])
            turns.wall[name].append((time.perf_counter() - wall) / counts[name])
            turns.cpu[name].append((time.process_time() - cpu) / counts[name])
    return turns


class Memory:
    """Peak memory while the context is open, in bytes.

    Attributes:
      peak: on a GPU or TPU what its allocator reached since the process started; on a CPU by how much the resident
        memory of this process rose (Linux); None where neither is known.
    """

    peak: int | None = None

    def __enter__(self) -> "Memory":
        self._before = _reset_resident() if jax.default_backend() == "cpu" else None
        return self

    def __exit__(self, *_: object) -> None:
        if jax.default_backend() != "cpu":
            self.peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        elif self._before is not None:
            self.peak = _status("VmHWM") - self._before


def _reset_resident() -> int | None:
    """Forget the largest resident size so far; the present one in bytes, or None where the system has none."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return None


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(key)


def memory_limit(device: Any) -> int | None:
    """Bytes that programs on a device may use: its allocator's limit, or the memory that is free (a cgroup's too)."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    free = []
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")))
    with contextlib.suppress(OSError, ValueError):
        folder = Path("/sys/fs/cgroup")
        free.append(int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text()))
    return min(free, default=None)


@contextlib.contextmanager
def trace(folder: str | None) -> Iterator[None]:
    """A profile of what runs inside into a folder that TensorBoard, XProf and Perfetto open; None: no profile."""
    if folder is None:
        yield
        return
    os.makedirs(folder, exist_ok=True)
    with jax.profiler.trace(folder, create_perfetto_trace=True):
        yield
