"""Convolution, maximum pool and batch norm against plain numpy and PyTorch's rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mljax import convolution
from mljax.convolution import BatchNorm
from plain_convolution import conv_loops
from toy import golden_file


def to_nhwc(x):
    return np.asarray(x, np.float32).transpose(0, 2, 3, 1)


# Convolution


@pytest.mark.parametrize("size, groups, inner, outer, stride, padding", [
    (1, 1, 5, 7, 1, 0), (1, 1, 5, 7, 2, 0), (3, 1, 4, 6, 2, 1), (3, 1, 36, 8, 1, 1), (7, 1, 3, 4, 2, 3),
    (3, 6, 1, 1, 1, "SAME"), (3, 6, 1, 1, 2, "SAME"), (3, 6, 1, 1, 2, 1), (3, 4, 1, 2, 1, 1),
    (3, 8, 4, 4, 1, 1), (3, 8, 4, 6, 2, 1), (3, 3, 40, 2, 1, 1), (1, 4, 3, 5, 1, 0), (1, 1, 2, 2, 1, 1),
])  # fmt: skip
@pytest.mark.parametrize("cpu", [True, False])
def test_conv_is_a_plain_sum(monkeypatch, size, groups, inner, outer, stride, padding, cpu):
    monkeypatch.setattr(convolution, "on_cpu", lambda: cpu)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 9, 8, groups * inner)).astype(np.float32)
    kernel = rng.normal(size=(size, size, inner, groups * outer)).astype(np.float32)
    # TensorFlow: ceil(n / stride) places, what is missing before is half of it, rounded down
    missing = [max((-(-n // stride) - 1) * stride + size - n, 0) for n in (9, 8)]
    pads = [(m // 2, m - m // 2) for m in missing] if padding == "SAME" else [(padding, padding)] * 2
    wanted = conv_loops(x, kernel, stride, groups, pads)

    @jax.jit
    def ours(x, kernel):
        return convolution.conv(x, kernel, stride=stride, groups=groups, padding=padding)

    out = ours(x, kernel)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, wanted, rtol=1e-4, atol=1e-4)
    # the sum is linear in the kernel: its gradient in one direction is a convolution with that direction
    way = rng.normal(size=kernel.shape).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda k, x: jnp.sum(jnp.square(ours(x, k)))))(kernel, x)
    slope = 2 * np.sum(wanted * conv_loops(x, way, stride, groups, pads))
    np.testing.assert_allclose(np.sum(np.asarray(gradient, np.float64) * way), slope, rtol=1e-3)
    half = ours(jnp.asarray(x, jnp.bfloat16), jnp.asarray(kernel, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    assert np.abs(np.asarray(half, np.float32) - wanted).max() < 0.03 * np.abs(wanted).max()


# Maximum pool


@pytest.mark.parametrize("shape", [(9, 8), (8, 9), (7, 2), (1, 1)])
def test_max_pool_and_its_gradient_are_loops(shape):
    """Windows of 3, stride 2, padding 1; a tie's gradient goes to the first pixel in reading order."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *shape, 3)).astype(np.float32).round(1)  # rounded: there are ties
    out, back = jax.vjp(convolution.max_pool, jnp.asarray(x))
    up = rng.normal(size=out.shape).astype(np.float32)
    assert out.shape == (2, -(-shape[0] // 2), -(-shape[1] // 2), 3)
    wanted, slope = np.empty(out.shape, np.float32), np.zeros_like(x)
    for n, i, j, c in np.ndindex(*out.shape):
        window = [(h, w) for h in range(2 * i - 1, 2 * i + 2) for w in range(2 * j - 1, 2 * j + 2)]
        best = max(((h, w) for h, w in window if 0 <= h < shape[0] and 0 <= w < shape[1]), key=lambda p: x[n, *p, c])
        wanted[n, i, j, c] = x[n, *best, c]
        slope[n, *best, c] += up[n, i, j, c]
    np.testing.assert_array_equal(out, wanted)
    np.testing.assert_allclose(back(jnp.asarray(up))[0], slope, rtol=1e-5, atol=1e-6)


# Batch norm


def test_batch_norm_in_training_is_torchs():
    """Biased variance to normalise with, the unbiased one into the running variance, momentum .1."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(3, 4, 2, 5)) * 2 + 30).astype(np.float32)  # far from zero: cancellation would show
    scale, bias, mean, var = (rng.uniform(0.5, 2, 5).astype(np.float32) for _ in range(4))
    variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": {"mean": mean, "var": var}}
    y, new = BatchNorm().apply(variables, x, True, mutable=["batch_stats"])
    x = x.astype(np.float64).reshape(-1, 5)
    m, v = x.mean(0), ((x - x.mean(0)) ** 2).sum(0) / 24
    np.testing.assert_allclose(y.reshape(-1, 5), (x - m) / np.sqrt(v + 1e-5) * scale + bias, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(new["batch_stats"]["mean"], 0.9 * mean + 0.1 * m, rtol=1e-5)
    np.testing.assert_allclose(new["batch_stats"]["var"], 0.9 * var + 0.1 * v * 24 / 23, rtol=1e-4)
    y = BatchNorm(eps=1e-3).apply(variables, x.astype(np.float32), False)
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-3) * scale + bias, rtol=1e-4, atol=1e-4)


def test_batch_norm_over_two_devices_is_that_of_the_whole_batch():
    x = np.random.default_rng(0).normal(size=(2, 3, 2, 2, 4)).astype(np.float32) + 3
    variables = BatchNorm().init(jax.random.key(0), x[0], True)
    whole, stats = BatchNorm().apply(variables, x.reshape(6, 2, 2, 4), True, mutable=["batch_stats"])
    step = jax.pmap(
        lambda x: BatchNorm(axis="data").apply(variables, x, True, mutable=["batch_stats"]), axis_name="data"
    )
    parts, split = step(x)
    np.testing.assert_allclose(parts.reshape(whole.shape), whole, rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(split), jax.tree.leaves(stats), strict=True):
        np.testing.assert_allclose(a[0], b, rtol=1e-5)
        np.testing.assert_array_equal(a[0], a[1])


def test_fixed_batch_norm_is_that_of_query2label():
    case = np.load(golden_file("query2label.npz"))
    w = {k: case[f"frozenbn/w/{k}"] for k in ("weight", "bias", "running_mean", "running_var")}
    variables = {
        "params": {"scale": w["weight"], "bias": w["bias"]},
        "batch_stats": {"mean": w["running_mean"], "var": w["running_var"]},
    }
    x = to_nhwc(case["frozenbn/in/x"])
    y, new = BatchNorm("fixed").apply(variables, x, True, mutable=["batch_stats"])
    np.testing.assert_allclose(y, to_nhwc(case["frozenbn/out/y"]), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(new["batch_stats"]["var"], w["running_var"])


def test_batch_norm_in_bfloat16_has_float32_statistics():
    x = (np.random.default_rng(0).normal(size=(64, 8, 8, 2)) + 5).astype(np.float32)
    half = jnp.asarray(x, jnp.bfloat16)
    variables = BatchNorm().init(jax.random.key(0), half, True)
    y, new = BatchNorm(dtype=jnp.bfloat16).apply(variables, half, True, mutable=["batch_stats"])
    assert y.dtype == jnp.bfloat16
    exact = np.asarray(half, np.float64).reshape(-1, 2)
    np.testing.assert_allclose(new["batch_stats"]["mean"], 0.1 * exact.mean(0), rtol=1e-5)
    np.testing.assert_allclose(new["batch_stats"]["var"], 0.9 + 0.1 * exact.var(0, ddof=1), rtol=1e-5)
