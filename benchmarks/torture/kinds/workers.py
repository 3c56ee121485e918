"""Loader workers that are killed or stopped, and trainers that are killed: an error within 10 s, no orphans."""

import os
import re
import signal
import time
from typing import Any

from benchmarks.torture import processes, runs
from benchmarks.torture.harness import Case, Failed, Kind

LIMIT = 10.0
START = 90.0
ARGV = ("--config.optim.epochs=100000", "--config.eval.every=100000", "--config.log_every=1")


def case(case: Case) -> dict[str, Any]:
    count = int(case.rng.integers(1, 4))
    argv = runs.argv("baseline", case.folder / "run", *ARGV, f"--config.input.workers={count}")
    process = processes.started(argv, case.folder / "log")
    with processes.ending(process):
        loaders = _loaders(process, count)
        time.sleep(case.rng.random() * 2)
        victim, began = loaders[int(case.rng.integers(len(loaders)))], time.time()
        if case.what == "trainer killed":
            process.send(signal.SIGKILL)
        else:
            os.kill(victim, signal.SIGKILL if case.what == "worker killed" else signal.SIGSTOP)
        status = process.wait(60)
        seconds = time.time() - began
        if case.what != "trainer killed":
            _check(process, status, seconds)
        while left := process.session():
            if time.time() - began > LIMIT:
                raise Failed(f"orphans after {LIMIT:.0f} s: {list(left.values())[:2]}")
            time.sleep(0.05)
        gone = time.time() - began
    return {"figures": {"seconds to the error": round(seconds, 2), "seconds until all are gone": round(gone, 2)}}


def _check(process: processes.Process, status: int, seconds: float) -> None:
    said = process.err
    if "Traceback" in said or status != 2:
        raise Failed(f"status {status}: {said.strip()[-300:]!r}")
    if not re.search(r"^mljax: .*worker", said, flags=re.M):
        raise Failed(f"no error that names a worker: {said.strip()[-300:]!r}")
    if seconds > LIMIT:
        raise Failed(f"{seconds:.1f} s to the error")


def _loaders(process: processes.Process, count: int) -> list[int]:
    """The workers of a run that has logged a step."""
    end, metrics = time.time() + START, process.folder.parent / "run" / "metrics.jsonl"
    while time.time() < end:
        if process.poll() is not None:
            raise Failed(f"the run ended with {process.status} before anything was done to it: {process.err[-300:]!r}")
        spawned = [pid for pid, command in process.session().items() if "spawn_main" in command]
        if len(spawned) >= count and metrics.is_file() and metrics.stat().st_size:
            return spawned
        time.sleep(0.05)
    raise Failed(f"no step within {START:.0f} s: {process.err[-300:]!r}")


KIND = Kind(
    name="workers",
    goal="workers killed or stopped: an error within 10 s; trainers killed: no orphans after 10 s",
    plan={"worker killed": 20, "worker stopped": 10, "trainer killed": 10},
    case=case,
    limit=300.0,
)
