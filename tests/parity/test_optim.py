"""Our optimisers and schedules in float32 beside torch's in float64, on the same least squares problem."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mljax import optim

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity

STEPS = 40
RNG = np.random.default_rng(0)
X = RNG.normal(size=(24, 6)).astype(np.float32)
Y = RNG.normal(size=(24, 3)).astype(np.float32)
START = {
    "backbone": {"kernel": RNG.normal(size=(6, 5)).astype(np.float32), "bias": np.zeros(5, np.float32)},
    "head": {"kernel": RNG.normal(size=(5, 3)).astype(np.float32), "bias": np.zeros(3, np.float32)},
}
NAMES = [(a, b) for a in START for b in START[a]]


def _ours(tx, metrics=None, **plateau):
    def loss(p):
        hidden = jnp.tanh(X @ p["backbone"]["kernel"] + p["backbone"]["bias"][None])
        return jnp.sum((hidden @ p["head"]["kernel"] + p["head"]["bias"][None] - Y) ** 2)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.asarray, START)
    state, rates = tx.init(params), []
    for i in range(STEPS):
        params, state = step(params, state)
        rates.append(float(optim.learning_rate(state)))
        if metrics is not None:
            state = optim.plateau_update(state, metrics[i], **plateau)
    return params, rates


def _theirs(make, schedule=None, clip=None, metrics=None):
    """make({name: parameter}) -> optimizer; schedule(optimizer) -> scheduler."""
    params = {name: torch.nn.Parameter(torch.tensor(START[name[0]][name[1]]).double()) for name in NAMES}
    x, y = torch.tensor(X).double(), torch.tensor(Y).double()
    tx = make(params)
    scheduler = schedule(tx) if schedule else None
    rates = []
    for i in range(STEPS):
        hidden = torch.tanh(x @ params["backbone", "kernel"] + params["backbone", "bias"])
        loss = ((hidden @ params["head", "kernel"] + params["head", "bias"] - y) ** 2).sum()
        tx.zero_grad()
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(params.values(), clip)
        rates.append(tx.param_groups[-1]["lr"])
        tx.step()
        if metrics is not None:
            scheduler.step(metrics[i])
        elif scheduler is not None and i < STEPS - 1:
            scheduler.step()
    return params, rates


def _same(ours, theirs):
    for a, b in NAMES:
        np.testing.assert_allclose(ours[0][a][b], theirs[0][a, b].detach().numpy(), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("name, kind", [("adam", "Adam"), ("adamw", "AdamW")])
@pytest.mark.parametrize("pct", [0.2, 0.33])
def test_adam_one_cycle(name, kind, pct):
    tx = optim.optimizer(
        START,
        name=name,
        lr=1e-2,
        total_steps=STEPS,
        weight_decay=1e-2,
        schedule={"name": "one_cycle", "pct_start": pct},
    )
    theirs = _theirs(
        lambda p: getattr(torch.optim, kind)(p.values(), lr=1.0, weight_decay=1e-2),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, total_steps=STEPS, pct_start=pct),
    )
    _same(_ours(tx), theirs)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_step_clip(nesterov):
    tx = optim.optimizer(
        START,
        name="sgd",
        lr=2e-3,
        schedule={"name": "step", "every": 2},
        steps_per_epoch=6,
        weight_decay=1e-3,
        nesterov=nesterov,
        clip_norm=5.0,
    )
    theirs = _theirs(
        lambda p: torch.optim.SGD(p.values(), lr=2e-3, momentum=0.9, weight_decay=1e-3, nesterov=nesterov),
        lambda o: torch.optim.lr_scheduler.StepLR(o, 12),
        clip=5.0,
    )
    _same(_ours(tx), theirs)


def test_sgd_one_cycle_momentum():
    tx = optim.optimizer(
        START, name="sgd", lr=2e-3, total_steps=STEPS, schedule={"name": "one_cycle", "pct_start": 0.3}
    )
    theirs = _theirs(
        lambda p: torch.optim.SGD(p.values(), lr=1.0, momentum=0.9),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 2e-3, total_steps=STEPS, pct_start=0.3),
    )
    _same(_ours(tx), theirs)


def test_multi_step_groups():
    """Backbone at a tenth of the rate with its own decay, no decay for vectors; the head is the last group."""
    tx = optim.optimizer(
        START,
        lr=1e-2,
        schedule={"name": "step", "boundaries": (10, 25), "factor": 0.3},
        steps_per_epoch=1,
        weight_decay=1e-2,
        no_decay=("1-D",),
        groups=(("^backbone/", {"lr": 0.1, "weight_decay": 0.1}),),
    )

    def make(p):
        return torch.optim.Adam(
            [
                {"params": [p["backbone", "kernel"]], "lr": 1e-3, "weight_decay": 0.1},
                {"params": [p["backbone", "bias"]], "lr": 1e-3},
                {"params": [p["head", "kernel"]], "weight_decay": 1e-2},
                {"params": [p["head", "bias"]]},
            ],
            lr=1e-2,
        )

    theirs = _theirs(make, lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [10, 25], gamma=0.3))
    _same(_ours(tx), theirs)


def test_frozen_group_with_clip():
    """A frozen group is requires_grad=False: no update, no decay, no part in the norm."""
    tx = optim.optimizer(
        START,
        name="adamw",
        lr=1e-2,
        schedule={"name": "constant"},
        weight_decay=0.1,
        clip_norm=1.0,
        groups=(("^backbone/", {"frozen": True}),),
    )

    def make(p):
        for name in NAMES[:2]:
            p[name].requires_grad_(False)
        return torch.optim.AdamW([p[name] for name in NAMES[2:]], lr=1e-2, weight_decay=0.1)

    _same(_ours(tx), _theirs(make, clip=1.0))


def test_warmup_cosine():
    tx = optim.optimizer(
        START,
        name="adamw",
        lr=1e-2,
        schedule={"name": "warmup_cosine", "warmup_epochs": 2},
        total_steps=STEPS,
        steps_per_epoch=4,
        weight_decay=1e-2,
    )

    def schedule(o):
        warm = torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=8)
        fall = torch.optim.lr_scheduler.CosineAnnealingLR(o, STEPS - 8)
        return torch.optim.lr_scheduler.SequentialLR(o, [warm, fall], [8])

    _same(_ours(tx), _theirs(lambda p: torch.optim.AdamW(p.values(), lr=1e-2, weight_decay=1e-2), schedule))


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("cooldown", [0, 3])
def test_plateau(mode, cooldown):
    metrics = np.round(np.random.default_rng(1).uniform(0.4, 0.6, STEPS), 2)
    settings = dict(mode=mode, factor=0.5, patience=2, cooldown=cooldown)
    tx = optim.optimizer(START, name="adam", lr=1e-2, schedule={"name": "plateau", **settings})
    theirs = _theirs(
        lambda p: torch.optim.Adam(p.values(), lr=1e-2),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, **settings),
        metrics=metrics,
    )
    assert len(set(theirs[1])) > 3
    _same(_ours(tx, metrics, **settings), theirs)
