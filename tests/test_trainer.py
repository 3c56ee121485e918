"""The trainer: its step against numpy, its loop with hooks that take notes, signals, divergence."""

import json
import os
import signal
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toy
from mljax import parallel, train
from mljax.bench import model as bench_model
from mljax.errors import UserError
from mljax.rundir.checkpoint import Checkpoints
from mljax.rundir.progress import Meter, Writer
from mljax.train.loop import IN_FLIGHT, Diverged, Loop, Plan
from mljax.train.stage import StageSpec
from mljax.types import TrainState


def tiny(**changes):
    found = toy.config("baseline", **{"devices": 1, **changes})
    found.backbone.widths, found.input.size = (4, 4, 4, 4), 32
    return found


# --- the step --------------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """Least squares, with a count of its steps and a constant."""

    @nn.compact
    def __call__(self, batch):
        kernel = self.param("kernel", nn.initializers.zeros, (2,))
        self.variable("constants", "scale", lambda: jnp.float32(2))
        return batch["x"] @ kernel * self.get_variable("constants", "scale")

    @nn.compact
    def loss(self, batch, step):
        seen = self.variable("memory", "seen", lambda: jnp.int32(0))
        if not self.is_initializing():
            seen.value = seen.value + 1
        error = self(batch) - batch["y"]
        return jnp.mean(error**2), {"largest": jnp.abs(error).max()}


def test_a_step_is_gradient_descent():
    """One step of SGD on least squares, computed by hand: parameters, average, norm, terms; nothing else changes."""
    settings = {"name": "sgd", "lr": 0.1, "schedule": {"name": "constant"}, "weight_decay": 0.0, "momentum": 0.0}
    config = toy.config("baseline", optim=settings | {"epochs": 1, "batch_size": 5}, ema=0.75)
    experiment = SimpleNamespace(config=config, system=Linear(), prepare=lambda batch: batch)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, 2)).astype(np.float32), rng.normal(size=5).astype(np.float32)
    w = np.array([0.5, -1.0], np.float32)
    tx = train.make_optimizer(config, {"kernel": w}, 10)
    variables = {"params": {"kernel": w}, "constants": {"scale": jnp.float32(2)}, "memory": {"seen": jnp.int32(7)}}
    state = train.create_state(variables, tx, ema=config.ema, seed=3)
    after, metrics = jax.jit(train.make_step(experiment, tx))(state, {"x": x, "y": y})

    error = 2 * x @ w - y
    gradient = 2 * (2 * x).T @ error / len(y)
    np.testing.assert_allclose(after.params["kernel"], w - 0.1 * gradient, rtol=1e-5)
    np.testing.assert_allclose(after.ema["params"]["kernel"], w - 0.25 * 0.1 * gradient, rtol=1e-5)
    assert float(metrics["loss"]) == pytest.approx(np.mean(error**2), rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(np.sqrt(np.sum(gradient**2)), rel=1e-5)
    assert float(metrics["largest"]) == pytest.approx(np.abs(error).max(), rel=1e-5)
    assert float(metrics["lr"]) == pytest.approx(0.1)
    assert (int(after.step), int(after.variables["memory"]["seen"])) == (1, 8)
    assert float(after.variables["constants"]["scale"]) == 2
    np.testing.assert_array_equal(after.rng, state.rng)  # draws fold in the step


def test_an_optimizer_setting_that_does_not_exist():
    config = toy.config("baseline")
    with config.unlocked():
        config.optim.momentun = 0.9
    with pytest.raises(UserError, match=r"config.optim \('adamw'\) has no setting 'momentun'"):
        train.make_optimizer(config, {"kernel": jnp.zeros(2)}, 10)


@pytest.mark.parametrize("kind, devices", [("jit", 1), ("jit", 2), ("pmap", 2)])
def test_the_step_writes_its_state_over_the_old_one(kind, devices):
    """Donated: results lie where the arguments did, so that the state is held once.

    All of its arrays; of its numbers the learning rate is only written, so that it is no argument of the program.
    """
    model = bench_model.Model(tiny(devices=devices, parallel=kind, ema=0.9))
    state = jax.eval_shape(model.state_of, model.variables)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state) if x.ndim)
    stats = model.training(4).call.memory_analysis()
    assert stats.alias_size_in_bytes >= size > 4 * sum(x.size for x in jax.tree.leaves(state.params))


# --- the loop --------------------------------------------------------------------------------------------------------


class Notes:
    """Hooks that write down what is called."""

    def __init__(self):
        self.calls = []

    def before_epoch(self, state, epoch):
        self.calls.append(("epoch", epoch, int(state.step)))
        return state

    def evaluate(self, state, step, meter):
        assert int(state.step) == step
        self.calls.append(("evaluate", step))
        return state

    def save(self, state, step):
        assert int(state.step) == step
        self.calls.append(("save", step))

    def flush(self):
        self.calls.append(("flush",))


def looped(workdir, plan, start=0, step=None, loss=lambda step: 1.0):
    """What the hooks of a loop over counting steps were called with, and what it raised."""

    def count(state, batch):
        done = int(state.step)
        assert batch == done  # each step gets its own batch
        if step is not None:
            step(done)
        metrics = {"loss": np.float32(loss(done)), "grad_norm": np.float32(1), "lr": np.float32(done)}
        return state.replace(step=np.int32(done + 1)), metrics

    def batches(first, end):
        yield from range(first, end)

    state = TrainState(np.int32(start), {}, {}, {}, None, np.zeros(2, np.uint32))
    hooks, raised = Notes(), None
    with Writer(workdir) as writer:
        writer.console.quiet = True
        loop = Loop(plan, count, lambda batch: batch, batches, hooks, Meter(writer, "", start, plan.total, 4))
        try:
            state = loop.run(state)
        except (Diverged, train.Stop) as error:
            raised = error
    return hooks.calls, state, raised


def logged(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


PLAN = Plan(steps_per_epoch=3, total=8, evaluate_every=6, log_every=2)


def test_a_plan_evaluates_every_so_often_and_at_the_end():
    assert [step for step in range(1, 9) if PLAN.evaluates(step)] == [6, 8]


def test_the_loop_calls_its_hooks_in_order(tmp_path):
    calls, state, _ = looped(tmp_path, PLAN)
    assert calls == [
        *[("epoch", 0, 0), ("epoch", 1, 3), ("evaluate", 6), ("epoch", 2, 6), ("evaluate", 8)],
        ("flush",),
    ]
    assert int(state.step) == 8


def test_the_loop_goes_on_inside_an_epoch(tmp_path):
    """It does not begin that epoch again."""
    calls, _, _ = looped(tmp_path, PLAN, start=4)
    assert calls == [("evaluate", 6), ("epoch", 2, 6), ("evaluate", 8), ("flush",)]


def test_lines_are_means_over_log_every_steps(tmp_path):
    """The rate is that of the last of them; an evaluation ends a line early."""
    losses = [0.5, 1.5, 4.0, 2.0, 8.0]
    looped(tmp_path, Plan(5, 5, 5, 2, stage=1), loss=losses.__getitem__)
    lines = [(line["step"], line["stage"], line["loss"], line["lr"]) for line in logged(tmp_path)]
    assert lines == [(2, 1, 1.0, 1.0), (4, 1, 3.0, 3.0), (5, 1, 8.0, 4.0)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at, expected", [(3, ("save", 4)), (5, ("evaluate", 6))])
def test_a_signal_finishes_the_step_saves_and_stops(tmp_path, number, at, expected):
    """At a step that is evaluated anyway, the evaluation saves."""

    def step(done):
        if done == at:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    calls, _, raised = looped(tmp_path, PLAN, step=step)
    assert isinstance(raised, train.Stop) and str(raised).startswith(f"stopped at step {at + 1} of 8 and saved")
    assert calls[-2:] == [expected, ("flush",)] and sum(call[0] == "save" for call in calls) == (at == 3)
    assert logged(tmp_path)[-1]["step"] == at + 1
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("bad", [0, 1, 5, 7])
def test_a_loss_that_is_not_finite_ends_the_loop_unsaved(tmp_path, value, bad):
    """It names the step; the lines before it are kept; nothing is evaluated or saved from that step on."""
    calls, _, raised = looped(tmp_path, PLAN, loss=lambda step: value if step >= bad else 1.0)
    assert isinstance(raised, Diverged) and f"The loss of step {bad} is {value}" in str(raised)
    assert all(call[1] <= bad for call in calls if call[0] in ("save", "evaluate"))
    if bad:
        lines = logged(tmp_path)
        assert lines[-1]["step"] == bad and all(np.isfinite(line["loss"]) for line in lines)


def test_a_signal_after_a_bad_loss_saves_nothing(tmp_path):
    calls, _, raised = looped(
        tmp_path, PLAN, loss=lambda step: np.nan if step == 2 else 1.0,
        step=lambda done: os.kill(os.getpid(), signal.SIGTERM) if done == 3 else None,
    )  # fmt: skip
    assert isinstance(raised, Diverged) and not [call for call in calls if call[0] == "save"]


def test_the_host_never_waits_for_the_last_step(monkeypatch, tmp_path):
    """Metrics are fetched when two later steps are dispatched, and no more than those are ever in flight."""
    dispatched, done, fetched = [], [], []
    place, wait, get = parallel.compile_step, jax.block_until_ready, jax.device_get

    def counted(*given):
        step, *rest = place(*given)

        def kept(state, batch):
            state, metrics = step(state, batch)
            dispatched.append(metrics["loss"])
            return state, metrics

        return kept, *rest

    def waited(x):
        done.extend((len(dispatched), i) for i, loss in enumerate(dispatched, 1) if loss is x)
        return wait(x)

    def got(x):
        if isinstance(x, list) and x and isinstance(x[0], tuple):
            fetched.append((x[-1][0] + 1, len(dispatched)))
        return get(x)

    monkeypatch.setattr(parallel, "compile_step", counted)
    config = tiny(log_every=4)
    config.optim.epochs, config.optim.batch_size, config.eval.every = 2, 4, 1
    monkeypatch.setattr(jax, "block_until_ready", waited)
    monkeypatch.setattr(jax, "device_get", got)
    train.fit(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    written = [line["step"] for line in lines if "loss" in line]
    total = len(dispatched)
    epoch = total // 2
    assert written == sorted({*range(4, total + 1, 4), epoch, total})
    for until, seen in fetched:
        assert seen in (until + IN_FLIGHT, *((until,) if until in (epoch, total) else ()))
    assert len(done) == total - 2 * IN_FLIGHT  # at every step but the first two of an epoch,
    assert {now - waited_for for now, waited_for in done} == {IN_FLIGHT}  # for the one that is two steps back


# --- stages ----------------------------------------------------------------------------------------------------------


def test_memory_that_runs_out_names_the_stage_and_its_batch(tmp_path):
    spec = StageSpec(toy.config("baseline", eval__batch_size=48), tmp_path, 1, 2)
    with (
        pytest.raises(UserError, match="An evaluation batch of 48 at .* of stage 2 does not fit"),
        spec.fitting("eval"),
    ):
        raise MemoryError
    with pytest.raises(RuntimeError, match="something else"), spec.fitting("optim"):
        raise RuntimeError("something else")


def test_a_stage_is_labelled_where_there_are_several(tmp_path):
    config = toy.config("baseline")
    assert StageSpec(config, tmp_path).label == "" and StageSpec(config, tmp_path).is_last
    first = StageSpec(config, tmp_path, 0, 2)
    assert first.label == "stage 1/2 " and not first.is_last and first.folder == tmp_path / "checkpoints" / "0"


def test_a_loss_that_is_no_number_stops_and_keeps_the_good_checkpoint(tmp_path, monkeypatch):
    found = toy.config("baseline", optim__epochs=3)
    original = train.make_step

    def poisoned(run, tx):
        step = original(run, tx)

        def wrapped(state, batch):
            state, metrics = step(state, batch)
            return state, {**metrics, "loss": jnp.where(state.step == 5, jnp.nan, metrics["loss"])}

        return wrapped

    monkeypatch.setattr("mljax.train.stage.make_step", poisoned)
    with pytest.raises(UserError, match=r"loss of step 4 is nan.*keeps the checkpoint of step 3"):
        train.fit(found, tmp_path / "run")
    with Checkpoints(tmp_path / "run" / "checkpoints" / "0", read_only=True) as checkpoints:
        kept = checkpoints.restore_params("last")
    assert all(np.isfinite(x).all() for x in toy.flat([kept["params"], kept["variables"]]).values())
