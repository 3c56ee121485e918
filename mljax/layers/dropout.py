"""Dropout whose draws belong to examples: the same on any number of devices, under jit and pmap."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from mljax import parallel
from mljax.types import ArrayLike


def kept(key: Key[Array, ""], share: float, shape: tuple[int, ...], axis: int = 0) -> Bool[Array, "*shape"]:
    """What dropout keeps: each entry with probability `share`, drawn from the key and the example's place in the batch.

    Args:
      axis: of the examples on this device.
    """
    axis %= len(shape)
    rest = (*shape[:axis], *shape[axis + 1 :])
    draw = jax.vmap(lambda place: jax.random.bernoulli(jax.random.fold_in(key, place), share, rest), out_axes=axis)
    return draw(parallel.places(shape[axis]))


class Dropout(nn.Module):
    """Zeroes entries with probability `rate` in training and scales the others by 1 / (1 - rate); rng "dropout".

    Differs from `flax.linen.Dropout`: an example's mask depends on its place in the global batch, not on the device.

    Attributes:
      axis: of the examples.

    Reference: Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", JMLR 2014.
    """

    rate: float
    axis: int = 0

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "*shape"], *, train: bool) -> Float[ArrayLike, "*shape"]:
        if not train or self.rate == 0:
            return x
        if self.rate == 1:
            return jnp.zeros_like(x)
        keep = kept(self.make_rng("dropout"), 1 - self.rate, x.shape, self.axis)
        return jnp.where(keep, x / (1 - self.rate), jnp.zeros_like(x))


class DropPath(nn.Module):
    """Stochastic depth: drops the branch of whole images in training, and scales those of others; rng "dropout".

    Reference: Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016.
    """

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "b *rest"], train: bool) -> Float[Array, "b *rest"]:
        if not train or self.rate == 0:
            return x
        keep = kept(self.make_rng("dropout"), 1 - self.rate, (x.shape[0],) + (1,) * (x.ndim - 1))
        return jnp.where(keep, x / (1 - self.rate), jnp.zeros_like(x))
