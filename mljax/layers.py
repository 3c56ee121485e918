"""Blocks that several systems share: attention, group-wise linear, pooling, positions."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mljax.errors import UserError
from mljax.types import Batch, Constant


def encode(backbone: nn.Module, batch: Batch, *, train: bool) -> dict[str, jax.Array]:
    """The endpoints {stride: (b h w d)} of a batch that holds an image, or cached endpoints in place of it."""
    if "endpoints" in batch:
        return dict(batch["endpoints"])
    return backbone(batch["image"], train=train)


def final(endpoints: dict[str, jax.Array]) -> jax.Array:
    """The last feature map (b h w d): the only endpoint, or the one of the largest stride."""
    if len(endpoints) == 1:
        return next(iter(endpoints.values()))
    return endpoints[max((k for k in endpoints if k.isdigit()), key=int)]


def tokens(feature_map: jax.Array) -> jax.Array:
    """(b h w d) -> (b n d), row-major."""
    b, h, w, d = feature_map.shape
    return feature_map.reshape(b, h * w, d)


def constant(module: nn.Module, name: str, value: Constant | Callable[[], np.ndarray]) -> jax.Array:
    """A fixed array of `variables["constants"]`: part of the checkpoint, never of a gradient.

    Args:
      value: the array, or a function that computes it; asked only when the variables are made.
    """
    return module.variable(
        "constants", name, lambda: jnp.asarray(value.value if isinstance(value, Constant) else value())
    ).value


def torch_linear_init(fan_in: int) -> Callable[..., jax.Array]:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): torch's default for linear weights and biases."""
    bound = float(fan_in) ** -0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


XAVIER = nn.initializers.xavier_uniform()
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": nn.relu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
}


def attention_bias(correlation: jax.Array | None, mode: str) -> Callable[[jax.Array], jax.Array] | None:
    """How a label correlation (l l) enters attention scores (b k l l); see `MultiHeadAttention.combine`.

    `add`: s + S; `multiply`: s * S; `mask`: -inf where S is 0, the diagonal always kept; `none`: s.
    """
    if mode not in ("add", "multiply", "mask", "none"):
        raise UserError(f"The correlation mode {mode!r} is not one of add, multiply, mask, none.")
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
    """

    heads: int
    width: int
    dropout: float = 0.0
    scale: float | None = None
    combine: Callable[[jax.Array], jax.Array] | None = None
    use_output: bool = True
    dtype: Any = jnp.float32
    kernel_init: Callable[..., jax.Array] = XAVIER
    bias_init: Callable[..., jax.Array] = nn.initializers.zeros_init()
    output_init: Callable[..., jax.Array] | None = None

    @nn.compact
    def __call__(
        self, query: jax.Array, key: jax.Array, value: jax.Array, *, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        """(b q d), (b n d), (b n d) -> (b q width) and the weights (b k q n)."""
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
        dropped = nn.Dropout(self.dropout, deterministic=not train)(weights).astype(self.dtype)
        merged = jnp.einsum("bkqn,bnkd->bqkd", dropped, v).reshape(*query.shape[:-1], self.width)
        return (dense("out")(merged) if self.use_output else merged), weights


INITS = ("xavier", "stacked", "torch")
# Xavier of the stacked projections of q, k and v, as torch's MultiheadAttention holds them: fans d and 3 d, not d and d
STACKED = nn.initializers.variance_scaling(0.5, "fan_avg", "uniform")


def attention_init(initial: str, width: int) -> dict[str, Any]:
    """`kernel_init` and `output_init` of a `MultiHeadAttention` by the name that `AttentionLayer` explains."""
    if initial == "xavier":
        return {}
    return {"kernel_init": STACKED, "output_init": XAVIER if initial == "stacked" else torch_linear_init(width)}


class FeedForward(nn.Module):
    """Dense, activation, dropout, dense: (.. d) -> (.. d). `initial` is explained at `AttentionLayer`."""

    hidden: int
    dropout: float = 0.0
    activation: str = "relu"
    dtype: Any = jnp.float32
    initial: str = "xavier"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        def dense(features: int, inputs: int, name: str) -> nn.Dense:
            torch, zero = torch_linear_init(inputs), nn.initializers.zeros_init()
            return nn.Dense(
                features, dtype=self.dtype, name=name, kernel_init=torch if self.initial == "torch" else XAVIER,
                bias_init=zero if self.initial == "xavier" else torch,
            )  # fmt: skip

        y = ACTIVATIONS[self.activation](dense(self.hidden, x.shape[-1], "in")(x))
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
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
    """

    heads: int
    width: int
    hidden: int
    dropout: float = 0.1
    activation: str = "relu"
    combine: Callable[[jax.Array], jax.Array] | None = None
    dtype: Any = jnp.float32
    initial: str = "xavier"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        memory: jax.Array | None = None,
        *,
        query_position: jax.Array | None = None,
        key_position: jax.Array | None = None,
        train: bool,
    ) -> tuple[jax.Array, jax.Array]:
        """x (b q width), memory (b n d) or None -> (b q width) and the attention weights (b k q n)."""
        query = x if query_position is None else x + query_position
        value = x if memory is None else memory
        key = value if key_position is None else value + key_position
        attended, weights = MultiHeadAttention(
            self.heads, self.width, self.dropout, combine=self.combine, dtype=self.dtype, name="attention",
            **attention_init(self.initial, self.width),
        )(query, key, value, train=train)  # fmt: skip

        def drop(y: jax.Array) -> jax.Array:
            return nn.Dropout(self.dropout, deterministic=not train)(y)

        x = layer_norm("norm1", self.dtype)(x + drop(attended))
        ffn = FeedForward(self.hidden, self.dropout, self.activation, self.dtype, self.initial, name="ffn")
        return layer_norm("norm2", self.dtype)(x + drop(ffn(x, train=train))), weights


def layer_norm(name: str, dtype: Any, epsilon: float = 1e-5) -> Callable[[jax.Array], jax.Array]:
    """LayerNorm with torch's epsilon, computed in float32, the result in `dtype`; call it inside a compact module."""
    norm = nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, name=name)
    return lambda x: norm(x.astype(jnp.float32)).astype(dtype)


class GroupLinear(nn.Module):
    """One linear classifier per label: logit_l = w_l . x_l + b_l, (b l d) -> (b l) float32."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        _, labels, width = x.shape
        kernel = self.param("kernel", torch_linear_init(width), (labels, width))
        bias = self.param("bias", torch_linear_init(width), (labels,))
        return jnp.einsum("bld,ld->bl", x.astype(jnp.float32), kernel) + bias[None]


class ActivationPooling(nn.Module):
    """Class-specific features by class activation maps: sigmoid(score map)^T . (1x1 conv of the map), as ADD-GCN's SAM.

    Reference: Ye et al., "Attention-Driven Dynamic Graph Convolutional Network", ECCV 2020, eq. 2-3.
    `normalise` divides by the number of positions: features then do not grow with the map (the authors' code sums).
    """

    labels: int
    width: int
    normalise: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, feature_map: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(b h w d) -> features (b l width) and score maps before the sigmoid (b n l)."""
        x = tokens(feature_map)
        scores = nn.Dense(self.labels, use_bias=False, dtype=self.dtype, name="score")(x)
        values = nn.Dense(self.width, dtype=self.dtype, name="transform")(x)
        gates = nn.sigmoid(scores)
        features = jnp.einsum("bnl,bnd->bld", gates, values)
        return (features / x.shape[1] if self.normalise else features), scores


class Affine(nn.Module):
    """The kernel (in features) and bias (features) of a Dense layer, for those who combine layers before use."""

    features: int
    kernel_init: Callable[..., jax.Array] = nn.initializers.lecun_normal()
    bias_init: Callable[..., jax.Array] = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, inputs: int) -> tuple[jax.Array, jax.Array]:
        kernel = self.param("kernel", self.kernel_init, (inputs, self.features))
        return kernel, self.param("bias", self.bias_init, (self.features,))


class SemanticPooling(nn.Module):
    """Label-queried pooling, the semantic decoupling of SSGRL.

    s_nl = w . W3 tanh((W1 f_n) * (W2 e_l)) + ..; softmax over positions; features_l = sum_n a_nl f_n.
    Reference: Chen et al., "Learning Semantic-Specific Graph Representation", ICCV 2019, eq. 1-4.
    Differs from the authors' code: nothing in values. W3 and w have nothing between them and are multiplied first
    (both stay parameters, so that training is the same), and labels go one after the other: nothing of (b n l
    hidden) is ever built. For 32 images, 49 positions, 80 labels, hidden 512 with gradients on 2 CPU cores: 7 MiB
    and 0.09 s, where one piece took 980 MiB and 3 s with the product of W3 and w, and more without.

    Attributes:
      hidden: width of the joint space (the authors' 1024; 512 in HCP-MLR-PL).
      kernel_init: of all four matrices.
    """

    hidden: int
    dtype: Any = jnp.float32
    kernel_init: Callable[..., jax.Array] = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, feature_map: jax.Array, vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(b h w d), (l e) -> features (b l d) and attention (b n l), which sums to 1 over n."""
        x = tokens(feature_map)
        options: Any = {"use_bias": False, "dtype": self.dtype, "kernel_init": self.kernel_init}
        image = nn.Dense(self.hidden, name="image", **options)(x)
        word = nn.Dense(self.hidden, name="word", **options)(vectors)
        joint, joint_bias = Affine(self.hidden, self.kernel_init, name="joint")(self.hidden)
        score, score_bias = Affine(1, self.kernel_init, name="score")(self.hidden)
        weights = jnp.matmul(joint, score, precision="highest")[:, 0].astype(self.dtype)

        @jax.checkpoint
        def of_label(one: jax.Array) -> jax.Array:
            hidden = jnp.tanh(image * one[None, None])
            return jnp.einsum("bnd,d->bn", hidden, weights, preferred_element_type=jnp.float32)

        scores = jax.lax.map(of_label, word).transpose(1, 2, 0) + (joint_bias @ score + score_bias)[None, None]
        attention = nn.softmax(scores, axis=1)
        return jnp.einsum("bnl,bnd->bld", attention.astype(x.dtype), x), attention


def sine_position(height: int, width: int, channels: int) -> np.ndarray:
    """2-D sine positions (1 n channels): y first, then x, coordinates 1..size scaled to 2 pi, temperature 1e4.

    Reference: Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020 (DETR), as Query2Label uses it.
    """
    if channels % 4:
        raise UserError(f"2-D sine positions need a width that 4 divides, not {channels}.")
    half = channels // 2
    frequency = 10000.0 ** (2 * (np.arange(half) // 2) / half)

    def axis(size: int) -> np.ndarray:
        coordinate = np.arange(1, size + 1) / (size + 1e-6) * 2 * np.pi
        angle = coordinate[:, None] / frequency[None]
        return np.where(np.arange(half) % 2 == 0, np.sin(angle), np.cos(angle))

    y = np.broadcast_to(axis(height)[:, None], (height, width, half))
    x = np.broadcast_to(axis(width)[None], (height, width, half))
    return np.concatenate([y, x], axis=-1).reshape(1, height * width, channels).astype(np.float32)


def attention_maps(weights: jax.Array, height: int, width: int) -> jax.Array:
    """Attention weights (b k l n) of a cross-attention -> (b k l h w)."""
    return weights.reshape(*weights.shape[:-1], height, width)
