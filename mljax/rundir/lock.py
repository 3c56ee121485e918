"""One run, one writer: a lock that ends with the process that holds it, however that ends."""

import contextlib
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from mljax import untrusted
from mljax.errors import UserError
from mljax.interrupt import remove_at_end

NAME = ".lock"
log = logging.getLogger("mljax")
_held: set[int] = set()  # file descriptors


def _release_in_child() -> None:
    """A process that is forked off does not hold the lock: it would outlive its parent's."""
    for file in _held:
        with contextlib.suppress(OSError):
            os.close(file)
    _held.clear()


os.register_at_fork(after_in_child=_release_in_child)


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Hold the lock of a run directory; reading needs none.

    The lock is the kernel's, on the file `.lock`: what a dead process left of it does not count. The file names host
    and process, and is gone when the lock is released.

    Raises:
      UserError: another process, here or on another host, trains in this directory.
    """
    file = _acquire(workdir / NAME)
    _held.add(file)
    try:
        with remove_at_end(workdir / NAME):
            yield
    finally:
        _held.discard(file)
        with contextlib.suppress(OSError):
            (workdir / NAME).unlink()  # while it is held, so that it is nobody else's
        os.close(file)


def _acquire(path: Path) -> int:
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}); choose another --workdir.") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise UserError(_in_use(path)) from None
        except OSError as error:
            log.warning("%s cannot be locked (%s): nothing keeps a second run out.", path.parent, error.strerror)
        if _is_at(file, path):
            break
        os.close(file)  # its holder has deleted it meanwhile
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with contextlib.suppress(OSError):  # a full disk keeps nobody from the lock
        os.ftruncate(file, 0)
        os.write(file, json.dumps(owner).encode())
    return file


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except OSError:
        return False


def _in_use(path: Path) -> str:
    try:
        owner = untrusted.read_json(path)
        who = f"process {int(owner['pid'])} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        who = "another process"
    return f"{path.parent} is in use by {who}; wait until that run ends, stop it, or choose another --workdir."
