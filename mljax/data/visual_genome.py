"""Visual Genome with 200 or 500 labels, as SSGRL, C-Tran, SST and SARB read it.

Both label sets use the same lists: ROOT/vg/ (or ROOT itself) holds `{train,test}_list_500.txt`, one image file name
a line, `vg_category_{200,500}_labels_index.json`, {file name: [label indices]}, and the images in VG_100K/ (and
VG_100K_2/). SSGRL's paper counts 98,249 training images, the list in its repository has 82,904; test has 10,000.

Krishna et al., "Visual Genome", IJCV 2017; Chen et al., "Learning Semantic-Specific Graph Representation for
Multi-Label Image Recognition", ICCV 2019.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mljax import untrusted
from mljax.data.files import Absent, check_once, data_folder, fingerprint, rows_present, text_lines
from mljax.data.labels import spelled_twice
from mljax.data.source import Files, Source
from mljax.errors import UserError, nearest

SIZES = (200, 500)
SPLITS = ("train", "test")
FOLDERS = ("vg", "VG", "visual_genome", "VisualGenome")


def visual_genome(
    split: str, *, root: str | None = None, size: int = 200, names: str = "", absent: str = "error", images: str = ""
) -> Source:
    """One split of VG-200 or VG-500.

    Args:
      split: "train" or "test".
      root: holds vg/ or its files themselves; None: the variable MLJAX_DATA.
      size: number of labels, 200 or 500.
      names: a text file, relative to the data set's folder, with a label name a line in the order of the indices; the
        published files have none. Empty: `vg_category_{size}.txt` if it is there, else "label 0", "label 1", ...
      absent: images that are not on disk: "error" or "drop".
      images: the folder of the images, relative to that of the data set; empty: VG_100K, VG_100K_2.
    Raises:
      UserError: a choice that does not exist, or a file that is not as the layout promises.
    Differs from the authors' code: theirs cuts the last character of each line, and so a letter of the last name where
    the file does not end with a newline.
    """
    if size not in SIZES:
        raise UserError(f"Visual Genome has 200 or 500 labels here, not {size!r}: set size=200 or size=500.")
    if split not in SPLITS:
        raise UserError(f"Visual Genome has no split {split!r}{nearest(split, SPLITS)}.")
    folder = _find(root, split)
    listing = folder / f"{split}_list_500.txt"
    ids = text_lines(listing)
    if not ids:
        raise UserError(f"The list {str(listing)!r} is empty; expected one image file name per line.")
    check_once(ids, where=f"The list {str(listing)!r}")
    labels = _labels(folder / f"vg_category_{size}_labels_index.json", ids, size, listing)
    paths = _paths(folder, images, ids)
    where = f"The list {str(listing)!r}"
    rows = rows_present(paths, absent, where=where)
    note = "" if len(rows) == len(ids) else f" ({len(ids) - len(rows)} not on disk left out)"
    ids, paths, labels = [ids[i] for i in rows], [paths[i] for i in rows], labels[rows]
    return Source(
        name=f"VG-{size} {split}{note}",
        classes=_classes(folder, names, size),
        ids=ids,
        labels=labels,
        observed=np.ones_like(labels),
        scored=np.ones_like(labels),
        read=Files(paths),
        fingerprint=fingerprint(ids, paths, labels, where=where, hint="unpack them, or set absent='drop'"),
    )


def _find(root: str | None, split: str) -> Path:
    folder = data_folder(root)
    for candidate in (*(folder / name for name in FOLDERS), folder):
        if (candidate / f"{split}_list_500.txt").is_file():
            return candidate
    raise Absent(
        f"There is no vg/{split}_list_500.txt under {str(folder)!r}: set 'root' (or MLJAX_DATA) to its folder; the list"
        " comes with SSGRL and SST."
    )


def _labels(path: Path, ids: Sequence[str], size: int, listing: Path) -> np.ndarray:
    """(N size) uint8."""
    try:
        table = untrusted.read_json(path)
        if not isinstance(table, dict):
            raise ValueError("a table of file names is expected")
    except (OSError, ValueError) as error:
        raise UserError(f"{str(path)!r} cannot be read as label indices ({error}): get it again.") from None
    labels = np.zeros((len(ids), size), np.uint8)
    for row, name in enumerate(ids):
        indices = table.get(name)
        if not isinstance(indices, list):
            raise UserError(
                f"{str(path)!r} has no labels for {name!r} of {listing.name}: the two belong to different sets."
            )
        for index in indices:
            if not isinstance(index, int) or not 0 <= index < size:
                raise UserError(
                    f"{str(path)!r} gives {name!r} the label {index!r}, outside 0..{size - 1}: get it again."
                )
        labels[row, indices] = 1
    return labels


def _paths(folder: Path, images: str, ids: Sequence[str]) -> list[str]:
    if images and not (folder / images).is_dir():
        raise UserError(f"The folder of images {str(folder / images)!r} is not there: set 'images' to it.")
    places = [folder / images] if images else [p for p in (folder / "VG_100K", folder / "VG_100K_2") if p.is_dir()]
    if not places:
        raise Absent(f"There is no folder {str(folder / 'VG_100K')!r} with the images: unpack them there.")
    found = [{entry.name for entry in os.scandir(place)} for place in places]
    return [
        os.fspath(next((place for place, there in zip(places, found) if name in there), places[0]) / name)
        for name in ids
    ]


def _classes(folder: Path, names: str, size: int) -> tuple[str, ...]:
    path = folder / (names or f"vg_category_{size}.txt")
    if not names and not path.is_file():
        return tuple(f"label {i}" for i in range(size))
    found = text_lines(path, hint="set 'names' to a text file with a label name a line")
    check_once(found, where=f"The list of classes {str(path)!r}")
    if pair := spelled_twice(found):
        raise UserError(f"{str(path)!r} has {pair[0]!r} and {pair[1]!r}, one label spelled in two ways: rename one.")
    if len(found) != size:
        raise UserError(f"{str(path)!r} has {len(found)} names, where {size} labels have one each.")
    return tuple(found)


NAMES = {"visual_genome": visual_genome}
