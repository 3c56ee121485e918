"""A function evaluated without what its result does not need: variables are drawn, the network is not computed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core


def pruned(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is traced, then evaluated op by op without the ops that its result does not need.

    Meant for flax's `init`: of the hundreds of ops of a forward pass, only those that draw variables stay. Op by op, a
    shape that many layers share is compiled once for all of them; `jax.jit(init)` compiles every layer's draw anew.
    """

    def evaluated(*args: Any) -> Any:
        closed, result = jax.make_jaxpr(function, return_shape=True)(*args)
        leaves = core.jaxpr_as_fun(_prune(closed))(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(result), map(jnp.asarray, leaves))

    return evaluated


def _prune(closed: core.ClosedJaxpr) -> core.ClosedJaxpr:
    needed = {v for v in closed.jaxpr.outvars if not isinstance(v, core.Literal)}
    kept = []
    for equation in reversed(closed.jaxpr.eqns):
        if equation.effects or not needed.isdisjoint(equation.outvars):
            kept.append(equation)
            needed.update(v for v in equation.invars if not isinstance(v, core.Literal))
    return core.ClosedJaxpr(closed.jaxpr.replace(eqns=kept[::-1]), closed.consts)
