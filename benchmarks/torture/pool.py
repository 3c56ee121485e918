"""Workers that run cases, several at once: one that dies or hangs costs its case and is replaced."""

import contextlib
import dataclasses
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.torture.harness import QUICK, ROOT, Kind, Options, read_outcomes, write_outcomes


def environment(kind: Kind, options: Options) -> dict[str, str]:
    """Of a worker: nothing of the user's own settings, one compile cache for all."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLJAX_", "JAX_", "XLA_", "LD_PRELOAD"))}
    cache = options.out / "cache"
    return kept | {
        "PYTHONPATH": str(ROOT),
        "MLJAX_CACHE": str(cache),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "XLA_FLAGS": QUICK,
        **kind.env,
    }


START = 300.0  # seconds that a worker may take until it is ready for its first case


class Worker:
    """A process that runs one case at a time."""

    def __init__(self, kind: Kind, options: Options, log: Path, preload: Path | None = None):
        env = environment(kind, options) | ({"LD_PRELOAD": str(preload)} if preload else {})
        settings = json.dumps({**dataclasses.asdict(options), "out": str(options.out)})
        command = [sys.executable, "-m", "benchmarks.torture.worker", kind.name, settings]
        with log.open("a") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file,
                start_new_session=True, text=True, bufsize=1,
            )  # fmt: skip
        self.ready = False

    def run(self, index: int, limit: float) -> dict[str, Any]:
        """The line of a case; of one that killed or hung the worker too."""
        process, began = self.process, time.perf_counter()
        assert process.stdin is not None and process.stdout is not None
        line = ""
        with contextlib.suppress(BrokenPipeError):
            if not self.ready and select.select([process.stdout], [], [], START)[0]:
                self.ready, began = process.stdout.readline() == "ready\n", time.perf_counter()
            process.stdin.write(f"{index}\n")
            process.stdin.flush()
            if select.select([process.stdout], [], [], limit)[0]:
                line = process.stdout.readline()
            else:
                self.close()
                return _lost(index, "hung", f"no outcome after {limit:.0f} s", began)
        if line:
            return json.loads(line)
        status = process.wait()
        what = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        return _lost(index, "died", f"the process ended with {what}", began)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        """End it and whatever it has started in its session."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def _lost(index: int, outcome: str, why: str, began: float) -> dict[str, Any]:
    seconds = round(time.perf_counter() - began, 3)
    return {"case": index, "outcome": outcome, "why": why, "seconds": seconds}


def run_kind(kind: Kind, count: int, options: Options, say: Callable[[str], None], preload: Path | None = None) -> None:
    """Run the cases 0 .. count of a kind that have no outcome yet."""
    path = options.out / f"{kind.name}.jsonl"
    done = read_outcomes(path)
    write_outcomes(path, done)
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(count):
        if index not in done:
            waiting.put(index)
    every, lock, left = kind.categories(), threading.Lock(), waiting.qsize()
    stop, workers = threading.Event(), list[Worker]()

    def keep(line: dict[str, Any]) -> None:
        nonlocal left
        what = every[line["case"] % len(every)]
        line = {"what": what, "units": kind.units_of(what, options.share), **line}
        with lock, path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            left -= 1
        if line["outcome"] != "ok":
            say(f"{kind.name} {line['case']} ({what}): {line['outcome']}: {line['why']}")
        elif left % 500 == 0:
            say(f"{kind.name}: {left} cases left")

    def work() -> None:
        worker: Worker | None = None
        while not stop.is_set():
            try:
                index = waiting.get_nowait()
            except queue.Empty:
                break
            if worker is None or not worker.alive:
                worker = Worker(kind, options, options.out / f"{kind.name}.log", preload)
                workers.append(worker)
            line = worker.run(index, kind.limit)
            if not stop.is_set():
                keep(line)
        if worker is not None:
            worker.close()

    threads = [threading.Thread(target=work) for _ in range(max(1, min(options.jobs, kind.jobs, left)))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        stop.set()
        for worker in workers:
            worker.close()
