"""PASCAL VOC 2007 and 2012: twenty classes, ternary labels, four ways to treat what is difficult.

A label is +1 (an instance is visible), -1 (none is) or 0 (only instances that are marked difficult). Papers
differ in what they make of 0, and their numbers are comparable only under the same policy:

| policy | in training | in evaluation | who |
|---|---|---|---|
| V1 | 0 is positive | 0 is negative, and not scored by AP | ML-GCN, ADD-GCN, TDRG, MCAR, GATN, MSRN |
| V2 | 0 is negative | the same, scored | SSGRL, SST, SARB, HST, C-Tran |
| V3 | 0 is negative; images without any +1 are dropped | the same, scored | MLC-PAT (2007), SPML (2012) |
| V4 | 0 is negative | 0 is negative, and not scored by AP | CSRA, HSVLT |
"""

import os
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mljax.data._instances import VocInstances
from mljax.data.files import Absent, data_folder, fingerprint, some
from mljax.data.source import Files, Source
from mljax.errors import UserError, nearest

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)

# Images of the official splits. Labels of 2012 test are with the evaluation server only.
SIZES = {
    "2007": {"train": 2501, "val": 2510, "trainval": 5011, "test": 4952},
    "2012": {"train": 5717, "val": 5823, "trainval": 11540, "test": 10991},
}
POLICIES = ("V1", "V2", "V3", "V4")


def voc(
    split: str,
    *,
    training: bool,
    root: str | None = None,
    year: str = "2007",
    difficult: str = "V1",
    variant: str = "",
) -> Source:
    """One split of PASCAL VOC in its own layout, `VOCdevkit/VOC2007/{JPEGImages,Annotations,ImageSets/Main}`.

    Labels come from `ImageSets/Main/{class}_{split}.txt` where these lists exist, else from `Annotations`.
    The test split of 2012 has no public labels: its labels, observed and scored are all zero and its name
    says "unlabelled".

    Args:
      split: a list in ImageSets/Main: "trainval", "train", "val", "test", or one of the user's own (see
        `variant`).
      training: whether the split is trained on; policies V1 and V4 differ between training and evaluation.
      root: the folder that holds VOCdevkit, or VOCdevkit, or VOC2007 itself; None: the variable MLJAX_DATA.
      year: "2007" or "2012".
      difficult: policy for labels that only difficult instances support, "V1" to "V4" (see the module).
      variant: empty for the official splits, whose numbers of images are then checked. A name such as
        "VOC2007 re-split" switches the check off and stands in the place of "VOC2007" in all results.
    Returns:
      The split. `observed` is all ones; `scored` is zero at difficult entries under V1 and V4.
    Raises:
      UserError: something expected is not there, or is not what the layout promises.
    Reference: Everingham et al., "The PASCAL Visual Object Classes (VOC) Challenge", IJCV 2010.
    Differs from the authors' code: under V1 and V4 entries with 0 count as negatives in precision and recall,
    as in ML-GCN's; CSRA leaves them out there too. Slices of a split under V3 count after dropping.
    """
    year = str(year)
    if year not in SIZES:
        raise UserError(f"VOC has the years 2007 and 2012 here, not {year!r}: set year='2007' or year='2012'.")
    if difficult not in POLICIES:
        raise UserError(f"There is no policy {difficult!r} for difficult labels: use one of {', '.join(POLICIES)}.")
    folder = _find(root, year)
    ids = read_ids(folder, split)
    _check_size(folder, split, len(ids), year, variant)
    ternary = _lists(folder, split, ids)
    if year == "2012" and split == "test" and (ternary is None or not ternary.any()):
        if training:
            raise UserError("VOC2012 test has no public labels, so it cannot be trained on: train on 'trainval'.")
        labels = observed = scored = np.zeros((len(ids), len(CLASSES)), np.uint8)
        split = "test (unlabelled)"
    else:
        ternary = _annotations(folder, ids) if ternary is None else ternary
        kept, labels, scored = apply_policy(ternary, difficult, training=training)
        ids, observed = [ids[i] for i in kept], np.ones_like(labels)
    paths = [os.fspath(folder / "JPEGImages" / f"{name}.jpg") for name in ids]
    return Source(
        name=f"{variant.strip() or f'VOC{year}'} {split}",
        classes=CLASSES,
        ids=ids,
        labels=labels,
        observed=observed,
        scored=scored,
        read=Files(paths),
        instances=VocInstances(folder, ids, CLASSES),
        fingerprint=fingerprint(ids, paths, labels, where=f"The list of {split!r} in {str(folder)!r}"),
    )


def apply_policy(ternary: np.ndarray, difficult: str, *, training: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a policy makes of ternary labels.

    Args:
      ternary: (N l) in {+1, 0, -1}.
      difficult: "V1" to "V4".
      training: whether the split is trained on.
    Returns:
      kept (M) int64 rows, all but under V3; labels (M l) uint8 in {0, 1}; scored (M l) uint8 in {0, 1}.
    """
    positive = ternary > 0
    kept = np.flatnonzero(positive.any(1)) if difficult == "V3" else np.arange(len(ternary))
    labels = ternary >= 0 if difficult == "V1" and training else positive
    scored = ternary != 0 if difficult in ("V1", "V4") else np.ones_like(positive)
    return kept, labels[kept].astype(np.uint8), scored[kept].astype(np.uint8)


def write_submission(
    folder: Path, source: Source, scores: np.ndarray, *, competition: str = "comp1", split: str = "test"
) -> list[Path]:
    """The server's files of the classification task, `{competition}_cls_{split}_{class}.txt`: a line an image.

    Args:
      folder: they go to `results/VOC2012/Main` in it, the paths that the server wants packed.
      source: a VOC split; its ids are those of the lists.
      scores: (N l), higher is likelier; any scale.
      competition: "comp1", trained on VOC alone, or "comp2", on other data too (ImageNet weights are other data).
    Returns:
      The files, in the order of the classes.
    Raises:
      UserError: no such competition, scores that are not finite, or the disk cannot be written.
    """
    if competition not in ("comp1", "comp2"):
        raise UserError(f"There is no classification task {competition!r}{nearest(competition, ('comp1', 'comp2'))}.")
    if scores.shape != (len(source), len(CLASSES)) or not np.isfinite(scores).all():
        raise UserError(f"The scores of {source.name} have shape {scores.shape} or are not finite: train again.")
    place = folder / "results" / "VOC2012" / "Main"
    paths = [place / f"{competition}_cls_{split}_{name}.txt" for name in CLASSES]
    try:
        place.mkdir(parents=True, exist_ok=True)
        for path, column in zip(paths, np.asarray(scores, np.float64).T):
            path.write_text("".join(f"{name} {score:.6f}\n" for name, score in zip(source.ids, column)))
    except OSError as error:
        raise UserError(f"{str(place)!r} cannot be written ({error.strerror}): free space there.") from error
    return paths


def read_ids(folder: Path, split: str) -> list[str]:
    """The ids in ImageSets/Main/{split}.txt, one a line, in that order."""
    main = folder / "ImageSets" / "Main"
    if not main.is_dir():
        raise UserError(f"There is no folder {str(main)!r}, where the lists of images should be: unpack VOC again.")
    path = main / f"{split}.txt"
    if not path.is_file():
        lists = {file.stem for file in main.glob("*.txt")}
        splits = {name for name in lists if not any(name.startswith(f"{label}_") for label in CLASSES)}
        raise UserError(
            f"VOC has no split {split!r}: {str(path)!r} is not "
            f"there{nearest(split, splits) or ' (nor any other list)'}."
        )
    ids = [fields[0] for line in _lines(path) if (fields := line.split())]
    if not ids:
        raise UserError(f"The list {str(path)!r} is empty; expected one image id per line.")
    twice = [name for name, count in Counter(ids).items() if count > 1]
    if twice:
        raise UserError(f"The list {str(path)!r} names images twice: {some(twice)}; keep one line for each.")
    return ids


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{str(path)!r} is not a text file ({error.reason}): unpack VOC again.") from error


def _find(root: str | None, year: str) -> Path:
    folder = data_folder(root)
    name = f"VOC{year}"
    for candidate in (folder / "VOCdevkit" / name, folder / name):
        if candidate.is_dir():
            return candidate
    other_year = folder.name.upper().startswith("VOC20") and folder.name.upper() != name
    if (folder / "ImageSets").is_dir() and not other_year:
        return folder
    raise Absent(
        f"There is no 'VOCdevkit/{name}' under {str(folder)!r}: set 'root' (or MLJAX_DATA) to the folder "
        "that holds VOCdevkit."
    )


def _check_size(folder: Path, split: str, found: int, year: str, variant: str) -> None:
    if variant.strip():
        if variant.strip().lower() == f"voc{year}":
            raise UserError(
                f"variant={variant!r} is the name of the official splits: name what differs, e.g. 'VOC{year} re-split'."
            )
        return
    expected = SIZES[year].get(split)
    if found != expected:
        raise UserError(
            f"The list {split}.txt under {str(folder)!r} has {found} images, but VOC{year} "
            + (f"{split} has {expected}: complete it, or" if expected else f"has no official split {split!r}:")
            + f" name your split with variant='VOC{year} re-split', and results will carry that name."
        )


def _lists(folder: Path, split: str, ids: Sequence[str]) -> np.ndarray | None:
    """(N l) int8 from {class}_{split}.txt, or None if there are no such lists."""
    paths = [folder / "ImageSets" / "Main" / f"{name}_{split}.txt" for name in CLASSES]
    absent = [path.name for path in paths if not path.is_file()]
    if len(absent) == len(CLASSES):
        return None
    if absent:
        raise UserError(
            f"{str(paths[0].parent)!r} has lists for {len(CLASSES) - len(absent)} of {len(CLASSES)} "
            "classes of the split "
            f"{split!r}, without {some(absent)}: restore these, or remove the others and Annotations are "
            "read."
        )
    ternary = np.zeros((len(ids), len(CLASSES)), np.int8)
    for column, path in enumerate(paths):
        values = _list_values(path)
        missing = [name for name in ids if name not in values]
        unknown = sorted(values.keys() - set(ids))
        if missing or unknown:
            problem, names = ("lacks", missing) if missing else ("also names", unknown)
            raise UserError(
                f"{str(path)!r} {problem} {len(names)} images, first {names[0]!r}, against {split}.txt "
                f"with {len(ids)}: "
                f"both lists must name the same images."
            )
        ternary[:, column] = [values[name] for name in ids]
    return ternary


def _list_values(path: Path) -> dict[str, int]:
    values = {}
    for number, line in enumerate(_lines(path), 1):
        fields = line.split()
        if not fields:
            continue
        # The value is the last field: lists of other tools repeat columns, and the spaces are irregular.
        if len(fields) < 2 or fields[-1] not in ("-1", "0", "1", "+1"):
            raise UserError(
                f"Line {number} of {str(path)!r} is {line.strip()!r}, where an image id and -1, 0 or 1 are expected."
            )
        values[fields[0]] = int(fields[-1])
    return values


def _annotations(folder: Path, ids: Sequence[str]) -> np.ndarray:
    """(N l) int8 from Annotations/{id}.xml."""
    paths = [folder / "Annotations" / f"{name}.xml" for name in ids]
    absent = [path.name for path in paths if not path.is_file()]
    if absent:
        raise UserError(
            f"{len(absent)} of {len(ids)} annotations are not in {str(folder / 'Annotations')!r}, first "
            f"{absent[0]!r}, "
            "and there are no class lists in ImageSets/Main: unpack the annotations."
        )
    return np.stack([_annotation(path) for path in paths])


def _annotation(path: Path) -> np.ndarray:
    """(l) int8: +1 if some instance is not difficult, 0 if all are, -1 without instances."""
    try:
        objects = ElementTree.parse(path).getroot().findall("object")
    except ElementTree.ParseError as error:
        raise UserError(f"The annotation {str(path)!r} is not valid XML ({error}): unpack it again.") from error
    values = np.full(len(CLASSES), -1, np.int8)
    for item in objects:
        # Direct children only: an object's <part> has a <name> too. Some annotations of 2012 have no
        # <difficult>.
        name = (item.findtext("name") or "").strip()
        if name not in CLASSES:
            raise UserError(
                f"The annotation {str(path)!r} has an object {name!r}, which is not a VOC "
                f"class{nearest(name, CLASSES)}."
            )
        value = 0 if (item.findtext("difficult") or "0").strip() == "1" else 1
        column = CLASSES.index(name)
        values[column] = max(values[column], value)
    return values


NAMES = {"voc": voc}
