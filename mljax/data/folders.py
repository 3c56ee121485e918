"""Anyone's images in folders named for their labels: `{root}/{split}/{class}/photo.jpg`.

A photo with several labels lies (as a copy or a link) in several class folders under the same file name. A
photo that lies directly in `{root}/{split}` has no label. Files of the same name but different content are
different photos.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from mljax.data.files import IMAGES, data_folder, drawn, fingerprint, some
from mljax.data.labels import spelled_twice
from mljax.data.source import Files, Source
from mljax.errors import UserError, nearest
from mljax.untrusted import read_regular


def folders(
    split: str,
    *,
    root: str | None = None,
    classes: Sequence[str] = (),
    train_split: str = "train",
    val_share: float = 0.0,
    title: str = "",
) -> Source:
    """One split of images sorted into class folders; images in the order of class and file name.

    Args:
      split: a folder under `root`; with `val_share`, "train" or "val".
      root: the folder of the splits; None: the environment variable MLJAX_DATA.
      classes: label order; empty: the sorted class folders of `train_split`.
      train_split: the folder that is trained on.
      val_share: for a root without a folder "val": about this share of the images of `train_split`, chosen by a hash
        of their file names, is "val" and the rest "train"; adding images moves none from one to the other.
      title: what results call the data set; empty: the name of `root`.
    Returns:
      The split; ids are `class/file` with the first class that a photo is in, or `file` for a photo without
      label.
    Raises:
      UserError: a folder is absent or empty, or a split has a class folder that training does not have.
    """
    folder = data_folder(root)
    name = _folder_of(folder, split, train_split, val_share)
    place, names = folder / name, _classes(folder, name, tuple(classes), train_split)
    photos = _photos(place, names)
    if not photos:
        hint = ", or remove it and set val_share=0.2" if name == "val" else ""
        raise UserError(f"{str(place)!r} holds no images ({', '.join(IMAGES)}): expected {{class}}/photo.jpg{hint}.")
    if val_share:
        photos = [photo for photo in photos if (drawn(photo[0].name) < val_share) == (split == "val")]
    if not photos:
        raise UserError(f"val_share={val_share:g} leaves {split!r} without a photo: choose another share.")
    paths = [os.fspath(path) for path, _ in photos]
    ids = [path.relative_to(place).as_posix() for path, _ in photos]
    labels = np.zeros((len(photos), len(names)), np.uint8)
    for row, (_, columns) in enumerate(photos):
        labels[row, columns] = 1
    return Source(
        name=f"{title or folder.resolve().name} {split}",
        classes=names,
        ids=ids,
        labels=labels,
        observed=np.ones_like(labels),
        scored=np.ones_like(labels),
        read=Files(paths),
        fingerprint=fingerprint(
            ids,
            paths,
            labels,
            where=f"The folder {str(place)!r}",
            hint="repair or remove broken links",
        ),
    )


def _folder_of(folder: Path, split: str, train_split: str, val_share: float) -> str:
    """The folder that a split is in."""
    if not 0 <= val_share < 1:
        raise UserError(f"val_share={val_share} is not a share: use a number from 0 to below 1.")
    if val_share and split not in ("train", "val"):
        raise UserError(f"With val_share={val_share:g} there are the splits 'train' and 'val', not {split!r}.")
    if val_share and (folder / "val").is_dir():
        raise UserError(
            f"{str(folder)!r} has a folder 'val', so val_share={val_share:g} is not needed: remove one of them."
        )
    name = train_split if val_share else split
    if not (folder / name).is_dir():
        hint = f": make it, or set val_share=0.2 (--config.data.val_share=0.2) to hold out a fifth of {train_split!r}"
        alone = split == "val" and (folder / train_split).is_dir()
        raise UserError(
            f"There is no split {name!r} in {str(folder)!r}{nearest(name, _folders(folder))}{hint if alone else ''}."
        )
    return name


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    return sorted(
        p for p in folder.iterdir() if p.suffix.lower() in IMAGES and not p.name.startswith(".") and not p.is_dir()
    )


def _classes(folder: Path, split: str, classes: tuple[str, ...], train_split: str) -> tuple[str, ...]:
    present = _folders(folder / split)
    names = classes
    if not names:
        if not (folder / train_split).is_dir():
            raise UserError(
                f"There is no folder {train_split!r} in "
                f"{str(folder)!r}{nearest(train_split, _folders(folder))}, whose class "
                "folders give the labels: set train_split, or list 'classes'."
            )
        names = tuple(_folders(folder / train_split))
        if not names:
            raise UserError(f"{str(folder / train_split)!r} has no class folders: expected {{class}}/photo.jpg.")
        if empty := [name for name in names if not _images(folder / train_split / name)]:
            raise UserError(
                f"Class folders in {str(folder / train_split)!r} hold no images: {some(empty)}; fill or remove them."
            )
    if pair := spelled_twice([*names, *present]):
        raise UserError(
            f"{str(folder)!r} spells a class in two ways, {pair[0]!r} and {pair[1]!r}: rename one of the folders."
        )
    if len(set(names)) < len(names):
        raise UserError("'classes' names a label twice: list every label once.")
    if unknown := [name for name in present if name not in names]:
        whose = "'classes'" if classes else f"the split {train_split!r}"
        raise UserError(
            f"{str(folder / split)!r} has class folders that {whose} does not have: {some(unknown)}; add "
            "images of them there, "
            "remove the folders, or list 'classes'."
        )
    return names


def _photos(folder: Path, names: Iterable[str]) -> list[tuple[Path, list[int]]]:
    """Every photo with the columns of its labels."""
    photos: list[tuple[Path, list[int]]] = []
    by_name: dict[str, list[int]] = {}
    places = [(column, folder / name) for column, name in enumerate(names) if (folder / name).is_dir()]
    for column, place in [*places, (None, folder)]:
        for path in _images(place):
            same = [row for row in by_name.get(path.name, []) if _same_content(photos[row][0], path)]
            if not same:
                by_name.setdefault(path.name, []).append(len(photos))
                photos.append((path, []))
            row = same[0] if same else len(photos) - 1
            if column is not None:
                photos[row][1].append(column)
    return photos


def _same_content(one: Path, other: Path) -> bool:
    try:
        if os.path.samefile(one, other):
            return True
        return one.stat().st_size == other.stat().st_size and read_regular(one) == read_regular(other)
    except OSError:
        return False  # a broken link or a special file, which the fingerprint reports by name


NAMES = {"folders": folders}
