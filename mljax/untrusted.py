"""Files of unknown origin: only regular ones are opened, and declared sizes are checked before memory is allocated."""

import errno
import io
import json
import math
import os
import stat
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

import numpy as np

SPARE = 256 << 20  # bytes that unpacking any file may take, besides twice its own size
MAX_IMAGE = 512 << 20  # bytes of an image file
MAX_DIRECTORY = 2 << 20  # bytes of the list of members of a zip file of arrays: some 20,000, half a second to read
MAX_DIMENSIONS = 32
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class NotRegular(OSError):
    """A FIFO, socket, device or folder, of which reading might never end, or a file above the limit."""


def kind(mode: int) -> str:
    """What a file is that is not a regular one, from `os.stat(..).st_mode`; empty for a regular file."""
    return "" if stat.S_ISREG(mode) else next((text for test, text in _KINDS if test(mode)), "a special file")


def open_regular(path: str | os.PathLike[str], limit: int | None = None) -> io.BufferedReader:
    """Open a regular file, or a link to one, for reading; never waits for a FIFO or a device.

    Args:
      limit: bytes that the file has at most.
    Raises:
      NotRegular: it is something else, or larger.
      OSError: it cannot be opened.
    """
    _check(os.stat(path), path, limit)
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    file = os.fdopen(descriptor, "rb")
    try:
        _check(os.fstat(descriptor), path, limit)  # what was opened, should it have been exchanged in between
    except OSError:
        file.close()
        raise
    return file


def read_regular(path: str | os.PathLike[str], limit: int | None = None) -> bytes:
    """The bytes of a regular file; see `open_regular`."""
    with open_regular(path, limit) as file:
        return file.read()


def parse_json(text: str | bytes, **options: Any) -> Any:
    """`json.loads` of a text that may be nested beyond what Python can read.

    Raises:
      ValueError: it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
      OSError: it cannot be read, or is not a regular file.
      ValueError: it is not JSON, or nested too deeply.
    """
    return parse_json(read_regular(path))


def _check(status: os.stat_result, path: str | os.PathLike[str], limit: int | None) -> None:
    if other := kind(status.st_mode):
        code = errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL
        raise NotRegular(code, f"{other}, not a regular file", os.fspath(path))
    if limit is not None and status.st_size > limit:
        raise NotRegular(errno.EFBIG, f"{status.st_size:,} bytes, at most {limit:,} are read", os.fspath(path))


def open_zip(file: IO[bytes], *, limit: int | None = None, directory: int = MAX_DIRECTORY) -> zipfile.ZipFile:
    """Open a zip file whose members, unpacked, fit a limit.

    Args:
      file: open for reading; the caller closes it.
      limit: bytes of all members, unpacked; None: twice the file and `SPARE`.
      directory: bytes of the list of members.
    Raises:
      ValueError, zipfile.BadZipFile: damaged, larger, or with members that overlap.
    """
    size = file.seek(0, io.SEEK_END)
    if (listed := _directory_size(file, size)) > directory:
        raise ValueError(f"its list of members has {listed:,} bytes, at most {directory:,} are read")
    file.seek(0)
    archive = zipfile.ZipFile(file)
    members = sorted(archive.infolist(), key=lambda info: info.header_offset)
    total, limit = sum(info.file_size for info in members), 2 * size + SPARE if limit is None else limit
    if total > limit:
        raise ValueError(f"its members unpack to {total:,} bytes, at most {limit:,} are read")
    ends = [info.header_offset + 30 + len(info.filename) + info.compress_size for info in members]
    if any(end > info.header_offset for end, info in zip(ends, members[1:])) or any(end > size for end in ends):
        raise ValueError("its members overlap, or reach beyond its end")
    return archive


def _directory_size(file: IO[bytes], size: int) -> int:
    """Bytes of a zip file's list of members, from the record at its end; 0 if there is none."""
    file.seek(max(0, size - (1 << 16) - 22))
    tail = file.read()
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) < at + 16:
        return 0
    listed = int.from_bytes(tail[at + 12 : at + 16], "little")
    large = tail.rfind(b"PK\6\6", 0, at)  # of more than 4 GB; where it is there, zipfile believes it
    return int.from_bytes(tail[large + 40 : large + 48], "little") if large >= 0 else listed


def read_npz(path: Path, *, limit: int | None = None, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of a .npz file by name; objects are refused.

    Args:
      limit: bytes of all arrays; None: twice the file and `SPARE`.
      names: only these; None: all.
    Raises:
      OSError: it cannot be opened, or is not a regular file.
      ValueError, EOFError, zipfile.BadZipFile, zlib.error: damaged, or a size that does not agree with the file.
    """
    with open_regular(path) as file, open_zip(file, limit=limit) as archive:
        arrays = {}
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            if name in arrays:
                raise ValueError(f"it has two arrays {name!r}")
            if info.filename.endswith(".npy") and (names is None or name in names):
                with archive.open(info) as member:
                    arrays[name] = _read_array(member, info.file_size)
        return arrays


def read_npy(path: Path) -> np.ndarray:
    """The array of a .npy file; raises as `read_npz` does."""
    with open_regular(path) as file:
        return _read_array(file, os.fstat(file.fileno()).st_size)


def _read_array(file: IO[bytes], size: int) -> np.ndarray:
    """An array in numpy's format that takes `size` bytes with its header; memory is allocated once that is sure."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"it has version {version} of numpy's format")
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("it holds objects, which are not read")
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"an array has {len(shape):,} dimensions")
    if min(shape, default=0) < 0:
        raise ValueError(f"an array has shape {shape}")
    expected = math.prod(shape) * dtype.itemsize
    if file.tell() + expected != size:
        raise ValueError(f"an array of shape {shape} and {expected:,} bytes does not fit its {size:,} bytes")
    array = np.empty(math.prod(shape), dtype)
    view, done = array.view(np.uint8) if expected else np.empty(0, np.uint8), 0
    while block := file.read(min(1 << 20, expected - done) or 1):  # the last read meets the end, and checks the sum
        view[done : done + len(block)] = np.frombuffer(block, np.uint8)
        done += len(block)
    if done != expected:
        raise EOFError(f"an array ends after {done:,} of {expected:,} bytes")
    return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)
