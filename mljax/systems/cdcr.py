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

from mljax.errors import UserError
from mljax.losses import weak_labels
from mljax.pipeline.feature_cache import view as parse_view
from mljax.systems import _around
from mljax.types import Batch, Constant, Meta, Outputs


class CDCR(nn.Module):
    """A system that trains on the candidates it believes; settings are at `cdcr`.

    Their weights are variables["memory"]["weights"], (N l) uint8 in {0, 1}.
    """

    backbone: nn.Module
    net: Any
    candidates: Constant
    alpha: float
    difficulty_aware: bool
    start: int
    view: str
    dtype: Any = jnp.float32
    axis: str | None = None

    def setup(self) -> None:
        self.weights = self.variable("memory", "weights", jnp.ones, self.candidates.value.shape, jnp.uint8)

    def __call__(self, batch: Batch, *, train: bool = False) -> Outputs:
        return self.net(batch, train=train)

    def loss(self, batch: Batch, step: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        weights = self.weights.value[batch["index"]].astype(jnp.float32)
        loss, terms = self.net.loss({**batch, "observed": batch["observed"] * weights}, step)
        return loss, {**terms, "left_out": jnp.mean(jnp.sum(1 - weights, axis=-1))}

    def scores(self, batch: Batch) -> jax.Array:
        return _around.scores(self.net, batch)

    def refresh(self, variables: Mapping[str, Any], score: Any, epoch: int) -> dict[str, Any]:
        """Believe each candidate of the training split or not, until the next epoch."""
        variables = _around.refresh(self.net, variables, score, epoch)
        if epoch < self.start:
            return variables
        logits = np.asarray(score("train", self.view or None)["logits"], np.float32)
        weights = weak_labels.candidate_weights(
            jax.nn.sigmoid(logits),
            jnp.asarray(self.candidates.value, jnp.float32),
            alpha=self.alpha,
            difficulty_aware=self.difficulty_aware,
        )
        return {**variables, "memory": {**variables["memory"], "weights": np.asarray(weights, np.uint8)}}


def cdcr(
    *,
    backbone: nn.Module,
    criterion: Any,
    meta: Meta,
    net: Any = None,
    alpha: float = 0.6,
    difficulty_aware: bool = False,
    start: int = 0,
    view: str = "",
    dtype: Any = jnp.float32,
    axis: str | None = None,
) -> CDCR:
    """CDCR for a data set of candidate labels.

    Args:
      criterion: of the inner system; the authors' is BCE, summed.
      net: the section of the system around which it works; None: the baseline.
      alpha: a candidate counts from this probability on.
      difficulty_aware: compare with the mean probability of the class instead, see `weak_labels.candidate_weights`.
      start: the first epoch before which candidates are weighed; until then all count. A large one makes a stage of
        plain training.
      view: the weak view that is scored, e.g. "224:flip"; empty: the evaluation's.
    Raises:
      UserError: a value out of its range, or no view.
    Reference: systems.md's facts of the authors' code, which has two stages: plain BCE, then this from its EMA.
    Differs from the authors' code: the weak view is the same in every epoch, where theirs is mirrored at random; the
      regulariser that they compute and do not use is left out.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"config.system.alpha is {alpha}; it is a probability, from 0 to 1.")
    if start < 0:
        raise UserError(f"config.system.start is {start}; it is an epoch, at least 0.")
    if view:
        parse_view(view)
    common = {"backbone": backbone, "meta": meta, "dtype": dtype, "axis": axis}
    system = _around.inner(net or {"name": "baseline"}, criterion=criterion, **common)
    return CDCR(backbone, system, Constant(meta.labels), alpha, difficulty_aware, start, view, dtype, axis)


NAMES = {"cdcr": cdcr}
