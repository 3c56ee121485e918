"""What the packages hand to each other: batches, what is known of a training split, outputs, state; and contracts.

Dimension letters, here and everywhere: `b` batch on this device, `h w c` image or map, `n` tokens (= h*w), `l` labels,
`d` feature width, `e` label embedding width, `k` heads, `v` views, `N` training examples.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import flax.struct
import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, UInt8, UInt32

# as in Float[ArrayLike, "b l"]: on a device or on the host, since JAX takes both; a type checker sees the first
if TYPE_CHECKING:
    ArrayLike = jax.Array
else:
    ArrayLike = jax.Array | np.ndarray

# image (b h w c) uint8, or endpoints {"32": (b h w d)}
# labels (b l) float32 in [0, 1] | observed (b l) float32 in {0, 1}
# index (b) int32 | mask (b) float32 in {0, 1}, zero for padding | views (b v h w c), where a system asks for several
Batch = Mapping[str, Any]

# An ml_collections.ConfigDict: attributes by name, values without static types.
Config = Any


def _head(array: np.ndarray) -> bytes:
    return f"{array.dtype.str}{array.shape}".encode()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Meta:
    """What a system may know about its training split before seeing a batch.

    Attributes:
      name: of the data set, as results name it.
      classes: the l class names, in label order.
      labels: in {0, 1}, zero where not observed.
      observed: 1 where the label is known to training, else 0.
      vectors: of the labels; None where the config names none.

    Hashed and compared by content, so that a linen module may hold it as a field and compute its constants from it.
    """

    name: str
    classes: tuple[str, ...]
    labels: UInt8[np.ndarray, "N l"]
    observed: UInt8[np.ndarray, "N l"]
    vectors: Float32[np.ndarray, "l e"] | None = None

    @property
    def num_labels(self) -> int:
        return len(self.classes)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that it holds."""
        digest = hashlib.sha256(repr((self.name, self.classes)).encode())
        for array in (self.labels, self.observed, self.vectors):
            digest.update(b"none" if array is None else _head(array) + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Meta) and (self is other or self.digest == other.digest)

    def __repr__(self) -> str:
        return f"Meta({self.name!r}, {len(self.labels)} images, {self.num_labels} labels)"


@flax.struct.dataclass
class Outputs:
    """What a system computes for a batch.

    Attributes:
      logits: before the sigmoid.
      attention: where a system looks for a label, by k heads; each map sums to 1 over (h, w).
      extra: what only this system has: pair logits, embeddings, regions.
    """

    logits: Float[Array, "b l"]
    label_features: Float[Array, "b l d"] | None = None
    attention: Float[Array, "b k l h w"] | None = None
    extra: Mapping[str, Array] | None = None


@flax.struct.dataclass
class TrainState:
    """Everything that a training step reads and writes; the checkpoint is this pytree.

    Attributes:
      step: steps done in this stage.
      params: trained by gradient (frozen ones too: their updates are zero).
      variables: the other linen collections: batch_stats, memory, constants.
      opt_state: optax state.
      ema: {"params": .., "batch_stats": ..} averaged, or None.
      rng: a PRNG key in raw form; every draw folds in `step` first.
    """

    step: Int32[Array, ""]
    params: Any
    variables: Any
    opt_state: Any
    ema: Any
    rng: UInt32[Array, "2"]


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
        return hashlib.sha256(_head(self.value) + self.value.tobytes()).hexdigest()

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and self.digest == other.digest

    def __repr__(self) -> str:
        return f"Constant({self.value.dtype}{list(self.value.shape)}, {self.digest[:8]})"


# --- contracts --------------------------------------------------------------------------------------------------------


@runtime_checkable
class Backbone(Protocol):
    """A linen module in mljax/backbones: images -> feature maps.

    Its fields are the keys of `config.backbone`, written once; `mljax.experiment` fills in `dtype` and `axis`. `NAMES`
    in its file holds the class, or a `functools.partial` of it for a variant, as `partial(ResNet, depths=(3, 4, 6, 3))`
    is resnet50. The file may also offer `RECORDS` (published weights), `convert(state) -> variables` (the authors'
    names) and `adapt(tree, model)` (tables interpolated to another input size).

    Attributes:
      frozen_parameters: regular expressions, searched in parameter paths such as "stem/conv/kernel"; what they match
        gets no updates and no weight decay.
    """

    @property
    def frozen_parameters(self) -> tuple[str, ...]: ...

    def __call__(self, image: Float[Array, "b h w c"], *, train: bool) -> dict[str, Float[Array, "b _ _ _"]]:
        """Normalised images -> {stride: (b h/stride w/stride d)}."""
        ...


@runtime_checkable
class System(Protocol):
    """A linen module in mljax/systems: what every system has. What it may have besides is in `SystemHooks`.

    Its fields are the keys of `config.system`, each with its default and explained in the docstring of the class.
    Those of `PROVIDED` that it declares are filled in by `mljax.experiment`. A setting that is out of range, and
    missing data that the system cannot do without, are a `UserError` from `__post_init__`, before any training.
    """

    backbone: Any

    def __call__(self, batch: Batch, *, train: bool = False) -> Outputs:
        """The outputs of a batch; in evaluation mode those of an image do not depend on the rest of the batch."""
        ...

    def loss(self, batch: Batch, step: Int32[Array, ""]) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """(loss, terms to log) of a training batch: the mean over devices is the loss of the global batch."""
        ...


PROVIDED = ("backbone", "criterion", "meta", "dtype", "axis", "steps_per_epoch")


class SystemHooks(Protocol):
    """What a system may offer besides; where it does not, the trainer does the usual.

    Attributes:
      refresh_every: epochs between two calls of `refresh`; 1 if absent.
      needs_image: a sentence that says why features cannot be cached for this system; empty or absent if they can.
    """

    refresh_every: int
    needs_image: str

    def scores(self, batch: Batch) -> Float[Array, "b l"]:
        """What the paper predicts with, on the scale of logits, where it is not the logits."""
        ...

    def refresh(self, variables: Mapping[str, Any], score: Any, epoch: int) -> dict[str, Any]:
        """The variables after a pass over the whole training split, before an epoch.

        Args:
          variables: all collections but params, as host arrays.
          score: `score(split="train", view=None, entries=None)` -> {"logits": (N l), "label_features": ..}.
          epoch: from 0.
        """
        ...

    def known_labels(self, index: Int[np.ndarray, "N"]) -> Bool[np.ndarray, "N l"]:
        """Labels that an evaluation gives to the system as input, of images by their index; they are not scored."""
        ...


def missing_members(kind: str, cls: type) -> list[str]:
    """What a class lacks of the contract of its kind, "systems" or "backbones"."""
    required = {"systems": ("backbone", "__call__", "loss"), "backbones": ("frozen_parameters", "__call__")}
    fields = {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    return [name for name in required.get(kind, ()) if name not in fields and not hasattr(cls, name)]
