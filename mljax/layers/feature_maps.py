"""What every system reads first: the endpoints of a backbone, and constant arrays."""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from mljax.types import ArrayLike, Batch, Constant


def encode(backbone: nn.Module | None, batch: Batch, *, train: bool) -> dict[str, Float[ArrayLike, "b _ _ _"]]:
    """The endpoints by stride of a batch that holds an image, or cached endpoints in place of it."""
    if "endpoints" in batch:
        return dict(batch["endpoints"])
    assert backbone is not None
    return backbone(batch["image"], train=train)


def final(endpoints: Mapping[str, Float[ArrayLike, "b _ _ _"]]) -> Float[ArrayLike, "b h w d"]:
    """The last feature map: the only endpoint, or the one of the largest stride."""
    if len(endpoints) == 1:
        return next(iter(endpoints.values()))
    return endpoints[max((k for k in endpoints if k.isdigit()), key=int)]


def tokens(feature_map: Float[ArrayLike, "b h w d"]) -> Float[ArrayLike, "b h*w d"]:
    """The positions of a map in reading order."""
    b, h, w, d = feature_map.shape
    return feature_map.reshape(b, h * w, d)


def constant(module: nn.Module, name: str, value: Constant | Callable[[], np.ndarray]) -> Shaped[ArrayLike, "..."]:
    """A fixed array of `variables["constants"]`: part of the checkpoint, never of a gradient.

    Args:
      value: the array, or a function that computes it; called only when the variables are made.
    """
    return module.variable(
        "constants", name, lambda: jnp.asarray(value.value if isinstance(value, Constant) else value())
    ).value
