"""What every reader of image files needs: where data lies, whether its images are there, what changes with them."""

import hashlib
import operator
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mljax import untrusted
from mljax.errors import UserError, nearest

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


class Absent(UserError):
    """Data that are not there; `mljax.data.source.load` adds how they can be had."""


def data_folder(root: str | os.PathLike | None) -> Path:
    """The folder that holds data sets: `root`, or the environment variable MLJAX_DATA.

    Raises:
      Absent: neither is given, or it is not a folder.
    """
    given = root if root not in (None, "") else os.environ.get("MLJAX_DATA")
    if not given:
        raise Absent("No data folder is given: set 'root' in the data section or the environment variable MLJAX_DATA.")
    if not isinstance(given, str | os.PathLike) or "\0" in str(given):
        raise UserError(f"The data folder {given!r} is not a path; set 'root' to one.")
    folder = Path(given).expanduser()
    if not folder.is_dir():
        origin = "'root'" if root not in (None, "") else "The environment variable MLJAX_DATA"
        raise Absent(f"{origin} names {str(folder)!r}, which is not a folder.")
    return folder


def some(names: Iterable[object], limit: int = 3, *, quote: bool = True) -> str:
    """'a', 'b', 'c' and 5 more."""
    listed = [repr(str(name)) if quote else str(name) for name in names]
    more = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" and {more} more" if more > 0 else "")


def fingerprint(
    ids: Sequence[str], paths: Sequence[str | os.PathLike], labels: np.ndarray, *, where: str, hint: str = ""
) -> str:
    """Hash of ids, labels, and size and time of every image file; the files must exist.

    Args:
      ids: N names of images.
      paths: N image files.
      labels: (N l).
      where: what names the images, for the error: "ImageSets/Main/test.txt".
      hint: what to do, for the error; empty: add them or take them off the list.
    Returns:
      32 hexadecimal digits. Copying files without keeping their times changes it.
    Raises:
      UserError: images are absent, or FIFOs, sockets, devices or folders; the sentence has the first of them.
    """
    numbers, absent, special, stat = array("q"), [], [], os.stat
    for path in paths:  # of millions: every name that is looked up counts
        try:
            status = stat(path)
        except OSError:
            absent.append(path)
        else:
            if status.st_mode & 0o170000 != 0o100000:
                special.append(f"{str(path)!r} is {untrusted.kind(status.st_mode)}")
            numbers.append(status.st_size)
            numbers.append(status.st_mtime_ns)
    if absent:
        shown = ", ".join(repr(str(path)) for path in absent[:3])
        raise UserError(
            f"{where} names {len(paths)} images, of which {len(absent)} are not there, first {shown}"
            f": {hint or 'add them or take them off the list'}."
        )
    if special:
        raise UserError(f"{where} names images that are not files: {some(special, quote=False)}; remove them.")
    stats = np.array(numbers, np.int64).reshape(-1, 2)
    digest = hashlib.sha256("\n".join(ids).encode())
    for part in (stats, labels):
        digest.update(f"{part.dtype.str}{part.shape}".encode() + np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()[:32]


def drawn(name: str) -> float:
    """A number in [0, 1) that depends on a text only: it holds out the same images however many others there are."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


class Under(Sequence[str]):
    """The paths of files in a folder, joined when they are asked for."""

    def __init__(self, folder: str, names: Sequence[str]):
        self.folder, self.names = folder, names

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        start = os.path.join(self.folder, "")
        if "\n/" in "\n".join(("", *self.names)):
            return (name if name.startswith("/") else start + name for name in self.names)
        return map(start.__add__, self.names)

    def __getitem__(self, index: Any) -> Any:
        return os.path.join(self.folder, self.names[operator.index(index)])


ABSENT = ("error", "drop")


def rows_present(paths: Sequence[str | os.PathLike], absent: str, *, where: str) -> np.ndarray:
    """Which images take part: all of them ("error": `fingerprint` names those that are not there), or the present.

    Args:
      paths: N image files.
      absent: "error" or "drop", for data sets of which some photos can no longer be had.
      where: what names the images, for the error.
    Returns:
      (M) int64 rows.
    Raises:
      UserError: no such choice, or not one of the images is there.
    """
    if absent not in ABSENT:
        raise UserError(f"The setting absent={absent!r} does not exist{nearest(absent, ABSENT)}.")
    if absent == "error":
        return np.arange(len(paths))
    rows = np.flatnonzero([os.path.exists(path) for path in paths])
    if not len(rows):
        first = f", first {str(paths[0])!r}" if len(paths) else ""
        raise UserError(f"{where} names {len(paths)} images, of which none is there{first}: unpack the images.")
    return rows


def text_lines(path: Path, *, hint: str = "unpack the data set again") -> list[str]:
    """The lines of a text file without spaces around them and without empty ones; a last newline may be missing.

    Raises:
      UserError: there is no such file, or it is not text.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read ({error.strerror}): {hint}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{str(path)!r} is not a text file ({error.reason}): {hint}.") from None
    return [line.strip() for line in lines if line.strip()]


def check_once(names: Sequence[str], *, where: str) -> None:
    """UserError if a list names something twice."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{where} names {some(twice)} twice: keep one line for each.")
