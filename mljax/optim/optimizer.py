"""What config.optim says -> one optax transformation; the plateau rule; the moving average.

Every rule here has the arithmetic of its PyTorch namesake, because the recipes of the papers were tuned
with it; tests/parity compares them live. Schedules are in schedules.py, groups of parameters in groups.py, Adam and
SGD in update_rules.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mljax.build import checked
from mljax.config.sections import OPTIM, check_named
from mljax.errors import UserError
from mljax.optim import schedules, update_rules
from mljax.optim.groups import Groups, assign
from mljax.trees import flatten, map_named


def optimizer(
    params: Any,
    *,
    name: str = "adam",
    lr: float = 1e-4,
    schedule: Mapping[str, Any] = schedules.DEFAULT,
    weight_decay: float = 0.0,
    no_decay: Sequence[str] = (),
    groups: Groups = (),
    clip_norm: float | None = None,
    accumulate: int = 1,
    total_steps: int | None = None,
    steps_per_epoch: int | None = None,
    **settings: Any,
) -> optax.GradientTransformation:
    """One optax transformation for everything that config.optim says about updates.

    Args:
      params: tree of arrays or shapes; only paths and shapes are read.
      name: "adam", "adamw" or "sgd".
      lr: peak of the schedule.
      schedule: name and settings of one of `mljax.optim.schedules`.
      weight_decay: added to the gradient (adam, sgd), or decoupled and scaled by the rate (adamw).
      no_decay, groups: see `assign`. A frozen group gets zero updates and has no optimiser memory.
      clip_norm: largest L2 norm of the gradient of all trained parameters together, before weight decay.
      accumulate: batches whose gradients are averaged into one update; schedules count updates.
      total_steps: batches of the run. steps_per_epoch: batches of an epoch.
      settings: of the rule, see `mljax.optim.update_rules.NAMES`: betas, eps, momentum, nesterov, coupled.
    Raises:
      UserError: an unknown name, a setting that the rule or the schedule does not have, a group or no_decay that fits
        nothing, a value out of range.
    """
    constructor, settings = rule({"name": name, **settings})
    check_ranges({"lr": lr, "weight_decay": weight_decay, "accumulate": accumulate, "clip_norm": clip_norm})
    plan = schedules.make_schedule(schedule, schedules.Steps(lr, total_steps, steps_per_epoch, accumulate))
    leaves = assign(params, groups, weight_decay=weight_decay, no_decay=no_decay)
    transformation, coupled = constructor(plan.momentum, **settings)
    decay = [update_rules.add_decay(leaves)] if any(leaf.weight_decay for leaf in leaves.values()) else []
    chain = [update_rules.clip(clip_norm)] if clip_norm else []
    chain += [*decay, transformation] if coupled else [transformation, *decay]
    chain += [scale_by_plateau(plan.mode)] if plan.mode else []
    chain += [update_rules.scale_by_rate(plan.rate, leaves)]
    trained = optax.chain(*chain)
    if accumulate > 1:
        trained = update_rules.accumulate(trained, accumulate)
    labels = map_named(lambda path, _: "frozen" if leaves[path].frozen else "trained", params)
    return optax.partition({"trained": trained, "frozen": optax.set_to_zero()}, labels)


def rule(section: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The update rule that a `config.optim` names, and the rule's own settings in it.

    Raises:
      UserError: no such rule, or a key that is neither a setting of the rule nor one that all of them share.
    """
    check_named(section, "optim", "config.optim")
    name = section.get("name", "adam")
    return checked("optim", {"name": name, **{key: value for key, value in section.items() if key not in OPTIM}})


def check_ranges(section: Mapping[str, Any]) -> None:
    """The numbers of a `config.optim` that every rule shares.

    Raises:
      UserError: one is out of its range.
    """
    lr, decay, clip = section.get("lr", 1e-4), section.get("weight_decay", 0.0), section.get("clip_norm")
    if not (lr > 0 and np.isfinite(lr)):
        raise UserError(f"config.optim.lr is {lr}; it must be a number above 0.")
    if not decay >= 0:
        raise UserError(f"config.optim.weight_decay is {decay}; it must be at least 0.")
    if section.get("accumulate", 1) < 1:
        raise UserError(f"config.optim.accumulate is {section['accumulate']}; it must be at least 1.")
    if clip is not None and not clip > 0:
        raise UserError(f"config.optim.clip_norm is {clip}; it must be above 0, or None for no clipping.")


class PlateauState(NamedTuple):
    scale: Any
    best: Any
    bad: Any  # evaluations since the best
    rest: Any  # evaluations that a cooldown still ignores


def scale_by_plateau(mode: str = "max") -> optax.GradientTransformation:
    """Updates times a scale that `plateau_update` lowers; it lies in the state, so in the checkpoint."""

    def init(params: Any) -> PlateauState:
        del params
        worst = -jnp.inf if mode == "max" else jnp.inf
        zero = jnp.zeros((), jnp.int32)
        return PlateauState(jnp.ones((), jnp.float32), jnp.float32(worst), zero, jnp.copy(zero))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        return jax.tree.map(lambda u: u * state.scale.astype(u.dtype), updates), state

    return optax.GradientTransformation(init, update)


def plateau_update(
    opt_state: Any,
    metric: float,
    *,
    mode: str = "max",
    factor: float = 0.1,
    patience: int = 10,
    threshold: float = 1e-4,
    cooldown: int = 0,
) -> Any:
    """Tell a plateau schedule the metric of an evaluation; on the host, between steps.

    More than `patience` evaluations in a row that do not beat the best by the relative `threshold` multiply
    the rate by `factor`; then `cooldown` evaluations are ignored. A NaN beats nothing. As torch's
    ReduceLROnPlateau.
    Returns:
      The optimiser's state with its plateau part replaced, on the same devices.
    """
    if not _find(opt_state, PlateauState):
        raise UserError("plateau_update was called, but config.optim.schedule.name is not 'plateau'.")
    metric = float(np.float32(metric))  # the precision of the stored best, so that equal stays equal

    def one(node: Any) -> Any:
        if not isinstance(node, PlateauState):
            return node
        scale, best, bad, rest = float(node.scale), float(node.best), int(node.bad), int(node.rest)
        better = metric > best * (1 + threshold) if mode == "max" else metric < best * (1 - threshold)
        best, bad = (metric, 0) if better else (best, bad + 1)
        if rest > 0:
            rest, bad = rest - 1, 0
        if bad > patience:
            scale, bad, rest = scale * factor, 0, cooldown
        return PlateauState(*(_like(value, old) for value, old in zip((scale, best, bad, rest), node)))

    return jax.tree.map(one, opt_state, is_leaf=lambda node: isinstance(node, PlateauState))


def _like(value: float, old: Any) -> Any:
    new = np.asarray(value, old.dtype)
    return jax.device_put(new, old.sharding) if isinstance(old, jax.Array) else new


def _find(tree: Any, kind: type) -> list[Any]:
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in nodes if isinstance(node, kind)]


def learning_rate(opt_state: Any) -> Any:
    """() float32: the rate of the last update, with a plateau's scale and without the factors of groups."""
    rate = _find(opt_state, update_rules.RateState)[0].rate
    for plateau in _find(opt_state, PlateauState):
        rate = rate * plateau.scale
    return rate


# The moving average.


def ema_update(ema: Any, new: Any, decay: float) -> Any:
    """decay * ema + (1 - decay) * new, leaf by leaf in float32, from the first step, without bias correction.

    Args:
      ema: {"params": .., "batch_stats": ..}; may hold fewer leaves than `new` (no label tables).
      new: the same trees of the model.
    Reference: the recipe of Ridnik et al., ICCV 2021 (decay 0.9997, running statistics too).
    """
    now = flatten(new)
    return map_named(lambda path, old: decay * old + (1 - decay) * now[path].astype(old.dtype), ema)


def averaged(params: Any, variables: Any, ema: Any) -> dict[str, Any]:
    """All variables with parameters and running statistics replaced by their averages."""
    merged = {"params": ema_merge(ema["params"], params), **variables}
    if "batch_stats" in variables:
        merged["batch_stats"] = ema_merge(ema["batch_stats"], variables["batch_stats"])
    return merged


def ema_merge(ema: Any, new: Any) -> Any:
    """`new` with every leaf that `ema` holds replaced by its average: what evaluating the EMA runs on."""
    averaged = flatten(ema)
    return map_named(lambda path, leaf: averaged.get(path, leaf), new)
