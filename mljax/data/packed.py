"""Any source as array_record shards: few large files in place of many small ones, read in order or at random.

OUT/{split}/ holds `00000.array_record` .. with the encoded images, `ids.json`, the labels as arrays, `instances.npz`
where it is known where things stand, and `done.json` once everything is there. Each shard is written beside its place
and renamed, so that an interrupted packing goes on where it stopped: what has its name is whole.
"""

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from mljax import untrusted
from mljax.data._instances import PackedInstances
from mljax.data._records import Records, open_shard
from mljax.data.files import data_folder
from mljax.data.source import Source
from mljax.errors import UserError, nearest

FORMAT = 1
ARRAYS = ("labels", "observed", "scored")
INSTANCES = "instances.npz"
log = logging.getLogger("mljax")


def packed(split: str, *, training: bool, root: str | None = None) -> Source:
    """One split that `python -m mljax.data pack CONFIG ROOT` wrote.

    Args:
      split: a folder in `root`.
      training: whether the split is trained on: each has its labels, as the packed reader gave them.
      root: the folder that was packed into; None: the variable MLJAX_DATA.
    Returns:
      The split under its own name; with a short side, the name and the fingerprint tell that. Packed with its images
      as they are, it has the fingerprint of what was packed, so that cached features serve both.
    Raises:
      UserError: there is no such split, it is not complete, or a shard was cut short.
    """
    whole = data_folder(root)
    folder = whole / split
    if not (folder / "done.json").is_file():
        done = [path.parent.name for path in whole.glob("*/done.json")]
        if (folder / "plan.json").is_file():
            raise UserError(f"The packed split {split!r} in {str(whole)!r} is not complete: run the command again.")
        raise UserError(f"{split!r} is not a packed split of {str(whole)!r}{nearest(split, done)}.")
    meta = read_json(folder / "done.json")
    if meta.get("format") != FORMAT:
        raise UserError(f"{str(folder)!r} was packed by another version of mljax: pack it again.")
    kind, count, shard = str(int(training)), meta["images"], meta["shard"]
    paths = [os.fspath(folder / f"{number:05d}.array_record") for number in range(len(meta["sizes"]))]
    for path, size in zip(paths, meta["sizes"]):
        length = os.path.getsize(path) if os.path.isfile(path) else None
        if length != size:
            state = "is missing" if length is None else f"has {length} of {size} bytes"
            raise UserError(f"The shard {path!r} {state}: remove done.json and this shard, and pack again.")
    if paths:
        open_shard(paths[-1], count - shard * (len(paths) - 1))
    shape = (count, len(meta["classes"]))
    arrays: dict[str, Any] = {name: _array(folder, meta["arrays"][kind][name], shape) for name in ARRAYS}
    small = f" (short side {meta['short_side']})" if meta["short_side"] else ""
    ids = read_json(folder / "ids.json")
    if len(ids) != count:
        raise UserError(f"{str(folder / 'ids.json')!r} has {len(ids)} names for {count} images: pack the split again.")
    suffix = f"/{meta['short_side']}/{meta['quality']}" if small else ""
    return Source(
        name=meta["names"][kind] + small,
        classes=tuple(meta["classes"]),
        ids=ids,
        read=Records(paths, [min(shard, count - start) for start in range(0, count, shard)]).__getitem__,
        fingerprint=meta["fingerprint"][kind] + suffix,
        instances=PackedInstances(folder / INSTANCES, count) if meta.get("instances") else None,
        **arrays,
    )


def _array(folder: Path, name: str, shape: tuple[int, int]) -> np.ndarray:
    if name == "ones":
        return np.broadcast_to(np.uint8(1), shape)
    try:
        array = np.load(folder / name, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{str(folder / name)!r} cannot be read ({error}): pack the split again.") from None
    if array.shape != shape:
        raise UserError(f"{str(folder / name)!r} has shape {array.shape} not {shape}: pack the split again.")
    return array


def read_json(path: Path) -> Any:
    try:
        return untrusted.read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{str(path)!r} cannot be read ({error}): pack the split again.") from None


NAMES = {"packed": packed}
