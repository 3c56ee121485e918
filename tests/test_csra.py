"""CSRA against the authors' numbers, a plain numpy loop, and what it says when its settings make no sense."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toy
from mljax import experiment
from mljax.check import check
from mljax.errors import UserError
from mljax.losses.criterion import Criterion
from mljax.optim.schedules import Steps, make_schedule
from mljax.systems.csra import CSRA, TEMPERATURES
from mljax.types import Meta
from mljax.weights import published

L, D = 6, 16
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def build(labels=L, **settings):
    nothing = np.zeros((0, labels), np.uint8)
    meta = Meta(name="toy", classes=tuple(f"c{i}" for i in range(labels)), labels=nothing, observed=nothing)
    return CSRA(backbone=None, criterion=Criterion.from_config({"name": "bce"}), meta=meta, **settings)


def golden(heads):
    case = toy.golden("csra", f"heads{heads}/")
    weights = toy.weights(case)
    return toy.golden("csra")["in/feature_map"], weights, case


def by_hand(x, kernels, temperatures, lam):
    """(b h w d), (k l d) -> logits per head (b k l), label features (b l d) and attention (b k l n), image by image."""
    b, h, w, d = x.shape
    k, l = kernels.shape[:2]
    logits, features, attention = np.zeros((b, k, l)), np.zeros((b, l, d)), np.zeros((b, k, l, h * w))
    for i in range(b):
        points = x[i].reshape(-1, d).astype(np.float64)
        for head, temperature in enumerate(temperatures):
            for label in range(l):
                vector = kernels[head, label].astype(np.float64)
                scores = points @ (vector / np.sqrt((vector**2).sum()))
                weights = np.exp(temperature * scores - (temperature * scores).max())
                weights /= weights.sum()
                if temperature == 99:
                    weights = np.arange(h * w) == scores.argmax()
                feature = points.mean(0) + lam * (weights[:, None] * points).sum(0)
                logits[i, head, label] = feature @ vector / np.sqrt((vector**2).sum())
                features[i, label] += feature / k
                attention[i, head, label] = weights
    return logits, features, attention


@pytest.mark.parametrize("prefix", ["", "classifier."])
@pytest.mark.parametrize("heads", [1, 2, 4, 6, 8])
def test_authors_numbers(heads, prefix):
    x, weights, case = golden(heads)
    system = build(heads=heads, lam=0.1 if heads == 1 else 0.4)
    assert system.head_temperatures == tuple(float(case[f"out/head{k}_temperature"]) for k in range(heads))
    variables = published.convert_head({prefix + name: value for name, value in weights.items()}, system)
    out = system.apply(variables, {"endpoints": {"32": x.transpose(0, 2, 3, 1)}})
    np.testing.assert_allclose(out.logits, case["out/logits"], **CLOSE)
    for k in range(heads):
        np.testing.assert_allclose(out.extra["head_logits"][:, k], case[f"out/head{k}_logits"], **CLOSE)


@pytest.mark.parametrize("settings", [{"heads": 6, "lam": 0.3}, {"temperatures": (0.5, 20.0, 99.0), "lam": 1.5}])
def test_label_features_and_attention(settings):
    rng = np.random.default_rng(0)
    system = build(**settings)
    x = rng.normal(size=(3, 2, 5, D)).astype(np.float32)
    kernels = rng.normal(size=(len(system.head_temperatures), L, D)).astype(np.float32)
    out = system.apply({"params": {"kernel": kernels.transpose(0, 2, 1)}}, {"endpoints": {"32": x}})
    logits, features, attention = by_hand(x, kernels, system.head_temperatures, system.lam)
    np.testing.assert_allclose(out.extra["head_logits"], logits, **CLOSE)
    np.testing.assert_allclose(out.logits, logits.sum(1), **CLOSE)
    np.testing.assert_allclose(out.label_features, features, **CLOSE)
    np.testing.assert_allclose(out.attention.reshape(attention.shape), attention, **CLOSE)


def test_loss_and_its_gradient():
    rng = np.random.default_rng(1)
    system = build(heads=4, lam=0.5)
    x = rng.normal(size=(2, 3, 3, D)).astype(np.float32)
    labels = (rng.random((2, L)) < 0.5).astype(np.float32)
    kernels = rng.normal(size=(4, L, D)).astype(np.float32)
    batch = {"endpoints": {"32": x}, "labels": labels, "observed": np.ones_like(labels), "mask": np.ones(2, np.float32)}

    def loss(kernel):
        return system.apply({"params": {"kernel": kernel}}, batch, jnp.int32(0), method="loss")[0]

    def expected(kernels):
        logits = by_hand(x, kernels, system.head_temperatures, 0.5)[0].sum(1)
        return np.mean(np.logaddexp(0, logits) - labels * logits)

    value, grad = jax.jit(jax.value_and_grad(loss))(jnp.asarray(kernels.transpose(0, 2, 1)))
    np.testing.assert_allclose(value, expected(kernels), rtol=1e-5)
    for _ in range(4):
        step = 1e-5 * rng.normal(size=kernels.shape)
        slope = (expected(kernels + step) - expected(kernels - step)) / 2
        np.testing.assert_allclose((np.asarray(grad).transpose(0, 2, 1) * step).sum(), slope, rtol=1e-3, atol=1e-9)


def test_no_attention_is_the_mean_and_a_scale_of_the_kernel_changes_nothing():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(2, 3, 3, D)).astype(np.float32)
    kernel = rng.normal(size=(1, D, L)).astype(np.float32)
    plain = build(lam=0.0).apply({"params": {"kernel": kernel}}, {"endpoints": {"32": x}}).logits
    np.testing.assert_allclose(plain, x.mean((1, 2)) @ (kernel[0] / np.linalg.norm(kernel[0], axis=0)), **CLOSE)
    a, b = (build().apply({"params": {"kernel": s * kernel}}, {"endpoints": {"32": x}}).logits for s in (1, 7))
    np.testing.assert_allclose(a, b, **CLOSE)


def test_names_of_the_released_checkpoints():
    """checkpoints.md 11: one head's kernel beside a bare ResNet-101."""
    system = build(labels=80, heads=1)
    state = {"classifier.multi_head.0.head.weight": np.ones((80, 2048, 1, 1), np.float32)}
    trunk = {"conv1.weight": np.zeros((64, 3, 7, 7), np.float32)}
    assert published.convert_head(state | trunk, system)["params"]["kernel"].shape == (1, 2048, 80)
    assert published.split(state | trunk, published.of(system))[0].keys() == trunk.keys()
    wrapped = {f"module.{name}": value for name, value in (state | trunk).items()}
    assert published.split(wrapped, published.of(system))[0].keys() == trunk.keys()


def test_what_a_user_can_get_wrong():
    with pytest.raises(
        UserError,
        match=r"heads is 3; expected one of 1, 2, 4, 6, 8, for which .*, or set config\.system\.temperatures",
    ):
        build(heads=3)
    with pytest.raises(UserError, match=r"temperatures is \(1.0, 0.0\); expected numbers above 0"):
        build(temperatures=(1.0, 0.0))
    with pytest.raises(UserError, match="lam is -1; expected a number of at least 0, the weight of the attention"):
        build(lam=-1)
    _, weights, _ = golden(4)
    with pytest.raises(UserError, match=r"have 4 heads and the system has 1; set config.system.heads=4"):
        published.convert_head(weights, build(heads=1))


def test_words_of_the_config():
    found = toy.config("csra", "coco2014,heads=6")
    assert (found.system.heads, found.system.lam, found.optim.schedule.every) == (6, 0.5, 5)
    for word, size, count in (("vit_base", 224, 1), ("vit_large", 448, 8)):
        for data in ("voc2007", "coco2014"):
            found = toy.config("csra", f"{word},{data}")
            assert found.backbone.size == found.input.size == size and found.backbone.name.startswith(word)
            assert (found.system.heads, found.system.lam) == (count, 0.3) and found.weights.mean == (0.0, 0.0, 0.0)
    assert {k: len(v) for k, v in TEMPERATURES.items()} == {k: k for k in (1, 2, 4, 6, 8)}


# --- the papers' words ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("word", "every"), [("voc2007", 4), ("coco2014", 5)])
def test_two_epochs_of_warm_up_then_steps(word, every):
    """The authors' rate, batch by batch: base * i / (2 epochs) in the first two, then a tenth every so many epochs."""
    optim = toy.config("csra", word).optim
    schedule = make_schedule(optim.schedule, Steps(optim.lr, total=30 * 7, per_epoch=7)).rate
    for step in range(30 * 7):
        wanted = 0.1 * min(1, step / 14) * 0.1 ** (step // 7 // every)
        np.testing.assert_allclose(schedule(step), wanted, rtol=1e-5, atol=1e-12)


def test_images_stay_between_zero_and_one():
    found = toy.config("csra", "voc2007")
    found.weights.name = None
    values = experiment.preprocessing(found)
    image = np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3)
    np.testing.assert_allclose(experiment.normalise(image, values["mean"], values["std"]), image / 255, rtol=1e-6)
    plain = experiment.preprocessing(toy.config("csra"))
    assert plain["mean"] == [0.5] * 3 and plain["std"] == [0.25] * 3


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("mean", (0.5, 0.5), "weights.mean is .*; it must be three numbers, for red"),
        ("std", (1.0, 0.0, 1.0), "weights.std is .*; it must be three numbers above 0"),
        ("mean", ("a", "b", "c"), "weights.mean is .* three numbers"),
    ],
)
def test_pixels_that_cannot_be(key, value, said):
    found = toy.config("csra")
    found.weights[key] = value
    with pytest.raises(UserError, match=said):
        check(found)
