"""ML-GCN: classifiers made from label vectors by a graph convolution (Chen, Wei, Wang, Guo; CVPR 2019).

Backbone -> global max pooling -> features (b d). Label vectors (l e) -> two graph convolutions over the co-occurrence
graph of the training labels -> classifiers (l d). Logits are their products.

Exact: forward pass, graph and initialisation are those of the authors' code, megvii-research/ML-GCN.
"""

from functools import lru_cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from mljax.data import labels as label_data
from mljax.errors import UserError, one_of
from mljax.layers import constant, encode, final
from mljax.losses.criterion import Criterion
from mljax.systems import _graph
from mljax.types import Batch, Meta, Outputs
from mljax.weights.published import Names, Published

SOURCES = ("cooccurrence", "vectors", "none")


class MLGCN(nn.Module):
    """ML-GCN for a data set that has label vectors. Attention is the class activation map.

    Attributes:
      width: of the hidden graph layer; the second gives as many features as the backbone.
      correlation: the graph's edges come from P(j | i) of the training labels ("cooccurrence", the paper), from cosines
        of label "vectors" (not the paper: for labels that are never seen together), or there are "none".
      threshold: P(j | i) from which on there is an edge (eq. 7).
      p: weight of the neighbours (eq. 8); the code's factor 0.25 is p / (1 - p).

    Reference: Chen et al., "Multi-Label Image Recognition with Graph Convolutional Networks", CVPR 2019, eq. 2, 6 to 8.
    Differs from the paper, as its code does: column sums in place of row sums, and the identity added; see
      `mljax.data.labels.mlgcn_adjacency`. With partial labels P(j | i) is taken among images where both are known.
    """

    backbone: nn.Module
    criterion: Criterion
    meta: Meta
    width: int = 1024
    correlation: str = "cooccurrence"
    threshold: float = 0.4
    p: float = 0.2
    dtype: Any = jnp.float32
    axis: str | None = None

    def __post_init__(self) -> None:
        one_of("config.system.correlation", self.correlation, SOURCES)
        if not 0 <= self.p < 1:
            raise UserError(f"config.system.p is {self.p}; expected the share of the neighbours, from 0 to below 1.")
        _graph.vectors(self.meta, "ML-GCN")
        adjacency_matrix(self.meta, self.correlation, self.threshold, self.p)  # which says where there is no graph
        super().__post_init__()

    @property
    def vectors(self) -> Float[np.ndarray, "l e"]:
        """Label vectors, not normalised."""
        return _graph.vectors(self.meta, "ML-GCN")

    @property
    def adjacency(self) -> Float[np.ndarray, "l l"]:
        """A, before it is normalised, as the authors' checkpoints store it."""
        return adjacency_matrix(self.meta, self.correlation, self.threshold, self.p)

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> Outputs:
        feature_map = final(encode(self.backbone, batch, train=train))
        graph = _graph.normalise(constant(self, "adjacency", lambda: self.adjacency))
        gcn = _graph.GraphClassifiers(self.width, feature_map.shape[-1], name="gcn")
        return _graph.classify(feature_map, gcn(constant(self, "vectors", lambda: self.vectors), graph))

    def loss(self, batch: Batch, step: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        del step
        return self.criterion(self(batch, train=True).logits, batch, axis=self.axis), {}


@lru_cache(maxsize=4)
def adjacency_matrix(meta: Meta, correlation: str, threshold: float, p: float) -> Float[np.ndarray, "l l"]:
    """The graph of `MLGCN` before it is normalised; the arguments are its fields.

    Raises:
      UserError: "cooccurrence" of a training split in which no two labels are ever seen together.
    """
    images, ones = len(meta.labels), np.ones(meta.num_labels)
    if correlation == "none" or (correlation == "cooccurrence" and not images):  # a released checkpoint brings its own
        return np.eye(meta.num_labels, dtype=np.float32)
    if correlation == "vectors":
        return label_data.mlgcn_adjacency(label_data.cosine(_graph.vectors(meta, "ML-GCN")), ones, threshold, p)
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
        "constants": {"adjacency": names.array("A"), "vectors": system.vectors},
    }


PUBLISHED = Published(_convert, trunk="features.")
NAMES = {"ml_gcn": MLGCN}
