"""Weight files of other people -> parameters of a backbone; the names are translated beside the backbone itself."""

import importlib
import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from mljax import build
from mljax.errors import UserError, nearest
from mljax.trees import flatten, nest
from mljax.weights.identify import identify

log = logging.getLogger("mljax")


@cache
def modules() -> tuple[ModuleType, ...]:
    """The files of mljax/backbones."""
    return tuple(importlib.import_module(f"mljax.backbones.{name}") for name in build.files("backbones") if name)


def module_of(arch: str) -> ModuleType:
    """The file of a backbone."""
    for module in modules():
        if arch in getattr(module, "NAMES", {}):
            return module
    known = [name for module in modules() for name in getattr(module, "NAMES", {})]
    raise UserError(f"{arch!r} is not a backbone{nearest(arch, known)}.")


def convert(state: Mapping[str, np.ndarray], arch: str, path: Path) -> dict[str, np.ndarray]:
    """A state dict -> flat float32 parameters "params/a/b/c" and "batch_stats/a/b/c" of a backbone.

    Raises:
      UserError: it is another net, which the error names, or has values that are not finite.
    """
    guess = identify(state)
    wrong = f"{path} does not fit the backbone {arch}: it seems to be {guess.label}"
    if guess.archs and arch not in guess.archs:
        raise UserError(f"{wrong}; give another file, or another backbone.")
    function = getattr(module_of(arch), "convert", None)
    if function is None:
        raise UserError(f"The backbone {arch} reads only files written for it, and {path} is {guess.label}.")
    try:
        tree = function({name: _float32(value, name, path) for name, value in state.items()})
    except UserError as error:
        if arch in guess.archs and guess.prefix:
            raise UserError(
                f"{path} seems to be {guess.label}; give {guess.prefix!r} as the weights' prefix."
            ) from None
        raise UserError(f"{wrong} ({str(error).rstrip('.')}).") from None
    flat = flatten(tree)
    for name, value in flat.items():
        # a sum is finite only if all its terms are (the largest weights are far from overflow)
        with np.errstate(all="ignore"):
            finite = np.isfinite(np.sum(value))
        if not finite:
            raise UserError(f"{path} is corrupt: {name!r} has values that are not finite; get it again.")
    return flat


def _float32(value: np.ndarray, name: str, path: Path) -> np.ndarray:
    if value.dtype.kind in "iub":
        return value
    if value.dtype.kind == "f" or value.dtype.name in dir(ml_dtypes):
        return value.astype(np.float32, copy=False)
    raise UserError(f"{path} has {name!r} as {value.dtype}, which is not a real number; give another file.")


def other_channels(params: Mapping[str, Any], channels: int, name: str) -> dict[str, Any]:
    """The first convolution (h w 3 d) for images of another number of channels."""
    flat = flatten(params)
    colours = [path for path, value in flat.items() if value.ndim == 4 and value.shape[2] == 3]
    # TResNet's first convolution sees 4x4 pixels at once: (h w 16*3 d), colours last.
    packed = [path for path, value in flat.items() if path.startswith("stem") and value.shape[2:3] == (48,)]
    if channels < 1 or len(colours or packed) != 1:
        raise UserError(f"The weights {name!r} cannot be changed to {channels} input channels.")
    path = (colours or packed)[0]
    kernel = flat[path]
    pixels = kernel.reshape(*kernel.shape[:2], -1, 3, kernel.shape[-1])
    if channels == 1:
        changed = pixels.sum(3, keepdims=True)
    else:
        changed = pixels[:, :, :, np.arange(channels) % 3] * np.float32(3 / channels)
    flat[path] = changed.reshape(*kernel.shape[:2], -1, kernel.shape[-1])
    how = "summed over colours" if channels == 1 else f"repeated and scaled by 3/{channels}"
    log.warning("Weights %s: the kernel %s is %s for %d input channels.", name, path, how, channels)
    return nest(flat)


def structure(arch: str, size: int) -> dict[str, Any]:
    """{"params", "batch_stats"} of a backbone as shapes; nothing is computed."""
    model = build.find("backbones", arch)()
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    shapes = jax.eval_shape(lambda key, x: model.init(key, x, train=False), jax.random.key(0), image)
    return {"params": shapes["params"], "batch_stats": shapes.get("batch_stats", {})}
