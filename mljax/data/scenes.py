"""`scenes`: an embedded data set of drawn pictures, twenty kinds of things in eight places. Nothing to download.

A picture is a function of (seed, split, index). Its place (kitchen, street, farm, ..) decides which kinds are
likely, some kinds bring others along, and now and then a stranger comes in. Things vary in build, colour,
pattern, pose, size (some are 8 to 12 of 128 pixels), hide each other and stand among clutter that is no label;
light, grain and background vary, and the background hints at the place only weakly. Kinds of one family look alike
when they are small (ball, clock, sign; cow, sheep; umbrella, lamp), so that what else is in the picture helps.

VERSION names this world. Pictures and labels of a version do not change: a change is a new version.
"""

import dataclasses
import hashlib
import math
from collections.abc import Sequence

import numpy as np

from mljax.data.source import Instances, Source
from mljax.errors import UserError, nearest
from mljax.scenes.layout import CANVAS, MOST_KINDS, Layout, layout
from mljax.scenes.paint import paint
from mljax.scenes.table import CLASSES, KINDS, PARTNERS, SCENES, Scene

VERSION = 1
VECTOR_WIDTH = 32
POLICIES = ("V2", "V4")
__all__ = ["CLASSES", "MOST_KINDS", "NAMES", "SCENES", "VECTORS", "VERSION", "Drawn", "label_vectors", "scenes"]


def scenes(
    split: str,
    *,
    size: int = 128,
    train_images: int = 2000,
    val_images: int = 500,
    test_images: int = 1000,
    seed: int = 0,
    clutter: float = 1.0,
    strangers: float = 0.25,
    difficult: str = "V2",
) -> Source:
    """One split of the drawn scenes.

    A kind is a label if at least a quarter of the silhouette of one of its instances is visible, and of that about
    as much as 6 x 6 of 128 x 128 pixels. Kinds that are drawn, but of which less is visible, are negative.
    Pictures have 1 to 7 labels, about 3 on average.

    Args:
      split: "train", "val" or "test"; no two share a picture.
      size: side of the picture in pixels, 48 to 512. Labels and what is drawn do not depend on it.
      train_images, val_images, test_images: how many; a larger split begins with the pictures of a smaller one.
      seed: another seed is another world of pictures of the same kinds and places; 0 to 2^63 - 1.
      clutter: how much there is of what is no label, 0 to 3.
      strangers: share of pictures with a kind that does not belong to the place, 0 to 1.
      difficult: "V2": kinds that are almost hidden are negative; "V4": and average precision leaves them out (the
        names that VOC's policies have, see `mljax.data.voc`).
    Returns:
      The split: `read` draws (size size 3) uint8; `observed` is all ones.
    Raises:
      UserError: no such split or policy, or a setting out of its range.
    """
    counts = {"train": train_images, "val": val_images, "test": test_images}
    if split not in counts:
        raise UserError(f"scenes has no split {split!r}{nearest(split, counts)}.")
    if difficult not in POLICIES:
        raise UserError(f"scenes has no policy difficult={difficult!r}: use one of {', '.join(POLICIES)}.")
    number = _whole(f"{split}_images", counts[split], 1, 10_000_000)
    drawn = Drawn(
        split=split,
        size=_whole("size", size, 48, 512),
        seed=_whole("seed", seed, 0, 2**63 - 1),
        clutter=_real("clutter", clutter, 0, 3),
        strangers=_real("strangers", strangers, 0, 1),
    )
    labels, present = drawn.labels(number)
    digest = hashlib.sha256(labels.tobytes()).hexdigest()[:16]
    settings = " ".join(f"{key}={value}" for key, value in dataclasses.asdict(drawn).items())
    return Source(
        name=f"scenes {split}",
        classes=CLASSES,
        ids=[f"{split}-{i:06d}" for i in range(number)],
        labels=labels,
        observed=np.ones_like(labels),
        scored=np.ones_like(labels) if difficult == "V2" else (labels | (1 - present)),
        read=drawn,
        instances=drawn.instances,
        fingerprint=f"scenes-{VERSION} {settings} n={number} {digest}",
    )


def _whole(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise UserError(f"scenes: {name} is {value!r}; give a whole number from {low} to {high}.")
    return int(value)


def _real(name: str, value: object, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise UserError(f"scenes: {name} is {value!r}; give a number from {low} to {high}.")
    return float(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """`read` of scenes: index -> (size size 3) uint8, drawn anew each time, the same each time."""

    split: str
    size: int
    seed: int
    clutter: float
    strangers: float

    def layout(self, index: int) -> Layout:
        """What stands where in picture `index`, boxes and visibility included."""
        return layout(self.seed, self.split, int(index), clutter=self.clutter, strangers=self.strangers)

    def __call__(self, index: int) -> np.ndarray:
        return paint(self.layout(index), self.size)

    def instances(self, index: int) -> Instances:
        """Where the kinds of picture `index` stand that are labels; areas count what is visible, in 1/128 of a side."""
        found = self.layout(index)
        things = [t for t in found.things if t.kind >= 0 and t.visible and found.labels >> t.kind & 1]
        corners = np.array([t.box for t in things], np.float64).reshape(-1, 4) / CANVAS * self.size
        return Instances(
            size=(self.size, self.size),
            labels=np.array([t.kind for t in things], np.int64),
            boxes=np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1),
            areas=np.array([t.visible for t in things], np.float64),
        )

    def labels(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the first `number` pictures, without drawing them: labels, and what is drawn at all; (N l) uint8."""
        layouts = [self.layout(i) for i in range(number)]
        return _bits([x.labels for x in layouts]), _bits([x.present for x in layouts])


def _bits(masks: Sequence[int]) -> np.ndarray:
    return (np.array(masks, np.int64)[:, None] >> np.arange(len(CLASSES))[None] & 1).astype(np.uint8)


def chances(scene: Scene) -> np.ndarray:
    """(l) float64: how likely each kind is chosen in a place, partners included, strangers and hiding not."""
    result = np.zeros(len(CLASSES))
    for i, name in enumerate(CLASSES):
        share = scene.likely.get(name, 0) / 100
        partner, up, down = PARTNERS.get(name, ("", 100, 100))
        if partner in scene.likely:
            beside = result[CLASSES.index(partner)]
            share *= (up * beside + down * (1 - beside)) / 100
        result[i] = share
    return result


def label_vectors() -> np.ndarray:
    """Vectors for the kinds, as word vectors would be: cosines tell which belong together, but not exactly.

    A kind is described by how its appearances spread over the places (the square root of the shares), by its
    family, and by noise of its own; the description is turned into 32 coordinates by a Hadamard matrix.

    Returns:
      (20 32) float32 of about unit length, the same on every machine (multiples of 1/4096).
    """
    spread = np.stack([chances(scene) * scene.share for scene in SCENES], 1)  # (l places)
    spread = np.sqrt(spread / spread.sum(1, keepdims=True))
    families = sorted({kind.family for kind in KINDS})
    family = np.array([[kind.family == name for name in families] for kind in KINDS], np.float64)
    bits = np.random.Philox(key=np.array([VERSION, 2**32], np.uint64)).random_raw(len(CLASSES) * VECTOR_WIDTH * 4)
    # Four uniform numbers add up to nearly a normal one.
    noise = (bits >> np.uint64(11)).reshape(len(CLASSES), VECTOR_WIDTH, 4) * 2.0**-53
    noise = (noise.sum(2) - 2.0) * math.sqrt(3.0 / VECTOR_WIDTH)
    hadamard = np.ones((1, 1))
    while len(hadamard) < VECTOR_WIDTH:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    described = np.concatenate([spread, 0.45 * family], 1)
    turned = (described[:, :, None] * hadamard[None, : described.shape[1]]).sum(1) / math.sqrt(VECTOR_WIDTH)
    vectors = turned + 0.4 * noise
    vectors /= np.sqrt((vectors * vectors).sum(1, keepdims=True))
    return (np.round(vectors * 4096) / 4096).astype(np.float32)


VECTORS = label_vectors
NAMES = {"scenes": scenes}
