"""The two augmentations called RandAugment: of the Python package that the papers' code uses, and of the paper.

Both take an RGB image and a generator, from which every random choice comes.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageChops, ImageEnhance, ImageOps

from mljax.pipeline import _pixels

Operation = Callable[[Image.Image, float, int], Image.Image]  # (image, magnitude, sign -1 or 1) -> image

GREY = (128, 128, 128)  # where shear, translation and rotation find no pixel
CUTOUT_colour = (125, 122, 113)


def package(image: Image.Image, rng: np.random.Generator, *, n: int = 2) -> Image.Image:
    """RandAugment as the package `randaugment` 1.0.2 has it (ASL, Query2Label, MulCon, ..).

    `n` operations are drawn uniformly with replacement from the 15 of PACKAGE, each with a level drawn uniformly from
    1..9, and each is applied with probability 0.5. The level indexes ten equal steps of the operation's range.

    Differs from the package: the source of randomness; for the same choices the pixels are the same, but for 1 of 255
    at a few of a sheared image (see `mljax.pipeline._pixels`).
    """
    for _ in range(n):
        name = PACKAGE_NAMES[rng.integers(len(PACKAGE_NAMES))]
        level = int(rng.integers(1, 10))
        if rng.random() < 0.5:
            image = package_apply(name, image, level, rng)
    return image


def package_apply(name: str, image: Image.Image, level: int, rng: np.random.Generator) -> Image.Image:
    """One operation of the package at a level 0..9; `rng` gives the sign or the place."""
    if name == "Cutout":
        return _cutout(image, int(PACKAGE_CUTOUT[level]), rng)
    operation, magnitudes = PACKAGE[name]
    return operation(image, float(magnitudes[level]), _sign(rng))


def paper(image: Image.Image, rng: np.random.Generator, *, n: int = 2, m: float = 9) -> Image.Image:
    """RandAugment as its paper defines it: `n` of 14 operations, uniform with replacement, all at magnitude `m`.

    The magnitude runs linearly from 0 (nothing happens, but for AutoContrast and Equalize) to 10 (the end of
    AutoAugment's range: shear 0.3, translation 150/331 of the side, 30 degrees, 4 bits, threshold 0, enhancement
    factor 1 +- 0.9); beyond 10, up to 30 as in the paper's larger nets, the same line goes on. Signs are random.

    Reference: Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced search space",
    NeurIPS 2020, figure 2.
    Differs from the authors' code: every operation grows stronger with m, as the text says; their posterize and
    solarize grow weaker, and their enhancement factors run from 0.1 to 1.9 without a sign.
    """
    for _ in range(n):
        name = PAPER_NAMES[rng.integers(len(PAPER_NAMES))]
        image = paper_apply(name, image, m, rng)
    return image


def paper_apply(name: str, image: Image.Image, m: float, rng: np.random.Generator) -> Image.Image:
    """One operation of the paper at magnitude m; `rng` gives the sign."""
    operation, start, end = PAPER[name]
    return operation(image, start + (end - start) * m / 10, _sign(rng))


def _sign(rng: np.random.Generator) -> int:
    return 2 * int(rng.integers(2)) - 1


def _cutout(image: Image.Image, side: int, rng: np.random.Generator) -> Image.Image:
    """A box around a uniform pixel, clipped; as in the package its half is rounded down, so an odd side loses 1."""
    width, height = image.size
    x, y, half = int(rng.integers(width)), int(rng.integers(height)), side // 2
    image = image.copy()
    image.paste(CUTOUT_colour, (max(0, x - half), max(0, y - half), min(width, x + half), min(height, y + half)))
    return image


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=GREY)


def _shear(*, vertical: bool, bicubic: bool) -> Operation:
    def shear(image: Image.Image, magnitude: float, sign: int) -> Image.Image:
        slope = sign * magnitude
        if bicubic:
            return _pixels.shear(image, slope, GREY, vertical=vertical)
        return _affine(image, (1, 0, 0, slope, 1, 0) if vertical else (1, slope, 0, 0, 1, 0))

    return shear


def _translate(*, vertical: bool) -> Operation:
    def translate(image: Image.Image, magnitude: float, sign: int) -> Image.Image:
        shift = sign * magnitude * image.size[vertical]
        matrix = (1, 0, 0, 0, 1, shift) if vertical else (1, 0, shift, 0, 1, 0)
        return _affine(image, matrix)

    return translate


def _rotate(image: Image.Image, degrees: float, sign: int) -> Image.Image:
    del sign  # the package rotates one way only (counter-clockwise)
    return image.rotate(degrees, fillcolor=GREY)


def _factor(magnitude: float, sign: int) -> float:
    return max(0.0, 1 + sign * magnitude)


def _colour(image: Image.Image, magnitude: float, sign: int) -> Image.Image:
    return ImageEnhance.Color(image).enhance(_factor(magnitude, sign))


def _contrast(image: Image.Image, magnitude: float, sign: int) -> Image.Image:
    """`ImageEnhance.Contrast`: away from, or towards, the mean of the grey image."""
    counts = np.array(image.convert("L").histogram())
    mean = int(counts @ np.arange(256) / counts.sum() + 0.5)
    return image.point(_pixels.blended(mean, _factor(magnitude, sign)) * 3)


def _brightness(image: Image.Image, magnitude: float, sign: int) -> Image.Image:
    """`ImageEnhance.Brightness`."""
    return image.point(_pixels.blended(0, _factor(magnitude, sign)) * 3)


def _sharpness(image: Image.Image, magnitude: float, sign: int) -> Image.Image:
    """`ImageEnhance.Sharpness`."""
    return Image.blend(_pixels.smooth(image), image, _factor(magnitude, sign))


def _posterize(image: Image.Image, bits: float, sign: int) -> Image.Image:
    return ImageOps.posterize(image, max(1, round(bits)))


def _solarize(image: Image.Image, threshold: float, sign: int) -> Image.Image:
    return ImageOps.solarize(image, max(0.0, threshold))  # pyright: ignore[reportArgumentType]  (floats work)


def _ten(start: float, end: float) -> np.ndarray:
    return np.linspace(start, end, 10)


_SHEAR, _SHIFT = 0.3, 150 / 331

PACKAGE_CUTOUT = np.round(_ten(0, 20)).astype(int)  # side in pixels, whatever the size of the image
PACKAGE: dict[str, tuple[Operation, np.ndarray]] = {
    "Invert": (lambda image, *_: ImageChops.invert(image), _ten(0, 0)),
    "Sharpness": (_sharpness, _ten(0, 0.9)),
    "AutoContrast": (lambda image, *_: ImageOps.autocontrast(image), _ten(0, 0)),
    "Posterize": (_posterize, np.round(_ten(8, 4))),
    "ShearX": (_shear(vertical=False, bicubic=True), _ten(0, _SHEAR)),
    "TranslateX": (_translate(vertical=False), _ten(0, _SHIFT)),
    "TranslateY": (_translate(vertical=True), _ten(0, _SHIFT)),
    "ShearY": (_shear(vertical=True, bicubic=True), _ten(0, _SHEAR)),
    "Rotate": (_rotate, _ten(0, 30)),
    "Equalize": (lambda image, *_: ImageOps.equalize(image), _ten(0, 0)),
    "Contrast": (_contrast, _ten(0, 0.9)),
    "Color": (_colour, _ten(0, 0.9)),
    "Solarize": (_solarize, _ten(256, 0)),
    "Brightness": (_brightness, _ten(0, 0.9)),
}
PACKAGE_NAMES = ("Cutout", *PACKAGE)

PAPER: dict[str, tuple[Operation, float, float]] = {  # operation, its magnitude at m = 0 and at m = 10
    "Identity": (lambda image, *_: image, 0, 0),
    "AutoContrast": (lambda image, *_: ImageOps.autocontrast(image), 0, 0),
    "Equalize": (lambda image, *_: ImageOps.equalize(image), 0, 0),
    "Rotate": (lambda image, degrees, sign: _rotate(image, sign * degrees, 1), 0, 30),
    "Solarize": (_solarize, 256, 0),
    "Color": (_colour, 0, 0.9),
    "Posterize": (_posterize, 8, 4),
    "Contrast": (_contrast, 0, 0.9),
    "Brightness": (_brightness, 0, 0.9),
    "Sharpness": (_sharpness, 0, 0.9),
    "ShearX": (_shear(vertical=False, bicubic=False), 0, _SHEAR),
    "ShearY": (_shear(vertical=True, bicubic=False), 0, _SHEAR),
    "TranslateX": (_translate(vertical=False), 0, _SHIFT),
    "TranslateY": (_translate(vertical=True), 0, _SHIFT),
}
PAPER_NAMES = tuple(PAPER)
