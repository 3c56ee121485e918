"""Schedules: step (int, 0 for the first update) -> value; pure, in float32, usable inside jit.

Reference: Smith and Topin, "Super-Convergence", 2018 (one cycle). The arithmetic is that of the PyTorch
namesakes, because the recipes of the papers were tuned with it; tests/parity compares them live.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from mljax.errors import UserError, nearest

Schedule = Callable[[Any], Any]

SCHEDULES = ("one_cycle", "step", "constant", "warmup_cosine", "plateau")
LOW, HIGH = 0.85, 0.95  # of a cycled momentum


def constant(value: float) -> Schedule:
    return lambda step: jnp.full(jnp.shape(step), value, jnp.float32)


def one_cycle(
    peak: float, total_steps: int, pct_start: float = 0.2, div: float = 25.0, final_div: float = 1e4
) -> Schedule:
    """Cosine up from peak/div to peak, then cosine down to peak/div/final_div.

    The peak is at step pct_start*total_steps - 1 (which need not be whole) and the end at step
    total_steps - 1, so that lr(0) = peak/div and lr(total_steps-1) = peak/div/final_div.
    Differs from torch's OneCycleLR: after the end the last value holds; a peak at step 0 is allowed.
    """
    return _cycle(peak / div, peak, peak / div / final_div, total_steps, pct_start)


def one_cycle_momentum(total_steps: int, pct_start: float = 0.2, low: float = LOW, high: float = HIGH) -> Schedule:
    """The other half of `one_cycle`: Adam's beta1 or the momentum of SGD, high -> low -> high."""
    return _cycle(high, low, high, total_steps, pct_start)


def _cycle(start: float, peak: float, end: float, total_steps: int, pct_start: float) -> Schedule:
    turn, last = float(pct_start * total_steps) - 1.0, float(total_steps - 1)

    def anneal(a: float, b: float, part: Any) -> Any:
        return b + (a - b) / 2 * (1 + jnp.cos(jnp.pi * jnp.clip(part, 0.0, 1.0)))

    def value(step: Any) -> Any:
        step = jnp.asarray(step, jnp.float32)
        rise = anneal(start, peak, step / turn if turn > 0 else 1.0 + 0 * step)
        fall = anneal(peak, end, (step - turn) / max(last - turn, 1e-6))
        return jnp.where(step <= turn, rise, fall)

    return value


def step_decay(
    base: float, *, every: int | None = None, boundaries: Sequence[int] = (), factor: float = 0.1
) -> Schedule:
    """base * factor^(number of drops so far), as StepLR (`every`) or MultiStepLR (`boundaries`), in steps."""

    def value(step: Any) -> Any:
        step = jnp.asarray(step, jnp.int32)
        drops = jnp.zeros_like(step) if every is None else step // every
        for boundary in boundaries:
            drops = drops + (step >= boundary).astype(jnp.int32)
        return base * jnp.power(jnp.float32(factor), drops.astype(jnp.float32))

    return value


def warmup_cosine(peak: float, total_steps: int, warmup_steps: int, start: float = 0.1, floor: float = 0.0) -> Schedule:
    """Linear from start*peak at step 0 to peak at `warmup_steps`, cosine to floor*peak at `total_steps`."""

    def value(step: Any) -> Any:
        step = jnp.asarray(step, jnp.float32)
        rise = peak * (start + (1 - start) * step / max(warmup_steps, 1))
        part = jnp.clip((step - warmup_steps) / max(total_steps - warmup_steps, 1), 0.0, 1.0)
        fall = peak * (floor + (1 - floor) / 2 * (1 + jnp.cos(jnp.pi * part)))
        return jnp.where(step < warmup_steps, rise, fall)

    return value


def warmed_up(schedule: Schedule, warmup_steps: int, start: float = 0.1) -> Schedule:
    """A schedule times a share that grows linearly from `start` at step 0 to 1 at `warmup_steps`."""

    def value(step: Any) -> Any:
        share = jnp.clip(jnp.asarray(step, jnp.float32) / max(warmup_steps, 1), 0.0, 1.0)
        return schedule(step) * (start + (1 - start) * share)

    return value


def make_schedule(
    schedule: str,
    lr: float,
    *,
    total_steps: int | None = None,
    steps_per_epoch: int | None = None,
    schedule_epochs: float | None = None,
    accumulate: int = 1,
    pct_start: float = 0.2,
    div: float = 25.0,
    final_div: float = 1e4,
    every: float | None = None,
    boundaries: Sequence[float] = (),
    factor: float = 0.1,
    warmup_epochs: float = 0.0,
    warmup_start: float = 0.1,
    floor: float = 0.0,
) -> tuple[Schedule, int | None]:
    """A schedule by name; its arguments are those of `optimizer`.

    Returns:
      (schedule, total): a function of the number of updates done, and the updates of the whole schedule.
    """
    if schedule not in SCHEDULES:
        raise UserError(f"config.optim.schedule is {schedule!r}, which is no schedule{nearest(schedule, SCHEDULES)}.")

    def updates(epochs: float) -> int:
        if not steps_per_epoch:
            raise UserError(f"The schedule {schedule!r} counts in epochs and needs steps_per_epoch.")
        return round(epochs * steps_per_epoch / accumulate)

    total = total_steps // accumulate if total_steps else None
    if schedule_epochs is not None:
        run, total = total, updates(schedule_epochs)
        if run is not None and run > total:
            raise UserError(
                f"config.optim.schedule_epochs is {schedule_epochs:g}, less than the epochs of the"
                " run; give at least those."
            )
    if schedule in ("constant", "plateau"):
        return constant(lr), total
    if schedule == "step":
        if (every is None) == (not boundaries):
            raise UserError(
                "The schedule 'step' needs either config.optim.every or config.optim.boundaries, in epochs."
            )
        drop = None if every is None else max(updates(every), 1)
        decayed = step_decay(lr, every=drop, boundaries=[updates(b) for b in boundaries], factor=factor)
        return (warmed_up(decayed, updates(warmup_epochs), warmup_start) if warmup_epochs else decayed), total
    if not total:
        raise UserError(f"The schedule {schedule!r} needs total_steps of at least one update.")
    if schedule == "one_cycle":
        if not 0 <= pct_start <= 1:
            raise UserError(f"config.optim.pct_start is {pct_start}; it is a share of the run, between 0 and 1.")
        return one_cycle(lr, total, pct_start, div, final_div), total
    return warmup_cosine(lr, total, updates(warmup_epochs) if warmup_epochs else 0, warmup_start, floor), total
