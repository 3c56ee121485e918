"""What flows between the rooms of the house: batches, facts about a training split, outputs, state.

Dimension letters, here and everywhere: `b` batch on this device, `h w c` image or map, `n` tokens (= h*w), `l` labels,
`d` feature width, `e` label embedding width, `k` heads, `v` views, `N` training examples.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import flax.struct
import jax
import numpy as np

# image (b h w c) uint8, or endpoints {"32": (b h w d)}
# labels (b l) float32 in [0, 1] | observed (b l) float32 in {0, 1}
# index (b) int32 | mask (b) float32 in {0, 1}, zero for padding | views (b v h w c), where a system asks for several
Batch = Mapping[str, Any]

# An ml_collections.ConfigDict: attributes by name, values without static types.
Config = Any


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Meta:
    """What a system may know about its training split before seeing a batch.

    Attributes:
      name: of the data set, as results name it.
      classes: the l class names, in label order.
      labels: (N l) uint8 in {0, 1}, zero where not observed.
      observed: (N l) uint8 in {0, 1}: 1 where the label is known to training.
      vectors: (l e) float32 label vectors, or None if none were asked for or found.
    """

    name: str
    classes: tuple[str, ...]
    labels: np.ndarray
    observed: np.ndarray
    vectors: np.ndarray | None = None

    @property
    def num_labels(self) -> int:
        return len(self.classes)


@flax.struct.dataclass
class Outputs:
    """What a system computes for a batch.

    Attributes:
      logits: (b l), before the sigmoid.
      label_features: (b l d), or None.
      attention: (b k l h w), k heads: what explains a label; each map sums to 1 over (h, w). Or None.
      extra: a system's own: pair logits, embeddings, regions.
    """

    logits: jax.Array
    label_features: jax.Array | None = None
    attention: jax.Array | None = None
    extra: Mapping[str, jax.Array] | None = None


@flax.struct.dataclass
class TrainState:
    """Everything that a training step reads and writes; the checkpoint is this pytree.

    Attributes:
      step: () int32, steps done in this stage.
      params: trained by gradient (frozen ones too: their updates are zero).
      variables: the other linen collections: batch_stats, memory, constants.
      opt_state: optax state.
      ema: {"params": .., "batch_stats": ..} averaged, or None.
      rng: a PRNG key in raw form (2,) uint32; every draw folds in `step` first.
    """

    step: jax.Array
    params: Any
    variables: Any
    opt_state: Any
    ema: Any
    rng: jax.Array


class Constant:
    """An array that a linen module holds as a field: hashed and compared by content.

    Modules put it into their variables with `self.variable("constants", name, lambda: jnp.asarray(constant.value))`,
    so that it is part of the checkpoint and never of a gradient.
    """

    def __init__(self, value: Any):
        self.value = np.ascontiguousarray(value)
        self.value.setflags(write=False)

    @cached_property
    def digest(self) -> str:
        head = f"{self.value.dtype.str}{self.value.shape}".encode()
        return hashlib.sha256(head + self.value.tobytes()).hexdigest()

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and self.digest == other.digest

    def __repr__(self) -> str:
        return f"Constant({self.value.dtype}{list(self.value.shape)}, {self.digest[:8]})"
