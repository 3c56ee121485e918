"""Linear layers as torch initialises them, one classifier per label, LayerNorm."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mljax.types import ArrayLike

XAVIER = nn.initializers.xavier_uniform()


def torch_linear_init(fan_in: int) -> Callable[..., jax.Array]:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): torch's default for linear weights and biases."""
    bound = float(fan_in) ** -0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def layer_norm(
    name: str, dtype: Any, epsilon: float = 1e-5
) -> Callable[[Float[Array, "*batch d"]], Float[Array, "*batch d"]]:
    """LayerNorm with torch's epsilon, computed in float32, the result in `dtype`; call it inside a compact module."""
    norm = nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, name=name)
    return lambda x: norm(x.astype(jnp.float32)).astype(dtype)


class GroupLinear(nn.Module):
    """One linear classifier per label: logit_l = w_l . x_l + b_l, in float32."""

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "b l d"]) -> Float[Array, "b l"]:
        _, labels, width = x.shape
        kernel = self.param("kernel", torch_linear_init(width), (labels, width))
        bias = self.param("bias", torch_linear_init(width), (labels,))
        return jnp.einsum("bld,ld->bl", x.astype(jnp.float32), kernel) + bias[None]


class Affine(nn.Module):
    """The kernel and bias of a Dense layer, for a caller that combines layers before it applies them."""

    features: int
    kernel_init: Callable[..., jax.Array] = nn.initializers.lecun_normal()
    bias_init: Callable[..., jax.Array] = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, inputs: int) -> tuple[Float[Array, "{inputs} d"], Float[Array, "d"]]:
        kernel = self.param("kernel", self.kernel_init, (inputs, self.features))
        return kernel, self.param("bias", self.bias_init, (self.features,))
