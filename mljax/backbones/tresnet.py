"""TResNet: a ResNet made for throughput.

Ridnik et al., "TResNet: High Performance GPU-Dedicated Architecture", WACV 2021, table 1 and section 2.
Ridnik et al., "ImageNet-21K Pretraining for the Masses", 2021, released the weights of "L v2" (bottlenecks in
all stages).
"""

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

from mljax.backbones import _common, _convert
from mljax.backbones._common import Endpoints, Image
from mljax.convolution import BatchNorm, Conv
from mljax.errors import UserError
from mljax.trees import map_named
from mljax.types import ArrayLike

STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")


def space_to_depth(
    image: Float[ArrayLike, "b h w c"], side: int = 4
) -> Float[ArrayLike, "b h//{side} w//{side} {side}*{side}*c"]:
    """Squares of pixels become channels: channel = (row * side + column) * c + colour."""
    b, h, w, c = image.shape
    if h % side or w % side:
        raise UserError(f"TResNet got an image of {h} x {w}; make both sides multiples of {side}.")
    squares = image.reshape(b, h // side, side, w // side, side, c).transpose(0, 1, 3, 2, 4, 5)
    return squares.reshape(b, h // side, w // side, side * side * c)


def blur_pool(x: Float[ArrayLike, "b h w d"]) -> Float[Array, "b (h+1)//2 (w+1)//2 d"]:
    """Binomial filter [1 2 1] x [1 2 1] / 16 with reflected borders, then every second row and column.

    Zhang, "Making Convolutional Networks Shift-Invariant Again", ICML 2019.
    """
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    for axis in (1, 2):
        size = 2 * ((x.shape[axis] - 3) // 2) + 1
        left, middle, right = (lax.slice_in_dim(x, i, i + size, stride=2, axis=axis) for i in range(3))
        x = (left + 2 * middle + right) / 4
    return x


def _halve(x: jax.Array) -> jax.Array:
    """Means of 2 x 2 squares, at the end of an odd side of fewer pixels: (b h w d) -> (b ceil(h/2) ceil(w/2) d)."""
    h, w = x.shape[1:3]
    pads = ((0, 0), (0, h % 2), (0, w % 2), (0, 0))
    total = lax.reduce_window(x, np.zeros((), x.dtype), lax.add, (1, 2, 2, 1), (1, 2, 2, 1), pads)
    rows, columns = (np.minimum(2, n - np.arange(0, n, 2)) for n in (h, w))
    return total / jnp.asarray(np.outer(rows, columns)[None, :, :, None], x.dtype)


class _ConvNorm(nn.Module):
    """Convolution, batch norm, leaky ReLU of that slope (None: no activation), and blur pool if the stride is 2."""

    features: int
    size: int
    norm: Any
    dtype: Any
    slope: float | None = 1e-3
    stride: int = 1
    gain: Any = nn.initializers.ones_init()

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "b _ _ _"], train: bool) -> Float[Array, "b _ _ _"]:
        x = Conv(self.features, self.size, dtype=self.dtype, name="conv")(x)
        x = self.norm(scale_init=self.gain, name="bn")(x, train)
        x = x if self.slope is None else nn.leaky_relu(x, self.slope)
        return blur_pool(x) if self.stride == 2 else x


class _SqueezeExcite(nn.Module):
    """x times a gate per channel, from the mean over the map (Hu et al., CVPR 2018)."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "b h w d"]) -> Float[Array, "b h w d"]:
        conv = partial(Conv, size=1, bias=True, dtype=self.dtype)
        gate = jnp.mean(x, (1, 2), keepdims=True)
        gate = nn.relu(conv(self.features, name="fc1")(gate))
        return x * nn.sigmoid(conv(x.shape[-1], name="fc2")(gate))


class _Block(nn.Module):
    """A residual block of `width` channels inside; a bottleneck's output has four times as many."""

    bottleneck: bool
    width: int
    stride: int
    squeeze: bool
    norm: Any
    zero_gain: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "b _ _ _"], train: bool) -> Float[Array, "b _ _ _"]:
        conv = partial(_ConvNorm, norm=self.norm, dtype=self.dtype)
        gain = nn.initializers.zeros_init() if self.zero_gain else nn.initializers.ones_init()
        features = self.width * 4 if self.bottleneck else self.width
        excite = _SqueezeExcite(max(features // (8 if self.bottleneck else 4), 64), self.dtype, name="se")
        if self.bottleneck:
            y = conv(self.width, 1, name="conv1")(x, train)
            y = conv(self.width, 3, stride=self.stride, name="conv2")(y, train)
            y = excite(y) if self.squeeze else y
            y = conv(features, 1, slope=None, gain=gain, name="conv3")(y, train)
        else:
            y = conv(self.width, 3, stride=self.stride, name="conv1")(x, train)
            y = conv(self.width, 3, slope=None, gain=gain, name="conv2")(y, train)
            y = excite(y) if self.squeeze else y
        if self.stride == 2:
            x = _halve(x)
        if x.shape != y.shape or self.stride == 2:
            x = conv(features, 1, slope=None, name="downsample")(x, train)
        return nn.relu(x + y)


class TResNet(nn.Module):
    """Image -> feature maps.

    Attributes:
      frozen: comma list of "stem", "layer1" .. "layer4", or "all": no gradient, and running statistics.
      norm: "batch", or "frozen": running statistics everywhere, scale and bias fixed.
      dtype: of the computation: float32 or bfloat16; parameters and statistics stay float32.
      axis: pmap axis for the statistics of a batch.
      endpoints: strides: "4" (layer1), "8", "16", "32" (layer4). All stages are built, whatever is asked for.
      remat: recompute every block in the backward pass instead of storing its activations.
      depths: blocks per stage.
      width: channels of the stem and inside layer1; doubled from stage to stage.
      bottlenecks: which stages consist of bottlenecks.
      zero_gain: start the last gain of every block at zero, as the authors do.
      in_channels: of the image.
    Differs from the authors' code: their in-place batch norm has the gain |weight| + 1e-5; here the gain is
    the parameter itself, which `convert` sets to that number, and which training may make negative.
    Query2Label's runs move the statistics of a frozen stem and layer1; here what is frozen keeps them.
    """

    frozen: str = ""
    norm: str = "batch"
    dtype: Any = jnp.float32
    axis: str | None = None
    endpoints: tuple[str, ...] = ("32",)
    remat: bool = False
    depths: tuple[int, ...] = (4, 5, 18, 3)
    width: int = 76
    bottlenecks: tuple[bool, ...] = (False, False, True, True)
    zero_gain: bool = True
    in_channels: int = 3

    @property
    def frozen_parameters(self) -> tuple[str, ...]:
        """Regular expressions of the paths of the parameters that get no gradient."""
        return _common.frozen_parameters(self.frozen, self.norm, {stage: rf"^{stage}[_/]" for stage in STAGES})

    @nn.compact
    def __call__(self, image: Image, *, train: bool) -> Endpoints:
        """(b h w c) float32, RGB in [0, 1], sides multiples of 4 -> {stride: (b h' w' d)} of `dtype`."""
        _common.check_image(image, self.in_channels, "tresnet")
        frozen = _common.frozen_stages(self.frozen, STAGES)
        modes = {stage: _common.norm_mode(self.norm, stage in frozen) for stage in STAGES}
        norm = {stage: partial(BatchNorm, mode, self.axis, dtype=self.dtype) for stage, mode in modes.items()}

        x = space_to_depth(image.astype(self.dtype))
        x = _ConvNorm(self.width, 3, norm["stem"], self.dtype, slope=1e-2, name="stem")(x, train)
        x = lax.stop_gradient(x) if "stem" in frozen else x
        block = nn.remat(_Block, static_argnums=(2,)) if self.remat else _Block
        endpoints = {}
        for i, stage in enumerate(STAGES[1:]):
            for j in range(self.depths[i]):
                x = block(
                    bottleneck=self.bottlenecks[i],
                    width=self.width * 2**i,
                    stride=2 if i > 0 and j == 0 else 1,
                    squeeze=stage != "layer4",
                    norm=norm[stage],
                    zero_gain=self.zero_gain,
                    dtype=self.dtype,
                    name=f"{stage}_{j}",
                )(x, train)
            x = lax.stop_gradient(x) if stage in frozen else x
            endpoints[str(4 * 2**i)] = x
        _common.check_endpoints(self.endpoints, tuple(endpoints), "tresnet")
        return {endpoint: endpoints[endpoint] for endpoint in self.endpoints}


# Official (0: convolution, 1: in-place batch norm, one more .0. where a blur pool follows) and timm's names.
_PATTERNS = (
    (r"body\.conv1\.(0|1|conv|bn)", r"stem/\1"),
    (r"body\.layer(\d)\.(\d+)\.(conv\d)(?:\.0)?\.(0|1|conv|bn)", r"layer\1_\2/\3/\4"),
    (r"body\.layer(\d)\.(\d+)\.downsample\.[01]\.(0|1|conv|bn)", r"layer\1_\2/downsample/\3"),
    (r"body\.layer(\d)\.(\d+)\.se\.(fc[12])", r"layer\1_\2/se/\3"),
)
_PARTS = {"0": "conv", "1": "bn"}


def _module(name: str) -> str | None:
    for pattern, path in _PATTERNS:
        match = re.fullmatch(pattern, name)
        if match:
            head, _, last = match.expand(path).rpartition("/")
            return f"{head}/{_PARTS.get(last, last)}"
    return None


def convert(state: Mapping[str, np.ndarray], prefix: str = "") -> dict[str, Any]:
    """A torch state dict -> {"params": .., "batch_stats": ..} of TResNet.

    Args:
      state: tensors by the official names ("body.layer2.0.conv1.0.0.weight"), whose batch norm weights w
        become gains |w| + 1e-5, or by timm's ("body.layer2.0.conv1.conv.weight"), where they are gains
        already. Heads are left out.
      prefix: take only the names that start with it, and read what follows ("backbone.0.body.").
    Raises:
      UserError: a name of another family, or a convolution or normalisation of which a part is missing.
    """
    tree = _convert.convert_torch(state, _module, r"head\..*|.*\.aa\.filt|body\.s2d\..*", "TResNet", prefix)
    if any(re.search(r"body\.conv1\.0\.weight$", name) for name in state):
        tree["params"] = map_named(
            lambda path, x: np.abs(x) + np.float32(1e-5) if path.endswith("/scale") else x, tree["params"]
        )
    return tree


NAMES = {
    "tresnet_m": partial(TResNet, depths=(3, 4, 11, 3), width=64),
    "tresnet_l": partial(TResNet, depths=(4, 5, 18, 3), width=76),
    "tresnet_xl": partial(TResNet, depths=(4, 5, 24, 3), width=83),
    "tresnet_l_v2": partial(TResNet, depths=(3, 4, 23, 3), width=64, bottlenecks=(True,) * 4),
    "tresnet_xl_v2": partial(TResNet, depths=(3, 8, 34, 5), width=64, bottlenecks=(True,) * 4),
}

_IN1K = "ImageNet-1k by the authors; timm's copy has plain gains"
_IN21K = "ImageNet-21k-P by the authors; timm's copy has plain gains"
_RAW = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
_TRESNET, _MASSES = "arXiv 2003.13630", "arXiv 2104.10972"
_L_DIGEST = "283febdbd4169e586d93a4ed769087157fe2079a7c390def0d28c59f8ef97c7f"
_V2_DIGEST = "c9c65a12d4d20e71162143eecc7346913c1d12b79cd55ab22b6ee719f3b53eba"
_record = partial(_convert.timm_record, licence="Apache-2.0", **_RAW)

# Published checkpoints: the name starts with the architecture. All expect images in [0, 1], not normalised.
RECORDS: dict[str, dict[str, Any]] = {
    "tresnet_m_in1k": _record("tresnet_m", "tresnet_m.miil_in1k", paper=_TRESNET, note=_IN1K),
    "tresnet_m_in1k_448": _record("tresnet_m", "tresnet_m.miil_in1k_448", paper=_TRESNET, note=_IN1K, size=448),
    "tresnet_m_in21k": _record(
        "tresnet_m",
        "tresnet_m.miil_in21k",
        paper=_MASSES,
        note=_IN21K,
        sha256="f0c4dba14875e71f2fbd03f463ad475f0c708a9810be3ec0cc8ec5cfb1e35f24",
    ),
    "tresnet_l_in1k": _record("tresnet_l", "tresnet_l.miil_in1k", paper=_TRESNET, note=_IN1K, sha256=_L_DIGEST),
    "tresnet_l_in1k_448": _record("tresnet_l", "tresnet_l.miil_in1k_448", paper=_TRESNET, note=_IN1K, size=448),
    "tresnet_l_v2_in21k": _record("tresnet_l_v2", "tresnet_v2_l.miil_in21k", paper=_MASSES, note=_IN21K),
    "tresnet_l_v2_in21k_in1k": _record(
        "tresnet_l_v2",
        "tresnet_v2_l.miil_in21k_ft_in1k",
        paper=_MASSES,
        note=_IN21K + ", then ImageNet-1k",
        sha256=_V2_DIGEST,
    ),
    "tresnet_xl_v2_ml_decoder": {
        "arch": "tresnet_xl_v2",
        "hub": None,
        "file": "tresnet_xl_v2_ml_decoder.pth",
        "sha256": None,
        "licence": "MIT",
        "paper": "arXiv 2111.12933",
        "size": 640,
        **_RAW,
        "note": "what ML-Decoder's authors start from, trained with its head; on no hub, and the file name is ours",
    },
}
