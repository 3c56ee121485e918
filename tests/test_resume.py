"""Four epochs are two, an interruption, and two more: to the bit, stages and refresh included."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import toy
from mljax import parallel, rundir, systems, train
from mljax.errors import UserError
from mljax.layers import encode, final
from mljax.rundir.checkpoint import Checkpoints
from mljax.types import Outputs


class Remembering(nn.Module):
    """A toy system with a memory, random draws and a refresh, as the partial-label systems have."""

    backbone: nn.Module
    labels: int
    refresh_every: int = 2

    @nn.compact
    def __call__(self, batch, *, train=False):
        x = final(encode(self.backbone, batch, train=train)).mean((1, 2))
        memory = self.variable("memory", "mean", jnp.zeros, (x.shape[-1],))
        center = self.variable("memory", "center", jnp.zeros, (self.labels,))
        if train and not self.is_initializing():
            memory.value = 0.9 * memory.value + 0.1 * x.mean(0)
            x = x + 0.01 * jax.random.normal(self.make_rng("draw"), x.shape)
        logits = nn.Dense(self.labels)(x - memory.value[None]) - center.value[None]
        return Outputs(logits=logits, label_features=jnp.repeat(x[:, None], self.labels, 1))

    def loss(self, batch, step):
        logits = self(batch, train=True).logits
        return jnp.mean(jnp.square(logits - batch["labels"])), {}

    def refresh(self, variables, score, epoch):
        found = score("train")["logits"].mean(0)
        return {**variables, "memory": {**variables["memory"], "center": 0.1 * found + np.float32(epoch)}}


def remembering(*, backbone, meta):
    return Remembering(backbone, meta.num_labels)


@pytest.fixture
def config(add_file):
    add_file(systems, "remembering", "from test_resume import remembering\n\nNAMES = {'remembering': remembering}\n")
    found = toy.config("baseline", optim__epochs=4, ema=0.9, eval__every=1)
    found.system = {"name": "remembering"}
    found.input.train = {"crop": "random_resized", "flip": 0.5}
    return found


def last_state(workdir, stage="0"):
    with Checkpoints(workdir / "checkpoints" / stage, read_only=True) as checkpoints:
        found = checkpoints.restore_params("last")
    return toy.flat({k: found[k] for k in ("params", "variables", "ema")})


def interrupted_at(monkeypatch, batch):
    """SIGTERM to this process after so many steps, as a cluster sends it."""
    count = [0]

    def compile_step(step, kind, devices):
        compiled, place_state, place = real(step, kind, devices)

        def run(state, data):
            count[0] += 1
            if count[0] == batch:
                os.kill(os.getpid(), signal.SIGTERM)
            return compiled(state, data)

        return run, place_state, place

    real = parallel.compile_step
    monkeypatch.setattr(parallel, "compile_step", compile_step)


def trained_twice(config, tmp_path, monkeypatch, stop, message="stopped"):
    """The folders of a run as a whole, and of one that a signal stopped after so many steps and that went on."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.fit(config, whole)
    with monkeypatch.context() as patch:
        interrupted_at(patch, stop)
        with pytest.raises(train.Stop, match=message):
            train.fit(config, parts)
    train.fit(config, parts)
    return whole, parts


def same_state(whole, parts, stage="0"):
    """The last state of a stage in both folders, which must be the same to the bit."""
    state, other = last_state(whole, stage), last_state(parts, stage)
    assert state.keys() == other.keys()
    for path, value in state.items():
        np.testing.assert_array_equal(other[path], value, err_msg=path)
    return state


# Epochs have 3 steps: inside one, and after a refresh.
@pytest.mark.parametrize("stop", toy.slow_but([4, 6], [6]))
def test_interrupted_equals_uninterrupted(config, tmp_path, monkeypatch, stop):
    whole, parts = trained_twice(config, tmp_path, monkeypatch, stop, f"stopped at step {stop} of 12 and saved")
    same_state(whole, parts)
    a, b = (np.load(run / "scores.npz")["scores"] for run in (whole, parts))
    np.testing.assert_array_equal(a, b)


def test_stages_resume_inside_the_right_one(config, tmp_path, monkeypatch):
    config.stages = ({"optim": {"epochs": 2}}, {"optim": {"epochs": 2, "lr": 1e-4}, "start": "ema"})
    whole, parts = trained_twice(config, tmp_path, monkeypatch, 8, "stopped at step 2 of 6")
    for stage in ("0", "1"):
        same_state(whole, parts, stage)


def test_a_finished_run_is_not_trained_again(tmp_path, capsys):
    found = toy.config("cmsg", optim__epochs=1)
    first = train.fit(found, tmp_path / "run")
    before = last_state(tmp_path / "run")
    capsys.readouterr()
    assert train.fit(found, tmp_path / "run") == json.loads(json.dumps(first))
    assert "mAP" in capsys.readouterr().out
    after = last_state(tmp_path / "run")
    assert all((after[k] == v).all() for k, v in before.items())


def test_another_config_is_refused_by_name(tmp_path):
    found = toy.config("cmsg", optim__epochs=1)
    rundir.open_run(tmp_path / "run", found)
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")  # it came to train
    found.optim.lr = 0.5
    with pytest.raises(UserError, match=r"differs in optim.lr: 0.003 -> 0.5"):
        rundir.open_run(tmp_path / "run", found)
    found.optim.lr, found.log_every = 3e-3, 7  # what changes no result may differ
    rundir.open_run(tmp_path / "run", found)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="not empty and holds no run"):
        rundir.open_run(tmp_path / "mine", found)


@pytest.mark.slow
def test_killed_process_resumes_to_the_same_end(tmp_path):
    """kill -9 in the middle; the same command goes on and ends where an unbroken run ends."""
    base = [sys.executable, "-m", "mljax.main", "--config=configs/cmsg.py:smoke", "--config.optim.epochs=30"]
    env = {**os.environ, "XLA_FLAGS": ""}
    subprocess.run([*base, f"--workdir={tmp_path}/whole"], cwd=toy.ROOT, env=env, check=True, capture_output=True)
    process = subprocess.Popen([*base, f"--workdir={tmp_path}/parts"], cwd=toy.ROOT, env=env, stderr=subprocess.DEVNULL)
    steps = tmp_path / "parts" / "checkpoints" / "0"
    for _ in range(600):
        time.sleep(0.1)
        if len(list(steps.glob("[0-9]*"))) >= 2:
            break
    process.kill()
    process.wait()
    assert not (tmp_path / "parts" / "report.json").exists()
    subprocess.run([*base, f"--workdir={tmp_path}/parts"], cwd=toy.ROOT, env=env, check=True, capture_output=True)
    a, b = (np.load(tmp_path / run / "scores.npz")["scores"] for run in ("whole", "parts"))
    np.testing.assert_array_equal(a, b)
