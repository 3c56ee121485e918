"""A small residual network that trains from scratch in minutes on a CPU: for the embedded data set, demos and tests.

Of no paper. Stem of stride 2, then residual basic blocks (He et al., CVPR 2016, fig. 2) in stages of stride 2.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from mljax.backbones import _common
from mljax.backbones._common import Endpoints, Image
from mljax.convolution import BatchNorm, Conv
from mljax.errors import UserError
from mljax.types import ArrayLike

STAGES = ("stem", "layer1", "layer2", "layer3")


class _Block(nn.Module):
    features: int
    stride: int
    mode: str
    axis: str | None
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "b _ _ _"], train: bool) -> Float[Array, "b _ _ _"]:
        def conv_bn(y: jax.Array, size: int, stride: int, name: str) -> jax.Array:
            y = Conv(self.features, size, stride, dtype=self.dtype, name=f"conv{name}")(y)
            return BatchNorm(self.mode, self.axis, dtype=self.dtype, name=f"bn{name}")(y, train)

        y = nn.relu(conv_bn(x, 3, self.stride, "1"))
        y = conv_bn(y, 3, 1, "2")
        short = x if x.shape == y.shape else conv_bn(x, 1, self.stride, "_short")
        return nn.relu(short + y)


class Small(nn.Module):
    """Image -> {"2": .., "4": .., "8": .., "16": ..} as asked for.

    Attributes:
      widths: channels of the stem (stride 2) and of the three stages (strides 4, 8, 16).
      blocks: residual blocks per stage.
      frozen, norm, dtype, axis, endpoints, remat, in_channels: as in every backbone.
    """

    widths: tuple[int, ...] = (24, 48, 96, 160)
    blocks: int = 1
    frozen: str = ""
    norm: str = "batch"
    dtype: Any = jnp.float32
    axis: str | None = None
    endpoints: tuple[str, ...] = ("16",)
    remat: bool = False
    in_channels: int = 3

    @property
    def frozen_parameters(self) -> tuple[str, ...]:
        """Regular expressions of the paths of the parameters that get no gradient."""
        return _common.frozen_parameters(self.frozen, self.norm, {stage: f"^{stage}_" for stage in STAGES})

    @nn.compact
    def __call__(self, image: Image, *, train: bool) -> Endpoints:
        _common.check_image(image, self.in_channels, "small")
        _common.check_endpoints(self.endpoints, ("2", "4", "8", "16"), "small")
        if len(self.widths) != len(STAGES):
            raise UserError(f"config.backbone.widths={self.widths} is not a width per stage; expected {len(STAGES)}.")
        frozen = _common.frozen_stages(self.frozen, STAGES)
        block = nn.remat(_Block, static_argnums=(2,)) if self.remat else _Block
        endpoints, x = {}, image.astype(self.dtype)
        last = max(int(endpoint) for endpoint in self.endpoints)  # later stages are not built
        for i, (stage, width) in enumerate(zip(STAGES, self.widths)):
            if 2 ** (i + 1) > last:
                break
            mode = _common.norm_mode(self.norm, stage in frozen)
            if stage == "stem":
                x = Conv(width, 3, 2, dtype=self.dtype, name="stem_conv")(x)
                x = nn.relu(BatchNorm(mode, self.axis, dtype=self.dtype, name="stem_bn")(x, train))
            else:
                for j in range(self.blocks):
                    step = 2 if j == 0 else 1
                    x = block(width, step, mode, self.axis, self.dtype, name=f"{stage}_{j}")(x, train)
            if stage in frozen:
                x = lax.stop_gradient(x)
            endpoints[str(2 ** (i + 1))] = x
        return {name: endpoints[name] for name in self.endpoints}


NAMES = {"small": Small}
