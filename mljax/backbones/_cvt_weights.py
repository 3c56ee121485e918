"""Published CvT weights -> ours: names and layouts."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mljax.backbones import _transformer
from mljax.errors import UserError
from mljax.trees import nest

_LEFT_OUT = re.compile(r"num_batches_tracked$|^head\.|^classifier\.")
# transformers' names as the authors' names.
_TRANSFORMERS = (
    (r"^encoder\.stages\.(\d+)\.", r"stage\1."),
    (r"^layernorm\.", "norm."),
    (r"\.embedding\.convolution_embeddings\.projection\.", ".patch_embed.proj."),
    (r"\.embedding\.convolution_embeddings\.normalization\.", ".patch_embed.norm."),
    (r"\.layers\.(\d+)\.", r".blocks.\1."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.convolution_projection_([qkv])\w+\.convolution_projection\.convolution\.", r".conv_proj_\1.conv."),
    (r"\.convolution_projection_([qkv])\w+\.convolution_projection\.normalization\.", r".conv_proj_\1.bn."),
    (r"\.projection_([qkv])\w+\.", r".proj_\1."),
    (r"\.attention\.attention\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)
_PLACES = (
    (r"norm\.", "norm/"),
    (r"embed1\.patch_embed\.proj\.", "stem/conv/"),
    (r"embed1\.patch_embed\.norm\.", "stem/norm/"),
    (r"(embed\d)\.patch_embed\.proj\.", r"\1/conv/"),
    (r"(embed\d)\.patch_embed\.norm\.", r"\1/norm/"),
    (r"(layer3)\.(?=cls_token$)", r"\1/"),
    (r"(layer\d)\.(block\d+)\.(norm[12])\.", r"\1/\2/\3/"),
    (r"(layer\d)\.(block\d+)\.mlp\.(fc[12])\.", r"\1/\2/mlp/\3/"),
    (r"(layer\d)\.(block\d+)\.attn\.conv_proj_([qkv])\.(conv|bn)\.", r"\1/\2/attention/\3_\4/"),
    (r"(layer\d)\.(block\d+)\.attn\.proj_([qkv])\.", r"\1/\2/attention/\3/"),
    (r"(layer\d)\.(block\d+)\.attn\.proj\.", r"\1/\2/attention/out/"),
)
_STATISTICS = {"running_mean": "mean", "running_var": "var"}


def convert(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A torch state dict by name -> {"params": .., "batch_stats": ..} of CvT.

    Args:
      state: in the authors' names (Query2Label's `backbone.0.` in front or not) or transformers'. The classifier and
        `num_batches_tracked` are left out; of a Query2Label file only the backbone is read. timm has no CvT.
    Raises:
      UserError: a name that is not of this family.
    """
    params, stats = {}, {}
    for original, value in _transformer.backbone_part(state, ("cvt.",)).items():
        name = _transformer.rename(original, _TRANSFORMERS)
        if _LEFT_OUT.search(name):
            continue
        place, leaf = _place(name), name.rpartition(".")[2]
        if place is None or leaf not in ("weight", "bias", "cls_token", *_STATISTICS):
            raise UserError(f"{original!r} is not a weight of a CvT; give such a file, or another backbone.")
        if leaf in _STATISTICS:
            stats[place + _STATISTICS[leaf]] = value
        else:
            leaf, value = _transformer.torch_leaf(leaf, value)
            params[place + leaf] = value
    return {"params": nest(params), "batch_stats": nest(stats)}


def _place(name: str) -> str | None:
    """Path of the module that holds an official name, or None."""
    name = re.sub(r"^stage(\d+)\.(?=patch_embed)", lambda m: f"embed{int(m[1]) + 1}.", name)
    name = re.sub(r"^stage(\d+)\.", lambda m: f"layer{int(m[1]) + 1}.", name)
    name = re.sub(r"\.blocks\.(\d+)", lambda m: f".block{int(m[1]) + 1}", name)
    for pattern, path in _PLACES:
        if found := re.match(pattern, name):
            return found.expand(path)
    return None
