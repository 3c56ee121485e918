"""Crops, cutout and flip against rules worked out here; the result is always (size, size, 3) uint8."""

import itertools
import math
import pickle
import random

import numpy as np
import pytest
from PIL import Image

from mljax.errors import UserError
from mljax.pipeline import randaugment, transforms
from mljax.pipeline.transforms import evaluate, train

CROPS = ("squish", "multi_scale", "ssgrl", "random_resized", "center")


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def boxes(transform, width, height, draws, seed=0):
    rng = np.random.default_rng(seed)
    return np.array([transform.box(width, height, rng) for _ in range(draws)])


def uniform_distance(values):
    """Kolmogorov-Smirnov distance of values in [0, 1] from the uniform distribution."""
    return np.abs(np.sort(values) - (np.arange(len(values)) + 0.5) / len(values)).max()


# ---- what always holds


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 2), (40, 30)], ids=str)
@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("augment", ["package", "paper"])
def test_shape(size, crop, augment):
    image = noise(*size)
    pre_sizes = [None] if crop == "squish" else [None, 33]
    for pre_size, seed in itertools.product(pre_sizes, range(4)):
        sides = (33, 20, 1) if crop == "ssgrl" and pre_size else None
        transform = train(24, crop=crop, pre_size=pre_size, sides=sides, randaugment=augment, cutout=0.5)
        out = transform(image, np.random.default_rng(seed))
        assert out.shape == (24, 24, 3) and out.dtype == np.uint8 and out.flags.c_contiguous
        if crop in ("squish", "center"):
            out = evaluate(24, crop=crop, pre_size=pre_size)(image)
            assert out.shape == (24, 24, 3) and out.dtype == np.uint8


@pytest.mark.parametrize("crop", CROPS)
def test_everything_random_comes_from_the_generator(crop):
    image = noise(50, 40)
    before = image.tobytes()
    transform = train(32, crop=crop, randaugment="package", cutout=0.5)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    states = random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = [transform(image, np.random.default_rng(seed)) for seed in range(6)]
    assert random.getstate() == states[0]
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    copy = pickle.loads(pickle.dumps(transform))
    assert copy == transform and hash(copy) == hash(transform)
    again = [copy(image, np.random.default_rng(seed)) for seed in range(6)]
    np.testing.assert_array_equal(first, again)
    assert len({out.tobytes() for out in first}) > 3
    assert image.tobytes() == before  # the picture itself stays as it was


# ---- squish, centre, flip


@pytest.mark.parametrize("name", transforms.RESIZE)
def test_squish_is_pillows_resize(name):
    image = noise(41, 67)
    expected = np.asarray(image.resize((24, 24), getattr(Image.Resampling, name.upper())))
    np.testing.assert_array_equal(evaluate(24, resize=name)(image), expected)
    out = train(24, resize=name, flip=0)(image, np.random.default_rng(0))
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(evaluate(24, resize=name, flip=True)(image, None), expected[:, ::-1])


def test_bilinear_squish_by_hand():
    """Twice as large: weights 3/4 and 1/4 of the two nearest; at half the size: a triangle over four pixels."""
    ramp = np.repeat(np.repeat(np.array([[0, 80]], np.uint8), 2, 0)[..., None], 3, 2)
    out = evaluate(4)(Image.fromarray(ramp))
    np.testing.assert_array_equal(out[0, :, 0], [0, 20, 60, 80])
    line = np.array([0, 0, 160, 0, 0, 0, 0, 0], np.uint8)
    picture = Image.fromarray(np.repeat(np.repeat(line[None], 8, 0)[..., None], 3, 2))
    # Result pixel i has its centre at 2i + 1; the triangle reaches 2 pixels: weights 1 3 3 1, fewer at an edge.
    np.testing.assert_array_equal(evaluate(4)(picture)[0, :, 0], [round(160 / 7), 60, 0, 0])


def test_center():
    image = noise(30, 21)
    array = np.asarray(image)
    np.testing.assert_array_equal(evaluate(21, crop="center")(image), array[:, 4:25])
    small = np.asarray(Image.fromarray(array).resize((10, 10), Image.Resampling.BILINEAR, box=(4, 0, 25, 21)))
    np.testing.assert_array_equal(evaluate(10, crop="center")(image), small)
    squished = np.asarray(image.resize((20, 20), Image.Resampling.BICUBIC))
    out = evaluate(16, crop="center", pre_size=20, resize="bicubic")(image)
    np.testing.assert_array_equal(out, squished[2:18, 2:18])
    out = train(16, crop="center", pre_size=20, resize="bicubic", flip=1)(image, np.random.default_rng(0))
    np.testing.assert_array_equal(out, squished[2:18, 2:18][:, ::-1])


@pytest.mark.parametrize("flip", [0.0, 0.3, 0.5, 1.0])
def test_flip_probability(flip):
    image = noise(8, 8)
    plain, mirrored = np.asarray(image), np.asarray(image)[:, ::-1]
    rng, flips = np.random.default_rng(0), 0
    for _ in range(2000):
        out = train(8, flip=flip)(image, rng)
        flips += (out == mirrored).all()
        assert (out == mirrored).all() or (out == plain).all()
    assert abs(flips / 2000 - flip) < 4 * math.sqrt(flip * (1 - flip) / 2000) + 1e-9


# ---- MultiScaleCrop


def multi_scale_rule(width, height, size):
    """Every box of the rule with how many of the 19 * 13 equally likely draws give it."""
    base, counts = min(width, height), {}
    sides = [int(base * s) for s in (1, 0.875, 0.75, 0.66, 0.5)]
    sides = [size if -2 <= side - size <= 2 else side for side in sides]
    pairs = [(w, h) for (i, w), (j, h) in itertools.product(enumerate(sides), repeat=2) if abs(i - j) <= 2]
    assert len(pairs) == 19
    for w, h in pairs:
        w, h = min(w, width), min(h, height)
        wq, hq = (width - w) // 4, (height - h) // 4
        corners = [(0, 0), (4 * wq, 0), (0, 4 * hq), (4 * wq, 4 * hq)]
        middles = [(2 * wq, 2 * hq), (0, 2 * hq), (4 * wq, 2 * hq), (2 * wq, 4 * hq), (2 * wq, 0)]
        inner = [(wq, hq), (3 * wq, hq), (wq, 3 * hq), (3 * wq, 3 * hq)]
        for x, y in corners + middles + inner:
            box = x, y, x + w, y + h
            counts[box] = counts.get(box, 0) + 1
    assert sum(counts.values()) == 19 * 13
    return counts


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [
        (500, 375, 448),  # nothing near the target
        (500, 450, 448),  # 450 snaps down
        (640, 446, 448),  # 446 would snap above the image: stays
        (600, 511, 448),  # int(511 * .875) = 447 snaps
        (512, 512, 448),  # 448 itself
        (300, 513, 259),  # 256 and 262 are 3 away: no snapping
        (20, 90, 12),
    ],
)
def test_multi_scale_boxes(width, height, size):
    rule = multi_scale_rule(width, height, size)
    draws = 20_000
    found = boxes(train(size, crop="multi_scale"), width, height, draws)
    tuples, counts = np.unique(found, axis=0, return_counts=True)
    assert {tuple(box) for box in tuples.tolist()} == set(rule)
    expected = np.array([rule[tuple(box)] for box in tuples.tolist()]) * draws / 247
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)
    assert (found[:, 2] <= width).all() and (found[:, 3] <= height).all() and (found[:, :2] >= 0).all()


def test_multi_scale_fixed_values():
    rule = multi_scale_rule(500, 375, 448)
    sides = {box[2] - box[0] for box in rule}
    assert sides == {375, 328, 281, 247, 187}
    assert (0, 0, 375, 375) in rule and (31, 0, 406, 375) in rule  # (500 - 375) // 4 = 31
    assert not any(b[2] - b[0] == 375 and b[3] - b[1] == 187 for b in rule)  # four steps apart


@pytest.mark.parametrize("pre_size", [None, 40])
def test_multi_scale_pixels(pre_size):
    image = noise(61, 47)
    base = image if pre_size is None else image.resize((pre_size, pre_size), Image.Resampling.BILINEAR)
    possible = {
        np.asarray(base.resize((32, 32), Image.Resampling.BILINEAR, box=box)).tobytes()
        for box in multi_scale_rule(*base.size, 32)
    }
    transform = train(32, crop="multi_scale", pre_size=pre_size, flip=0)
    rng = np.random.default_rng(0)
    found = {transform(image, rng).tobytes() for _ in range(150)}
    assert found <= possible and len(found) > 60


# ---- the crop of SSGRL, SST, C-Tran


@pytest.mark.parametrize(
    ("settings", "pre_size", "sides"),
    [
        ({"size": 576}, 640, (640, 576, 512, 384, 320)),
        ({"size": 448}, 512, (512, 448, 384, 320, 256)),
        ({"size": 576, "sides": [640, 576, 512, 448, 384, 320]}, 640, (640, 576, 512, 448, 384, 320)),
        ({"size": 448, "pre_size": 640}, 640, (640, 576, 512, 384, 320)),
        ({"size": 90}, 100, (100, 90, 80, 60, 50)),
    ],
    ids=str,
)
def test_ssgrl(settings, pre_size, sides):
    transform = train(crop="ssgrl", **settings)
    assert transform.pre_size == pre_size
    found = boxes(transform, pre_size, pre_size, 6000)
    side = found[:, 2] - found[:, 0]
    np.testing.assert_array_equal(side, found[:, 3] - found[:, 1])
    values, counts = np.unique(side, return_counts=True)
    assert sorted(values) == sorted(sides)
    assert (np.abs(counts / 6000 - 1 / len(sides)) < 0.025).all()
    for value in sides:
        for axis in (0, 1):
            start = found[side == value, axis]
            assert start.min() >= 0 and start.max() <= pre_size - value
            if value < pre_size:
                assert uniform_distance((start + 0.5) / (pre_size - value + 1)) < 0.07


def test_ssgrl_pixels():
    image = noise(31, 55)
    squished = image.resize((20, 20), Image.Resampling.BICUBIC)
    transform = train(18, crop="ssgrl", pre_size=20, sides=(18,), resize="bicubic", flip=0)
    windows = {np.asarray(squished)[y : y + 18, x : x + 18].tobytes() for x in range(3) for y in range(3)}
    rng = np.random.default_rng(0)
    assert {transform(image, rng).tobytes() for _ in range(120)} == windows


# ---- random resized crop


def test_random_resized_distribution():
    width, height = 1200, 1000  # every box of these ranges fits at the first try
    found = boxes(train(224, crop="random_resized", scale=(0.08, 0.5)), width, height, 4000)
    w, h = found[:, 2] - found[:, 0], found[:, 3] - found[:, 1]
    area, aspect = w * h / (width * height), w / h
    assert uniform_distance((area - 0.08) / 0.42) < 0.03
    assert uniform_distance((np.log(aspect) - math.log(3 / 4)) / (2 * math.log(4 / 3))) < 0.03
    assert uniform_distance((found[:, 0] + 0.5) / (width - w + 1)) < 0.03
    assert uniform_distance((found[:, 1] + 0.5) / (height - h + 1)) < 0.03


def test_random_resized_rejects_what_does_not_fit():
    found = boxes(train(224, crop="random_resized", scale=(0.08, 1.0)), 500, 375, 4000)
    w, h = found[:, 2] - found[:, 0], found[:, 3] - found[:, 1]
    assert (found[:, :2] >= 0).all() and (found[:, 2] <= 500).all() and (found[:, 3] <= 375).all()
    assert 0.07 < (w * h).min() / 187500 < 0.1 and (w * h).max() / 187500 > 0.95
    assert (w / h).min() > 0.74 and (w / h).max() < 1.35


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (1000, 100, (433, 0, 566, 100)),  # too wide: width 100 * 4/3
        (90, 1000, (0, 440, 90, 560)),  # too high: height 90 / (3/4)
        (5000, 1, (2499, 0, 2500, 1)),
        (1, 5000, (0, 2499, 1, 2500)),
    ],
)
def test_random_resized_fallback(width, height, expected):
    """With the full area no ratio fits so long a picture: the middle part is taken."""
    found = boxes(train(224, crop="random_resized", scale=(1.0, 1.0)), width, height, 20)
    np.testing.assert_array_equal(found, [expected] * 20)


def test_random_resized_ten_tries():
    """On a square with the full area only ratio 1 fits; here a try fits with probability about 1/2."""
    transform = train(8, crop="random_resized", scale=(0.75, 0.75), ratio=(0.5, 2.0))
    found = boxes(transform, 100, 100, 4000)
    # |log ratio| <= log(1 / .75) fits: a share of .415 of the range; after 10 failures (0.5 %) the whole image.
    share = math.log(1 / 0.75) / math.log(2)
    whole = (found == (0, 0, 100, 100)).all(1).mean()
    assert abs(whole - (1 - share) ** 10) < 0.004


# ---- cutout


def painted(out, background):
    """The box that differs from a flat background, and its one colour."""
    mask = (out != background).any(-1)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    inside = out[box[1] : box[3], box[0] : box[2]].reshape(-1, 3)
    assert mask.sum() == len(inside) and (inside == inside[0]).all()
    return box, tuple(inside[0])


def test_cutout_of_asl():
    """Side half the image, centre uniform over pixels, clipped; so the corners of the box follow from the centre."""
    size, side = 16, 8
    image = Image.new("RGB", (size, size), (1, 2, 3))
    transform, rng = train(size, cutout=0.5, flip=0), np.random.default_rng(0)
    spans = [(max(0, c - side // 2), min(size, c + side // 2)) for c in range(size)]
    found, colours = [], []
    for _ in range(3000):
        box, colour = painted(transform(image, rng), (1, 2, 3))
        found.append(box)
        colours.append(colour)
    found = np.array(found)
    for axis in (0, 1):
        seen, counts = np.unique(found[:, [axis, axis + 2]], axis=0, return_counts=True)
        assert {tuple(s) for s in seen.tolist()} == set(spans)
        expected = np.array([spans.count(tuple(s)) for s in seen.tolist()]) * 3000 / size
        assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()
    colours = np.array(colours) / 256
    for channel in range(3):
        assert uniform_distance(colours[:, channel]) < 0.03
    assert np.abs(np.corrcoef(colours.T) - np.eye(3)).max() < 0.07


def test_cutout_of_mulcon():
    size = 448
    image = Image.new("RGB", (size, size), (1, 2, 3))
    transform = train(size, cutout=244 / 448, cutout_prob=0.5, cutout_fill="mean", flip=0)
    rng, hits = np.random.default_rng(0), 0
    for _ in range(60):
        out = transform(image, rng)
        if (out != (1, 2, 3)).any():
            hits += 1
            box, colour = painted(out, (1, 2, 3))
            assert colour == (124, 116, 104)  # 255 * (0.485, 0.456, 0.406), rounded
            assert box[2] - box[0] <= 244 and box[3] - box[1] <= 244
    assert 15 < hits < 45
    image = Image.new("RGB", (8, 8))
    assert not train(8, flip=0)(image, np.random.default_rng(0)).any()  # none by default


def test_order(monkeypatch):
    """Crop, random cutout, RandAugment, mean cutout, flip."""
    seen = []

    def spy(image, rng, **_):
        seen.append(np.asarray(image).copy())
        marked = image.copy()
        marked.putpixel((0, 7), (9, 9, 9))
        return marked

    monkeypatch.setattr(randaugment, "package", spy)
    image = Image.new("RGB", (20, 20), (1, 2, 3))
    for fill in ("random", "mean"):
        out = train(8, randaugment="package", cutout=0.5, cutout_fill=fill, flip=1)(image, np.random.default_rng(3))
        before = seen.pop()
        assert before.shape == (8, 8, 3)
        assert (before != (1, 2, 3)).any() == (fill == "random")
        assert ((out != (1, 2, 3)).any(-1).sum() > 1) and (out[7, 7] == 9).all()  # the mark is mirrored
    train(8, n=3, m=7, randaugment="paper")(image, np.random.default_rng(0))


def test_n_and_m_reach_randaugment(monkeypatch):
    calls = []
    monkeypatch.setattr(randaugment, "paper", lambda image, rng, **kw: calls.append(kw) or image)
    monkeypatch.setattr(randaugment, "package", lambda image, rng, **kw: calls.append(kw) or image)
    image, rng = noise(4, 4), np.random.default_rng(0)
    train(8, randaugment="paper", n=3, m=7.5)(image, rng)
    train(8, randaugment="package", n=1)(image, rng)
    train(8)(image, rng)
    assert calls == [{"n": 3, "m": 7.5}, {"n": 1}]


# ---- settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"crop": "multiscale"}, "crop='multiscale' does not exist .did you mean 'multi_scale'"),
        ({"crop": "centre"}, "did you mean 'center'"),
        ({"resize": "bilinar"}, "did you mean 'bilinear'"),
        ({"randaugment": "packages"}, "did you mean 'package'"),
        ({"cutout_fill": "zero"}, "cutout_fill='zero' does not exist"),
        ({"size": 0}, "size must be whole and at least 1, not 0"),
        ({"size": 224.0}, "size must be whole"),
        ({"size": True}, "size must be whole"),
        ({"n": -1}, "n must be whole and at least 0"),
        ({"m": 31}, "m must lie between 0 and 30"),
        ({"flip": 1.5}, "flip must lie between 0 and 1"),
        ({"flip": "yes"}, "flip must lie between 0 and 1"),
        ({"flip": float("nan")}, "flip must lie"),
        ({"cutout": -0.5}, "cutout must lie"),
        ({"cutout_prob": 2}, "cutout_prob must lie"),
        ({"scale": (0, 1)}, "scale must be two numbers"),
        ({"scale": (0.5, 0.2)}, "scale must be two numbers"),
        ({"scale": (0.5, 1.2)}, "scale must be two numbers"),
        ({"scale": 0.5}, "scale must be two numbers"),
        ({"ratio": (1,)}, "ratio must be two numbers"),
        ({"pre_size": 512}, "pre_size has no meaning with crop='squish'"),
        ({"crop": "center", "pre_size": 256}, "pre_size=256 is less than size=448"),
        ({"crop": "multi_scale", "pre_size": 0}, "pre_size must be whole"),
        ({"sides": (448,)}, "sides has no meaning"),
        ({"crop": "ssgrl", "sides": ()}, "sides is empty"),
        ({"crop": "ssgrl", "sides": (600,)}, "600, more than pre_size=512"),
        ({"crop": "ssgrl", "sides": (0.5,)}, "sides must be whole"),
    ],
    ids=str,
)
def test_wrong_training_settings(settings, words):
    with pytest.raises(UserError, match=words) as caught:
        train(**settings)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"crop": "multi_scale"}, "crop='multi_scale' does not exist"),
        ({"crop": "squash"}, "did you mean 'squish'"),
        ({"resize": 3}, "resize=3 does not exist"),
        ({"flip": 0.5}, "flip=0.5 does not exist"),
        ({"size": -3}, "size must be whole"),
        ({"pre_size": 512}, "no meaning"),
    ],
    ids=str,
)
def test_wrong_evaluation_settings(settings, words):
    with pytest.raises(UserError, match=words):
        evaluate(**settings)
