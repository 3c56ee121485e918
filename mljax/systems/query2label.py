"""Query2Label: labels as queries of a transformer decoder over the image (Liu, Zhang, Yang, Su, Zhu; arXiv 2107.10834).

Feature map -> (projection) -> encoder layers among positions -> decoder layers, in which every label's query attends to
the image -> one classifier per label -> the simplified asymmetric loss.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mljax.errors import UserError, at_least, one_of
from mljax.layers import (
    INITS,
    AttentionLayer,
    Dropout,
    GroupLinear,
    MultiHeadAttention,
    attention_init,
    attention_maps,
    encode,
    final,
    layer_norm,
    sine_position,
    tokens,
)
from mljax.losses.criterion import Criterion
from mljax.types import ArrayLike, Batch, Meta, Outputs
from mljax.weights.published import Names, Published

SELF_ATTENTION = ("none", "first", "others", "all")


class DecoderLayer(nn.Module):
    """A post-norm decoder layer: (self-attention among labels), cross-attention to the image, feed-forward.

    Attributes:
      heads, width, hidden, dropout, initial: as in `AttentionLayer`.
      self_attention: whether the labels attend to each other first; without it the first LayerNorm is gone too.
    """

    heads: int
    width: int
    hidden: int
    dropout: float
    initial: str
    self_attention: bool
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x: Float[ArrayLike, "b l d"],
        query: Float[ArrayLike, "1 l d"],
        memory: Float[ArrayLike, "b n d"],
        position: Float[ArrayLike, "1 n d"],
        *,
        train: bool,
    ) -> tuple[Float[Array, "b l d"], Float[Array, "b k l n"]]:
        """Label features and the label embeddings added to them as positions -> features, attention to the image."""
        if self.self_attention:
            labels = x + query
            attended, _ = MultiHeadAttention(
                self.heads, self.width, self.dropout, dtype=self.dtype, name="self_attention",
                **attention_init(self.initial, self.width),
            )(labels, labels, x, train=train)  # fmt: skip
            attended = Dropout(self.dropout)(attended, train=train)
            x = layer_norm("self_norm", self.dtype)(x + attended)
        cross = AttentionLayer(
            self.heads, self.width, self.hidden, self.dropout, dtype=self.dtype, initial=self.initial, name="cross"
        )
        return cross(x, memory, query_position=query, key_position=position, train=train)


class Query2Label(nn.Module):
    """Query2Label for a data set; the defaults are those of the released checkpoints, but `initial`.

    A frozen stem is the backbone's `frozen="stem,layer1"`; the released ResNets have `norm="frozen"` besides.

    Attributes:
      width: d of the transformer. None: the channels of the backbone, without an input projection, as released; a
        number keeps the projection (a 1x1 convolution) to that many, also where the backbone has as many.
      heads: k; must divide d, which is checked with the first batch where d is the backbone's.
      ffn: hidden features of the feed-forward parts; None: 4 d (the released ResNet-101: 8192 = 4 * 2048).
      encoder_layers: of self-attention among positions; 0 for none.
      decoder_layers: at least 1.
      self_attention: in which decoder layers the labels attend to each other: "none" (released), "first", "others"
        (all but the first) or "all". In the first layer its values are zero before their bias, so that it adds the
        same to all labels and its queries and keys get no gradient.
      dropout: in attention weights, after attention, and in the feed-forward parts.
      initial: how the transformer's matrices start: "xavier", or "stacked" as released; see `layers.AttentionLayer`.

    Reference: Liu et al., "Query2Label: A Simple Transformer Way to Multi-Label Classification", arXiv 2107.10834,
      section 3.2 and eq. 1 to 4. Positions: `mljax.layers.sine_position`, for the map that there is.
    Differs from the authors' code: positions are computed for any map (theirs are a buffer for one image size); the
      loss is not multiplied by 1000.
    """

    backbone: nn.Module
    criterion: Criterion
    meta: Meta
    width: int | None = None
    heads: int = 4
    ffn: int | None = None
    encoder_layers: int = 1
    decoder_layers: int = 2
    self_attention: str = "none"
    dropout: float = 0.1
    initial: str = "xavier"
    dtype: Any = jnp.float32
    axis: str | None = None

    def __post_init__(self) -> None:
        one_of("config.system.self_attention", self.self_attention, SELF_ATTENTION)
        one_of("config.system.initial", self.initial, INITS)
        for key, minimum in (("width", 4), ("heads", 1), ("ffn", 1), ("encoder_layers", 0), ("decoder_layers", 1)):
            at_least(f"config.system.{key}", getattr(self, key), minimum)
        if self.width is not None and self.width % 4:
            raise UserError(f"config.system.width is {self.width}; 2-D sine positions need a multiple of 4.")
        if self.width is not None and self.width % self.heads:
            raise UserError(
                f"config.system.heads={self.heads} do not divide config.system.width={self.width}; choose a divisor of"
                " it."
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> Outputs:
        """Logits (b l), label_features after the last LayerNorm (b l d), attention of the last layer (b k l h w).

        extra: "memory", what the decoder looks at (b h w d).
        """
        feature_map = final(encode(self.backbone, batch, train=train)).astype(self.dtype)
        b, height, width, channels = feature_map.shape
        labels = self.meta.num_labels
        memory, d = tokens(feature_map), self.width or channels
        if self.width is not None:
            memory = nn.Dense(d, dtype=self.dtype, name="projection")(memory)
        position = jnp.asarray(sine_position(height, width, d), self.dtype)
        sizes = {"heads": self.heads, "width": d, "hidden": self.ffn or 4 * d, "dropout": self.dropout}
        sizes["initial"] = self.initial
        for i in range(self.encoder_layers):
            layer = AttentionLayer(**sizes, dtype=self.dtype, name=f"encoder_{i}")
            memory, _ = layer(memory, query_position=position, key_position=position, train=train)
        query = self.param("queries", nn.initializers.normal(1.0), (labels, d), jnp.float32)
        query = query.astype(self.dtype)[None]
        x, weights = jnp.zeros((b, labels, d), self.dtype), jnp.zeros(())
        for i in range(self.decoder_layers):
            layer = DecoderLayer(
                **sizes, self_attention=attends(self.self_attention, i), dtype=self.dtype, name=f"decoder_{i}"
            )
            x, weights = layer(x, query, memory, position, train=train)
        x = layer_norm("norm", self.dtype)(x)
        return Outputs(
            logits=GroupLinear(name="classifier")(x),
            label_features=x,
            attention=attention_maps(weights, height, width),
            extra={"memory": memory.reshape(b, height, width, d)},
        )

    def loss(self, batch: Batch, step: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        del step
        return self.criterion(self(batch, train=True).logits, batch, axis=self.axis), {}


def attends(self_attention: str, layer: int) -> bool:
    """Whether the labels attend to each other in a decoder layer, the first being 0."""
    return self_attention == "all" or self_attention == ("others" if layer else "first")


# --- released checkpoints ---------------------------------------------------------------------------------------------

ENCODER, DECODER = "transformer.encoder.layers.", "transformer.decoder.layers."


def _settings(names: Names, system: Query2Label) -> dict[str, Any]:
    """The settings of `Query2Label` that a released file was made with, from its names and shapes."""
    layers = names.count(DECODER)
    attending = [f"{DECODER}{i}.self_attn.in_proj_weight" in names for i in range(layers)]
    fits = [kind for kind in SELF_ATTENTION if attending == [attends(kind, i) for i in range(layers)]]
    fits.sort(key=lambda kind: kind != system.self_attention)  # with one layer several names mean the same
    return {
        "encoder_layers": names.count(ENCODER),
        "decoder_layers": layers,
        "self_attention": next(iter(fits), system.self_attention),
        "width": names.array("input_proj.weight").shape[0] if "input_proj.weight" in names else None,
        "ffn": names.array(f"{DECODER}0.linear1.weight").shape[0],
    }


def _check(names: Names, system: Query2Label) -> None:
    """UserError if the file was made with other settings than the system."""
    d = names.array("query_embed.weight").shape[1]
    for key, value in _settings(names, system).items():
        ours = getattr(system, key)
        if (4 * d if key == "ffn" and ours is None else ours) != value:
            raise UserError(
                f"The weights were made with config.system.{key}={value!r} and the config has {ours!r}; change it."
            )


def _layer(names: Names, start: str, attention: str, norms: tuple[str, str]) -> dict[str, Any]:
    """An `AttentionLayer` from the authors' names."""
    return {
        "attention": names.attention(f"{start}.{attention}"),
        "norm1": names.norm(f"{start}.{norms[0]}"),
        "ffn": {"in": names.linear(f"{start}.linear1"), "out": names.linear(f"{start}.linear2")},
        "norm2": names.norm(f"{start}.{norms[1]}"),
    }


def _convert(names: Names, system: nn.Module) -> dict[str, Any]:
    assert isinstance(system, Query2Label)
    _check(names, system)
    params: dict[str, Any] = {
        "queries": names.array("query_embed.weight"),
        "norm": names.norm("transformer.decoder.norm"),
        "classifier": {"kernel": names.array("fc.W")[0], "bias": names.array("fc.b")[0]},
    }
    if system.width is not None:
        params["projection"] = names.pointwise("input_proj")
    for i in range(system.encoder_layers):
        params[f"encoder_{i}"] = _layer(names, f"{ENCODER}{i}", "self_attn", ("norm1", "norm2"))
    for i in range(system.decoder_layers):
        start = f"{DECODER}{i}"
        params[f"decoder_{i}"] = {"cross": _layer(names, start, "multihead_attn", ("norm2", "norm3"))}
        if attends(system.self_attention, i):
            params[f"decoder_{i}"]["self_attention"] = names.attention(f"{start}.self_attn")
            params[f"decoder_{i}"]["self_norm"] = names.norm(f"{start}.norm1")
    return {"params": params}


def _rename(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """ResNet and TResNet lie one step deeper than Swin and CvT: "backbone.0.body." in place of "backbone.0."."""
    deep, flat = "backbone.0.body.", "backbone.0."
    return {flat + name.removeprefix(deep) if name.startswith(deep) else name: x for name, x in state.items()}


# backbone.1.pe holds the positions of one image size, which are computed here.
PUBLISHED = Published(_convert, trunk="backbone.0.", ignored=r"backbone\.1\.pe", rename=_rename)
NAMES = {"query2label": Query2Label}
