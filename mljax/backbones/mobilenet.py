"""MobileNetV1: a small backbone whose ImageNet weights are Keras's.

Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications",
arXiv 1704.04861, table 1.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from mljax.backbones import _common, _convert
from mljax.backbones._common import Endpoints, Image
from mljax.convolution import BatchNorm, Conv
from mljax.errors import UserError, nearest
from mljax.trees import nest
from mljax.types import ArrayLike

# (output channels, stride) of the thirteen depth-wise separable blocks.
BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))
# Stage -> its blocks; the stem also holds the first convolution.
STAGES = {"stem": (1,), "layer1": (2, 3), "layer2": (4, 5), "layer3": tuple(range(6, 12)), "layer4": (12, 13)}
LAYERS = ("conv1", *(f"conv_{kind}_{i}" for i in range(1, len(BLOCKS) + 1) for kind in ("dw", "pw")))
EPS = 1e-3
GLOROT = nn.initializers.glorot_uniform()


class _Layer(nn.Module):
    """Convolution (depth-wise where features is None), batch norm, ReLU6."""

    features: int | None
    size: int
    stride: int
    mode: str
    axis: str | None
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "b _ _ _"], train: bool) -> Float[Array, "b _ _ _"]:
        features, groups = (x.shape[-1], x.shape[-1]) if self.features is None else (self.features, 1)
        conv = Conv(features, self.size, self.stride, groups, "SAME", dtype=self.dtype, init=GLOROT, name="conv")
        x = BatchNorm(self.mode, self.axis, EPS, 0.01, self.dtype, name="bn")(conv(x), train)
        return jnp.clip(x, 0, 6)


class MobileNetV1(nn.Module):
    """Image -> feature maps.

    Parameters are named by Keras's layers: conv1, conv_dw_1, conv_pw_1, .., each with `conv/kernel` and `bn`.

    Attributes:
      frozen: comma list of stages ("stem": conv1 and block 1, "layer1": blocks 2 and 3, "layer2": 4 and 5,
        "layer3": 6 to 11, "layer4": 12 and 13), or "all": no gradient, and running statistics.
      norm: "batch", or "frozen": running statistics everywhere, scale and bias fixed.
      dtype: of the computation: float32 or bfloat16.
      axis: pmap axis for the statistics of a batch.
      endpoints: strides ("4", "8", "16", "32": the last layer built with that stride) or layer names
        ("conv_pw_10", after its ReLU6); the result is keyed by what was asked for.
      remat: recompute every layer in the backward pass instead of storing its activations.
      last: the last layer that is built, whatever the endpoints.
      width: multiplies every number of channels.
      in_channels: of the image.
    Differs from Keras: not in values for even sizes; stride-2 layers pad as TensorFlow's SAME does for odd ones too.
    The running variance moves towards the unbiased one (see BatchNorm; Keras's momentum of 0.99 is 0.01 here).
    """

    frozen: str = ""
    norm: str = "batch"
    dtype: Any = jnp.float32
    axis: str | None = None
    endpoints: tuple[str, ...] = ("32",)
    remat: bool = False
    last: str = "conv_pw_12"
    width: float = 1.0
    in_channels: int = 3

    @property
    def frozen_parameters(self) -> tuple[str, ...]:
        """Regular expressions of the paths of the parameters that get no gradient."""
        stages = {stage: rf"^conv_(dw|pw)_({'|'.join(map(str, blocks))})/" for stage, blocks in STAGES.items()}
        stages["stem"] = r"^(conv1|conv_dw_1|conv_pw_1)/"
        return _common.frozen_parameters(self.frozen, self.norm, stages)

    @nn.compact
    def __call__(self, image: Image, *, train: bool) -> Endpoints:
        """(b h w c) float32, RGB, x/127.5 - 1 -> {endpoint: (b h' w' d)} of `dtype`."""
        _common.check_image(image, self.in_channels, "mobilenet_v1")
        if self.last not in LAYERS:
            raise UserError(f"mobilenet_v1 has no layer {self.last!r}{nearest(self.last, LAYERS)}.")
        layers = LAYERS[: LAYERS.index(self.last) + 1]
        frozen = _common.frozen_stages(self.frozen, tuple(STAGES))
        layer_type = nn.remat(_Layer, static_argnums=(2,)) if self.remat else _Layer
        outputs, by_stride, stride_so_far = {}, {}, 1
        x = image.astype(self.dtype)
        for layer in layers:
            stage, features, size, stride = _shape(layer, self.width)
            stride_so_far *= stride
            mode = _common.norm_mode(self.norm, stage in frozen)
            x = layer_type(
                features=features, size=size, stride=stride, mode=mode, axis=self.axis, dtype=self.dtype, name=layer
            )(x, train)
            if stage in frozen:
                x = lax.stop_gradient(x)
            outputs[layer] = by_stride[str(stride_so_far)] = x
        known = by_stride | outputs
        _common.check_endpoints(self.endpoints, tuple(known), "mobilenet_v1")
        return {endpoint: known[endpoint] for endpoint in self.endpoints}


def _shape(layer: str, width: float) -> tuple[str, int | None, int, int]:
    """Stage, output channels (None: those of the input), kernel side and stride of a layer."""
    if layer == "conv1":
        return "stem", int(32 * width), 3, 2
    _, kind, block = layer.split("_")
    stage = next(stage for stage, blocks in STAGES.items() if int(block) in blocks)
    features, stride = BLOCKS[int(block) - 1]
    return (stage, None, 3, stride) if kind == "dw" else (stage, int(features * width), 1, 1)


_KERAS = {"gamma": "scale", "beta": "bias", "moving_mean": "mean", "moving_variance": "var"}


def convert(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Keras's weights by name -> {"params": .., "batch_stats": ..} of MobileNetV1.

    Args:
      state: "conv_dw_1/depthwise_kernel" (3 3 c 1), "conv_pw_1/kernel" (1 1 c d), "conv_pw_1_bn/gamma" (d,),
        ..; also with the layer's name twice and ":0" at the end, as in Keras's own files. The classifier
        (conv_preds) is left out. Any last layer: the nets that fit have that field `last`.
    Raises:
      UserError: a name that is not of this family, or a layer without one of its arrays.
    """
    params, stats = {}, {}
    for name, value in state.items():
        layer, _, leaf = name.removesuffix(":0").rpartition("/")
        layer = layer.split("/")[-1]
        if layer == "conv_preds":
            continue
        owner = layer.removesuffix("_bn")
        if owner not in LAYERS or (
            leaf not in _KERAS if layer != owner else leaf not in ("kernel", "depthwise_kernel")
        ):
            raise UserError(f"{name!r} is not a weight of a Keras MobileNetV1; give such a file, or another backbone.")
        if layer != owner:
            (params if leaf in ("gamma", "beta") else stats)[f"{owner}/bn/{_KERAS[leaf]}"] = value
        else:
            params[f"{owner}/conv/kernel"] = value if leaf == "kernel" else np.swapaxes(value, 2, 3)
    _convert.check_complete(params | stats, "Keras MobileNetV1")
    built = {path.split("/")[0] for path in params}
    for layer in LAYERS[: max((LAYERS.index(layer) for layer in built), default=0)]:
        if layer not in built:
            raise UserError(f"The Keras MobileNetV1 weights lack the layer {layer!r} but have later ones.")
    return {"params": nest(params), "batch_stats": nest(stats)}


NAMES = {"mobilenet_v1": MobileNetV1}

# Published checkpoints: the name starts with the architecture. Keras keeps them as HDF5, outside the hub; the file
# named here is the tests' copy of its arrays up to conv_pw_12.
RECORDS: dict[str, dict[str, Any]] = {
    "mobilenet_v1_keras": {
        "arch": "mobilenet_v1",
        "hub": None,
        "file": "mobilenet_v1_imagenet_to_conv_pw_12.npz",
        "sha256": "21003736e7a07098076eb98d6cd9c481900a8b5789406e7020cae6e5c52ce3a4",
        "licence": "Apache-2.0",
        "paper": "arXiv 1704.04861",
        "size": 224,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "note": "ImageNet-1k by Keras, RGB as x/127.5 - 1; conv_pw_13 and the classifier are not in the file",
    }
}
