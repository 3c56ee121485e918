"""ADD-GCN: label features by activation maps, then a static and a dynamic graph (Ye, He, Peng, Wu, Qiao; ECCV 2020).

SAM (semantic attention module): a 1x1 convolution scores every position for every label; the scores' maximum is one
prediction, and their sigmoid pools a second 1x1 convolution into one feature per label, V. D-GCN: a graph shared by all
images mixes V, then one whose edges are computed from the mixed features of the image. V plus the result is classified
label by label; the prediction is the mean of both.

Exact: the forward pass is that of the authors' code, Yejin0111/ADD-GCN, and so is the initialisation but for the SAM's.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mljax.convolution import BatchNorm
from mljax.errors import UserError, one_of
from mljax.layers import ActivationPooling, GroupLinear, encode, final, largest, torch_linear_init
from mljax.losses.criterion import Criterion
from mljax.types import Batch, Meta, Outputs
from mljax.weights.published import Names, Published


def _dense(features: int, fan_in: int, name: str, dtype: Any, bias: bool = True) -> nn.Dense:
    init = torch_linear_init(fan_in)
    return nn.Dense(features, use_bias=bias, kernel_init=init, bias_init=init, dtype=dtype, name=name)


def _leaky(x: jax.Array) -> jax.Array:
    return nn.leaky_relu(x, 0.2)


class StaticGraph(nn.Module):
    """LeakyReLU(W LeakyReLU(A v)): labels mixed by a learned A (l l), then each feature by W."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, v: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        labels, width = v.shape[1:]
        mix = _dense(labels, labels, "adjacency", self.dtype, bias=False)
        mixed = _leaky(mix(v.transpose(0, 2, 1)).transpose(0, 2, 1))
        return _leaky(_dense(width, width, "weight", self.dtype)(mixed))


class DynamicGraph(nn.Module):
    """LeakyReLU(W LeakyReLU(A(x) x)), A(x) = sigmoid(W' [global; x]): an adjacency for each image.

    The global part is the mean over labels, through a linear layer, BatchNorm and LeakyReLU.
    Reference: Ye et al. 2020, eq. 5 and 6.
    """

    dtype: Any = jnp.float32
    axis: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"], *, train: bool) -> tuple[Float[Array, "b l d"], Float[Array, "b l l"]]:
        """Mixed features and the adjacency: what label i takes from label j is at [j, i]."""
        labels, width = x.shape[1:]
        context = _dense(width, width, "context", self.dtype)(x.mean(1))
        context = _leaky(BatchNorm(axis=self.axis, dtype=self.dtype, name="context_bn")(context, train))
        joint = jnp.concatenate([jnp.broadcast_to(context[:, None], x.shape), x], axis=-1)
        edges = _dense(labels, 2 * width, "edges", self.dtype)(joint)
        adjacency = nn.sigmoid(edges.astype(jnp.float32)).transpose(0, 2, 1)
        mixed = _leaky(jnp.einsum("bji,bjd->bid", adjacency.astype(self.dtype), x))
        return _leaky(_dense(width, width, "weight", self.dtype)(mixed)), adjacency


class ADDGCN(nn.Module):
    """ADD-GCN for a data set. It needs neither label vectors nor co-occurrence.

    Label features are V plus the graphs' result (b l width). Attention is SAM's activation maps (sigmoids of the
    scores), each divided by its sum over positions. `extra`: `pooled`, which is V (b l width); `activation_logits` and
    `graph_logits` (b l), whose mean are the logits; `adjacency` (b l l) of the dynamic graph.

    Attributes:
      width: d of label features.
      pooling: of the activation maps into SAM's own prediction: "max" (the authors: scores first, then the maximum) or
        "average", which is a linear classifier on averaged features, as class activation maps are usually trained.
      normalise: divide V by the number of positions, so that it does not grow with the map; the authors sum.
      graphs: "both", or for the paper's ablation only the "static" one, only the "dynamic" one, or "none": SAM alone.

    Reference: Ye et al., "Attention-Driven Dynamic Graph Convolutional Network for Multi-label Image Recognition",
      ECCV 2020, eq. 1 to 7.
    Differs from the authors' code: the classifier holds only the diagonal, all that theirs uses of a full convolution;
      BatchNorm takes its statistics over all devices.
    """

    backbone: nn.Module
    criterion: Criterion
    meta: Meta
    width: int = 1024
    pooling: str = "max"
    normalise: bool = False
    graphs: str = "both"
    dtype: Any = jnp.float32
    axis: str | None = None

    def __post_init__(self) -> None:
        one_of("config.system.pooling", self.pooling, ("max", "average"))
        one_of("config.system.graphs", self.graphs, ("both", "static", "dynamic", "none"))
        super().__post_init__()

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> Outputs:
        feature_map = final(encode(self.backbone, batch, train=train)).astype(self.dtype)
        b, height, width, _ = feature_map.shape
        labels = self.meta.num_labels
        sam = ActivationPooling(labels, self.width, self.normalise, self.dtype, name="sam")
        v, scores = sam(feature_map)
        scores = scores.astype(jnp.float32)
        activation_logits = largest(scores, 1) if self.pooling == "max" else scores.mean(1)
        extra = {"pooled": v, "activation_logits": activation_logits}
        x, result = v, jnp.zeros_like(v)
        if self.graphs in ("both", "static"):
            result = StaticGraph(self.dtype, name="static")(v)
            x = v + result
        if self.graphs in ("both", "dynamic"):
            result, extra["adjacency"] = DynamicGraph(self.dtype, self.axis, name="dynamic")(x, train=train)
        features = v + result
        graph_logits = GroupLinear(name="classifier")(features)
        maps = nn.softmax(nn.log_sigmoid(scores), axis=1)  # sigmoid(s) over its sum, without 0 / 0
        return Outputs(
            logits=(activation_logits + graph_logits) / 2,
            label_features=features,
            attention=maps.transpose(0, 2, 1).reshape(b, 1, labels, height, width),
            extra=extra | {"graph_logits": graph_logits},
        )

    def loss(self, batch: Batch, step: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        del step
        return self.criterion(self(batch, train=True).logits, batch, axis=self.axis), {}


def _convert(names: Names, system: nn.Module) -> dict[str, Any]:
    assert isinstance(system, ADDGCN)
    if system.graphs != "both":
        raise UserError("The released ADD-GCN has both graphs; convert it with config.system.graphs='both'.")
    scale, stats = names.batch_norm("gcn.bn_global")
    last = names.array("last_linear.weight")
    static = {"adjacency": names.pointwise("gcn.static_adj.0"), "weight": names.pointwise("gcn.static_weight.0")}
    dynamic = {
        "context": names.pointwise("gcn.conv_global"),
        "context_bn": scale,
        "edges": names.pointwise("gcn.conv_create_co_mat"),
        "weight": names.pointwise("gcn.dynamic_weight"),
    }
    params = {
        "sam": {"score": names.pointwise("fc"), "transform": names.pointwise("conv_transform")},
        "static": static,
        "dynamic": dynamic,
        "classifier": {"kernel": last.reshape(last.shape[:2]), "bias": names.array("last_linear.bias")},
    }
    return {"params": params, "batch_stats": {"dynamic": {"context_bn": stats}}}


PUBLISHED = Published(_convert, trunk="features.", ignored="mask_mat")
NAMES = {"add_gcn": ADDGCN}
