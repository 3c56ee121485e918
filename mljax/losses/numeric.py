"""Arithmetic of the losses: float32 at least, in log space, finite with its gradient at the ends of the range."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from mljax.types import ArrayLike


def wide(x: Shaped[ArrayLike, "*shape"]) -> Float[ArrayLike, "*shape"]:
    """float64 as it is, all else as float32: half precision saturates the logarithms."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def floats(
    logits: Shaped[ArrayLike, "*shape"], labels: Shaped[ArrayLike, "*other"]
) -> tuple[Float[ArrayLike, "*shape"], Float[ArrayLike, "*other"]]:
    """Both in the dtype of the logits, float32 at least."""
    x = wide(logits)
    return x, labels.astype(x.dtype)


def unit(x: Float[ArrayLike, "*batch d"], eps: float = 1e-8) -> Float[Array, "*batch d"]:
    """x / max(|x|, eps) along the last axis, with a finite gradient at 0."""
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, eps * eps))


def negative_log_sigmoid(x: Float[ArrayLike, "*shape"], eps: float) -> Float[Array, "*shape"]:
    """-log(sigmoid(x) + eps)."""
    return -jnp.log(jax.nn.sigmoid(x) + eps) if eps else -jax.nn.log_sigmoid(x)


def log_complement(
    p: Float[ArrayLike, "*shape"], not_p: Float[ArrayLike, "*shape"], clip: float
) -> Float[Array, "*shape"]:
    """log min(1 - p + clip, 1), from the side on which it is exact; both sides have a finite gradient."""
    low = p < 0.5
    near_one = jnp.log1p(-jax.nn.relu(jnp.where(low, p, 0) - clip))
    return jnp.where(low, near_one, jnp.log(jnp.minimum(jnp.where(low, 1, not_p) + clip, 1)))


def at_least(log_p: Float[ArrayLike, "*shape"], eps: float) -> Float[Array, "*shape"]:
    """log(max(p, eps)) from log p, with gradient 0 below eps."""
    return jnp.where(log_p > math.log(eps), log_p, math.log(eps)) if eps else log_p


def safe_power(base: Float[ArrayLike, "*shape"], exponent: float) -> Float[Array, "*shape"]:
    """base**exponent for a base in [0, 1], with 0**0 = 1 and a finite gradient at 0."""
    if exponent == 0:
        return jnp.ones_like(base)
    inside = base > 0
    return jnp.where(inside, jnp.where(inside, base, 1) ** exponent, 0)
