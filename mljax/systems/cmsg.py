"""CMSG: cross-modality semantic guidance (Huang, Wang, Hong, Qu, Xue; Intelligent Data Analysis 2024).

Feature map -> class-specific features -> SGA layers (self-attention among labels, guided by the cosine correlation of
label vectors) -> SAA layers (cross-attention of labels over the image) -> one classifier per label -> asymmetric loss.

A reconstruction: no code was published, and the stored text has lost its equations. docs/cmsg.md lists what the paper
fixes, what it leaves open, and what was chosen.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from mljax.data import labels as label_data
from mljax.errors import UserError, one_of
from mljax.layers import (
    ActivationPooling,
    AttentionLayer,
    GroupLinear,
    SemanticPooling,
    attention_bias,
    attention_maps,
    constant,
    encode,
    final,
    sine_position,
    tokens,
)
from mljax.losses.criterion import Criterion
from mljax.types import Batch, Meta, Outputs


class CMSG(nn.Module):
    """CMSG for a data set.

    Attributes:
      width: d of label features and tokens; the heads must divide it.
      features: class-specific features by "activation" maps (ADD-GCN's pooling) or "label_queried" (SSGRL's).
      correlation: where the label correlation comes from: cosine of label "vectors" (the paper), conditional
        probabilities of training labels ("cooccurrence", for labels that have no vectors), or "none".
      mode: how it enters the attention scores s of the SGA: "add" softmax(s + S), "multiply" softmax(s * S), "mask"
        (-inf where S is 0, the diagonal kept), or "none" (the ablation without the matrix).
      form: re-weighting after the threshold: "mlgcn" (Chen et al. 2019, eq. 8: p on neighbours, 1-p on the diagonal) or
        "gatn" (0.25 over the column sum, no diagonal).
      threshold: cosines (or probabilities) below are 0; the ML-GCN form's tau.
      p: weight of the neighbours in the "mlgcn" form.
      sga_layers, saa_layers: 0 is the ablation without that module.
      sga_heads, saa_heads, ffn, dropout, activation: of their layers.
      position: add 2-D sine positions to the keys of the SAA (the paper does not mention any).
      normalise: divide activation-pooled features by the number of positions.
    """

    backbone: nn.Module
    criterion: Criterion
    meta: Meta
    width: int = 1024
    features: str = "activation"
    correlation: str = "vectors"
    mode: str = "add"
    form: str = "mlgcn"
    threshold: float = 0.3
    p: float = 0.2
    sga_layers: int = 1
    sga_heads: int = 4
    saa_layers: int = 2
    saa_heads: int = 4
    ffn: int = 2048
    dropout: float = 0.1
    activation: str = "relu"
    position: bool = False
    normalise: bool = False
    dtype: Any = jnp.float32
    axis: str | None = None

    def __post_init__(self) -> None:
        one_of("config.system.features", self.features, ("activation", "label_queried"))
        one_of("config.system.mode", self.mode, ("add", "multiply", "mask", "none"))
        one_of("config.system.correlation", self.correlation, ("vectors", "cooccurrence", "none"))
        one_of("config.system.form", self.form, ("mlgcn", "gatn"))
        if self.features == "label_queried" and self.meta.vectors is None:
            raise UserError(
                "config.system.features='label_queried' needs label vectors; set config.vectors to a file, or use"
                " features='activation'."
            )
        if self.guided and self.correlation == "vectors" and self.meta.vectors is None:
            raise UserError(
                f"CMSG's correlation needs label vectors for {self.meta.name!r}; set config.vectors to a file of names"
                " and vectors, or config.system.correlation='cooccurrence' or 'none'."
            )
        super().__post_init__()

    @property
    def guided(self) -> bool:
        """Whether the correlation matrix enters the attention among labels."""
        return self.mode != "none" and self.correlation != "none" and self.sga_layers > 0

    def matrix(self) -> Float[np.ndarray, "l l"]:
        """The label correlation that guides attention; ask for it where the system is `guided`."""
        return correlation_matrix(self.meta, self.correlation, self.form, self.threshold, self.p)

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> Outputs:
        feature_map = final(encode(self.backbone, batch, train=train)).astype(self.dtype)
        _, height, width, _ = feature_map.shape
        x, maps = self._class_features(feature_map)
        x, label_attention = self._sga(x, train)
        memory = nn.Dense(self.width, dtype=self.dtype, name="memory")(tokens(feature_map)) if self.saa_layers else None
        position = jnp.asarray(sine_position(height, width, self.width), self.dtype) if self.position else None
        weights = None
        for i in range(self.saa_layers):
            layer = self._layer(self.saa_heads, f"saa_{i}")
            x, weights = layer(x, memory, key_position=position, train=train)
        attention = maps if weights is None else attention_maps(weights, height, width)
        extra = {} if label_attention is None else {"label_attention": label_attention}
        return Outputs(logits=GroupLinear(name="classifier")(x), label_features=x, attention=attention, extra=extra)

    def _layer(self, heads: int, name: str, combine: Any = None) -> AttentionLayer:
        return AttentionLayer(
            heads=heads, width=self.width, hidden=self.ffn, dropout=self.dropout, activation=self.activation,
            combine=combine, dtype=self.dtype, name=name,
        )  # fmt: skip

    def _class_features(
        self, feature_map: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b l d"], Float[Array, "b 1 l h w"]]:
        """One feature per label, and the attention that pooled it."""
        b, height, width, _ = feature_map.shape
        if self.features == "activation":
            x, scores = ActivationPooling(self.meta.num_labels, self.width, self.normalise, self.dtype, name="pooling")(
                feature_map
            )
            attention = nn.softmax(nn.log_sigmoid(scores.astype(jnp.float32)), axis=1)  # the gates' shares
        else:
            vectors = self.meta.vectors
            assert vectors is not None
            words = constant(self, "vectors", lambda: vectors).astype(self.dtype)
            pooled, attention = SemanticPooling(self.width, self.dtype, name="pooling")(feature_map, words)
            x = nn.Dense(self.width, dtype=self.dtype, name="transform")(pooled)
        return x, attention.transpose(0, 2, 1).reshape(b, 1, self.meta.num_labels, height, width)

    def _sga(
        self, x: Float[Array, "b l d"], train: bool
    ) -> tuple[Float[Array, "b l d"], Float[Array, "b k l l"] | None]:
        """Semantic guided attention, and the weights of its last layer."""
        correlation = constant(self, "correlation", self.matrix) if self.guided else None
        combine, weights = attention_bias(correlation, self.mode), None
        for i in range(self.sga_layers):
            x, weights = self._layer(self.sga_heads, f"sga_{i}", combine)(x, train=train)
        return x, weights

    def loss(self, batch: Batch, step: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        del step
        return self.criterion(self(batch, train=True).logits, batch, axis=self.axis), {}


def correlation_matrix(meta: Meta, source: str, form: str, threshold: float, p: float) -> Float32[np.ndarray, "l l"]:
    """The label correlation that guides attention; the arguments are fields of `CMSG`."""
    if source == "cooccurrence":
        similarity = label_data.conditional(meta.labels, meta.observed)
    else:
        assert meta.vectors is not None
        similarity = label_data.cosine(meta.vectors)
    if form == "gatn":
        return label_data.gatn_correlation(similarity, threshold)
    return label_data.mlgcn_correlation(similarity, threshold, p)


NAMES = {"cmsg": CMSG}
