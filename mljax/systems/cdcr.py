"""CDCR: partial multi-label learning by curriculum disambiguation, around any system (repository xiemk/PML-CDCR).

Labels are candidates: all true ones, and false ones among them (config.observe = {"name": "candidates"}). Before each
epoch the model scores a weakly augmented view of every training image, and candidates that it does not believe are left
out of the loss of that epoch's strongly augmented view.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mljax.errors import UserError
from mljax.losses import weak_labels
from mljax.losses.criterion import Criterion
from mljax.pipeline.feature_cache import view as parse_view
from mljax.systems import _around
from mljax.types import Batch, Meta, Outputs


class CDCR(nn.Module):
    """CDCR around a system: candidate labels that the model does not believe are left out of the loss.

    Which candidates count is variables["memory"]["weights"], (N l) uint8 in {0, 1}. The authors train in two stages:
    plain BCE, summed, then this, from the averaged weights of the first.

    Attributes:
      criterion: of the inner system.
      net: the section of the system around which it works; None: the baseline.
      alpha: a candidate counts from this probability on.
      difficulty_aware: compare with the mean probability of the class instead, see `weak_labels.candidate_weights`.
      start: the first epoch before which candidates are weighed; until then all count. A large one makes a stage of
        plain training.
      view: the weak view that is scored, e.g. "224:flip"; empty: the evaluation's.

    Differs from the authors' code (github.com/xiemk/PML-CDCR): the weak view is the same in every epoch, where theirs
      is mirrored at random; the regulariser that they compute and do not use is left out.
    """

    backbone: nn.Module
    criterion: Criterion
    meta: Meta
    net: Any = None
    alpha: float = 0.6
    difficulty_aware: bool = False
    start: int = 0
    view: str = ""
    dtype: Any = jnp.float32
    axis: str | None = None
    steps_per_epoch: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UserError(f"config.system.alpha is {self.alpha}; expected a probability, from 0 to 1.")
        if self.start < 0:
            raise UserError(f"config.system.start is {self.start}; expected an epoch, at least 0.")
        if self.view:
            parse_view(self.view)
        _around.build_net(self, self.criterion)
        super().__post_init__()

    def setup(self) -> None:
        self.weights = self.variable("memory", "weights", jnp.ones, self.meta.labels.shape, jnp.uint8)

    def __call__(self, batch: Batch, *, train: bool = False) -> Outputs:
        return self.net(batch, train=train)

    def loss(self, batch: Batch, step: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        weights = self.weights.value[batch["index"]].astype(jnp.float32)
        loss, terms = self.net.loss({**batch, "observed": batch["observed"] * weights}, step)
        return loss, {**terms, "left_out": jnp.mean(jnp.sum(1 - weights, axis=-1))}

    def scores(self, batch: Batch) -> Float[Array, "b l"]:
        return _around.scores(self.net, batch)

    def refresh(self, variables: Mapping[str, Any], score: Any, epoch: int) -> dict[str, Any]:
        """Believe each candidate of the training split or not, until the next epoch."""
        variables = _around.refresh(self.net, variables, score, epoch)
        if epoch < self.start:
            return variables
        logits = np.asarray(score("train", self.view or None)["logits"], np.float32)
        weights = weak_labels.candidate_weights(
            jax.nn.sigmoid(logits),
            jnp.asarray(self.meta.labels, jnp.float32),
            alpha=self.alpha,
            difficulty_aware=self.difficulty_aware,
        )
        return {**variables, "memory": {**variables["memory"], "weights": np.asarray(weights, np.uint8)}}


NAMES = {"cdcr": CDCR}
