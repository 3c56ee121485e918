"""ML-Decoder: groups of labels as fixed queries of one cross-attention layer (Ridnik et al., WACV 2023).

Feature map -> linear and ReLU -> a decoder layer without self-attention, whose queries stand for groups of labels (or
are word vectors, in the zero-shot mode) -> several labels per query -> asymmetric loss.
"""

import dataclasses
from collections.abc import Mapping
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
    attention_maps,
    constant,
    encode,
    final,
    layer_norm,
    tokens,
    torch_linear_init,
)
from mljax.losses.criterion import Criterion
from mljax.types import ArrayLike, Batch, Meta, Outputs
from mljax.weights.published import Names, Published

GROUPS = 100  # of the authors, where there are more labels than that


class MLDecoder(nn.Module):
    """ML-Decoder for a data set; the defaults are the authors', but `initial`.

    Attributes:
      groups: q, how many queries stand for the l labels: label i belongs to query i // ceil(l / q). None: one query
        per label ("full decoding") up to 100 labels, 100 queries for more.
      zero_shot: queries are made of the label vectors and one classifier serves all labels, so that labels that were
        never trained can be scored: see `with_labels`.
      width: d of queries and tokens; the heads must divide it.
      ffn: hidden features of the feed-forward part.
      dropout: as in the decoder layer of Vaswani et al.
      initial: how the decoder layer's matrices start: "xavier", or "torch" as released; see `layers.AttentionLayer`.

    Reference: Ridnik et al., "ML-Decoder: Scalable and Versatile Classification Head", WACV 2023, sections 2.2 to 2.4.
    Differs from the authors' code: labels per query are rounded up exactly (theirs fail for a fraction below 0.001).
    """

    backbone: nn.Module
    criterion: Criterion
    meta: Meta
    groups: int | None = None
    zero_shot: bool = False
    width: int = 768
    heads: int = 8
    ffn: int = 2048
    dropout: float = 0.1
    initial: str = "xavier"
    dtype: Any = jnp.float32
    axis: str | None = None

    def __post_init__(self) -> None:
        for key in ("width", "heads", "ffn", "groups"):
            at_least(f"config.system.{key}", getattr(self, key), 1)
        one_of("config.system.initial", self.initial, INITS)
        if self.width % self.heads:
            raise UserError(
                f"config.system.heads={self.heads} do not divide config.system.width={self.width}; choose a divisor of"
                " it."
            )
        name, labels = self.meta.name, self.meta.num_labels
        if self.groups is not None and self.groups > labels:
            raise UserError(
                f"config.system.groups is {self.groups} and {name!r} has {labels} labels; give at most as many, or"
                " None."
            )
        if self.zero_shot and self.groups is not None:
            raise UserError(
                "config.system.zero_shot has one query per label; set config.system.groups=None, or zero_shot=False."
            )
        if self.zero_shot and self.meta.vectors is None:
            raise UserError(
                f"config.system.zero_shot=True makes queries of label vectors and there are none for {name!r}; set"
                " config.vectors to a file of names and vectors, or config.system.zero_shot=False."
            )
        super().__post_init__()

    @property
    def queries(self) -> int:
        """q, the number of queries."""
        return self.meta.num_labels if self.zero_shot else self.groups or min(GROUPS, self.meta.num_labels)

    @property
    def vectors(self) -> Float[np.ndarray, "l e"] | None:
        """The label vectors that queries are made of, in the zero-shot mode."""
        return self.meta.vectors if self.zero_shot else None

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> Outputs:
        """Logits (b l); label_features (b l d) and attention (b k l h w) are those of a label's query.

        extra: "query_features" (b q d), after the decoder, and "query_attention" (b k q h w), for q groups.
        """
        feature_map = final(encode(self.backbone, batch, train=train)).astype(self.dtype)
        b, height, width, channels = feature_map.shape
        dense = nn.Dense(
            self.width, dtype=self.dtype, kernel_init=torch_linear_init(channels),
            bias_init=torch_linear_init(channels), name="embedding",
        )  # fmt: skip
        memory = nn.relu(dense(tokens(feature_map)))
        x = jnp.broadcast_to(self._queries()[None], (b, self.queries, self.width))
        x = x + Dropout(self.dropout)(x, train=train)
        x = layer_norm("norm", self.dtype)(x)
        layer = AttentionLayer(
            self.heads, self.width, self.ffn, self.dropout, dtype=self.dtype, initial=self.initial, name="decoder"
        )
        x, weights = layer(x, memory, train=train)
        maps = attention_maps(weights, height, width)
        labels = self.meta.num_labels
        group = np.arange(labels) // per_query(labels, self.queries)
        alone = self.queries == labels
        return Outputs(
            logits=self._classify(x),
            label_features=x if alone else x[:, group],
            attention=maps if alone else maps[:, :, group],
            extra={"query_features": x, "query_attention": maps},
        )

    def _queries(self) -> Float[Array, "q d"]:
        """Random and fixed, or made of the label vectors."""
        if (table := self.vectors) is not None:
            vectors = constant(self, "vectors", lambda: table)
            init = torch_linear_init(vectors.shape[1])
            dense = nn.Dense(self.width, dtype=self.dtype, kernel_init=init, bias_init=init, name="words")
            return nn.relu(dense(vectors))

        def draw() -> jax.Array:
            return jax.random.normal(self.make_rng("params"), (self.queries, self.width), jnp.float32)

        return self.variable("constants", "queries", draw).value.astype(self.dtype)

    def _classify(self, x: Float[ArrayLike, "b q d"]) -> Float[Array, "b l"]:
        """In float32: label = query * labels per query + slot, the last slots unused."""
        x = x.astype(jnp.float32)
        if self.zero_shot:
            kernel = self.param("kernel", nn.initializers.normal((2 / (self.width + 1)) ** 0.5), (self.width, 1))
            return x @ kernel[:, 0] + self.param("bias", nn.initializers.zeros_init(), (1,))[None]
        labels, queries = self.meta.num_labels, self.queries
        slots = per_query(labels, queries)
        # torch's Xavier-normal of a tensor (q d slots): fans d * slots and q * slots
        spread = (2 / (slots * (self.width + queries))) ** 0.5
        kernel = self.param("kernel", nn.initializers.normal(spread), (queries, self.width, slots))
        bias = self.param("bias", nn.initializers.zeros_init(), (labels,))
        logits = jnp.einsum("bqd,qds->bqs", x, kernel)
        return logits.reshape(len(x), -1)[:, :labels] + bias[None]

    def loss(self, batch: Batch, step: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        del step
        return self.criterion(self(batch, train=True).logits, batch, axis=self.axis), {}


def per_query(labels: int, queries: int) -> int:
    """How many labels share a query: l / q, rounded up."""
    return -(-labels // queries)


def with_labels(system: MLDecoder, variables: Mapping[str, Any], meta: Meta) -> tuple[MLDecoder, dict[str, Any]]:
    """A zero-shot ML-Decoder for other labels than it was trained on.

    Args:
      system: of the zero-shot mode.
      variables: its trained variables.
      meta: of the new labels, with vectors from the same source as those that it was trained with.
    Returns:
      (system, variables) whose logits are (b l) for the new labels.
    Raises:
      UserError: it is not of the zero-shot mode, or vectors of another width.
    """
    if system.vectors is None:
        raise UserError("This ML-Decoder has fixed queries for its labels; train it with config.system.zero_shot=True.")
    vectors, width = np.asarray(meta.vectors, np.float32), system.vectors.shape[1]
    if vectors.ndim != 2 or vectors.shape[1] != width:
        raise UserError(f"The new label vectors have the shape {vectors.shape} and should have (labels, {width}).")
    constants = {**variables.get("constants", {}), "vectors": jnp.asarray(vectors)}
    system = system.clone(meta=dataclasses.replace(meta, vectors=vectors))
    return system, {**variables, "constants": constants}


# --- released checkpoints ---------------------------------------------------------------------------------------------


def _check(names: Names, system: MLDecoder) -> None:
    """UserError if the file was made with other settings than the system."""
    zero_shot = "wordvec_proj.weight" in names
    if zero_shot != system.zero_shot:
        raise UserError(
            f"The weights are {'' if zero_shot else 'not '}of the zero-shot mode; set"
            f" config.system.zero_shot={zero_shot}."
        )
    pooling = names.array("decoder.duplicate_pooling")
    ffn = names.array("decoder.layers.0.linear1.weight").shape[0]
    settings = {"width": (pooling.shape[-2], system.width), "ffn": (ffn, system.ffn)}
    if not zero_shot:
        settings["groups"] = (len(pooling), system.queries)
    for key, (theirs, ours) in settings.items():
        if theirs != ours:
            raise UserError(
                f"The weights were made with config.system.{key}={theirs} and the config has {ours}; change it."
            )


def _convert(names: Names, system: nn.Module) -> dict[str, Any]:
    """The label vectors of the zero-shot mode are not in the file and stay the data set's."""
    assert isinstance(system, MLDecoder)
    _check(names, system)
    start, pooling = "decoder.layers.0", names.array("decoder.duplicate_pooling")
    params: dict[str, Any] = {
        "embedding": names.linear("decoder.embed_standart"),
        "norm": names.norm(f"{start}.norm1"),
        "decoder": {
            "attention": names.attention(f"{start}.multihead_attn"),
            "norm1": names.norm(f"{start}.norm2"),
            "ffn": {"in": names.linear(f"{start}.linear1"), "out": names.linear(f"{start}.linear2")},
            "norm2": names.norm(f"{start}.norm3"),
        },
        "bias": names.array("decoder.duplicate_pooling_bias"),
    }
    if system.vectors is not None:
        params |= {"kernel": pooling, "words": names.linear("wordvec_proj")}
        return {"params": params, "constants": {"vectors": system.vectors}}
    return {"params": params | {"kernel": pooling}, "constants": {"queries": names.array("decoder.query_embed.weight")}}


def _rename(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix("head."): value for name, value in state.items()}


PUBLISHED = Published(_convert, own=r"(decoder|wordvec_proj)\..*", rename=_rename)
NAMES = {"ml_decoder": MLDecoder}
