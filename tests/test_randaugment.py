"""Each operation against numpy on synthetic pictures; which operations and levels are drawn, and how often."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter

from mljax.pipeline import _pixels, randaugment
from mljax.pipeline.randaugment import package, package_apply, paper, paper_apply

LEVELS = range(1, 10)
SIZE = 40


class Always:
    """A generator whose signs are all one way and whose other integers are `place`."""

    def __init__(self, sign, place=0):
        self.sign, self.place = sign, place

    def integers(self, low, high=None, size=None):
        return (self.sign + 1) // 2 if low == 2 else self.place


def noise(seed=0, size=SIZE):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8))


def smooth():
    y, x = np.mgrid[:SIZE, :SIZE]
    return Image.fromarray(np.stack([2 * x + 30, 2 * y + 50, x + y + 40], -1).astype(np.uint8))


def apply(name, image, level, sign=1, place=0):
    return np.asarray(package_apply(name, image, level, Always(sign, place))).astype(int)


def both_signs(test):
    return pytest.mark.parametrize("sign", [-1, 1])(pytest.mark.parametrize("level", LEVELS)(test))


# ---- operations on values


def test_invert():
    np.testing.assert_array_equal(apply("Invert", noise(), 5), 255 - np.asarray(noise()))


@pytest.mark.parametrize(("level", "bits"), list(zip(LEVELS, [8, 7, 7, 6, 6, 5, 5, 4, 4], strict=True)))
def test_posterize(level, bits):
    keep = 256 - 2 ** (8 - bits)
    np.testing.assert_array_equal(apply("Posterize", noise(), level), np.asarray(noise()) & keep)


@pytest.mark.parametrize("level", LEVELS)
def test_solarize(level):
    a, threshold = np.asarray(noise()).astype(int), 256 * (9 - level) / 9
    np.testing.assert_array_equal(apply("Solarize", noise(), level), np.where(a < threshold, a, 255 - a))


def test_autocontrast():
    image = Image.fromarray((np.asarray(noise()) // 3 + np.array([10, 50, 90])).astype(np.uint8))
    a = np.asarray(image).astype(float)
    low, high = a.min((0, 1)), a.max((0, 1))
    assert np.abs(apply("AutoContrast", image, 3) - (a - low) * 255 / (high - low)).max() <= 1


def test_equalize():
    image = Image.fromarray((np.asarray(noise()) // 4 + 20).astype(np.uint8))
    expected = np.empty((SIZE, SIZE, 3), int)
    for c in range(3):
        a = np.asarray(image)[..., c]
        count = np.bincount(a.ravel(), minlength=256)
        step = (a.size - count[count > 0][-1]) // 255
        below = np.cumsum(count) - count
        expected[..., c] = np.minimum((step // 2 + below) // step, 255)[a]
    np.testing.assert_array_equal(apply("Equalize", image, 3), expected)


@both_signs
def test_brightness(level, sign):
    expected = np.clip(np.asarray(noise()) * (1 + sign * level / 10), 0, 255)
    assert np.abs(apply("Brightness", noise(), level, sign) - expected).max() <= 1


@both_signs
def test_color(level, sign):
    a = np.asarray(noise()).astype(float)
    grey = (a @ [0.299, 0.587, 0.114])[..., None]
    expected = np.clip(grey + (a - grey) * (1 + sign * level / 10), 0, 255)
    assert np.abs(apply("Color", noise(), level, sign) - expected).max() <= 2


@both_signs
def test_contrast(level, sign):
    a = np.asarray(noise()).astype(float)
    mean = np.rint((a @ [0.299, 0.587, 0.114]).mean())
    expected = np.clip(mean + (a - mean) * (1 + sign * level / 10), 0, 255)
    assert np.abs(apply("Contrast", noise(), level, sign) - expected).max() <= 2


@both_signs
def test_sharpness(level, sign):
    a = np.asarray(noise()).astype(float)
    blurred = a.copy()  # the frame stays
    windows = [a[1 + y : SIZE - 1 + y, 1 + x : SIZE - 1 + x] for y in (-1, 0, 1) for x in (-1, 0, 1)]
    blurred[1:-1, 1:-1] = (sum(windows) + 4 * a[1:-1, 1:-1]) / 13
    expected = np.clip(blurred + (a - blurred) * (1 + sign * level / 10), 0, 255)
    assert np.abs(apply("Sharpness", noise(), level, sign) - expected).max() <= 2


# ---- operations on places


@both_signs
@pytest.mark.parametrize("name", ["TranslateX", "TranslateY"])
def test_translate(name, level, sign):
    """Nearest pixel; the shift is a share of the side, up to 150 / 331; grey comes in."""
    a = np.asarray(noise()).astype(int)
    source = np.floor(np.arange(SIZE) + 0.5 + sign * SIZE * 150 / 331 * level / 9).astype(int)
    inside = (source >= 0) & (source < SIZE)
    expected = np.full_like(a, 128)
    if name == "TranslateX":
        expected[:, inside] = a[:, source[inside]]
    else:
        expected[inside] = a[source[inside]]
    np.testing.assert_array_equal(apply(name, noise(), level, sign), expected)
    assert not inside.all()


@both_signs
@pytest.mark.parametrize("name", ["ShearX", "ShearY"])
def test_shear(name, level, sign):
    """Row y (from its middle) moves by 0.3 y level / 9; bicubic, which keeps a linear ramp; grey comes in."""
    y, x = np.mgrid[:SIZE, :SIZE]
    slope = sign * 0.3 * level / 9
    sx, sy = (x + slope * (y + 0.5), y) if name == "ShearX" else (x, y + slope * (x + 0.5))
    out = apply(name, smooth(), level, sign)
    moved = sx if name == "ShearX" else sy
    inner = (moved >= 1) & (moved <= SIZE - 3)
    expected = np.stack([2 * sx + 30, 2 * sy + 50, sx + sy + 40], -1)
    assert np.abs(out - expected)[inner].max() <= 1
    outside = (moved < -0.51) | (moved > SIZE - 0.49)
    assert outside.any() and (out[outside] == 128).all()


@pytest.mark.parametrize("level", LEVELS)
def test_rotate_is_always_counter_clockwise(level):
    angle = np.deg2rad(30 * level / 9)
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5 - SIZE / 2
    # Counter-clockwise on a screen whose y points down: the source of (x, y).
    sx = np.floor(np.cos(angle) * x - np.sin(angle) * y + SIZE / 2).astype(int)
    sy = np.floor(np.sin(angle) * x + np.cos(angle) * y + SIZE / 2).astype(int)
    inside = (sx >= 0) & (sx < SIZE) & (sy >= 0) & (sy < SIZE)
    a = np.asarray(noise()).astype(int)
    expected = np.where(inside[..., None], a[sy.clip(0, SIZE - 1), sx.clip(0, SIZE - 1)], 128)
    for sign in (-1, 1):
        out = apply("Rotate", noise(), level, sign)
        assert (out == expected).all(-1).mean() > 0.99  # but for ties of the nearest pixel
    dot = np.zeros((SIZE, SIZE, 3), np.uint8)
    dot[18:22, 34:38] = 255  # on the right
    out = apply("Rotate", Image.fromarray(dot), level)
    assert np.argwhere((out == 255).all(-1))[:, 0].mean() < 19.4  # goes up


@pytest.mark.parametrize(("level", "side"), list(zip(LEVELS, [2, 4, 6, 8, 10, 12, 16, 18, 20], strict=True)))
@pytest.mark.parametrize("place", [0, 15, 39])
def test_package_cutout(level, side, place):
    """The side rounds 20 level / 9, and an odd one loses a pixel (7 -> 6, 9 -> 8, 11 -> 10, 13 -> 12)."""
    a = np.asarray(noise()).astype(int)
    low, high = max(0, place - side // 2), min(SIZE, place + side // 2)
    expected = a.copy()
    expected[low:high, low:high] = (125, 122, 113)
    image = noise()
    np.testing.assert_array_equal(apply("Cutout", image, level, place=place), expected)
    np.testing.assert_array_equal(np.asarray(image), a)  # the argument is not painted


# ---- the same as Pillow


def picture(kind, width, height):
    rng = np.random.default_rng(1)
    if kind == "noise":
        return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    if kind == "flat":
        return Image.new("RGB", (width, height), (100, 200, 255))
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(224, 224), (60, 20), (3, 7), (1, 5), (2, 2)], ids=str)
@pytest.mark.parametrize("kind", ["noise", "photo", "flat"])
def test_shear_is_that_of_pillow(kind, size):
    """But for 1 of 255 at a few pixels; a flat picture to the last bit, and no shear at all too."""
    image = picture(kind, *size)
    for slope in (0.3, 0.1, 1 / 30, 0.0, -0.2, 3.0, -40.0):
        for vertical in (False, True):
            matrix = (1, 0, 0, slope, 1, 0) if vertical else (1, slope, 0, 0, 1, 0)
            expected = image.transform(
                image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=randaugment.GREY
            )
            found = _pixels.shear(image, slope, randaugment.GREY, vertical=vertical)
            difference = np.abs(np.asarray(found).astype(int) - np.asarray(expected))
            assert found.size == image.size and difference.max() <= (0 if kind == "flat" or not slope else 1)
            assert (difference > 0).mean() < 0.01


@pytest.mark.parametrize("size", [(50, 40), (1, 9), (9, 2), (3, 3), (2, 2)], ids=str)
@pytest.mark.parametrize("kind", ["noise", "photo", "flat"])
def test_values_are_those_of_pillow(kind, size):
    image = picture(kind, *size)
    smooth = np.asarray(image.filter(ImageFilter.SMOOTH))
    np.testing.assert_array_equal(np.asarray(_pixels.smooth(image)), smooth)
    for name in ("Brightness", "Contrast", "Sharpness", "Color"):
        for level in (1, 5, 9):
            for sign in (-1, 1):
                expected = getattr(ImageEnhance, name)(image).enhance(1 + sign * level / 10)
                np.testing.assert_array_equal(apply(name, image, level, sign), np.asarray(expected), err_msg=name)


def test_the_benchmark_compares_with_the_same_operations():
    """Those that the benchmark's data set has from Pillow alone, drawn in the same way."""
    path = Path(__file__).parents[1] / "benchmarks" / "input.py"
    spec = importlib.util.spec_from_file_location("input_benchmark", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    for seed in range(60):
        image = picture("photo", 64, 48)
        found = np.asarray(package(image, np.random.default_rng(seed))).astype(int)
        expected = np.asarray(benchmark.randaugment(image, np.random.default_rng(seed))).astype(int)
        assert np.abs(found - expected).max() <= 1, seed


# ---- what is drawn


def test_package_draws(monkeypatch):
    """15 operations and 9 levels, all equally likely, each applied half of the times; two a picture."""
    drawn = []
    monkeypatch.setattr(
        randaugment, "package_apply", lambda name, image, level, rng: drawn.append((name, level)) or image
    )
    rng, image, pictures = np.random.default_rng(0), noise(size=4), 20_000
    twice = 0
    for _ in range(pictures):
        before = len(drawn)
        package(image, rng)
        twice += len(drawn) - before == 2
    assert abs(len(drawn) / pictures - 1) < 0.02 and abs(twice / pictures - 0.25) < 0.015
    names, counts = np.unique([f"{name} {level}" for name, level in drawn], return_counts=True)
    assert len(names) == 15 * 9
    expected = len(drawn) / 135
    assert ((counts - expected) ** 2 / expected).sum() < 134 + 4 * np.sqrt(2 * 134)
    assert {name for name, _ in drawn} == {
        *("Invert", "Cutout", "Sharpness", "AutoContrast", "Posterize", "ShearX", "TranslateX", "TranslateY"),
        *("ShearY", "Rotate", "Equalize", "Contrast", "Color", "Solarize", "Brightness"),
    }
    drawn.clear()
    for _ in range(2000):
        package(image, rng, n=5)
    assert abs(len(drawn) / 2000 - 2.5) < 0.1
    assert package(image, rng, n=0) is image


def test_signs_are_even():
    rng, image = np.random.default_rng(0), noise(size=4)
    darker = [np.asarray(package_apply("Brightness", image, 9, rng)).mean() < 100 for _ in range(1000)]
    assert 420 < sum(darker) < 580


def test_paper_draws(monkeypatch):
    drawn = []
    monkeypatch.setattr(randaugment, "paper_apply", lambda name, image, m, rng: drawn.append((name, m)) or image)
    rng = np.random.default_rng(0)
    for _ in range(7000):
        paper(noise(size=4), rng, n=2, m=6)
    names, counts = np.unique([name for name, _ in drawn], return_counts=True)
    assert len(drawn) == 14000 and {m for _, m in drawn} == {6}
    assert set(names) == {
        *("Identity", "AutoContrast", "Equalize", "Rotate", "Solarize", "Color", "Posterize", "Contrast"),
        *("Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY"),
    }
    assert (np.abs(counts - 1000) < 5 * np.sqrt(1000)).all()


def at(name, m, sign=1, image=None):
    return np.asarray(paper_apply(name, image or noise(), m, Always(sign))).astype(int)


def test_paper_magnitudes():
    a = np.asarray(noise()).astype(int)
    for name in set(randaugment.PAPER) - {"AutoContrast", "Equalize"}:
        np.testing.assert_array_equal(at(name, 0), a, err_msg=name)
    np.testing.assert_array_equal(at("Identity", 10), a)
    np.testing.assert_array_equal(at("Posterize", 10), a & 0xF0)
    np.testing.assert_array_equal(at("Posterize", 5), a & 0xFC)
    np.testing.assert_array_equal(at("Posterize", 30), a & 0x80)
    np.testing.assert_array_equal(at("Solarize", 10), 255 - a)
    np.testing.assert_array_equal(at("Solarize", 5), np.where(a < 128, a, 255 - a))
    assert np.abs(at("Brightness", 10, -1) - a * 0.1).max() <= 1
    assert np.abs(at("Brightness", 5, 1) - np.clip(a * 1.45, 0, 255)).max() <= 1
    assert at("Brightness", 30, -1).max() == 0
    shifted = np.full_like(a, 128)
    shifted[:, : SIZE - 18] = a[:, 18:]  # 150 / 331 of 40 is 18.1
    np.testing.assert_array_equal(at("TranslateX", 10), shifted)
    bright = np.zeros((SIZE, SIZE, 3), np.uint8)
    bright[18:22, 34:38] = 255
    heights = [np.argwhere((at("Rotate", 10, s, Image.fromarray(bright)) == 255).all(-1))[:, 0].mean() for s in (-1, 1)]
    assert abs(heights[0] - 27.5) < 1.5 and abs(heights[1] - 11.5) < 1.5  # 19.5 +- 16 sin 30 degrees
    for m in (3, 9, 14.5, 30):
        for name in randaugment.PAPER:
            assert at(name, m, -1).shape == at(name, m, 1).shape == (SIZE, SIZE, 3)


def test_paper_grows_stronger():
    for name in set(randaugment.PAPER) - {"AutoContrast", "Equalize", "Identity"}:
        image = noise() if name == "Sharpness" else smooth()
        change = [np.abs(at(name, m, -1, image) - np.asarray(image).astype(int)).mean() for m in (0, 4, 10)]
        assert change[0] == 0 and change[1] <= change[2] and change[2] > 0, name
