"""A page of augmented samples with their labels: what the network sees, to be looked at before it does."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mljax.data.source import Source
from mljax.errors import UserError
from mljax.pictures import drawing
from mljax.pipeline.images import decode
from mljax.pipeline.picture import Picture


def page(
    source: Source,
    transform: Callable[[Any, np.random.Generator], np.ndarray],
    *,
    count: int = 8,
    views: int = 3,
    seed: int = 0,
    cell: int = 224,
) -> Image.Image:
    """Photos drawn from a split, a row each: as it is, then as augmented, each different picture once.

    Args:
      transform: (image, rng) -> (size size 3) uint8.
      count: photos; `views`: different augmented ones of each at most; where nothing is random there is one.
      seed: of the choice and the augmentation.
      cell: pixels of a picture's side on the page.
    Raises:
      UserError: no photos or views are asked for, or a photo cannot be read.
    """
    if count < 1 or views < 1:
        raise UserError(f"A page of {count} photos with {views} views each is empty: ask for at least one of both.")
    rng = np.random.default_rng([seed, 7])
    rows: list[tuple[Image.Image, list[np.ndarray], str]] = []
    for row in np.sort(rng.permutation(len(source))[:count]):
        name, record = str(source.ids[row]), source[int(row)]
        original = decode(record["image"], where=name)
        given = Picture(record["image"], where=name) if getattr(transform, "pictures", False) else original
        caption = [*_lines(labels_of(source, row)), f"{name} ({original.width} x {original.height})"]
        rows.append((original, _different(transform, given, views, [seed, int(row)]), "\n".join(caption)))
    columns = 1 + max(len(found) for _, found, _ in rows)
    images: list[Image.Image] = []
    captions: list[str] = []
    for original, found, caption in rows:
        empty = columns - 1 - len(found)
        images += [original, *map(Image.fromarray, found), *[Image.new("RGB", (1, 1), "white")] * empty]
        captions += [caption, f"augmented, {found[0].shape[1]} x {found[0].shape[0]}", *[""] * (columns - 2)]
    return drawing.contact_sheet(images, captions, columns=columns, cell=cell)


TRIES = 4  # draws for each view that is asked for: a flip alone has two, and two draws are often the same


def _different(
    transform: Callable[[Any, np.random.Generator], np.ndarray], given: Any, views: int, seed: list[int]
) -> list[np.ndarray]:
    """Up to `views` different pictures that an augmentation makes of one."""
    found: list[np.ndarray] = []
    for number in range(TRIES * views):
        image = transform(given, np.random.default_rng([*seed, number]))
        if not any(np.array_equal(image, other) for other in found):
            found.append(image)
        if len(found) == views:
            break
    return found


def labels_of(source: Source, row: int) -> list[str]:
    """Names of an image's labels; a question mark is one that AP does not count, parentheses one not observed."""
    found = []
    for column in np.flatnonzero((source.labels[row] > 0) | (source.scored[row] == 0)):
        name = source.classes[column]
        if not source.scored[row, column]:
            name += "?"
        found.append(name if source.observed[row, column] else f"({name})")
    return found or ["(no label)"]


def _lines(names: Sequence[str], width: int = 34) -> list[str]:
    """Names joined by commas, broken into lines."""
    lines = [""]
    for i, name in enumerate(names):
        word = name + ("," if i < len(names) - 1 else "")
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return lines
