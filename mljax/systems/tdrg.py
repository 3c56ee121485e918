"""TDRG: a transformer over three scales and a label graph that it guides (Zhao, Yan, Zhao, Guo, Huang, Li; ICCV 2021).

Structural relation: the last two stages of the backbone and a third, coarser map are mixed across scales, encoded by
one transformer, and classified by the maxima of all three. Semantic relation: class activation maps pool one node for
each label, whose graph is computed from the nodes and the encoded maps; one graph convolution, one classifier for each
label. The prediction is .7 of the first plus .3 of the second; activation maps have a loss of their own.

Exact: forward pass and losses are those of the authors' code, iCVTEAM/TDRG.
"""

import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from mljax import parallel
from mljax.convolution import BatchNorm
from mljax.errors import UserError, one_of
from mljax.layers import INITS, AttentionLayer, GroupLinear, encode, largest, tokens, torch_linear_init
from mljax.losses.criterion import Criterion
from mljax.types import Batch, Meta, Outputs
from mljax.weights.published import Names, Published

TRANSFORMER, GRAPH = 0.7, 0.3  # shares of the two relations in the prediction


def resize(x: Float[Array, "b h w d"], height: int, width: int) -> Float[Array, "b {height} {width} d"]:
    """Bilinear, with corners kept in place: torch's align_corners=True."""

    def matrix(old: int, new: int) -> jax.Array:
        at = np.arange(new) * ((old - 1) / (new - 1) if new > 1 else 0.0)
        low = np.minimum(np.floor(at).astype(int), max(old - 2, 0))
        weights = np.zeros((new, old))
        weights[np.arange(new), low] = 1 - (at - low)
        weights[np.arange(new), np.minimum(low + 1, old - 1)] += at - low
        return jnp.asarray(weights, x.dtype)

    _, old_height, old_width, _ = x.shape
    if (old_height, old_width) == (height, width):
        return x
    return jnp.einsum("ih,jw,bhwd->bijd", matrix(old_height, height), matrix(old_width, width), x)


def cross_scale(maps: list[Float[Array, "b _ _ d"]]) -> list[Float[Array, "b _ _ d"]]:
    """Add the product of all scales to each, at the size of the largest, and go back."""
    height, width = (max(x.shape[axis] for x in maps) for axis in (1, 2))
    large = [resize(x, height, width) for x in maps]
    product = large[0] * large[1] * large[2]
    return [resize(x + product, *old.shape[1:3]) for x, old in zip(large, maps)]


def top_share(scores: Float[Array, "b n l"], share: float = 0.05) -> Float[Array, "b l"]:
    """The mean of the highest `share` of the n scores, at least one."""
    count = max(1, round(share * scores.shape[1]))
    return jax.lax.top_k(scores.transpose(0, 2, 1), count)[0].mean(-1)


def _dense(features: int, fan_in: int, name: str, dtype: Any, bias: bool = True) -> nn.Dense:
    init = torch_linear_init(fan_in)
    return nn.Dense(features, use_bias=bias, kernel_init=init, bias_init=init, dtype=dtype, name=name)


class Transformer(nn.Module):
    """Post-norm encoder layers without positions, shared by the scales that it is called on.

    The fields are explained at `TDRG`.
    """

    layers: int
    heads: int
    width: int
    ffn: int
    dropout: float
    attend: str
    initial: str
    dtype: Any = jnp.float32
    axis: str | None = None

    @nn.compact
    def __call__(
        self, scales: list[Float[Array, "b _ d"]], mask: Float[Array, "b"], *, train: bool
    ) -> list[Float[Array, "b _ d"]]:
        """The encoded scales; `mask` is 0 for padding, which no image attends to."""
        combine = None
        if self.attend == "batch":
            real = parallel.all_gather(mask, self.axis)[None, None, None] > 0
            combine = lambda s: jnp.where(real, s, jnp.finfo(s.dtype).min)  # noqa: E731
        for i in range(self.layers):
            layer = AttentionLayer(
                heads=self.heads, width=self.width, hidden=self.ffn, dropout=self.dropout, activation="gelu",
                combine=combine, dtype=self.dtype, initial=self.initial, examples=int(self.attend == "batch"),
                name=f"layer_{i}",
            )  # fmt: skip
            scales = [self._attend(layer, x, train) for x in scales]
        return scales

    def _attend(self, layer: AttentionLayer, x: jax.Array, train: bool) -> jax.Array:
        if self.attend == "image":
            return layer(x, train=train)[0]
        if self.attend == "alone":
            return layer(x.reshape(-1, 1, self.width), train=train)[0].reshape(x.shape)
        everyone = parallel.all_gather(x, self.axis).transpose(1, 0, 2)
        return layer(x.transpose(1, 0, 2), everyone, train=train)[0].transpose(1, 0, 2)


class TDRG(nn.Module):
    """TDRG for a data set. It needs neither label vectors nor co-occurrence.

    Label features are the nodes plus the graph's result (b l 2 width). Attention is the class activation maps, sigmoids
    of the scores, divided by their sum over positions. `extra`: `transformer_logits`, `graph_logits` and
    `activation_logits` (b l), `nodes` (b l 2 width), and `adjacency` (b l l): what label i takes from label j is at
    [j, i].

    Attributes:
      backbone: of its endpoints the two of the largest strides are used.
      width: d of the scales and of each half of a node; the heads must divide it.
      layers, heads, ffn, dropout: of the transformer.
      attend: to what a position of the transformer attends: "image", all positions of its image, as the paper and the
        authors' later code; "batch", the same position of all images of the batch, as their first code does, so that
        predictions depend on the batch; "alone", itself, which is "batch" with one image at a time.
      normalise: divide the nodes by the number of positions, so that they do not grow with the map; the authors sum.
      initial: how the transformer's matrices start: "xavier", or "stacked" as theirs; see `layers.AttentionLayer`.

    Reference: Zhao et al., "Transformer-based Dual Relation Graph for Multi-label Image Recognition", ICCV 2021.
    Differs from the authors' code: position embeddings, which theirs makes and never uses, are absent; the classifier
      holds the diagonal that theirs uses of a full convolution; a small map keeps at least one position in the top 5 %;
      BatchNorm takes its statistics over all devices; with "batch", padding is left out.
    """

    backbone: nn.Module
    criterion: Criterion
    meta: Meta
    width: int = 512
    layers: int = 3
    heads: int = 4
    ffn: int = 2048
    dropout: float = 0.0
    attend: str = "image"
    normalise: bool = False
    initial: str = "xavier"
    dtype: Any = jnp.float32
    axis: str | None = None

    def __post_init__(self) -> None:
        one_of("config.system.attend", self.attend, ("image", "batch", "alone"))
        one_of("config.system.initial", self.initial, INITS)
        if self.backbone is not None:
            last_two(dict.fromkeys(map(str, getattr(self.backbone, "endpoints", ()))))
        super().__post_init__()

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> Outputs:
        fine, coarse = (x.astype(self.dtype) for x in last_two(encode(self.backbone, batch, train=train)))
        b, height, width, channels = coarse.shape
        labels = self.meta.num_labels
        encoded = self._transformer(fine, coarse, batch["mask"], train)
        pooled = jnp.concatenate([largest(x, 1) for x in encoded], axis=-1).astype(jnp.float32)
        transformer_logits = _dense(labels, 3 * self.width, "classifier", jnp.float32)(pooled)
        guides = jax.lax.stop_gradient(encoded)  # the graph looks at the transformer and does not train it

        scores = _dense(labels, channels, "constraint", self.dtype, bias=False)(tokens(coarse))
        scores = scores.astype(jnp.float32)
        nodes = self._nodes(coarse, guides[1], nn.sigmoid(scores).astype(self.dtype))
        adjacency = self._adjacency(guides, nodes, train)
        mixed = nn.leaky_relu(jnp.einsum("bji,bjd->bid", adjacency.astype(self.dtype), nodes), 0.2)
        mixed = nn.leaky_relu(_dense(nodes.shape[-1], nodes.shape[-1], "graph", self.dtype)(mixed), 0.2)
        features = mixed + nodes
        graph_logits = GroupLinear(name="graph_classifier")(features)

        maps = nn.softmax(nn.log_sigmoid(scores), axis=1)  # sigmoid(s) over its sum, without 0 / 0
        extra = {"transformer_logits": transformer_logits, "graph_logits": graph_logits}
        return Outputs(
            logits=TRANSFORMER * transformer_logits + GRAPH * graph_logits,
            label_features=features,
            attention=maps.transpose(0, 2, 1).reshape(b, 1, labels, height, width),
            extra={**extra, "activation_logits": top_share(scores), "nodes": nodes, "adjacency": adjacency},
        )

    def _transformer(
        self, fine: Float[Array, "b _ _ c1"], coarse: Float[Array, "b h w c2"], mask: Float[Array, "b"], train: bool
    ) -> list[Float[Array, "b _ d"]]:
        """Two maps -> three encoded scales."""
        if min(coarse.shape[1:3]) < 3:
            raise UserError(
                f"TDRG's third scale needs a last map of at least 3x3, and it is {coarse.shape[1]}x{coarse.shape[2]};"
                " raise config.input.size or take config.backbone.endpoints of smaller strides."
            )
        init = torch_linear_init(9 * coarse.shape[-1])
        third = nn.Conv(
            self.width, (3, 3), 2, "VALID", dtype=self.dtype, kernel_init=init, bias_init=init, name="scale_2"
        )
        maps = [
            _dense(self.width, fine.shape[-1], "scale_0", self.dtype)(fine),
            _dense(self.width, coarse.shape[-1], "scale_1", self.dtype)(coarse),
            third(coarse),
        ]
        encoder = Transformer(
            layers=self.layers, heads=self.heads, width=self.width, ffn=self.ffn, dropout=self.dropout,
            attend=self.attend, initial=self.initial, dtype=self.dtype, axis=self.axis, name="transformer",
        )  # fmt: skip
        return encoder([tokens(x) for x in cross_scale(maps)], mask, train=train)

    def _nodes(
        self, coarse: Float[Array, "b h w c"], guide: Float[Array, "b n d"], gates: Float[Array, "b n l"]
    ) -> Float[Array, "b l 2*d"]:
        """One node for each label: the gated sum of the backbone's map, and of the encoded one."""
        values = _dense(self.width, coarse.shape[-1], "node", self.dtype)(tokens(coarse))
        pooled = jnp.einsum("bnl,bnd->bld", gates, values)
        guided = jnp.einsum("bnl,bnd->bld", jax.lax.stop_gradient(gates), guide)
        if self.normalise:
            pooled, guided = pooled / gates.shape[1], guided / gates.shape[1]
        return jnp.concatenate([pooled, _dense(self.width, self.width, "node_guide", self.dtype)(guided)], axis=-1)

    def _adjacency(
        self, guides: list[Float[Array, "b _ d"]], nodes: Float[Array, "b l 2*d"], train: bool
    ) -> Float32[Array, "b l l"]:
        """The joint correlation from the means of the encoded scales and the nodes."""
        d, (_, labels, node) = 3 * self.width, nodes.shape
        guide = _dense(d, d, "guide", self.dtype)(jnp.concatenate([x.mean(1) for x in guides], axis=-1))
        guide = nn.leaky_relu(BatchNorm(axis=self.axis, dtype=self.dtype, name="guide_bn")(guide, train), 0.2)
        guide = jnp.broadcast_to(guide[:, None], (len(nodes), labels, d))
        edges = _dense(labels, d + node, "edges", self.dtype)(jnp.concatenate([guide, nodes], axis=-1))
        return nn.sigmoid(edges.astype(jnp.float32)).transpose(0, 2, 1)

    def loss(self, batch: Batch, step: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The criterion of the prediction plus that of each of its three branches."""
        del step
        out = self(batch, train=True)
        assert out.extra is not None
        terms = {"mixed": self.criterion(out.logits, batch, axis=self.axis)}
        for name in ("transformer", "graph", "activation"):
            terms[name] = self.criterion(out.extra[f"{name}_logits"], batch, axis=self.axis)
        return sum(terms.values(), jnp.float32(0)), {f"loss_{name}": value for name, value in terms.items()}


def last_two(endpoints: Mapping[str, Any]) -> list[Any]:
    """The maps (b h w d) of the two largest strides, the finer one first."""
    strides = sorted((name for name in endpoints if name.isdigit()), key=int)
    if len(strides) < 2:
        raise UserError(
            "TDRG reads the last two stages of the backbone; set config.backbone.endpoints to two strides, such as"
            f" ('16', '32'), not {tuple(endpoints)}."
        )
    return [endpoints[stride] for stride in strides[-2:]]


def _convert(names: Names, system: nn.Module) -> dict[str, Any]:
    assert isinstance(system, TDRG)
    scale, stats = names.batch_norm("guidance_bn")
    last = names.array("gcn_classifier.weight")
    start = "transformer.encoder.layers."
    transformer = {
        f"layer_{i}": {
            "attention": names.attention(f"{start}{i}.self_attn"),
            "ffn": {"in": names.linear(f"{start}{i}.linear1"), "out": names.linear(f"{start}{i}.linear2")},
            "norm1": names.norm(f"{start}{i}.norm1"),
            "norm2": names.norm(f"{start}{i}.norm2"),
        }
        for i in range(names.count(start))
    }
    params = {
        "scale_0": names.pointwise("transform_28"),
        "scale_1": names.pointwise("transform_14"),
        "scale_2": names.conv("transform_7"),
        "transformer": transformer,
        "classifier": names.linear("trans_classifier"),
        "constraint": names.pointwise("constraint_classifier"),
        "node": names.pointwise("gcn_dim_transform"),
        "node_guide": names.pointwise("guidance_transform"),
        "guide": names.pointwise("guidance_conv"),
        "guide_bn": scale,
        "edges": names.pointwise("matrix_transform"),
        "graph": names.pointwise("forward_gcn.weight"),
        "graph_classifier": {"kernel": last.reshape(last.shape[:2]), "bias": names.array("gcn_classifier.bias")},
    }
    return {"params": params, "batch_stats": {"guide_bn": stats}}


# The naming of the authors' released COCO checkpoint, before their code was cleaned up.
_OLD = (
    (r"features\.", "layer1."),
    (r"classifier\.", "trans_classifier."),
    (r"conv_position\.", "guidance_transform."),
    (r"fc\.", "constraint_classifier."),
    (r"conv_transform\.", "gcn_dim_transform."),
    (r"gcn\.conv_global\.", "guidance_conv."),
    (r"gcn\.bn_global\.", "guidance_bn."),
    (r"gcn\.conv_create_co_mat\.", "matrix_transform."),
    (r"gcn\.dynamic_weight\.", "forward_gcn.weight."),
    (r"last_linear\.", "gcn_classifier."),
)
_STEM = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
_UNUSED = r"mask_mat|query_embed\..*|positional_embedding\..*|transformer\.decoder\..*|backbone\.\d+\..*"
_UNUSED_OLD = r"bottleneck\..*|classifier_global\..*|bn_position.*|gcn\.static_.*"


def _rename(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Today's names for older ones, and torchvision's for the trunk: layer1.{0,1,4} are conv1, bn1 and layer1."""
    renamed = {}
    for name, value in state.items():
        for old, new in _OLD:
            name = re.sub(f"^{old}", new, name)
        name = re.sub(r"^layer1\.([014567])\.", lambda match: f"trunk.{_STEM[match[1]]}.", name)
        renamed[re.sub(r"^(layer[234]\.)", r"trunk.\1", name)] = value
    return renamed


PUBLISHED = Published(_convert, trunk="trunk.", ignored=f"{_UNUSED}|{_UNUSED_OLD}", rename=_rename)
NAMES = {"tdrg": TDRG}
