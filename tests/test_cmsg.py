"""CMSG against a plain numpy forward pass, its options, and what it says when the data cannot give what it needs."""

import jax
import numpy as np
import pytest

import toy
from mljax.errors import UserError
from mljax.losses.criterion import Criterion
from mljax.systems.cmsg import CMSG

L, D, E, K = 5, 8, 6, 2


def meta(vectors=E):
    return toy.meta(L, vectors=vectors, classes=tuple("abcde"))


def build(**settings):
    defaults = {
        "width": D,
        "ffn": 12,
        "sga_heads": K,
        "saa_heads": K,
        "sga_layers": 2,
        "saa_layers": 2,
        "threshold": 0.1,
    }
    loss = Criterion.from_config({"name": "asl", "reduction": "batch_mean"})
    return CMSG(backbone=None, criterion=loss, meta=settings.pop("meta", meta()), **(defaults | settings))


def batch(seed=0):
    return toy.batch((3, 2, 4, 7), np.zeros((3, L)), seed=seed)


def softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def dense(p, x):
    return x @ p["kernel"] + p.get("bias", 0)


def layer(p, x, memory, change):
    """A post-norm transformer layer, head by head."""
    a, out = p["attention"], np.zeros_like(x)
    q, k, v = dense(a["query"], x), dense(a["key"], memory), dense(a["value"], memory)
    size = D // K
    for head in range(K):
        part = slice(head * size, (head + 1) * size)
        for i in range(len(x)):
            scores = change(q[i, :, part] @ k[i, :, part].T / np.sqrt(size))
            out[i, :, part] = softmax(scores, -1) @ v[i, :, part]
    x = norm(p["norm1"], x + dense(a["out"], out))
    return norm(p["norm2"], x + dense(p["ffn"]["out"], np.maximum(dense(p["ffn"]["in"], x), 0)))


def correlation(vectors, threshold=0.1, p=0.2):
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine, s = unit @ unit.T, np.zeros((L, L))
    for i in range(L):
        near = [j for j in range(L) if j != i and cosine[i, j] >= threshold]
        for j in near:
            s[i, j] = p / len(near)
        s[i, i] = 1 - p if near else 1
    return s


@pytest.mark.parametrize("mode", ["add", "multiply", "mask", "none"])
def test_forward_equals_numpy(mode):
    module, data = build(mode=mode), batch()
    variables = jax.device_get(module.init(jax.random.key(0), data))
    p, s = variables["params"], correlation(meta().vectors)
    change = {
        "add": lambda scores: scores + s,
        "multiply": lambda scores: scores * s,
        "mask": lambda scores: np.where((s > 0) | np.eye(L, dtype=bool), scores, -np.inf),
        "none": lambda scores: scores,
    }[mode]
    tokens = data["endpoints"]["32"].reshape(3, 8, 7)
    gates = 1 / (1 + np.exp(-dense(p["pooling"]["score"], tokens)))
    x = np.einsum("bnl,bnd->bld", gates, dense(p["pooling"]["transform"], tokens))
    for i in range(2):
        x = layer(p[f"sga_{i}"], x, x, change)
    memory = dense(p["memory"], tokens)
    for i in range(2):
        x = layer(p[f"saa_{i}"], x, memory, lambda scores: scores)
    logits = np.einsum("bld,ld->bl", x, p["classifier"]["kernel"]) + p["classifier"]["bias"]
    out = module.apply(variables, data)
    np.testing.assert_allclose(out.logits, logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(out.label_features, x, rtol=1e-4, atol=1e-5)
    assert out.attention.shape == (3, K, L, 2, 4)


def test_correlation_is_a_constant_of_the_checkpoint():
    variables = build().init(jax.random.key(0), batch())
    np.testing.assert_allclose(variables["constants"]["correlation"], correlation(meta().vectors), atol=1e-6)


def test_modes_differ_and_ablations_drop_parts():
    data = batch()
    names = lambda m: set(m.init(jax.random.key(0), data)["params"])  # noqa: E731
    assert not any(n.startswith("sga") for n in names(build(sga_layers=0)))
    assert not any(n.startswith(("saa", "memory")) for n in names(build(saa_layers=0)))
    assert "constants" not in build(mode="none").init(jax.random.key(0), data)
    variables = build(mode="none").init(jax.random.key(0), data)
    with_s = build(mode="add").init(jax.random.key(0), data)
    a = build(mode="none").apply(variables, data).logits
    b = build(mode="add").apply({**with_s, "params": variables["params"]}, data).logits
    assert np.abs(a - b).max() > 1e-4


def test_masked_attention_gives_no_weight_to_unrelated_labels():
    module, data = build(mode="mask"), batch()
    variables = module.init(jax.random.key(0), data)
    weights = module.apply(variables, data).extra["label_attention"]
    allowed = correlation(meta().vectors) > 0
    assert np.asarray(weights)[..., ~allowed].max() == 0
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


def test_label_queried_features_attend():
    module, data = build(features="label_queried"), batch()
    out = module.apply(module.init(jax.random.key(0), data), data)
    np.testing.assert_allclose(out.attention.sum((-2, -1)), 1, rtol=1e-5)


def test_what_the_data_cannot_give_is_said():
    with pytest.raises(UserError, match=r"needs label vectors.*cooccurrence"):
        build(meta=meta(vectors=None))
    with pytest.raises(UserError, match="label_queried' needs label vectors"):
        build(meta=meta(vectors=None), features="label_queried", correlation="none")
    build(meta=meta(vectors=None), correlation="cooccurrence")
    with pytest.raises(UserError, match="did you mean 'multiply'"):
        build(mode="multipl")
    with pytest.raises(UserError, match="3 heads do not divide the width 8"):
        module = build(sga_heads=3)
        module.init(jax.random.key(0), batch())
