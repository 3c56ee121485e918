"""Attention among tokens and labels: multi-head attention, the transformer layer, correlations in the scores."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mljax.errors import UserError, one_of
from mljax.layers.dropout import Dropout
from mljax.layers.linear import XAVIER, layer_norm, torch_linear_init
from mljax.types import ArrayLike

Combine = Callable[[Array], Array]  # changes the attention scores (b k q n)
ACTIVATIONS: dict[str, Combine] = {
    "relu": nn.relu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
}


def attention_bias(correlation: Float[ArrayLike, "l l"] | None, mode: str) -> Combine | None:
    """How a label correlation enters attention scores (b k l l); see `MultiHeadAttention.combine`.

    `add`: s + S; `multiply`: s * S; `mask`: -inf where S is 0, the diagonal always kept; `none`: s.
    """
    one_of("The correlation mode", mode, ("add", "multiply", "mask", "none"))
    if correlation is None or mode == "none":
        return None
    if mode == "add":
        return lambda scores: scores + correlation.astype(scores.dtype)[None, None]
    if mode == "multiply":
        return lambda scores: scores * correlation.astype(scores.dtype)[None, None]
    allowed = (correlation > 0) | jnp.eye(correlation.shape[0], dtype=bool)
    return lambda scores: jnp.where(allowed[None, None], scores, jnp.finfo(scores.dtype).min)


class MultiHeadAttention(nn.Module):
    """Multi-head attention with separate projections of queries, keys and values.

    softmax(Q K^T * scale) V per head, then an output projection; scores and softmax in float32.
    Reference: Vaswani et al., "Attention Is All You Need", NIPS 2017, eq. 1 and section 3.2.2.

    Attributes:
      heads: k; must divide width.
      width: of queries, keys and values, and of the output.
      dropout: on the attention weights.
      scale: of the scores; None for 1/sqrt(width/heads).
      combine: changes the scores (b k q n) before the softmax, e.g. `attention_bias(...)`.
      use_output: whether to project the merged heads.
      dtype: of the computation.
      kernel_init, bias_init: of all four projections; Xavier and zero unless a system's authors have others.
      output_init: of the output projection's kernel, where it differs from that of the other three.
      examples: axis of the queries that holds the examples of the batch, 0 or 1; dropout draws for each of them.
    """

    heads: int
    width: int
    dropout: float = 0.0
    scale: float | None = None
    combine: Combine | None = None
    use_output: bool = True
    dtype: Any = jnp.float32
    kernel_init: Callable[..., jax.Array] = XAVIER
    bias_init: Callable[..., jax.Array] = nn.initializers.zeros_init()
    output_init: Callable[..., jax.Array] | None = None
    examples: int = 0

    @nn.compact
    def __call__(
        self,
        query: Float[ArrayLike, "b q _"],
        key: Float[ArrayLike, "b n _"],
        value: Float[ArrayLike, "b n _"],
        *,
        train: bool,
    ) -> tuple[Float[Array, "b q {self.width}"], Float[Array, "b {self.heads} q n"]]:
        """The attended values, and the weights."""
        if self.width % self.heads:
            raise UserError(f"{self.heads} heads do not divide the width {self.width}; choose a divisor of it.")
        size = self.width // self.heads

        def dense(name: str) -> nn.Dense:
            init = self.output_init if name == "out" and self.output_init is not None else self.kernel_init
            return nn.Dense(self.width, dtype=self.dtype, name=name, kernel_init=init, bias_init=self.bias_init)

        def project(x: jax.Array, name: str) -> jax.Array:
            return dense(name)(x).reshape(*x.shape[:-1], self.heads, size)

        q, k, v = project(query, "query"), project(key, "key"), project(value, "value")
        scores = jnp.einsum("bqkd,bnkd->bkqn", q, k).astype(jnp.float32)
        scores = scores * (self.scale if self.scale is not None else size**-0.5)
        if self.combine is not None:
            scores = self.combine(scores)
        weights = nn.softmax(scores, axis=-1)
        dropped = Dropout(self.dropout, 2 * self.examples)(weights, train=train).astype(self.dtype)
        merged = jnp.einsum("bkqn,bnkd->bqkd", dropped, v).reshape(*query.shape[:-1], self.width)
        return (dense("out")(merged) if self.use_output else merged), weights


INITS = ("xavier", "stacked", "torch")
# Xavier of the stacked projections of q, k and v, as torch's MultiheadAttention holds them: fans d and 3 d, not d and d
STACKED = nn.initializers.variance_scaling(0.5, "fan_avg", "uniform")


def attention_init(init: str, width: int) -> dict[str, Any]:
    """`kernel_init` and `output_init` of a `MultiHeadAttention` by the name that `AttentionLayer` explains."""
    if init == "xavier":
        return {}
    return {"kernel_init": STACKED, "output_init": XAVIER if init == "stacked" else torch_linear_init(width)}


class FeedForward(nn.Module):
    """Dense, activation, dropout, dense. `initial` and `examples` are explained at `AttentionLayer`."""

    hidden: int
    dropout: float = 0.0
    activation: str = "relu"
    dtype: Any = jnp.float32
    initial: str = "xavier"
    examples: int = 0

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "*batch d"], *, train: bool) -> Float[Array, "*batch d"]:
        def dense(features: int, inputs: int, name: str) -> nn.Dense:
            torch, zero = torch_linear_init(inputs), nn.initializers.zeros_init()
            return nn.Dense(
                features, dtype=self.dtype, name=name, kernel_init=torch if self.initial == "torch" else XAVIER,
                bias_init=zero if self.initial == "xavier" else torch,
            )  # fmt: skip

        y = ACTIVATIONS[self.activation](dense(self.hidden, x.shape[-1], "in")(x))
        y = Dropout(self.dropout, self.examples)(y, train=train)
        return dense(x.shape[-1], self.hidden, "out")(y)


class AttentionLayer(nn.Module):
    """A post-norm transformer layer: attention, add and LayerNorm, feed-forward, add and LayerNorm.

    Self-attention if no memory is given, cross-attention otherwise. Positions are added to queries and keys only.

    Attributes:
      heads, width, dropout, combine, dtype: as in `MultiHeadAttention`; hidden, activation: as in `FeedForward`.
      initial: "xavier": every matrix by itself, biases zero. "stacked": as in torch where a transformer sets all
        matrices to Xavier: q, k and v are one matrix there and start sqrt(2) smaller; biases of the feed-forward part
        are uniform within 1 / sqrt(inputs). "torch": as in torch where nothing is set: besides the stacked q, k and v
        all matrices are uniform within 1 / sqrt(inputs).
      examples: axis of x that holds the examples of the batch: 0, or 1 where positions attend over the batch.
    """

    heads: int
    width: int
    hidden: int
    dropout: float = 0.1
    activation: str = "relu"
    combine: Combine | None = None
    dtype: Any = jnp.float32
    initial: str = "xavier"
    examples: int = 0

    @nn.compact
    def __call__(
        self,
        x: Float[ArrayLike, "b q d"],
        memory: Float[ArrayLike, "b n _"] | None = None,
        *,
        query_position: Float[ArrayLike, "#b q d"] | None = None,
        key_position: Float[ArrayLike, "#b n _"] | None = None,
        train: bool,
    ) -> tuple[Float[Array, "b q d"], Float[Array, "b {self.heads} q _"]]:
        """The tokens or labels x after the layer, and the attention weights (b k q n)."""
        query = x if query_position is None else x + query_position
        value = x if memory is None else memory
        key = value if key_position is None else value + key_position
        attended, weights = MultiHeadAttention(
            self.heads, self.width, self.dropout, combine=self.combine, dtype=self.dtype, name="attention",
            examples=self.examples, **attention_init(self.initial, self.width),
        )(query, key, value, train=train)  # fmt: skip

        def drop(y: jax.Array) -> jax.Array:
            return Dropout(self.dropout, self.examples)(y, train=train)

        x = layer_norm("norm1", self.dtype)(x + drop(attended))
        ffn = FeedForward(
            self.hidden, self.dropout, self.activation, self.dtype, self.initial, self.examples, name="ffn"
        )
        return layer_norm("norm2", self.dtype)(x + drop(ffn(x, train=train))), weights


def attention_maps(
    weights: Float[ArrayLike, "b k l n"], height: int, width: int
) -> Float[ArrayLike, "b k l {height} {width}"]:
    """The weights of a cross-attention as maps."""
    return weights.reshape(*weights.shape[:-1], height, width)
