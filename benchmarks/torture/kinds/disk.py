"""A full disk and input/output errors at any write, sync or rename: the previous checkpoint loads, the run goes on."""

import shutil
from pathlib import Path
from typing import Any

from benchmarks.torture import processes, runs, shim
from benchmarks.torture.harness import Case, Failed, Kind, once
from mljax.rundir import step_folders

SYSTEM = "baseline"


def case(case: Case) -> dict[str, Any]:
    expected = runs.reference(case, SYSTEM)
    half = once(case.shared / "half", lambda folder: _half(case, folder))
    name, _, what = case.what.partition(" at a ")
    mask, workdir = shim.MASKS[what], case.folder / "run"
    counted = once(case.shared / f"count {what}", lambda folder: _count(case, half, mask, folder))
    total = int((counted / "count").read_text())
    at = 1 + int(case.rng.integers(total))
    times = shim.EVER if name == "ENOSPC" else 1  # a disk stays full, an error may pass
    shutil.copytree(half / "run", workdir)
    process = processes.forked(
        runs.argv(SYSTEM, workdir),
        case.folder / "faulty",
        hook=lambda: shim.arm(workdir, mask, at, times, shim.ERRORS[name]),
    )
    status, said = process.wait(runs.LIMIT), process.err
    if "Traceback" in said:
        raise Failed(f"a traceback, status {status}, {case.what} {at}: {said.strip()[-400:]!r}")
    if status not in (0, 2) or (status == 2 and "mljax: " not in said):
        raise Failed(f"status {status}, {case.what} {at}: {said.strip()[-300:]!r}")
    process = runs.resume(case, SYSTEM, workdir, expected)
    step = runs.resumed_at(process.err)
    before = max(step_folders.complete(half / "run" / "checkpoints" / "0"))
    if step < before and "finished earlier" not in process.out:
        raise Failed(f"resumed at step {step}, though step {before} was saved before {case.what} {at}")
    return {"status": status, "at": at}


def _half(case: Case, folder: Path) -> None:
    """A run that was killed once two epochs were saved."""

    def hook() -> None:
        processes.before("mljax.scoring:Scorer.scores", 3, processes.die)

    processes.forked(runs.argv(SYSTEM, folder / "run"), folder / "log", hook=hook).wait(runs.LIMIT)


def _count(case: Case, half: Path, mask: int, folder: Path) -> None:
    """How many operations of a kind the second half of a run does."""
    workdir = folder / "run"
    shutil.copytree(half / "run", workdir)
    argv, log = runs.argv(SYSTEM, workdir), folder / "log"
    process = processes.forked(argv, log, hook=lambda: shim.arm(workdir, mask), after=shim.count)
    if process.wait(runs.LIMIT):
        raise Failed(f"the run of which operations are counted failed: {process.err[-300:]!r}")
    (folder / "count").write_text(str(process.after))


KIND = Kind(
    name="disk",
    goal="ENOSPC and EIO at any write, sync or rename: the previous checkpoint loads, the resume ends bit-equal",
    plan={"ENOSPC at a write": 20, "EIO at a write": 20, "EIO at a fsync": 10, "EIO at a rename": 10},
    case=case,
    limit=400.0,
    shim=True,
)
