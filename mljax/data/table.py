"""Anyone's images with labels in a CSV: columns image, labels (joined by a bar) and split.

Labels may be known in part: `?dog` among an image's labels says that nobody knows about the dog, `?` alone that nobody
knows about what is not named; and with a column `negatives` of labels that are surely absent, what neither column names
is unknown (`*` there: all others are absent).
"""

import csv
import hashlib
import os
import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mljax.data.files import IMAGES, fingerprint, some
from mljax.data.labels import key, spelled_twice
from mljax.data.source import Files, Source
from mljax.errors import UserError, nearest


@dataclass(frozen=True)
class Row:
    number: int  # line of the file, from 1
    image: str
    labels: tuple[str, ...]
    split: str
    unknown: tuple[str, ...] = ()  # "?": all that is not named
    negatives: tuple[str, ...] | None = None  # "*": all others; None: there is no such column


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
    columns = (image_column, labels_column, split_column, negatives_column)
    rows = read_rows(path, columns, separator, delimiter, val_share, classes_given=bool(classes))
    if val_share:
        train_split = "train"
    names = _classes(path, rows, classes, train_split)
    chosen = [row for row in rows if row.split == split]
    if not chosen:
        raise UserError(f"{str(path)!r} has no images in the split {split!r}{nearest(split, {r.split for r in rows})}.")
    folder = path.parent / Path(images).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"The folder of images {str(folder)!r} is not there: set 'images' to it (data section of {file!r})."
        )
    paths = [os.fspath(folder / row.image) for row in chosen]
    labels, observed = _arrays(chosen, names)
    ids = [row.image for row in chosen]
    return Source(
        name=f"{title or f'{path.resolve().parent.name}/{path.name}'} {split}",
        classes=names,
        ids=ids,
        labels=labels,
        observed=observed,
        scored=observed.copy(),
        read=Files(paths),
        fingerprint=fingerprint(
            ids,
            paths,
            labels + 2 * (1 - observed),
            where=f"The split {split!r} of {str(path)!r}",
            hint="paths are relative to the CSV's folder unless 'images' names another",
        ),
    )


def _arrays(rows: Sequence[Row], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Labels and observed, (N l) uint8."""
    labels = np.zeros((len(rows), len(names)), np.uint8)
    observed = np.ones_like(labels)
    index = {name: column for column, name in enumerate(names)}
    for number, row in enumerate(rows):
        labels[number, [index[name] for name in row.labels]] = 1
        if "?" in row.unknown or (row.negatives is not None and "*" not in row.negatives):
            observed[number] = labels[number]
            observed[number, [index[name] for name in row.negatives or () if name != "*"]] = 1
        observed[number, [index[name] for name in row.unknown if name != "?"]] = 0
    return labels, observed


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


def read_rows(
    path: Path,
    columns: tuple[str, str, str, str],
    separator: str = "|",
    delimiter: str = ",",
    val_share: float = 0.0,
    *,
    classes_given: bool = False,
) -> list[Row]:
    """All rows of a CSV, checked one by one and against each other.

    Args:
      path: the file.
      columns: headers of image, labels, split and known negatives (empty: "negatives", if it is there).
      separator, delimiter, val_share: see `table`.
      classes_given: whether a list of names will check the labels, so that they may hold other separators.
    """
    if not separator or len(delimiter) != 1:
        raise UserError(f"separator={separator!r} and delimiter={delimiter!r} must be a text and a single character.")
    if not 0 <= val_share < 1:
        raise UserError(f"val_share={val_share} is not a share: use a number from 0 to below 1.")
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, delimiter=delimiter)
            lines = [(reader.line_num, [field.strip() for field in fields]) for fields in reader]
    except UnicodeDecodeError as error:
        raise UserError(
            f"{str(path)!r} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8."
        ) from error
    except csv.Error as error:
        raise UserError(f"{str(path)!r} cannot be read as CSV ({error}): check quotes and line ends.") from error
    lines = [(number, fields) for number, fields in lines if any(fields)]
    if len(lines) < 2:
        raise UserError(
            f"{str(path)!r} has no rows: a header {delimiter.join(columns[:3])!r} and a row an image are expected."
        )
    positions = _positions(path, lines[0][1], columns, delimiter, val_share)
    rows = [_row(path, number, fields, lines[0][1], positions, separator, val_share) for number, fields in lines[1:]]
    _check_images(path, rows)
    _check_names(path, rows, separator, classes_given)
    return rows


def _positions(
    path: Path, header: list[str], columns: tuple[str, str, str, str], delimiter: str, val_share: float
) -> tuple[int, int, int | None, int | None]:
    """Where image, labels, split and negatives are in a row; no split where `val_share` stands for it."""
    image, labels, split, negatives = columns
    if image not in header and any(field.lower().endswith(IMAGES) for field in header):
        raise UserError(
            f"{str(path)!r} begins with {header!r}, which looks like an image:"
            f" add a header row {','.join(columns[:3])!r}."
        )
    if len(header) == 1 and (other := next((d for d in ";\t|," if d in header[0]), None)):
        raise UserError(
            f"{str(path)!r} has one column {header[0]!r}: its columns are parted by {other!r}, so set "
            f"delimiter={other!r}."
        )
    if twice := [name for name in set(header) if name and header.count(name) > 1]:
        raise UserError(f"{str(path)!r} has the column {twice[0]!r} more than once: rename one of them.")
    wanted = ((image, "image_column"), (labels, "labels_column"), (negatives or labels, "negatives_column"))
    for name, setting in wanted:
        if name not in header:
            raise UserError(
                f"{str(path)!r} has no column {name!r}{nearest(name, header)}: rename the column or set {setting}."
            )
    absent = negatives or "negatives"
    last = header.index(absent) if absent in header else None
    if val_share:
        if split in header:
            raise UserError(
                f"{str(path)!r} has a column {split!r}, so val_share={val_share} is not needed: remove one of them."
            )
        return header.index(image), header.index(labels), None, last
    if split not in header:
        raise UserError(
            f"{str(path)!r} has no column {split!r}{nearest(split, header)}: add it, set split_column, or "
            "set val_share=0.2 "
            "to hold out a fifth of the images as 'val'."
        )
    return header.index(image), header.index(labels), header.index(split), last


def _row(
    path: Path,
    number: int,
    fields: list[str],
    header: list[str],
    positions: tuple[int, int, int | None, int | None],
    separator: str,
    val_share: float,
) -> Row:
    if len(fields) != len(header):
        raise UserError(
            f"Line {number} of {str(path)!r} has {len(fields)} fields where the header has {len(header)}: "
            "put fields that hold the delimiter in quotes."
        )
    image = fields[positions[0]].replace("\\", "/")
    if not image:
        raise UserError(f"Line {number} of {str(path)!r} names no image: fill the field or remove the row.")
    image = posixpath.normpath(image)
    if positions[2] is None:
        split = "val" if _draw(image) < val_share else "train"
    else:
        split = fields[positions[2]]
        if not split:
            raise UserError(f"Line {number} of {str(path)!r} names no split: fill the field or remove the row.")
    named = _names(fields[positions[1]], separator)
    unknown = tuple(name[1:].strip() or "?" for name in named if name.startswith("?"))
    labels = tuple(name for name in named if not name.startswith("?"))
    negatives = None if positions[3] is None else _names(fields[positions[3]], separator)
    every = [*labels, *unknown, *(negatives or ())]
    if both := [name for name in every if every.count(name) > 1]:
        raise UserError(
            f"Line {number} of {str(path)!r} contradicts itself about {both[0]!r}: keep it once, as a label, as unknown"
            " or as a negative."
        )
    return Row(number, image, labels, split, unknown, negatives)


def _names(field: str, separator: str) -> tuple[str, ...]:
    """The labels of a field, each once."""
    return tuple(label for label in dict.fromkeys(" ".join(part.split()) for part in field.split(separator)) if label)


def _all_names(row: Row) -> list[str]:
    """Every label that a row speaks of."""
    return [*row.labels, *(n for n in row.unknown if n != "?"), *(n for n in row.negatives or () if n != "*")]


def _draw(image: str) -> float:
    """A number in [0, 1) that depends on the text only."""
    return int.from_bytes(hashlib.sha256(image.encode()).digest()[:6], "big") / 2**48


def _check_images(path: Path, rows: Iterable[Row]) -> None:
    seen: dict[str, Row] = {}
    for row in rows:
        first = seen.setdefault(row.image, row)
        if first is row:
            continue
        splits = f" in the splits {first.split!r} and {row.split!r}" if first.split != row.split else ""
        raise UserError(
            f"{str(path)!r} names the image {row.image!r} twice{splits}, in lines {first.number} and "
            f"{row.number}: "
            "keep one row, with all its labels."
        )


def _check_names(path: Path, rows: Sequence[Row], separator: str, classes_given: bool) -> None:
    if pair := spelled_twice(row.split for row in rows):
        raise UserError(f"{str(path)!r} spells a split in two ways, {pair[0]!r} and {pair[1]!r}: use one of them.")
    if pair := spelled_twice(name for row in rows for name in _all_names(row)):
        lines = [next(row.number for row in rows if name in _all_names(row)) for name in pair]
        raise UserError(
            f"{str(path)!r} spells a label in two ways, {pair[0]!r} (line {lines[0]}) and {pair[1]!r} "
            f"(line {lines[1]}): "
            "use one of them."
        )
    if classes_given:
        return
    for row in rows:
        for other in "|;":
            if other != separator and any(other in name for name in row.labels):
                raise UserError(
                    f"Line {row.number} of {str(path)!r} has the label {some(row.labels, 1)}, with "
                    f"{other!r} inside: set "
                    f"separator={other!r} if it parts labels, or list 'classes' if it does not."
                )


def _classes(path: Path, rows: Sequence[Row], classes: Sequence[str] | str, train_split: str) -> tuple[str, ...]:
    if classes:
        names = _given_classes(path, classes)
        for row in rows:
            for name in _all_names(row):
                if name not in names:
                    alike = [other for other in names if key(other) == key(name)]
                    hint = f" (is it {alike[0]!r}?)" if alike else nearest(name, names)
                    raise UserError(
                        f"Line {row.number} of {str(path)!r} has the label {name!r}, not one of 'classes'{hint}."
                    )
        return names
    splits = {row.split for row in rows}
    names = sorted({name for row in rows for name in _all_names(row)})
    if not any(row.labels for row in rows):
        raise UserError(f"No image of {str(path)!r} has a label: check the labels column.")
    if train_split not in splits and len(splits) > 1:
        raise UserError(
            f"{str(path)!r} has no images in the split {train_split!r}{nearest(train_split, splits)}: set "
            "train_split to the "
            "split that is trained on, or list 'classes'."
        )
    trained = {name for row in rows if row.split == train_split or len(splits) == 1 for name in row.labels}
    if untrained := [name for name in names if name not in trained]:
        row = next(row for row in rows if untrained[0] in _all_names(row))
        raise UserError(
            f"{str(path)!r} has labels that no image of the split {train_split!r} has: {some(untrained)} "
            f"(line {row.number}, "
            f"split {row.split!r}); add such images to {train_split!r}, take the labels out, or list "
            "'classes'."
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
