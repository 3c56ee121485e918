"""ML-GCN: classifiers made from label vectors by a graph convolution (Chen, Wei, Wang, Guo; CVPR 2019).

Backbone -> global max pooling -> features (b d). Label vectors (l e) -> two graph convolutions over the co-occurrence
graph of the training labels -> classifiers (l d). Logits are their products.

Exact: forward pass, graph and initialisation are those of the authors' code, megvii-research/ML-GCN.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mljax.data import labels as label_data
from mljax.errors import UserError, nearest
from mljax.layers import constant, encode, final
from mljax.losses.criterion import Criterion
from mljax.systems import _graph
from mljax.types import Batch, Constant, Meta, Outputs
from mljax.weights.published import Names, Published

SOURCES = ("cooccurrence", "vectors", "none")


class MLGCN(nn.Module):
    """The network; settings are explained at `ml_gcn`, which builds it.

    Attributes:
      adjacency: (l l) A, before it is normalised, as the authors' checkpoints store it.
      vectors: (l e) label vectors, not normalised.

    Attention is the class activation map.
    """

    backbone: nn.Module
    criterion: Criterion
    labels: int
    adjacency: Constant
    vectors: Constant
    width: int
    dtype: Any = jnp.float32
    axis: str | None = None

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> Outputs:
        feature_map = final(encode(self.backbone, batch, train=train))
        graph = _graph.normalise(constant(self, "adjacency", self.adjacency))
        gcn = _graph.GraphClassifiers(self.width, feature_map.shape[-1], name="gcn")
        return _graph.classify(feature_map, gcn(constant(self, "vectors", self.vectors), graph))

    def loss(self, batch: Batch, step: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        del step
        return self.criterion(self(batch, train=True).logits, batch, axis=self.axis), {}


def ml_gcn(
    *,
    backbone: nn.Module,
    criterion: Criterion,
    meta: Meta,
    width: int = 1024,
    correlation: str = "cooccurrence",
    threshold: float = 0.4,
    p: float = 0.2,
    dtype: Any = jnp.float32,
    axis: str | None = None,
) -> MLGCN:
    """ML-GCN for a data set.

    Args:
      backbone, criterion, meta: image -> endpoints, the loss, and the facts of the training split.
      width: of the hidden graph layer; the second gives as many features as the backbone.
      correlation: the graph's edges come from P(j | i) of the training labels ("cooccurrence", the paper), from cosines
        of label "vectors" (not the paper: for labels that are never seen together), or there are "none".
      threshold: P(j | i) from which on there is an edge (eq. 7).
      p: weight of the neighbours (eq. 8); the code's factor 0.25 is p / (1 - p).
    Raises:
      UserError: a setting out of range, no label vectors, or no two labels that are ever seen together.
    Reference: Chen et al., "Multi-Label Image Recognition with Graph Convolutional Networks", CVPR 2019, eq. 2, 6 to 8.
    Differs from the paper, as its code does: column sums in place of row sums, and the identity added; see
    `mljax.data.labels.mlgcn_adjacency`. With partial labels P(j | i) is taken among images where both are known.
    """
    if correlation not in SOURCES:
        raise UserError(f"config.system.correlation is {correlation!r}{nearest(correlation, SOURCES)}.")
    if not 0 <= p < 1:
        raise UserError(f"config.system.p is {p}; the share of the neighbours is from 0 to below 1.")
    vectors = _graph.vectors(meta, "ML-GCN")
    adjacency = _adjacency(meta, vectors, correlation, threshold, p)
    return MLGCN(
        backbone, criterion, meta.num_labels, Constant(adjacency), Constant(vectors), width, dtype, axis
    )  # fmt: skip


def _adjacency(meta: Meta, vectors: np.ndarray, correlation: str, threshold: float, p: float) -> np.ndarray:
    images, ones = len(meta.labels), np.ones(meta.num_labels)
    if correlation == "none" or (correlation == "cooccurrence" and not images):  # a released checkpoint brings its own
        return np.eye(meta.num_labels, dtype=np.float32)
    if correlation == "vectors":
        return label_data.mlgcn_adjacency(label_data.cosine(vectors), ones, threshold, p)
    counts, nums = label_data.cooccurrence(meta.labels, meta.observed)
    if not counts.any():
        raise UserError(
            f"ML-GCN's graph counts labels that are seen together and no training image of {meta.name!r} has two known"
            " positive labels; train on images that have, or set config.system.correlation='vectors' or 'none'."
        )
    if not np.all(meta.observed):
        counts, nums = label_data.conditional(meta.labels, meta.observed), ones
    return label_data.mlgcn_adjacency(counts, nums, threshold, p)


def _convert(names: Names, system: nn.Module) -> dict[str, Any]:
    """The graph is the checkpoint's `A`; label vectors are not in the file and stay the data set's."""
    assert isinstance(system, MLGCN)
    return {
        "params": {"gcn": _graph.published_classifiers(names)},
        "constants": {"adjacency": names.array("A"), "vectors": system.vectors.value},
    }


PUBLISHED = Published(_convert, trunk="features.")
NAMES = {"ml_gcn": ml_gcn}
