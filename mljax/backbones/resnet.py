"""ResNet and ResNeXt with torchvision's layout ("v1.5": a bottleneck's stride sits in its 3x3 convolution).

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, table 1; Xie et al., "Aggregated
Residual Transformations for Deep Neural Networks", CVPR 2017, table 1.
"""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from mljax import convolution
from mljax.backbones import _common, _convert
from mljax.backbones._common import Endpoints, Image
from mljax.convolution import BatchNorm, Conv
from mljax.types import ArrayLike

STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")


class _Block(nn.Module):
    """A residual block; `width` is of its 3x3 convolution, `features` of its output."""

    bottleneck: bool
    width: int
    features: int
    stride: int
    groups: int
    norm: Any
    zero_gain: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "b _ _ _"], train: bool) -> Float[Array, "b _ _ _"]:
        conv = partial(Conv, dtype=self.dtype)
        last_gain = nn.initializers.zeros_init() if self.zero_gain else nn.initializers.ones_init()
        if self.bottleneck:
            y = nn.relu(self.norm(name="bn1")(conv(self.width, 1, name="conv1")(x), train))
            y = conv(self.width, 3, self.stride, self.groups, name="conv2")(y)
            y = nn.relu(self.norm(name="bn2")(y, train))
            y = conv(self.features, 1, name="conv3")(y)
            y = self.norm(scale_init=last_gain, name="bn3")(y, train)
        else:
            y = nn.relu(self.norm(name="bn1")(conv(self.features, 3, self.stride, name="conv1")(x), train))
            y = conv(self.features, 3, name="conv2")(y)
            y = self.norm(scale_init=last_gain, name="bn2")(y, train)
        if x.shape != y.shape:
            x = conv(self.features, 1, self.stride, name="downsample_conv")(x)
            x = self.norm(name="downsample_bn")(x, train)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Image -> feature maps.

    Attributes:
      frozen: comma list of "stem", "layer1" .. "layer4", or "all": no gradient, and running statistics.
      norm: "batch", or "frozen": running statistics everywhere, scale and bias fixed.
      dtype: of the computation: float32 or bfloat16; parameters and statistics stay float32.
      axis: pmap axis for the statistics of a batch.
      endpoints: strides: "4" (layer1), "8", "16", "32" (layer4), after the last ReLU. All stages are built,
        whatever is asked for, so that weights fit.
      remat: recompute every block in the backward pass instead of storing its activations.
      depths: blocks per stage.
      bottleneck: 1x1, 3x3, 1x1 blocks with four times the features; else two 3x3.
      groups, base_width: of the 3x3 convolutions: groups x base_width channels in layer1 ("32x4d": 32, 4).
      width: features of the stem and of layer1 (times four with bottlenecks).
      zero_gain: start the last gain of every block at zero (Goyal et al. 2017); not torchvision's default.
      in_channels: of the image.
    Differs from torchvision: not in values; its BatchNorm is `convolution.BatchNorm`.
    """

    frozen: str = ""
    norm: str = "batch"
    dtype: Any = jnp.float32
    axis: str | None = None
    endpoints: tuple[str, ...] = ("32",)
    remat: bool = False
    depths: tuple[int, ...] = (3, 4, 6, 3)
    bottleneck: bool = True
    groups: int = 1
    base_width: int = 64
    width: int = 64
    zero_gain: bool = False
    in_channels: int = 3

    @property
    def frozen_parameters(self) -> tuple[str, ...]:
        """Regular expressions of the paths of the parameters that get no gradient."""
        return _common.frozen_parameters(self.frozen, self.norm, {stage: rf"^{stage}[_/]" for stage in STAGES})

    @nn.compact
    def __call__(self, image: Image, *, train: bool) -> Endpoints:
        """(b h w c) float32, RGB, normalised -> {stride: (b h/stride w/stride d)} of `dtype`."""
        _common.check_image(image, self.in_channels, "resnet")
        frozen = _common.frozen_stages(self.frozen, STAGES)
        norm = {
            stage: partial(BatchNorm, _common.norm_mode(self.norm, stage in frozen), self.axis, dtype=self.dtype)
            for stage in STAGES
        }
        x = _Stem(self.width, norm["stem"], self.dtype, name="stem")(image, train)
        x = lax.stop_gradient(x) if "stem" in frozen else x

        block = nn.remat(_Block, static_argnums=(2,)) if self.remat else _Block
        endpoints = {}
        for i, (stage, depth) in enumerate(zip(STAGES[1:], self.depths, strict=True)):
            features = self.width * 2**i
            inner = features * self.base_width // 64 * self.groups if self.bottleneck else features
            features = features * 4 if self.bottleneck else features
            for j in range(depth):
                x = block(
                    bottleneck=self.bottleneck,
                    width=inner,
                    features=features,
                    stride=2 if i > 0 and j == 0 else 1,
                    groups=self.groups,
                    norm=norm[stage],
                    zero_gain=self.zero_gain,
                    dtype=self.dtype,
                    name=f"{stage}_{j}",
                )(x, train)
            x = lax.stop_gradient(x) if stage in frozen else x
            endpoints[str(4 * 2**i)] = x
        _common.check_endpoints(self.endpoints, tuple(endpoints), "resnet")
        return {endpoint: endpoints[endpoint] for endpoint in self.endpoints}


class _Stem(nn.Module):
    """7x7 convolution of stride 2, batch norm, ReLU, 3x3 maximum of stride 2."""

    features: int
    norm: Any
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "b _ _ _"], train: bool) -> Float[Array, "b _ _ _"]:
        x = Conv(self.features, 7, 2, dtype=self.dtype, name="conv")(x)
        x = nn.relu(self.norm(name="bn")(x, train))
        return convolution.max_pool(x)


# How each family of names writes a tensor: pattern -> path of its module here.
_PATTERNS = (
    # torchvision, timm
    (r"conv1", "stem/conv"),
    (r"bn1", "stem/bn"),
    (r"layer(\d)\.(\d+)\.(conv\d|bn\d)", r"layer\1_\2/\3"),
    (r"layer(\d)\.(\d+)\.downsample\.0", r"layer\1_\2/downsample_conv"),
    (r"layer(\d)\.(\d+)\.downsample\.1", r"layer\1_\2/downsample_bn"),
    # nn.Sequential of torchvision's children, as many systems keep it
    (r"0", "stem/conv"),
    (r"1", "stem/bn"),
    (r"([4-7])\.(\d+)\.(conv\d|bn\d)", r"children\1_\2/\3"),
    (r"([4-7])\.(\d+)\.downsample\.0", r"children\1_\2/downsample_conv"),
    (r"([4-7])\.(\d+)\.downsample\.1", r"children\1_\2/downsample_bn"),
    # transformers
    (r"(?:resnet\.)?embedder\.embedder\.convolution", "stem/conv"),
    (r"(?:resnet\.)?embedder\.embedder\.normalization", "stem/bn"),
    (r"(?:resnet\.)?encoder\.stages\.(\d)\.layers\.(\d+)\.layer\.(\d)\.convolution", r"stages\1_\2/conv+\3"),
    (r"(?:resnet\.)?encoder\.stages\.(\d)\.layers\.(\d+)\.layer\.(\d)\.normalization", r"stages\1_\2/bn+\3"),
    (
        r"(?:resnet\.)?encoder\.stages\.(\d)\.layers\.(\d+)\.shortcut\.convolution",
        r"stages\1_\2/downsample_conv",
    ),
    (
        r"(?:resnet\.)?encoder\.stages\.(\d)\.layers\.(\d+)\.shortcut\.normalization",
        r"stages\1_\2/downsample_bn",
    ),
)


def _module(name: str) -> str | None:
    """The module here of a tensor's owner there ("layer1.0.conv1"), or None."""
    for pattern, path in _PATTERNS:
        match = re.fullmatch(pattern, name)
        if match:
            path = match.expand(path)
            path = re.sub(r"^children(\d)", lambda m: f"layer{int(m[1]) - 3}", path)
            path = re.sub(r"^stages(\d)", lambda m: f"layer{int(m[1]) + 1}", path)
            return re.sub(r"\+(\d)", lambda m: str(int(m[1]) + 1), path)
    return None


def convert(state: Mapping[str, np.ndarray], prefix: str = "") -> dict[str, Any]:
    """A torch state dict -> {"params": .., "batch_stats": ..} of ResNet or ResNeXt.

    Args:
      state: tensors by torchvision's (timm's) names, by transformers' or by those of torchvision's children
        in an nn.Sequential. Classifiers (fc, classifier) and num_batches_tracked are left out.
      prefix: take only the names that start with it, and read what follows ("backbone.0.body.").
    Raises:
      UserError: a name of another family, or a convolution or normalisation of which a part is missing.
    """
    return _convert.convert_torch(state, _module, r"fc\..*|classifier\..*", "ResNet", prefix)


_BASIC = partial(ResNet, bottleneck=False)
_DEEP = (3, 4, 23, 3)

NAMES = {
    "resnet18": partial(_BASIC, depths=(2, 2, 2, 2)),
    "resnet34": partial(_BASIC, depths=(3, 4, 6, 3)),
    "resnet50": partial(ResNet, depths=(3, 4, 6, 3)),
    "resnet101": partial(ResNet, depths=_DEEP),
    "resnet152": partial(ResNet, depths=(3, 8, 36, 3)),
    "resnext50_32x4d": partial(ResNet, depths=(3, 4, 6, 3), groups=32, base_width=4),
    "resnext101_32x8d": partial(ResNet, depths=_DEEP, groups=32, base_width=8),
    "resnext101_32x16d": partial(ResNet, depths=_DEEP, groups=32, base_width=16),
}

_TV1 = "torchvision's first ImageNet-1k weights (IMAGENET1K_V1)"
_TV2 = "torchvision's second recipe (IMAGENET1K_V2), trained at 176 and tested at 224"
_A1 = "ImageNet-1k, recipe A1 (600 epochs, binary cross-entropy), bicubic, tested at 288"
_SWSL = "940 M Instagram images with hashtags, then ImageNet-1k; non-commercial use only"
_RESNET, _RESNEXT = "arXiv 1512.03385", "arXiv 1611.05431"
_RSB, _SEMI = "arXiv 2110.00476", "arXiv 1905.00546"


def _records() -> dict[str, dict[str, Any]]:
    record = _convert.timm_record
    records = {}
    for arch in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"):
        records[arch] = record(arch, f"{arch}.tv_in1k", "BSD-3-Clause", _RESNET, _TV1)
    for arch in ("resnet50", "resnet101", "resnet152"):
        records[f"{arch}_v2"] = record(arch, f"{arch}.tv2_in1k", "BSD-3-Clause", _RESNET, _TV2)
        digest = "1ba5b660e7c175b3c27c557fc7dc8b2815be830c516815b0155f61b403f27380"
        records[f"{arch}_a1"] = record(
            arch, f"{arch}.a1_in1k", "Apache-2.0", _RSB, _A1, sha256=digest if arch == "resnet101" else None
        )
    for arch in ("resnext50_32x4d", "resnext101_32x8d"):
        records[arch] = record(arch, f"{arch}.tv_in1k", "BSD-3-Clause", _RESNEXT, _TV1)
        records[f"{arch}_v2"] = record(arch, f"{arch}.tv2_in1k", "BSD-3-Clause", _RESNEXT, _TV2)
    for arch in ("resnext50_32x4d", "resnext101_32x8d", "resnext101_32x16d"):
        name = f"{arch}.fb_swsl_ig1b_ft_in1k"
        records[f"{arch}_swsl"] = record(arch, name, "CC-BY-NC-4.0", _SEMI, _SWSL)
    return records


# Published checkpoints: the name starts with the architecture.
RECORDS = _records()
