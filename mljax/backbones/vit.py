"""Vision Transformer: patches of 16x16 pixels and a class token, which all attend to each other.

Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale", ICLR 2021,
arXiv 2010.11929.
"""

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from mljax.backbones import _common, _transformer
from mljax.backbones._common import Endpoints, Image
from mljax.backbones._transformer import SMALL_NORMAL, TORCH_CONV, Mlp, gelu
from mljax.convolution import Conv
from mljax.errors import UserError
from mljax.layers import DropPath
from mljax.trees import nest
from mljax.types import ArrayLike

PATCH = 16
STRIDES = (str(PATCH),)
LayerNorm = partial(_transformer.LayerNorm, eps=1e-6)


class _Attention(nn.Module):
    """softmax(q k^T / sqrt(d/heads)) v over all tokens (appendix A)."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "b n d"]) -> Float[Array, "b n d"]:
        b, n, d = x.shape
        dense = partial(nn.Dense, dtype=self.dtype, kernel_init=SMALL_NORMAL)
        parts = jnp.split(dense(3 * d, name="qkv")(x), 3, axis=-1)
        q, k, v = (part.reshape(b, n, self.heads, d // self.heads) for part in parts)
        scores = jnp.einsum("bqkd,bpkd->bkqp", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * (d // self.heads) ** -0.5, axis=-1).astype(self.dtype)
        return dense(d, name="out")(jnp.einsum("bkqp,bpkd->bqkd", weights, v).reshape(b, n, d))


class _Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) (eq. 2 and 3)."""

    heads: int
    drop_path: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "b n d"], train: bool) -> Float[Array, "b n d"]:
        y = _Attention(self.heads, self.dtype, name="attention")(LayerNorm(self.dtype, name="norm1")(x))
        x = x + DropPath(self.drop_path, name="drop1")(y, train)
        y = Mlp(gelu, self.dtype, name="mlp")(LayerNorm(self.dtype, name="norm2")(x))
        return x + DropPath(self.drop_path, name="drop2")(y, train)


class _Stem(nn.Module):
    """Class token and patches, with their positions (eq. 1)."""

    width: int
    side: int
    dtype: Any

    @nn.compact
    def __call__(self, image: Float[ArrayLike, "b h w 3"]) -> Float[Array, "b 1+(h//16)*(w//16) {self.width}"]:
        """The class token, then the patches in reading order."""
        conv = Conv(self.width, PATCH, PATCH, padding=0, bias=True, dtype=self.dtype, init=TORCH_CONV, name="conv")
        x = conv(image)
        b, h, w, d = x.shape
        token = self.param("cls_token", SMALL_NORMAL, (1, 1, d), jnp.float32).astype(self.dtype)
        table = self.param("pos_embed", SMALL_NORMAL, (1, 1 + self.side**2, d), jnp.float32)
        x = jnp.concatenate([jnp.broadcast_to(token, (b, 1, d)), x.reshape(b, h * w, d)], axis=1)
        return x + resize_positions(table, h, w).astype(self.dtype)


def resize_positions(
    table: Float[jax.Array | np.ndarray, "1 _ d"], h: int, w: int
) -> Float[jax.Array | np.ndarray, "1 1+{h}*{w} d"]:
    """The rows of the patches interpolated as a square map, the class token's kept.

    Raises:
      UserError: the patches are not those of a square image.
    """
    side = math.isqrt(table.shape[1] - 1)
    if 1 + side**2 != table.shape[1]:
        raise UserError(
            f"A ViT's pos_embed has {table.shape[1]} rows, which are not a class token and a square of patches; give"
            " weights with one class token."
        )
    if (h, w) == (side, side):
        return table
    grid = _transformer.resize_map(table[0, 1:].reshape(side, side, -1), h, w)
    join = jnp.concatenate if isinstance(table, jax.Array) else np.concatenate
    return join([table[:, :1], grid.reshape(1, h * w, -1)], axis=1)


class ViT(nn.Module):
    """Image -> feature map by stride.

    Endpoint "16", the only one, is the map of the patch tokens after the final LayerNorm, without the class token:
    what CSRA uses. The class token takes part in the attention of every block and is dropped at the end.

    Legal images: height and width multiples of 16. The table of positions is that of a square image of `size`; for
    another image it is interpolated in the forward pass, and a gradient reaches it through that.

    Attributes:
      width, depth, heads: of the blocks, which are all alike.
      size: side of the image, in pixels, whose patches the table of positions has rows for. Published weights of
        another size are interpolated when they are loaded.
      frozen: comma list of "stem" (patches, class token, positions), "block1" .. "block<depth>", or "all": no gradient,
        no drop path. The last block holds the final norm.
      norm: "batch" or "frozen", as other backbones have it; without effect, since there is no BatchNorm.
      dtype: of the computation, float32 or bfloat16; softmax and norms are float32, as are all parameters.
      axis: the pmap axis, unused.
      endpoints: strides to return.
      remat: recompute every block in the backward pass instead of storing its activations.
      drop_path: stochastic depth of the last block; it grows from 0 at the first (rng "dropout", in training only).
    No gradient reaches the middle third of any attention/qkv/bias: a bias of the keys cancels in the softmax.
    Differs from the authors' code: positions of another size are bicubic without antialiasing (transformers' way; the
    authors' are bilinear with aligned corners, timm's antialiased), and there is no dropout. LayerNorm's eps is
    their 1e-6; transformers' published configurations say 1e-12.
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    size: int = 224
    frozen: str = ""
    norm: str = "batch"
    dtype: Any = jnp.float32
    axis: str | None = None
    endpoints: tuple[str, ...] = STRIDES
    remat: bool = False
    drop_path: float = 0.0

    @property
    def _stages(self) -> tuple[str, ...]:
        return ("stem", *(f"block{i + 1}" for i in range(self.depth)))

    @property
    def frozen_parameters(self) -> tuple[str, ...]:
        """Regular expressions of the paths of the parameters that get no gradient."""
        last = f"block{self.depth}"
        paths = {stage: rf"^{stage}/" for stage in self._stages} | {last: rf"^({last}|norm)/"}
        return _common.frozen_parameters(self.frozen, self.norm, paths)

    @nn.compact
    def __call__(self, image: Image, *, train: bool) -> Endpoints:
        """(b h w 3) float32, normalised -> {"16": (b h/16 w/16 d)} of `dtype`.

        Raises:
          UserError: a size that is not a multiple of 16, or an endpoint, stage or norm that does not exist.
        """
        _transformer.check_image(image, PATCH, "vit")
        _common.check_endpoints(self.endpoints, STRIDES, "vit")
        _common.norm_mode(self.norm, False)
        if self.size < PATCH or self.size % PATCH:
            raise UserError(f"The backbone vit has the size {self.size}; give a multiple of {PATCH} pixels.")
        frozen = _common.frozen_stages(self.frozen, self._stages)
        x = _Stem(self.width, self.size // PATCH, self.dtype, name="stem")(image)
        x = lax.stop_gradient(x) if "stem" in frozen else x
        block_type = nn.remat(_Block, static_argnums=(2,)) if self.remat else _Block
        for name, rate in zip(self._stages[1:], _transformer.rates(self.drop_path, self.depth), strict=True):
            fixed = name in frozen
            x = block_type(self.heads, 0.0 if fixed else rate, self.dtype, name=name)(x, train)
            x = lax.stop_gradient(x) if fixed else x
        b, h, w, _ = image.shape
        x = LayerNorm(self.dtype, name="norm")(x[:, 1:]).reshape(b, h // PATCH, w // PATCH, self.width)
        x = lax.stop_gradient(x) if self._stages[-1] in frozen else x
        return dict.fromkeys(self.endpoints, x)


_LEFT_OUT = re.compile(r"^(head|classifier|pooler|pre_logits)\.|^mask_token$")
# transformers' names, of the published files and of version 5, as timm's.
_TRANSFORMERS = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
    (r"^layernorm\.", "norm."),
    (r"^(?:encoder\.layer|layers)\.(\d+)\.", r"blocks.\1."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.(q|k|v)_proj\.", r".attn.\1."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)
_PLACES = (
    (r"^(?=(?:cls_token|pos_embed)$)", "stem/"),
    (r"^patch_embed\.proj\.(?=\w+$)", "stem/conv/"),
    (r"^norm\.(?=\w+$)", "norm/"),
    (r"^(block\d+)\.(norm[12])\.(?=\w+$)", r"\1/\2/"),
    (r"^(block\d+)\.mlp\.(fc[12])\.(?=\w+$)", r"\1/mlp/\2/"),
    (r"^(block\d+)\.attn\.qkv\.(?=\w+$)", r"\1/attention/qkv/"),
    (r"^(block\d+)\.attn\.proj\.(?=\w+$)", r"\1/attention/out/"),
)


def convert(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A torch state dict by name -> {"params": .., "batch_stats": {}} of ViT.

    Args:
      state: in timm's names, which are CSRA's, or transformers' (published files and version 5). Classifier, pooler
        and mask token are left out.
    Raises:
      UserError: a name that is not of this family, or a query, key or value without the others.
    """
    flat = {}
    for name, value in _transformer.official_names(state, "vit.", _TRANSFORMERS, _LEFT_OUT, "ViT").items():
        place, leaf = _place(name), name.rpartition(".")[2]
        if place is None or leaf not in ("weight", "bias", "cls_token", "pos_embed"):
            raise UserError(
                f"{name!r} is not a weight of a plain ViT (one class token, a norm after the last block); give such a"
                " file, or another backbone."
            )
        leaf, value = _transformer.torch_leaf(leaf, value)
        flat[place + leaf] = value
    return {"params": nest(flat), "batch_stats": {}}


def _place(name: str) -> str | None:
    """Path of the module that holds one of timm's names, or None."""
    name = re.sub(r"^blocks\.(\d+)", lambda m: f"block{int(m[1]) + 1}", name)
    for pattern, path in _PLACES:
        if found := re.match(pattern, name):
            return found.expand(path)
    return None


def adapt(state: Mapping[str, Any], model: ViT) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Make converted weights fit a model of another `size`: the positions of the patches are interpolated.

    Bicubic, a = -0.75, no antialiasing, corners not aligned, as in the forward pass; see `ViT` for others' ways.

    Args:
      state: what `convert` returns; not changed.
      model: a ViT; only its size matters.
    Returns:
      (state, notes): the notes say in words what was interpolated; empty if nothing was.
    Raises:
      UserError: a table that is not of one class token and a square of patches.
    """
    params, side = dict(state["params"]), model.size // PATCH
    stem = dict(params.get("stem", {}))
    table = stem.get("pos_embed")
    if table is None or table.shape[1] == 1 + side**2:
        return dict(state), ()
    stem["pos_embed"] = resize_positions(np.asarray(table), side, side)
    old = math.isqrt(table.shape[1] - 1)
    note = f"position embeddings interpolated (bicubic) from {old}x{old} to {side}x{side} patches"
    return {**state, "params": {**params, "stem": stem}}, (note,)


_BASE = partial(ViT, width=768, depth=12, heads=12)
_LARGE = partial(ViT, width=1024, depth=24, heads=16)
NAMES = {
    "vit_base_16_224": partial(_BASE, size=224),
    "vit_base_16_384": partial(_BASE, size=384),
    "vit_large_16_224": partial(_LARGE, size=224),
    "vit_large_16_384": partial(_LARGE, size=384),
}


def _record(arch: str, hub: str, note: str, file: str = "model.safetensors") -> dict[str, Any]:
    """Metadata of published weights; the hub's pages that we could read name no digest, so sha256 is None."""
    return {
        "arch": arch,
        "hub": hub,
        "file": file,
        "sha256": None,
        "licence": "Apache-2.0",
        "paper": "arXiv 2106.10270" if "augreg" in hub else "arXiv 2010.11929",
        "size": int(arch.split("_")[-1]),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "note": f"Google's weights, trained on ImageNet-21k, then 1k; {note}.",
    }


_TIMM = "as timm republishes them"
_AUGREG = f"those of 'How to train your ViT?', {_TIMM}"
RECORDS: dict[str, dict[str, Any]] = {
    "vit_base_16_224_21k_1k": _record(
        "vit_base_16_224",
        "timm/vit_base_patch16_224.orig_in21k_ft_in1k",
        f"the paper's, {_TIMM}; CSRA starts from them",
    ),
    "vit_base_16_224_augreg": _record("vit_base_16_224", "timm/vit_base_patch16_224.augreg_in21k_ft_in1k", _AUGREG),
    "vit_base_16_384_21k_1k": _record(
        "vit_base_16_384", "timm/vit_base_patch16_384.orig_in21k_ft_in1k", f"the paper's, {_TIMM}"
    ),
    "vit_large_16_224_21k_1k": _record(
        "vit_large_16_224",
        "google/vit-large-patch16-224",
        "the paper's, in transformers' names; by their card converted from timm's, which CSRA starts from",
        "pytorch_model.bin",
    ),
    "vit_large_16_224_augreg": _record("vit_large_16_224", "timm/vit_large_patch16_224.augreg_in21k_ft_in1k", _AUGREG),
    "vit_large_16_384_augreg": _record("vit_large_16_384", "timm/vit_large_patch16_384.augreg_in21k_ft_in1k", _AUGREG),
}
