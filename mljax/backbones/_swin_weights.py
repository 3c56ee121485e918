"""Published Swin weights -> ours: names, layouts, bias tables of another window."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mljax.backbones import _transformer
from mljax.errors import UserError
from mljax.trees import nest

_TABLE = "relative_position_bias_table"
_LEFT_OUT = re.compile(r"relative_position_index$|attn_mask$|^head\.|^classifier\.|mask_token$")
# transformers' names, of the published files and of version 5, as the authors' names.
_TRANSFORMERS = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^embeddings\.position_embeddings$", "absolute_pos_embed"),
    (r"^embeddings\.mask_token$", "mask_token"),
    (r"^layernorm\.", "norm."),
    (r"^encoder\.", ""),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.self\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.(q|k|v)_proj\.", r".attn.\1."),
    (r"\.attention\.(self|relative_position_bias)\.relative_", ".attn.relative_"),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)
_PLACES = (
    (r"^patch_embed\.proj\.", "stem/conv/"),
    (r"^patch_embed\.norm\.", "stem/norm/"),
    (r"^(norm)\.", "norm/"),
    (r"^(layer\d+)\.downsample\.(norm|reduction)\.", r"\1/merge/\2/"),
    (r"^(layer\d+)\.blocks\.(block\d+)\.(norm[12])\.", r"\1/\2/\3/"),
    (r"^(layer\d+)\.blocks\.(block\d+)\.mlp\.(fc[12])\.", r"\1/\2/mlp/\3/"),
    (r"^(layer\d+)\.blocks\.(block\d+)\.attn\.qkv\.", r"\1/\2/attention/qkv/"),
    (r"^(layer\d+)\.blocks\.(block\d+)\.attn\.proj\.", r"\1/\2/attention/out/"),
    (r"^(layer\d+)\.blocks\.(block\d+)\.attn\.(?=relative_position_bias_table$)", r"\1/\2/attention/"),
)


def convert(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A torch state dict by name -> {"params": .., "batch_stats": {}} of Swin.

    Args:
      state: in the authors' names (Query2Label's `backbone.0.` in front or not), timm's (old and new: since 2023 a
        patch merging is counted to the stage after it), or transformers' (published files and version 5). The
        classifier, masks and index tables are left out; of a Query2Label file only the backbone is read.
    Raises:
      UserError: a name that is not of this family, or a query, key or value without the others.
    """
    official = _transformer.official_names(state, "swin.", _TRANSFORMERS, _LEFT_OUT, "Swin")
    # timm since 2023: layers.1.downsample is what was layers.0.downsample.
    merge_first = not any(name.startswith("layers.0.downsample.") for name in official)
    flat = {}
    for name, value in official.items():
        place, leaf = _place(name, merge_first), name.rpartition(".")[2]
        if place is None or leaf not in ("weight", "bias", _TABLE):
            raise UserError(
                f"{name!r} is not a weight of a Swin Transformer (version 1, no absolute positions); give such a file,"
                " or another backbone."
            )
        leaf, value = ("bias_table", value) if leaf == _TABLE else _transformer.torch_leaf(leaf, value)
        flat[place + leaf] = value
    return {"params": nest(flat), "batch_stats": {}}


def _place(name: str, merge_first: bool) -> str | None:
    """Path of the module that holds an official name, or None."""
    back = 1 if merge_first and ".downsample." in name else 0
    name = re.sub(r"^layers\.(\d+)", lambda m: f"layer{int(m[1]) + 1 - back}", name)
    name = re.sub(r"\.blocks\.(\d+)", lambda m: f".blocks.block{int(m[1]) + 1}", name)
    for pattern, path in _PLACES:
        if found := re.match(pattern, name):
            return found.expand(path)
    return None


def adapt(state: Mapping[str, Any], model: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Make converted weights fit a model with another window: its bias tables are interpolated.

    Bicubic, a = -0.75, no antialiasing, corners not aligned: torch's `interpolate(mode="bicubic")` on the table as an
    image of (2*window-1) x (2*window-1) offsets, as the authors' `load_pretrained` does. (timm interpolates over a
    geometric grid of offsets, after BEiT; its values differ.) The image size needs nothing: there are no absolute
    positions.

    Args:
      state: what `convert` returns; not changed.
      model: a Swin; only its window matters.
    Returns:
      (state, notes): the notes say in words what was interpolated; empty if nothing was.
    Raises:
      UserError: a table that is not of a square window.
    """
    windows: set[int] = set()

    def fit(key: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {inner: fit(inner, below) for inner, below in value.items()}
        if key != "bias_table" or len(value) == (2 * model.window - 1) ** 2:
            return value
        windows.add(_transformer.window_of(value))
        return _transformer.resize_bias_table(value, model.window)

    params = fit("", state["params"])
    notes = tuple(
        f"relative position bias tables interpolated (bicubic) from window {old} to {model.window}"
        for old in sorted(windows)
    )
    return {**state, "params": params}, notes
