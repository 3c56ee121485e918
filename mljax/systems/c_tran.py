"""C-Tran: image positions and labels as tokens of one transformer encoder (Lanchantin, Wang, Ordonez, Qi; CVPR 2021).

A label's token is its embedding plus that of its state: unknown, negative or positive. Training tells the network a
random part of each image's labels and asks for the rest (label mask training), so that one network predicts with none,
some or most labels known. Encoder layers run over all tokens; each label's token has a linear classifier.

Exact: forward pass, started weights and mask of the authors' code, QData/C-Tran.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mljax.errors import UserError, nearest
from mljax.layers import (
    STACKED,
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

LOSS_ON = ("unknown", "all")
UNKNOWN, NEGATIVE, POSITIVE = 0, 1, 2


def random_known(key: jax.Array, index: jax.Array, labels: int, count: jax.Array | int) -> jax.Array:
    """(b l) bool: `count` labels of each image, drawn by the image's index alone.

    Args:
      key: of all images.
      index: (b) int, the images.
      labels: l.
      count: (b) or one number for all.
    """
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
    order = jax.vmap(lambda k: jax.random.permutation(k, labels))(keys)
    return order < jnp.broadcast_to(jnp.asarray(count), index.shape)[:, None]


def given_in_evaluation(share: float, index: Any, labels: int) -> jax.Array:
    """(b l) bool: the labels that an evaluation gives of each image, int(share l) of them, the same in every run."""
    return random_known(jax.random.key(2021), jnp.asarray(index), labels, int(share * labels))


class EncoderLayer(nn.Module):
    """A post-norm encoder layer as the authors start it: all uniform in +-1/sqrt(width), in-projections Xavier.

    (b n width) -> (b n width) and weights (b k n n). The in-projections' limit is that of the stacked (3 width, width).
    """

    heads: int
    width: int
    hidden: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        def drop(y: jax.Array) -> jax.Array:
            return nn.Dropout(self.dropout, deterministic=not train)(y)

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
    """The network; settings are explained at `c_tran`, which builds it.

    A batch may hold `known` (b l) in {0, 1}: the entries of `labels` that the network may look at.
    Label features are the labels' tokens after the last layer (b l d); attention is the last layer's, from labels to
    image positions, divided by its sum over them (b k l h w).
    """

    backbone: nn.Module
    criterion: Criterion
    labels: int
    width: int | None
    layers: int
    heads: int
    ffn: int | None
    dropout: float
    mask_training: bool
    max_known: float
    loss_on: str
    eval_known: float
    position: bool
    dtype: Any = jnp.float32
    axis: str | None = None

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
            layer = EncoderLayer(self.heads, d, self.ffn or d, self.dropout, self.dtype, name=f"layer_{i}")
            x, weights = layer(x, train=train)
        n, attention = height * width, None
        if weights is not None:
            seen = weights[:, :, n:, :n]
            seen = seen / jnp.maximum(seen.sum(-1, keepdims=True), 1e-30)
            attention = attention_maps(seen, height, width)
        features = x[:, n:]
        return Outputs(logits=GroupLinear(name="classifier")(features), label_features=features, attention=attention)

    def _label_tokens(self, batch: Batch, b: int, d: int) -> jax.Array:
        """Label embeddings plus state embeddings (b l d)."""
        init = torch_linear_init(d)
        names = self.param("label", init, (self.labels, d), jnp.float32).astype(self.dtype)
        names = jnp.broadcast_to(names[None], (b, self.labels, d))
        if not self.mask_training:
            return names
        # The authors' initialisation fills the row of "unknown" too, which no gradient reaches: a fixed random vector.
        state = self.param("state", init, (3, d), jnp.float32)
        state = jnp.concatenate([jax.lax.stop_gradient(state[:1]), state[1:]]).astype(self.dtype)
        if "known" not in batch:
            return names + state[UNKNOWN][None, None]
        which = jnp.where(batch["labels"] > 0.5, POSITIVE, NEGATIVE)
        return names + state[jnp.where(batch["known"] > 0, which, UNKNOWN)]

    def scores(self, batch: Batch) -> jax.Array:
        """Logits (b l) with the labels of `batch["known"]` given, else with the share `eval_known` of the true ones."""
        if "known" not in batch and self.eval_known:
            known = given_in_evaluation(self.eval_known, batch["index"], self.labels)
            batch = {**batch, "known": known.astype(jnp.float32) * batch["observed"]}
        return self(batch, train=False).logits

    def given(self, index: np.ndarray) -> np.ndarray:
        """(N l) bool: the entries that `scores` is told in an evaluation, which must not count in its mAP."""
        return np.asarray(given_in_evaluation(self.eval_known, index, self.labels))

    def loss(self, batch: Batch, step: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The criterion on what the network was not told; a new part is known of each image at each step."""
        del step  # it is in the key already
        asked = batch["observed"]
        if self.mask_training:
            known = self._draw(batch["index"]).astype(asked.dtype) * asked
            batch = {**batch, "known": known}
            asked = asked - known if self.loss_on == "unknown" else asked
        return self.criterion(self(batch, train=True).logits, batch, observed=asked, axis=self.axis), {}

    def _draw(self, index: jax.Array) -> jax.Array:
        """(b l) bool: 0 .. floor(max_known l) labels of each image, each number equally often."""
        numbers, places = jax.random.split(self.make_rng("draw"))
        most = int(self.max_known * self.labels)
        count = jax.vmap(lambda i: jax.random.randint(jax.random.fold_in(numbers, i), (), 0, most + 1))(index)
        return random_known(places, index, self.labels, count)


def c_tran(
    *,
    backbone: nn.Module,
    criterion: Criterion,
    meta: Meta,
    width: int | None = None,
    layers: int = 3,
    heads: int = 4,
    ffn: int | None = None,
    dropout: float = 0.1,
    mask_training: bool = True,
    max_known: float = 0.75,
    loss_on: str = "unknown",
    eval_known: float = 0.0,
    position: bool = False,
    dtype: Any = jnp.float32,
    axis: str | None = None,
) -> CTran:
    """C-Tran for a data set. It needs no label vectors: label embeddings are learned.

    Args:
      backbone, criterion, meta: image -> endpoints, the loss, and the facts of the training split.
      width: d of all tokens. None: the channels of the backbone, as the authors; a number adds a linear projection.
      layers, heads, dropout: of the encoder; the heads must divide d.
      ffn: hidden features of the feed-forward parts; None: d, as the authors.
      mask_training: label mask training and state embeddings; False is the paper's ablation, which knows no labels.
      max_known: the largest share of labels that training tells; 0 for none, as the authors train on VG-500.
      loss_on: "unknown", the entries that were not told, or "all".
      eval_known: share of labels that an evaluation tells (the paper: .25, .5, .75), int(share l) for each image by its
        index. They do not count in average precision.
      position: add 2-D sine positions to the image's tokens; the paper's model has none.
    Raises:
      UserError: an unknown choice, or a share outside [0, 1).
    Reference: Lanchantin et al., "General Multi-label Image Classification with Transformers", CVPR 2021, section 3.
    Differs from the authors' code: labels known in evaluation are drawn by index, not by a hash of the image; entries
      that are not observed are never told; the classifier holds the diagonal that theirs uses of a full one; positions
      are DETR's, since theirs cannot run. A weight decay would reach the fixed "unknown" vector; the authors have none.
    """
    if loss_on not in LOSS_ON:
        raise UserError(f"config.system.loss_on is {loss_on!r}{nearest(loss_on, LOSS_ON)}.")
    for key, value in (("max_known", max_known), ("eval_known", eval_known)):
        if not 0 <= value < 1:
            raise UserError(f"config.system.{key} is {value}; it is a share of the labels, from 0 to below 1.")
    if eval_known and not mask_training:
        raise UserError(
            "config.system.eval_known needs config.system.mask_training=True: this C-Tran has no states for labels."
        )
    return CTran(
        backbone, criterion, meta.num_labels, width, layers, heads, ffn, dropout, mask_training, max_known, loss_on,
        eval_known, position, dtype, axis,
    )  # fmt: skip


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
NAMES = {"c_tran": c_tran}
