"""From a loss per entry to one number: the only place where losses are summed over a batch."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Num, Shaped

from mljax import parallel
from mljax.errors import one_of
from mljax.losses.numeric import floats
from mljax.types import ArrayLike

REDUCTIONS = ("mean", "batch_mean", "sum")


def reduce(
    values: Num[ArrayLike, "b l"],
    weights: Shaped[ArrayLike, "b l"],
    *,
    how: str,
    mask: Num[ArrayLike, "b"] | None = None,
    axis: str | None = None,
) -> Float[Array, ""]:
    """One number from a loss per entry, such that its mean over devices is the loss of the global batch.

    Args:
      values: the loss of every entry.
      weights: observed * mask (see `elementwise.entries`); an entry of weight 0 is left out whatever its value.
      how: "mean" over the known entries of the batch; "batch_mean": sum over labels, mean over images; "sum".
      mask: the images that "batch_mean" counts; without it, those with an entry of positive weight.
      axis: of pmap, or None under jit. Counts are those of all devices.
    Returns:
      0 with gradient 0 where nothing counts.
    Raises:
      UserError: `how` is not one of `REDUCTIONS`.
    """
    one_of("config.loss.reduction", how, REDUCTIONS)
    values, weights = floats(values, weights)
    total = jnp.sum(jnp.where(weights > 0, values, 0) * weights)
    if how == "sum":
        return total * parallel.psum(1.0, axis)
    if how == "mean":
        count = jnp.sum(weights)
    else:
        images = jnp.any(weights > 0, axis=-1) if mask is None else mask
        count = jnp.sum(images.astype(values.dtype))
    count = parallel.pmean(count, axis)
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1), 0)
