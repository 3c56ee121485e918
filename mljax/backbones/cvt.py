"""CvT: a transformer with convolutions for tokens and for queries, keys and values.

Wu et al., "CvT: Introducing Convolutions to Vision Transformers", ICCV 2021, arXiv 2103.15808.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from mljax.backbones import _common, _transformer
from mljax.backbones._common import Endpoints, Image
from mljax.backbones._cvt_weights import convert
from mljax.backbones._transformer import SMALL_NORMAL, TORCH_CONV, LayerNorm, Mlp
from mljax.convolution import BatchNorm, Conv
from mljax.errors import one_of
from mljax.layers import DropPath
from mljax.types import ArrayLike

STAGES = ("stem", "layer1", "layer2", "layer3")
STRIDES = ("4", "8", "16")
ACTIVATIONS = {"quick_gelu": _transformer.quick_gelu, "gelu": _transformer.gelu}


class _Embed(nn.Module):
    """Convolutional token embedding (3.1): overlapping patches, LayerNorm."""

    features: int
    size: int
    stride: int
    padding: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "b _ _ _"]) -> Float[Array, "b _ _ {self.features}"]:
        conv = Conv(
            self.features,
            self.size,
            self.stride,
            padding=self.padding,
            bias=True,
            dtype=self.dtype,
            init=TORCH_CONV,
            name="conv",
        )
        return LayerNorm(self.dtype, name="norm")(conv(x))


class _Attention(nn.Module):
    """Attention whose queries, keys and values come from depth-wise 3x3 convolutions (3.2, eq. 2)."""

    heads: int
    mode: str
    axis: str | None
    dtype: Any

    @nn.compact
    def __call__(self, tokens: Float[ArrayLike, "b n d"], shape: tuple[int, int], train: bool) -> Float[Array, "b n d"]:
        """n = h*w or, with a class token in front, 1 + h*w; shape: (h, w)."""
        b, n, d = tokens.shape
        split = n - shape[0] * shape[1]
        image = tokens[:, split:].reshape(b, *shape, d)
        dense = partial(nn.Dense, d, dtype=self.dtype, kernel_init=SMALL_NORMAL)

        def project(name: str, stride: int) -> jax.Array:
            conv = Conv(d, 3, stride, groups=d, dtype=self.dtype, init=TORCH_CONV, name=f"{name}_conv")
            y = BatchNorm(self.mode, self.axis, dtype=self.dtype, name=f"{name}_bn")(conv(image), train)
            y = jnp.concatenate([tokens[:, :split], y.reshape(b, -1, d)], axis=1)
            return dense(name=name)(y).reshape(b, -1, self.heads, d // self.heads)

        q, k, v = project("q", 1), project("k", 2), project("v", 2)
        scores = jnp.einsum("bqkd,bpkd->bkqp", q, k, preferred_element_type=jnp.float32)
        # The full width, where other transformers take the head's: as the authors trained it.
        weights = jax.nn.softmax(scores * d**-0.5, axis=-1).astype(self.dtype)
        return dense(name="out")(jnp.einsum("bkqp,bpkd->bqkd", weights, v).reshape(b, n, d))


class _Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    heads: int
    activation: str
    drop_path: float
    mode: str
    axis: str | None
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "b n d"], shape: tuple[int, int], train: bool) -> Float[Array, "b n d"]:
        attention = _Attention(self.heads, self.mode, self.axis, self.dtype, name="attention")
        y = attention(LayerNorm(self.dtype, name="norm1")(x), shape, train)
        x = x + DropPath(self.drop_path, name="drop1")(y, train)
        mlp = Mlp(ACTIVATIONS[self.activation], self.dtype, name="mlp")
        y = mlp(LayerNorm(self.dtype, name="norm2")(x))
        return x + DropPath(self.drop_path, name="drop2")(y, train)


class _Layer(nn.Module):
    """A stage after its embedding: blocks, with a class token among the tokens in the last one."""

    heads: int
    activation: str
    drop_path: tuple[float, ...]
    class_token: bool
    mode: str
    axis: str | None
    remat: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "b h w d"], train: bool) -> Float[Array, "b h w d"]:
        b, h, w, d = x.shape
        tokens = x.reshape(b, h * w, d)
        if self.class_token:
            token = self.param("cls_token", SMALL_NORMAL, (1, 1, d), jnp.float32).astype(self.dtype)
            tokens = jnp.concatenate([jnp.broadcast_to(token, (b, 1, d)), tokens], axis=1)
        block_type = nn.remat(_Block, static_argnums=(2, 3)) if self.remat else _Block
        for i, rate in enumerate(self.drop_path):
            block = block_type(
                heads=self.heads,
                activation=self.activation,
                drop_path=rate,
                mode=self.mode,
                axis=self.axis,
                dtype=self.dtype,
                name=f"block{i + 1}",
            )
            tokens = block(tokens, (h, w), train)
        return tokens[:, -h * w :].reshape(b, h, w, d)


class CvT(nn.Module):
    """Image -> feature maps by stride.

    Endpoint "16" is the map after the final LayerNorm, without the class token: what Query2Label uses. "4" and "8" are
    the outputs of the first two stages, without a norm: transformers' `hidden_states[0]` and `[1]`. All stages are
    built whatever the endpoints. The class token takes part in the attention of the last stage and is dropped.

    Legal images: height and width multiples of 16. There are no positions and no windows, so any such size works.

    Attributes:
      widths, depths, heads: per stage.
      activation: "quick_gelu", x sigmoid(1.702 x): Microsoft's code, with which all published weights were trained and
        which Query2Label uses; "gelu": what transformers computes with the same weights.
      frozen: comma list of "stem" (the first embedding), "layer1", "layer2", "layer3", or "all": no gradient, running
        statistics, no drop path. A layer holds the embedding before it; layer3 also the final norm.
      norm: "batch", or "frozen": running statistics everywhere, scale and bias of BatchNorm fixed.
      dtype: of the computation, float32 or bfloat16; softmax and norms are float32, as are all parameters.
      axis: pmap axis for the statistics of a batch.
      endpoints: strides to return.
      remat: recompute every block in the backward pass instead of storing its activations.
      drop_path: stochastic depth of the last block of the last stage; it grows from 0 at the stage's first block, the
        other stages have none (rng "dropout", in training only). The authors train with 0.1, w24 with 0.3.
    No gradient reaches attention/k/bias, nor, in the stages without a class token, attention/k_bn/bias: what is
    added to all keys cancels in the softmax.
    Differs from the authors' code: no dropout, which no published weights use. transformers scales the drop path of
    whole residual sums, and by another rule; it agrees in evaluation only.
    """

    widths: tuple[int, ...] = (64, 192, 384)
    depths: tuple[int, ...] = (1, 2, 10)
    heads: tuple[int, ...] = (1, 3, 6)
    activation: str = "quick_gelu"
    frozen: str = ""
    norm: str = "batch"
    dtype: Any = jnp.float32
    axis: str | None = None
    endpoints: tuple[str, ...] = ("16",)
    remat: bool = False
    drop_path: float = 0.0

    @property
    def frozen_parameters(self) -> tuple[str, ...]:
        """Regular expressions of the paths of the parameters that get no gradient."""
        paths = {"stem": r"^stem/", "layer1": r"^layer1/"}
        paths |= {"layer2": r"^(embed2|layer2)/", "layer3": r"^(embed3|layer3|norm)/"}
        return _common.frozen_parameters(self.frozen, self.norm, paths)

    @nn.compact
    def __call__(self, image: Image, *, train: bool) -> Endpoints:
        """(b h w 3) float32, normalised -> {stride: (b h/stride w/stride d)} of `dtype`.

        Raises:
          UserError: a size that is not a multiple of 16, or an endpoint, stage, norm or activation that does not exist.
        """
        _transformer.check_image(image, 16, "cvt")
        _common.check_endpoints(self.endpoints, STRIDES, "cvt")
        one_of("config.backbone.activation", self.activation, ACTIVATIONS)
        frozen = _common.frozen_stages(self.frozen, STAGES)
        x, endpoints = image, {}
        for i, stride in enumerate(STRIDES):
            name, first, last = f"layer{i + 1}", i == 0, i + 1 == len(STRIDES)
            fixed = name in frozen
            size, step, padding = (7, 4, 2) if first else (3, 2, 1)
            embed_name = "stem" if first else f"embed{i + 1}"
            x = _Embed(self.widths[i], size, step, padding, self.dtype, name=embed_name)(x)
            if first and "stem" in frozen:
                x = lax.stop_gradient(x)
            layer = _Layer(
                heads=self.heads[i],
                activation=self.activation,
                drop_path=_transformer.rates(self.drop_path if last and not fixed else 0.0, self.depths[i]),
                class_token=last,
                mode=_common.norm_mode(self.norm, fixed),
                axis=self.axis,
                remat=self.remat,
                dtype=self.dtype,
                name=name,
            )
            x = layer(x, train)
            if last:
                x = LayerNorm(self.dtype, name="norm")(x)
            endpoints[stride] = x = lax.stop_gradient(x) if fixed else x
        return {endpoint: endpoints[endpoint] for endpoint in self.endpoints}


__all__ = ["NAMES", "RECORDS", "CvT", "adapt", "convert"]


def adapt(state: Mapping[str, Any], model: CvT) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Converted weights for a model: unchanged and without notes, since no array of a CvT depends on the image size."""
    del model
    return dict(state), ()


_CVT_13 = partial(CvT, widths=(64, 192, 384), depths=(1, 2, 10), heads=(1, 3, 6))
_CVT_21 = partial(CvT, widths=(64, 192, 384), depths=(1, 4, 16), heads=(1, 3, 6))
_CVT_W24 = partial(CvT, widths=(192, 768, 1024), depths=(2, 2, 20), heads=(3, 12, 16))
# The same nets at two sizes: the size is that of the published weights.
NAMES = {
    "cvt_13_224": _CVT_13,
    "cvt_13_384": _CVT_13,
    "cvt_21_224": _CVT_21,
    "cvt_21_384": _CVT_21,
    "cvt_w24_384": _CVT_W24,
}


def _record(arch: str, hub: str, note: str, file: str = "pytorch_model.bin") -> dict[str, Any]:
    """Metadata of published weights; the hub's pages that we could read name no digest, so sha256 is None."""
    return {
        "arch": arch,
        "hub": f"microsoft/{hub}",
        "file": file,
        "sha256": None,
        "licence": "Apache-2.0 (model card)",
        "paper": "arXiv 2103.15808",
        "size": int(arch.split("_")[-1]),
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "note": f"in transformers' names; {note}; trained with quick GELU (transformers computes with GELU).",
    }


_1K = "trained on ImageNet-1k"
_22K = "trained on ImageNet-22k, and the head fine-tuned to 1000 classes"
RECORDS: dict[str, dict[str, Any]] = {
    "cvt_13_224_1k": _record("cvt_13_224", "cvt-13", _1K, "model.safetensors"),
    "cvt_13_384_1k": _record("cvt_13_384", "cvt-13-384", _1K),
    "cvt_13_384_22k": _record("cvt_13_384", "cvt-13-384-22k", _22K),
    "cvt_21_224_1k": _record("cvt_21_224", "cvt-21", _1K),
    "cvt_21_384_1k": _record("cvt_21_384", "cvt-21-384", _1K),
    "cvt_21_384_22k": _record("cvt_21_384", "cvt-21-384-22k", _22K),
    "cvt_w24_384_22k": _record("cvt_w24_384", "cvt-w24-384-22k", f"{_22K}; what Query2Label starts from"),
}
