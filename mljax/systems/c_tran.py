"""C-Tran: image positions and labels as tokens of one transformer encoder (Lanchantin, Wang, Ordonez, Qi; CVPR 2021).

A label's token is its embedding plus that of its state: unknown, negative or positive. In training a random part of
each image's labels is known to the network, which predicts the rest (label mask training), so that one network predicts
with none, some or most labels known. Encoder layers run over all tokens; each label's token has a linear classifier.

Exact: forward pass, started weights and mask of the authors' code, QData/C-Tran.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mljax.errors import UserError, one_of
from mljax.layers import (
    STACKED,
    Dropout,
    GroupLinear,
    MultiHeadAttention,
    attention_maps,
    encode,
    final,
    layer_norm,
    sine_position,
    tokens,
    torch_linear_init,
)
from mljax.losses.criterion import Criterion
from mljax.types import Batch, Meta, Outputs
from mljax.weights.published import Names, Published

UNKNOWN, NEGATIVE, POSITIVE = 0, 1, 2


def random_known(
    key: jax.Array, index: Int[Array, "b"], labels: int, count: Int[Array, "b"] | int
) -> Bool[Array, "b {labels}"]:
    """`count` labels of each image, drawn by the image's index alone.

    Args:
      key: of all images.
      labels: how many there are.
      count: of known labels for each image, or one number for all.
    """
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
    order = jax.vmap(lambda k: jax.random.permutation(k, labels))(keys)
    return order < jnp.broadcast_to(jnp.asarray(count), index.shape)[:, None]


def known_in_evaluation(share: float, index: Any, labels: int) -> Bool[Array, "b {labels}"]:
    """The labels that are known in an evaluation: int(share l) of each image, drawn by its index (b) alone."""
    return random_known(jax.random.key(2021), jnp.asarray(index), labels, int(share * labels))


class EncoderLayer(nn.Module):
    """A post-norm encoder layer as the authors start it: all uniform in +-1/sqrt(width), in-projections Xavier.

    The in-projections' limit is that of the stacked (3 width, width).
    """

    heads: int
    width: int
    hidden: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], *, train: bool
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b k n n"]]:
        """The tokens and the attention weights of the heads."""

        def drop(y: jax.Array) -> jax.Array:
            return Dropout(self.dropout)(y, train=train)

        def dense(features: int, fan_in: int, name: str) -> nn.Dense:
            init = torch_linear_init(fan_in)
            return nn.Dense(features, dtype=self.dtype, kernel_init=init, bias_init=init, name=name)

        attended, weights = MultiHeadAttention(
            self.heads, self.width, self.dropout, use_output=False, kernel_init=STACKED, dtype=self.dtype,
            name="attention",
        )(x, x, x, train=train)  # fmt: skip
        x = layer_norm("norm1", self.dtype)(x + drop(dense(self.width, self.width, "out")(attended)))
        hidden = drop(nn.relu(dense(self.hidden, self.width, "ffn_in")(x)))
        return layer_norm("norm2", self.dtype)(x + drop(dense(self.width, self.hidden, "ffn_out")(hidden))), weights


class CTran(nn.Module):
    """C-Tran for a data set. It needs no label vectors: label embeddings are learned.

    A batch may hold `known` (b l) in {0, 1}: the entries of `labels` that the network may look at.
    Label features are the labels' tokens after the last layer (b l d); attention is the last layer's, from labels to
    image positions, divided by its sum over them (b k l h w).

    Attributes:
      width: d of all tokens. None: the channels of the backbone, as the authors; a number adds a linear projection.
      layers, heads, dropout: of the encoder; the heads must divide d.
      ffn: hidden features of the feed-forward parts; None: d, as the authors.
      mask_training: label mask training and state embeddings; False is the paper's ablation, which knows no labels.
      max_known: the largest share of labels that are known in training; 0 for none, as the authors train on VG-500.
      loss_on: "unknown", the entries that are not known to the network, or "all".
      eval_known: share of labels that are known in an evaluation (the paper: .25, .5, .75), int(share l) for each image
        by its index. They do not count in average precision.
      position: add 2-D sine positions to the image's tokens; the paper's model has none.

    Reference: Lanchantin et al., "General Multi-label Image Classification with Transformers", CVPR 2021, section 3.
    Differs from the authors' code: labels known in evaluation are drawn by index, not by a hash of the image; entries
      that are not observed are never known; the classifier holds the diagonal that theirs uses of a full one; positions
      are DETR's, since theirs cannot run. A weight decay would reach the fixed "unknown" vector; the authors have none.
    """

    backbone: nn.Module
    criterion: Criterion
    meta: Meta
    width: int | None = None
    layers: int = 3
    heads: int = 4
    ffn: int | None = None
    dropout: float = 0.1
    mask_training: bool = True
    max_known: float = 0.75
    loss_on: str = "unknown"
    eval_known: float = 0.0
    position: bool = False
    dtype: Any = jnp.float32
    axis: str | None = None

    def __post_init__(self) -> None:
        one_of("config.system.loss_on", self.loss_on, ("unknown", "all"))
        for key, value in (("max_known", self.max_known), ("eval_known", self.eval_known)):
            if not 0 <= value < 1:
                raise UserError(f"config.system.{key} is {value}; expected a share of the labels, from 0 to below 1.")
        if self.eval_known and not self.mask_training:
            raise UserError(
                "config.system.eval_known needs config.system.mask_training=True: this C-Tran has no states for labels."
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> Outputs:
        feature_map = final(encode(self.backbone, batch, train=train)).astype(self.dtype)
        b, height, width, channels = feature_map.shape
        d, x = self.width or channels, tokens(feature_map)
        if self.width is not None:
            x = nn.Dense(d, dtype=self.dtype, name="projection")(x)
        if self.position:
            x = x + jnp.asarray(sine_position(height, width, d), self.dtype)
        x = jnp.concatenate([x, self._label_tokens(batch, b, d)], axis=1)
        x, weights = layer_norm("norm", self.dtype)(x), None
        for i in range(self.layers):
            layer = EncoderLayer(
                heads=self.heads, width=d, hidden=self.ffn or d, dropout=self.dropout, dtype=self.dtype,
                name=f"layer_{i}",
            )  # fmt: skip
            x, weights = layer(x, train=train)
        n, attention = height * width, None
        if weights is not None:
            seen = weights[:, :, n:, :n]
            seen = seen / jnp.maximum(seen.sum(-1, keepdims=True), 1e-30)
            attention = attention_maps(seen, height, width)
        features = x[:, n:]
        return Outputs(logits=GroupLinear(name="classifier")(features), label_features=features, attention=attention)

    def _label_tokens(self, batch: Batch, b: int, d: int) -> Float[Array, "{b} l {d}"]:
        """Label embeddings plus state embeddings."""
        init, labels = torch_linear_init(d), self.meta.num_labels
        names = self.param("label", init, (labels, d), jnp.float32).astype(self.dtype)
        names = jnp.broadcast_to(names[None], (b, labels, d))
        if not self.mask_training:
            return names
        # The authors' initialisation fills the row of "unknown" too, which no gradient reaches: a fixed random vector.
        state = self.param("state", init, (3, d), jnp.float32)
        state = jnp.concatenate([jax.lax.stop_gradient(state[:1]), state[1:]]).astype(self.dtype)
        if "known" not in batch:
            return names + state[UNKNOWN][None, None]
        which = jnp.where(batch["labels"] > 0.5, POSITIVE, NEGATIVE)
        return names + state[jnp.where(batch["known"] > 0, which, UNKNOWN)]

    def scores(self, batch: Batch) -> Float[Array, "b l"]:
        """Logits with the labels of `batch["known"]` known, else with the share `eval_known` of the true ones."""
        if "known" not in batch and self.eval_known:
            known = known_in_evaluation(self.eval_known, batch["index"], self.meta.num_labels)
            batch = {**batch, "known": known.astype(jnp.float32) * batch["observed"]}
        return self(batch, train=False).logits

    def known_labels(self, index: Int[np.ndarray, "N"]) -> Bool[np.ndarray, "N l"]:
        """The labels that `scores` takes as known in an evaluation; they do not count in average precision."""
        return np.asarray(known_in_evaluation(self.eval_known, index, self.meta.num_labels))

    def loss(self, batch: Batch, step: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The criterion on the labels that are not known; other labels of an image are known at each step."""
        del step  # it is in the key already
        scored = batch["observed"]
        if self.mask_training:
            known = self._draw(batch["index"]).astype(scored.dtype) * scored
            batch = {**batch, "known": known}
            scored = scored - known if self.loss_on == "unknown" else scored
        return self.criterion(self(batch, train=True).logits, batch, observed=scored, axis=self.axis), {}

    def _draw(self, index: Int[Array, "b"]) -> Bool[Array, "b l"]:
        """0 .. floor(max_known l) labels of each image, each number equally often."""
        numbers, places = jax.random.split(self.make_rng("draw"))
        labels = self.meta.num_labels
        most = int(self.max_known * labels)
        count = jax.vmap(lambda i: jax.random.randint(jax.random.fold_in(numbers, i), (), 0, most + 1))(index)
        return random_known(places, index, labels, count)


def _convert(names: Names, system: nn.Module) -> dict[str, Any]:
    assert isinstance(system, CTran)
    params: dict[str, Any] = {
        "label": names.array("label_lt.weight"),
        "norm": names.norm("LayerNorm"),
        "classifier": {"kernel": names.array("output_linear.weight"), "bias": names.array("output_linear.bias")},
    }
    if system.mask_training:
        params["state"] = names.array("known_label_lt.weight")
    names.ignore(r"known_label_lt\.weight")  # without mask training it is stored and unused
    for i in range(names.count("self_attn_layers.")):
        start = f"self_attn_layers.{i}.transformer_layer"
        attention = names.attention(f"{start}.self_attn")
        params[f"layer_{i}"] = {
            "out": attention.pop("out"),
            "attention": attention,
            "ffn_in": names.linear(f"{start}.linear1"),
            "ffn_out": names.linear(f"{start}.linear2"),
            "norm1": names.norm(f"{start}.norm1"),
            "norm2": names.norm(f"{start}.norm2"),
        }
    return {"params": params}


PUBLISHED = Published(_convert, trunk="backbone.base_network.", ignored=r"backbone\.base_network\.fc\.(weight|bias)")
NAMES = {"c_tran": CTran}
