"""A digest of every image of one's own data, written once and checked when in doubt."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mljax.cache import atomic_write
from mljax.data.files import some
from mljax.data.source import Source
from mljax.errors import UserError

NAME = "mljax-digests.json"


def of(source: Source) -> dict[str, str]:
    """{id: sha256 of the image's bytes in hexadecimal}; empty text for one that cannot be read."""

    def digest(row: int) -> str:
        try:
            image = source.read(row)
        except OSError:
            return ""
        return hashlib.sha256(image.tobytes() if isinstance(image, np.ndarray) else image).hexdigest()

    with ThreadPoolExecutor(4) as pool:
        return dict(zip(map(str, source.ids), pool.map(digest, range(len(source)))))


def write(path: Path, sources: list[Source]) -> None:
    """Write the digests of some splits.

    Raises:
      UserError: an image cannot be read, or the file cannot be written.
    """
    table = {source.name: of(source) for source in sources}
    if gone := [name for digests in table.values() for name, digest in digests.items() if not digest]:
        raise UserError(f"{len(gone)} images cannot be read: {some(gone)}; repair or remove them.")
    try:
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(table, indent=0))
    except OSError as error:
        raise UserError(f"The digests cannot be written to {str(path)!r} ({error.strerror}); set --out.") from None


def check(path: Path, sources: list[Source]) -> list[str]:
    """What differs from the digests written before, a sentence each; empty: nothing does.

    Raises:
      UserError: there are no digests, or the file is damaged.
    """
    try:
        table = json.loads(path.read_text())
        if not isinstance(table, dict) or not all(isinstance(digests, dict) for digests in table.values()):
            raise ValueError("other content")
    except FileNotFoundError:
        raise UserError(f"{str(path)!r} is missing; write it with --write.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{str(path)!r} is not a file of digests ({error}); write it again with --write.") from None
    wrong = []
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
