"""Losses of a whole batch against plain loops, the authors' golden cases, and jit against pmap."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toy
from mljax import losses
from mljax.losses import contrastive, numeric, weak_labels
from test_losses import assert_golden, batch, sigmoid, single


@pytest.fixture(scope="module")
def golden():
    return toy.golden("losses")


@pytest.fixture(scope="module")
def known(golden):
    """The partial labels of the golden cases as (labels, observed)."""
    t = golden["in/partial_labels"]
    return jnp.asarray(np.float32(t == 1)), jnp.asarray(np.float32(t != 0))


def test_role_golden(golden):
    single = jnp.asarray(golden["in/single_positive_labels"])
    x, theta = jnp.asarray(golden["in/logits_normal"]), jnp.asarray(golden["in/role_theta"])
    assert_golden(golden, "spml_role/normal", lambda x, t: weak_labels.role(x, t, single, expected=2.9), x, theta)


def test_cooccurrence_golden(golden, known):
    pairs = jnp.asarray(golden["in/ist_pair_logits_normal"])
    name = "sst_ist/gn2_gp1_clip0.05_mean/normal"
    assert_golden(golden, name, lambda x: weak_labels.cooccurrence_loss(x, *known).mean(), pairs)


def ternary(labels, observed, pseudo):
    """The repositories' code after a pseudo-label rule: 1, -1, 0 unknown."""
    return np.asarray(labels * 2 - observed + pseudo)


@pytest.mark.parametrize("threshold", ["0.95", "0.75", "0.5", "0.3"])
def test_pseudo_labels_golden(golden, known, threshold):
    labels, observed = known
    scores = weak_labels.cooccurrence_scores(jnp.asarray(golden["in/ist_pair_logits_normal"]), *known)
    pseudo = weak_labels.pseudo_positives(scores, observed, float(threshold))
    wanted = golden[f"out/sst_ist_pseudo/theta{threshold}/normal"]
    np.testing.assert_array_equal(ternary(labels, observed, pseudo), wanted)


@pytest.mark.parametrize("threshold", ["0.95", "0.75", "0.5", "0.3", "0.1"])
def test_memory_golden(golden, known, threshold):
    labels, observed = known
    features, memory = jnp.asarray(golden["in/cst_feature"]), jnp.asarray(golden["in/cst_queue"])
    scores = weak_labels.memory_scores(features, memory)
    np.testing.assert_allclose(scores, golden["out/sst_cst_mean_cosine"], rtol=1e-5, atol=1e-6)
    pseudo = weak_labels.pseudo_positives(scores, observed, float(threshold))
    wanted = golden[f"out/sst_cst_pseudo/theta{threshold}"]
    np.testing.assert_array_equal(ternary(labels, observed, pseudo), wanted)


def test_cross_image_golden(golden, known):
    features = jnp.asarray(golden["in/cst_feature"])
    np.testing.assert_array_equal(contrastive.image_pairs(8), golden["out/sst_cst_pair_index"])
    in_order = jnp.arange(28 * 12, dtype=jnp.float32).reshape(28, 12)
    name = "sst_cst_contrastive/randperm_is_identity"
    assert_golden(golden, name, lambda f: contrastive.cross_image(f, *known, draws=in_order), features)


def test_supervised_contrastive_golden(golden):
    features, rows = jnp.asarray(golden["in/supcon_features"]), jnp.asarray(golden["in/supcon_labels"])
    first = (jnp.arange(18) < 14).astype(jnp.float32)
    loss = contrastive.supervised_contrastive
    assert_golden(golden, "mulcon_supcon/tau0.2_lenpos14", lambda z: loss(z, rows), features)
    assert_golden(golden, "mulcon_supcon/tau0.2_active_only", lambda z: loss(z, rows, first), features)
    assert_golden(golden, "mulcon_supcon/tau0.07_base0.07", lambda z: loss(z, rows, temperature=0.07), features)


def test_candidate_weights_by_hand():
    confidence = jnp.asarray([[0.7, 0.5], [0.5, 0.1], [0.9, 0.9]])
    candidates = jnp.asarray([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    np.testing.assert_array_equal(weak_labels.candidate_weights(confidence, candidates), [[1, 0], [0, 0], [1, 1]])
    # class means .6 and .3, overall .45: a candidate passes from .15 above its class mean
    np.testing.assert_array_equal(
        weak_labels.candidate_weights(confidence, candidates, difficulty_aware=True), [[0, 1], [0, 0], [1, 1]]
    )


def test_ranking_loop():
    x, y, z = batch(l=6)
    y[0] = 0
    p = 1 / (1 + np.exp(-x))
    wanted = np.zeros_like(x)
    for i, j in np.argwhere(y == 1):
        wanted[i, j] = sum(max(0, 1 - p[i, j] + p[i, m]) for m in range(6) if y[i, m] == 0)
    np.testing.assert_allclose(contrastive.ranking(*single(x, y, z)), wanted, rtol=1e-5, atol=1e-6)


def loop_supervised(z, y, active, temperature):
    total, anchors = 0.0, 0
    for i in range(len(z)):
        if not active[i] or not y[i].any():
            continue
        anchors += 1
        others = [j for j in range(len(z)) if j != i and active[j]]
        same = [j for j in others if y[j] @ y[i] > 0]
        logs = np.log(sum(np.exp(z[i] @ z[j] / temperature) for j in others)) if others else 0
        total += -np.mean([z[i] @ z[j] / temperature - logs for j in same]) if same else 0
    return total, anchors


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
def test_supervised_contrastive_loop(share):
    rng = np.random.default_rng(1)
    z = rng.normal(size=(24, 7))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    y = np.eye(4)[rng.integers(0, 4, 24)]
    y[:3] = 0
    active = np.float64(rng.random(24) < share)
    total, anchors = loop_supervised(z, y, active, 0.1)
    arguments = single(z, y, active)
    loss = jax.jit(contrastive.supervised_contrastive, static_argnames=("how", "temperature", "base_temperature"))
    loss = functools.partial(loss, temperature=0.1)
    np.testing.assert_allclose(loss(*arguments, how="sum"), total, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        loss(*arguments, base_temperature=0.2), total / max(anchors, 1) / 2, rtol=1e-5, atol=1e-6
    )
    gradient = jax.grad(loss)(*arguments)
    assert np.isfinite(gradient).all()
    assert not np.any(np.asarray(gradient)[active == 0])


def test_supervised_contrastive_memory():
    """The loss and its gradient hold little more than one n x n matrix, and no inactive row leaks a NaN."""
    n = 768
    z = jnp.full((n, 8), 1e3).at[: n // 2].set(0.3)
    active = (jnp.arange(n) < n // 2).astype(jnp.float32)
    rows = jnp.zeros((n, 3)).at[:, 0].set(1)
    compiled = jax.jit(jax.value_and_grad(contrastive.supervised_contrastive)).lower(z, rows, active).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2.5 * n * n * 4
    value, gradient = compiled(z, rows, active)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def loop_cross_image(f, y, z, draws):
    f = f / np.linalg.norm(f, axis=-1, keepdims=True)
    pairs = [(n, m) for n in range(len(f)) for m in range(n + 1, len(f))]
    groups = {0: [], 1: [], 2: []}
    for k, (n, m) in enumerate(pairs):
        for c in range(f.shape[1]):
            if z[n, c] and z[m, c]:
                groups[int(y[n, c] + y[m, c])].append((f[n, c] @ f[m, c], draws[k, c]))
    kept = [1 - cosine for cosine, _ in groups[2]]
    p = len(groups[2])
    for group in (groups[0], groups[1]):
        random = sorted(group, key=lambda item: item[1])[: 2 * p] if p else group
        hard = sorted(group, key=lambda item: -item[0])[:p]
        kept += [1 + cosine for cosine, _ in [*random, *hard]]
    return np.mean(kept) if kept else 0.0


@pytest.mark.parametrize("known", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("positive", [0.0, 0.3, 0.9])
def test_cross_image_loop(known, positive):
    rng = np.random.default_rng(2)
    f, z = rng.normal(size=(5, 4, 6)), np.float64(rng.random((5, 4)) < known)
    y, draws = z * (rng.random((5, 4)) < positive), rng.permutation(40).reshape(10, 4) / 40.0
    found = jax.jit(contrastive.cross_image)(*single(f, y, z), draws=jnp.asarray(draws, jnp.float32))
    np.testing.assert_allclose(found, loop_cross_image(f, y, z, draws), rtol=1e-5, atol=1e-6)


def test_cross_image_with_a_key():
    features, y, z = single(np.random.default_rng(0).normal(size=(4, 5, 3)), *batch()[1:])
    key = jax.random.key(0)
    step = jax.jit(jax.value_and_grad(lambda f: contrastive.cross_image(f, y, z, key=key)))
    value, _ = step(features)
    wanted = loop_cross_image(*map(np.float64, (features, y, z, jax.random.uniform(key, (6, 5)))))
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    assert np.isfinite(step(jnp.zeros_like(features))[1]).all()
    with pytest.raises(ValueError, match="key or draws"):
        contrastive.cross_image(features, y, z)


def test_pseudo_label_scores_loop():
    rng = np.random.default_rng(3)
    pair_logits, memory, features = rng.normal(size=(3, 6)), rng.normal(size=(4, 5, 7)), rng.normal(size=(3, 4, 7))
    memory[1, 2:] = 0
    z = np.float64(rng.random((3, 4)) < 0.7)
    y = z * (rng.random((3, 4)) < 0.6)
    y[2] = 0
    assert weak_labels.pair_index(80).shape == (2, 3160)
    pairs = [tuple(pair) for pair in weak_labels.pair_index(4).T.tolist()]
    assert pairs == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    together, cosines = np.zeros((3, 4)), np.zeros((3, 4))
    for i in range(3):
        for a in range(4):
            known = [b for b in range(4) if y[i, b]]
            probabilities = [
                1 if a == b else sigmoid(pair_logits[i, pairs.index((min(a, b), max(a, b)))]) for b in known
            ]
            together[i, a] = sum(probabilities) / max(len(known), 1)
            f = features[i, a] / np.linalg.norm(features[i, a])
            cosines[i, a] = np.mean([f @ m / max(np.linalg.norm(m), 1e-8) for m in memory[a]])
    found = jax.jit(weak_labels.cooccurrence_scores)(*single(pair_logits, y, z))
    np.testing.assert_allclose(found, together, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        jax.jit(weak_labels.memory_scores)(*single(features, memory)), cosines, rtol=1e-5, atol=1e-6
    )
    pseudo = weak_labels.pseudo_positives(found, jnp.asarray(z, jnp.float32), 0.5)
    np.testing.assert_array_equal(pseudo, (together >= 0.5) & (z == 0))


def whole_batch_losses():
    """Every scalar loss as f(logits (b l), features (b l d), labels, observed, mask, axis)."""

    def reduced(how):
        def loss(x, f, y, z, mask, axis):
            return losses.reduce(losses.bce(x, y, z), losses.entries("bce", z, mask), how=how, mask=mask, axis=axis)

        return loss

    def supervised(x, f, y, z, mask, axis):
        rows = jnp.tile(jnp.eye(y.shape[1]), (y.shape[0], 1))
        vectors = numeric.unit(f.reshape(-1, f.shape[-1]))
        active = (y * mask[:, None]).reshape(-1)
        return contrastive.supervised_contrastive(vectors, rows, active, axis=axis)

    def cross(x, f, y, z, mask, axis):
        return contrastive.cross_image(f, y, z * mask[:, None], key=jax.random.key(1), axis=axis)

    def role(x, f, y, z, mask, axis):
        return weak_labels.role(x, f[..., 0], y, expected=1.5, mask=mask, axis=axis)

    def epr(x, f, y, z, mask, axis):
        return weak_labels.epr(x, y, expected=1.5, mask=mask, axis=axis)

    hows = {how: reduced(how) for how in ("mean", "batch_mean", "sum")}
    return hows | {"supervised": supervised, "cross": cross, "role": role, "epr": epr}


@pytest.mark.parametrize("name", whole_batch_losses())
def test_pmap_equals_jit(name):
    """The mean over devices of losses and gradients is that of the global batch, unequal devices included."""
    loss = whole_batch_losses()[name]
    x, y, z = single(*batch(b=6))
    z = z.at[0].set(0)
    features = jnp.asarray(np.random.default_rng(5).normal(size=(6, 5, 4)), jnp.float32)
    mask = jnp.asarray([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    arrays = (x, features, y * z, z, mask)
    value, gradient = jax.jit(jax.value_and_grad(functools.partial(loss, axis=None), argnums=(0, 1)))(*arrays)
    split = [a.reshape(2, 3, *a.shape[1:]) for a in arrays]
    each = jax.pmap(jax.value_and_grad(functools.partial(loss, axis="data"), argnums=(0, 1)), axis_name="data")
    values, gradients = each(*split)
    np.testing.assert_allclose(values.mean(), value, rtol=1e-5)
    for found, wanted in zip(gradients, gradient):
        # a row lives on one device, so that the mean of the gradients over devices is half of what is found there
        np.testing.assert_allclose(found.reshape(wanted.shape) / 2, wanted, rtol=1e-4, atol=1e-7)


def test_expected_positives_by_hand():
    p = jnp.asarray([[0.5, 0.5, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    mask = jnp.asarray([1.0, 1.0, 0.0])
    np.testing.assert_allclose(weak_labels.expected_positives(p, 1.0, mask=mask), (1.5 / 3) ** 2, rtol=1e-6)
    assert weak_labels.expected_positives(p, 1.0, mask=jnp.zeros(3)) == 0
