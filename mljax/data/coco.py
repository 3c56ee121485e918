"""MS-COCO 2014 and 2017 from the official folders and instance annotations.

Layout: ROOT/coco/ or ROOT/ holds annotations/instances_{train,val}{year}.json and {train,val}{year}/*.jpg.
Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

from mljax import untrusted
from mljax.data._instances import CocoInstances
from mljax.data.files import Absent, data_folder, fingerprint
from mljax.data.source import Files, Source
from mljax.errors import UserError, nearest

CLASSES_BY_ID = tuple(
    [
        "person",
        "bicycle",
        "car",
        "motorcycle",
        "airplane",
        "bus",
        "train",
        "truck",
        "boat",
        "traffic light",
        "fire hydrant",
        "stop sign",
        "parking meter",
        "bench",
        "bird",
        "cat",
        "dog",
        "horse",
        "sheep",
        "cow",
        "elephant",
        "bear",
        "zebra",
        "giraffe",
        "backpack",
        "umbrella",
        "handbag",
        "tie",
        "suitcase",
        "frisbee",
        "skis",
        "snowboard",
        "sports ball",
        "kite",
        "baseball bat",
        "baseball glove",
        "skateboard",
        "surfboard",
        "tennis racket",
        "bottle",
        "wine glass",
        "cup",
        "fork",
        "knife",
        "spoon",
        "bowl",
        "banana",
        "apple",
        "sandwich",
        "orange",
        "broccoli",
        "carrot",
        "hot dog",
        "pizza",
        "donut",
        "cake",
        "chair",
        "couch",
        "potted plant",
        "bed",
        "dining table",
        "toilet",
        "tv",
        "laptop",
        "mouse",
        "remote",
        "keyboard",
        "cell phone",
        "microwave",
        "oven",
        "toaster",
        "sink",
        "refrigerator",
        "book",
        "clock",
        "vase",
        "scissors",
        "teddy bear",
        "hair drier",
        "toothbrush",
    ]
)
ORDERS = ("alphabetical", "id")


def coco(
    split: str,
    *,
    root: str | None = None,
    year: str = "2014",
    order: str = "alphabetical",
    annotated_only: bool = True,
) -> Source:
    """One split of COCO: an image has a label where it has an instance of the class, crowds included.

    Args:
      split: "train" or "val".
      root: holds coco/ or the COCO folders themselves; None: the environment variable MLJAX_DATA.
      year: "2014" or "2017".
      order: of classes: "alphabetical" (ML-GCN's family, MulCon) or by category "id" (ASL, Query2Label, SST, SPML).
      annotated_only: drop images without instances (82,081 / 40,137 in 2014) as ML-GCN, MulCon, ASL do; otherwise keep
        them with all labels negative (82,783 / 40,504) as Query2Label, SSGRL, SST do.
    Raises:
      UserError: a choice that does not exist, folders or images that are not there, annotations of something else.
    """
    for key, value, options in (("split", split, ("train", "val")), ("year", str(year), ("2014", "2017"))):
        if value not in options:
            raise UserError(f"COCO has no {key} {value!r}{nearest(value, options)}.")
    if order not in ORDERS:
        raise UserError(f"config.data.order is {order!r}{nearest(order, ORDERS)}.")
    folder = _folder(root, f"instances_{split}{year}.json")
    path = folder / "annotations" / f"instances_{split}{year}.json"
    names, labels = _labels(path)
    images = folder / f"{split}{year}"
    if not images.is_dir():
        raise Absent(f"There is no folder {str(images)!r} with the images of {path.name}; unpack them there.")
    if order == "alphabetical":
        labels = labels[:, np.argsort(np.array(CLASSES_BY_ID))]
    if annotated_only:
        kept = np.asarray(labels.any(axis=1))
        names, labels = [n for n, k in zip(names, kept) if k], labels[kept]
    paths = [os.path.join(images, name) for name in names]
    ones = np.ones_like(labels)
    classes = tuple(sorted(CLASSES_BY_ID)) if order == "alphabetical" else CLASSES_BY_ID
    return Source(
        name=f"COCO{year} {split}" + ("" if annotated_only else " (all images)"),
        classes=classes,
        ids=names,
        labels=labels,
        observed=ones,
        scored=ones,
        read=Files(paths),
        instances=CocoInstances(path, names, classes),
        fingerprint=fingerprint(names, paths, labels, where=str(path)),
    )


def _folder(root: str | None, name: str) -> Path:
    folder = data_folder(root)
    for candidate in (folder / "coco", folder / "COCO", folder):
        if (candidate / "annotations" / name).is_file():
            return candidate
    raise Absent(
        f"There is no coco/annotations/{name} under {str(folder)!r}: set 'root' (or MLJAX_DATA) to its folder."
    )


def _labels(path: Path) -> tuple[list[str], np.ndarray]:
    """File names in the order of the file, and (N 80) uint8 in the order of category ids."""
    try:
        content: dict[str, Any] = untrusted.read_json(path)
        images = {image["id"]: image["file_name"] for image in content["images"]}
        categories = sorted(content["categories"], key=lambda category: category["id"])
        instances = [(a["image_id"], a["category_id"]) for a in content["annotations"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{str(path)!r} is not a COCO instances file ({type(error).__name__}: {error}).") from None
    found = tuple(category["name"] for category in categories)
    if len(set(found)) < len(found) or len({c["id"] for c in categories}) < len(found):
        raise UserError(f"{str(path)!r} has two categories with one name or id: give the official instances file.")
    if found != CLASSES_BY_ID and sorted(found) == sorted(CLASSES_BY_ID):
        raise UserError(
            f"{str(path)!r} has COCO's 80 names under other ids, {found[0]!r} first where {CLASSES_BY_ID[0]!r} is"
            " expected: its order of classes would not be that of the papers; give the official instances file."
        )
    if found != CLASSES_BY_ID:
        raise UserError(
            f"{str(path)!r} has {len(found)} categories, of which {len(set(found) & set(CLASSES_BY_ID))} are COCO's 80:"
            " give the official instances file, or use the csv reader."
        )
    if len(images) < len(content["images"]):
        raise UserError(f"{str(path)!r} lists images under one id twice: give the official instances file.")
    column = {category["id"]: i for i, category in enumerate(categories)}
    row = {image: i for i, image in enumerate(images)}
    labels = np.zeros((len(images), len(found)), np.uint8)
    for image, category in instances:
        if image not in row or category not in column:
            what = f"image {image}" if image not in row else f"category {category}"
            raise UserError(
                f"{str(path)!r} annotates {what}, which it does not list: give the official instances file."
            )
        labels[row[image], column[category]] = 1
    return list(images.values()), labels


NAMES = {"coco": coco}
