"""MCAR: the image, then the regions that its own class maps point at (Gao, Zhou; IEEE TIP 2021).

Global stream: backbone, global pooling, linear classifier. The classifier scores every position too; the maps of the
most probable labels, stretched to the image, give one box each, and the local stream looks at what is in the boxes,
stretched to the size of the image, with the same backbone and classifier. A label's score is the larger one of its
global score and its best local score; each stream has its own loss.

Exact: boxes, scores and losses are those of the authors' code, gaobb/MCAR. Here all boxes of a batch are found at once,
on the device. The image is needed again: cached endpoints do not do.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mljax.errors import UserError, one_of
from mljax.layers import final, largest, torch_linear_init
from mljax.losses.criterion import Criterion
from mljax.systems import _mcar
from mljax.types import Batch, Meta, Outputs
from mljax.weights.published import Names, Published


class MCAR(nn.Module):
    """MCAR for a data set.

    Logits are the larger ones of both streams. Attention is the map of sigmoids that boxes come from, divided by its
    sum over positions. There are no label features. `extra`: `global_logits` and `local_logits` (b l); `boxes` (b t 4)
    int32, left, right, top, bottom in pixels of the image, right and bottom excluded; `box_labels` (b t) int32, whose
    map a box comes from, the most probable first.

    Attributes:
      regions: t, how many labels give a box; all of them where there are fewer (the authors' topN).
      threshold: of a profile scaled to [0, 1], where a box ends.
      pooling: global pooling of both streams: "average", "max", or "mean_of_both" (the authors' gwp).

    Reference: Gao and Zhou, "Learning to Discover Multi-Class Attentional Regions for Multi-Label Image Recognition",
      IEEE TIP 2021, section III. What a box is exactly is said at `mljax.systems._mcar.interval`.
    Differs from the authors' code: pooling takes all of the map, theirs windows of 1/32 of the image, which is the
      same for maps of stride 32.
    """

    backbone: nn.Module
    criterion: Criterion
    meta: Meta
    regions: int = 4
    threshold: float = 0.5
    pooling: str = "average"
    dtype: Any = jnp.float32
    axis: str | None = None

    needs_image = (  # what the trainer says before it caches features; without annotation it is no field
        "MCAR looks at parts of the image again and cached features hold none; leave config.cache.train_views empty"
        " (--config.cache.train_views=)."
    )

    def __post_init__(self) -> None:
        one_of("config.system.pooling", self.pooling, ("average", "max", "mean_of_both"))
        if self.regions < 1:
            raise UserError(f"config.system.regions is {self.regions}; expected at least 1.")
        if not 0 < self.threshold < 1:
            raise UserError(
                f"config.system.threshold is {self.threshold}; expected a share of the peak, above 0 and below 1."
            )
        super().__post_init__()

    @property
    def num_regions(self) -> int:
        """t: at most one region for each label."""
        return min(self.regions, self.meta.num_labels)

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> Outputs:
        if "image" not in batch:
            raise UserError(self.needs_image)
        image = batch["image"]
        b, height, width, colours = image.shape
        feature_map = final(self.backbone(image, train=train)).astype(jnp.float32)
        init = torch_linear_init(feature_map.shape[-1])
        classify = nn.Dense(self.meta.num_labels, kernel_init=init, bias_init=init, name="classifier")
        scores = classify(self._pool(feature_map))

        maps = nn.sigmoid(classify(jax.lax.stop_gradient(feature_map))).transpose(0, 3, 1, 2)
        _, chosen = jax.lax.top_k(scores, self.num_regions)
        boxes = _mcar.boxes(jnp.take_along_axis(maps, chosen[:, :, None, None], 1), height, width, self.threshold)
        crops = jax.lax.stop_gradient(_mcar.crops(image, boxes)).reshape(-1, height, width, colours)

        regional = final(self.backbone(crops, train=train)).astype(jnp.float32)
        local = largest(classify(self._pool(regional)).reshape(b, self.num_regions, -1), 1)
        return Outputs(
            logits=jnp.maximum(scores, local),
            attention=(maps / maps.sum((-2, -1), keepdims=True))[:, None],
            extra={"global_logits": scores, "local_logits": local, "boxes": boxes, "box_labels": chosen},
        )

    def _pool(self, feature_map: Float[Array, "b h w d"]) -> Float[Array, "b d"]:
        average, highest = feature_map.mean((1, 2)), largest(feature_map, (1, 2))
        return {"average": average, "max": highest, "mean_of_both": (average + highest) / 2}[self.pooling]

    def loss(self, batch: Batch, step: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The sum of both streams' losses; the local one is taken on the best score over regions."""
        del step
        extra: Any = self(batch, train=True).extra
        whole = self.criterion(extra["global_logits"], batch, axis=self.axis)
        parts = self.criterion(extra["local_logits"], batch, axis=self.axis)
        return whole + parts, {"global_loss": whole, "local_loss": parts}


def _convert(names: Names, system: nn.Module) -> dict[str, Any]:
    del system
    return {"params": {"classifier": names.pointwise("convclass")}}


PUBLISHED = Published(_convert, trunk="features.")
NAMES = {"mcar": MCAR}
