"""What a split is when a run begins: kept with the run, and compared when it goes on or is evaluated."""

import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mljax.data.digests import Altered, Verified
from mljax.data.source import Files, Picked, Source
from mljax.errors import one_of
from mljax.rundir.data_record import DataRecord

SAMPLE = 64  # images of a split that are digested
CHOICES = ("none", "sampled", "whole")
MOST = 1000  # images that are read to compare two splits
ROWS = 1 << 16  # whose labels are packed at once


def record(source: Source, images: str = "sampled") -> DataRecord:
    """The record of a split.

    Args:
      images: of which images the bytes are read: "none", "sampled": `SAMPLE` of them, chosen by how many there are,
        or "whole": all. What cannot be read has no digest.
    Raises:
      UserError: `images` is not one of the choices.
    """
    one_of("config.data.digest", images, CHOICES)
    return DataRecord(
        classes=source.classes,
        ids=id_sums(source.ids),
        labels=row_sums(source.labels),
        known=row_sums(source.observed, source.scored),
        images=image_sums(source, chosen(len(source), images)),
        names=source.ids,
    )


def id_sums(ids: Iterable[str]) -> np.ndarray:
    """(N) uint32: CRC-32 of each id."""
    return np.fromiter((zlib.crc32(str(name).encode("utf-8", "surrogatepass")) for name in ids), np.uint32)


def row_sums(*arrays: np.ndarray) -> np.ndarray:
    """(N) uint32: CRC-32 of each row of some arrays (N l), of which bytes are taken to be 0 or 1."""
    sums = np.empty(len(arrays[0]), np.uint32)
    for start in range(0, len(sums), ROWS):
        parts = [array[start : start + ROWS] for array in arrays]
        if all((part == part[:1]).all() for part in parts):  # usual of what is known
            sums[start : start + ROWS] = _sums([part[:1] for part in parts])
        else:
            sums[start : start + ROWS] = _sums(parts)
    return sums


def _sums(parts: list[np.ndarray]) -> np.ndarray:
    packed = [np.packbits(part, axis=1) if part.dtype.kind in "bu" else np.ascontiguousarray(part) for part in parts]
    rows = np.concatenate([part.view(np.uint8) for part in packed], axis=1)
    count, width = rows.shape
    view = memoryview(rows.tobytes())
    return np.fromiter((zlib.crc32(view[i * width : (i + 1) * width]) for i in range(count)), np.uint32, count)


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
        content = _content(source, row)
        return None if content is None else zlib.crc32(content)

    with ThreadPoolExecutor(4) as pool:
        sums = dict(zip(rows.tolist(), pool.map(checksum, rows.tolist())))
    return {row: crc for row, crc in sums.items() if crc is not None}


def _content(source: Source, row: int) -> bytes | None:
    """The bytes of an image, also if they are not those of its digest; None: it cannot be read."""
    try:
        image = source.read(row)
    except Altered as error:
        image = error.image
    except OSError:
        return None
    return np.ascontiguousarray(image).tobytes() if isinstance(image, np.ndarray) else image


def overlap(train: Source, evaluation: Source, trained: DataRecord, evaluated: DataRecord) -> tuple[int, int]:
    """How many images of an evaluation split are in the training split too.

    Args:
      trained, evaluated: the records of the two.
    Returns:
      Those of the same id: the same file, or the same bytes (of more than `SAMPLE` other files, by a sample). And
      others by the bytes alone, of those that the record of the evaluation has: they are compared with what the record
      of the training split has, and with its files of the same lengths, `MOST` of them.
    """
    rows = {str(name): row for row, name in enumerate(train.ids)}
    pairs = [(row, rows[str(name)]) for row, name in enumerate(evaluation.ids) if str(name) in rows]
    others = [pair for pair in pairs if (file := _file(evaluation, pair[0])) is None or file != _file(train, pair[1])]
    sample = [others[i] for i in chosen(len(others), "sampled")]
    equal = sum(_equal(evaluation, row, train, twin) for row, twin in sample)
    named = len(pairs) - len(others) + (round(len(others) * equal / len(sample)) if sample else 0)
    known = {row for row, _ in pairs} if named else set()
    return named, len(_same_content(train, evaluation, trained, evaluated) - known)


def _same_content(train: Source, evaluation: Source, trained: DataRecord, evaluated: DataRecord) -> set[int]:
    """The rows of the evaluation's record whose images are in the training split."""
    sums = dict(trained.images)
    if len(sums) < len(train):
        lengths = set(_lengths(evaluation, evaluated.images).values())
        rows = [row for row, length in _lengths(train, range(len(train))).items() if length in lengths]
        sums |= image_sums(train, np.array([row for row in rows if row not in sums][:MOST], np.int64))
    places: dict[int, list[int]] = {}
    for row, crc in sums.items():
        places.setdefault(crc, []).append(row)
    return {
        row
        for row, crc in evaluated.images.items()
        if any(_equal(evaluation, row, train, twin) for twin in places.get(crc, ()))
    }


def _equal(one: Source, row: int, other: Source, twin: int) -> bool:
    content = _content(one, row)
    return content is not None and content == _content(other, twin)


def _lengths(source: Source, rows: Iterable[int]) -> dict[int, int]:
    """{row: bytes of its file}, of those whose images are files that are there."""
    lengths = {}
    for row in rows:
        if (path := _file(source, row)) is None:
            return {}
        try:
            lengths[row] = os.stat(path).st_size
        except OSError:
            continue
    return lengths


def _file(source: Source, row: int) -> str | None:
    """The path of an image; None: it is not a file of its own."""
    read = source.read
    while isinstance(read, Picked | Verified):
        read, row = read.read, int(read.indices[row]) if isinstance(read, Picked) else row
    return read.paths[row] if isinstance(read, Files) else None
