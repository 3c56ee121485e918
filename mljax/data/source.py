"""A split of a data set: its labels as arrays, its images on demand."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mljax.errors import UserError
from mljax.untrusted import MAX_IMAGE, read_regular
from mljax.waiting import bounded


class Instances(NamedTuple):
    """What stands where in an image, m instances."""

    size: tuple[float, float]  # w, h of the image
    labels: np.ndarray  # (m) int, columns of the classes
    boxes: np.ndarray  # (m 4) float64: x, y, w, h
    areas: np.ndarray  # (m) float64, of what is seen, or of the boxes


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """One split: `len(source)` examples, `source[i]` a record.

    Attributes:
      name: what results call it, e.g. "VOC2007 re-split test".
      classes: the l class names, in label order.
      ids: N names of images, for people and lists.
      labels: (N l) uint8 in {0, 1}.
      observed: (N l) uint8 in {0, 1}: 1 where training may know the label.
      scored: (N l) uint8 in {0, 1}: 1 where average precision counts the entry.
      read: index -> encoded bytes, or a decoded (h w 3) uint8 array; picklable.
      fingerprint: changes when ids, labels or image files change.
      base, indices: of a subset: the split it is taken from, and which of its examples.
      instances: index -> where things stand, of data sets that know; None: unknown.
      every: all classes of the data set, in its order, where `classes` are some of them; empty: `classes` are all.
    """

    name: str
    classes: tuple[str, ...]
    ids: Sequence[str]
    labels: np.ndarray
    observed: np.ndarray
    scored: np.ndarray
    read: Callable[[int], bytes | np.ndarray]
    fingerprint: str
    base: "Source | None" = None
    indices: np.ndarray | None = None
    instances: Callable[[int], Instances] | None = None
    every: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = int(index)
        return {
            "image": self.read(index),
            "labels": self.labels[index],
            "observed": self.observed[index],
            "index": np.int32(index),
        }

    def subset(self, indices: np.ndarray, suffix: str) -> "Source":
        """The examples at `indices`, in that order."""
        indices = np.asarray(indices)
        return dataclasses.replace(
            self,
            name=self.name + suffix,
            ids=[self.ids[i] for i in indices],
            labels=self.labels[indices],
            observed=self.observed[indices],
            scored=self.scored[indices],
            read=Picked(self.read, indices),
            fingerprint=f"{self.fingerprint}{suffix}",
            base=self.base or self,
            indices=indices if self.indices is None else self.indices[indices],
            instances=None if self.instances is None else Picked(self.instances, indices),
        )


def checked(source: Source) -> Source:
    """The same source, whose labels are what the rest relies on.

    Raises:
      UserError: labels of a shape other than (N l), whole numbers other than 0 and 1, or soft labels outside [0, 1];
        the sentence has the first row.
    """
    shape = (len(source.ids), len(source.classes))
    for kind in ("labels", "observed", "scored"):
        array = np.asarray(getattr(source, kind))
        if array.shape != shape:
            raise UserError(f"{source.name} has {kind} of shape {array.shape}; expected {shape}, images and classes.")
        soft = array.dtype.kind == "f"
        if not array.size or array.dtype.kind == "b" or (array.min() >= 0 and array.max() <= 1):  # NaN is neither
            continue
        row, column = np.argwhere(~((array >= 0) & (array <= 1)))[0]
        raise UserError(
            f"{source.name} has {kind} {array[row, column]} for {source.classes[column]!r} in row {row}"
            f" ({str(source.ids[row])!r}); expected {'0 to 1' if soft else '0 or 1'}."
        )
    return source


@dataclasses.dataclass(frozen=True)
class Picked:
    """`read` or `instances` of a subset."""

    read: Callable[[int], Any]
    indices: np.ndarray

    def __call__(self, index: int) -> Any:
        return self.read(int(self.indices[index]))


@dataclasses.dataclass(frozen=True)
class Files:
    """`read` of images that are files: regular ones, up to a size limit; anything else is an OSError at once.

    One that never answers, of a dead mount, is a `waiting.Stalled`."""

    paths: Sequence[str]

    def __call__(self, index: int) -> bytes:
        path = self.paths[index]
        return bounded(lambda: read_regular(path, MAX_IMAGE), path)
