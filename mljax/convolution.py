"""Convolution, max pooling and batch normalisation: fast on a CPU too, with torch's values."""

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from mljax import parallel
from mljax.types import ArrayLike

# He et al. 2015, fan out: what torchvision's ResNet and TResNet start from.
HE_FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")

Padding = int | str | Sequence[tuple[int, int]]


_platform: ContextVar[str | None] = ContextVar("platform", default=None)


@contextlib.contextmanager
def compiled_for(platform: str) -> Iterator[None]:
    """What is traced inside takes the forms for a platform, "cpu" or "gpu", whatever this machine has.

    JAX keeps what it traced: trace a function of its own in here, not one that was traced outside.
    """
    token = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(token)


def on_cpu() -> bool:
    """Whether what is traced now will run on a CPU: some forms of the same sum are faster there."""
    return (_platform.get() or jax.default_backend()) == "cpu"


def conv(
    x: Float[ArrayLike, "b _ _ c"],
    kernel: Float[ArrayLike, "kh kw c//{groups} d"],
    *,
    stride: int = 1,
    groups: int = 1,
    padding: Padding = 0,
) -> Float[Array, "b _ _ d"]:
    """Convolution of a map, in the form that is fastest on this backend; all forms are the same sum.

    On a CPU a 1x1 convolution is a matrix product (its gradients too: a training step takes 1.7 to 2.5 times
    less), a depth-wise one is a sum of shifted products (MobileNet: 6.5 times faster), a grouped one and a
    bfloat16 3x3 one are sums of shifted matrix products with float32 sums (ResNeXt's gradients: over 10 times
    faster; and XLA can hand bfloat16 products to the matrix unit, but not bfloat16 convolutions). Elsewhere
    it is always a convolution.

    Args:
      kernel: of the dtype of x.
      stride: the same for h and w.
      groups: of channels; c means depth-wise.
      padding: pixels on every side, or "SAME" (as TensorFlow pads), or ((top, bottom), (left, right)).
    Returns:
      A map of the dtype of x.
    """
    size, depthwise = kernel.shape[:2], groups > 1 and kernel.shape[2] == 1 and kernel.shape[3] == groups
    pads = _pads(padding, x.shape[1:3], size, stride)
    if on_cpu():
        if size == (1, 1) and groups == 1 and not any(map(any, pads)):
            return _dot(x[:, ::stride, ::stride], kernel[0, 0])
        if depthwise:
            return _sum_of_shifts(x, kernel, stride, pads, lambda part, w: part * w.reshape(1, 1, 1, -1))
        if groups > 1:
            return _grouped(x, kernel, stride, groups, pads)
        if x.dtype == jnp.bfloat16 and size == (3, 3) and x.shape[-1] >= 32:
            product = partial(_dot, dtype=jnp.float32)
            return _sum_of_shifts(x, kernel, stride, pads, product).astype(x.dtype)
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def max_pool(x: Float[ArrayLike, "b h w c"]) -> Float[Array, "b (h+1)//2 (w+1)//2 c"]:
    """Maximum over 3x3 windows, stride 2, one pixel of padding on every side.

    A tie's gradient goes to the window's first pixel in reading order, as PyTorch's does. The gradient is that of
    shifted slices: on a CPU it costs a quarter of that of XLA's windows, and a GPU would add into the pixels of
    overlapping windows in an order that changes from run to run.
    """
    return _pool(x)


def _max_pool(x: jax.Array) -> jax.Array:
    lowest = np.array(-np.inf, x.dtype)
    return lax.reduce_window(x, lowest, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0)))


def _slices_max(x: jax.Array) -> jax.Array:
    """The same by columns, then rows."""
    for axis in (2, 1):
        n = (x.shape[axis] + 1) // 2
        pads = [(0, 0, 0)] * 4
        pads[axis] = (1, 2 * n - x.shape[axis], 0)  # 2 n + 1 in all
        padded = lax.pad(x, np.array(-np.inf, x.dtype), pads)
        first, second, third = (lax.slice_in_dim(padded, i, i + 2 * n - 1, 2, axis) for i in range(3))
        x = lax.select(first >= second, first, second)
        x = lax.select(x >= third, x, third)
    return x


_pool = jax.custom_vjp(_max_pool)
_pool.defvjp(lambda x: (_max_pool(x), x), lambda x, g: jax.vjp(_slices_max, x)[1](g))


def _pads(padding: Padding, shape: Sequence[int], size: Sequence[int], stride: int) -> list[tuple[int, int]]:
    if isinstance(padding, str):
        return list(lax.padtype_to_pads(shape, size, (stride, stride), padding))
    if isinstance(padding, int):
        return [(padding, padding)] * 2
    return [(int(low), int(high)) for low, high in padding]


def _dot(x: jax.Array, matrix: jax.Array, dtype: Any = None) -> jax.Array:
    """(b h w c) times (c d), summed in float32."""
    rows = x.reshape(-1, x.shape[-1])
    out = lax.dot(rows, matrix, preferred_element_type=jnp.float32)
    return out.reshape(*x.shape[:3], -1).astype(dtype or x.dtype)


def _sum_of_shifts(
    x: jax.Array, kernel: jax.Array, stride: int, pads: Sequence[tuple[int, int]], product: Callable
) -> jax.Array:
    """Sum over the kernel's positions of product(x shifted there, kernel there)."""
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((low, high, 0) for low, high in pads), (0, 0, 0)])
    kh, kw = kernel.shape[:2]
    h, w = ((n - k) // stride + 1 for n, k in zip(x.shape[1:3], (kh, kw), strict=True))
    return reduce(
        operator.add,
        (
            product(
                x[:, i : i + (h - 1) * stride + 1 : stride, j : j + (w - 1) * stride + 1 : stride],
                kernel[i, j],
            )
            for i in range(kh)
            for j in range(kw)
        ),
    )


def _grouped(x: jax.Array, kernel: jax.Array, stride: int, groups: int, pads: Sequence[tuple[int, int]]) -> jax.Array:
    """A grouped convolution as matrix products, of a few groups at a time in a block-diagonal matrix.

    Small groups alone (4 channels in ResNeXt's layer1) make poor products; 32 channels at a time were the
    fastest.
    """
    b, h, w, c = x.shape
    kh, kw, inner, d = kernel.shape
    together = next(n for n in range(min(groups, max(32 // inner, 1)), 0, -1) if groups % n == 0)
    blocks = groups // together
    weights = kernel.reshape(kh, kw, inner, blocks, together, d // groups)
    weights = jnp.einsum("hwisgo,gq->hwsgiqo", weights, jnp.eye(together, dtype=kernel.dtype))
    weights = weights.reshape(kh, kw, blocks, c // blocks, d // blocks)
    # blocks first, then one product per shift: (s b*h*w c/s) times (s c/s d/s)
    x = x.reshape(b, h, w, blocks, c // blocks).transpose(3, 0, 1, 2, 4).reshape(blocks * b, h, w, c // blocks)

    def product(part: jax.Array, matrices: jax.Array) -> jax.Array:
        rows = part.reshape(blocks, -1, c // blocks)
        out = lax.dot_general(rows, matrices, (((2,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32)
        return out.reshape(blocks, b, *part.shape[1:3], d // blocks)

    out = _sum_of_shifts(x, weights, stride, pads, product).astype(x.dtype)
    return out.transpose(1, 2, 3, 0, 4).reshape(b, *out.shape[2:4], d)


class Conv(nn.Module):
    """Convolution without bias unless asked for; see `conv` for how it is computed.

    Attributes:
      features: output channels.
      size: side of the kernel.
      padding: default (size - 1) // 2 on every side, as torch's models have it.
      dtype: of the computation; the kernel is float32.
    """

    features: int
    size: int = 3
    stride: int = 1
    groups: int = 1
    padding: Padding | None = None
    bias: bool = False
    dtype: Any = jnp.float32
    init: Any = HE_FAN_OUT

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "b h w c"]) -> Float[Array, "b _ _ {self.features}"]:
        shape = (self.size, self.size, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", self.init, shape, jnp.float32).astype(self.dtype)
        padding = (self.size - 1) // 2 if self.padding is None else self.padding
        y = conv(x.astype(self.dtype), kernel, stride=self.stride, groups=self.groups, padding=padding)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
            y = y + bias.astype(self.dtype).reshape(1, 1, 1, -1)
        return y


class BatchNorm(nn.Module):
    """Batch normalisation as torch does it; parameters `scale`, `bias`, variables `batch_stats/mean`, `var`.

    In training the batch is normalised with its biased variance, and the running variance moves towards the
    unbiased one, n/(n-1) times as large: running = (1 - momentum) running + momentum batch. flax's own stores
    the biased one, so its statistics are not those of a torch run. Statistics are float32 whatever the dtype.
    All axes but the last are reduced.

    Attributes:
      mode: "batch"; "running": running statistics in training too, and they do not change; "fixed": the same,
        and scale and bias get no gradient (the FrozenBatchNorm of detection models and of Query2Label).
      axis: name of the pmap axis whose devices together hold the batch; None where arrays are global.
      eps: added to the variance.
      momentum: weight of the new batch, torch's convention (flax's is one minus it).
      dtype: of the result.
    """

    mode: str = "batch"
    axis: str | None = None
    eps: float = 1e-5
    momentum: float = 0.1
    dtype: Any = jnp.float32
    scale_init: Any = nn.initializers.ones_init()

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "*batch d"], train: bool) -> Float[Array, "*batch d"]:
        d = x.shape[-1]
        if not self.is_initializing() and not self.has_variable("params", "scale"):  # mljax.fold: only the bias is left
            return x + self.get_variable("params", "bias").astype(x.dtype).reshape((1,) * (x.ndim - 1) + (d,))
        scale = self.param("scale", self.scale_init, (d,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), (d,), jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (d,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (d,), jnp.float32)
        if self.mode == "fixed":
            scale, bias = lax.stop_gradient((scale, bias))
        x = x.astype(jnp.float32)
        mean, var = running_mean.value, running_var.value
        if train and self.mode == "batch":
            mean, var, count = self._statistics(x, mean)
            if not self.is_initializing():
                unbiased = var * (count / max(count - 1, 1))
                running_mean.value += self.momentum * (lax.stop_gradient(mean) - running_mean.value)
                running_var.value += self.momentum * (lax.stop_gradient(unbiased) - running_var.value)
        wide = (1,) * (x.ndim - 1) + (d,)
        gain = (scale * lax.rsqrt(var + self.eps)).reshape(wide)
        return ((x - mean.reshape(wide)) * gain + bias.reshape(wide)).astype(self.dtype)

    def _statistics(self, x: jax.Array, near: jax.Array) -> tuple[jax.Array, jax.Array, int]:
        """Mean, biased variance and number of values per channel, over all devices, in one pass over x.

        The variance is E(x-r)^2 - E(x-r)^2 with r the running mean: near the mean, so that little cancels.
        """
        near = lax.stop_gradient(near)
        shifted = x - near.reshape((1,) * (x.ndim - 1) + (-1,))
        axes = tuple(range(x.ndim - 1))
        first, second = parallel.pmean((jnp.mean(shifted, axes), jnp.mean(jnp.square(shifted), axes)), self.axis)
        devices = 1 if self.axis is None else lax.axis_size(self.axis)
        count = x.size // x.shape[-1] * devices
        return near + first, jnp.maximum(second - jnp.square(first), 0.0), count
