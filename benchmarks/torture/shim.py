"""Faults of the disk: a small library, preloaded, that lets the n-th file operation below a folder fail or kill."""

import ctypes
import errno
import shutil
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.torture.harness import exclusive

SOURCE = Path(__file__).with_name("shim.c")
WRITE, FSYNC, RENAME, CREATE, REMOVE, MKDIR = 1, 2, 4, 8, 16, 32
ALL = WRITE | FSYNC | RENAME | CREATE | REMOVE | MKDIR
MASKS = {"write": WRITE | CREATE | MKDIR, "fsync": FSYNC, "rename": RENAME}
ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO}
EVER = 1 << 40


def build(out: Path) -> Path:
    """Compile the library, once, with the C compiler of this machine.

    Raises:
      SystemExit: there is none; the kinds that need it cannot be run.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise SystemExit("The kinds 'kill' and 'disk' need a C compiler (cc), and there is none; name other kinds.")
    library = out / "shim.so"
    with exclusive(out / "shim.lock"):
        if not library.is_file() or library.stat().st_mtime < SOURCE.stat().st_mtime:
            command = [compiler, "-O2", "-shared", "-fPIC", "-w", "-o", str(library), str(SOURCE), "-ldl"]
            subprocess.run(command, check=True)
    return library


def arm(folder: Path, mask: int, at: int = 0, times: int = 1, code: int = 0) -> None:
    """In a process that runs with the library: count operations, and let some fail, or kill where `code` is 0.

    Args:
      folder: below which operations count.
      at: the first that fails, from 1; 0: none.
    """
    _library().torture_arm(str(folder).encode(), mask, ctypes.c_long(at), ctypes.c_long(times), code)


def count() -> int:
    """Operations since `arm`."""
    function = _library().torture_count
    function.restype = ctypes.c_long
    return function()


def _library() -> Any:
    return ctypes.CDLL(None)


def loaded() -> bool:
    """Whether this process runs with the library."""
    return hasattr(_library(), "torture_arm")
