"""Crop, resize, augment: an RGB Pillow image and a generator -> (size, size, 3) uint8.

`train` and `evaluate` build picklable callables from plain keywords. Values stay uint8: normalisation is the device's
work. Every random choice comes from the generator, so an example is a function of (seed, index).
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageEnhance

from mljax.errors import UserError, nearest
from mljax.pipeline import randaugment
from mljax.pipeline.picture import OPENCV, RESIZE, Box, Picture, crop_and_resize, mirrored, opencv

TRAIN_CROPS = ("squish", "multi_scale", "ssgrl", "random_resized", "center")
EVALUATE_CROPS = ("squish", "center")
RANDAUGMENT = ("none", "package", "paper")
CUTOUT_FILLS = ("random", "mean")
MEAN_COLOUR = (124, 116, 104)  # ImageNet's mean: zero once normalised

_SCALES = (1, 0.875, 0.75, 0.66, 0.5)
_PAIRS = tuple((i, j) for i in range(5) for j in range(5) if abs(i - j) <= 2)  # max_distort 2: 19 of 25
_OFFSETS = (  # in quarters of what the crop leaves free: corners, centre, edge middles, inner quarters
    *((0, 0), (4, 0), (0, 4), (4, 4)),
    (2, 2),
    *((0, 2), (4, 2), (2, 4), (2, 0)),
    *((1, 1), (3, 1), (1, 3), (3, 3)),
)
_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
_SSGRL = {576: (640, (640, 576, 512, 384, 320)), 448: (512, (512, 448, 384, 320, 256))}  # crop -> squish, sides


def train(
    size: int = 448,
    *,
    crop: str = "squish",
    pre_size: int | None = None,
    sides: Sequence[int] | None = None,
    scale: Sequence[float] = (0.08, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    randaugment: str = "none",
    n: int = 2,
    m: float = 9,
    cutout: float = 0.0,
    cutout_prob: float = 1.0,
    cutout_fill: str = "random",
    color_jitter: float = 0.0,
    resize: str = "bilinear",
    scaled: bool = False,
) -> "Train":
    """A training transform `(image, rng) -> (size, size, 3) uint8`.

    Order: crop and resize, cutout, RandAugment, colour jitter, flip. (ASL and its heirs do not flip; where MulCon and
    CDCR flip earlier, the distribution differs only by the package's one-way rotation.)

    Args:
      size: of the result, in pixels.
      crop: "squish", the whole image without keeping its aspect;
        "multi_scale", ML-GCN's crop, see `multi_scale_box`;
        "ssgrl", of SSGRL, SST and C-Tran: squish to `pre_size`, a square of one of `sides` at a uniform place;
        "random_resized", torchvision's RandomResizedCrop, see `random_resized_box`;
        "center", the middle `size` x `size` of the image squished to `pre_size`; without it, the largest square.
      pre_size: side to which the image is squished before the crop. ADD-GCN and TDRG: size + 64; GATN: 512; None: crop
        the original. "ssgrl" by default 640 for 576, 512 for 448, else size * 10 / 9.
      sides: of "ssgrl"; by default the authors' five for 576 and 448, else (1, .9, .8, .6, .5) of `pre_size`.
      scale, ratio: range of area (share of the image) and of width / height, for "random_resized".
      flip: probability of a horizontal flip.
      randaugment: "none", "package" (what the papers' code does) or "paper"; see `mljax.pipeline.randaugment`.
      n, m: operations per image; magnitude in 0..30, 10 the end of the ranges, for "paper".
      cutout: side of the one box, as a share of `size`; ASL 0.5; 0: none. Centre uniform, clipped at borders.
      cutout_prob: of painting it. ASL 1, MulCon 0.5.
      cutout_fill: "random", one random colour, before RandAugment (ASL); "mean", ImageNet's mean, after it, which is
        zero once normalised (MulCon's option: cutout 244 / 448).
      color_jitter: brightness, contrast and saturation are each multiplied by a factor within 1 -+ this, drawn
        uniformly, in an order drawn too, as torchvision's ColorJitter without hue. MCAR: 0.3; 0: none.
      resize: the filter, antialiased where the image shrinks (but for "nearest"), by Pillow: the reference. SST and
        SARB: "bicubic". "antialias" and "fast" need OpenCV; see `mljax.pipeline.picture`.
      scaled: decode a JPEG at a half, quarter or eighth where the crop is still large enough; pixels differ.
    Raises:
      UserError: a value that does not exist or makes no sense, with the nearest that does.
    """
    check_common(size, crop, TRAIN_CROPS, pre_size, resize)
    check_choice("randaugment", randaugment, RANDAUGMENT)
    check_choice("cutout_fill", cutout_fill, CUTOUT_FILLS)
    for name, value in (("flip", flip), ("cutout", cutout), ("cutout_prob", cutout_prob)):
        check_between(name, [value], 0, 1)
    check_between("m", [m], 0, 30)
    check_integer("n", n, 0)
    check_between("color_jitter", [color_jitter], 0, 1)
    check_choice("scaled", scaled, (False, True))
    check_range("scale", scale, 1)
    check_range("ratio", ratio, math.inf)
    if sides is not None and crop != "ssgrl":
        raise UserError(f"The setting sides has no meaning with crop={crop!r}: remove it, or set crop='ssgrl'.")
    if crop == "ssgrl":
        pre_size, sides = ssgrl_sizes(size, pre_size, sides)
    return Train(
        size=size,
        crop=crop,
        pre_size=pre_size,
        sides=tuple(sides or ()),
        scale=(float(scale[0]), float(scale[1])),
        ratio=(float(ratio[0]), float(ratio[1])),
        flip=float(flip),
        randaugment=randaugment,
        n=n,
        m=m,
        cutout=float(cutout),
        cutout_prob=float(cutout_prob),
        cutout_fill=cutout_fill,
        color_jitter=float(color_jitter),
        resize=resize,
        scaled=scaled,
    )


def evaluate(
    size: int = 448,
    *,
    crop: str = "squish",
    pre_size: int | None = None,
    resize: str = "bilinear",
    flip: bool = False,
    scaled: bool = False,
) -> "Evaluate":
    """An evaluation transform `(image, rng) -> (size, size, 3) uint8`; `rng` is ignored and may be left out.

    Args:
      size: of the result, in pixels.
      crop: "squish" (nearly all papers) or "center" (SSGRL and C-Tran: size 576, pre_size 640), as in `train`.
      pre_size: for "center", the side to which the image is squished first; None: the largest square of the original.
      resize, scaled: as in `train`.
      flip: mirror the image: the second view of test-time averaging.
    Raises:
      UserError: as `train`.
    """
    check_common(size, crop, EVALUATE_CROPS, pre_size, resize)
    check_choice("flip", flip, (False, True))
    check_choice("scaled", scaled, (False, True))
    return Evaluate(size=size, crop=crop, pre_size=pre_size, resize=resize, flip=bool(flip), scaled=bool(scaled))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """What `train` builds; the fields are its settings, completed."""

    size: int
    crop: str
    pre_size: int | None
    sides: tuple[int, ...]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: float
    randaugment: str
    n: int
    m: float
    cutout: float
    cutout_prob: float
    cutout_fill: str
    color_jitter: float
    resize: str
    scaled: bool = False
    pictures: ClassVar[bool] = True  # what it is given may be a Picture, not decoded yet

    def __call__(self, image: Image.Image | Picture, rng: np.random.Generator) -> np.ndarray:
        """(h w) RGB image -> (size, size, 3) uint8."""
        picture = image if isinstance(image, Picture) else Picture(image)
        width, height = picture.size if self.pre_size is None else (self.pre_size, self.pre_size)
        box = self.box(width, height, rng)
        found = crop_and_resize(picture, box, self.size, self.resize, pre_size=self.pre_size, scaled=self.scaled)
        cut = self.cutout > 0 and rng.random() < self.cutout_prob
        if cut or self.randaugment != "none" or self.color_jitter:
            found = self._paint(found if isinstance(found, Image.Image) else Image.fromarray(found), cut, rng)
        if rng.random() < self.flip:
            found = mirrored(found)
        return np.asarray(found)

    def _paint(self, image: Image.Image, cut: bool, rng: np.random.Generator) -> Image.Image:
        """Cutout, RandAugment and colour jitter; the image is ours to write into."""
        if cut and self.cutout_fill == "random":
            colour = rng.integers(256, size=3)
            image.paste((int(colour[0]), int(colour[1]), int(colour[2])), cutout_box(self.size, self.cutout, rng))
        if self.randaugment == "package":
            image = randaugment.package(image, rng, n=self.n)
        elif self.randaugment == "paper":
            image = randaugment.paper(image, rng, n=self.n, m=self.m)
        if cut and self.cutout_fill == "mean":
            image.paste(MEAN_COLOUR, cutout_box(self.size, self.cutout, rng))
        for i in rng.permutation(3) if self.color_jitter else ():
            image = _ENHANCERS[i](image).enhance(rng.uniform(1 - self.color_jitter, 1 + self.color_jitter))
        return image

    def box(self, width: int, height: int, rng: np.random.Generator) -> Box:
        """The part of the (squished) image that becomes the result."""
        if self.crop == "multi_scale":
            return multi_scale_box(width, height, self.size, rng)
        if self.crop == "ssgrl":
            side = self.sides[rng.integers(len(self.sides))]
            left, top = (int(v) for v in rng.integers(0, (width - side + 1, height - side + 1)))
            return left, top, left + side, top + side
        if self.crop == "random_resized":
            return random_resized_box(width, height, self.scale, self.ratio, rng)
        return fixed_box(self.crop, width, height, self.size, self.pre_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """What `evaluate` builds; the fields are its settings."""

    size: int
    crop: str
    pre_size: int | None
    resize: str
    flip: bool
    scaled: bool = False
    pictures: ClassVar[bool] = True

    def __call__(self, image: Image.Image | Picture, rng: np.random.Generator | None = None) -> np.ndarray:
        """(h w) RGB image -> (size, size, 3) uint8."""
        del rng
        picture = image if isinstance(image, Picture) else Picture(image)
        width, height = picture.size if self.pre_size is None else (self.pre_size, self.pre_size)
        box = fixed_box(self.crop, width, height, self.size, self.pre_size)
        found = crop_and_resize(picture, box, self.size, self.resize, pre_size=self.pre_size, scaled=self.scaled)
        return np.asarray(mirrored(found) if self.flip else found)


def fixed_box(crop: str, width: int, height: int, size: int, pre_size: int | None) -> Box:
    """The whole image ("squish"), or its middle ("center")."""
    if crop == "squish":
        return 0, 0, width, height
    side = min(width, height) if pre_size is None else size
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def multi_scale_box(width: int, height: int, size: int, rng: np.random.Generator) -> Box:
    """MultiScaleCrop of ML-GCN and its family, with fixed offsets.

    Five sides int(min(width, height) * scale), scale in (1, .875, .75, .66, .5); one within 2 pixels of `size` becomes
    `size`. Width and height are drawn uniformly from the 19 pairs at most two steps apart, the place from 13 offsets
    in quarters of the free space (rounded down).

    Reference: Wang et al., "Temporal Segment Networks", ECCV 2016.
    Differs from the public code: a side is at most that of the image, where theirs may overhang by 2 black pixels,
    and at least 1.
    """
    base = min(width, height)
    sides = [max(1, int(base * scale)) for scale in _SCALES]
    sides = [size if abs(side - size) <= 2 else side for side in sides]
    i, j = _PAIRS[rng.integers(len(_PAIRS))]
    w, h = min(sides[i], width), min(sides[j], height)
    a, b = _OFFSETS[rng.integers(len(_OFFSETS))]
    left, top = a * ((width - w) // 4), b * ((height - h) // 4)
    return left, top, left + w, top + h


def random_resized_box(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> Box:
    """RandomResizedCrop as torchvision has it (its Inception ancestors too).

    Ten times: an area uniform in `scale`, a ratio log-uniform in `ratio`; the first box that fits is placed
    uniformly. If none fits: the middle, as large as `ratio` allows.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w = min(width, max(1, round(height * aspect)))
    h = min(height, max(1, round(width / aspect)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def cutout_box(size: int, share: float, rng: np.random.Generator) -> Box:
    """A box of side int(share * size) around a uniform pixel, clipped at the borders."""
    side = int(share * size)
    x, y = (int(c) - side // 2 for c in rng.integers(size, size=2))
    return max(0, x), max(0, y), min(size, x + side), min(size, y + side)


def ssgrl_sizes(size: int, pre_size: int | None, sides: Sequence[int] | None) -> tuple[int, tuple[int, ...]]:
    """The squish and the crop sides of SSGRL's crop, completed by the authors' where not given."""
    known, known_sides = _SSGRL.get(size, (None, ()))
    pre_size = pre_size or known or round(size * 10 / 9)
    if sides is None:
        own = known_sides if pre_size == known else ()
        sides = own or [max(1, round(pre_size * share)) for share in (1, 0.9, 0.8, 0.6, 0.5)]
    if not len(sides):
        raise UserError("The setting sides is empty: give at least one side in pixels, or remove it.")
    for side in sides:
        check_integer("sides", side, 1)
        if side > pre_size:
            raise UserError(f"The setting sides has {side}, more than pre_size={pre_size}: make it smaller.")
    return pre_size, tuple(sides)


def check_common(size: Any, crop: str, crops: Sequence[str], pre_size: Any, resize: str) -> None:
    check_integer("size", size, 1)
    check_choice("crop", crop, crops)
    check_choice("resize", resize, (*RESIZE, *OPENCV))
    if resize in OPENCV:
        opencv(resize)
    if pre_size is None:
        return
    check_integer("pre_size", pre_size, 1)
    if crop == "squish":
        raise UserError("The setting pre_size has no meaning with crop='squish': remove it, or choose another crop.")
    if crop == "center" and pre_size < size:
        raise UserError(f"The setting pre_size={pre_size} is less than size={size}, which is cut from it: raise it.")


def check_choice(name: str, value: Any, options: Iterable[Any]) -> None:
    options = list(options)
    if value not in options:
        raise UserError(f"The image setting {name}={value!r} does not exist{nearest(str(value), map(str, options))}.")


def check_integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise UserError(f"The image setting {name} must be whole and at least {least}, not {value!r}.")


def check_between(name: str, values: Iterable[Any], low: float, high: float) -> None:
    for value in values:
        if not isinstance(value, int | float) or not low <= value <= high:
            raise UserError(f"The image setting {name} must lie between {low} and {high}, not {value!r}.")


def check_range(name: str, pair: Any, high: float) -> None:
    """Two numbers, 0 < first <= second <= high."""
    numbers = isinstance(pair, Sequence) and all(isinstance(v, int | float) for v in pair)
    if not numbers or len(pair) != 2 or not 0 < pair[0] <= pair[1] <= high:
        bound = "" if math.isinf(high) else f" <= {high}"
        raise UserError(f"The image setting {name} must be two numbers, 0 < low <= high{bound}, not {pair!r}.")
