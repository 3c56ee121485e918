"""The parts that an optimiser is chained of, as optax transformations with torch's arithmetic.

Reference: Kingma and Ba, "Adam", ICLR 2015, algorithm 1; Loshchilov and Hutter, "Decoupled Weight Decay
Regularization", ICLR 2019, algorithm 2.
Differs from optax: the first moment's decay may depend on the step; 1 - b^t is computed with expm1 (optax loses up
to 3e-5 of the first updates in float32); clipping adds 1e-6 to the norm.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mljax.errors import UserError
from mljax.optim.curves import Curve, constant
from mljax.optim.groups import Leaf
from mljax.trees import map_named


class Rule(NamedTuple):
    """An update rule, and whether weight decay is part of the gradient (coupled) or of the update (decoupled)."""

    transformation: optax.GradientTransformation
    coupled: bool


def adam(
    cycle: Curve | None, /, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, coupled: bool = True
) -> Rule:
    """Adam; weight decay is added to the gradient, as in the papers' recipes, unless coupled=False.

    Args:
      cycle: a momentum of the schedule, in place of betas[0]; None: betas[0].
    """
    if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
        raise UserError(f"config.optim.betas is {tuple(betas)}; expected two numbers from 0 to below 1.")
    first = constant(betas[0]) if cycle is None or betas[0] == 0 else cycle
    return Rule(scale_by_adam(first, betas[1], eps), coupled)


def adamw(
    cycle: Curve | None, /, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, coupled: bool = False
) -> Rule:
    """AdamW: `adam` with decoupled weight decay, scaled by the rate."""
    return adam(cycle, betas=betas, eps=eps, coupled=coupled)


def sgd(cycle: Curve | None, /, *, momentum: float = 0.9, nesterov: bool = False, coupled: bool = True) -> Rule:
    """SGD with momentum; a momentum of 0 is plain gradient descent."""
    if not 0 <= momentum < 1:
        raise UserError(f"config.optim.momentum is {momentum}; expected a number from 0 to below 1.")
    if nesterov and momentum == 0:
        raise UserError("config.optim.nesterov needs a momentum above 0; set config.optim.momentum.")
    if momentum == 0:
        return Rule(optax.identity(), coupled)
    curve = constant(momentum) if cycle is None else cycle
    return Rule(scale_by_momentum(curve, nesterov), coupled)


NAMES: dict[str, Callable[..., Rule]] = {"adam": adam, "adamw": adamw, "sgd": sgd}


class MomentumState(NamedTuple):
    count: Any
    trace: Any


class RateState(NamedTuple):
    count: Any
    rate: Any  # of the last update


class AccumulateState(NamedTuple):
    count: Any  # batches since the last update
    total: Any  # their gradients, each divided by the number of batches
    inner: Any


def scale_by_adam(beta1: Curve, beta2: float, eps: float) -> optax.GradientTransformation:
    """Adam with a beta1 that depends on the step t; its correction is 1 - beta1(t)^t of the present beta1."""

    def init(params: Any) -> optax.ScaleByAdamState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.copy, zeros))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        b1 = jnp.asarray(beta1(state.count))
        rest = jnp.ones((), jnp.float32) - b1
        count = optax.safe_increment(state.count)
        t = jnp.asarray(count, jnp.float32)
        mu = jax.tree.map(lambda m, g: m + rest.astype(g.dtype) * (g - m), state.mu, updates)
        nu = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * g * g, state.nu, updates)
        # expm1 keeps the digits that 1 - b^t loses in float32 while b^t is near 1
        fix1 = jnp.where(b1 > 0, -jnp.expm1(t * jnp.log(jnp.maximum(b1, 1e-30))), 1.0)
        fix2 = jnp.sqrt(-jnp.expm1(t * float(np.log(beta2)))) if beta2 > 0 else jnp.ones((), jnp.float32)
        scaled = jax.tree.map(
            lambda m, v: m / fix1.astype(m.dtype) / (jnp.sqrt(v) / fix2.astype(v.dtype) + eps), mu, nu
        )
        return scaled, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def scale_by_momentum(momentum: Curve, nesterov: bool = False) -> optax.GradientTransformation:
    """v <- m v + g, then v (or g + m v with nesterov): torch's SGD, without dampening."""

    def init(params: Any) -> MomentumState:
        return MomentumState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        m = momentum(state.count)
        trace = jax.tree.map(lambda v, g: m.astype(v.dtype) * v + g, state.trace, updates)
        ahead = jax.tree.map(lambda v, g: g + m.astype(v.dtype) * v, trace, updates) if nesterov else trace
        return ahead, MomentumState(optax.safe_increment(state.count), trace)

    return optax.GradientTransformation(init, update)


def clip(norm: float) -> optax.GradientTransformation:
    """g * min(1, norm / (|g| + 1e-6)), |g| over all leaves: torch's clip_grad_norm_."""

    def update(updates: Any, params: Any = None) -> Any:
        del params
        factor = jnp.minimum(1.0, norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates)

    return optax.stateless(update)


def add_decay(leaves: Mapping[str, Leaf]) -> optax.GradientTransformation:
    """u + weight_decay * parameter, with each parameter's own weight decay."""

    def update(updates: Any, params: Any = None) -> Any:
        def one(path: str, u: Any, p: Any) -> Any:
            decay = leaves[path].weight_decay
            return u + decay * p if decay else u

        return map_named(one, updates, params)

    return optax.stateless(update)


def scale_by_rate(rate: Curve, leaves: Mapping[str, Leaf]) -> optax.GradientTransformation:
    """-rate(step) * factor of the parameter's group. The state keeps the rate for `learning_rate`."""

    def init(params: Any) -> RateState:
        del params
        count = jnp.zeros((), jnp.int32)
        return RateState(count, rate(count))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        now = rate(state.count)
        updates = map_named(lambda path, u: u * (-now * leaves[path].lr).astype(u.dtype), updates)
        return updates, RateState(optax.safe_increment(state.count), now)

    return optax.GradientTransformation(init, update)


def accumulate(inner: optax.GradientTransformation, batches: int) -> optax.GradientTransformation:
    """One update of `inner` with the mean gradient of every `batches` batches, zero updates in between."""

    def init(params: Any) -> AccumulateState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return AccumulateState(jnp.zeros((), jnp.int32), zeros, inner.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        total = jax.tree.map(lambda t, g: t + g / batches, state.total, updates)
        zeros = jax.tree.map(jnp.zeros_like, total)

        def apply() -> tuple[Any, Any]:
            out, after = inner.update(total, state.inner, params)
            return out, AccumulateState(jnp.zeros_like(state.count), zeros, after)

        def wait() -> tuple[Any, Any]:
            return zeros, AccumulateState(state.count + 1, total, state.inner)

        return jax.lax.cond(state.count + 1 == batches, apply, wait)

    return optax.GradientTransformation(init, update)
