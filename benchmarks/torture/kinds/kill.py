"""kill -9 anywhere, within saves and deletions, and within evaluations: the resumed run ends as an undisturbed one."""

import signal
import time
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
    lost, kills = 0, 1 + int(case.rng.random() < 0.2)
    for number in range(kills):
        saves = case.folder / f"saves{number}"
        process = _killed(case, system, workdir, expected, saves, number)
        begun = [int(line) for line in saves.read_text().split()] if saves.is_file() else []
        status = process.wait(runs.LIMIT)
        if status not in (0, 128 + signal.SIGKILL):
            raise Failed(f"the run ended with {status} instead: {process.err.strip()[-300:]!r}")
        if left := process.session():
            process.end()
            raise Failed(f"processes are left: {left}")
        if number == kills - 1:
            process = runs.resume(case, system, workdir, expected)
            at = runs.resumed_at(process.err)
            lost = sum(step > at for step in begun)
            if lost > 1:
                raise Failed(f"resumed at step {at}, though the saves of {begun} were handed over")
    return {"figures": {"saves lost": lost}}


def _killed(
    case: Case, system: str, workdir: Any, expected: runs.Reference, saves: Any, number: int
) -> processes.Process:
    """A run that is killed, or that has ended before it could be."""
    share = case.rng.random()
    operation = 1 + int(share * expected.operations)
    place, calls = PLACES[int(case.rng.integers(len(PLACES)))]
    nth, end = 1 + int(share * calls), bool(case.rng.random() < 0.5)

    def hook() -> None:
        _record_saves(saves)
        if case.what == "save or deletion":
            shim.arm(workdir / "checkpoints", shim.ALL, at=operation)
        elif case.what == "evaluation":
            (processes.behind if end else processes.before)(place, nth, processes.die)

    process = processes.forked(runs.argv(system, workdir), case.folder / f"killed{number}", hook=hook)
    if case.what == "anywhere":
        time.sleep(share * expected.seconds)
        process.send(signal.SIGKILL)
    process.wait(runs.LIMIT)
    return process


def _record_saves(path: Any) -> None:
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
