"""kill -9 anywhere, within saves and deletions, and within evaluations: the resumed run ends as an undisturbed one."""

import shutil
import signal
import time
from pathlib import Path
from typing import Any

from benchmarks.torture import processes, runs, shim
from benchmarks.torture.harness import Case, Failed, Kind

SYSTEMS = ("cmsg", "sst", "role")
# Calls within an evaluation, and how many of each a run has.
PLACES = (
    ("mljax.scoring:Scorer.scores", runs.EPOCHS),
    ("mljax.pipeline.loader:eval_batches", runs.EPOCHS),
    ("mljax.pipeline.loader:pad", runs.EPOCHS),
    ("mljax.scoring:measure", runs.EPOCHS),
)


def case(case: Case) -> dict[str, Any]:
    system = SYSTEMS[int(case.rng.integers(len(SYSTEMS)))]
    expected, workdir = runs.reference(case, system), case.folder / "run"
    begun = _killed(case, system, expected, 0)
    if case.rng.random() < 0.2:
        begun = [*begun, *_killed(case, system, expected, 1)]
    process = runs.resume(case, system, workdir, expected)
    at = runs.TOTAL if "finished earlier" in process.out else runs.resumed_at(process.err)
    lost = sum(step > at for step in set(begun))
    if lost > 1:
        raise Failed(f"resumed at step {at}, though the saves of {begun} were handed over")
    return {"figures": {"saves lost": lost}}


def _killed(case: Case, system: str, expected: runs.Reference, number: int) -> list[int]:
    """Kill a run -> the steps that it had handed over to be saved. The first kill always meets it."""
    saves, workdir = case.folder / f"saves{number}", case.folder / "run"
    share, place = case.rng.random(), int(case.rng.integers(len(PLACES)))
    end = bool(case.rng.random() < 0.5)
    for _ in range(6):
        process = _start(case, system, expected, saves, (share, place, end))
        status = process.wait(runs.LIMIT)
        if status not in (0, 128 + signal.SIGKILL):
            raise Failed(f"the run ended with {status} instead: {process.err.strip()[-300:]!r}")
        if left := process.session():
            process.end()
            raise Failed(f"processes are left: {left}")
        if status or number:
            return [int(line) for line in saves.read_text().split()] if saves.is_file() else []
        share *= 0.8  # it had ended before
        saves.unlink(missing_ok=True)
        shutil.rmtree(workdir)
    raise Failed("the run always ended before it was killed")


def _start(
    case: Case, system: str, expected: runs.Reference, saves: Path, when: tuple[float, int, bool]
) -> processes.Process:
    """A run that is killed at a share of its time, of its file operations, or of the calls of a place."""
    (share, chosen, end), workdir = when, case.folder / "run"
    place, calls = PLACES[chosen]

    def hook() -> None:
        _record_saves(saves)
        if case.what == "save or deletion":
            shim.arm(workdir / "checkpoints", shim.ALL, at=1 + int(share * expected.operations))
        elif case.what == "evaluation":
            (processes.behind if end else processes.before)(place, 1 + int(share * calls), processes.die)

    process = processes.forked(runs.argv(system, workdir), case.folder / "killed", hook=hook)
    if case.what == "anywhere":
        time.sleep(share * expected.seconds)
        process.send(signal.SIGKILL)
    return process


def _record_saves(path: Path) -> None:
    """Keep the step of every save that is handed over: copied to the host, and being written."""
    from mljax.rundir.checkpoint import Checkpoints

    save = Checkpoints.save

    def recorded(self: Any, step: int, *args: Any, **kwargs: Any) -> bool:
        result = save(self, step, *args, **kwargs)
        with path.open("a") as file:
            file.write(f"{step}\n")
        return result

    setattr(Checkpoints, "save", recorded)  # noqa: B010


KIND = Kind(
    name="kill",
    goal="kill -9, resume: digest-equal to the undisturbed run, at most one save interval lost",
    plan={"anywhere": 50, "save or deletion": 30, "evaluation": 20},
    case=case,
    limit=600.0,
    shim=True,
)
