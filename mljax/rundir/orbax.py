"""Orbax, which writes and reads arrays, without its noise: imported on first use, its log and warnings kept off the
terminal, its saves awaited when Python exits.

Which steps there are, which are kept and whether they are what was saved is not orbax's business: see `steps` and
`manifest`. Its CheckpointManager decides what to delete by a file without a digest, and fails on one that is damaged.
"""

import contextlib
import errno
import logging
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mljax.errors import UserError
from mljax.rundir import manifest
from mljax.trees import flatten

# A read that fails with one of these says nothing about the file.
PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM, errno.ETIMEDOUT, errno.EINTR)


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


def new_saver() -> Any:
    """What writes checkpoints in the background, one at a time."""
    ocp = orbax()
    with quiet():
        return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())


def save(saver: Any, folder: Path, record: Mapping[str, Any], leaves: Mapping[str, np.ndarray]) -> None:
    """Begin to write arrays by path, and their record, into a folder that appears when all of it is written."""
    ocp = orbax()
    items = {name: ocp.args.PyTreeSave(tree) for name, tree in manifest.items(leaves).items()}
    with quiet():
        saver.save(folder, args=ocp.args.Composite(record=ocp.args.JsonSave(dict(record)), **items))


def read(folder: Path, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """The arrays of these paths and shapes; what the folder lacks is absent, or not an array."""
    ocp = orbax()
    args = {}
    for name, tree in manifest.items(shapes).items():
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        args[name] = ocp.args.PyTreeRestore(item=tree, restore_args=restore_args)
    if not args:
        return {}
    with quiet(), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        restored = reader.restore(folder, args=ocp.args.Composite(**args))
    return {path: leaf for name in args for path, leaf in flatten(restored[name]).items()}


def _from_elsewhere(record: logging.LogRecord) -> bool:
    theirs = f"{os.sep}orbax{os.sep}"  # in the text too: asyncio reports a failed write once more, when Python ends
    return theirs not in record.pathname and not any(word in record.getMessage() for word in ("tensorstore", theirs))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


_hook: list[Any] = []


def _without_unclosed(report: Any) -> None:
    """Without the complaints, from other threads, of reads and writes that were under way when another failed."""
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
    """The errno of a failed read or write; tensorstore has it only in its message."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        _, mark, rest = str(error).partition("os_error_code='")
        if mark:
            return int(rest.split("'")[0])
        error = error.__cause__ or error.__context__
    return None
