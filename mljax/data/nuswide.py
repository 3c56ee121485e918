"""NUS-WIDE, 81 concepts, in the forms that papers use; their numbers differ by 2 to 5 mAP, so the name tells.

| variant | what | images | who |
|---|---|---|---|
| official | the data set's lists, images without any label dropped | about 125,449 / 83,898 | HSVLT, TSFormer |
| asl | `nus_wid_data.csv`: what could still be had, random 70/30 | about 220,000 | ASL, Query2Label, MSRN, MulCon |
| spml | `formatted_{train,val}_*.npy`: crawled again | 150,000 / 60,260 | single-positive papers |
| zsl | `data.csv`: 925 tags of the site and the 81 concepts | of the file | ML-Decoder's zero-shot rows |

Chua et al., "NUS-WIDE: A Real-World Web Image Database from National University of Singapore", CIVR 2009.
"""

import csv
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mljax.data.files import Absent, check_once, data_folder, fingerprint, rows_present, some, text_lines
from mljax.data.source import Files, Source
from mljax.errors import UserError, nearest
from mljax.untrusted import read_npy

CLASSES = (
    *("airport", "animal", "beach", "bear", "birds", "boats", "book", "bridge", "buildings", "cars", "castle", "cat"),
    *("cityscape", "clouds", "computer", "coral", "cow", "dancing", "dog", "earthquake", "elk", "fire", "fish"),
    *("flags", "flowers", "food", "fox", "frost", "garden", "glacier", "grass", "harbor", "horses", "house", "lake"),
    *("leaf", "map", "military", "moon", "mountain", "nighttime", "ocean", "person", "plane", "plants", "police"),
    *("protest", "railroad", "rainbow", "reflection", "road", "rocks", "running", "sand", "sign", "sky", "snow"),
    *("soccer", "sports", "statue", "street", "sun", "sunset", "surf", "swimmers", "tattoo", "temple", "tiger"),
    *("tower", "town", "toy", "train", "tree", "valley", "vehicle", "water", "waterfall", "wedding", "whales"),
    *("window", "zebra"),
)
SPLITS = {"official": ("train", "test"), "asl": ("train", "val"), "spml": ("train", "val"), "zsl": ("train", "val")}
# by which the folder of a variant is known
MARKS = {"official": "ImageList", "asl": "nus_wid_data.csv", "spml": "formatted_train_labels.npy", "zsl": "data.csv"}
FOLDERS = ("nus_wide", "NUS-WIDE", "NUS_WIDE", "nuswide", "nus-wide")
IMAGE_FOLDERS = ("Flickr", "images", "Images", "ImageData")

Rows = tuple[list[str], np.ndarray, tuple[str, ...]]  # what a reader gives: paths, labels (N l), the l classes


def nuswide(
    split: str,
    *,
    training: bool,
    root: str | None = None,
    variant: str = "official",
    annotated_only: bool = True,
    single_positive: bool = False,
    absent: str = "error",
    images: str = "",
) -> Source:
    """One split of NUS-WIDE.

    Layout, in ROOT/nus_wide (or NUS-WIDE, or ROOT itself):
      official: `ImageList/{Train,Test}Imagelist.txt` (paths with back-slashes) and `[Groundtruth/]TrainTestLabels/
        Labels_{concept}_{Train,Test}.txt`, or `[Groundtruth/]AllLabels/Labels_{concept}.txt` with
        `ImageList/Imagelist.txt`; `Concepts81.txt` is checked where it is there.
      asl: `nus_wid_data.csv` with path, bracketed list of label names, split.
      spml: `formatted_{train,val}_{images,labels,labels_obs}.npy`.
      zsl: `data.csv`, as the file of asl, with a header; its classes are the names that occur, in alphabetical order.
    The images lie in Flickr/, images/ or the folder itself.

    Args:
      split: official "train" or "test"; of the others "train" or "val".
      training: whether the split is trained on; see `single_positive`.
      root: None: the variable MLJAX_DATA.
      variant: "official", "asl", "spml" or "zsl", where `config.unseen` says which classes training does not have.
      annotated_only: of the official lists, drop the images with none of the 81 labels (more than a fifth).
      single_positive: of "spml", training sees the one label of `labels_obs` and nothing else.
      absent: images that are not on disk: "error", or "drop" them (many can no longer be had); the name counts them.
      images: the folder of the images, relative to that of the data set.
    Raises:
      UserError: a choice that does not exist, or a file that is not as the layout promises.
    Differs from the authors' code: ASL's class order is that of the labels that occur; here it is always all 81.
    The class order of the SPML arrays is taken to be the official one, which their 81 columns do not tell.
    """
    if variant not in SPLITS:
        raise UserError(f"NUS-WIDE has no variant {variant!r}{nearest(variant, SPLITS)}.")
    if split not in SPLITS[variant]:
        raise UserError(f"NUS-WIDE ({variant}) has no split {split!r}{nearest(split, SPLITS[variant])}.")
    if single_positive and variant != "spml":
        raise UserError("The setting single_positive belongs to variant='spml', whose arrays have such labels.")
    reader = {"official": _official, "asl": _asl, "spml": _spml, "zsl": _zsl}[variant]
    folder = _find(root, variant)
    ids, labels, classes = reader(folder, split)
    observed = np.ones_like(labels)
    if single_positive and training:
        observed = _binary(folder, split, "labels_obs", labels.shape)
        if (observed > labels).any():
            raise UserError(f"formatted_{split}_labels_obs.npy in {str(folder)!r} has labels that labels.npy has not.")
    notes = []
    if variant == "official" and annotated_only:
        kept = np.flatnonzero(labels.any(axis=1))
        ids, labels, observed = [ids[i] for i in kept], labels[kept], observed[kept]
    elif variant == "official":
        notes.append("all images")
    place = _images(folder, images, ids)
    paths = [os.path.join(place, name) for name in ids]
    where = f"The {variant} split {split!r} in {str(folder)!r}"
    rows = rows_present(paths, absent, where=where)
    if len(rows) < len(ids):
        notes.append(f"{len(ids) - len(rows)} not on disk left out")
        ids, paths = [ids[i] for i in rows], [paths[i] for i in rows]
        labels, observed = labels[rows], observed[rows]
    return Source(
        name=f"NUS-WIDE {variant} {split}" + (f" ({', '.join(notes)})" if notes else ""),
        classes=classes,
        ids=ids,
        labels=labels,
        observed=observed,
        scored=np.ones_like(labels),
        read=Files(paths),
        fingerprint=fingerprint(ids, paths, labels, where=where, hint="unpack them, or set absent='drop'"),
    )


def _find(root: str | None, variant: str) -> Path:
    folder = data_folder(root)
    for candidate in (*(folder / name for name in FOLDERS), folder):
        if (candidate / MARKS[variant]).exists():
            return candidate
    raise Absent(
        f"There is no nus_wide/{MARKS[variant]} under {str(folder)!r}, which variant={variant!r} reads: set 'root' (or"
        " MLJAX_DATA) to its folder, or choose another variant."
    )


def _images(folder: Path, images: str, ids: Sequence[str]) -> Path:
    """The folder that the paths of the lists are relative to."""
    if images:
        if not (folder / images).is_dir():
            raise UserError(f"The folder of images {str(folder / images)!r} is not there: set 'images' to it.")
        return folder / images
    first = ids[0] if ids else ""
    for candidate in (folder / name for name in (*IMAGE_FOLDERS, ".")):
        if (candidate / first.split("/")[0]).exists():
            return candidate
    return folder / next((name for name in IMAGE_FOLDERS if (folder / name).is_dir()), "")


# --- the official lists ---------------------------------------------------------------------------------------------


def _official(folder: Path, split: str) -> Rows:
    word = split.capitalize()
    check_concepts(folder)
    path = folder / "ImageList" / f"{word}Imagelist.txt"
    ids = _image_list(path)
    for labels in ("Groundtruth/TrainTestLabels", "TrainTestLabels"):
        if (folder / labels).is_dir():
            files = [folder / labels / f"Labels_{name}_{word}.txt" for name in CLASSES]
            return ids, _columns(files, len(ids), path), CLASSES
    for labels in ("Groundtruth/AllLabels", "AllLabels"):
        if (folder / labels).is_dir():
            everything = _image_list(folder / "ImageList" / "Imagelist.txt")
            row = {name: i for i, name in enumerate(everything)}
            unknown = [name for name in ids if name not in row]
            if unknown:
                raise UserError(
                    f"{str(path)!r} names {some(unknown)}, which Imagelist.txt does not: unpack both again."
                )
            files = [folder / labels / f"Labels_{name}.txt" for name in CLASSES]
            found = _columns(files, len(everything), path.with_name("Imagelist.txt"))
            return ids, found[[row[name] for name in ids]], CLASSES
    raise UserError(f"{str(folder)!r} has neither TrainTestLabels nor AllLabels: unpack NUS-WIDE's Groundtruth there.")


def _image_list(path: Path) -> list[str]:
    names = [line.replace("\\", "/") for line in text_lines(path, hint="unpack NUS-WIDE's ImageList there")]
    if not names:
        raise UserError(f"The list {str(path)!r} is empty; expected one image path per line.")
    check_once(names, where=f"The list {str(path)!r}")
    return names


def check_concepts(folder: Path) -> None:
    """Concepts81.txt, where it is there, must list the 81 concepts in their order."""
    path = next(
        (p for p in (folder / "Concepts81.txt", folder / "ConceptsList" / "Concepts81.txt") if p.is_file()), None
    )
    if path is None:
        return
    names = text_lines(path)
    check_once(names, where=f"The list of classes {str(path)!r}")
    if unknown := [name for name in names if name not in CLASSES]:
        raise UserError(f"{str(path)!r} has the class {unknown[0]!r}, not one of NUS-WIDE's 81: unpack it again.")
    if tuple(names) != CLASSES:
        raise UserError(
            f"{str(path)!r} has {len(names)} classes or another order than the official 81: unpack it again."
        )


def _columns(files: Sequence[Path], rows: int, listing: Path) -> np.ndarray:
    """(rows 81) uint8 from one file of 0 and 1 a line for each concept."""
    labels = np.zeros((rows, len(files)), np.uint8)
    for column, path in enumerate(files):
        try:
            data = np.frombuffer(path.read_bytes(), np.uint8)
        except OSError as error:
            raise UserError(
                f"{str(path)!r} cannot be read ({error.strerror}): unpack NUS-WIDE's labels again."
            ) from None
        digit = (data == ord("0")) | (data == ord("1"))
        if not np.isin(data[~digit], np.frombuffer(b" \t\r\n", np.uint8)).all() or (digit[1:] & digit[:-1]).any():
            raise UserError(f"{str(path)!r} has a line that is neither 0 nor 1: unpack NUS-WIDE's labels again.")
        values = data[digit] - ord("0")
        if len(values) != rows:
            raise UserError(
                f"{str(path)!r} has {len(values)} lines against {rows} images of {listing.name}: unpack both again."
            )
        labels[:, column] = values
    return labels


# --- the csv files of ASL and ML-Decoder -----------------------------------------------------------------------------


def _asl(folder: Path, split: str) -> Rows:
    return _listed(folder / MARKS["asl"], split, CLASSES)


def _zsl(folder: Path, split: str) -> Rows:
    return _listed(folder / MARKS["zsl"], split, ())


def _listed(path: Path, split: str, classes: tuple[str, ...]) -> Rows:
    """A split of a CSV; without `classes` they are the names in the file, sorted."""
    known = set(classes)
    ids: list[str] = []
    chosen: list[list[str]] = []
    every: set[str] = set()
    seen: dict[str, int] = {}
    splits: set[str] = set()
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream)
            for fields in reader:
                number = reader.line_num
                header = number == 1 and "[" not in "".join(fields[1:2])
                if header or not any(field.strip() for field in fields):
                    continue
                if len(fields) < 3:
                    raise UserError(
                        f"Line {number} of {str(path)!r} has {len(fields)} fields: expected path, labels and split."
                    )
                image, names, part = fields[0].strip().replace("\\", "/"), _names(fields[1]), fields[2].strip()
                every.update(names)
                for name in names:
                    if known and name not in known:
                        raise UserError(
                            f"Line {number} of {str(path)!r} has the label {name!r}, not one of NUS-WIDE's"
                            f" 81{nearest(name, known)}."
                        )
                if (first := seen.setdefault(image, number)) != number:
                    raise UserError(f"{str(path)!r} names {image!r} twice, in lines {first} and {number}: keep one.")
                splits.add(part)
                if part == split:
                    ids.append(image)
                    chosen.append(names)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{str(path)!r} cannot be read as CSV ({error}): get it again.") from None
    if not ids:
        raise UserError(f"{str(path)!r} has no images in the split {split!r}{nearest(split, splits)}.")
    classes = classes or tuple(sorted(every))
    column = {name: i for i, name in enumerate(classes)}
    labels = np.zeros((len(chosen), len(classes)), np.uint8)
    for row, names in enumerate(chosen):
        labels[row, [column[name] for name in names]] = 1
    return ids, labels, classes


def _names(text: str) -> list[str]:
    """`['clouds', 'sky']` -> clouds, sky."""
    names = [part.strip(" []'\"\n") for part in text.split(",")]
    return [name for name in names if name]


# --- the arrays of SPML ---------------------------------------------------------------------------------------------


def _spml(folder: Path, split: str) -> Rows:
    path, names = _array(folder, split, "images", "paths")
    ids = [str(name).replace("\\", "/") for name in names.ravel()]
    check_once(ids, where=f"{str(path)!r}")
    return ids, _binary(folder, split, "labels", (len(ids), len(CLASSES))), CLASSES


def _array(folder: Path, split: str, what: str, of: str) -> tuple[Path, np.ndarray]:
    path = folder / f"formatted_{split}_{what}.npy"
    try:
        return path, read_npy(path)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{str(path)!r} cannot be read as an array of {of} ({error}): get the SPML files again."
        ) from None


def _binary(folder: Path, split: str, what: str, shape: tuple[int, ...]) -> np.ndarray:
    path, found = _array(folder, split, what, "labels")
    if found.shape != shape or not np.isin(found, (0, 1)).all():
        raise UserError(
            f"{str(path)!r} has shape {found.shape} or values other than 0 and 1, where {shape} is expected."
        )
    return found.astype(np.uint8)


NAMES = {"nuswide": nuswide}
