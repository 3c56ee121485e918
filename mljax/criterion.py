"""The classification loss of a run: an element-wise loss of the config plus its reduction, whatever the system."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from mljax import losses
from mljax.errors import UserError, nearest
from mljax.types import Batch

REDUCTIONS = ("mean", "batch_mean", "sum")


@dataclasses.dataclass(frozen=True)
class Criterion:
    """`criterion(logits, batch)` -> scalar; hashable, so that a linen module may hold it.

    Attributes:
      name: of the loss, one of `losses.NAMES`.
      settings: of the loss, as sorted pairs.
      reduction: "mean" over known entries of the batch, "batch_mean" (sum over labels, mean over images: the scale of a
        summed loss that does not change with the batch), or "sum" over both, as ASL's authors train.
    """

    name: str
    settings: tuple[tuple[str, Any], ...] = ()
    reduction: str = "mean"

    def __call__(
        self,
        logits: jax.Array,
        batch: Batch,
        *,
        labels: jax.Array | None = None,
        observed: jax.Array | None = None,
        axis: str | None = None,
    ) -> jax.Array:
        """The loss of a batch over its known entries, padding left out.

        Args:
          logits: (b l).
          batch: holds labels (b l), observed (b l) and mask (b).
          labels, observed: take the place of the batch's own (pseudo-labels).
          axis: the pmap axis, or None.
        """
        truth: Any = batch["labels"] if labels is None else labels
        known: Any = batch["observed"] if observed is None else observed
        loss = losses.make({"name": self.name, **dict(self.settings)})
        values = loss(logits.astype(truth.dtype), truth, known)
        weights = losses.entries(self.name, known, batch["mask"])
        return losses.reduce(values, weights, how=self.reduction, mask=batch["mask"], axis=axis)


def criterion(section: Mapping[str, Any]) -> Criterion:
    """Build `config.loss`: name, reduction and the loss's own settings, checked here once."""
    settings = dict(section)
    reduction = settings.pop("reduction", "mean")
    if reduction not in REDUCTIONS:
        raise UserError(f"config.loss.reduction is {reduction!r}{nearest(reduction, REDUCTIONS)}.")
    losses.make(settings)
    name = settings.pop("name")
    return Criterion(name, tuple(sorted(settings.items())), reduction)
