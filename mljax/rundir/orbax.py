"""Orbax without its noise: imported late, its log and warnings off the terminal, its errors short, its exit awaited."""

import contextlib
import logging
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

from mljax.errors import UserError


def orbax() -> Any:
    """Imported on first use (half a second), its log kept off the terminal: what matters in it is raised here."""
    import orbax.checkpoint as ocp

    for name in ("absl", "asyncio"):
        log = logging.getLogger(name)
        if _from_elsewhere not in log.filters:
            log.addFilter(_from_elsewhere)
    if sys.unraisablehook is not _without_unclosed:
        _hook.append(sys.unraisablehook)
        sys.unraisablehook = _without_unclosed
    return ocp


def _from_elsewhere(record: logging.LogRecord) -> bool:
    theirs = f"{os.sep}orbax{os.sep}"  # in the text too: asyncio tells of a failed write once more, when Python ends
    return theirs not in record.pathname and not any(word in record.getMessage() for word in ("tensorstore", theirs))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


_hook: list[Any] = []


def _without_unclosed(report: Any) -> None:
    """After a failed read or write, those still under way complain on stderr, from other threads and for a while."""
    if "Event loop is closed" not in str(report.exc_value):
        _hook[-1](report)


def close_at_exit(checkpoints: "weakref.ref[Any]") -> None:
    """Wait for a save at the exit of Python, while the thread pools that it needs still run: atexit is too late."""

    def close() -> None:
        try:
            if (alive := checkpoints()) is not None:
                alive.close()
        except UserError as error:
            print(error, file=sys.stderr)

    getattr(threading, "_register_atexit", lambda _: None)(close)


def error_code(error: BaseException | None) -> int | None:
    """The errno of a failed write; tensorstore has it only in its words."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        words = str(error)
        if "os_error_code='" in words:
            return int(words.split("os_error_code='")[1].split("'")[0])
        error = error.__cause__ or error.__context__
    return None
