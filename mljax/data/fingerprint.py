"""What a split was when a run began: kept with the run, and compared when it goes on or is evaluated.

A record is {"classes": [..], "count": N, "rows": uint32 (N,), "images": {row: crc}}: names in label order, a checksum
of each example's id, labels and observed labels, and one of the bytes of some images.
"""

import contextlib
import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from mljax.data.source import Files, Picked, Source
from mljax.errors import one_of

SAMPLE = 64  # images of a split that are digested
CHOICES = ("none", "sampled", "whole")


def record(source: Source, images: str = "sampled") -> dict[str, Any]:
    """The fingerprint of a split.

    Args:
      images: of which images the bytes are read: "none", "sampled": `SAMPLE` of them, chosen by how many there are,
        or "whole": all.
    Returns:
      {"classes": list of str, "count": int, "rows": (N) uint32, "images": {row: uint32 as int}}; what cannot be read
      has no entry in "images".
    Raises:
      UserError: `images` is not one of the choices.
    """
    one_of("images", images, CHOICES)
    return {
        "classes": list(source.classes),
        "count": len(source),
        "rows": row_sums(source),
        "images": image_sums(source, chosen(len(source), images)),
    }


def row_sums(source: Source) -> np.ndarray:
    """(N) uint32: CRC-32 of each example's id, labels and observed labels; quick for a million of them."""
    labels = np.packbits(source.labels > 0, axis=1) if source.labels.dtype == np.uint8 else source.labels
    parts = np.ascontiguousarray(labels), np.packbits(source.observed > 0, axis=1)
    width = sum(part[:1].nbytes for part in parts)
    rows = np.concatenate([part.view(np.uint8) for part in parts], axis=1).tobytes()
    crc, view = zlib.crc32, memoryview(rows)
    return np.fromiter(
        (
            crc(view[start : start + width], crc(str(name).encode("utf-8", "surrogateescape")))
            for name, start in zip(source.ids, range(0, len(source) * width, width or 1))
        ),
        np.uint32,
        len(source),
    )


def chosen(count: int, images: str) -> np.ndarray:
    """Rows whose images are digested: the same for as many examples, on every machine."""
    if images == "whole" or (images == "sampled" and count <= SAMPLE):
        return np.arange(count)
    if images == "none":
        return np.arange(0)
    return np.sort(np.random.RandomState(count % 2**32).permutation(count)[:SAMPLE])


def image_sums(source: Source, rows: np.ndarray) -> dict[int, int]:
    """{row: CRC-32 of its image's bytes}, of those that can be read."""

    def checksum(row: int) -> int | None:
        try:
            image = source.read(row)
        except OSError:
            return None
        return zlib.crc32(np.ascontiguousarray(image).tobytes() if isinstance(image, np.ndarray) else image)

    with ThreadPoolExecutor(4) as pool:
        sums = dict(zip(rows.tolist(), pool.map(checksum, rows.tolist())))
    return {row: crc for row, crc in sums.items() if crc is not None}


def overlap(train: Source, evaluation: Source) -> int:
    """How many examples of an evaluation split are photos of the training split too.

    By id; and of a sample of the evaluation split by bytes, where images are files: they are compared with the training
    files of the same length.
    """
    known = set(map(str, train.ids))
    shared = {row for row, name in enumerate(evaluation.ids) if str(name) in known}
    sample = chosen(len(evaluation), "sampled")
    mine, theirs = _lengths(evaluation, sample), _lengths(train, range(len(train)))
    wanted = set(mine.values())
    rows = [row for row, length in theirs.items() if length in wanted]
    sums = set(image_sums(train, np.array(rows, np.int64)).values())
    return len(shared | {row for row, crc in image_sums(evaluation, sample).items() if crc in sums})


def _lengths(source: Source, rows: Iterable[int]) -> dict[int, int]:
    """{row: bytes of its file}, of those whose images are files that are there."""
    lengths = {}
    for row in rows:
        read, index = source.read, int(row)
        while isinstance(read, Picked):
            read, index = read.read, int(read.indices[index])
        if not isinstance(read, Files):
            return {}
        with contextlib.suppress(OSError):
            lengths[int(row)] = os.stat(read.paths[index]).st_size
    return lengths
