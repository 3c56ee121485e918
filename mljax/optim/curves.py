"""Curves of a rate or a momentum: step (int, 0 for the first update) -> value; pure, in float32, usable inside jit.

Reference: Smith and Topin, "Super-Convergence", 2018 (one cycle). The arithmetic is that of the PyTorch
namesakes, because the recipes of the papers were tuned with it; tests/parity compares them live.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

Curve = Callable[[Any], Any]

LOW, HIGH = 0.85, 0.95  # of a cycled momentum


def constant(value: float) -> Curve:
    return lambda step: jnp.full(jnp.shape(step), value, jnp.float32)


def one_cycle(
    peak: float, total_steps: int, pct_start: float = 0.2, div: float = 25.0, final_div: float = 1e4
) -> Curve:
    """Cosine up from peak/div to peak, then cosine down to peak/div/final_div.

    The peak is at step pct_start*total_steps - 1 (which need not be whole) and the end at step
    total_steps - 1, so that lr(0) = peak/div and lr(total_steps-1) = peak/div/final_div.
    Differs from torch's OneCycleLR: after the end the last value holds; a peak at step 0 is allowed.
    """
    return _cycle(peak / div, peak, peak / div / final_div, total_steps, pct_start)


def one_cycle_momentum(total_steps: int, pct_start: float = 0.2, low: float = LOW, high: float = HIGH) -> Curve:
    """The other half of `one_cycle`: Adam's beta1 or the momentum of SGD, high -> low -> high."""
    return _cycle(high, low, high, total_steps, pct_start)


def _cycle(start: float, peak: float, end: float, total_steps: int, pct_start: float) -> Curve:
    turn, last = float(pct_start * total_steps) - 1.0, float(total_steps - 1)

    def anneal(a: float, b: float, part: Any) -> Any:
        return b + (a - b) / 2 * (1 + jnp.cos(jnp.pi * jnp.clip(part, 0.0, 1.0)))

    def value(step: Any) -> Any:
        step = jnp.asarray(step, jnp.float32)
        rise = anneal(start, peak, step / turn if turn > 0 else 1.0 + 0 * step)
        fall = anneal(peak, end, (step - turn) / max(last - turn, 1e-6))
        return jnp.where(step <= turn, rise, fall)

    return value


def step_decay(base: float, *, every: int | None = None, boundaries: Sequence[int] = (), factor: float = 0.1) -> Curve:
    """base * factor^(number of drops so far), as StepLR (`every`) or MultiStepLR (`boundaries`), in steps."""

    def value(step: Any) -> Any:
        step = jnp.asarray(step, jnp.int32)
        drops = jnp.zeros_like(step) if every is None else step // every
        for boundary in boundaries:
            drops = drops + (step >= boundary).astype(jnp.int32)
        return base * jnp.power(jnp.float32(factor), drops.astype(jnp.float32))

    return value


def warmup_cosine(peak: float, total_steps: int, warmup_steps: int, start: float = 0.1, floor: float = 0.0) -> Curve:
    """Linear from start*peak at step 0 to peak at `warmup_steps`, cosine to floor*peak at `total_steps`."""

    def value(step: Any) -> Any:
        step = jnp.asarray(step, jnp.float32)
        rise = peak * (start + (1 - start) * step / max(warmup_steps, 1))
        part = jnp.clip((step - warmup_steps) / max(total_steps - warmup_steps, 1), 0.0, 1.0)
        fall = peak * (floor + (1 - floor) / 2 * (1 + jnp.cos(jnp.pi * part)))
        return jnp.where(step < warmup_steps, rise, fall)

    return value


def warmed_up(curve: Curve, warmup_steps: int, start: float = 0.1) -> Curve:
    """A curve times a share that grows linearly from `start` at step 0 to 1 at `warmup_steps`."""

    def value(step: Any) -> Any:
        share = jnp.clip(jnp.asarray(step, jnp.float32) / max(warmup_steps, 1), 0.0, 1.0)
        return curve(step) * (start + (1 - start) * share)

    return value
