"""Waits that end: a read of an image that never answers, and a batch that never comes, are errors that say what hangs.

A thread that waits for a dead mount, for a file that another program holds, cannot be interrupted; so others wait for
it, with a limit, and leave it behind.
"""

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from mljax import interrupt
from mljax.errors import UserError

T = TypeVar("T")
READ = 180.0  # seconds that a read of one image may take: the largest file that is read (512 MB) at 3 MB/s
BATCH = 3600.0  # seconds that a batch may take: 1,024 of the largest images, 3 s each, in one thread
CLOSE = 5.0  # seconds that what is left behind may take to close
_local = threading.local()


class Stalled(UserError):
    """A wait that was given up."""


class Helper:
    """A thread that calls functions one after another; it ends with this object."""

    def __init__(self, name: str):
        self._tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.busy = False
        threading.Thread(target=_work, args=(self._tasks, self._results), daemon=True, name=name).start()

    def start(self, function: Callable[[], Any]) -> None:
        """Call a function in the thread; `result` has what it returns."""
        self.busy = True
        self._tasks.put(function)

    def result(self, timeout: float) -> Any:
        """What the function returned, or raised.

        Raises:
          queue.Empty: it has not ended within `timeout` seconds.
        """
        value, error = self._results.get(timeout=timeout)
        self.busy = False
        if error is not None:
            try:
                raise error
            finally:
                del error  # and with it the frames that hold this one
        return value

    def __del__(self) -> None:
        self._tasks.put(None)


def _work(tasks: "queue.SimpleQueue[Any]", results: "queue.SimpleQueue[Any]") -> None:
    while (function := tasks.get()) is not None:
        try:
            answer = function(), None
        except BaseException as error:
            answer = None, error
        del function  # or the last one would live as long as this thread
        results.put(answer)
        del answer


def bounded(read: Callable[[], T], where: str | os.PathLike[str]) -> T:
    """What `read` returns.

    Args:
      where: the file, as an error names it.
    Raises:
      Stalled: it takes longer than `READ` seconds.
    """
    helper = getattr(_local, "helper", None)
    if helper is None:
        helper = _local.helper = Helper("mljax-read")
    helper.start(read)
    try:
        return helper.result(READ)
    except queue.Empty:
        _local.helper = None
        raise Stalled(
            f"Reading {os.fspath(where)} has not ended after {READ:g} s; check the disk or the mount that it is on,"
            " and start again."
        ) from None


class Patient:
    """An iterator that is advanced in a thread of its own, so that the wait for it ends.

    Its `__next__` raises Stalled after `BATCH` seconds, and `interrupt.Stop` if a signal came and there is nothing yet.
    """

    def __init__(self, iterator: Iterator[Any]):
        self.iterator = iterator
        self._helper = Helper("mljax-batches")

    def __iter__(self) -> "Patient":
        return self

    def __next__(self) -> Any:
        if self._helper.busy:
            raise StopIteration  # it was given up
        self._helper.start(self.iterator.__next__)
        began = time.monotonic()
        while True:
            try:
                return self._helper.result(0.5)
            except queue.Empty:
                waited = time.monotonic() - began
                if waited > 1:
                    interrupt.check()
                if waited > BATCH:
                    raise Stalled(
                        f"The loader has made no batch for {BATCH:g} s; check the disk or mount of the images, or lower"
                        " config.optim.batch_size."
                    ) from None

    def close(self) -> None:
        """Close the iterator, if it has `close`; one that hangs is left to the end of the process."""
        close = getattr(self.iterator, "close", lambda: None)
        self.iterator = iter(())  # nothing of it is left for the end of Python, when its modules are gone
        if not self._helper.busy:
            close()
            return
        closing = threading.Thread(target=_quietly, args=(close,), daemon=True)
        closing.start()
        closing.join(CLOSE)


def _quietly(function: Callable[[], object]) -> None:
    with contextlib.suppress(Exception):
        function()
