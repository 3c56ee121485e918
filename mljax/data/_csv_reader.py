"""A CSV of images and labels -> its rows, read in one pass and checked."""

import csv
import dataclasses
import posixpath
from array import array
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mljax.data._csv_rows import Partial, Rows
from mljax.data.files import IMAGES, drawn
from mljax.data.labels import spelled_twice
from mljax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Form:
    """How a CSV is written: headers of image, labels, split and known negatives (empty: "negatives", if it is there),
    and what `table` says of the others."""

    columns: tuple[str, str, str, str]
    separator: str = "|"
    delimiter: str = ","
    val_share: float = 0.0

    def __post_init__(self) -> None:
        if not self.separator or len(self.delimiter) != 1:
            raise UserError(
                f"separator={self.separator!r} and delimiter={self.delimiter!r} must be a text and a single character."
            )
        if not 0 <= self.val_share < 1:
            raise UserError(f"val_share={self.val_share} is not a share: use a number from 0 to below 1.")


def read_rows(path: Path, form: Form, *, classes_given: bool = False) -> Rows:
    """All rows of a CSV, checked one by one and against each other.

    Args:
      classes_given: whether a list of names will check the labels, so that they may hold other separators.
    Raises:
      UserError: the file or a row is not as expected; the sentence says which.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            rows = _Reader(path, form).read(stream)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{str(path)!r} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8."
        ) from error
    except csv.Error as error:
        raise UserError(f"{str(path)!r} cannot be read as CSV ({error}): check quotes and line ends.") from error
    if not rows.images:
        raise UserError(
            f"{str(path)!r} has no rows; expected a header {form.delimiter.join(form.columns[:3])!r} and a row per"
            " image."
        )
    _check_images(path, rows)
    _check_names(path, rows, form.separator, classes_given)
    return rows


class _Reader:
    """One pass over a file."""

    def __init__(self, path: Path, form: Form):
        self.path, self.form = path, form
        self.splits: dict[str, int] = {}
        self.names: dict[str, int] = {}
        self.numbers: dict[str, int] = {}  # of what stands between separators; -1 where that is no plain label
        self.first, self.labels, self.ends = array("q"), array("i"), array("q")
        self.partial: dict[int, Partial] = {}

    def read(self, stream: Iterable[str]) -> Rows:
        reader = csv.reader(stream, delimiter=self.form.delimiter)
        header = next((found for fields in reader if any(found := [field.strip() for field in fields])), [])
        images: list[str] = []
        lines, split, said = array("q"), array("i"), array("i")
        if header:
            image, labels, part, negatives = _positions(self.path, header, self.form)
            known: dict[Any, int] = {}  # by the text of the fields
            parts: dict[str, int] = {}
            width = len(header)
            for fields in reader:
                name = fields[image].strip() if len(fields) == width else ""
                if not name or "\\" in name or "./" in name or "//" in name or name[-1] in "./":
                    name = self._image(fields, name, width, reader.line_num)
                    if not name:
                        continue
                text = fields[labels] if negatives is None else (fields[labels], fields[negatives])
                if (number := known.get(text)) is None:
                    number = known[text] = self._say(reader.line_num, len(images), text)
                text = fields[part] if part is not None else "val" if drawn(name) < self.form.val_share else "train"
                if (place := parts.get(text)) is None:
                    place = parts[text] = self._split(reader.line_num, text)
                images.append(name)
                lines.append(reader.line_num)
                split.append(place)
                said.append(number)
        return Rows(
            images=images,
            lines=np.array(lines),
            splits=list(self.splits),
            split=np.array(split),
            names=list(self.names),
            said=np.array(said),
            first=np.array(self.first),
            labels=np.array(self.labels),
            ends=np.array(self.ends),
            partial=self.partial,
        )

    def _image(self, fields: list[str], image: str, width: int, line: int) -> str:
        """The image of a row whose path is to be tidied, or that has none; empty: nor has it anything else."""
        if image:
            return posixpath.normpath(image.replace("\\", "/"))
        if not any(field.strip() for field in fields):
            return ""
        raise self._incomplete(line, len(fields), width)

    def _incomplete(self, line: int, found: int, width: int) -> UserError:
        if found != width:
            return UserError(
                f"Line {line} of {str(self.path)!r} has {found} fields where the header has {width}: "
                "put fields that hold the delimiter in quotes."
            )
        return UserError(f"Line {line} of {str(self.path)!r} names no image: fill the field or remove the row.")

    def _split(self, line: int, text: str) -> int:
        name = text.strip()
        if not name:
            raise UserError(f"Line {line} of {str(self.path)!r} names no split: fill the field or remove the row.")
        return self.splits.setdefault(name, len(self.splits))

    def _say(self, line: int, row: int, text: str | tuple[str, str]) -> int:
        """Take the label fields of a row apart -> the number of what they say."""
        first, second = (text, None) if isinstance(text, str) else text
        parts = first.split(self.form.separator)
        numbers: Any = list(map(self.numbers.get, parts))
        if None in numbers:
            numbers = [self._number(part) for part in parts]
        if second is not None or -1 in numbers:
            numbers = self._partial(line, first, second)
        self.labels.extend(numbers if len(set(numbers)) == len(numbers) else dict.fromkeys(numbers))
        self.ends.append(len(self.labels))
        self.first.append(row)
        return len(self.first) - 1

    def _number(self, part: str) -> int:
        name = " ".join(part.split())
        plain = bool(name) and not name.startswith("?")
        self.numbers[part] = self.names.setdefault(name, len(self.names)) if plain else -1
        return self.numbers[part]

    def _partial(self, line: int, first: str, second: str | None) -> list[int]:
        """The same of fields with empty parts, unknown labels or negatives, which are kept beside."""
        named = _names(first, self.form.separator)
        unknown = tuple(name[1:].strip() or "?" for name in named if name.startswith("?"))
        labels = [name for name in named if not name.startswith("?")]
        negatives = None if second is None else _names(second, self.form.separator)
        twice = [name for name, count in Counter([*labels, *unknown, *(negatives or ())]).items() if count > 1]
        if twice:
            raise UserError(
                f"Line {line} of {str(self.path)!r} contradicts itself about {twice[0]!r}: keep it once, as a label, as"
                " unknown or as a negative."
            )
        if unknown or negatives is not None:
            self.partial[len(self.first)] = Partial(unknown, negatives)
        for name in (*(n for n in unknown if n != "?"), *(n for n in negatives or () if n != "*")):
            self.names.setdefault(name, len(self.names))
        return [self.names.setdefault(name, len(self.names)) for name in labels]


def _positions(path: Path, header: list[str], form: Form) -> tuple[int, int, int | None, int | None]:
    """Where image, labels, split and negatives are in a row; no split where `val_share` stands for it."""
    image, labels, split, negatives = form.columns
    if image not in header and any(field.lower().endswith(IMAGES) for field in header):
        raise UserError(
            f"{str(path)!r} begins with {header!r}, which looks like an image:"
            f" add a header row {','.join(form.columns[:3])!r}."
        )
    if len(header) == 1 and (other := next((d for d in ";\t|," if d in header[0]), None)):
        raise UserError(
            f"{str(path)!r} has one column {header[0]!r}: its columns are separated by {other!r}, so set "
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
    if not form.val_share and split not in header:
        raise UserError(
            f"{str(path)!r} has no column {split!r}{nearest(split, header)}: add it, set split_column, or "
            "set val_share=0.2 to hold out a fifth of the images as 'val'."
        )
    if form.val_share and split in header:
        raise UserError(
            f"{str(path)!r} has a column {split!r}, so val_share={form.val_share} is not needed: remove one of them."
        )
    return header.index(image), header.index(labels), None if form.val_share else header.index(split), last


def _names(field: str, separator: str) -> tuple[str, ...]:
    """The labels of a field, each once."""
    return tuple(label for label in dict.fromkeys(" ".join(part.split()) for part in field.split(separator)) if label)


def _check_images(path: Path, rows: Rows) -> None:
    if len(set(rows.images)) == len(rows.images):
        return
    seen: dict[str, int] = {}
    for row, image in enumerate(rows.images):
        first = seen.setdefault(image, row)
        if first == row:
            continue
        one, other = (rows.splits[rows.split[i]] for i in (first, row))
        splits = f" in the splits {one!r} and {other!r}" if one != other else ""
        raise UserError(
            f"{str(path)!r} names the image {image!r} twice{splits}, in lines {rows.lines[first]} and "
            f"{rows.lines[row]}: keep one row, with all its labels."
        )


def _check_names(path: Path, rows: Rows, separator: str, classes_given: bool) -> None:
    if pair := spelled_twice(rows.splits):
        raise UserError(f"{str(path)!r} spells a split in two ways, {pair[0]!r} and {pair[1]!r}: use one of them.")
    if pair := spelled_twice(rows.names):
        lines = [rows.line_of(name)[0] for name in pair]
        raise UserError(
            f"{str(path)!r} spells a label in two ways, {pair[0]!r} (line {lines[0]}) and {pair[1]!r} "
            f"(line {lines[1]}): use one of them."
        )
    odd = [(name, c) for name in rows.names for c in "|;" if c in name and c != separator]
    if odd and not classes_given:
        name, other = odd[0]
        raise UserError(
            f"Line {rows.line_of(name)[0]} of {str(path)!r} has the label {name!r}, with {other!r} inside: set "
            f"separator={other!r} if it separates labels, or list 'classes' if it does not."
        )
