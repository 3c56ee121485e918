"""Any source -> array_record shards."""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from mljax.cache import atomic_write
from mljax.data._instances import stored
from mljax.data.packed import ARRAYS, FORMAT, INSTANCES, log, read_json
from mljax.data.source import Source
from mljax.errors import UserError
from mljax.pipeline.images import decode

OPTIONS = "group_size:1,uncompressed"  # JPEG does not get smaller; one record is read alone
Progress = Callable[[str, int, int], None]


def pack(
    sources: Mapping[bool, Source],
    folder: Path,
    *,
    short_side: int | None = None,
    quality: int = 95,
    shard: int | None = None,
    threads: int = 4,
    progress: Progress = lambda what, done, total: None,
) -> bool:
    """Write one split, or go on with it.

    Args:
      sources: the split as it is trained on (True) and evaluated on (False); VOC's difficult labels differ.
      folder: of the split, OUT/{split}.
      short_side: images whose shorter side is longer are made smaller (antialiased, bilinear) and stored as JPEG of
        `quality`; None: every image keeps its bytes. Pictures that come as arrays are stored as PNG, without loss.
      shard: images in each; None: N / 256, at least 256.
      threads: that read and encode.
    Returns:
      False if the split lay there complete.
    Raises:
      UserError: the folder holds something else, an image cannot be read, or the disk is full.
    """
    source = sources[True]
    if list(source.ids) != list(sources[False].ids):
        raise UserError(f"{source.name} has other images in training than in evaluation: pack it by another policy.")
    if (short_side is not None and short_side < 1) or not 1 <= quality <= 100:
        raise UserError(f"short_side={short_side} and quality={quality} must be at least 1, and quality at most 100.")
    plan = {
        "format": FORMAT,
        "fingerprint": {str(int(k)): s.fingerprint for k, s in sources.items()},
        "images": len(source),
        "shard": shard or max(256, -(-len(source) // 256)),
        "short_side": short_side,
        "quality": quality if short_side else None,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _agree(folder, plan)
        if (folder / "done.json").is_file():
            return False
        sizes = _shards(source, folder, plan, threads, progress)
        _write_meta(sources, folder, plan, sizes)
    except OSError as error:
        raise UserError(
            f"{str(folder)!r} cannot be written ({error.strerror or error}): free space, and go on."
        ) from error
    return True


def _agree(folder: Path, plan: dict[str, Any]) -> None:
    path = folder / "plan.json"
    if not path.is_file():
        if any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise UserError(f"{str(folder)!r} holds other files: give a new folder to pack into.")
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(plan))
        return
    before = read_json(path)
    for key, value in plan.items():
        if before.get(key) != value:
            what = "another split or state of the data" if key == "fingerprint" else f"{key}={before.get(key)!r}"
            raise UserError(f"{str(folder)!r} was started with {what}: give another folder, or remove this one.")


def _shards(source: Source, folder: Path, plan: dict[str, Any], threads: int, progress: Progress) -> list[int]:
    """Write the shards that are not there -> bytes of each."""
    sizes = []
    for stale in folder.glob(".*.array_record"):  # of a packing that was killed
        stale.unlink()
    with ThreadPoolExecutor(threads) as pool:
        for number, start in enumerate(range(0, len(source), plan["shard"])):
            rows = range(start, min(start + plan["shard"], len(source)))
            path = folder / f"{number:05d}.array_record"
            if not path.is_file():
                with atomic_write(path) as temporary:
                    records = pool.map(lambda row: encoded(source, row, plan["short_side"], plan["quality"]), rows)
                    _write(temporary, records)
            sizes.append(path.stat().st_size)
            progress(f"packing {source.name}", rows.stop, len(source))
    return sizes


def _write(path: Path, records: Iterable[bytes]) -> None:
    writer = ArrayRecordWriter(str(path))
    try:
        for record in records:
            writer.write(record)
    finally:
        writer.close()
    with path.open("rb") as file:  # on the disk before it gets its name
        os.fsync(file.fileno())


def encoded(source: Source, row: int, short_side: int | None, quality: int | None) -> bytes:
    """The bytes that are stored of an image."""
    image = source.read(row)
    where = str(source.ids[row])
    if isinstance(image, np.ndarray):
        picture = decode(image, where=where)
        if short_side is None or min(picture.size) <= short_side:
            out = io.BytesIO()
            picture.save(out, "PNG", compress_level=1)
            return out.getvalue()
    else:
        picture = decode(image, where=where)  # also where its bytes are kept: what is packed can be read
        if short_side is None or min(picture.size) <= short_side:
            return bytes(image)
    assert short_side is not None
    scale = short_side / min(picture.size)
    width, height = (max(short_side, round(side * scale)) for side in picture.size)
    out = io.BytesIO()
    small = picture.resize((width, height), Image.Resampling.BILINEAR)
    small.save(out, "JPEG", quality=quality, subsampling=0 if (quality or 0) >= 95 else -1)
    return out.getvalue()


def _write_meta(sources: Mapping[bool, Source], folder: Path, plan: dict[str, Any], sizes: list[int]) -> None:
    """Everything but images; `done.json` last."""
    source = sources[True]
    with atomic_write(folder / "ids.json") as temporary:
        temporary.write_text(json.dumps(list(map(str, source.ids))))
    arrays: dict[str, dict[str, Any]] = {}
    for training, each in sources.items():
        arrays[str(int(training))] = files = {}
        for name in ARRAYS:
            array = np.asarray(getattr(each, name), np.uint8)
            if array.size and array.all():
                files[name] = "ones"
                continue
            files[name] = f"{name}-{hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:8]}.npy"
            if not (folder / files[name]).is_file():
                with atomic_write(folder / files[name]) as temporary:
                    np.save(temporary, array)
    things = _write_instances(source, folder)
    done = {**plan, "names": {str(int(k)): s.name for k, s in sources.items()}, "classes": list(source.classes)}
    with atomic_write(folder / "done.json") as temporary:
        temporary.write_text(json.dumps({**done, "arrays": arrays, "sizes": sizes, "instances": things}))


def _write_instances(source: Source, folder: Path) -> bool:
    """Whether there is something to say of where things stand; the units are those of the images before packing."""
    if source.instances is None:
        return False
    try:
        arrays = stored(source.instances, len(source))
    except UserError as error:  # the annotations are not there, which labels alone do not need
        log.warning("Packed without boxes, which config.observe.bias='size' and 'location' ask for: %s", error)
        return False
    with atomic_write(folder / INSTANCES) as temporary:
        np.savez(temporary, **arrays)  # pyright: ignore[reportArgumentType]
    return True
