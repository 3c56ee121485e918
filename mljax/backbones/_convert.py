"""Torch state dicts and others -> the parameters of a convolutional backbone, with errors that name what is wrong."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mljax.errors import UserError, nearest
from mljax.trees import nest

_NORM_LEAVES = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}


def convert_torch(
    state: Mapping[str, np.ndarray],
    module: Callable[[str], str | None],
    ignored: str,
    family: str,
    prefix: str,
) -> dict[str, Any]:
    """A torch state dict of convolutions and batch norms -> {"params": .., "batch_stats": ..}.

    Args:
      state: tensors by name.
      module: "layer1.0.conv1" -> the path here of what owns the tensor, or None if there is no such thing;
        the last part of a path starts with "bn" or ends with "_bn" for a normalisation.
      ignored: regular expression of names to leave out (classifiers), after the prefix.
      family: what to call the weights in an error.
      prefix: take only the names that start with it, and read what follows.
    Raises:
      UserError: no name has the prefix, a name is not of the family, or a normalisation is incomplete.
    """
    params, stats = {}, {}
    if state and all(name.startswith("module.") for name in state) and not prefix.startswith("module."):
        prefix = "module." + prefix
    chosen = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    for name, value in chosen.items():
        owner, _, leaf = name.rpartition(".")
        if leaf == "num_batches_tracked" or re.fullmatch(ignored, name):
            continue
        path = module(owner)
        if path is None or leaf not in _NORM_LEAVES:
            raise UserError(f"{prefix + name!r} is not a weight of a {family}; give such a file, or a prefix.")
        if is_norm(path):
            kind = params if leaf in ("weight", "bias") else stats
            kind[f"{path}/{_NORM_LEAVES[leaf]}"] = np.asarray(value)
        elif leaf == "weight":
            params[f"{path}/kernel"] = np.transpose(value, (2, 3, 1, 0))
        else:
            params[f"{path}/{leaf}"] = np.asarray(value)
    if not params:
        raise UserError(f"No weight of a {family} has the prefix {prefix!r}{nearest(prefix, state)}.")
    check_complete(params | stats, family)
    return {"params": nest(params), "batch_stats": nest(stats)}


def is_norm(path: str) -> bool:
    """Whether a module's path is that of a batch norm: "stem/bn", "layer1_0/bn1", "layer1_0/downsample_bn"."""
    return re.search(r"(^|/|_)bn\d*$", path) is not None


def check_complete(flat: Mapping[str, np.ndarray], family: str) -> None:
    """UserError if a batch norm lacks an array, or a convolution its batch norm, or the other way round."""
    for owner in sorted({path.rpartition("/")[0] for path in flat}):
        leaves = ("scale", "bias", "mean", "var") if is_norm(owner) else ("kernel",)
        needed = [f"{owner}/{leaf}" for leaf in leaves]
        parent, _, last = owner.rpartition("/")
        if "bn" in last:
            needed.append(f"{parent}/{last.replace('bn', 'conv')}/kernel")
        elif "conv" in last:
            needed.append(f"{parent}/{last.replace('conv', 'bn')}/scale")
        for path in needed:
            if path not in flat:
                raise UserError(f"The {family} weights lack {path!r}, though {owner!r} is there.")


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def timm_record(
    arch: str,
    repository: str,
    licence: str,
    paper: str,
    note: str,
    *,
    sha256: str | None = None,
    size: int = 224,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> dict[str, Any]:
    """The record of a checkpoint in timm's collection on the Hugging Face hub.

    Args:
      arch: the name of the backbone here.
      repository: in the collection.
      licence: SPDX name.
      paper: where it is described ("arXiv 1512.03385").
      sha256: of the file as the hub shows it; None where we have not seen it.
      size: side of the images that the weights were made for.
      mean, std: what is taken from images in [0, 1], and what they are divided by.
    """
    return {
        "arch": arch,
        "hub": f"timm/{repository}",
        "file": "model.safetensors",
        "sha256": sha256,
        "licence": licence,
        "paper": paper,
        "size": size,
        "mean": mean,
        "std": std,
        "note": note,
    }
