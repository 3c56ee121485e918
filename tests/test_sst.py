"""SST: golden cases, the loss against plain loops, memory on two devices, ablations, what the pair head needs."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toy
from mljax.errors import UserError
from mljax.losses.criterion import Criterion
from mljax.losses.weak_labels import pair_index
from mljax.systems._pairs import PairHead, measure, push
from mljax.systems.sst import SST, Thresholds
from mljax.weights import published
from test_ssgrl import L, apply, batch, init, meta, nhwc
from toy import close

PAIRS = L * (L - 1) // 2


def build(**settings):
    loss = Criterion.from_config(settings.pop("loss", {"name": "bce"}))
    defaults = {"width": 8, "hidden": 5, "output": 7, "pool": 1, "memory": 4, "steps_per_epoch": 10, "start": 2}
    return SST(backbone=None, criterion=loss, meta=settings.pop("meta", meta()), **(defaults | settings))


@functools.partial(jax.jit, static_argnums=0)
def trained(module, variables, data, step):
    """The loss with its terms, the changed variables, and the outputs in training."""
    options = {"method": "loss", "rngs": {"draw": jax.random.key(1)}, "mutable": ["memory", "batch_stats"]}
    result = module.apply(variables, data, step, **options)
    return result, module.apply(variables, data, train=True, mutable=["batch_stats"])[0]


def run(module, data, step, variables=None):
    """The loss, its terms, the changed memory and the outputs."""
    variables = init(module, data) if variables is None else variables
    ((loss, terms), changed), out = trained(module, variables, data, step)
    return float(loss), {k: float(v) for k, v in terms.items()}, {**variables, **changed}, out


@pytest.fixture(scope="module")
def golden():
    return toy.golden("sst")


@pytest.fixture(scope="module")
def released(golden):
    state = toy.below("sst/w/", golden)
    module = build(meta=meta(vectors=state["wordFeatures"]), width=24, hidden=16, output=20)
    return module, published.convert_head(state, module)


def test_golden(golden, released):
    module, variables = released
    out = apply(module, variables, nhwc(golden["sst/in/feature_map"]))
    wanted = toy.below("sst/out/", golden)
    close(out.label_features, wanted["semantic_feature"])
    close(out.attention[:, 0].transpose(0, 2, 3, 1), wanted["attention_bhwc"])
    close(out.extra["propagated"], wanted["ggnn"])
    close(out.logits, wanted["logits"])
    close(out.extra["pair_logits"], wanted["ist_pair_logits"])
    np.testing.assert_array_equal(pair_index(L), wanted["pair_index"])
    np.testing.assert_array_equal(variables["constants"]["adjacency"], golden["sst/w/inMatrix"])


def test_a_map_of_other_channels_is_reduced_by_convolution_and_batch_norm(golden, released):
    """The golden map has `width` channels; the backbone's 2048 go through changeChannel, computed here by hand."""
    module, variables = released
    wide = np.random.default_rng(0).normal(size=(2, 2048, 3, 3)).astype(np.float32)
    w = toy.below("sst/w/changeChannel.", golden)
    reduced = np.einsum("bchw,dc->bdhw", wide, w["0.weight"][:, :, 0, 0])
    normal = [w[f"1.{name}"].reshape(-1, 1, 1) for name in ("running_mean", "running_var", "weight", "bias")]
    reduced = (reduced - normal[0]) / np.sqrt(normal[1] + 1e-5) * normal[2] + normal[3]
    got, wanted = (apply(module, variables, nhwc(x)) for x in (wide, reduced.astype(np.float32)))
    close(got.label_features, wanted.label_features, atol=1e-4)
    close(got.logits, wanted.logits, atol=1e-4)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), nhwc(wide)))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, shapes)


def test_golden_queue(golden):
    found = toy.below("sst/queue/", golden)
    memory = jnp.zeros(found["out/pos_feature_after0"].shape)
    for i in range(3):
        positive = (found[f"in/target{i}"] == 1).astype(np.float32)
        memory = push(memory, jnp.asarray(found[f"in/feature{i}"]), jnp.asarray(positive))
        np.testing.assert_array_equal(memory, found[f"out/pos_feature_after{i}"])


def test_memory_of_two_devices_is_that_of_one():
    rng = np.random.default_rng(3)
    memory = jnp.asarray(rng.normal(size=(L, 4, 3)).astype(np.float32))
    features = rng.normal(size=(6, L, 3)).astype(np.float32)
    positive = (rng.random((6, L)) < 0.5).astype(np.float32)
    one = push(memory, jnp.asarray(features), jnp.asarray(positive))
    for label in range(L):  # newest first: this batch's in order, then what was there
        rows = [features[i, label] for i in range(6) if positive[i, label]] + list(np.asarray(memory)[label])
        np.testing.assert_array_equal(one[label], np.stack(rows[:4]))
    split = [x.reshape(2, 3, *x.shape[1:]) for x in (features, positive)]
    two = jax.pmap(lambda f, p: push(memory, f, p, "data"), axis_name="data")(*split)
    np.testing.assert_array_equal(two[0], one)
    np.testing.assert_array_equal(two[1], one)


def cosine(a, b):
    return a @ b / max(np.linalg.norm(a), 1e-8) / max(np.linalg.norm(b), 1e-8)


def masked_bce(logits, labels, known):
    values = [np.log1p(np.exp(-x if y else x)) for x, y, o in zip(logits.flat, labels.flat, known.flat) if o]
    return np.mean(values) if values else 0.0


def reference(module, out, memory, data, step, paper):
    """The terms of the loss, entry by entry, with theta = 0.5 and 0.3 of the test below."""
    labels, known = data["labels"], data["observed"]
    logits, f = np.asarray(out.logits, np.float64), np.asarray(out.label_features, np.float64)
    pairs = 1 / (1 + np.exp(-np.asarray(out.extra["pair_logits"], np.float64)))
    index = {pair: n for n, pair in enumerate(itertools.combinations(range(L), 2))}
    ramp, theta = min(step / 10, 1), 0.5 if step < 30 else 0.3
    terms = {"bce": masked_bce(logits, labels, known), "ist": 0.0, "cst": 0.0}
    targets = {"ist": labels.copy(), "cst": labels.copy()}
    seen = {"ist": known.copy(), "cst": known.copy()}
    for n in range(len(labels)):
        mine = [j for j in range(L) if labels[n, j]]
        for i, j in index:
            p, both = pairs[n, index[i, j]], i in mine and j in mine
            shifted = max(p - 0.05, 0)
            terms["ist"] += -(1 - p) * np.log(p) if both else -(shifted**2) * np.log(1 - shifted)
        for label in range(L):
            if known[n, label]:
                continue
            score = {"ist": sum(pairs[n, index[tuple(sorted((label, j)))]] for j in mine)}
            score["ist"] /= 1 if paper else max(len(mine), 1)
            stored = [m for m in memory[label] if not paper or np.any(m)]
            score["cst"] = sum(cosine(f[n, label], m) for m in stored) / max(len(stored), 1)
            for name, value in score.items():
                if value >= theta:
                    targets[name][n, label] = seen[name][n, label] = 1
    terms["ist"] *= 10 * ramp / len(labels) / len(index)
    values = []
    for n, m in itertools.combinations(range(len(labels)), 2):
        for label in range(L):
            if known[n, label] and known[m, label]:
                both = labels[n, label] and labels[m, label]
                values.append(1 - cosine(f[n, label], f[m, label]) * (1 if both else -1))
    terms["cst"] = 0.05 * ramp * np.mean(values)
    for name in ("ist", "cst"):
        terms[f"{name}_bce"] = masked_bce(logits, targets[name], seen[name]) if step >= 20 else 0.0
        terms[f"{name}_found"] = (seen[name] - known).sum() / len(labels) if step >= 20 else 0.0
    return terms


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("step", [0, 4, 19, 25, 40])
def test_loss_equals_loops(form, step):
    """No two images have a known label in common: the contrast then keeps all pairs (else see test_contrastive)."""
    labels, known = np.zeros((4, L)), np.zeros((4, L))
    labels[[0, 0, 1, 1, 2], [0, 1, 2, 3, 4]] = 1
    known[:3] = np.random.default_rng(5).random((3, L)) < 0.5
    data = batch((4, 3, 3, 20), labels, np.maximum(known, labels))
    module = build(form=form, first=0.5, last=0.3, drop=0.2)
    variables = init(module, data)
    mixed = {**variables, "params": jax.tree.map(lambda p: p * 1.5 + 0.1, variables["params"])}
    loss, terms, after, out = run(module, data, step, mixed)
    wanted = reference(module, out, np.asarray(after["memory"]["features"], np.float64), data, step, form == "paper")
    assert terms.keys() == wanted.keys()
    for name, value in wanted.items():
        close(terms[name], value, err_msg=name)
    close(loss, sum(v for k, v in wanted.items() if not k.endswith("_found")))
    if step >= 20:
        assert wanted["ist_found"] > 0 or wanted["cst_found"] > 0
    stored = np.asarray(after["memory"]["features"])
    features = np.asarray(out.label_features)
    close(stored[0, 0], features[0, 0])
    close(stored[0, 1], np.asarray(variables["memory"]["features"])[0, 0])
    assert not stored[5].any()


def test_thresholds_fall_from_the_start_to_their_end():
    theta = Thresholds(start=5, first=0.95, last=0.75, drop=0.025)
    found = [float(theta(jnp.int32(e))) for e in (5, 6, 12, 13, 14, 19)]
    np.testing.assert_allclose(found, [0.95, 0.925, 0.775, 0.75, 0.75, 0.75], rtol=1e-6)


def test_padding_enters_neither_the_memory_nor_the_loss():
    data = batch(labels=np.ones((3, L)), observed=np.ones((3, L)), mask=np.array([1, 1, 0]))
    module = build()
    _, _, after, _ = run(module, data, 25)
    assert np.asarray(after["memory"]["features"])[:, :2].any(-1).all()
    assert not np.asarray(after["memory"]["features"])[:, 2:].any()
    variables = init(module, data)
    other = {**data, "labels": data["labels"] * np.array([1, 1, 0], np.float32)[:, None]}
    variables = {**variables, "memory": {"features": jnp.zeros((L, 4, 8), jnp.float32)}}
    same = [run(module, d, 25, variables)[1] for d in (data, other)]
    for name in same[0]:
        close(same[0][name], same[1][name], err_msg=name)


def test_dataset_cooccurrence_scores_by_conditional_probabilities():
    facts = meta()
    module = build(meta=facts, cooccurrence="dataset", branches="ist", first=0.35, last=0.35)
    data = batch((8, 3, 3, 20))
    _, terms, variables, _ = run(module, data, 25)
    assert "pairs" not in variables["params"] and "ist" not in terms
    positive = facts.labels.astype(np.float64)
    found = 0
    for labels, known in zip(data["labels"], data["observed"]):
        mine = np.flatnonzero(labels)
        for i in np.flatnonzero(known == 0):
            chances = [(positive[:, i] * positive[:, j]).sum() / positive[:, j].sum() for j in mine]
            found += len(mine) > 0 and np.mean(chances) >= 0.35
    assert terms["ist_found"] == pytest.approx(found / 8) and found


def shapes(module):
    """The variables' and the loss terms' names, without computing anything."""
    data, rngs = batch(), {"params": jax.random.key(0), "draw": jax.random.key(1)}
    variables = jax.eval_shape(lambda: module.init(rngs, data, 0, method="loss"))
    options = {"method": "loss", "rngs": {"draw": jax.random.key(1)}, "mutable": ["memory", "batch_stats"]}
    return variables, set(jax.eval_shape(lambda v: module.apply(v, data, 25, **options)[0][1], variables))


def test_ablations_drop_what_they_name():
    every = {"bce", "ist_bce", "ist_found", "ist", "cst_bce", "cst_found", "cst"}
    variables, terms = shapes(build())
    assert terms == every and "pairs" in variables["params"] and "memory" in variables
    variables, terms = shapes(build(branches="ist"))
    assert terms == {t for t in every if "cst" not in t} and "memory" not in variables
    variables, terms = shapes(build(branches="cst"))
    assert terms == {t for t in every if "ist" not in t} and "pairs" not in variables["params"]
    variables, terms = shapes(build(branches="none"))
    assert terms == {"bce"} and "memory" not in variables and "pairs" not in variables["params"]
    assert shapes(build(ist_weight=0.0, cst_weight=0.0))[1] == every - {"ist", "cst"}


def test_activation_pooling_needs_no_vectors_and_is_a_mean_under_the_label_map():
    facts, data = meta(), batch(shape=(3, 3, 3, 8))
    bare = type(facts)(name="toy", classes=facts.classes, labels=facts.labels, observed=facts.observed)
    module = build(meta=bare, pooling="activation", branches="none")
    variables = init(module, data)
    assert set(variables["constants"]) == {"adjacency"}
    out, p = apply(module, variables, data), jax.device_get(variables["params"]["decoupling"]["pooling"])
    for n in range(3):
        x = data["endpoints"]["32"][n].reshape(9, 8)
        gates = 1 / (1 + np.exp(-x @ p["score"]["kernel"]))
        close(out.label_features[n], gates.T @ (x @ p["transform"]["kernel"] + p["transform"]["bias"]) / 9)
        close(out.attention[n, 0].reshape(L, 9), (gates / gates.sum(0)).T)


def plain_pairs(params, x, form):
    """The pair head as it is written in words: pairs put together, layer after layer."""
    dense = lambda p, v: v @ p["kernel"] + p["bias"].reshape((1,) * (v.ndim - 1) + (-1,))  # noqa: E731
    i, j = pair_index(x.shape[1])
    u = dense(params["label"], x) if form == "code" else x
    hidden = jax.nn.relu(dense(params["first"], jnp.concatenate([u[:, i], u[:, j]], -1)))
    hidden = dense(params["second"], hidden)
    if form == "code":
        return jnp.einsum("bpd,pd->bp", hidden, params["kernel"]) + params["bias"][None]
    return jax.nn.relu(hidden) @ params["kernel"] + params["bias"]


@pytest.mark.parametrize("form", ["code", "paper"])
def test_pair_head_equals_its_definition_in_any_chunks(form):
    x = jnp.asarray(np.random.default_rng(4).normal(size=(3, L, 8)).astype(np.float32))
    params = jax.jit(PairHead(5, 7, form).init)(jax.random.key(0), x)["params"]
    weights = jnp.asarray(np.random.default_rng(5).normal(size=(3, PAIRS)).astype(np.float32))

    def with_gradient(logits):
        def weighted(p, x):
            values = logits(p, x)
            return jnp.sum(weights * values), values

        return jax.jit(jax.grad(weighted, argnums=(0, 1), has_aux=True))(params, x)

    wanted = with_gradient(lambda p, x: plain_pairs(p, x, form))
    for chunk in (1, 4, 128):
        head = PairHead(5, 7, form, chunk)
        jax.tree.map(close, with_gradient(lambda p, x, head=head: head.apply({"params": p}, x)), wanted)


def test_pair_head_of_coco_stays_within_its_stated_memory():
    """80 classes, batch 32, 512 wide: (b pairs 2d) alone would be 395 MiB, (b l l 2d) 800 MiB."""
    found = dict(line.split(": ") for line in measure().splitlines())
    assert {form: int(text.split()[0]) <= 160 for form, text in found.items()} == {"code": True, "paper": True}


@pytest.mark.parametrize("count", [1, L])
def test_one_class_nothing_known_and_no_positives_are_finite(count):
    facts = meta(labels=np.ones((5, count), np.uint8), observed=np.zeros((5, count), np.uint8), count=count)
    module = build(meta=facts, form="paper" if count == 1 else "code")
    nothing, everything = np.zeros((3, count)), np.ones((3, count))
    variables = init(module, batch(labels=nothing, observed=nothing))
    value = jax.jit(functools.partial(toy.loss_and_gradients, module, step=30))
    for labels, observed in ((nothing, nothing), (nothing, everything), (everything, everything)):
        found, grads = value(variables, batch(labels=labels, observed=observed))
        assert np.isfinite(found) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_bad_input():
    facts = meta()
    bare = type(facts)(name="toy", classes=facts.classes, labels=facts.labels, observed=facts.observed)
    with pytest.raises(UserError, match="SST looks for labels by their vectors and 'toy' has none"):
        build(meta=bare)
    for key, value, hint in (
        ("branches", "its", "ist"), ("form", "papers", "paper"), ("cooccurrence", "images", "image"),
        ("pooling", "activations", "activation"),
    ):  # fmt: skip
        with pytest.raises(
            UserError, match=rf"config.system.{key} is '{value}'; expected one of .*{hint}.* \(did you mean '{hint}'"
        ):
            build(**{key: value})
    with pytest.raises(UserError, match=r"config.system.memory is 0; expected at least 1"):
        build(memory=0)
    with pytest.raises(UserError, match=r"config.system.drop is -0.1; expected at least 0"):
        build(drop=-0.1)


def test_checkpoint_without_the_pair_head_or_with_another_graph(golden):
    state = toy.below("sst/w/", golden)
    facts = meta(vectors=state["wordFeatures"])
    sizes = {"meta": facts, "width": 24, "hidden": 16, "output": 20}
    without = {name: value for name, value in state.items() if not name.startswith("intra_")}
    with pytest.raises(UserError, match="no 'intra_fc_2.weight'"):
        published.convert_head(without, build(**sizes))
    found = published.convert_head(without, build(**sizes, branches="cst"))
    data = nhwc(golden["sst/in/feature_map"])
    close(apply(build(**sizes, branches="cst"), found, data).logits, golden["sst/out/logits"])
    with pytest.raises(UserError, match="'outMatrix' of the weights is not the label graph transposed"):
        published.convert_head(state | {"outMatrix": state["inMatrix"]}, build(**sizes))
