"""Losses against plain numpy loops, finite differences, the facts' fixtures and the authors' golden cases."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toy
from mljax import losses
from mljax.errors import UserError
from mljax.losses import contrastive, weak_labels


@pytest.fixture(scope="module")
def golden():
    return toy.golden("losses")


@pytest.fixture(scope="module")
def known(golden):
    """The partial labels of the golden cases as (labels, observed)."""
    t = golden["in/partial_labels"]
    return jnp.asarray(np.float32(t == 1)), jnp.asarray(np.float32(t != 0))


def assert_golden(golden, name, loss, *arguments):
    """Value to 1e-5 relative, gradients with respect to the arguments to 1e-4 / 1e-6."""
    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=tuple(range(len(arguments)))))(*arguments)
    scale = 1000 if name.startswith("q2l") else 1
    np.testing.assert_allclose(value, golden[f"out/{name}/loss"], rtol=1e-5, atol=1e-7 * scale)
    for gradient, key in zip(gradients, ("grad", "grad_extra0")):
        np.testing.assert_allclose(gradient, golden[f"out/{name}/{key}"], rtol=1e-4, atol=1e-6 * scale)


ASL_CASES = {
    "gn4_gp1_clip0.05": {"gamma_neg": 4, "gamma_pos": 1, "clip": 0.05},
    "gn4_gp0_clip0.05": {"gamma_neg": 4, "gamma_pos": 0, "clip": 0.05},
    "gn2_gp0_clip0": {"gamma_neg": 2, "gamma_pos": 0, "clip": 0},
    "gn0_gp0_clip0": {"gamma_neg": 0, "gamma_pos": 0, "clip": 0},
}


@pytest.mark.parametrize("code", ["asl_plain", "asl_optimised", "q2l"])
@pytest.mark.parametrize("case", ASL_CASES)
@pytest.mark.parametrize("focal", ["detached", "withgrad"])
def test_asl_golden(golden, code, case, focal):
    x, y = jnp.asarray(golden["in/logits_normal"]), jnp.asarray(golden["in/labels"])
    settings = ASL_CASES[case] | {"detach_focal": focal == "detached", "eps": 1e-5 if code == "q2l" else 1e-8}
    how, scale = ("mean", 1000) if code == "q2l" else ("sum", 1)

    def loss(x):
        return losses.reduce(losses.asl(x, y, **settings), jnp.ones_like(y), how=how) * scale

    assert_golden(golden, f"{code}/{case}/{focal}/normal", loss, x)


def partial_losses(known, golden):
    """name of the golden case -> loss(x): one number from the logits."""
    labels, observed = known
    full = jnp.asarray(golden["in/labels"])
    single = jnp.asarray(golden["in/single_positive_labels"])
    soft = jnp.asarray(golden["in/partial_soft_labels"])
    every = jnp.ones_like(full)
    hidden = (jnp.asarray(golden["in/partial_labels"]) == -1).astype(jnp.float32)
    oracle = jnp.maximum(single, 1 - full)

    def reduced(name, labels, observed=None, how="mean", weights=None, **settings):
        loss = losses.make({"name": name, **settings})
        weights = losses.entries(name, every if observed is None else observed) if weights is None else weights
        return lambda x: losses.reduce(loss(x, labels, observed), weights, how=how)

    none = jnp.zeros_like(full)
    return {
        "sst_partial_bce/margin0.0": reduced("bce", labels, observed),
        "sst_partial_bce/margin0.75": reduced("bce", labels, observed),
        "sst_partial_bce/margin0.95": reduced("bce", labels, observed),
        "sst_partial_bce_all_unknown": reduced("bce", none, none),
        "sst_asymmetric/gn4_gp1_clip0.05_mean": reduced("asl", labels, observed, weights=every, detach_focal=False),
        "sarb_partial_bce_soft": reduced("bce", jnp.maximum(soft, 0), (soft != 0).astype(jnp.float32)),
        "ctran/unknown_only": reduced("bce", full, hidden, how="sum"),
        "ctran/all": reduced("bce", full, how="sum"),
        "multilabel_soft_margin": reduced("soft_margin", full),
        "spml_bce": reduced("bce", full, eps=1e-5),
        "spml_bce_ls": reduced("bce_ls", full, eps=1e-5),
        "spml_an": reduced("an", single, single),
        "spml_an_ls": reduced("an_ls", single, single),
        "spml_wan": reduced("wan", single, single),
        "spml_iu": reduced("iu", labels, observed),
        # row 0 has no true positive: where the oracle and the single positive disagree, the oracle wins
        "spml_iun": reduced("iu", single * full, oracle),
        "spml_epr": lambda x: weak_labels.epr(x, single, expected=2.9),
        "spml_pr": lambda x: contrastive.ranking(x, single).mean(),
        "asl_single_label/gp0_gn4_eps0.1": lambda x: losses.asl_single_label(x, jnp.arange(8)).mean(),
    }


def test_partial_and_single_positive_golden(golden, known):
    cases = partial_losses(known, golden)
    for name, loss in cases.items():
        assert_golden(golden, f"{name}/normal", loss, jnp.asarray(golden["in/logits_normal"]))


def test_elementwise_golden(golden, known):
    x = jnp.asarray(golden["in/logits_normal"])
    wanted = golden["out/sst_partial_bce_elementwise/normal/loss"]
    np.testing.assert_allclose(losses.bce(x, *known), wanted, rtol=1e-5, atol=1e-7)


def test_every_golden_loss_is_tested(golden):
    """A case added to the file must not go unnoticed."""
    families = {key.split("/")[1] for key in golden if key.startswith("out/")}
    assert families == {
        *("asl_plain", "asl_optimised", "q2l", "asl_single_label", "sst_partial_bce", "sst_asymmetric"),
        *("sst_partial_bce_elementwise", "sst_partial_bce_all_unknown", "sarb_partial_bce_soft", "ctran"),
        *("multilabel_soft_margin", "spml_an", "spml_an_ls", "spml_wan", "spml_epr", "spml_pr", "spml_role"),
        *("spml_bce", "spml_bce_ls", "spml_iu", "spml_iun", "sst_ist", "sst_ist_pseudo", "sst_cst_pseudo"),
        *("sst_cst_mean_cosine", "sst_cst_contrastive", "sst_cst_pair_cosine", "sst_cst_pair_index"),
        "mulcon_supcon",
    }


def test_pairs_of_the_labels_of_coco():
    """By hand: 80 * 79 / 2 pairs, row by row of the upper triangle."""
    places = {(int(i), int(j)): n for n, (i, j) in enumerate(weak_labels.pair_index(80).T)}
    assert len(places) == 3160
    assert places[0, 1] == 0 and places[0, 79] == 78 and places[1, 2] == 79


FIXTURE_X = jnp.asarray([[2.0, -1.0, 0.5], [-3.0, 0.0, 1.5]])
FIXTURE_Y = jnp.asarray([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])


@pytest.mark.parametrize(
    "settings, total, gradient",
    [
        ({"gamma_neg": 4, "gamma_pos": 1, "clip": 0.05}, 0.49026750, None),
        (
            {"gamma_neg": 4, "gamma_pos": 0, "clip": 0.05},
            1.11330927,
            [[-0.119203, 0.000578, 0.059030], [0, -0.5, -0.182426]],
        ),
        (
            {"gamma_neg": 2, "gamma_pos": 0, "clip": 0},
            1.42166747,
            [[-0.119203, 0.019452, 0.241175], [0.000107, -0.5, -0.182426]],
        ),
        ({"gamma_neg": 0, "gamma_pos": 0, "clip": 0}, 2.35741449, None),
    ],
)
def test_asl_fixtures(settings, total, gradient):
    """The fact sheet's numbers, detached weights."""
    value, found = jax.value_and_grad(lambda x: losses.asl(x, FIXTURE_Y, **settings).sum())(FIXTURE_X)
    np.testing.assert_allclose(value, total, rtol=2e-6)
    if gradient is not None:
        np.testing.assert_allclose(found, gradient, atol=6e-7)


def test_asl_elements():
    wanted = [[0.015130, 0.000568, 0.091253], [0, 0.346574, 0.036743]]
    np.testing.assert_allclose(losses.asl(FIXTURE_X, FIXTURE_Y), wanted, atol=6e-7)
    every = jnp.ones_like(FIXTURE_Y)
    values = losses.asl(FIXTURE_X, FIXTURE_Y, gamma_neg=2, gamma_pos=0, clip=0, eps=1e-5)
    np.testing.assert_allclose(1000 * losses.reduce(values, every, how="mean"), 236.944568, rtol=1e-6)


# one entry of each loss, written as its paper does, in float64: x, y and z (observed) are numbers
def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def loop_bce(x, y, z, l, row, eps=0.0):
    return z * -(y * math.log(sigmoid(x) + eps) + (1 - y) * math.log(sigmoid(-x) + eps))


def loop_bce_ls(x, y, z, l, row, eps=0.0):
    return loop_bce(x, 0.9 * y + 0.1 * (1 - y), z, l, row, eps)


def loop_asl(x, y, z, l, row):
    p, shifted = sigmoid(x), max(sigmoid(x) - 0.05, 0)
    return z * -(y * (1 - p) * math.log(p) + (1 - y) * shifted**4 * math.log(1 - shifted))


def loop_focal(x, y, z, l, row):
    p = sigmoid(x)
    return z * -(y * (1 - p) ** 2 * math.log(p) + (1 - y) * p**2 * math.log(1 - p))


def loop_partial(x, y, z, l, row):
    return loop_bce(x, y, z, l, row) * (-4.45 * sum(row) / l + 5.45) / l


def loop_an(x, y, z, l, row):
    return loop_bce(x, y * z, 1, l, row, 1e-5)


def loop_an_ls(x, y, z, l, row):
    return loop_bce_ls(x, y * z, 1, l, row, 1e-5)


def loop_wan(x, y, z, l, row):
    return loop_an(x, y, z, l, row) * (1 if y * z else 1 / (l - 1))


def loop_iu(x, y, z, l, row):
    return loop_bce(x, y, z, l, row, 1e-5)


def loop_positives(x, y, z, l, row):
    return y * z * -math.log(sigmoid(x) + 1e-5)


LOOPS = {
    "bce": loop_bce,
    "soft_margin": loop_bce,
    "bce_ls": loop_bce_ls,
    "asl": loop_asl,
    "focal": loop_focal,
    "partial_bce": loop_partial,
    "an": loop_an,
    "an_ls": loop_an_ls,
    "wan": loop_wan,
    "iu": loop_iu,
    "positives": loop_positives,
}
# the numpy loop has the gradient of the focal weights, so must the loss
WITH_GRADIENT = {"asl": {"detach_focal": False}}


def batch(b=4, l=5, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(b, l)) * 3
    y = np.float64(rng.random((b, l)) < 0.4)
    z = np.float64(rng.random((b, l)) < 0.6)
    return x, y * z, z


def single(*arrays):
    return tuple(jnp.asarray(a, jnp.float32) for a in arrays)


@pytest.mark.parametrize("name", sorted(losses.NAMES))
def test_numpy_loop_and_finite_differences(name):
    x, y, z = batch()
    rows, columns = x.shape

    def loop(x):
        return np.array(
            [[LOOPS[name](x[i, j], y[i, j], z[i, j], columns, z[i]) for j in range(columns)] for i in range(rows)]
        )

    loss = losses.make({"name": name, **WITH_GRADIENT.get(name, {})})
    xj, yj, zj = single(x, y, z)
    np.testing.assert_allclose(loss(xj, yj, zj), loop(x), rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(jax.jit(loss)(xj, yj, zj), loop(x), rtol=2e-5, atol=1e-7)
    step = 1e-5
    wanted = (loop(x + step) - loop(x - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(lambda x: loss(x, yj, zj).sum())(xj), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", sorted(losses.NAMES))
def test_none_means_all_known(name):
    x, y, _ = single(*batch())
    np.testing.assert_array_equal(losses.NAMES[name](x, y), losses.NAMES[name](x, y, jnp.ones_like(y)))


EXTREME = jnp.asarray([[1e4, -1e4, 100.0, -100.0, 0.0, 40.0, -40.0], [-1e4, 1e4, -100.0, 100.0, 17.0, -17.0, 1.0]])
VARIANTS = [
    *({"name": name} for name in sorted(losses.NAMES)),
    *(
        {"name": "asl", "gamma_neg": g, "gamma_pos": g, "clip": c, "detach_focal": False}
        for g in (0, 0.5, 1, 2.5)
        for c in (0, 1e-9, 0.05)
    ),
    {"name": "focal", "gamma": 0.5, "alpha": 0.25},
    {"name": "partial_bce", "alpha": 1.0, "beta": 0.0, "gamma": -1.0},
]


@pytest.mark.parametrize("section", VARIANTS, ids=str)
def test_extremes_are_finite(section):
    loss = losses.make(section)
    step = jax.jit(jax.value_and_grad(lambda x, y, z: loss(x, y, z).sum()))
    for y in (jnp.zeros_like(EXTREME), jnp.ones_like(EXTREME), jnp.full_like(EXTREME, 0.3)):
        for z in (jnp.ones_like(y), jnp.zeros_like(y)):
            value, gradient = step(EXTREME, y, z)
            assert np.isfinite(value) and np.isfinite(gradient).all()


def test_half_precision_is_computed_in_float32():
    x, y, _ = single(*batch())
    half = x.astype(jnp.bfloat16)
    for loss in losses.NAMES.values():
        np.testing.assert_array_equal(loss(half, y), loss(half.astype(jnp.float32), y))
        assert loss(half, y).dtype == jnp.float32


@pytest.mark.parametrize("name", sorted(losses.NAMES))
@pytest.mark.parametrize("how", ["mean", "batch_mean", "sum"])
def test_nothing_known_and_one_label(name, how):
    x = EXTREME[:, :1]
    none = jnp.zeros_like(x)

    def loss(x):
        return losses.reduce(losses.NAMES[name](x, none, none), none, how=how)

    value, gradient = jax.jit(jax.value_and_grad(loss))(x)
    assert value == 0
    np.testing.assert_array_equal(gradient, none)
    one = jax.value_and_grad(lambda x: losses.NAMES[name](x, none + 1).sum())(x)
    assert all(np.isfinite(part).all() for part in one)


def test_reduce_by_hand():
    values = jnp.asarray([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    weights = jnp.asarray([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert losses.reduce(values, weights, how="sum") == 9
    assert losses.reduce(values, weights, how="mean") == 3
    assert losses.reduce(values, weights, how="batch_mean") == 4.5
    # an image without a known label counts as an image if the mask says so
    assert losses.reduce(values, weights, how="batch_mean", mask=jnp.asarray([1.0, 1.0, 1.0])) == 3
    broken = values.at[2, 2].set(jnp.inf)
    assert losses.reduce(broken, weights, how="mean") == 3
    with pytest.raises(UserError, match="did you mean 'mean'"):
        losses.reduce(values, weights, how="maen")


def test_entries():
    observed = jnp.asarray([[1, 0], [0, 1]], jnp.uint8)
    mask = jnp.asarray([1.0, 0.0])
    np.testing.assert_array_equal(losses.entries("bce", observed, mask), [[1, 0], [0, 0]])
    np.testing.assert_array_equal(losses.entries("an", observed, mask), [[1, 1], [0, 0]])
    np.testing.assert_array_equal(losses.entries("bce", observed), observed)


def test_partial_bce_as_mean_over_known():
    x, y, z = single(*batch())
    values = losses.partial_bce(x, y, z, alpha=1.0, beta=0.0, gamma=-1.0)
    per_image = [np.sum(losses.bce(x, y, z)[i]) / max(np.sum(z[i]), 1) for i in range(4)]
    np.testing.assert_allclose(losses.reduce(values, z, how="batch_mean"), np.mean(per_image), rtol=1e-5)


def test_config_errors():
    with pytest.raises(UserError, match="did you mean 'gamma_neg'"):
        losses.make({"name": "asl", "gama_neg": 4})
    with pytest.raises(UserError, match="did you mean 'focal'"):
        losses.make({"name": "focl"})
    with pytest.raises(UserError, match="config.loss.name is missing"):
        losses.make({})
    with pytest.raises(UserError, match="no setting 'observed'"):
        losses.make({"name": "bce", "observed": 1})
    with pytest.raises(UserError, match="clip=1"):
        losses.asl(FIXTURE_X, FIXTURE_Y, clip=1.0)


def test_single_label_extremes():
    value, gradient = jax.value_and_grad(lambda x: losses.asl_single_label(x, jnp.asarray([0, 1])).sum())(EXTREME)
    assert np.isfinite(value) and np.isfinite(gradient).all()
