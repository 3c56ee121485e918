"""A digest of every image of one's own data, written once, and compared by a command and whenever an image is read."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mljax import untrusted
from mljax.cache import atomic_write
from mljax.data.files import some
from mljax.data.source import Source
from mljax.errors import UserError

NAME = "mljax-digests.json"


class Altered(OSError):
    """An image whose bytes are not those that its digest was written of.

    Attributes:
      image: as it was read.
    """

    def __init__(self, name: str, path: Path, image: bytes | np.ndarray):
        self.image = image
        super().__init__(
            f"The image {name} is not the one that {path} has the digest of; restore it, or write the digests again"
            " (python -m mljax.data check CONFIG --write)"
        )

    def __reduce__(self) -> Any:
        return OSError, (str(self),)  # between processes


@dataclasses.dataclass(frozen=True)
class Verified:
    """`read` of a source that compares every image with its digest.

    Attributes:
      read: the source's own.
      ids: of the rows.
      digests: (N 32) uint8, sha256; zeros: none is known.
      path: of the file that they are from.
    """

    read: Callable[[int], bytes | np.ndarray]
    ids: Any
    digests: np.ndarray
    path: Path

    def __call__(self, index: int) -> bytes | np.ndarray:
        image, expected = self.read(index), self.digests[index]
        if expected.any() and _sha256(image) != expected.tobytes():
            raise Altered(str(self.ids[index]), self.path, image)
        return image


def verified(source: Source, section: Mapping[str, Any]) -> Source:
    """The same source, with an error (`Altered`) in the place of an image whose digest differs.

    Args:
      section: of the config, `config.data`; it says where the digests lie. Where there are none, nothing is compared.
    Raises:
      UserError: the file of digests is damaged.
    """
    path = place(section)
    if path is None or not path.is_file():
        return source
    known = _read(path).get(source.name)
    if known is None:
        return source
    base = None if source.base is None else _compared(source.base, known, path)
    return dataclasses.replace(_compared(source, known, path), base=base)


def _compared(source: Source, known: Mapping[str, str], path: Path) -> Source:
    digests = np.zeros((len(source), 32), np.uint8)
    for row, name in enumerate(source.ids):
        if digest := known.get(str(name)):
            digests[row] = np.frombuffer(bytes.fromhex(digest), np.uint8)
    return dataclasses.replace(source, read=Verified(source.read, source.ids, digests, path))


def place(section: Mapping[str, Any]) -> Path | None:
    """Where the digests of a data set lie: beside its CSV, else in its data folder; None: it has neither."""
    if own := section.get("file"):
        candidates = (Path(own).expanduser(), Path(os.environ.get("MLJAX_DATA", "")).expanduser() / str(own))
        return next((path.parent / NAME for path in candidates if path.is_file()), None)
    root = section.get("root") or os.environ.get("MLJAX_DATA")
    return Path(root).expanduser() / NAME if root else None


def _sha256(image: bytes | np.ndarray) -> bytes:
    return hashlib.sha256(image.tobytes() if isinstance(image, np.ndarray) else image).digest()


def of(source: Source) -> dict[str, str]:
    """{id: sha256 of the image's bytes in hexadecimal}; empty text for one that cannot be read."""

    def digest(row: int) -> str:
        try:
            return _sha256(source.read(row)).hex()
        except OSError:
            return ""

    with ThreadPoolExecutor(4) as pool:
        return dict(zip(map(str, source.ids), pool.map(digest, range(len(source)))))


def write(path: Path, sources: list[Source]) -> None:
    """Write the digests of some splits; those of others that the file has stay.

    Raises:
      UserError: an image cannot be read, or the file cannot be written.
    """
    table = {source.name: of(source) for source in sources}
    others = _read(path) if path.is_file() else {}
    if gone := [name for digests in table.values() for name, digest in digests.items() if not digest]:
        raise UserError(f"{len(gone)} images cannot be read: {some(gone)}; repair or remove them.")
    try:
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps({**others, **table}, indent=0))
    except OSError as error:
        raise UserError(f"The digests cannot be written to {str(path)!r} ({error.strerror}); set --out.") from None


def check(path: Path, sources: list[Source]) -> list[str]:
    """What differs from the digests written before, a sentence each; empty: nothing does.

    Raises:
      UserError: there are no digests, or the file is damaged.
    """
    table, wrong = _read(path), []
    for source in sources:
        before, now = table.get(source.name), of(source)
        if before is None:
            wrong.append(f"{source.name} has no digests in {str(path)!r}; add them with --write.")
            continue
        kinds = {
            "changed": [name for name in now if name in before and now[name] and now[name] != before[name]],
            "unreadable": [name for name in now if not now[name]],
            "new": [name for name in now if name not in before],
            "gone": [name for name in before if name not in now],
        }
        wrong += [f"{source.name}: {len(names)} {kind}, {some(names)}." for kind, names in kinds.items() if names]
    return wrong


def _read(path: Path) -> dict[str, dict[str, str]]:
    """{name of a split: {id: digest}}."""
    try:
        table = untrusted.read_json(path)
        if not isinstance(table, dict) or not all(isinstance(digests, dict) for digests in table.values()):
            raise ValueError("other content")
        for digest in (digest for digests in table.values() for digest in digests.values()):
            if not isinstance(digest, str) or len(bytes.fromhex(digest)) != 32:
                raise ValueError(f"{digest!r} is not a digest")
    except FileNotFoundError:
        raise UserError(f"{str(path)!r} is missing; write it with --write.") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{str(path)!r} is not a file of digests ({error}); remove it and write it with --write."
        ) from None
    return table
