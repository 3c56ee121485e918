"""SARB: golden cases with its training branch and gradients, blending by loops, k-means, refresh, resume around it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans

import toy
from mljax import experiment
from mljax.errors import UserError
from mljax.losses.criterion import Criterion
from mljax.scoring import Scorer
from mljax.systems._prototypes import kmeans, prototypes
from mljax.systems.sarb import SARB, _reversed
from mljax.weights import published
from test_resume import same_state, trained_twice
from test_ssgrl import L, apply, batch, init, meta, nhwc
from toy import close, weights


def build(**settings):
    loss = Criterion.from_config(settings.pop("loss", {"name": "bce"}))
    defaults = {"width": 8, "hidden": 5, "output": 7, "pool": 1, "count": 3, "steps_per_epoch": 10, "start": 2}
    return SARB(backbone=None, criterion=loss, meta=settings.pop("meta", meta()), **(defaults | settings))


@pytest.fixture(scope="module")
def golden():
    return toy.golden("sst", "sarb/")


@pytest.fixture(scope="module")
def released(golden):
    """The golden network, as the authors' code trains it."""
    state = weights(golden)
    facts = meta(vectors=state["wordFeatures"])
    sizes = {"width": 24, "hidden": 16, "output": 24, "count": 10}
    module = build(meta=facts, **sizes, target_gradient=True, blend_known=True)
    variables = published.convert_head(state, module)
    return module, {**variables, "memory": {"prototypes": jnp.asarray(golden["in/prototype"])}}


def test_golden(golden, released):
    module, variables = released
    out = apply(module, variables, nhwc(golden["in/feature_map"]))
    close(out.label_features, golden["out/semantic_feature"])
    close(out.attention[:, 0].transpose(0, 2, 3, 1), golden["out/attention_bhwc"])
    close(out.extra["propagated"], golden["out/ggnn"])
    close(out.logits, golden["out/logits"])
    assert float(variables["params"]["alpha"]) == pytest.approx(0.3)


def branch(module, golden):
    """Everything the training branch gives: logits, features, and logits, labels and masks of both blends."""
    target = golden["in/target"]
    labels, known = jnp.asarray(target == 1, jnp.float32), jnp.asarray(target != 0, jnp.float32)
    out = module(nhwc(golden["in/feature_map"]), train=True)
    first = module.instance_blend(out.label_features, labels, known)
    index, uniform = jnp.asarray(golden["in/prototype_index"][0]), jnp.asarray(golden["in/mask_uniform"])
    second = module.prototype_blend(out.label_features, labels, known, index, uniform)
    return out, [(module.classify(blend.features), blend.labels, blend.observed) for blend in (first, second)]


def test_golden_training_branch(golden, released):
    module, variables = released

    def squares(shares):
        run = {**variables, "params": {**variables["params"], **shares}}
        out, blends = module.apply(run, golden, method=branch)
        outputs = [out.logits, out.label_features, *(x for blend in blends for x in blend[:2])]
        return sum(jnp.sum(jnp.square(x)) for x in outputs), (out, blends)

    shares = {name: variables["params"][name] for name in ("alpha", "beta")}
    grads, (out, blends) = jax.jit(jax.grad(squares, has_aux=True))(shares)
    close(out.logits, golden["out/train_logits"])
    close(out.label_features, golden["out/train_semantic"])
    for i, (logits, labels, observed) in enumerate(blends, 1):
        close(logits, golden[f"out/mixed{i}_logits"])
        ternary = golden[f"out/mixed{i}_target"]
        close(labels, np.maximum(ternary, 0))
        np.testing.assert_array_equal(observed, ternary != 0)
    close(grads["alpha"], golden["out/grad_alpha"])
    close(grads["beta"], golden["out/grad_beta"])


def test_all_parameters_have_their_place_in_the_released_names(golden, released):
    module, variables = released
    wide = np.zeros((1, 2048, 4, 4), np.float32)  # the golden map has `width` channels and needs no reduction
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), nhwc(wide)))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, shapes)


def blended(features, data, prototypes, index, uniform, a, b, quirk):
    """Both blends, label by label."""
    labels, known = data["labels"], data["observed"]
    count = len(labels)
    x, y, o = [features.copy(), features.copy()], [labels.copy(), labels.copy()], [known.copy(), known.copy()]
    for n in range(count):
        other = count - 1 - n
        for c in range(L):
            if not known[n, c] and labels[other, c]:
                x[0][n, c] = a * features[n, c] + (1 - a) * features[other, c]
                y[0][n, c], o[0][n, c] = 1 - a, 1
        choices = [c for c in range(L) if not known[n, c] and np.any(prototypes[c])]
        if choices or quirk:
            c = max(choices, key=lambda c: uniform[n, c]) if choices else 0
            x[1][n, c] = b * features[n, c] + (1 - b) * prototypes[c, index]
            y[1][n, c], o[1][n, c] = 1 - b, 1
    return zip(x, y, o)


@pytest.mark.parametrize("quirk", [False, True])
def test_blends_equal_loops(quirk):
    rng = np.random.default_rng(6)
    labels, observed = rng.random((5, L)) < 0.5, rng.random((5, L)) < 0.5
    observed[1], observed[2] = True, False  # an image without unknown labels, and one without known ones
    data = batch((5, 3, 3, 20), labels, observed)
    module = build(blend_known=quirk)
    variables = init(module, data)
    stored = rng.normal(size=(L, 3, 8)).astype(np.float32)
    stored[[0, 4]] = 0  # labels without known positives have no prototypes
    shares = {"alpha": jnp.float32(0.3), "beta": jnp.float32(0.8)}
    params = {**variables["params"], **shares}
    variables = {**variables, "params": params, "memory": {"prototypes": jnp.asarray(stored)}}
    features, uniform = rng.normal(size=(5, L, 8)).astype(np.float32), rng.random((5, L)).astype(np.float32)
    own = (jnp.asarray(features), jnp.asarray(data["labels"]), jnp.asarray(data["observed"]))

    @jax.jit
    def both(variables, uniform):
        return [
            module.apply(variables, *own, method="instance_blend"),
            module.apply(variables, *own, jnp.int32(2), uniform, method="prototype_blend"),
        ]

    found = both(variables, uniform)
    for got, wanted in zip(found, blended(features, data, stored, 2, uniform, 0.3, 0.8, quirk)):
        for a, b in zip(got, wanted):
            close(a, b)


@functools.partial(jax.jit, static_argnums=0)
def trained(module, variables, data, step, blended):
    """The loss with its terms, the outputs in training, and the logits of blended features."""
    options = {"method": "loss", "rngs": {"draw": jax.random.key(1)}, "mutable": ["memory", "batch_stats"]}
    out = module.apply(variables, data, train=True, mutable=["batch_stats"])[0]
    logits = module.apply(variables, blended, method="classify")
    return module.apply(variables, data, step, **options)[0], out, logits


@pytest.mark.parametrize("step", [0, 5, 19, 20])
def test_loss_is_the_sum_of_its_parts(step):
    """Before epoch 2 only known labels and the contrast count; images have no label in common, so that it keeps all."""
    labels = np.zeros((4, L))
    labels[[0, 0, 1, 2], [0, 1, 2, 3]] = 1
    data = batch((4, 3, 3, 20), labels, np.maximum(labels, np.random.default_rng(7).random((4, L)) < 0.5))
    module = build()
    variables = init(module, data)
    stored = np.random.default_rng(8).normal(size=(L, 3, 8)).astype(np.float32)
    params = variables["params"] | {"alpha": jnp.float32(0.5), "beta": jnp.float32(0.5)}
    variables = {**variables, "params": params, "memory": {"prototypes": jnp.asarray(stored)}}
    features = np.asarray(trained(module, variables, data, step, np.zeros((4, L, 8), np.float32))[1].label_features)
    first, *_ = blended(features, data, stored, 0, np.zeros((4, L)), 0.5, 0.5, False)
    (loss, terms), out, logits = trained(module, variables, data, step, first[0])

    def bce(logits, y, o):
        x = np.asarray(logits, np.float64)
        return np.sum(o * (np.logaddexp(0, x) - x * y)) / o.sum()

    close(terms["bce"], bce(out.logits, data["labels"], data["observed"]))
    unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
    values = [
        1 + (unit[n, c] @ unit[m, c])
        for n in range(4) for m in range(n + 1, 4) for c in range(L)
        if data["observed"][n, c] and data["observed"][m, c]
    ]  # fmt: skip
    close(terms["contrast"], 0.05 * min(step / 10, 1) * np.mean(values))
    if step < 20:
        assert terms["instance"] == terms["prototype"] == 0
    else:
        close(terms["instance"], bce(logits, *first[1:]))
        assert terms["prototype"] > 0
    close(loss, sum(float(v) for v in terms.values()))


def test_shares_stay_in_bounds_and_keep_their_gradient():
    labels, observed = np.array([[0.0] * L, [1.0] * L]), np.array([[0.0] * L, [1.0] * L])
    data = batch((2, 3, 3, 20), labels, observed)
    module = build()
    variables = init(module, data)
    x = jnp.asarray(np.random.default_rng(9).normal(size=(2, L, 8)).astype(np.float32))
    own = (x, jnp.asarray(data["labels"]), jnp.asarray(data["observed"]))

    @jax.jit
    def blend(alpha):
        params = {**variables["params"], "alpha": alpha}
        return module.apply({**variables, "params": params}, *own, method="instance_blend")

    over, under = blend(jnp.float32(1.7)), blend(jnp.float32(-0.4))
    close(over.features, x)  # nothing is put in, and nothing is claimed of it
    np.testing.assert_array_equal(over.observed, observed)
    close(under.features[0], x[1])
    np.testing.assert_array_equal(under.labels[0], 1)
    of_features, of_labels = (
        jax.jit(jax.grad(lambda a, name=name: jnp.sum(getattr(blend(a), name)))) for name in ("features", "labels")
    )
    for alpha in (1.7, -0.4, 0.5):
        assert of_features(jnp.float32(alpha)) != 0
        assert of_labels(jnp.float32(alpha)) == 0


def test_partner_is_the_reversed_batch_of_all_devices():
    x = np.arange(6.0, dtype=np.float32).reshape(6, 1)
    found = jax.pmap(lambda x: _reversed(x, "data"), axis_name="data")(x.reshape(2, 3, 1))
    np.testing.assert_array_equal(found.reshape(6, 1), x[::-1])
    np.testing.assert_array_equal(_reversed(x, None), x[::-1])


def test_kmeans_finds_clusters_as_scikit_learn_does():
    rng = np.random.default_rng(10)
    apart = rng.normal(size=(4, 6)) * 20
    x = np.concatenate([c + rng.normal(size=(30, 6)) for c in apart]).astype(np.float32)
    found = kmeans(x, 4)
    wanted = np.stack([x[30 * i : 30 * i + 30].mean(0) for i in range(4)])
    order = [int(np.argmin(np.square(found - w).sum(1))) for w in wanted]
    close(found[order], wanted)
    rough = rng.normal(size=(300, 5)).astype(np.float32)
    inertia = np.square(rough[:, None] - kmeans(rough, 6)[None]).sum(-1).min(1).sum()
    assert inertia < 1.1 * KMeans(6, n_init=10, random_state=0).fit(rough).inertia_
    np.testing.assert_array_equal(kmeans(rough, 6), kmeans(rough, 6))


def test_kmeans_of_fewer_rows_than_centres():
    x = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    assert {tuple(row) for row in kmeans(x, 5)} == {(1.0, 2.0), (3.0, 4.0)}
    np.testing.assert_array_equal(kmeans(x[:1], 3), np.repeat(x[:1], 3, axis=0))


def test_prototypes_are_of_known_positives_and_of_their_epochs():
    observed = np.ones((40, L), np.uint8)
    observed[:, 2] = 0
    module = build(meta=meta(observed=observed), start=2, every=3)
    known = module.positives
    features = np.random.default_rng(11).normal(size=(40, L, 8)).astype(np.float32)
    asked = []

    def score(split, view=None, entries=None):
        asked.append(split)
        return {"label_features": features[entries]}

    before = {"memory": {"prototypes": np.zeros((L, 3, 8), np.float32)}, "constants": {}}
    changed = {e: module.refresh(before, score, e)["memory"]["prototypes"] for e in range(9)}
    assert [e for e in changed if changed[e].any()] == [2, 5, 8] and asked == ["train"] * 3
    found = changed[2]
    assert not found[2].any()
    for c in (0, 5):
        np.testing.assert_array_equal(found[c], kmeans(features[known[:, c] > 0, c], 3))
    assert not prototypes(np.zeros((0, 8)), np.zeros(0, int), classes=L, count=3).any()
    assert build(blends="instance").refresh(before, None, 2) == before


SMALL = {"system__steps": 1, "system__width": 8, "data__size": 48, "input__size": 32, "backbone__frozen": "all"}


def test_scores_give_features_of_the_entries_that_are_asked_for():
    found = toy.config("sarb", **SMALL)
    run, source = toy.assembled(found)
    variables = experiment.init_variables(run, 0)
    scorer = Scorer(run, jax.devices()[:1])
    entries = source.labels * source.observed > 0
    whole = scorer.outputs(variables, source, None, found)["label_features"]
    close(scorer.outputs(variables, source, None, found, entries=entries)["label_features"], whole[entries])


@pytest.mark.parametrize("name", toy.slow_but(["sst", "sarb"], ["sst"]))
def test_resume_inside_the_pseudo_label_schedule_and_around_a_refresh(name, tmp_path, monkeypatch):
    """Three steps an epoch; pseudo labels and prototypes start with the second."""
    found = toy.shallow(toy.config(name, optim__epochs=3, eval__every=3, **SMALL))
    if name == "sst":
        found.system.update(memory=3, first=0.1, last=0.1)
    else:
        found.system.every = 1
    whole = same_state(*trained_twice(found, tmp_path, monkeypatch, 4, "stopped at step 4 of 9"))
    memory = next(value for path, value in whole.items() if "memory" in path)
    assert memory.any()


@pytest.mark.parametrize("count", [1, L])
def test_degenerate_labels_are_finite(count):
    facts = meta(labels=np.ones((5, count), np.uint8), observed=np.zeros((5, count), np.uint8), count=count)
    module = build(meta=facts)
    nothing, everything = np.zeros((3, count)), np.ones((3, count))
    variables = init(module, batch(labels=nothing, observed=nothing))
    value = jax.jit(functools.partial(toy.loss_and_gradients, module, step=30))
    for labels, observed in ((nothing, nothing), (nothing, everything), (everything, everything)):
        found, grads = value(variables, batch(labels=labels, observed=observed))
        assert np.isfinite(found) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_bad_input():
    facts = meta()
    bare = type(facts)(name="toy", classes=facts.classes, labels=facts.labels, observed=facts.observed)
    with pytest.raises(UserError, match="SARB looks for labels by their vectors and 'toy' has none"):
        build(meta=bare)
    said = r"is 'instances'; expected one of both, instance, prototype, none \(did you mean 'instance'"
    with pytest.raises(UserError, match=f"config.system.blends {said}"):
        build(blends="instances")
    with pytest.raises(UserError, match=r"config.system.every is 0; expected at least 1"):
        build(every=0)
