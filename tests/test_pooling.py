"""Pooling by the maximum: its values, and where its gradient goes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mljax.layers import largest


@pytest.mark.parametrize("axis", [1, -1, (1, 2), (0, 3)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_largest_is_the_maximum(axis, dtype):
    x = np.random.default_rng(0).normal(size=(3, 4, 5, 6)).astype(dtype)
    x[0, 1, 2, 3] = np.inf
    np.testing.assert_array_equal(jax.jit(largest, static_argnums=1)(x, axis), x.max(axis))


def test_a_nan_stays():
    assert np.isnan(largest(jnp.array([[1.0, np.nan, 3.0]]), 1)).all()


def test_gradient_goes_to_the_first_of_the_largest():
    """As torch's max pooling has it; `x.max()` would share it among them."""
    x = jnp.array([[[2.0, 1.0], [2.0, 5.0], [0.0, 5.0]]])
    gradient = jax.grad(lambda x: (largest(x, 1) * jnp.array([[3.0, 7.0]])).sum())(x)
    np.testing.assert_array_equal(gradient, [[[3, 0], [0, 7], [0, 0]]])
