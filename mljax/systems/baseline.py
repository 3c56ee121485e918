"""Backbone, global pooling, linear classifier: what every paper's table starts from."""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mljax.errors import one_of
from mljax.layers import Dropout, encode, final, largest, torch_linear_init
from mljax.losses.criterion import Criterion
from mljax.types import Batch, Meta, Outputs
from mljax.weights.published import Names, Published


class Baseline(nn.Module):
    """Pooled features and one linear layer.

    Attributes:
      pooling: "average" (the ResNet-101 rows of most tables), "max" (ML-GCN's baseline), or "mean_of_both".
      dropout: before the classifier.

    Reference: "ResNet-101 GAP / GMP" rows, e.g. Chen et al., "Multi-Label Image Recognition with Graph Convolutional
    Networks", CVPR 2019, table 1.
    Attention is the class activation map (Zhou et al., CVPR 2016), softmax-normalised over positions.
    """

    backbone: nn.Module
    criterion: Criterion
    meta: Meta
    pooling: str = "average"
    dropout: float = 0.0
    dtype: Any = jnp.float32
    axis: str | None = None

    def __post_init__(self) -> None:
        one_of("config.system.pooling", self.pooling, ("average", "max", "mean_of_both"))
        super().__post_init__()

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> Outputs:
        feature_map = final(encode(self.backbone, batch, train=train)).astype(jnp.float32)
        average, highest = feature_map.mean((1, 2)), largest(feature_map, (1, 2))
        pooled = {"average": average, "max": highest, "mean_of_both": (average + highest) / 2}[self.pooling]
        width = pooled.shape[-1]
        kernel = self.param("kernel", torch_linear_init(width), (width, self.meta.num_labels))
        bias = self.param("bias", torch_linear_init(width), (self.meta.num_labels,))
        logits = Dropout(self.dropout)(pooled, train=train) @ kernel + bias[None]
        activation = jnp.einsum("bhwd,dl->blhw", feature_map, kernel)
        attention = nn.softmax(activation.reshape(*activation.shape[:2], -1), axis=-1).reshape(activation.shape)
        return Outputs(logits=logits, attention=attention[:, None])

    def loss(self, batch: Batch, step: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        del step
        return self.criterion(self(batch, train=True).logits, batch, axis=self.axis), {}


# The classifier in ASL's files, beside a TResNet, and in the single-positive code's, beside a numbered ResNet-50.
_CLASSIFIERS = ("head.fc.", "linear_classifier.")


def _convert(names: Names, system: nn.Module) -> dict[str, Any]:
    if "classifier.FC.weight" in names:  # ASL's bottleneck for Open Images: two linear layers, nothing between them
        first, last = names.linear("classifier.embedding_generator.0"), names.linear("classifier.FC")
        bias = np.matmul(first["bias"], last["kernel"], dtype=np.float32) + last["bias"]
        return {"params": {"kernel": np.matmul(first["kernel"], last["kernel"], dtype=np.float32), "bias": bias}}
    return {"params": names.linear("classifier")}


def _rename(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One name for the classifier, and the trunk without a prefix."""
    for start in _CLASSIFIERS:
        state = {re.sub(rf"^{re.escape(start)}", "classifier.", name): value for name, value in state.items()}
    return {name.removeprefix("feature_extractor."): value for name, value in state.items()}


PUBLISHED = Published(_convert, own=r"classifier\..*", rename=_rename)
NAMES = {"baseline": Baseline}
