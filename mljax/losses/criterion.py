"""The classification loss of a run, whatever the system: an element-wise loss and its reduction, or a loss of a whole
batch as single-positive learning has them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Array, Float, Num

from mljax.build import check_keys, keywords
from mljax.errors import UserError, nearest, one_of
from mljax.losses import contrastive, elementwise, weak_labels
from mljax.losses.reduction import REDUCTIONS, reduce
from mljax.types import ArrayLike, Batch


def epr(
    logits: Float[ArrayLike, "b l"],
    labels: Num[ArrayLike, "b l"],
    observed: Num[ArrayLike, "b l"],
    mask: Num[ArrayLike, "b"],
    axis: str | None,
    *,
    expected: float,
    eps: float = 1e-5,
) -> Float[Array, ""]:
    """`weak_labels.epr` of the observed positives."""
    return weak_labels.epr(logits, labels * observed, expected=expected, eps=eps, mask=mask, axis=axis)


def pr(
    logits: Float[ArrayLike, "b l"],
    labels: Num[ArrayLike, "b l"],
    observed: Num[ArrayLike, "b l"],
    mask: Num[ArrayLike, "b"],
    axis: str | None,
    *,
    margin: float = 1.0,
) -> Float[Array, ""]:
    """`contrastive.ranking`, its mean over all entries."""
    values = contrastive.ranking(logits, labels, observed, margin=margin)
    return reduce(values, elementwise.entries("positives", observed, mask), how="mean", axis=axis)


# losses that a config names like the element-wise ones, but of a whole batch: reduced in their own way
BATCH_LOSSES: dict[str, Callable[..., Array]] = {"epr": epr, "pr": pr}


@dataclasses.dataclass(frozen=True)
class Criterion:
    """`criterion(logits, batch)` -> scalar; hashable, so that a linen module may hold it.

    Attributes:
      name: of the loss, one of `elementwise.NAMES` or `BATCH_LOSSES`.
      settings: of the loss, as sorted pairs.
      reduction: "mean" over known entries of the batch, "batch_mean" (sum over labels, mean over images: the scale of a
        summed loss that does not change with the batch), or "sum" over both, as ASL's authors train.
    """

    name: str
    settings: tuple[tuple[str, Any], ...] = ()
    reduction: str = "mean"

    def __call__(
        self,
        logits: Float[ArrayLike, "b l"],
        batch: Batch,
        *,
        labels: Num[ArrayLike, "b l"] | None = None,
        observed: Num[ArrayLike, "b l"] | None = None,
        axis: str | None = None,
    ) -> Float[Array, ""]:
        """The loss of a batch over its known entries, padding left out.

        Args:
          batch: holds labels (b l), observed (b l) and mask (b).
          labels, observed: used instead of the batch's (pseudo-labels).
          axis: the pmap axis, or None.
        """
        truth: Any = batch["labels"] if labels is None else labels
        known: Any = batch["observed"] if observed is None else observed
        logits, mask, settings = logits.astype(truth.dtype), batch["mask"], dict(self.settings)
        if self.name in BATCH_LOSSES:
            return BATCH_LOSSES[self.name](logits, truth, known, mask, axis, **settings)
        values = elementwise.make({"name": self.name, **settings})(logits, truth, known)
        weights = elementwise.entries(self.name, known, mask)
        return reduce(values, weights, how=self.reduction, mask=mask, axis=axis)

    @classmethod
    def from_config(cls, section: Mapping[str, Any]) -> "Criterion":
        """Of `config.loss`: the name, the reduction and the loss's settings, all checked here."""
        settings = dict(section)
        reduction = settings.pop("reduction", "mean")
        one_of("config.loss.reduction", reduction, REDUCTIONS)
        _check(settings)
        name = settings.pop("name")
        return cls(name, tuple(sorted(settings.items())), reduction)


def _check(settings: Mapping[str, Any]) -> None:
    """UserError unless the loss exists, has these settings and gets those that it cannot do without."""
    name = settings.get("name")
    if name not in BATCH_LOSSES:
        if name is not None and name not in elementwise.NAMES:
            hint = nearest(str(name), {*elementwise.NAMES, *BATCH_LOSSES})
            raise UserError(f"There is no {name!r} among the losses{hint}.")
        elementwise.make(settings)
        return
    options = keywords(BATCH_LOSSES[name]).keys() - {"logits", "labels", "observed", "mask", "axis"}
    check_keys(f"config.loss ({name!r})", settings.keys() - {"name"}, options)
    if name == "epr" and "expected" not in settings:
        raise UserError("config.loss ('epr') needs 'expected', the number of positives of an image (COCO: 2.9).")
