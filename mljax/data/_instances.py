"""Where things stand in images of VOC, of COCO and of what was packed of them, read when label bias asks for it."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from mljax import untrusted
from mljax.data.source import Instances
from mljax.errors import UserError


@dataclass(frozen=True)
class VocInstances:
    """`instances` of VOC: boxes of Annotations/{id}.xml, difficult ones included; areas are those of the boxes."""

    folder: Path
    ids: Sequence[str]
    classes: tuple[str, ...]

    def __call__(self, index: int) -> Instances:
        path = self.folder / "Annotations" / f"{self.ids[index]}.xml"
        try:
            root = ElementTree.parse(path).getroot()
            size = float(root.findtext("size/width", "")), float(root.findtext("size/height", ""))
            objects = root.findall("object")
            labels = [self.classes.index((item.findtext("name") or "").strip()) for item in objects]
            corners = [
                [float(item.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax")]
                for item in objects
            ]
        except (OSError, ElementTree.ParseError, ValueError) as error:
            raise UserError(
                f"The boxes of {str(path)!r} cannot be read ({error}): unpack the annotations, or use"
                " config.observe.bias='uniform'."
            ) from None
        boxes = np.array(corners, np.float64).reshape(-1, 4)
        boxes[:, 2:] -= boxes[:, :2] - 1  # pixels from xmin to xmax, both included
        return Instances(size, np.array(labels, np.int64), boxes, boxes[:, 2] * boxes[:, 3])


@dataclass(frozen=True)
class CocoInstances:
    """`instances` of COCO: boxes and areas of segments, from the annotations file, which is read at the first call."""

    path: Path
    names: Sequence[str]
    classes: tuple[str, ...]

    @cached_property
    def _table(self) -> dict[str, Instances]:
        content: dict[str, Any] = untrusted.read_json(self.path)
        column = {category["id"]: self.classes.index(category["name"]) for category in content["categories"]}
        found: dict[int, list[dict[str, Any]]] = {}
        for item in content["annotations"]:
            found.setdefault(item["image_id"], []).append(item)
        try:
            return {
                image["file_name"]: Instances(
                    size=(float(image["width"]), float(image["height"])),
                    labels=np.array([column[item["category_id"]] for item in items], np.int64),
                    boxes=np.array([item["bbox"] for item in items], np.float64).reshape(-1, 4),
                    areas=np.array([item["area"] for item in items], np.float64),
                )
                for image in content["images"]
                for items in [found.get(image["id"], [])]
            }
        except KeyError as error:
            raise UserError(
                f"{str(self.path)!r} has instances without {error}: give the official instances file, or use"
                " config.observe.bias='uniform'."
            ) from None

    def __call__(self, index: int) -> Instances:
        return self._table[self.names[index]]


@dataclass(frozen=True)
class PackedInstances:
    """`instances` of a packed split, from the arrays that `stored` gave; sizes are those of the original images."""

    path: Path
    images: int

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        try:
            with np.load(self.path, allow_pickle=False) as file:
                found = {name: file[name] for name in ("sizes", "ends", "labels", "boxes", "areas")}
            things = int(found["ends"][-1]) if self.images else 0
            shapes = [found[name].shape for name in found]
            if shapes != [(self.images, 2), (self.images,), (things,), (things, 4), (things,)]:
                raise ValueError("arrays of other shapes")
        except (OSError, ValueError, KeyError, EOFError, IndexError, BadZipFile) as error:
            raise UserError(
                f"The boxes of {str(self.path)!r} cannot be read ({error}): pack the split again."
            ) from None
        return found

    def __call__(self, index: int) -> Instances:
        found = self._arrays
        rows = slice(int(found["ends"][index - 1]) if index else 0, int(found["ends"][index]))
        width, height = found["sizes"][index]
        return Instances(
            (float(width), float(height)), found["labels"][rows], found["boxes"][rows], found["areas"][rows]
        )


def stored(instances: Callable[[int], Instances], images: int) -> dict[str, np.ndarray]:
    """The instances of a split as a few arrays, those of image i in rows ends[i - 1] to ends[i]."""
    every = [instances(index) for index in range(images)]
    return {
        "sizes": np.array([one.size for one in every], np.float64).reshape(-1, 2),
        "ends": np.cumsum([len(one.labels) for one in every], dtype=np.int64),
        "labels": np.concatenate([one.labels for one in every] or [np.zeros(0)]).astype(np.int64),
        "boxes": np.concatenate([one.boxes for one in every] or [np.zeros((0, 4))]).astype(np.float64),
        "areas": np.concatenate([one.areas for one in every] or [np.zeros(0)]).astype(np.float64),
    }
