"""ML-GCN against the authors' golden case and plain loops; where its graph comes from; what the data cannot give."""

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
from mljax.systems.ml_gcn import MLGCN
from mljax.types import Meta
from mljax.weights import published
from toy import close, weights

L, D, E = 6, 7, 10


def labels_of(kind="several"):
    rng = np.random.default_rng(0)
    if kind == "one each":
        return np.eye(L, dtype=np.uint8)[rng.integers(0, L, 40)]
    return (rng.random((40, L)) < np.array([0.9, 0.6, 0.4, 0.3, 0.2, 0.1])).astype(np.uint8)


def meta(labels=None, observed=None, vectors=E):
    return toy.meta(labels_of() if labels is None else labels, observed=observed, vectors=vectors)


def build(facts=None, **settings):
    facts = meta() if facts is None else facts
    return MLGCN(
        backbone=None, criterion=Criterion.from_config({"name": "bce"}), meta=facts, **{"width": 5, **settings}
    )


def batch(feature_map=(3, 2, 4, D)):
    return toy.batch(feature_map, L, seed=2)


@pytest.fixture(scope="module")
def golden():
    return toy.golden("ml_gcn")


def test_golden_case_through_the_conversion(golden):
    state = weights(golden)
    module = build(meta(vectors=golden["in/label_vectors"]), width=24)
    data = batch(golden["in/feature_map"].transpose(0, 2, 3, 1))
    variables = published.convert_head(state, module)
    close(variables["constants"]["adjacency"], golden["out/adjacency_A"])
    out, state = module.apply(variables, data, capture_intermediates=True, mutable=["intermediates"])
    close(out.logits, golden["out/logits"])
    close(state["intermediates"]["gcn"]["__call__"][0], golden["out/classifier_weights"])
    close(_graph.normalise(jnp.asarray(golden["out/adjacency_A"])), golden["out/adjacency_normalised"])


def graph(labels, observed, threshold, p):
    """A by loops over images and labels: P(j | i) among images where both are known."""
    edges, a = np.zeros((L, L)), np.eye(L)
    for i in range(L):
        for j in range(L):
            known = [n for n in range(len(labels)) if labels[n, i] and observed[n, i] and observed[n, j]]
            if i != j and known:
                edges[i, j] = sum(int(labels[n, j]) for n in known) / len(known) >= threshold
    for i in range(L):
        for j in range(L):
            a[i, j] += p / (1 - p) * edges[i, j] / (edges[:, j].sum() + 1e-6)
    return a


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize(("threshold", "p"), [(0.4, 0.2), (0.25, 0.5)])
def test_graph_equals_loops(share, threshold, p):
    labels = labels_of()
    observed = (np.random.default_rng(3).random(labels.shape) < share).astype(np.uint8)
    facts = meta(labels, observed)
    wanted = graph(facts.labels, observed, threshold, p)
    assert 0 < (wanted > 0).sum() - L < L * (L - 1)
    close(build(facts, threshold=threshold, p=p).adjacency, wanted)


def test_forward_and_loss_equal_loops():
    module, data = build(), batch()
    variables = jax.device_get(module.init(jax.random.key(0), data))
    a = graph(labels_of(), np.ones((40, L)), 0.4, 0.2)
    degree = a.sum(1)
    normal = np.array([[a[j, i] / np.sqrt(degree[i] * degree[j]) for j in range(L)] for i in range(L)])  # transposed
    w1, w2 = (variables["params"]["gcn"][name]["kernel"] for name in ("gc1", "gc2"))
    hidden = normal @ meta().vectors @ w1
    classifiers = normal @ np.where(hidden > 0, hidden, 0.2 * hidden) @ w2
    features = data["endpoints"]["32"]
    logits = np.array([[features[b].reshape(-1, D).max(0) @ classifiers[l] for l in range(L)] for b in range(3)])
    out = module.apply(variables, data)
    close(out.logits, logits)
    scores = np.exp(np.einsum("bhwd,ld->blhw", features, classifiers))
    close(out.attention[:, 0], scores / scores.sum((2, 3), keepdims=True))
    p, y = 1 / (1 + np.exp(-logits)), data["labels"]
    loss, terms = module.apply(variables, data, 0, method="loss")
    close(loss, -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean())
    assert terms == {}


def test_initial_weights_are_uniform_within_one_over_the_root_of_the_outputs():
    params = build(width=400).init(jax.random.key(0), batch())["params"]["gcn"]
    for kernel, outputs in ((params["gc1"]["kernel"], 400), (params["gc2"]["kernel"], D)):
        bound = outputs**-0.5
        assert 0.98 * bound < np.abs(kernel).max() <= bound
        np.testing.assert_allclose(np.std(kernel), bound / 3**0.5, rtol=0.05)


def test_other_sources_of_the_graph():
    np.testing.assert_array_equal(build(correlation="none").adjacency, np.eye(L))
    vectors = meta().vectors / np.linalg.norm(meta().vectors, axis=1, keepdims=True)
    edges = (vectors @ vectors.T >= 0.01) & ~np.eye(L, dtype=bool)
    wanted = np.eye(L) + 0.25 * edges / (edges.sum(0, keepdims=True) + 1e-6)
    assert edges.any()
    close(build(meta(labels_of("one each")), correlation="vectors", threshold=0.01).adjacency, wanted)
    np.testing.assert_array_equal(build(threshold=1.1).adjacency, np.eye(L))


def test_a_released_checkpoint_needs_no_training_labels():
    """What `mljax.weights.published` builds from class names alone; the checkpoint brings the graph."""
    np.testing.assert_array_equal(build(meta(np.zeros((0, L), np.uint8))).adjacency, np.eye(L))


def test_what_the_data_cannot_give_is_said():
    facts = meta()
    without = Meta(name="toy", classes=facts.classes, labels=facts.labels, observed=facts.observed)
    with pytest.raises(
        UserError, match="ML-GCN makes its classifiers from label vectors and 'toy' has none; set config"
    ):
        build(without)
    with pytest.raises(UserError, match=r"no training image of 'toy' has two known positive labels; .*'vectors'"):
        build(meta(labels_of("one each")))
    with pytest.raises(UserError, match=r"correlation is 'cooccurence'; expected .* \(did you mean 'cooccurrence'"):
        build(correlation="cooccurence")
    with pytest.raises(UserError, match=r"p is 1.0; expected the share of the neighbours, from 0 to below 1"):
        build(p=1.0)


def test_checkpoints_that_do_not_fit_are_refused(golden):
    state = weights(golden)
    with pytest.raises(UserError, match="no 'gc2.weight'"):
        published.convert_head({k: v for k, v in state.items() if k != "gc2.weight"}, build())
    with pytest.raises(UserError, match="no place for 'gc3.weight'"):
        published.convert_head({**state, "gc3.weight": state["gc2.weight"]}, build())


def test_full_size_names_and_shapes_are_those_of_the_released_files():
    state = released_names.state_dict("ML-GCN", trunk="features.")
    vectors = np.zeros((80, 300), np.float32)
    released_names.fits(
        read_config("configs/ml_gcn.py:coco2014").unlock(),
        meta(np.zeros((0, 80), np.uint8), vectors=vectors),
        state,
    )
