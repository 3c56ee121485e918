"""Worker processes of the loader: Ctrl-C does not reach them, they end with their parent, and one that is killed or
stopped is an error within a bound."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from mljax.errors import UserError
from mljax.pipeline.failures import Failures

STOPPED = 4.0  # seconds after which a stopped worker is given up
CLOSE = 1.0  # seconds that workers have to end by themselves
_NAME = "grain-process-prefetch"


def start(worker: int, workers: int) -> None:
    """The first thing that a worker process does: ignore Ctrl-C, and watch for the end of its parent."""
    del worker, workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: Any) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


class Shielded:
    """An iterator of worker processes that Ctrl-C does not reach, which the terminal sends to them as to their parent.

    Processes inherit which signals are held back, and grain starts most of them with the first elements that are asked
    for; `start` is for the others.

    Args:
      failures: what they tell in its shared file is collected when the iterator is closed, and the file removed.
    """

    def __init__(self, iterator: Any, workers: int, failures: Failures | None = None):
        self.iterator, self.left, self.failures = iterator, workers + 1, failures
        shared = failures.shared if failures else None
        self._remove = weakref.finalize(self, shared.unlink, missing_ok=True) if shared else lambda: None
        self._watch, self.pids = Watch(), set[int]()
        _quiet_tracker()

    def __iter__(self) -> "Shielded":
        return self

    def __next__(self) -> Any:
        try:
            with self._watch:
                return self._next()
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            raise self._watch.error(error) from None

    def _next(self) -> Any:
        if not self.left or not hasattr(signal, "pthread_sigmask"):
            return next(self.iterator)
        self.left -= 1
        others = workers() - self.pids
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return next(self.iterator)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            self.pids |= workers() - others

    def close(self) -> None:
        self._watch.close()
        killer = threading.Timer(CLOSE, self._kill)  # grain waits for one worker after the other, 25 s each
        killer.daemon = True
        killer.start()
        self.iterator.close()
        killer.cancel()
        if self.failures is not None:
            self.failures.collect()
        self._remove()

    def _kill(self) -> None:
        while self.pids & (alive := workers()):
            for pid in self.pids & alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)


def workers() -> set[int]:
    """The worker processes of all loaders."""
    return {p.pid for p in multiprocessing.active_children() if p.name.startswith(_NAME) and p.pid}


def _quiet_tracker() -> None:
    """Start the process that removes what killed ones have left, without its remark that it does."""
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    try:
        resource_tracker.ensure_running()
    finally:
        sys.warnoptions.pop()


class Watch:
    """While a batch is waited for: workers that are stopped for longer than STOPPED are killed, which ends the wait."""

    def __init__(self, stopped: Callable[[int], bool] | None = None):
        self.stopped = stopped or is_stopped
        self.since: dict[int, float] = {}
        self.killed: list[int] = []
        self._waiting, self._closed = threading.Event(), False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name="mljax-watch-workers")
            self._thread.start()
        self._waiting.set()

    def __exit__(self, *_: object) -> None:
        self._waiting.clear()
        self.since.clear()

    def _run(self) -> None:
        while self._waiting.wait() and not self._closed:
            for pid in workers():
                if not self.stopped(pid):
                    self.since.pop(pid, None)
                elif time.monotonic() - self.since.setdefault(pid, time.monotonic()) > STOPPED:
                    self.killed.append(pid)
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.5)

    def error(self, error: BaseException) -> UserError:
        """What a worker that ended is called."""
        if self.killed:
            return UserError(
                f"The loader's worker process {self.killed[0]} was stopped for {STOPPED:.0f} s; start the run again,"
                " which goes on from its last checkpoint."
            )
        reason = str(error).partition("exit code ")[2].partition(".")[0]
        return UserError(
            f"A worker process of the loader ended unexpectedly (exit code {reason}; -9 is a kill, often for lack of"
            " memory); lower config.input.workers, or start the run again."
        )

    def close(self) -> None:
        self._closed = True
        self._waiting.set()


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal; False where /proc does not tell."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except (OSError, IndexError):
        return False
