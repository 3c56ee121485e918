"""The small files of a run directory: written whole or not at all, sealed with a digest, refused when damaged."""

import contextlib
import errno
import io
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mljax import seal, untrusted
from mljax.cache import atomic_write
from mljax.errors import UserError, remedy

LONGEST = 3500  # bytes of a run directory's path: the system ends at 4096, and checkpoints lie deep in it

RERUN = "run the training command again to write it anew"
BACKUP = "restore it from a backup, or choose another --workdir"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of `path`, so that a reader never sees half of it."""
    try:
        with atomic_write(path) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror});"
            f" {remedy(error.errno, 'free space or choose another --workdir')}."
        ) from None


def write_text(path: Path, text: str) -> None:
    """Write a text in one piece."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object in one piece, with its digest as the last key."""
    write_text(path, json.dumps(seal.sealed(content), indent=2))


def write_arrays(path: Path, **arrays: Any) -> None:
    """Write an .npz in one piece, with its digest as one more array."""
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    with replacing(path) as temporary:
        np.savez_compressed(temporary, allow_pickle=False, **arrays, digest=np.array(seal.of_arrays(arrays)))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a run directory, verified, without its digest.

    Raises:
      UserError: it is missing or damaged.
    """
    check_path(path.parent)
    if not path.is_file():
        if not path.parent.is_dir():
            raise UserError(f"There is no folder {path.parent}; give the --workdir of a run.")
        raise UserError(f"{path.parent} holds no {path.name}; give the --workdir of a run.")
    try:
        content = untrusted.read_json(path)
        if not isinstance(content, dict):
            raise seal.Broken("it is not a JSON object")
        return seal.unsealed(content)
    except (OSError, ValueError) as error:
        raise damaged(path, error) from None


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz of a run directory, verified.

    Raises:
      UserError: it is missing or damaged.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; {_advice(path)}.")
    try:
        with np.load(io.BytesIO(path.read_bytes())) as archive:  # numpy leaves a damaged file open
            arrays = {name: archive[name] for name in archive.files}
        expected = arrays.pop(seal.KEY, None)
        if expected is not None and str(expected) != seal.of_arrays(arrays):
            raise seal.Broken("its content is not what was saved")
        return arrays
    except (OSError, ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise damaged(path, error) from None


def damaged(path: Path, error: object) -> UserError:
    """The error of a file that is not what was saved."""
    return UserError(f"{path} is damaged ({' '.join(str(error).split())}); {_advice(path)}.")


def _advice(path: Path) -> str:
    return BACKUP if path.name == "config.json" else RERUN


def check_path(workdir: Path) -> None:
    """Refuse a path that no system takes.

    Raises:
      UserError: it holds a NUL, or is too long.
    """
    if "\0" in str(workdir):
        raise UserError(f"The workdir {str(workdir)!r} contains a NUL character; choose another --workdir.")
    too_long = len(os.fsencode(os.path.abspath(workdir))) > LONGEST
    try:
        os.stat(workdir)
    except OSError as error:
        too_long |= error.errno == errno.ENAMETOOLONG
    if too_long:
        short = f"{str(workdir)[:60]}..{str(workdir)[-20:]}"
        raise UserError(f"The workdir {short} is too long for a path; choose a shorter --workdir.")
