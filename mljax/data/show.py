"""A page of augmented samples with their labels: what the network sees, to be looked at before it does."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mljax.data import draw
from mljax.data.images import decode
from mljax.data.picture import Picture
from mljax.data.source import Source
from mljax.errors import UserError


def page(
    source: Source,
    transform: Callable[[Any, np.random.Generator], np.ndarray],
    *,
    count: int = 8,
    views: int = 3,
    seed: int = 0,
    cell: int = 224,
) -> Image.Image:
    """Photos drawn from a split, a row each: as it is, then as augmented.

    Args:
      transform: (image, rng) -> (size size 3) uint8.
      count: photos; `views`: augmented ones of each.
      seed: of the choice and the augmentation.
      cell: pixels of a picture's side on the page.
    Raises:
      UserError: no photos or views are asked for, or a photo cannot be read.
    """
    if count < 1 or views < 1:
        raise UserError(f"A page of {count} photos with {views} views each is empty: ask for at least one of both.")
    rng = np.random.default_rng([seed, 7])
    chosen = np.sort(rng.permutation(len(source))[:count])
    images: list[Image.Image] = []
    captions: list[str] = []
    for row in chosen:
        name, record = str(source.ids[row]), source[int(row)]
        original = decode(record["image"], where=name)
        images.append(original)
        captions.append("\n".join([*_lines(labels_of(source, row)), f"{name} ({original.width} x {original.height})"]))
        for view in range(views):
            own = np.random.default_rng([seed, int(row), view])
            given = Picture(record["image"], where=name) if getattr(transform, "pictures", False) else original
            image = transform(given, own)
            images.append(Image.fromarray(image))
            captions.append(f"augmented, {image.shape[1]} x {image.shape[0]}" if not view else "")
    return draw.contact_sheet(images, captions, columns=views + 1, cell=cell)


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
