"""The classification loss of a run, whatever the system: an element-wise loss of the config plus its reduction, or one
of the losses of a whole batch that single-positive learning has."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from mljax.build import check_keys, keywords
from mljax.errors import UserError, nearest
from mljax.losses import contrastive, elementwise, partial
from mljax.types import Batch

REDUCTIONS = ("mean", "batch_mean", "sum")


def epr(
    logits: jax.Array,
    labels: jax.Array,
    observed: jax.Array,
    mask: jax.Array,
    axis: str | None,
    *,
    expected: float,
    eps: float = 1e-5,
) -> jax.Array:
    """`partial.epr` of the observed positives."""
    return partial.epr(logits, labels * observed, expected=expected, eps=eps, mask=mask, axis=axis)


def pr(
    logits: jax.Array,
    labels: jax.Array,
    observed: jax.Array,
    mask: jax.Array,
    axis: str | None,
    *,
    margin: float = 1.0,
) -> jax.Array:
    """`contrastive.ranking`, its mean over all entries."""
    values = contrastive.ranking(logits, labels, observed, margin=margin)
    return elementwise.reduce(values, elementwise.entries("positives", observed, mask), how="mean", axis=axis)


# losses of a batch: (logits, labels, observed (b l), mask (b), axis, settings) -> (), reduced in their own way
WHOLE: dict[str, Callable[..., jax.Array]] = {"epr": epr, "pr": pr}


@dataclasses.dataclass(frozen=True)
class Criterion:
    """`criterion(logits, batch)` -> scalar; hashable, so that a linen module may hold it.

    Attributes:
      name: of the loss, one of `elementwise.NAMES` or `WHOLE`.
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
        if self.name in WHOLE:
            logits = logits.astype(truth.dtype)
            return WHOLE[self.name](logits, truth, known, batch["mask"], axis, **dict(self.settings))
        loss = elementwise.make({"name": self.name, **dict(self.settings)})
        values = loss(logits.astype(truth.dtype), truth, known)
        weights = elementwise.entries(self.name, known, batch["mask"])
        return elementwise.reduce(values, weights, how=self.reduction, mask=batch["mask"], axis=axis)


def criterion(section: Mapping[str, Any]) -> Criterion:
    """Build `config.loss`: name, reduction and the loss's own settings, checked here once."""
    settings = dict(section)
    reduction = settings.pop("reduction", "mean")
    if reduction not in REDUCTIONS:
        raise UserError(f"config.loss.reduction is {reduction!r}{nearest(reduction, REDUCTIONS)}.")
    _check(settings)
    name = settings.pop("name")
    return Criterion(name, tuple(sorted(settings.items())), reduction)


def _check(settings: Mapping[str, Any]) -> None:
    """A name and settings that exist, and those that a loss cannot do without."""
    name = settings.get("name")
    if name not in WHOLE:
        if name is not None and name not in elementwise.NAMES:
            raise UserError(f"There is no {name!r} among the losses{nearest(str(name), {*elementwise.NAMES, *WHOLE})}.")
        elementwise.make(settings)
        return
    options = keywords(WHOLE[name]).keys() - {"logits", "labels", "observed", "mask", "axis"}
    check_keys(f"config.loss ({name!r})", settings.keys() - {"name"}, options)
    if name == "epr" and "expected" not in settings:
        raise UserError("config.loss ('epr') needs 'expected', the number of positives of an image (COCO: 2.9).")
