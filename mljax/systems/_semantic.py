"""What SSGRL, SST and SARB share: decoupling, gated propagation, the label graph, names of checkpoints."""

import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mljax.convolution import BatchNorm
from mljax.data import labels as label_data
from mljax.errors import UserError, at_least
from mljax.layers import ActivationPooling, GroupLinear, SemanticPooling, torch_linear_init
from mljax.types import ArrayLike, Meta
from mljax.untrusted import read_npy
from mljax.weights.published import Names

log = logging.getLogger("mljax.training")
# torch's default of linear layers, U(-1/sqrt(fan in), 1/sqrt(fan in)), for any fan in
TORCH = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
POOLING = ("semantic", "activation")


def linear(features: int, inputs: int, name: str, dtype: Any, bias: bool = True) -> nn.Dense:
    """A Dense layer that starts as torch's."""
    return nn.Dense(
        features, use_bias=bias, dtype=dtype, kernel_init=TORCH, bias_init=torch_linear_init(inputs), name=name
    )


class Decoupling(nn.Module):
    """Feature map -> one feature per label, and the positions that it came from.

    Average pooling, then (HCP-MLR-PL only) a 1x1 convolution with BatchNorm to `width` channels, then pooling by label.

    Attributes:
      labels: l.
      width: d of what comes out; None, or as many channels as the map has: the map stays as it is.
      hidden: width of the joint space of positions and label vectors.
      pool: side of the average pooling, 2 in the authors' codes; 1: none.
      pooling: "semantic" by label vectors, or "activation", ADD-GCN's SAM, which needs none.
    """

    labels: int
    width: int | None
    hidden: int
    pool: int
    pooling: str
    dtype: Any = jnp.float32
    axis: str | None = None

    @nn.compact
    def __call__(
        self, feature_map: Float[ArrayLike, "b h w c"], vectors: Float[ArrayLike, "l e"] | None, *, train: bool
    ) -> tuple[Float[Array, "b {self.labels} d"], Float[Array, "b 1 {self.labels} y x"]]:
        """Label features, and attention, which sums to 1 over the positions (y x) of the pooled map."""
        x = _average(feature_map.astype(self.dtype), self.pool)
        if self.width is not None and x.shape[-1] != self.width:
            x = nn.Dense(self.width, use_bias=False, dtype=self.dtype, kernel_init=TORCH, name="reduce")(x)
            x = BatchNorm(axis=self.axis, dtype=self.dtype, name="reduce_bn")(x, train)
        b, height, width, channels = x.shape
        if self.pooling == "semantic":
            assert vectors is not None
            features, weights = SemanticPooling(self.hidden, self.dtype, TORCH, name="pooling")(x, vectors)
        else:
            pooling = ActivationPooling(self.labels, channels, True, self.dtype, name="pooling")
            features, scores = pooling(x)
            weights = nn.softmax(nn.log_sigmoid(scores.astype(jnp.float32)), axis=1)  # sigmoids over their sum
        return features, weights.transpose(0, 2, 1).reshape(b, 1, self.labels, height, width)


def _average(x: Float[ArrayLike, "b h w c"], size: int) -> Float[ArrayLike, "b h//{size} w//{size} c"]:
    """Average pooling; rows and columns that are left over are dropped, as torch drops them."""
    if size == 1:
        return x
    if min(x.shape[1:3]) < size:
        raise UserError(
            f"A {x.shape[1]}x{x.shape[2]} feature map is too small to be pooled by config.system.pool={size};"
            " set it to 1, or enlarge config.input.size."
        )
    b, height, width, channels = x.shape[0], x.shape[1] // size, x.shape[2] // size, x.shape[3]
    blocks = x[:, : height * size, : width * size].reshape(b, height, size, width, size, channels)
    return blocks.mean((2, 4))


class GatedGraph(nn.Module):
    """Gated propagation over the label graph, the same weights in every step.

    m = [A h; A^T h];  z = sigmoid(W_z m + U_z h);  r = sigmoid(W_r m + U_r h);  h' = tanh(W_h m + U_h (r * h));
    h <- (1 - z) h + z h'.

    Reference: Chen et al., "Learning Semantic-Specific Graph Representation ..", ICCV 2019, eq. 5 to 8; Li et al.,
    "Gated Graph Sequence Neural Networks", ICLR 2016.

    Attributes:
      steps: T, 3 in all of the authors' codes.
      reset_gate: "fixed" as above, or "released": r uses U_z, as the code that SSGRL's authors released; U_r is unused.
    """

    steps: int
    reset_gate: str = "fixed"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "b l d"], adjacency: Float[ArrayLike, "l l"]) -> Float[Array, "b l d"]:
        """The label features after `steps` of propagation."""
        d = x.shape[-1]
        weights = {gate: linear(d, 2 * d, f"{gate}_w", self.dtype) for gate in ("update", "reset", "candidate")}
        states = {gate: linear(d, d, f"{gate}_u", self.dtype) for gate in ("update", "candidate")}
        fixed = self.reset_gate == "fixed"
        states["reset"] = linear(d, d, "reset_u", self.dtype) if fixed else states["update"]
        edges = jnp.stack([adjacency, adjacency.T]).astype(self.dtype)
        h = x
        for _ in range(self.steps):
            message = jnp.einsum("kij,bjd->bikd", edges, h).reshape(*h.shape[:2], 2 * d)
            update = nn.sigmoid(weights["update"](message) + states["update"](h))
            reset = nn.sigmoid(weights["reset"](message) + states["reset"](h))
            candidate = jnp.tanh(weights["candidate"](message) + states["candidate"](reset * h))
            h = (1 - update) * h + update * candidate
        return h


class GraphClassifier(nn.Module):
    """Label features -> propagated over the graph -> logits: o = tanh(W [h; x]), logit_l = w_l . o_l + b_l.

    Attributes:
      output: width of o.
      steps, reset_gate: of `GatedGraph`.
    """

    output: int
    steps: int
    reset_gate: str = "fixed"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[ArrayLike, "b l d"], adjacency: Float[ArrayLike, "l l"]
    ) -> tuple[Float[Array, "b l"], Float[Array, "b l d"]]:
        """Logits in float32, and h."""
        h = GatedGraph(self.steps, self.reset_gate, self.dtype, name="graph")(x, adjacency)
        joint = jnp.concatenate([h, x], axis=-1)
        o = jnp.tanh(linear(self.output, joint.shape[-1], "output", self.dtype)(joint))
        return GroupLinear(name="classifier")(o), h


# --- what systems check and compute ----------------------------------------------------------------------------------


def at_least_one(**settings: int | None) -> None:
    """Check settings of config.system that count or measure something."""
    for key, value in settings.items():
        at_least(f"config.system.{key}", value, 1)


def not_negative(**settings: float) -> None:
    for key, value in settings.items():
        at_least(f"config.system.{key}", value, 0)


def half(width: int, hidden: int | None) -> int:
    """`hidden`, or half of `width` where it is None."""
    return max(width // 2, 1) if hidden is None else hidden


def label_vectors(meta: Meta, system: str) -> Float[np.ndarray, "l e"]:
    """The data set's label vectors.

    Raises:
      UserError: it has none; the sentence says how to give some.
    """
    if meta.vectors is None:
        raise UserError(
            f"{system} looks for labels by their vectors and {meta.name!r} has none; set config.vectors to 'glove'"
            " or to a file of names and vectors."
        )
    return meta.vectors


def graph(meta: Meta, source: str = "labels") -> Float[np.ndarray, "l l"]:
    """The label graph, A_ij = P(j | i) = images with both known / images with i known, A_ii = 1, in float32.

    It is computed, or read, once for the same metadata and source, so that modules may ask for it whenever they are
    cloned.

    Args:
      meta: of the training split; a label that is not observed counts nowhere. Without rows, as in a converted run
        whose data set is not here, the graph is not known and all NaN: a checkpoint's takes its place.
      source: "labels"; "none" for the identity; or a .npy file of (l l) such numbers, in the order of the labels.
    Raises:
      UserError: the file cannot be read or has another size.
    Differs from the authors' code (HCP-MLR-PL): a class without a known positive has no edges, where theirs is NaN.
    """
    if source == "none":
        return np.eye(meta.num_labels, dtype=np.float32)
    if source == "labels":
        return _label_graph(meta)
    path = Path(source).expanduser()
    return _graph_file(path, meta.num_labels, path.stat().st_mtime_ns if path.is_file() else 0)


@lru_cache(maxsize=4)
def _label_graph(meta: Meta) -> np.ndarray:
    size = meta.num_labels
    if not len(meta.labels):
        return _fixed(np.full((size, size), np.nan, np.float32))
    counts, nums = label_data.cooccurrence(meta.labels, meta.observed)
    if size > 1 and not counts.any():
        log.warning("%s has no image with two known labels: the label graph has no edges.", meta.name)
    edges = counts / np.maximum(nums, 1)[:, None]
    np.fill_diagonal(edges, 1.0)
    return _fixed(edges.astype(np.float32))


@lru_cache(maxsize=4)
def _graph_file(path: Path, size: int, changed: int) -> np.ndarray:
    """The graph in a file; `changed` is when the file was written."""
    del changed
    try:
        edges = np.asarray(read_npy(path), np.float32)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"config.system.graph is {str(path)!r}, which cannot be read ({error}); expected 'labels', 'none' or a .npy"
            " file."
        ) from error
    if edges.shape != (size, size) or not np.isfinite(edges).all():
        raise UserError(
            f"The label graph {str(path)!r} has the shape {edges.shape} or values that are not finite; expected"
            f" {size} x {size} finite numbers."
        )
    return _fixed(edges)


def _fixed(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array


# --- names of the authors' state dicts -------------------------------------------------------------------------------


def published_decoupling(names: Names, prefix: str, fields: tuple[str, str, str, str]) -> dict[str, Any]:
    """The parameters of `SemanticPooling`."""
    return {ours: names.linear(f"{prefix}.{name}") for ours, name in zip(("image", "word", "joint", "score"), fields)}


def published_classifier(names: Names, gates: dict[str, str], output: str) -> dict[str, Any]:
    """The parameters of `GraphClassifier`; `gates` says what "update_w" and its neighbours are called."""
    classifier = {"kernel": names.array("classifiers.weight"), "bias": names.array("classifiers.bias")}
    return {
        "graph": {ours: names.linear(theirs) for ours, theirs in gates.items()},
        "output": names.linear(output),
        "classifier": classifier,
    }


def published_hcp(names: Names) -> dict[str, Any]:
    """Everything that SST and SARB have in common in HCP-MLR-PL's state dicts, the two matrices once."""
    graph = names.array("inMatrix")
    for name in ("outMatrix", "GraphNeuralNetwork.inMatrix", "GraphNeuralNetwork.outMatrix"):
        expected, how = (graph.T, " transposed") if "out" in name else (graph, "")
        if not np.allclose(names.array(name), expected, atol=1e-6):
            raise UserError(f"{name!r} of the weights is not the label graph{how}; expected a file of SST or SARB.")
    pooling = published_decoupling(names, "SemanticDecoupling", ("fc1", "fc2", "fc3", "fc4"))
    decoupling, stats = {"pooling": pooling}, {}
    if "changeChannel.0.weight" in names:
        decoupling["reduce"] = names.pointwise("changeChannel.0")
        decoupling["reduce_bn"], stats["reduce_bn"] = names.batch_norm("changeChannel.1")
    gates = {
        f"{gate}_{part}": f"GraphNeuralNetwork.fc_{i}_{part}"
        for i, gate in enumerate(("update", "reset", "candidate"), 1)
        for part in "wu"
    }
    return {
        "params": {"decoupling": decoupling, "head": published_classifier(names, gates, "fc")},
        "batch_stats": {"decoupling": stats} if stats else {},
        "constants": {"adjacency": graph, "vectors": names.array("wordFeatures")},
    }
