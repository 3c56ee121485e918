"""MCAR against the authors' numbers, its search for regions against plain loops, and what it says of cached maps."""

import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance

import toy
from mljax import train
from mljax.convolution import Conv
from mljax.errors import UserError
from mljax.losses.criterion import Criterion
from mljax.pipeline import transforms
from mljax.systems import _mcar
from mljax.systems.mcar import MCAR
from mljax.types import Meta
from mljax.weights import published
from mljax.weights.published import Names
from toy import weights

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
POOLING = {"avg": "average", "max": "max", "gwp": "mean_of_both"}


class Trunk(nn.Module):
    """The small trunk of the golden cases, of stride 32."""

    @nn.compact
    def __call__(self, image, *, train):
        x = nn.relu(Conv(8, 7, stride=4, padding=3, bias=True, name="features.0")(image))
        x = nn.relu(Conv(8, 3, stride=4, padding=1, bias=True, name="features.4.0")(x))
        return {"32": Conv(8, 2, stride=2, padding=0, bias=True, name="features.5")(x)}


def build(labels=5, backbone=None, **settings):
    nothing = np.zeros((0, labels), np.uint8)
    meta = Meta(name="toy", classes=tuple(f"c{i}" for i in range(labels)), labels=nothing, observed=nothing)
    return MCAR(backbone=backbone, criterion=Criterion.from_config({"name": "bce"}), meta=meta, **settings)


def golden():
    found = toy.golden("mcar")
    state = weights(found)
    system = build(backbone=Trunk())
    variables = published.convert_head(state, system)
    names = Names(state)
    variables["params"]["backbone"] = {name: names.conv(name) for name in ("features.0", "features.4.0", "features.5")}
    return found, variables, {"image": found["in/image"].transpose(0, 2, 3, 1)}


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


@pytest.mark.parametrize("pooling", POOLING)
def test_authors_numbers(pooling):
    found, variables, batch = golden()
    system = build(backbone=Trunk(), pooling=POOLING[pooling])
    out = system.apply(variables, batch)
    np.testing.assert_allclose(sigmoid(out.extra["global_logits"]), found[f"{pooling}/out/global_scores"], **CLOSE)
    np.testing.assert_allclose(sigmoid(out.extra["local_logits"]), found[f"{pooling}/out/local_scores"], **CLOSE)
    np.testing.assert_allclose(sigmoid(out.logits), found[f"{pooling}/out/scores"], **CLOSE)
    regions = found[f"{pooling}/out/regions_x1_x2_y1_y2_class_score"]
    np.testing.assert_array_equal(out.extra["boxes"], regions[..., :4])
    np.testing.assert_array_equal(out.extra["box_labels"], regions[..., 4])
    scores = np.take_along_axis(sigmoid(out.extra["global_logits"]), np.asarray(out.extra["box_labels"]), 1)
    np.testing.assert_allclose(scores, regions[..., 5], **CLOSE)


def test_authors_intervals():
    found = toy.golden("mcar")
    got = jax.vmap(lambda profile: _mcar.interval(profile, 0.5))(jnp.asarray(found["obj_loc/in/profile"]))
    np.testing.assert_array_equal(np.stack(got, -1), found["obj_loc/out/min_max"])


def interval_by_hand(profile, threshold):
    """Cut the profile, look at one part after the other, lengthen the winner."""
    n = len(profile)
    least = math.ceil(n / 8)
    side = [1 if v > threshold else -1 if v < threshold else 0 for v in profile]
    cuts = [i for i in range(n - 1) if side[i] * side[i + 1] == -1]
    if not cuts:
        return math.ceil(n / 8), math.ceil(n * 7 / 8)
    parts = [(0, cuts[0])] if cuts[0] else []
    parts += [(cuts[-1], n), *itertools.pairwise(cuts)]
    begin, end = max(parts, key=lambda part: (max(profile[part[0] : part[1]]), part[1] - part[0]))  # the first such
    if end - begin > least:
        return begin, end
    missing = least - (end - begin)
    half = math.ceil(missing / 2)
    if begin > half and n - end > missing:
        begin, end = begin - half + 1, end + half
    if begin < half:
        begin, end = 0, least
    if n - end < half:
        begin, end = n - least + 1, n
    return begin, end


@pytest.mark.parametrize("n", [2, 7, 8, 9, 33, 64])
@pytest.mark.parametrize("levels", [3, 5, 1000])
def test_intervals_with_ties_plateaus_and_values_on_the_threshold(n, levels):
    rng = np.random.default_rng(n * levels)
    profiles = (rng.integers(0, levels, (300, n)) / (levels - 1)).astype(np.float32)
    for i, spike in enumerate(rng.integers(0, n, 60)):  # one peak that is too short, everywhere
        profiles[i] = 0.1
        profiles[i, spike : spike + 1 + i % 3] = 1
    got = jax.jit(jax.vmap(lambda profile: _mcar.interval(profile, 0.5)))(jnp.asarray(profiles))
    np.testing.assert_array_equal(np.stack(got, -1), [interval_by_hand(list(map(float, p)), 0.5) for p in profiles])


def bilinear(image, left, right, top, bottom):
    """(h w c) -> what is between the edges, stretched to (h w c), corner on corner, pixel by pixel."""
    h, w, _ = image.shape
    out = np.zeros(image.shape)
    part = image[top:bottom, left:right].astype(np.float64)
    for i in range(h):
        for j in range(w):
            y, x = i * (bottom - top - 1) / (h - 1), j * (right - left - 1) / (w - 1)
            a, b = int(y), int(x)
            c, d = min(a + 1, bottom - top - 1), min(b + 1, right - left - 1)
            upper = (1 - (x - b)) * part[a, b] + (x - b) * part[a, d]
            lower = (1 - (x - b)) * part[c, b] + (x - b) * part[c, d]
            out[i, j] = (1 - (y - a)) * upper + (y - a) * lower
    return out


def test_crops_are_stretched_corner_on_corner():
    rng = np.random.default_rng(0)
    image = rng.normal(size=(2, 12, 9, 3)).astype(np.float32)
    boxes = np.array([[[0, 9, 0, 12], [3, 5, 6, 12]], [[8, 9, 11, 12], [2, 9, 0, 2]]])
    got = jax.jit(_mcar.crops)(image, jnp.asarray(boxes))
    for i in range(2):
        for j in range(2):
            np.testing.assert_allclose(got[i, j], bilinear(image[i], *boxes[i, j]), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got[0, 0], image[0], rtol=1e-6)  # the whole image stays as it is


def test_profiles_are_the_maxima_of_the_stretched_map():
    rng = np.random.default_rng(1)
    maps = rng.random((3, 4, 5)).astype(np.float32)
    columns, rows = _mcar.profiles(jnp.asarray(maps), 20, 31)
    for i in range(3):
        across = np.stack([np.interp(np.linspace(0, 4, 31), range(5), row) for row in maps[i]])
        stretched = np.stack([np.interp(np.linspace(0, 3, 20), range(4), column) for column in across.T], axis=1)
        for got, profile in ((columns[i], stretched.max(0)), (rows[i], stretched.max(1))):
            expected = (profile - profile.min()) / (profile.max() - profile.min())
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    flat, _ = _mcar.profiles(jnp.full((4, 4), 0.3), 16, 16)
    np.testing.assert_array_equal(flat, 1)


def test_a_ramp_through_the_threshold_is_cut_the_same_however_it_is_rounded():
    ramp = np.full((1, 1, 2, 2), [0.0, 1.0], np.float32)
    found = [_mcar.boxes(jnp.asarray(ramp + step), 16, 17, 0.5) for step in (0, 1e-6, -1e-6, 3e-7)]
    for other in found:
        np.testing.assert_array_equal(other, [[[8, 17, 2, 14]]])  # 8/16 is the last value below


def test_loss_is_that_of_both_streams():
    _, variables, batch = golden()
    system = build(backbone=Trunk())
    labels = np.array([[1, 0, 0, 1, 0], [0, 1, 0, 0, 0]], np.float32)
    batch |= {"labels": labels, "observed": np.ones_like(labels), "mask": np.ones(2, np.float32)}
    out = system.apply(variables, batch)

    def bce(logits):
        p = sigmoid(logits)
        return -np.mean(labels * np.log(p) + (1 - labels) * np.log(1 - p))

    loss, terms = system.apply(variables, batch, jnp.int32(0), method="loss")
    np.testing.assert_allclose(terms["global_loss"], bce(out.extra["global_logits"]), rtol=1e-5)
    np.testing.assert_allclose(terms["local_loss"], bce(out.extra["local_logits"]), rtol=1e-5)
    np.testing.assert_allclose(loss, terms["global_loss"] + terms["local_loss"], rtol=1e-6)


def test_fewer_labels_than_regions_and_the_names_of_the_released_checkpoint():
    assert build(labels=1).num_regions == 1
    state = {
        "convclass.weight": np.ones((80, 2048, 1, 1), np.float32),
        "convclass.bias": np.ones(80, np.float32),
        "features.0.weight": np.zeros((64, 3, 7, 7), np.float32),
    }
    found = published.convert_head(state, build(labels=80))["params"]["classifier"]
    assert found["kernel"].shape == (2048, 80) and found["bias"].shape == (80,)


def test_what_a_user_can_get_wrong(tmp_path):
    with pytest.raises(UserError, match=r"pooling is 'avg'; expected one of average, max, mean_of_both"):
        build(pooling="avg")
    with pytest.raises(UserError, match="regions is 0; expected at least 1"):
        build(regions=0)
    with pytest.raises(UserError, match="threshold is 1.0; expected a share of the peak, above 0 and below 1"):
        build(threshold=1.0)
    cached = "looks at parts of the image again and cached features hold none; leave config.cache.train_views empty"
    with pytest.raises(UserError, match=cached):
        build().apply({}, {"endpoints": {"32": np.zeros((1, 2, 2, 8), np.float32)}})
    found = toy.config("mcar")
    found.backbone.frozen = "all"
    found.cache.train_views, found.cache.eval_views = ("64",), ("64",)
    with pytest.raises(UserError, match=cached):
        train.fit(found, tmp_path / "run")


# --- the papers' words ------------------------------------------------------------------------------------------------


def test_colour_jitter_is_that_of_torchvision():
    """Three factors of 0.7 to 1.3 in one of six orders, each by Pillow; then the flip."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    transform, orders = transforms.train(24, flip=0.5, color_jitter=0.3), set()
    small = noise.resize((24, 24), Image.Resampling.BILINEAR)
    for seed in range(40):
        rng, image = np.random.default_rng(seed), small
        order = tuple(rng.permutation(3).tolist())
        for i in order:
            factor = rng.uniform(0.7, 1.3)
            image = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[i](image).enhance(factor)
        wanted = np.asarray(image)[:, ::-1] if rng.random() < 0.5 else np.asarray(image)
        np.testing.assert_array_equal(transform(noise, np.random.default_rng(seed)), wanted)
        orders.add(order)
    assert len(orders) == 6
    still = transforms.train(24, flip=0.0, color_jitter=0.0)(noise, np.random.default_rng(0))
    np.testing.assert_array_equal(still, np.asarray(small))
    with pytest.raises(UserError, match="color_jitter must lie between 0 and 1"):
        transforms.train(24, color_jitter=2.0)


def test_the_papers_words_are_the_authors_training():
    found = toy.config("mcar", "voc2007")
    assert dict(found.input.train) == {"crop": "squish", "flip": 0.5, "color_jitter": 0.3}
    np.testing.assert_allclose(1 / (1 + np.exp(-found.eval.threshold)), 0.6)
    resplit = toy.config("mcar", "voc_resplit")
    assert resplit.input.size == 160 and resplit.optim.epochs == 3 and resplit.eval.threshold == 0
