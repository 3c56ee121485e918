"""Anyone's images with labels in a CSV: columns image, labels (joined by a bar) and split.

Labels may be known in part: `?dog` among an image's labels says that nobody knows about the dog, `?` alone that nobody
knows about what is not named; and with a column `negatives` of labels that are surely absent, what neither column names
is unknown (`*` there: all others are absent).
"""

import contextlib
import gc
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mljax.data._csv_reader import Form, read_rows
from mljax.data._csv_rows import Rows, arrays
from mljax.data.files import Under, fingerprint, some
from mljax.data.labels import key, spelled_twice
from mljax.data.source import Files, Source
from mljax.errors import UserError, nearest


@contextlib.contextmanager
def _without_collecting() -> Iterator[None]:
    """No garbage collection meanwhile: a million new strings are not garbage, and looking for some takes a tenth."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@_without_collecting()
def table(
    split: str,
    *,
    file: str,
    images: str = "",
    classes: Sequence[str] | str = (),
    separator: str = "|",
    delimiter: str = ",",
    train_split: str = "train",
    val_share: float = 0.0,
    image_column: str = "image",
    labels_column: str = "labels",
    split_column: str = "split",
    negatives_column: str = "",
    title: str = "",
) -> Source:
    """One split of a CSV file with a header and one image a row; an empty labels field is an image without
    labels.

    Args:
      split: a value of the split column; with `val_share`, "train" or "val".
      file: the CSV, UTF-8, relative to the working folder or to MLJAX_DATA.
      images: the folder that image paths are relative to; empty: the folder of the CSV; itself relative to
        that.
      classes: label order: names, or a text file (relative to the CSV) with one name a line. Empty: the
        sorted names of the whole file, and then each must occur in the training split.
      separator: between the labels of an image.
      delimiter: between columns.
      train_split: the value of the split column that marks training images.
      val_share: for a file without a split column: about this share of the images, chosen by a hash of their
        paths, is "val" and the rest "train"; adding rows moves no image from one to the other.
      image_column, labels_column, split_column: headers.
      negatives_column: header of known negatives; empty: "negatives", if there is such a column.
      title: what results call the data set; empty: the name of the CSV's folder and the CSV.
    Returns:
      The split; unknown entries are 0 in `labels`, in `observed` and in `scored`.
    Raises:
      UserError: the file, a row, a label or an image is not as expected; the sentence says which.
    """
    path = _locate(file)
    form = Form((image_column, labels_column, split_column, negatives_column), separator, delimiter, val_share)
    rows = read_rows(path, form, classes_given=bool(classes))
    names = _classes(path, rows, classes, "train" if val_share else train_split)
    chosen = rows.of(split)
    if not len(chosen):
        raise UserError(
            f"{str(path)!r} has no images in the split {split!r}{nearest(split, rows.splits)}{_way_on(form)}."
        )
    folder = path.parent / Path(images).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"The folder of images {str(folder)!r} is not there: set 'images' to it (data section of {file!r})."
        )
    labels, observed = arrays(rows, chosen, names)
    ids = [rows.images[row] for row in chosen]
    paths = Under(os.fspath(folder), ids)
    where = f"The split {split!r} of {str(path)!r}"
    hint = "paths are relative to the CSV's folder unless 'images' names another"
    return Source(
        name=f"{title or f'{path.resolve().parent.name}/{path.name}'} {split}",
        classes=names,
        ids=ids,
        labels=labels,
        observed=observed,
        scored=observed.copy(),
        read=Files(paths),
        fingerprint=fingerprint(ids, paths, labels + 2 * (1 - observed), where=where, hint=hint),
    )


def _way_on(form: Form) -> str:
    """What to do about a split without images, as the end of a sentence."""
    if form.val_share:
        return f": with val_share={form.val_share:g} there are 'train' and 'val', so raise it where one has none"
    return (
        f": write it into the column {form.columns[2]!r} of some rows, or take that column out and set val_share=0.2"
        " (--config.data.val_share=0.2) to hold out a fifth of the images as 'val'"
    )


def _locate(file: str) -> Path:
    path = Path(file or "").expanduser()
    if not file:
        raise UserError("No CSV is named: set 'file' in the data section to a CSV with columns image, labels, split.")
    data = os.environ.get("MLJAX_DATA")
    for candidate in (path, *([Path(data).expanduser() / path] if data else [])):
        if candidate.is_file():
            return candidate
    near = [other.name for other in path.parent.glob("*.csv")] if path.parent.is_dir() else []
    raise UserError(
        f"There is no file {str(file)!r}{nearest(path.name, near)}: set 'file' in the data section to the CSV."
    )


def _classes(path: Path, rows: Rows, classes: Sequence[str] | str, train_split: str) -> tuple[str, ...]:
    if classes:
        names = _given_classes(path, classes)
        known = set(names)
        if strange := [name for name in rows.names if name not in known]:
            alike = [other for other in names if key(other) == key(strange[0])]
            hint = f" (is it {alike[0]!r}?)" if alike else nearest(strange[0], names)
            raise UserError(
                f"Line {rows.line_of(strange[0])[0]} of {str(path)!r} has the label {strange[0]!r}, not one of"
                f" 'classes'{hint}."
            )
        return names
    if not len(rows.labels):
        raise UserError(f"No image of {str(path)!r} has a label: check the labels column.")
    if train_split not in rows.splits and len(rows.splits) > 1:
        raise UserError(
            f"{str(path)!r} has no images in the split {train_split!r}{nearest(train_split, rows.splits)}: set "
            "train_split to the split that is trained on, or list 'classes'."
        )
    said = np.unique(rows.said if len(rows.splits) == 1 else rows.said[rows.of(train_split)])
    trained = {rows.names[number] for number in np.unique(rows.labels_of(said)[1])}
    names = sorted(rows.names)
    if untrained := [name for name in names if name not in trained]:
        line, split = rows.line_of(untrained[0])
        raise UserError(
            f"{str(path)!r} has labels that no image of the split {train_split!r} has: {some(untrained)} "
            f"(line {line}, split {split!r}); add such images to {train_split!r}, take the labels out, or list"
            " 'classes'."
        )
    return tuple(names)


def _given_classes(path: Path, classes: Sequence[str] | str) -> tuple[str, ...]:
    if isinstance(classes, str):
        listing = path.parent / Path(classes).expanduser()
        if not listing.is_file():
            raise UserError(f"There is no list of classes {str(listing)!r}: set 'classes' to names or to a text file.")
        classes = [line.strip() for line in listing.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    names = tuple(str(name) for name in classes)
    if pair := spelled_twice(names):
        raise UserError(f"'classes' has {pair[0]!r} and {pair[1]!r}, one label spelled in two ways: keep one of them.")
    if not names or len(set(names)) < len(names):
        raise UserError("'classes' is empty or names a label twice: list every label once.")
    return names


NAMES = {"csv": table}
