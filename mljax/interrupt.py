"""Ctrl-C and SIGTERM: the step that runs is finished and saved first."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

STOPPING = b"\nstopping as soon as it is saved; press Ctrl-C again to leave at once\n"


class Stop(Exception):
    """The user asked to leave; the state was saved."""


@contextlib.contextmanager
def interruptible() -> Iterator[list[float]]:
    """Collects Ctrl-C and SIGTERM in a list instead of raising; a second Ctrl-C raises Stop at once.

    Not one within a second of the first: launchers pass on what the terminal has sent to everyone already.
    """
    signals: list[float] = []

    def handler(number: int, frame: Any) -> None:
        if not signals:
            signals.append(time.monotonic())
            with contextlib.suppress(OSError):
                os.write(2, STOPPING)  # a plain write: the handler may have cut into any other
        elif number == signal.SIGINT and time.monotonic() - signals[0] > 1:
            raise Stop("stopped at once; the last checkpoint is whole, run the same command to go on from it")

    old: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not in the main thread: nothing to catch there
                old[number] = signal.signal(number, handler)
        yield signals
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)
