"""Optimisers against plain numpy loops in float64, schedules against their closed forms, groups against hand counts."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mljax import optim, trees
from mljax.errors import UserError
from mljax.optim import curves, groups

STEPS = 40


def _params(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "backbone": {
            "stem": {"kernel": rng.normal(size=(3, 4)).astype(np.float32), "bias": np.ones(4, np.float32)},
            "layer1": {"kernel": rng.normal(size=(4, 4)).astype(np.float32), "scale": np.ones(4, np.float32)},
        },
        "head": {"kernel": rng.normal(size=(4, 2)).astype(np.float32), "bias": np.zeros(2, np.float32)},
    }


def _grads(params, step):
    """Depends on the parameters, so that an error of one step is an error of all that follow."""
    flat, tree = jax.tree.flatten(params)
    noise = [np.random.default_rng([step, i]).normal(size=np.shape(p)) for i, p in enumerate(flat)]
    return jax.tree.unflatten(tree, [np.asarray(p) * 0.3 + n for p, n in zip(flat, noise)])


def _run(tx, params, steps=STEPS):
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(steps):
        grads = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), _grads(params, step))
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return jax.device_get(params), state


def _reference(params, rule, lr, decay=0.0, coupled=True, clip=None, steps=STEPS):
    """The same in float64: rule(step) -> function (slot, gradient) -> direction."""
    flat, tree = jax.tree.flatten(jax.tree.map(lambda p: np.asarray(p, np.float64), params))
    slots = [{} for _ in flat]
    for step in range(steps):
        grads = jax.tree.leaves(_grads(jax.tree.unflatten(tree, flat), step))
        if clip is not None:
            norm = math.sqrt(sum((g**2).sum() for g in grads))
            grads = [g * min(1.0, clip / (norm + 1e-6)) for g in grads]
        for i, (p, g, slot) in enumerate(zip(flat, grads, slots)):
            if coupled:
                g = g + decay * p
            else:
                p = p * (1 - lr(step) * decay)
            flat[i] = p - lr(step) * rule(step, slot, g)
    return jax.tree.unflatten(tree, flat)


def _adam(beta1, beta2=0.999, eps=1e-8):
    def rule(step, slot, g):
        b1, t = beta1(step), step + 1
        slot["m"] = b1 * slot.get("m", 0.0) + (1 - b1) * g
        slot["v"] = beta2 * slot.get("v", 0.0) + (1 - beta2) * g * g
        return slot["m"] / (1 - b1**t) / (np.sqrt(slot["v"] / (1 - beta2**t)) + eps)

    return rule


def _sgd(momentum, nesterov=False):
    def rule(step, slot, g):
        slot["v"] = momentum * slot.get("v", 0.0) + g
        return g + momentum * slot["v"] if nesterov else slot["v"]

    return rule


def _close(ours, theirs, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), ours, theirs)


# Schedules


def _one_cycle(step, total, pct, low, high, end):
    turn = pct * total - 1
    part, a, b = (step / turn, low, high) if step <= turn else ((step - turn) / (total - 1 - turn), high, end)
    return b + (a - b) * (1 + math.cos(math.pi * part)) / 2


@pytest.mark.parametrize("total, pct", [(100, 0.2), (37, 0.3), (7, 0.2), (1000, 0.25), (10, 0.0), (10, 1.0)])
def test_one_cycle(total, pct):
    schedule = curves.one_cycle(3e-4, total, pct)
    ours = [float(schedule(step)) for step in range(total)]
    theirs = [_one_cycle(step, total, pct, 3e-4 / 25, 3e-4, 3e-4 / 25e4) for step in range(total)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-11)


def test_one_cycle_corners():
    schedule, beta = curves.one_cycle(1.0, 100), curves.one_cycle_momentum(100)
    assert float(schedule(0)) == pytest.approx(1 / 25, rel=1e-6)
    assert float(schedule(19)) == pytest.approx(1.0, rel=1e-6)
    assert float(schedule(99)) == pytest.approx(1 / 25e4, rel=1e-5)
    assert float(schedule(500)) == pytest.approx(1 / 25e4, rel=1e-5)
    assert [round(float(beta(s)), 6) for s in (0, 19, 99)] == [0.95, 0.85, 0.95]
    # a peak at step 0, and a run of a single step, give numbers
    assert float(curves.one_cycle(1.0, 5, 0.2)(0)) == pytest.approx(1.0)
    assert np.isfinite(float(curves.one_cycle(1.0, 1)(0)))


def test_step_decay():
    every = curves.step_decay(1.0, every=10)
    assert [round(float(every(s)), 7) for s in (0, 9, 10, 19, 20)] == [1, 1, 0.1, 0.1, 0.01]
    at = curves.step_decay(0.5, boundaries=(3, 5), factor=0.2)
    assert [round(float(at(s)), 7) for s in (0, 2, 3, 4, 5, 9)] == [0.5, 0.5, 0.1, 0.1, 0.02, 0.02]


def test_warmup_cosine():
    schedule = curves.warmup_cosine(2.0, 20, 4)
    expected = [2 * (0.1 + 0.9 * s / 4) for s in range(4)]
    expected += [1 + math.cos(math.pi * (s - 4) / 16) for s in range(4, 21)]
    np.testing.assert_allclose([float(schedule(s)) for s in range(21)], expected, atol=1e-6)
    assert float(schedule(99)) == pytest.approx(0, abs=1e-7)
    assert float(curves.warmup_cosine(2.0, 20, 0)(0)) == 2.0


def test_schedule_is_traceable_and_typed():
    steps = jnp.arange(12)
    for schedule in (
        curves.one_cycle(1.0, 12),
        curves.step_decay(1.0, every=3),
        curves.warmup_cosine(1.0, 12, 3),
        curves.one_cycle_momentum(12),
    ):
        values = jax.jit(jax.vmap(schedule))(steps)
        assert values.dtype == jnp.float32 and values.shape == (12,)
        np.testing.assert_allclose(values, [float(schedule(int(s))) for s in steps], rtol=1e-5, atol=1e-7)


# Rules


@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam(name, decay):
    tx = optim.optimizer(_params(), name=name, lr=1e-2, schedule={"name": "constant"}, weight_decay=decay)
    theirs = _reference(_params(), _adam(lambda s: 0.9), lambda s: 1e-2, decay, coupled=name == "adam")
    _close(_run(tx, _params())[0], theirs, 2e-6)


def test_adam_one_cycle_with_beta1():
    def lr(s):
        return _one_cycle(s, STEPS, 0.2, 4e-4, 1e-2, 4e-8)

    def beta(s):
        return _one_cycle(s, STEPS, 0.2, 0.95, 0.85, 0.95)

    tx = optim.optimizer(_params(), lr=1e-2, total_steps=STEPS, weight_decay=1e-3)
    ours, state = _run(tx, _params())
    _close(ours, _reference(_params(), _adam(beta), lr, 1e-3))
    assert float(optim.learning_rate(state)) == pytest.approx(lr(STEPS - 1), rel=1e-4)
    fixed = optim.optimizer(
        _params(), lr=1e-2, total_steps=STEPS, weight_decay=1e-3, schedule={"name": "one_cycle", "beta1_cycle": False}
    )
    _close(_run(fixed, _params())[0], _reference(_params(), _adam(lambda s: 0.9), lr, 1e-3))


@pytest.mark.parametrize("momentum, nesterov", [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd(momentum, nesterov):
    tx = optim.optimizer(
        _params(),
        name="sgd",
        lr=0.02,
        schedule={"name": "step", "every": 1},
        steps_per_epoch=15,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=1e-2,
        clip_norm=2.0,
    )
    theirs = _reference(_params(), _sgd(momentum, nesterov), lambda s: 0.02 * 0.1 ** (s // 15), 1e-2, clip=2.0)
    _close(_run(tx, _params())[0], theirs)


def test_coupled_switch():
    """Adam with coupled=False is AdamW; AdamW with coupled=True is Adam."""
    settings = dict(lr=1e-2, schedule={"name": "constant"}, weight_decay=0.1)
    adamw = _run(optim.optimizer(_params(), name="adamw", **settings), _params())[0]
    _close(_run(optim.optimizer(_params(), name="adam", coupled=False, **settings), _params())[0], adamw, 0)
    adam = _run(optim.optimizer(_params(), name="adam", **settings), _params())[0]
    _close(_run(optim.optimizer(_params(), name="adamw", coupled=True, **settings), _params())[0], adam, 0)
    assert abs(adam["head"]["kernel"] - adamw["head"]["kernel"]).max() > 1e-3


def test_accumulate_averages_gradients_and_counts_updates():
    """Eight batches, four by four, are two SGD updates with the mean gradient; the schedule drops after the first."""
    params = {"w": np.zeros(3, np.float32)}
    tx = optim.optimizer(
        params,
        name="sgd",
        lr=1.0,
        schedule={"name": "step", "boundaries": (1,)},
        steps_per_epoch=4,
        momentum=0.0,
        accumulate=4,
    )
    grads = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    state, seen = tx.init(params), []
    for g in grads:
        updates, state = jax.jit(tx.update)({"w": jnp.asarray(g)}, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(np.asarray(params["w"]))
    assert not seen[2].any()
    np.testing.assert_allclose(seen[3], -grads[:4].mean(0), atol=1e-6)
    np.testing.assert_allclose(seen[6], seen[3], atol=0)
    np.testing.assert_allclose(seen[7], -grads[:4].mean(0) - 0.1 * grads[4:].mean(0), atol=1e-6)


def test_stop_earlier_than_the_schedule():
    """ASL: a one-cycle of 80 epochs of which 41 are run; rates are those of the 80."""

    def cycle(epochs):
        return {"name": "one_cycle", "epochs": epochs}

    tx = optim.optimizer(
        _params(), lr=1.0, total_steps=41, steps_per_epoch=1, schedule=cycle(80), groups=(("head", {"frozen": True}),)
    )
    state = _run(tx, _params(), 41)[1]
    assert float(optim.learning_rate(state)) == pytest.approx(_one_cycle(40, 80, 0.2, 1 / 25, 1, 1 / 25e4), rel=1e-5)
    with pytest.raises(UserError, match="schedule.epochs is 40, less than the epochs of the run"):
        optim.optimizer(_params(), total_steps=41, steps_per_epoch=1, schedule=cycle(40))


# Groups

GROUPS = (
    ("stem", {"frozen": True}),
    ("^backbone/", {"lr": 0.1, "weight_decay": 0.5}),
    ("kernel", {"lr": 2.0}),
)


def test_groups_by_hand():
    """SGD without momentum and a gradient of 1 shows each parameter's rate and decay in one update."""
    params = jax.tree.map(lambda p: np.full_like(p, 2.0), _params())
    tx = optim.optimizer(
        params,
        name="sgd",
        momentum=0.0,
        lr=1.0,
        schedule={"name": "constant"},
        weight_decay=0.25,
        groups=GROUPS,
        no_decay=("scale", "bias"),
    )
    updates = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)[0]
    expected = {
        "backbone/stem/kernel": 0.0,
        "backbone/stem/bias": 0.0,
        "backbone/layer1/kernel": -0.1 * (1 + 0.5 * 2),
        "backbone/layer1/scale": -0.1,
        "head/kernel": -2.0 * (1 + 0.25 * 2),
        "head/bias": -1.0,
    }
    ours = trees.flatten(updates)
    assert set(ours) == set(expected)
    for path, value in expected.items():
        np.testing.assert_allclose(ours[path], value, rtol=1e-6, err_msg=path)


def test_no_decay_1d_is_every_vector():
    leaves = groups.assign(_params(), weight_decay=0.1, no_decay=("1-D",))
    assert {path for path, leaf in leaves.items() if leaf.weight_decay} == {
        "backbone/stem/kernel",
        "backbone/layer1/kernel",
        "head/kernel",
    }


def test_frozen_group_has_no_memory_and_no_part_in_the_norm():
    params = _params()
    frozen = (("^backbone/", {"frozen": True}),)
    tx = optim.optimizer(params, lr=1e-3, total_steps=10, groups=frozen, clip_norm=1.0)
    state = tx.init(params)
    trained = {np.shape(leaf) for leaf in jax.tree.leaves(state) if np.ndim(leaf)}
    assert trained == {(4, 2), (2,)}
    # with SGD the update shows the clipped gradient: huge frozen gradients leave it alone
    tx = optim.optimizer(
        params, name="sgd", momentum=0.0, lr=1.0, schedule={"name": "constant"}, groups=frozen, clip_norm=1e6
    )
    grads = {"backbone": jax.tree.map(lambda p: jnp.full(p.shape, 1e9), params["backbone"])}
    grads["head"] = jax.tree.map(jnp.ones_like, params["head"])
    updates = tx.update(grads, tx.init(params), params)[0]
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates["backbone"]))
    np.testing.assert_array_equal(updates["head"]["bias"], [-1, -1])


def test_freeze_matching_is_relative_to_the_backbone():
    """As Query2Label: the stem, and the affine part of every BatchNorm of the backbone but not of the head."""
    bn = {"scale": np.ones(1), "bias": np.ones(1)}
    backbone = {"stem": {"kernel": np.ones(1)}, "layer1": {"stem": np.ones(1), "bn1": bn}}
    params = {"net": {"backbone": backbone, "head": {"bn": bn}}}
    found = groups.freeze_matching(params, ("^stem/", r"(^|/)[^/]*bn[^/]*/(scale|bias)$"))
    frozen = {path for path, leaf in groups.assign(params, found).items() if leaf.frozen}
    below = "net/backbone"
    assert frozen == {f"{below}/stem/kernel", f"{below}/layer1/bn1/scale", f"{below}/layer1/bn1/bias"}
    assert groups.freeze_matching(params, ()) == ()


@pytest.mark.parametrize(
    "groups, words",
    [
        ((("bakbone", {"lr": 0.1}),), r"'bakbone' .* matches no parameter \(did you mean 'backbone'\?\)"),
        ((("backbone/layr1", {"lr": 0.1}),), "did you mean 'backbone/layer1'"),
        ((("zzz", {"lr": 0.1}),), r"matches no parameter \(available: backbone, head\)"),
        ((("backbone", {}), ("stem", {"lr": 0.1})), "'stem' .* comes too late"),
        ((("head", {"learning": 1}),), "has no setting 'learning'"),
        ((("head", {"froze": True}),), "did you mean 'frozen'"),
        ((("head", {"lr": -1}),), "has lr=-1"),
        ((("head(", {"lr": 1}),), "is not a regular expression"),
        (((".", {"frozen": True}),), "freeze every parameter"),
    ],
)
def test_wrong_groups(groups, words):
    with pytest.raises(UserError, match=words):
        optim.optimizer(_params(), schedule={"name": "constant"}, groups=groups)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(name="adm"), "no 'adm' among the optimizers .did you mean 'adam'"),
        (dict(schedule={"name": "onecycle"}), "no 'onecycle' among the schedules .did you mean 'one_cycle'"),
        (dict(schedule={"name": "one_cycle"}), "needs total_steps"),
        (dict(schedule={"name": "step"}, steps_per_epoch=3), "either config.optim.schedule.every or"),
        (dict(schedule={"name": "step", "every": 3}), "needs steps_per_epoch"),
        (
            dict(schedule={"name": "constant", "pct_start": 0.3}),
            r"\('constant'\) has no setting 'pct_start'; 'one_cycle' has",
        ),
        (dict(lr=0.0), "lr is 0.0"),
        (dict(lr=float("nan")), "lr is nan"),
        (dict(weight_decay=-1.0), "weight_decay is -1"),
        (dict(betas=(0.9, 1.0)), "betas"),
        (dict(name="sgd", momentum=0.0, nesterov=True), "nesterov needs"),
        (dict(nesterov=True), "'adam'. has no setting 'nesterov'; 'sgd' has it"),
        (dict(name="sgd", momentum=1.0), "momentum is 1.0"),
        (dict(accumulate=0), "accumulate is 0"),
        (dict(clip_norm=0.0), "clip_norm is 0"),
        (dict(schedule={"name": "plateau", "mode": "maximum"}), "mode is 'maximum'"),
        (dict(schedule={"name": "plateau", "metric": "map"}), "metric is 'map'; expected one of mAP, CF1, OF1, loss"),
        (dict(no_decay=("bais",)), "names 'bais' .*did you mean 'bias'"),
        (dict(total_steps=10, schedule={"name": "one_cycle", "pct_start": 20.0}), "pct_start is 20"),
    ],
)
def test_wrong_settings(settings, words):
    if "total_steps" not in settings:
        settings = {"schedule": {"name": "constant"}, **settings}
    with pytest.raises(UserError, match=words):
        optim.optimizer(_params(), **settings)


def test_shapes_suffice_and_config_section_builds():
    """params may be shapes, and the section of a config (lists after a JSON round trip) builds the same."""
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, _params()))
    section = {"name": "adamw", "lr": 1e-2, "schedule": {"name": "constant"}, "groups": [["head", {"lr": 0.5}]]}
    tx = optim.optimizer(shapes, **section)
    other = optim.optimizer(_params(), **section)
    _close(_run(tx, _params(), 3)[0], _run(other, _params(), 3)[0], 0)
    with pytest.raises(UserError, match=r"no setting 'momentun' .did you mean 'momentum'"):
        optim.optimizer(shapes, **{**section, "name": "sgd", "momentun": 0.9})


def test_flax_model_fits_and_state_is_stable():
    """A linen model under a donated jit step: the loss falls, dtypes and structure of the state do not change."""
    model = nn.Dense(3)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 5)), jnp.float32)
    params = model.init(jax.random.PRNGKey(0), x)["params"]
    tx = optim.optimizer(params, lr=5e-2, total_steps=60, clip_norm=10.0, weight_decay=1e-4, no_decay=("1-D",))

    def loss(params):
        return jnp.mean((model.apply({"params": params}, x) - 1.0) ** 2)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, first = tx.init(params), float(loss(params))
    shape = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    for _ in range(60):
        params, state = step(params, state)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == shape
    assert float(loss(params)) < 0.1 * first


# Plateau


def test_plateau_scales_updates_and_lives_in_the_state():
    """mode max, patience 1: best .5, then .4 .4 (two bad) lowers; the threshold makes .50004 no improvement."""
    params = {"w": np.zeros(2, np.float32)}
    tx = optim.optimizer(params, name="sgd", momentum=0.0, lr=1.0, schedule={"name": "plateau", "patience": 1})
    state = tx.init(params)
    rates = []
    for metric in (0.5, 0.4, 0.50004, 0.6, float("nan"), 0.6, 0.7):
        state = optim.plateau_update(state, metric, patience=1)
        updates, state = jax.jit(tx.update)({"w": jnp.ones(2)}, state, params)
        rates.append(-float(updates["w"][0]))
        assert float(optim.learning_rate(state)) == pytest.approx(rates[-1])
    np.testing.assert_allclose(rates, [1, 1, 0.1, 0.1, 0.1, 0.01, 0.01], rtol=1e-6)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))


def test_plateau_min_and_cooldown():
    tx = optim.scale_by_plateau("min")
    state, scales = tx.init({}), []
    for metric in (1.0, 1.0, 1.0, 1.0, 1.0, 0.5):
        state = optim.plateau_update(state, metric, mode="min", factor=0.5, patience=0, cooldown=2)
        scales.append(float(state.scale))
    # drops at the second; the next two are ignored; the fifth drops again
    assert scales == [1, 0.5, 0.5, 0.5, 0.25, 0.25]


def test_plateau_equal_metric_is_no_improvement():
    state = optim.scale_by_plateau("max").init({})
    state = optim.plateau_update(state, 0.7, threshold=0.0)
    assert int(optim.plateau_update(state, 0.7, threshold=0.0).bad) == 1


def test_plateau_needs_its_schedule():
    tx = optim.optimizer(_params(), schedule={"name": "constant"})
    with pytest.raises(UserError, match="schedule.name is not 'plateau'"):
        optim.plateau_update(tx.init(_params()), 0.5)


# EMA


def test_ema_by_hand():
    ema = {"params": {"w": jnp.float32([1.0, 2.0])}, "batch_stats": {"mean": jnp.float32([0.0])}}
    new = {
        "params": {"w": jnp.float32([3.0, 0.0]), "table": jnp.float32([9.0])},
        "batch_stats": {"mean": jnp.float32([1.0])},
    }
    out = jax.jit(lambda a, b: optim.ema_update(a, b, 0.9))(ema, new)
    np.testing.assert_allclose(out["params"]["w"], [1.2, 1.8], rtol=1e-6)
    np.testing.assert_allclose(out["batch_stats"]["mean"], [0.1], rtol=1e-6)
    assert set(out["params"]) == {"w"}
    merged = optim.ema_merge(out, new)
    np.testing.assert_allclose(merged["params"]["w"], [1.2, 1.8], rtol=1e-6)
    assert merged["params"]["table"] == 9.0


def test_ema_many_steps():
    """After n steps of a constant value v from 0: v (1 - d^n)."""
    ema = {"w": jnp.zeros(1)}
    for _ in range(50):
        ema = optim.ema_update(ema, {"w": jnp.ones(1)}, 0.9997)
    assert float(ema["w"][0]) == pytest.approx(1 - 0.9997**50, rel=1e-5)
