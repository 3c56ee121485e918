"""The tiny runs that are killed, stopped and resumed, and what of a finished one must be the same."""

import dataclasses
import json
import re
import time
from pathlib import Path
from typing import Any

from benchmarks.torture import processes, shim
from benchmarks.torture.harness import Case, Failed, once
from mljax import seal
from mljax.rundir import verify
from mljax.rundir.checkpoint import Checkpoints

EPOCHS, STEPS = 4, 3  # steps of an epoch; every epoch is evaluated and saved
TOTAL = EPOCHS * STEPS
COMMON = (f"--config.optim.epochs={EPOCHS}", "--config.data.test_images=16")
SYSTEMS = {
    "baseline": ("--config=configs/baseline.py:smoke", *COMMON),
    "cmsg": ("--config=configs/cmsg.py:smoke", "--config.ema=0.9", *COMMON),
    "sst": ("--config=configs/sst.py:smoke", *COMMON),
    "role": ("--config=configs/role.py:smoke", *COMMON),
}
LIMIT = 90.0  # seconds that any run may take


@dataclasses.dataclass(frozen=True)
class Reference:
    """An undisturbed run.

    Attributes:
      digest: of its last checkpoint, as read back.
      seconds: of the whole, forked, with a warm compile cache.
      operations: files written, renamed and removed below its checkpoints.
      workdir: of the run.
    """

    digest: dict[str, Any]
    seconds: float
    operations: int
    workdir: Path


def argv(system: str, workdir: Path, *more: str) -> list[str]:
    return [*SYSTEMS[system], f"--workdir={workdir}", *more]


def digest(workdir: Path) -> dict[str, Any]:
    """Step and digests of every array of the last checkpoint, read from the disk and verified. Starts JAX."""
    folder = workdir / "checkpoints" / "0"
    with Checkpoints(folder, read_only=True) as checkpoints:
        step = checkpoints.latest
        if step is None:
            return {"step": None}
        arrays = verify.arrays(folder / str(step), verify.record(folder / str(step))["leaves"])
        return {"step": step, "leaves": {path: seal.crc(array) for path, array in arrays.items()}}


def reference(case: Case, system: str) -> Reference:
    """The undisturbed run of a system, made once; twice, so that its time is that of a warm compile cache."""

    def make(folder: Path) -> None:
        for name in ("cold", "run"):
            workdir, began = folder / name, time.perf_counter()

            def after(workdir: Path = workdir) -> dict[str, Any]:
                operations = shim.count() if case_shim else 0
                return {"operations": operations, "digest": digest(workdir)}

            def hook(workdir: Path = workdir) -> None:
                if case_shim:
                    shim.arm(workdir / "checkpoints", shim.ALL)

            process = processes.forked(argv(system, workdir), folder / f"{name}.log", hook=hook, after=after)
            if process.wait(6 * LIMIT):
                raise Failed(f"the undisturbed run of {system} ended with {process.status}: {process.err[-500:]}")
            made = {**process.after, "seconds": time.perf_counter() - began}
            (folder / "made.json").write_text(json.dumps(made))

    case_shim = shim.loaded()
    folder = once(case.shared / system, make)
    made = json.loads((folder / "made.json").read_text())
    return Reference(made["digest"], made["seconds"], made["operations"], folder / "run")


def resume(case: Case, system: str, workdir: Path, expected: Reference, *more: str) -> processes.Process:
    """Run the same command until it is finished; the last checkpoint is that of the undisturbed run.

    Raises:
      Failed: it does not end with 0, or with other arrays.
    """
    process = processes.forked(argv(system, workdir, *more), case.folder / "resume", after=lambda: digest(workdir))
    if process.wait(LIMIT):
        raise Failed(f"the resume ended with {process.status}: {process.err.strip()[-400:]!r}")
    same(process.after, expected.digest)
    return process


def same(made: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raises `Failed` unless two digests agree."""
    if made["step"] != expected["step"]:
        raise Failed(f"the last checkpoint is of step {made['step']}, not {expected['step']}")
    if differing := [p for p, crc in expected["leaves"].items() if made["leaves"].get(p) != crc]:
        raise Failed(f"{len(differing)} of {len(expected['leaves'])} arrays differ, the first: {differing[0]}")


def resumed_at(text: str) -> int:
    """The step that a run said it went on from; 0 if from the start."""
    match = re.search(r"resumed at step (\d+)", text)
    return int(match[1]) if match else 0


def leftovers(*folders: Path) -> list[str]:
    """Temporary files and locks that a process should have taken with it."""
    odd = re.compile(r"^\..*\.\d+(\.\w+)?$|^\.lock$|\.tmp$|orbax-checkpoint-tmp|^mljax-|^(deleted|replaced)-")
    return [str(p.relative_to(f)) for f in folders if f.is_dir() for p in f.rglob("*") if odd.search(p.name)]
