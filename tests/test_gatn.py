"""GATN against the authors' golden case and plain loops, graphs with negative rows, what the data cannot give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import released_names
import toy
from mljax.config.reading import read_config
from mljax.errors import UserError
from mljax.losses.criterion import Criterion
from mljax.systems import _graph
from mljax.systems.gatn import GATN
from mljax.weights import published
from toy import close, weights

L, D, E = 6, 7, 4


def meta(vectors=E, count=L):
    return toy.meta(count, vectors=vectors)


def build(facts=None, **settings):
    facts = meta() if facts is None else facts
    return GATN(backbone=None, criterion=Criterion.from_config({"name": "bce"}), meta=facts, **{"width": 5, **settings})


def batch(feature_map=(3, 2, 4, D), count=L):
    return toy.batch(feature_map, count, seed=2)


@pytest.fixture(scope="module")
def golden():
    return toy.golden("gatn")


@pytest.fixture(scope="module")
def state(golden):
    return weights(golden)


def test_golden_case_through_the_conversion(golden, state):
    module = build(meta(golden["in/label_vectors"], count=10), width=24, low=0.2)
    data = batch(golden["in/feature_map"].transpose(0, 2, 3, 1), count=10)
    variables = published.convert_head(state, module)
    variables["constants"]["correlation"] = golden["out/correlation_A1"]  # the case's cosines are not of its vectors
    out, captured = module.apply(variables, data, capture_intermediates=True, mutable=["intermediates"])
    close(out.logits, golden["out/logits"])
    learned = captured["intermediates"]["transformer"]["__call__"][0]
    close(learned, golden["out/transformed_adjacency"])
    close(_graph.normalise(learned + jnp.eye(10)), golden["out/adjacency_normalised"])


def attention(p, x, heads):
    """Multi-head self-attention of rows, head by head."""
    project = lambda name, x: x @ p[name]["kernel"] + p[name]["bias"]  # noqa: E731
    q, k, v, size = project("query", x), project("key", x), project("value", x), x.shape[1] // heads
    merged = np.zeros_like(x)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        weights = np.exp(q[:, part] @ k[:, part].T / np.sqrt(size))
        merged[:, part] = weights / weights.sum(1, keepdims=True) @ v[:, part]
    return project("out", merged)


@pytest.mark.parametrize("heads", [1, 3])
def test_forward_equals_loops(heads):
    low, high = 0.0, 0.6
    module, data = build(heads=heads, low=low, high=high), batch()
    variables = jax.device_get(module.init(jax.random.key(0), data))
    p, vectors = variables["params"], meta().vectors
    a = np.zeros((L, L))
    for i in range(L):
        for j in range(L):
            cosine = vectors[i] @ vectors[j] / np.linalg.norm(vectors[i]) / np.linalg.norm(vectors[j])
            a[i, j] = i != j and low <= cosine < high
    a = 0.25 * a / (a.sum(0) + 1e-6)
    close(variables["constants"]["correlation"], a)
    x = a - a.mean(1, keepdims=True)
    x = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-6)  # the block's LayerNorm, at its start scale 1 and bias 0
    t = p["transformer"]
    graph = attention(t["attention1"], x, heads) @ attention(t["attention2"], x, heads) + np.eye(L)
    degree = np.abs(graph.sum(1))
    normal = np.array([[graph[j, i] / np.sqrt(degree[i] * degree[j]) for j in range(L)] for i in range(L)])
    hidden = normal @ vectors @ p["gcn"]["gc1"]["kernel"]
    classifiers = normal @ np.where(hidden > 0, hidden, 0.2 * hidden) @ p["gcn"]["gc2"]["kernel"]
    close(module.apply(variables, data).logits, data["endpoints"]["32"].max((1, 2)) @ classifiers.T)


def test_rows_that_sum_to_nothing_or_less_give_numbers_and_gradients():
    """The authors' power -1/2 is NaN or infinite for these rows; rows that sum to more are as theirs."""
    matrix = np.array([[2.0, 1.0, 1.0], [-3.0, 1.0, 1.0], [0.0, 0.5, -0.5]], np.float32)
    found = _graph.normalise(jnp.asarray(matrix))
    scale = np.array([4.0**-0.5, 1.0, 0.0])
    np.testing.assert_allclose(found, scale[:, None] * matrix.T * scale, rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda m: jnp.square(_graph.normalise(m)).sum()))(jnp.asarray(matrix))
    assert np.isfinite(gradient).all() and np.abs(gradient[:2]).max() > 0


def test_a_block_with_negative_rows_trains():
    module, data = build(), batch()
    variables = jax.device_get(module.init(jax.random.key(0), data))
    block = variables["params"]["transformer"]
    for name, sign in (("attention1", 1.0), ("attention2", -1.0)):
        block[name]["out"]["bias"] = np.full(L, sign, np.float32)  # every entry of the product near -L

    def loss(params):
        return module.apply({**variables, "params": params}, data, 0, method="loss")[0]

    value, gradients = jax.jit(jax.value_and_grad(loss))(variables["params"])
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradients["gcn"]))


@pytest.mark.parametrize(("count", "heads"), [(80, 5), (20, 5), (81, 3), (12, 4), (7, 1), (1, 1)])
def test_heads_divide_the_labels(count, heads):
    assert build(meta(count=count)).num_heads == heads


def test_what_the_data_cannot_give_is_said():
    with pytest.raises(UserError, match="GATN makes its classifiers from label vectors and 'toy' has none; set config"):
        build(meta(vectors=None))
    with pytest.raises(
        UserError, match=r"heads is 4 and .* as wide as 'toy' has labels, 6; expected one of 1, 2, 3, 6"
    ):
        build(heads=4)
    with pytest.raises(UserError, match="low is 0.5 and high is 0.5; expected low below high"):
        build(low=0.5, high=0.5)


def test_older_names_of_the_trunk():
    new = {"backbone.0.weight": np.ones(1), "gc1.weight": np.ones((2, 2))}
    for old in ("features.", "features.module.", "module.features.", "backbone.module."):
        state = {name.replace("backbone.", old): value for name, value in new.items()}
        trunk, head = published.split(state, published.of(build()))
        assert set(trunk) == {"0.weight"} and set(head) == {"gc1.weight"}


def test_checkpoints_that_do_not_fit_are_refused(state):
    facts = meta(count=10)
    with pytest.raises(UserError, match=r"no 'transformerblock.attn2.out.weight'"):
        lacking = {k: v for k, v in state.items() if k != "transformerblock.attn2.out.weight"}
        published.convert_head(lacking, build(facts))
    with pytest.raises(UserError, match=r"no place for 'transformerblock.attn3.out.bias'"):
        published.convert_head({**state, "transformerblock.attn3.out.bias": np.zeros(10)}, build(facts))


def test_full_size_names_and_shapes_are_those_of_the_released_files():
    state = released_names.state_dict("GATN (ResNeXt-101 32x16d)")
    facts = meta(np.zeros((80, 300), np.float32), count=80)
    released_names.fits(read_config("configs/gatn.py:coco2014").unlock(), facts, state)
