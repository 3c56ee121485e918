"""What is not finite ends a run at its step, whatever log_every is, is never saved, and is explained."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import toy
from mljax import parallel, systems, train
from mljax.errors import UserError
from mljax.layers import encode, final
from mljax.rundir.checkpoint import Checkpoints
from mljax.train.loop import IN_FLIGHT
from mljax.types import Outputs

AT = 7  # steps of an epoch: 3; the checkpoint before is of step 6


class Fragile(nn.Module):
    """A toy system that breaks at step AT in one of several places."""

    backbone: nn.Module
    labels: int
    place: str = ""

    @nn.compact
    def __call__(self, batch, *, train=False):
        x = final(encode(self.backbone, batch, train=train)).mean((1, 2))
        memory = self.variable("memory", "mean", jnp.zeros, (x.shape[-1],))
        return Outputs(logits=nn.Dense(self.labels)(x) + 0 * jnp.nan_to_num(memory.value).sum())

    @nn.compact
    def loss(self, batch, step):
        bad, nan = step == AT, jnp.float32(jnp.nan)
        logits = self(batch, train=True).logits
        if self.place == "memory" and not self.is_initializing():
            memory = self.variable("memory", "mean", jnp.zeros, (1,))
            memory.value = jnp.where(bad, nan, memory.value)
        loss = jnp.mean(jnp.square(logits - batch["labels"]))
        if self.place == "loss":
            loss = jnp.where(bad, nan, loss)
        if self.place == "gradient":
            loss = loss + jnp.sqrt(jnp.where(bad, 0.0, 1.0) * jnp.abs(logits).sum())
        return loss, {}


def fragile(*, backbone, meta, place=""):
    return Fragile(backbone, meta.num_labels, place)


CAUSES = {
    "input": "cause is probably the input, which is not finite",
    "label": "cause is probably the labels, which are not from 0 to 1",
    "loss": "cause is probably the loss, since input, labels and parameters were finite",
    "gradient": "cause is probably the gradient, since the loss itself is finite",
    "memory": "cause is probably a memory or statistic that the system updates itself",
}


@pytest.fixture
def run(add_file, tmp_path, monkeypatch):
    """Trains with a fault in one place: the message, how many steps were started, and the folder."""
    add_file(systems, "fragile", "from test_not_finite import fragile\n\nNAMES = {'fragile': fragile}\n")
    started, real = [], parallel.compile_step

    def fit(place, **changes):
        def compile_step(*given):
            step, place_state, to_devices = real(*given)

            def counted(state, batch):
                started.append(len(started))
                return step(state, batch)

            def put(batch):
                batch = {**batch, "image": batch["image"].astype(np.float32), "labels": batch["labels"].copy()}
                if len(placed) == AT:
                    {"input": batch["image"], "label": batch["labels"]}.get(place, np.ones(16))[5] = np.nan
                placed.append(batch["index"])
                return to_devices(batch)

            return counted, place_state, put

        placed = []
        monkeypatch.setattr(parallel, "compile_step", compile_step)
        config = toy.small(**{"eval__every": 1, "ema": 0.9, "devices": 1, **changes})
        config.optim.epochs = 5
        config.system = {"name": "fragile", "place": place if place in ("loss", "gradient", "memory") else ""}
        with pytest.raises(UserError) as error:
            train.fit(config, tmp_path / "run")
        return str(error.value), len(started), placed, tmp_path / "run"

    return fit


@pytest.mark.parametrize("log_every", toy.slow_but([1, 20], [20]))  # the later one is the harder
@pytest.mark.parametrize("place", CAUSES)
def test_a_fault_ends_the_run_at_its_step_unsaved(run, place, log_every):
    message, started, placed, workdir = run(place, log_every=log_every)
    index = placed[AT]
    assert f"step {AT} is" in message and "keeps the checkpoint of step 6" in message, message
    assert CAUSES[place] in message
    assert AT + 1 <= started <= AT + 1 + IN_FLIGHT
    named = [f"'train-{row:06d}'" for row in ([index[5]] if place in ("input", "label") else index)]
    assert all(name in message for name in named) and message.count("'train-") == len(named)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in lines) == AT and "NaN" not in (workdir / "metrics.jsonl").read_text()
    with Checkpoints(workdir / "checkpoints" / "0", read_only=True) as checkpoints:
        assert checkpoints.steps == [3, 6]
        state = checkpoints.restore_params("last")
    assert all(np.isfinite(x).all() for x in toy.flat(state).values())


@pytest.mark.parametrize("changes", [{}, {"devices": 2, "parallel": "pmap"}])
def test_a_learning_rate_that_is_too_high(run, changes):
    """The first update gives parameters beyond what the next step can bear, or that are not finite at once."""
    settings = {"optim__lr": 1e30, "optim__schedule": {"name": "constant"}, "log_every": 20}
    message, started, _, workdir = run("", **settings, **changes)
    assert "cause is probably the learning rate" in message and "Lower config.optim.lr" in message, message
    assert started <= 3 + IN_FLIGHT and not list(workdir.glob("checkpoints/0/[0-9]*"))


def test_more_images_than_a_line_holds_are_listed(run):
    message, _, placed, workdir = run("loss", optim__batch_size=24)
    assert "and 8 more (all in diverged.json)" in message
    listed = json.loads((workdir / "diverged.json").read_text())
    assert listed["images"] == [f"train-{row:06d}" for row in placed[AT]] and listed["cause"].startswith("the loss")


def test_a_healthy_run_is_the_same_to_the_bit_with_and_without(monkeypatch, tmp_path):
    """What watches a step is a program of its own."""
    config = toy.small(ema=0.9)
    train.fit(config, tmp_path / "watched")
    monkeypatch.setattr("mljax.train.stage.watched", lambda step: step)
    train.fit(config, tmp_path / "plain")
    states = []
    for name in ("watched", "plain"):
        with Checkpoints(tmp_path / name / "checkpoints" / "0", read_only=True) as checkpoints:
            states.append(toy.flat(checkpoints.restore_params("last")))
    for path, value in states[0].items():
        np.testing.assert_array_equal(states[1][path], value, err_msg=path)


def test_the_last_step_before_a_refresh_is_blamed_not_the_refresh(run, monkeypatch):
    seen = []

    def refresh(self, variables, score, epoch):
        seen.append(epoch)
        return variables

    monkeypatch.setattr(Fragile, "refresh", refresh, raising=False)
    monkeypatch.setattr("test_not_finite.AT", 5)  # epochs have 3 steps
    message, _, _, _ = run("memory", eval__every=5)
    assert "step 5 is" in message and "refresh" not in message, message
    assert seen == [0, 1]


def test_a_refresh_that_is_not_finite_ends_the_run(add_file, tmp_path, monkeypatch):
    def refresh(self, variables, score, epoch):
        return {**variables, "memory": jax.tree.map(lambda x: x + (np.nan if epoch else 0), variables["memory"])}

    monkeypatch.setattr(Fragile, "refresh", refresh, raising=False)
    add_file(systems, "fragile", "from test_not_finite import fragile\n\nNAMES = {'fragile': fragile}\n")
    config = toy.small(system={"name": "fragile"})
    with pytest.raises(UserError, match="memory/mean is not finite after the refresh before epoch 1; .*step 3"):
        train.fit(config, tmp_path / "run")
