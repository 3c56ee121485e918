"""ADD-GCN against the authors' golden case and plain loops; SAM's pooling, the graphs one by one, bad input."""

import jax
import numpy as np
import pytest

import released_names
import toy
from mljax.config.reading import read_config
from mljax.errors import UserError
from mljax.losses.criterion import Criterion
from mljax.systems.add_gcn import ADDGCN
from mljax.weights import published
from toy import close, weights

L, D, W = 6, 7, 5


def build(count=L, **settings):
    return ADDGCN(
        backbone=None,
        criterion=Criterion.from_config({"name": "bce"}),
        meta=toy.meta(count),
        **{"width": W, **settings},
    )


def batch(feature_map=(4, 2, 3, D)):
    return toy.batch(feature_map, L, seed=2)


@pytest.fixture(scope="module")
def golden():
    return toy.golden("add_gcn")


@pytest.fixture(scope="module")
def state(golden):
    return weights(golden)


def test_golden_case_through_the_conversion(golden, state):
    module, data = build(width=24), batch(golden["in/feature_map"].transpose(0, 2, 3, 1))
    variables = published.convert_head(state, module)
    out, captured = module.apply(variables, data, capture_intermediates=True, mutable=["intermediates"])
    inner, swap = captured["intermediates"], (0, 2, 1)  # the authors' features are (b d l)
    close(out.extra["pooled"], golden["out/label_features_sam"].transpose(swap))
    close(inner["static"]["__call__"][0], golden["out/static_gcn"].transpose(swap))
    close(out.extra["adjacency"], golden["out/dynamic_adjacency"])
    close(inner["dynamic"]["__call__"][0][0], golden["out/dgcn"].transpose(swap))
    close(out.label_features, (golden["out/label_features_sam"] + golden["out/dgcn"]).transpose(swap))
    close(out.extra["activation_logits"], golden["out/logits_sm"])
    close(out.extra["graph_logits"], golden["out/logits_sr"])
    close(out.logits, golden["out/logits"])
    gates = 1 / (1 + np.exp(-np.einsum("bdhw,ld->blhw", golden["in/feature_map"], state["fc.weight"][..., 0, 0])))
    close(out.attention[:, 0], gates / gates.sum((2, 3), keepdims=True))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def leaky(x):
    return np.where(x > 0, x, 0.2 * x)


def dense(p, x):
    return x @ p["kernel"] + p.get("bias", 0)


def reference(p, stats, x, graphs, pooling, normalise, train):
    """The forward pass image by image and label by label."""
    b, flat = len(x), x.reshape(len(x), -1, D)
    scores = dense(p["sam"]["score"], flat)
    first = scores.max(1) if pooling == "max" else scores.mean(1)
    values = dense(p["sam"]["transform"], flat)
    v = np.array([[sum(sigmoid(scores[i, n, l]) * values[i, n] for n in range(6)) for l in range(L)] for i in range(b)])
    v = v / 6 if normalise else v
    y, result = v, 0
    if graphs in ("both", "static"):
        a = p["static"]["adjacency"]["kernel"]  # (from, to)
        mixed = np.array([[sum(a[j, i] * v[n, j] for j in range(L)) for i in range(L)] for n in range(b)])
        result = leaky(dense(p["static"]["weight"], leaky(mixed)))
        y = v + result
    if graphs in ("both", "dynamic"):
        d = p["dynamic"]
        context = dense(d["context"], y.mean(1))
        mean, var = (context.mean(0), context.var(0)) if train else (stats["mean"], stats["var"])
        context = leaky((context - mean) / np.sqrt(var + 1e-5) * d["context_bn"]["scale"] + d["context_bn"]["bias"])
        edges = np.array(
            [[dense(d["edges"], np.concatenate([context[n], y[n, i]])) for i in range(L)] for n in range(b)]
        )
        a = sigmoid(edges)  # (b to from)
        mixed = np.array([[sum(a[n, i, j] * y[n, j] for j in range(L)) for i in range(L)] for n in range(b)])
        result = leaky(dense(d["weight"], leaky(mixed)))
    z = v + result
    second = (z * p["classifier"]["kernel"]).sum(-1) + p["classifier"]["bias"]
    return z, (first + second) / 2


@pytest.mark.parametrize(
    ("graphs", "pooling", "normalise"),
    [("both", "max", False), ("static", "average", False), ("dynamic", "max", True), ("none", "average", True)],
)
def test_forward_and_loss_equal_loops(graphs, pooling, normalise):
    module, data = build(graphs=graphs, pooling=pooling, normalise=normalise), batch()
    variables = jax.device_get(module.init(jax.random.key(0), data))
    params, stats = variables["params"], {"mean": np.linspace(-1, 1, W), "var": np.linspace(0.5, 2, W)}
    assert {"static", "dynamic"} & set(params) == {"static", "dynamic"} & {
        graphs,
        *(("static", "dynamic") if graphs == "both" else ()),
    }
    if "batch_stats" in variables:
        variables["batch_stats"]["dynamic"]["context_bn"] = {k: v.astype(np.float32) for k, v in stats.items()}
    arguments = (params, stats, data["endpoints"]["32"], graphs, pooling, normalise)
    features, logits = reference(*arguments, train=False)
    out = module.apply(variables, data)
    close(out.label_features, features)
    close(out.logits, logits)
    p, y = sigmoid(reference(*arguments, train=True)[1]), data["labels"]
    (loss, _), _ = module.apply(variables, data, 0, method="loss", mutable=["batch_stats"])
    close(loss, -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean())


def test_training_moves_the_statistics_as_torch_does():
    module, data = build(), batch()
    variables = jax.device_get(module.init(jax.random.key(0), data))
    p, v = variables["params"], np.asarray(module.apply(variables, data).extra["pooled"])
    a, w = p["static"]["adjacency"]["kernel"], p["static"]["weight"]
    y = v + leaky(dense(w, leaky(np.einsum("ji,bjd->bid", a, v))))
    context = dense(p["dynamic"]["context"], y.mean(1))
    _, changed = module.apply(variables, data, 0, method="loss", mutable=["batch_stats"])
    found = changed["batch_stats"]["dynamic"]["context_bn"]
    close(found["mean"], 0.1 * context.mean(0))
    close(found["var"], 0.9 + 0.1 * context.var(0, ddof=1))


def test_attention_of_scores_that_saturate_still_sums_to_one():
    module, data = build(), batch()
    variables = jax.device_get(module.init(jax.random.key(0), data))
    score = variables["params"]["sam"]["score"]
    score["kernel"] = score["kernel"] * np.float32(1e4)
    out = module.apply(variables, data)
    np.testing.assert_allclose(out.attention.sum((-2, -1)), 1, rtol=1e-5)


def test_unknown_choices_are_said():
    with pytest.raises(UserError, match=r"pooling is 'sum'; expected one of max, average\."):
        build(pooling="sum")
    with pytest.raises(UserError, match=r"graphs is 'statc'; expected .* \(did you mean 'static'"):
        build(graphs="statc")


def test_checkpoints_that_do_not_fit_are_refused(state):
    with pytest.raises(UserError, match=r"no 'gcn.conv_global.weight'"):
        published.convert_head({k: v for k, v in state.items() if k != "gcn.conv_global.weight"}, build())
    with pytest.raises(UserError, match=r"no place for 'gcn.static_adj.1.weight'"):
        published.convert_head({**state, "gcn.static_adj.1.weight": np.zeros((6, 6, 1))}, build())
    with pytest.raises(UserError, match="config.system.graphs='both'"):
        published.convert_head(state, build(graphs="static"))


def test_full_size_names_and_shapes_are_those_of_the_released_files():
    state = released_names.state_dict("ADD-GCN", trunk="features.")
    counters = sum(name.endswith("running_mean") and not name.startswith("features.") for name in state)  # not listed
    listed = [name for name in state if not name.startswith("features.")]
    assert len(listed) + counters + 624 == released_names.total("ADD-GCN")
    released_names.fits(read_config("configs/add_gcn.py:coco2014").unlock(), toy.meta(80), state)
