"""SIGTERM and SIGINT from the first moment to the last: the right status within 10 s, nothing left, resumes."""

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from benchmarks.torture import processes, runs
from benchmarks.torture.harness import Case, Failed, Kind, once

LIMIT = 10.0
SYSTEM = "baseline"
# Calls of a run from its start to its finish, and how many of each it has.
PLACES = (
    ("mljax.rundir:save_meta", 1),
    ("mljax.experiment:source", 2),
    ("mljax.experiment:init_variables", 1),
    ("mljax.parallel:compile_step", 1),
    ("mljax.pipeline.loader:train_batches", 1),
    ("mljax.scoring:Scorer.scores", runs.EPOCHS),
    ("mljax.scoring:measure", runs.EPOCHS + 1),
    ("mljax.rundir.checkpoint:Checkpoints.save", runs.EPOCHS),
    ("mljax.rundir.checkpoint:Checkpoints.wait", 3 * runs.EPOCHS),
    ("mljax.scoring:write", 1),
    ("mljax.scoring:table", 1),
    ("mljax.rundir.checkpoint:Checkpoints.close", 1),
)


def case(case: Case) -> dict[str, Any]:
    expected, workdir = runs.reference(case, SYSTEM), case.folder / "run"
    temporary, sent = case.folder / "tmp", case.folder / "sent"
    temporary.mkdir()
    number = signal.SIGTERM if case.rng.random() < 0.5 else signal.SIGINT
    start = _at_a_place if case.what == "at a place" else _at_a_time
    process = start(case, number, sent, {"TMPDIR": str(temporary)})
    with processes.ending(process):
        status = process.wait(60)
        if not sent.exists():
            raise Failed("the run ended before its signal")
        seconds = time.time() - float(sent.read_text())
        complete = sent.with_suffix(".complete").exists()
        _check(process, 128 + number if complete and not status else status, number, seconds)
        time.sleep(0.2)
        if left := process.session():
            raise Failed(f"processes are left after {status}: {list(left.values())[:2]}")
    if left := runs.leftovers(workdir, temporary):
        raise Failed(f"files are left after {status}: {left[:4]}")
    runs.resume(case, SYSTEM, workdir, expected)
    return {"figures": {"seconds to exit": round(seconds, 2)}}


def _check(process: processes.Process, status: int, number: int, seconds: float) -> None:
    said, name = process.err, signal.Signals(number).name
    if "Traceback" in said:
        raise Failed(f"a traceback after {name}, status {status}: {said.strip()[-300:]!r}")
    if status != 128 + number:
        raise Failed(f"status {status} after {name}: {said.strip()[-200:]!r}")
    if seconds > LIMIT:
        raise Failed(f"{seconds:.1f} s from {name} to the exit")


def _keep(case: Case, sent: Path) -> None:
    """When a signal is sent, and whether the run is complete by then: it may end with 0, for nothing is left to do."""
    if (case.folder / "run" / "report.json").exists():
        sent.with_suffix(".complete").touch()
    sent.write_text(repr(time.time()))


def _at_a_place(case: Case, number: int, sent: Path, env: dict[str, str]) -> processes.Process:
    """A forked run that sends the signal to itself before or after a call."""
    place, calls = PLACES[int(case.rng.integers(len(PLACES)))]
    nth, end = 1 + int(case.rng.integers(calls)), bool(case.rng.random() < 0.5)

    def send() -> None:
        _keep(case, sent)
        os.kill(os.getpid(), number)

    def hook() -> None:
        (processes.behind if end else processes.before)(place, nth, send)

    return processes.forked(runs.argv(SYSTEM, case.folder / "run"), case.folder / "stopped", hook=hook, env=env)


def _at_a_time(case: Case, number: int, sent: Path, env: dict[str, str]) -> processes.Process:
    """A process of its own, and a signal at a share of its time; earlier if it has ended by then."""
    more = ("--config.input.workers=2",) if case.what == "at a time, with workers" else ()

    def make(folder: Path) -> None:
        for name in ("cold", "warm"):  # the time of a run whose programs were compiled before
            began = time.time()
            processes.started(runs.argv(SYSTEM, folder / name, *more), folder / f"log {name}").wait(90)
        (folder / "seconds").write_text(repr(time.time() - began))

    folder = once(case.shared / f"timed{len(more)}", make)
    whole, share = float((folder / "seconds").read_text()), case.rng.random()
    process = None
    for attempt in range(5):
        shutil.rmtree(case.folder / "run", ignore_errors=True)
        process = processes.started(runs.argv(SYSTEM, case.folder / "run", *more), case.folder / "stopped", env=env)
        time.sleep(share * whole * 0.8**attempt)
        _keep(case, sent)
        if process.send(number):
            return process
        sent.unlink()
    assert process is not None
    return process


KIND = Kind(
    name="signals",
    goal="SIGTERM and SIGINT from start-up to finish: 143 or 130 within 10 s, nothing left behind, resumes",
    plan={"at a time": 50, "at a time, with workers": 10, "at a place": 40},
    case=case,
    limit=400.0,
)
