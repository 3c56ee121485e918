"""GATN: ML-GCN on a graph that a transformer block makes from label correlations (Yuan et al., TOMM 2023).

Cosines of label vectors, thresholded -> A. Two self-attentions over the rows of A, their product plus the identity is
the graph -> ML-GCN's two graph convolutions -> classifiers for globally max-pooled features.

Exact: forward pass and initialisation are those of the authors' code, a791702141/GATN.
"""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mljax.data import labels as label_data
from mljax.errors import UserError
from mljax.layers import MultiHeadAttention, constant, encode, final, layer_norm, torch_linear_init
from mljax.losses.criterion import Criterion
from mljax.systems import _graph
from mljax.types import Batch, Meta, Outputs
from mljax.weights.published import Names, Published

HEADS = 5  # the authors'


class CorrelationTransformer(nn.Module):
    """attention1(LN(A)) . attention2(LN(A)), the rows of A as tokens of width l, no residuals."""

    heads: int

    @nn.compact
    def __call__(self, correlation: Float[Array, "l l"]) -> Float[Array, "l l"]:
        x = layer_norm("norm", jnp.float32, epsilon=1e-6)(correlation)[None]
        init, width = torch_linear_init(x.shape[-1]), x.shape[-1]
        parts = []
        for name in ("attention1", "attention2"):
            attention = MultiHeadAttention(self.heads, width, kernel_init=init, bias_init=init, name=name)
            parts.append(attention(x, x, x, train=False)[0][0])
        return parts[0] @ parts[1]


class GATN(nn.Module):
    """GATN for a data set that has label vectors. Attention is the class activation map.

    Attributes:
      width: of the hidden graph layer; the second gives as many features as the backbone.
      heads: of the correlation transformer, must divide the number of labels; None: 5 as the authors', or the largest
        number below that divides.
      low, high: cosines from low to below high are edges. The authors: 0.4 to 1.0 for VOC, 0.2 to 1.0 for COCO.

    Reference: Yuan et al., "Graph Attention Transformer Network for Multi-Label Image Classification", TOMM 2023.
    Differs from the authors' code: row sums of the learned graph that are negative or zero give no NaN, see
      `mljax.systems._graph.normalise`; any number of labels works, not only multiples of five.
    """

    backbone: nn.Module
    criterion: Criterion
    meta: Meta
    width: int = 1024
    heads: int | None = None
    low: float = 0.4
    high: float = 1.0
    dtype: Any = jnp.float32
    axis: str | None = None

    def __post_init__(self) -> None:
        count = self.meta.num_labels
        if self.heads is not None and (self.heads < 1 or count % self.heads):
            divisors = ", ".join(str(k) for k in range(1, count + 1) if count % k == 0)
            raise UserError(
                f"config.system.heads is {self.heads} and GATN's attention is as wide as {self.meta.name!r} has labels,"
                f" {count}; expected one of {divisors}."
            )
        if not self.low < self.high:
            raise UserError(
                f"config.system.low is {self.low} and high is {self.high}; expected low below high, the band of cosines"
                " that are edges."
            )
        _graph.vectors(self.meta, "GATN")
        super().__post_init__()

    @property
    def num_heads(self) -> int:
        """The heads of the config, or at most the authors' 5."""
        if self.heads is not None:
            return self.heads
        return max(k for k in range(1, HEADS + 1) if self.meta.num_labels % k == 0)

    @property
    def vectors(self) -> Float[np.ndarray, "l e"]:
        """Label vectors, not normalised."""
        return _graph.vectors(self.meta, "GATN")

    @property
    def correlation(self) -> Float[np.ndarray, "l l"]:
        """A, thresholded and re-weighted."""
        return label_data.gatn_correlation(label_data.cosine(self.vectors), self.low, self.high)

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> Outputs:
        feature_map = final(encode(self.backbone, batch, train=train))
        correlation = constant(self, "correlation", lambda: self.correlation)
        learned = CorrelationTransformer(self.num_heads, name="transformer")(correlation)
        graph = _graph.normalise(learned + jnp.eye(self.meta.num_labels, dtype=learned.dtype))
        gcn = _graph.GraphClassifiers(self.width, feature_map.shape[-1], name="gcn")
        return _graph.classify(feature_map, gcn(constant(self, "vectors", lambda: self.vectors), graph))

    def loss(self, batch: Batch, step: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        del step
        return self.criterion(self(batch, train=True).logits, batch, axis=self.axis), {}


def _rename(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The trunk was called `features` once, and wrapped by itself."""
    pattern = re.compile(r"^(module\.)?(features|backbone)\.(module\.)?")
    return {pattern.sub("backbone.", name): value for name, value in state.items()}


def _convert(names: Names, system: nn.Module) -> dict[str, Any]:
    """The correlation is not in the file: it is computed from the data set's label vectors and the thresholds."""
    block: dict[str, Any] = {"norm": names.norm("transformerblock.attention_norm1")}
    for i in (1, 2):
        parts = ("query", "key", "value", "out")
        block[f"attention{i}"] = {part: names.linear(f"transformerblock.attn{i}.{part}") for part in parts}
    assert isinstance(system, GATN)
    return {
        "params": {"gcn": _graph.published_classifiers(names), "transformer": block},
        "constants": {"correlation": system.correlation, "vectors": system.vectors},
    }


PUBLISHED = Published(_convert, trunk="backbone.", ignored=r"linear_A\.(weight|bias)", rename=_rename)
NAMES = {"gatn": GATN}
