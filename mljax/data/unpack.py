"""Unpack a tar or zip file into a folder, and nowhere else."""

import mmap
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO

from mljax.errors import UserError
from mljax.interrupt import remove_at_end
from mljax.untrusted import SPARE, open_regular, open_zip

RATIO = 20  # bytes unpacked for one of the archive, at most; annotations in JSON take a fourth of their size
MAX_DIRECTORY = 64 << 20  # bytes of the list of members of a zip file: half a million photos
LONGEST = 240  # bytes of a file's name: systems end at 255, and a file that is written has a longer one
LONGEST_PATH = 2000  # characters of a member's name with its folders
Member = tuple[Path, str, int, Callable[[], IO[bytes] | None]]  # where it goes, its name, its size, its content


def unpack(path: Path, folder: Path, say: Callable[[str], None] = lambda text: None) -> int:
    """Unpack a tar or zip under `folder` -> number of files. Every member is checked before the first is written.

    Raises:
      UserError: it is damaged, would take more than RATIO times its size, or a member is a link, a device, a sparse
        file, or lies outside `folder`.
      OSError: the folder cannot be written.
    """
    try:
        with open_regular(path) as file:
            members = (_zipped if zipfile.is_zipfile(file) else _tarred)(path, file, folder)
            files = _checked(path, file, members)
            for count, (target, name, size, content) in enumerate(files, 1):
                source = content()
                if source is None:
                    raise EOFError(f"{name!r} has no content")
                with source:
                    _write(source, target, size)
                if count % 5000 == 0:
                    say(f"unpacking {path.name}: {count:,} files, {name}")
            return len(files)
    except (OSError, UserError):
        raise
    except Exception as error:  # tarfile and zipfile fail in many ways on damaged bytes
        reason = str(error) or type(error).__name__
        raise UserError(f"The archive {str(path)!r} is cut short or damaged ({reason}): get it again.") from None


def _checked(path: Path, file: BinaryIO, members: Iterator[Member]) -> list[Member]:
    """All members, whose sizes and places agree."""
    limit, total = RATIO * os.fstat(file.fileno()).st_size + SPARE, 0
    files: list[Member] = []
    for member in members:
        files.append(member)
        total += member[2]
        if member[2] < 0 or total > limit:
            raise UserError(
                f"The archive {str(path)!r} unpacks to {total:,} bytes or more, at most {limit:,} are expected: it is"
                " not the published one."
            )
    targets = {target for target, *_ in files}
    for target, name, *_ in files:
        if not targets.isdisjoint(target.parents):
            raise UserError(f"The archive {str(path)!r} has a file and a folder of one name at {name!r}: get it again.")
    return files


def _zipped(path: Path, file: BinaryIO, folder: Path) -> Iterator[Member]:
    limit = RATIO * os.fstat(file.fileno()).st_size + SPARE
    archive = open_zip(file, limit=limit, directory=MAX_DIRECTORY)
    for info in archive.infolist():
        kind = info.external_attr >> 28
        odd = "a link" if kind == 0o12 else "" if kind in (0, 0o4, 0o10) else "not a plain file"
        target = _target(path, folder, info.filename, odd, is_folder=info.is_dir())
        if not info.is_dir():
            yield target, info.filename, info.file_size, lambda info=info: archive.open(info)


def _tarred(path: Path, file: BinaryIO, folder: Path) -> Iterator[Member]:
    # Mapped: a header that announces more than there is gets what there is, and takes no memory for the rest.
    archive = tarfile.TarFile(fileobj=mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    for info in archive:
        link = info.issym() or info.islnk()
        plain = info.isdir() or (info.isfile() and not info.issparse())
        odd = "a link" if link else "" if plain else "not a plain file"
        target = _target(path, folder, info.name, odd, is_folder=info.isdir())
        if not info.isdir():
            yield target, info.name, info.size, lambda info=info: archive.extractfile(info)


def _write(source: IO[bytes], target: Path, size: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    part.unlink(missing_ok=True)
    with remove_at_end(part):
        with part.open("xb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
        if part.stat().st_size != size:
            part.unlink()
            raise EOFError(f"{target.name} ends early")
        os.replace(part, target)


def _target(path: Path, folder: Path, name: str, odd: str, *, is_folder: bool) -> Path:
    """Where a member goes; a UserError if that is not below `folder`, through a link that is there already too."""
    pure = PurePosixPath(name.replace("\\", "/"))
    target = folder / pure
    inside = not pure.is_absolute() and ".." not in pure.parts and ":" not in (pure.parts or ("",))[0]
    inside = inside and "\0" not in name and (is_folder or bool(pure.parts))  # "." is the folder itself
    longest = max((len(part.encode("utf-8", "surrogatepass")) for part in pure.parts), default=0)
    if longest > LONGEST or len(name) > LONGEST_PATH:
        raise UserError(f"The archive {str(path)!r} has a member whose name is too long: it is not the published one.")
    if odd or not inside or not target.resolve().is_relative_to(folder.resolve()):
        what = f"is {odd}" if odd else "leads out of the folder"
        raise UserError(f"The archive {str(path)!r} has a member {name!r} that {what}: it is not the published one.")
    return target
