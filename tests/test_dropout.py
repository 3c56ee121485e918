"""Dropout draws by example: masks, gradients, and losses that do not depend on the number of devices."""

import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toy
from mljax.layers import AttentionLayer, Dropout, DropPath


def masks(rate, shape, seed=0, **options):
    out = Dropout(rate, **options).apply({}, jnp.ones(shape), train=True, rngs={"dropout": jax.random.key(seed)})
    return np.asarray(out)


def test_rate_and_scale_by_example():
    out = masks(0.25, (500, 8, 10))
    np.testing.assert_allclose(np.unique(out), [0, 4 / 3], rtol=1e-6)
    assert abs((out > 0).mean() - 0.75) < 0.005
    flat = (out > 0).reshape(500, -1)
    assert len(np.unique(flat, axis=0)) == 500  # no two examples share a mask
    assert abs((flat[:-1] == flat[1:]).mean() - (0.75**2 + 0.25**2)) < 0.01


def test_nothing_is_drawn_where_nothing_is_dropped():
    x = jnp.ones((2, 3))
    assert Dropout(0.0).apply({}, x, train=True) is x
    assert Dropout(0.5).apply({}, x, train=False) is x
    assert not np.any(masks(1.0, (2, 3)))
    assert DropPath(0.0).apply({}, x, True) is x and DropPath(0.5).apply({}, x, False) is x


def test_masks_differ_between_steps_and_layers():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            drop = Dropout(0.5)
            return drop(x, train=True), drop(x, train=True), Dropout(0.5)(x, train=True)

    x = jnp.ones((4, 64))
    steps = [Two().apply({}, x, rngs={"dropout": jax.random.fold_in(jax.random.key(0), step)}) for step in (0, 1)]
    drawn = [np.asarray(y) for step in steps for y in step]
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            assert 0.3 < (one == other).mean() < 0.7


def test_an_example_keeps_its_mask_whatever_follows_it():
    np.testing.assert_array_equal(masks(0.5, (3, 7)), masks(0.5, (8, 7))[:3])
    np.testing.assert_array_equal(masks(0.5, (5, 8, 7), axis=1), np.moveaxis(masks(0.5, (8, 5, 7)), 0, 1))


def test_gradients_pass_where_it_keeps():
    x = jnp.arange(1.0, 41).reshape(4, 10)
    key = {"dropout": jax.random.key(2)}

    def drop(x):
        return jnp.asarray(Dropout(0.5).apply({}, x, train=True, rngs=key))

    gradient, out = jax.grad(lambda x: drop(x).sum())(x), drop(x)
    np.testing.assert_array_equal(np.asarray(gradient), np.where(np.asarray(out) > 0, 2.0, 0.0))


@pytest.mark.parametrize("module", [Dropout(0.5), Dropout(0.5, axis=1), DropPath(0.5)])
def test_devices_draw_their_part_of_the_global_batch(module):
    x = np.ones((6, 4, 5), np.float32)
    axis = getattr(module, "axis", 0)

    def call(x):
        return module.apply({}, x, train=True, rngs={"dropout": jax.random.key(0)})

    whole, parts = jax.jit(call)(x), np.stack(np.split(x, 2, axis))
    np.testing.assert_array_equal(np.concatenate(jax.pmap(call, axis_name="data")(parts), axis), whole)


def test_attention_over_the_batch_draws_for_the_examples_too():
    layer = AttentionLayer(heads=2, width=8, hidden=8, dropout=0.5, examples=1)
    x = np.random.default_rng(0).normal(size=(3, 4, 8)).astype(np.float32)
    variables = layer.init(jax.random.key(0), x, train=False)

    def call(x, everyone):
        return layer.apply(variables, x, everyone, train=True, rngs={"dropout": jax.random.key(1)})

    parts = np.stack(np.split(x, 2, 1))
    out, weights = jax.pmap(call, axis_name="data", in_axes=(0, None))(parts, x)
    expected, attention = call(x, x)
    toy.close(np.concatenate(out, 1), expected)
    toy.close(np.concatenate(weights, 2), attention)


def dropped(name):
    config = toy.shallow(toy.config(name, seed=3))
    config.system.dropout = 0.5
    config.optim.update(name="sgd", schedule={"name": "constant"}, lr=1e-3)
    return config


@pytest.mark.parametrize("name", toy.slow_but(["baseline", "ml_decoder"], ["baseline"]))
def test_losses_are_the_same_on_any_devices(name):
    config = dropped(name)
    steps = toy.Steps(config)
    _, expected = steps("jit", 1)
    for kind in ("jit", "pmap"):
        np.testing.assert_allclose(steps(kind, 2)[1], expected, rtol=1e-6, err_msg=kind)
    config.system.dropout = 0.0
    assert abs(np.subtract(toy.Steps(config)("jit", 1)[1], expected)).max() > 1e-3  # it does drop


EIGHT = """
import sys
sys.path.insert(0, "tests")
import conftest, toy, test_dropout
import numpy as np
config = test_dropout.dropped("c_tran")
config.optim.batch_size = 8
steps = toy.Steps(config)
expected = steps("jit", 1)[1]
for kind, devices in (("jit", 8), ("pmap", 4), ("pmap", 8)):
    np.testing.assert_allclose(steps(kind, devices)[1], expected, rtol=1e-6, err_msg=f"{kind} {devices}")
"""


@pytest.mark.slow
def test_losses_are_the_same_on_up_to_eight_devices():
    flags = os.environ["XLA_FLAGS"].replace("device_count=2", "device_count=8")
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(toy.ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", EIGHT], cwd=toy.ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
