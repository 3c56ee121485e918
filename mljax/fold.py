"""Batch normalisation folded into the convolutions before it, for inference: the same values with one pass less.

y = (conv(x, K) - mean) g + bias with g = scale / sqrt(var + eps)  becomes  conv(x, K g) + (bias - mean g).
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from mljax.convolution import BatchNorm
from mljax.trees import flatten, nest


def fold(system: nn.Module, variables: Mapping[str, Any], batch: Any) -> tuple[dict[str, Any], int]:
    """Variables of a system whose batch normalisations are folded where a convolution stands before them.

    Args:
      system: whose `__call__(batch, train=False)` will be run on the result; its modules read from what is missing
        (scale and running statistics) that a normalisation is folded.
      variables: as trained; not changed.
      batch: an example, of shapes or arrays: it shows which normalisations there are.
    Returns:
      (variables, how many normalisations were folded). float32 values agree to 1e-5 of the largest.
    """
    eps: dict[tuple[str, ...], float] = {}

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, BatchNorm) and context.method_name == "__call__":
            eps[context.module.path] = context.module.eps
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(lambda v, b: system.apply(v, b, train=False), variables, batch)
    params, stats = flatten(variables["params"]), flatten(variables.get("batch_stats", {}))
    folded = 0
    for (*parents, name), own in eps.items():
        path = "/".join([*parents, name])
        conv = "/".join([*parents, name.replace("bn", "conv")])  # conv1 bn1, k_conv k_bn, .. in all backbones
        kernel = f"{conv}/kernel"
        if f"{path}/scale" not in params or kernel not in params or f"{conv}/bias" in params:
            continue
        gain, bias = (params.pop(f"{path}/{leaf}") for leaf in ("scale", "bias"))
        mean, var = (stats.pop(f"{path}/{leaf}") for leaf in ("mean", "var"))
        gain = np.asarray(gain, np.float64) / np.sqrt(np.asarray(var, np.float64) + own)
        params[kernel] = (np.asarray(params[kernel]) * gain).astype(np.float32)
        params[f"{path}/bias"] = (np.asarray(bias) - np.asarray(mean) * gain).astype(np.float32)
        folded += 1
    return {**variables, "params": nest(params), "batch_stats": nest(stats)}, folded
