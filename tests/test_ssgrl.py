"""SSGRL and what SST and SARB share with it: golden cases, plain numpy references, degenerate labels, bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toy
from mljax.errors import UserError
from mljax.layers import SemanticPooling
from mljax.losses.criterion import Criterion
from mljax.systems import _semantic
from mljax.systems.ssgrl import SSGRL
from mljax.types import Meta
from mljax.weights import published
from toy import close, golden_file

L, E = 6, 12


def meta(vectors=E, labels=None, observed=None, count=L):
    """A training split with some unknown labels, or none at all."""
    return toy.meta(count if labels is None else labels, observed=observed, vectors=vectors)


def build(**settings):
    loss = Criterion.from_config(settings.pop("loss", {"name": "bce"}))
    return SSGRL(backbone=None, criterion=loss, meta=settings.pop("meta", meta()), **({"width": 14} | settings))


def batch(shape=(3, 4, 4, 20), labels=L, observed=0.5, mask=None):
    return toy.batch(shape, labels, observed=observed, mask=mask, seed=1)


# Compiled once for all tests whose modules have equal settings and whose batches have equal shapes.


def init(module, data):
    """Initial variables, but parameters drawn by numpy: the random numbers of JAX take seconds to compile."""

    def whole():
        return module.init({"params": jax.random.key(0), "draw": jax.random.key(1)}, data)

    rng, params = np.random.default_rng(0), jax.eval_shape(whole)["params"]
    rest = jax.jit(lambda: {name: value for name, value in whole().items() if name != "params"})()
    params = jax.tree.map(lambda p: rng.normal(0, (p.shape or (1,))[0] ** -0.5, p.shape).astype(np.float32), params)
    return {"params": params, **rest}


@functools.partial(jax.jit, static_argnums=0)
def apply(module, variables, data):
    return module.apply(variables, data)


def shapes(module, data):
    """Those of the variables, without computing anything."""
    return jax.tree.map(jnp.shape, jax.eval_shape(lambda: module.init(jax.random.key(0), data)))


def nhwc(x):
    return {"endpoints": {"32": np.moveaxis(x, 1, -1)}}


@pytest.fixture(scope="module")
def golden():
    return toy.golden("ssgrl")


@pytest.mark.parametrize(("gate", "name"), [("released", "as_released"), ("fixed", "reset_gate_fixed")])
def test_golden(golden, tmp_path, gate, name):
    np.save(tmp_path / "graph.npy", golden["in/adjacency"])
    facts = meta(vectors=golden["in/word_features"])
    module = build(meta=facts, hidden=16, pool=1, reset_gate=gate, graph=str(tmp_path / "graph.npy"))
    variables = published.convert_head(toy.below("w/", golden), module)
    out = apply(module, variables, nhwc(golden["in/feature_map"]))
    close(out.label_features, golden["out/semantic_feature"])
    close(out.extra["propagated"], golden[f"out/ggnn_{name}"])
    close(out.logits, golden[f"out/logits_{name}"])
    assert out.attention.shape == (2, 1, L, 4, 4)
    close(out.attention.sum((-1, -2)), 1)
    assert jax.tree.map(jnp.shape, variables) == shapes(module, nhwc(golden["in/feature_map"]))


HCP = {
    **{
        f"SemanticDecoupling.fc{i}": f"word_semantic.{name}"
        for i, name in enumerate(("fc_1", "fc_2", "fc_3", "fc_a"), 1)
    },
    **{f"GraphNeuralNetwork.fc_{i}_{part}": f"graph_net.fc_eq{i + 2}_{part}" for i in (1, 2, 3) for part in "wu"},
    **{"fc": "fc_output", "classifiers": "classifiers"},
}


def hcp_names(golden, channels):
    """The golden weights under HCP-MLR-PL's names, behind a convolution from `channels` channels."""
    w, rng, d = toy.below("w/", golden), np.random.default_rng(4), golden["in/feature_map"].shape[1]
    state = {f"{new}.{leaf}": w[f"{old}.{leaf}"] for new, old in HCP.items() for leaf in ("weight", "bias")
             if f"{old}.{leaf}" in w}  # fmt: skip
    graph = golden["in/adjacency"]
    state |= {"inMatrix": graph, "outMatrix": graph.T, "wordFeatures": golden["in/word_features"]}
    state |= {"GraphNeuralNetwork.inMatrix": graph, "GraphNeuralNetwork.outMatrix": graph.T}
    state["changeChannel.0.weight"] = rng.normal(size=(d, channels, 1, 1)).astype(np.float32) / channels**0.5
    for name, value in (("weight", rng.random(d)), ("bias", rng.normal(size=d)), ("running_mean", rng.normal(size=d)),
                        ("running_var", rng.random(d) + 0.5)):  # fmt: skip
        state[f"changeChannel.1.{name}"] = value.astype(np.float32)
    return state | {"backbone.conv1.weight": np.zeros((1, 1, 1, 1), np.float32), "intra_fc_1.bias": np.zeros(2)}


def test_a_network_with_channels_is_converted_too(golden):
    """HCP-MLR-PL's file with changeChannel: as the golden network on the map that convolution and norm make by hand."""
    d, state = golden["in/feature_map"].shape[1], hcp_names(golden, 9)
    module = build(meta=meta(vectors=golden["in/word_features"]), channels=d, hidden=16, pool=1, reset_gate="fixed")
    variables = published.convert_head(state, module)
    wide = np.random.default_rng(5).normal(size=(2, 9, 4, 4)).astype(np.float32)
    assert jax.tree.map(jnp.shape, variables) == shapes(module, nhwc(wide))
    normal = [
        state[f"changeChannel.1.{n}"].reshape(-1, 1, 1) for n in ("running_mean", "running_var", "weight", "bias")
    ]
    reduced = np.einsum("bchw,dc->bdhw", wide, state["changeChannel.0.weight"][:, :, 0, 0])
    reduced = (reduced - normal[0]) / np.sqrt(normal[1] + 1e-5) * normal[2] + normal[3]
    got, by_hand = (apply(module, variables, nhwc(x.astype(np.float32))) for x in (wide, reduced))
    close(got.logits, by_hand.logits, atol=1e-4)
    plain = published.convert_head({k: v for k, v in state.items() if "changeChannel" not in k}, module)
    out = apply(module, {**plain, "batch_stats": {}}, nhwc(golden["in/feature_map"]))
    close(out.logits, golden["out/logits_reset_gate_fixed"])


def test_channels_that_the_file_has_not_are_said(golden, tmp_path):
    np.save(tmp_path / "graph.npy", golden["in/adjacency"])
    facts, d = meta(vectors=golden["in/word_features"]), golden["in/feature_map"].shape[1]
    options = {"meta": facts, "hidden": 16, "pool": 1, "graph": str(tmp_path / "graph.npy")}
    with pytest.raises(UserError, match=f"made with {d} channels and config.system.channels is 7; .* to {d} or None"):
        published.convert_head(toy.below("w/", golden), build(channels=7, **options))
    with pytest.raises(UserError, match=f"reduce the map to {d} channels; set config.system.channels={d}"):
        published.convert_head(hcp_names(golden, 9), build(reset_gate="fixed", **options))
    with pytest.raises(UserError, match="a reset gate of their own; set config.system.reset_gate='fixed'"):
        published.convert_head(hcp_names(golden, 9), build(channels=d, **options))
    same = published.convert_head(toy.below("w/", golden), build(channels=d, **options))
    assert "reduce" not in same["params"]["decoupling"]


def test_a_graph_that_nobody_has_is_asked_for(golden, tmp_path):
    """Class names alone give no graph: SSGRL's files need one beside them, HCP-MLR-PL's bring their own."""
    nothing = meta(golden["in/word_features"], np.zeros((0, L), np.uint8))
    facts = {"meta": nothing, "hidden": 16, "pool": 1}
    state = toy.below("w/", golden)
    with pytest.raises(UserError, match=r"holds no label graph; give --config\.system\.graph=FILE\.npy, or leave out"):
        published.convert_head(state, build(**facts))
    for settings, graph in (({"graph": "none"}, np.eye(L)), ({"steps": 0}, None)):
        found = published.convert_head(state, build(**facts, **settings))["constants"]["adjacency"]
        assert graph is None or (found == graph).all()
    d = golden["in/feature_map"].shape[1]
    own = published.convert_head(hcp_names(golden, 9), build(**facts, channels=d, reset_gate="fixed"))
    np.testing.assert_array_equal(own["constants"]["adjacency"], golden["in/adjacency"])


def test_a_graph_without_edges_is_told(caplog):
    single = np.eye(L, dtype=np.uint8)
    with caplog.at_level("WARNING", "mljax"):
        np.testing.assert_array_equal(_semantic.graph(meta(labels=single)), np.eye(L))
        assert _semantic.graph(meta()).sum() > L
    assert [r.getMessage() for r in caplog.records] == [
        "toy has no image with two known labels: the label graph has no edges."
    ]


def test_checkpoints_of_other_networks_are_refused(golden):
    state = toy.below("w/", golden)
    with pytest.raises(UserError, match=r"no place for 'other\.weight'"):
        published.convert_head(state | {"other.weight": np.zeros(3)}, build(hidden=16))
    del state["fc_output.bias"]
    del state["classifiers.weight"]
    with pytest.raises(UserError, match=r"no 'classifiers\.weight'"):
        published.convert_head(state, build(hidden=16))


def test_semantic_pooling_equals_loops_and_so_does_its_gradient():
    rng = np.random.default_rng(2)
    x, vectors = rng.normal(size=(2, 3, 2, 5)).astype(np.float32), rng.normal(size=(4, 7)).astype(np.float32)
    module = SemanticPooling(6)
    sizes = jax.eval_shape(lambda: module.init(jax.random.key(0), x, vectors))["params"]
    p = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32) / 2, sizes)
    features, attention = jax.jit(module.apply)({"params": p}, x, vectors)
    for i in range(2):
        f = x[i].reshape(6, 5)
        for label in range(4):
            scores = []
            for n in range(6):
                joint = np.tanh((f[n] @ p["image"]["kernel"]) * (vectors[label] @ p["word"]["kernel"]))
                joint = joint @ p["joint"]["kernel"] + p["joint"]["bias"]
                scores.append((joint @ p["score"]["kernel"] + p["score"]["bias"])[0])
            weights = np.exp(scores) / np.exp(scores).sum()
            close(attention[i, :, label], weights)
            close(features[i, label], weights @ f)

    def plain(params, x):
        f = x.reshape(2, 6, 5)
        joint = jnp.tanh((f @ params["image"]["kernel"])[:, :, None] * (vectors @ params["word"]["kernel"])[None, None])
        joint = joint @ params["joint"]["kernel"] + params["joint"]["bias"][None, None, None]
        weights = jax.nn.softmax((joint @ params["score"]["kernel"])[..., 0], axis=1)
        return jnp.sum(jnp.square(jnp.einsum("bnl,bnd->bld", weights, f)))

    def ours(params, x):
        return jnp.sum(jnp.square(module.apply({"params": params}, x, vectors)[0]))

    got, wanted = (jax.jit(jax.grad(f, argnums=(0, 1)))(p, x) for f in (ours, plain))
    jax.tree.map(lambda a, b: close(a, b, atol=1e-4), got, wanted)


def test_graph_counts_known_positives_alone():
    with np.load(golden_file("sst.npz")) as file:
        ternary, wanted = file["adjacency/in/labels"], file["adjacency/out/adjacency"]
    observed, labels = (ternary != 0).astype(np.uint8), (ternary == 1).astype(np.uint8)
    facts = meta(labels=labels, observed=observed, count=20)
    close(_semantic.graph(facts), wanted)
    for i in range(20):  # by hand
        for j in range(20):
            both = sum(row[i] == 1 and row[j] == 1 for row in ternary)
            assert _semantic.graph(facts)[i, j] == pytest.approx(both / sum(row[i] == 1 for row in ternary))
    # a hidden positive changes nothing, and a class without a known positive has no edges
    observed[:, 3] = 0
    found = _semantic.graph(meta(labels=np.ones_like(labels), observed=observed, count=20))
    assert found[3, 3] == 1 and found[3].sum() == 1 and found[:, 3].sum() == 1
    nothing = meta(labels=labels, observed=np.zeros_like(labels), count=20)
    np.testing.assert_array_equal(_semantic.graph(nothing), np.eye(20))


def test_map_is_pooled_two_by_two_and_an_odd_row_is_left_out():
    x = np.arange(5 * 7, dtype=np.float32).reshape(1, 5, 7, 1)
    wanted = [[x[0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, 0].mean() for j in range(3)] for i in range(2)]
    close(_semantic._average(jnp.asarray(x), 2)[0, ..., 0], wanted)
    module = build(pool=2)
    out, _ = jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), batch((2, 5, 7, 20))))
    assert out.attention.shape[-2:] == (2, 3)
    with pytest.raises(UserError, match=r"1x4 feature map is too small to be pooled by config.system.pool=2"):
        shapes(module, batch((2, 1, 4, 20)))


def test_partial_bce_weighs_known_labels_and_hides_the_rest():
    module = build(loss={"name": "partial_bce", "reduction": "batch_mean"}, pool=1)
    data = batch()
    variables = init(module, data)
    loss = jax.jit(lambda data: (module.apply(variables, data, 0, method="loss")[0], module.apply(variables, data)))
    value, out = loss(data)
    total = 0.0
    for x, y, known in zip(np.asarray(out.logits, np.float64), data["labels"], data["observed"]):
        share = known.mean()
        bce = [np.log1p(np.exp(-a if b else a)) for a, b, o in zip(x, y, known) if o]
        total += (-4.45 * share + 5.45) / L * np.sum(bce)
    close(value, total / len(data["labels"]))
    data["labels"] = np.where(data["observed"] > 0, data["labels"], 1).astype(np.float32)  # what is hidden has no say
    close(loss(data)[0], value)


def test_without_propagation_and_without_a_graph():
    data = batch()
    module = build(steps=0)
    out, variables = jax.jit(module.init_with_output)(jax.random.key(0), data)
    np.testing.assert_array_equal(out.extra["propagated"], out.label_features)
    assert np.abs(variables["constants"]["adjacency"] - np.eye(L)).max() > 0.1
    module = build(graph="none")
    constants = jax.jit(lambda: module.init(jax.random.key(0), data)["constants"])()
    np.testing.assert_array_equal(constants["adjacency"], np.eye(L))
    assert "reset_u" not in shapes(module, data)["params"]["head"]["graph"]
    assert "reset_u" in shapes(build(reset_gate="fixed"), data)["params"]["head"]["graph"]


def test_one_class_and_nothing_known_are_finite():
    facts = meta(labels=np.ones((5, 1), np.uint8), observed=np.zeros((5, 1), np.uint8), count=1)
    data = batch(labels=np.zeros((3, 1)), observed=0.0)
    variables = init(build(meta=facts), data)
    for loss in ({"name": "bce"}, {"name": "partial_bce", "reduction": "batch_mean"}):
        value = jax.jit(functools.partial(toy.loss_and_gradients, build(meta=facts, loss=loss), step=0))
        loss, grads = value(variables, data)
        assert loss == 0 and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_bad_input(tmp_path):
    with pytest.raises(UserError, match=r"looks for labels by their vectors and 'toy' has none; set config.vectors"):
        facts = meta()
        build(meta=Meta(name="toy", classes=facts.classes, labels=facts.labels, observed=facts.observed))
    with pytest.raises(UserError, match=r"reset_gate is 'fix'; expected one of released, fixed \(did you mean 'fixed'"):
        build(reset_gate="fix")
    with pytest.raises(UserError, match=r"config.system.steps is -1; expected at least 0"):
        build(steps=-1)
    with pytest.raises(UserError, match=r"config.system.pool is 0; expected at least 1"):
        build(pool=0)
    with pytest.raises(UserError, match=r"which cannot be read .*; expected 'labels', 'none' or a .npy file"):
        build(graph="label")
    np.save(tmp_path / "small.npy", np.eye(3))
    with pytest.raises(UserError, match=r"has the shape \(3, 3\) .* expected 6 x 6 finite numbers"):
        build(graph=str(tmp_path / "small.npy"))


@pytest.mark.parametrize("data", ["coco2014", "voc2007", "vg200"])
def test_known_words_are_the_rows_of_one_table(data):
    """SST's table: the same masks, images and training for all rows, and HCP-MLR-PL's sizes for its SSGRL."""
    rows = {
        name: toy.config(name, f"{data},known=0.3") for name in ("sst", "sarb", "ssgrl", "partial_bce", "curriculum")
    }
    rows |= {"ml_gcn": toy.config("ml_gcn", f"known=0.3,{data}")}  # in any order
    for name, found in rows.items():
        for section in ("data", "splits", "observe", "input", "backbone", "optim", "eval"):
            assert found[section] == rows["sst"][section], (name, section)
        assert dict(found.observe) == {"name": "known", "proportion": 0.3, "mode": "hcp"}
    own = rows["ssgrl"].system
    assert (own.channels, own.width, own.hidden, own.reset_gate, own.pool) == (1024, 1024, 512, "fixed", 2)
    optim = {"name": "adam", "lr": 1e-5, "epochs": 20, "batch_size": 32, "weight_decay": 5e-4}
    assert rows["ssgrl"].optim.to_dict() == optim | {"schedule": {"name": "step", "every": 10}}
    assert rows["ssgrl"].loss == rows["ml_gcn"].loss == rows["partial_bce"].loss != rows["sst"].loss


def test_a_share_that_is_none():
    for word in ("known=much", "known=0.1.2"):
        with pytest.raises(UserError, match=f"The word '{word}' has a value that is not a number; expected"):
            toy.config("ssgrl", word)
