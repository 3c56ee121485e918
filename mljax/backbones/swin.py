"""Swin Transformer: attention in windows that shift from block to block.

Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", ICCV 2021, arXiv 2103.14030.
"""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float, Int

from mljax.backbones import _common, _transformer
from mljax.backbones._common import Endpoints, Image
from mljax.backbones._swin_weights import adapt, convert
from mljax.backbones._transformer import SMALL_NORMAL, TORCH_CONV, LayerNorm, Mlp, gelu
from mljax.convolution import Conv
from mljax.layers import DropPath
from mljax.types import ArrayLike

STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")
STRIDES = ("4", "8", "16", "32")


@cache
def _relative_index(size: int, window: int) -> Int[np.ndarray, "n n"]:
    """Rows of the bias table for the offsets between the n = size*size positions in a window.

    The table has (2*window-1)^2 rows; a size below the window reads its middle.
    """
    y, x = np.divmod(np.arange(size * size), size)
    dy, dx = y[:, None] - y[None, :] + window - 1, x[:, None] - x[None, :] + window - 1
    return dy * (2 * window - 1) + dx


@cache
def _regions(h: int, w: int, size: int, shift: int) -> Int[np.ndarray, "m n"]:
    """For the m windows of n positions of a shifted map: which part of the image a position came from.

    Parts must not attend to each other.
    """

    def part(length: int) -> np.ndarray:
        i = np.arange(length)
        return (i >= length - size).astype(np.int32) + (i >= length - shift)

    region = part(h)[:, None] * 3 + part(w)[None, :]
    return region.reshape(h // size, size, w // size, size).swapaxes(1, 2).reshape(-1, size * size)


class _Attention(nn.Module):
    """softmax(q k^T / sqrt(d/heads) + bias + mask) v in every window (eq. 4)."""

    heads: int
    window: int
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[ArrayLike, "b m n d"], size: int, region: Int[np.ndarray, "m n"] | None
    ) -> Float[Array, "b m n d"]:
        """m windows of n = size*size positions."""
        b, m, n, d = x.shape
        dense = partial(nn.Dense, dtype=self.dtype, kernel_init=SMALL_NORMAL)
        parts = jnp.split(dense(3 * d, name="qkv")(x), 3, axis=-1)
        q, k, v = (part.reshape(b, m, n, self.heads, d // self.heads) for part in parts)
        table = self.param("bias_table", SMALL_NORMAL, ((2 * self.window - 1) ** 2, self.heads), jnp.float32)
        bias = jnp.moveaxis(table[_relative_index(size, self.window)], -1, 0)  # (k n n)
        scores = jnp.einsum("bmqkd,bmpkd->bmkqp", q, k, preferred_element_type=jnp.float32)
        scores = scores * (d // self.heads) ** -0.5 + bias[None, None]
        if region is not None:
            apart = jnp.asarray(region)[:, :, None] != jnp.asarray(region)[:, None, :]
            scores = scores + jnp.where(apart, -100.0, 0.0).astype(jnp.float32)[None, :, None]
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        y = jnp.einsum("bmkqp,bmpkd->bmqkd", weights, v).reshape(b, m, n, d)
        return dense(d, name="out")(y)


class _Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) (eq. 3)."""

    heads: int
    window: int
    shifted: bool
    drop_path: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "b h w d"], train: bool) -> Float[Array, "b h w d"]:
        b, h, w, d = x.shape
        size = min(self.window, h, w)
        shift = self.window // 2 if self.shifted and min(h, w) > self.window else 0
        y = LayerNorm(self.dtype, name="norm1")(x)
        y = lax.pad(y, jnp.zeros((), y.dtype), [(0, 0, 0), (0, -h % size, 0), (0, -w % size, 0), (0, 0, 0)])
        rows, columns = y.shape[1] // size, y.shape[2] // size
        region = _regions(y.shape[1], y.shape[2], size, shift) if shift else None
        if shift:
            y = jnp.roll(y, (-shift, -shift), (1, 2))
        y = y.reshape(b, rows, size, columns, size, d).swapaxes(2, 3).reshape(b, -1, size * size, d)
        y = _Attention(self.heads, self.window, self.dtype, name="attention")(y, size, region)
        y = y.reshape(b, rows, columns, size, size, d).swapaxes(2, 3).reshape(b, rows * size, columns * size, d)
        if shift:
            y = jnp.roll(y, (shift, shift), (1, 2))
        x = x + DropPath(self.drop_path, name="drop1")(y[:, :h, :w], train)
        y = LayerNorm(self.dtype, name="norm2")(x)
        y = Mlp(gelu, self.dtype, name="mlp")(y)
        return x + DropPath(self.drop_path, name="drop2")(y, train)


class _Merge(nn.Module):
    """Four neighbours side by side, normalised, projected."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "b h w d"]) -> Float[Array, "b h//2 w//2 2*d"]:
        d = x.shape[-1]
        # The column is the slow index of the four, as in the authors' concatenation.
        x = jnp.concatenate([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], axis=-1)
        x = LayerNorm(self.dtype, name="norm")(x)
        return nn.Dense(2 * d, use_bias=False, dtype=self.dtype, kernel_init=SMALL_NORMAL, name="reduction")(x)


class _Stem(nn.Module):
    """Patches of 4x4 pixels -> tokens."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, image: Float[ArrayLike, "b h w 3"]) -> Float[Array, "b h//4 w//4 {self.width}"]:
        conv = Conv(self.width, 4, 4, padding=0, bias=True, dtype=self.dtype, init=TORCH_CONV, name="conv")
        return LayerNorm(self.dtype, name="norm")(conv(image))


class _Layer(nn.Module):
    """A stage: blocks, every second one shifted, then (but for the last) the merging that leads to the next stage."""

    heads: int
    window: int
    drop_path: tuple[float, ...]
    merge: bool
    remat: bool
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[ArrayLike, "b h w d"], train: bool
    ) -> tuple[Float[Array, "b h w d"], Float[Array, "b _ _ _"]]:
        block_type = nn.remat(_Block, static_argnums=(2,)) if self.remat else _Block
        for i, rate in enumerate(self.drop_path):
            block = block_type(self.heads, self.window, i % 2 == 1, rate, self.dtype, name=f"block{i + 1}")
            x = block(x, train)
        return x, (_Merge(self.dtype, name="merge")(x) if self.merge else x)


class Swin(nn.Module):
    """Image -> feature maps by stride.

    Endpoint "32" is the map after the final LayerNorm: what Query2Label uses. "4", "8" and "16" are the outputs of the
    first three stages before their patch merging and without a norm: transformers' `reshaped_hidden_states` with
    `output_hidden_states_before_downsampling=True`, timm's `features_only`. All stages are built whatever the
    endpoints.

    Legal images: height and width multiples of 32. A map that does not divide into windows is padded with zeros at
    the bottom and right, which take part in attention (as in transformers and the authors' detection code; the
    classification code asks for multiples of 32*window). Where a side is not longer than the window, the window
    shrinks to the shorter side and does not shift; the middle of its bias table is used.

    Attributes:
      width: channels of the first stage; every later one has twice as many.
      depths, heads: per stage.
      window: side of a window, in tokens: 7 for 224 pixels, 12 for 384.
      frozen: comma list of "stem", "layer1" .. "layer4", or "all": no gradient, no drop path. A layer holds the patch
        merging after it; layer4 also the final norm.
      norm: "batch" or "frozen", as other backbones have it; without effect, since there is no BatchNorm.
      dtype: of the computation, float32 or bfloat16; softmax and norms are float32, as are all parameters.
      axis: the pmap axis, unused.
      endpoints: strides to return.
      remat: recompute every block in the backward pass instead of storing its activations.
      drop_path: stochastic depth of the last block; it grows from 0 at the first (rng "dropout", in training only).
    No gradient reaches the middle third of any attention/qkv/bias: a bias of the keys cancels in the softmax.
    Differs from the authors' code: no absolute position table and no dropout, which no published weights use; the
    table of a window larger than its map keeps its size.
    """

    width: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 7
    frozen: str = ""
    norm: str = "batch"
    dtype: Any = jnp.float32
    axis: str | None = None
    endpoints: tuple[str, ...] = ("32",)
    remat: bool = False
    drop_path: float = 0.0

    @property
    def frozen_parameters(self) -> tuple[str, ...]:
        """Regular expressions of the paths of the parameters that get no gradient."""
        paths = {stage: rf"^{stage}/" for stage in STAGES} | {"layer4": r"^(layer4|norm)/"}
        return _common.frozen_parameters(self.frozen, self.norm, paths)

    @nn.compact
    def __call__(self, image: Image, *, train: bool) -> Endpoints:
        """(b h w 3) float32, normalised -> {stride: (b h/stride w/stride d)} of `dtype`.

        Raises:
          UserError: a size that is not a multiple of 32, or an endpoint, stage or norm that does not exist.
        """
        _transformer.check_image(image, 32, "swin")
        _common.check_endpoints(self.endpoints, STRIDES, "swin")
        _common.norm_mode(self.norm, False)
        frozen = _common.frozen_stages(self.frozen, STAGES)
        x = _Stem(self.width, self.dtype, name="stem")(image)
        x = lax.stop_gradient(x) if "stem" in frozen else x
        rates = _transformer.rates(self.drop_path, sum(self.depths))
        endpoints = {}
        for i, (stride, depth, heads) in enumerate(zip(STRIDES, self.depths, self.heads, strict=True)):
            name, last = f"layer{i + 1}", i + 1 == len(STRIDES)
            stage_rates, rates = rates[:depth], rates[depth:]
            fixed = name in frozen
            drop_path = (0.0,) * depth if fixed else stage_rates
            layer = _Layer(
                heads=heads,
                window=self.window,
                drop_path=drop_path,
                merge=not last,
                remat=self.remat,
                dtype=self.dtype,
                name=name,
            )
            endpoints[stride], x = layer(x, train)
            if last:
                endpoints[stride] = LayerNorm(self.dtype, name="norm")(x)
            if fixed:
                endpoints[stride], x = lax.stop_gradient((endpoints[stride], x))
        return {endpoint: endpoints[endpoint] for endpoint in self.endpoints}


__all__ = ["NAMES", "RECORDS", "Swin", "adapt", "convert"]

_TINY = partial(Swin, width=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24))
_SMALL = partial(Swin, width=96, depths=(2, 2, 18, 2), heads=(3, 6, 12, 24))
_BASE = partial(Swin, width=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32))
_LARGE = partial(Swin, width=192, depths=(2, 2, 18, 2), heads=(6, 12, 24, 48))
NAMES = {
    "swin_tiny_224": partial(_TINY, window=7),
    "swin_small_224": partial(_SMALL, window=7),
    "swin_base_224": partial(_BASE, window=7),
    "swin_base_384": partial(_BASE, window=12),
    "swin_large_224": partial(_LARGE, window=7),
    "swin_large_384": partial(_LARGE, window=12),
}


# What each net was trained on: trained on ImageNet-1k, on ImageNet-22k, or on 22k and then fine-tuned on 1k.
_TRAINED = {"1k": "ImageNet-1k", "22k": "ImageNet-22k, 21,841 classes", "22k_ft_in1k": "ImageNet-22k, then 1k"}
_PUBLISHED = {name: ("1k", "22k", "22k_ft_in1k") for name in NAMES} | {
    name: ("22k", "22k_ft_in1k") for name in ("swin_large_224", "swin_large_384")
}


def _record(arch: str, trained: str) -> dict[str, Any]:
    """Metadata of published weights; the hub pages that we could read name no digest, so sha256 is None."""
    _, width, size = arch.split("_")
    window = NAMES[arch].keywords["window"]
    return {
        "arch": arch,
        "hub": f"timm/swin_{width}_patch4_window{window}_{size}.ms_in{trained}",
        "file": "model.safetensors",
        "sha256": None,
        "licence": "MIT",
        "paper": "arXiv 2103.14030",
        "size": int(size),
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "note": f"Microsoft's weights as timm republishes them, trained on {_TRAINED[trained]}.",
    }


RECORDS: dict[str, dict[str, Any]] = {
    f"{arch}_{trained.replace('_ft_in', '_')}": _record(arch, trained)
    for arch, found in _PUBLISHED.items()
    for trained in found
}
RECORDS["swin_large_384_22k_microsoft"] = RECORDS["swin_large_384_22k"] | {
    "hub": "microsoft/swin-large-patch4-window12-384-in22k",
    "file": "pytorch_model.bin",
    "licence": "Apache-2.0 (model card; the authors' repository is MIT)",
    "note": "the same weights in transformers' names; Query2Label starts from the authors' own file of them.",
}
