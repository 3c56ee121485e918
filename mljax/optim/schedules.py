"""Schedules of the learning rate: what `config.optim.schedule` names, each a function whose keywords are its settings.

Settings count in epochs, curves (`mljax.optim.curves`) in updates; `Steps` converts one to the other.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from mljax.build import checked
from mljax.errors import UserError, one_of
from mljax.optim import curves
from mljax.optim.curves import Curve

WHERE = "config.optim.schedule"
METRICS = ("mAP", "CF1", "OF1", "loss")  # of an evaluation, that a plateau schedule can watch
DEFAULT = {"name": "one_cycle"}  # of a config.optim that names no schedule


@dataclasses.dataclass(frozen=True)
class Steps:
    """How long a run is, for a schedule.

    Attributes:
      lr: the peak, `config.optim.lr`.
      total: batches of the run; per_epoch: batches of an epoch. None: not known.
      accumulate: batches of an update; schedules count updates.
    """

    lr: float
    total: int | None = None
    per_epoch: int | None = None
    accumulate: int = 1

    def updates(self, epochs: float) -> int:
        """Epochs as updates."""
        if not self.per_epoch:
            raise UserError("The schedule counts in epochs and needs steps_per_epoch.")
        return round(epochs * self.per_epoch / self.accumulate)

    def length(self, name: str, epochs: float | None) -> int:
        """The updates of a whole schedule: of so many epochs, or of the run.

        Raises:
          UserError: the schedule is shorter than the run, or nothing says how long either is.
        """
        run = self.total // self.accumulate if self.total else None
        total = run if epochs is None else self.updates(epochs)
        if total is not None and run is not None and run > total:
            raise UserError(
                f"{WHERE}.epochs is {epochs:g}, less than the epochs of the run; give at least those, or leave it out."
            )
        if not total:
            raise UserError(f"The schedule {name!r} needs total_steps of at least one update.")
        return total


class Schedule(NamedTuple):
    """A schedule of a run.

    Attributes:
      rate: the learning rate of an update.
      momentum: the first momentum of an update (beta1 of Adam), where the schedule sets it too.
      mode: "max" or "min" where the rate also falls on a plateau of an evaluation's metric (`plateau_update`).
    """

    rate: Curve
    momentum: Curve | None = None
    mode: str = ""


def one_cycle(
    steps: Steps,
    /,
    *,
    epochs: float | None = None,
    pct_start: float = 0.2,
    div: float = 25.0,
    final_div: float = 1e4,
    beta1_cycle: bool = True,
) -> Schedule:
    """Cosine up from lr/div to lr, then cosine down to lr/div/final_div, as PyTorch's OneCycleLR.

    Args:
      epochs: of the whole cycle where the run stops earlier (ASL: 80 of which 41 are run); None: those of the run.
      pct_start: share of the cycle that rises.
      beta1_cycle: beta1 of Adam, or a momentum of SGD above 0, runs .95 -> .85 -> .95 in place of its own value.
    """
    total = steps.length("one_cycle", epochs)
    if not 0 <= pct_start <= 1:
        raise UserError(f"{WHERE}.pct_start is {pct_start}; it is a share of the run, between 0 and 1.")
    rate = curves.one_cycle(steps.lr, total, pct_start, div, final_div)
    return Schedule(rate, curves.one_cycle_momentum(total, pct_start) if beta1_cycle else None)


def step(
    steps: Steps,
    /,
    *,
    every: float | None = None,
    boundaries: Sequence[float] = (),
    factor: float = 0.1,
    warmup_epochs: float = 0.0,
    warmup_start: float = 0.1,
) -> Schedule:
    """The rate falls by a factor every so many epochs, or at given epochs, as PyTorch's StepLR and MultiStepLR.

    Args:
      every: epochs between two falls. boundaries: the epochs of the falls. One of the two is given.
      warmup_epochs, warmup_start: how long the rate grows linearly at first, and from which share of it.
    """
    if (every is None) == (not boundaries):
        raise UserError(f"The schedule 'step' needs either {WHERE}.every or {WHERE}.boundaries, in epochs.")
    drop = None if every is None else max(steps.updates(every), 1)
    rate = curves.step_decay(steps.lr, every=drop, boundaries=[steps.updates(b) for b in boundaries], factor=factor)
    return Schedule(curves.warmed_up(rate, steps.updates(warmup_epochs), warmup_start) if warmup_epochs else rate)


def constant(steps: Steps, /) -> Schedule:
    """The same rate throughout."""
    return Schedule(curves.constant(steps.lr))


def warmup_cosine(
    steps: Steps,
    /,
    *,
    epochs: float | None = None,
    warmup_epochs: float = 0.0,
    warmup_start: float = 0.1,
    floor: float = 0.0,
) -> Schedule:
    """Linear growth, then a cosine down to a share of the rate.

    Args:
      epochs: of the whole schedule where the run stops earlier; None: those of the run.
      warmup_epochs, warmup_start: how long the rate grows, and from which share of it.
      floor: the share of the rate at the end.
    """
    total = steps.length("warmup_cosine", epochs)
    warmup = steps.updates(warmup_epochs) if warmup_epochs else 0
    return Schedule(curves.warmup_cosine(steps.lr, total, warmup, warmup_start, floor))


def plateau(
    steps: Steps,
    /,
    *,
    metric: str = "mAP",
    mode: str = "max",
    factor: float = 0.1,
    patience: int = 10,
    threshold: float = 1e-4,
    cooldown: int = 0,
) -> Schedule:
    """The rate falls by a factor after evaluations without a better metric, as PyTorch's ReduceLROnPlateau.

    Args:
      metric: of an evaluation, that is watched: one of `METRICS`.
      mode: whether more of it is better ("max") or less ("min").
      factor, patience, threshold, cooldown: see `plateau_update`, which the trainer calls after an evaluation.
    """
    del factor, patience, threshold, cooldown
    one_of(f"{WHERE}.metric", metric, METRICS)
    one_of(f"{WHERE}.mode", mode, ("max", "min"))
    return Schedule(curves.constant(steps.lr), mode=mode)


NAMES: dict[str, Callable[..., Schedule]] = {
    "one_cycle": one_cycle,
    "step": step,
    "constant": constant,
    "warmup_cosine": warmup_cosine,
    "plateau": plateau,
}


def chosen(section: Mapping[str, Any]) -> tuple[Callable[..., Schedule], dict[str, Any]]:
    """The schedule that `config.optim.schedule` names, and its settings.

    Raises:
      UserError: no such schedule, or a setting that it does not have.
    """
    return checked("optim.schedules", section, where=WHERE)


def make_schedule(section: Mapping[str, Any], steps: Steps) -> Schedule:
    """The schedule of a run that `config.optim.schedule` describes.

    Raises:
      UserError: as `chosen`, or a value out of range.
    """
    constructor, settings = chosen(section)
    return constructor(steps, **settings)
