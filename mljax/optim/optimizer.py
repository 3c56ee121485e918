"""What config.optim says -> one optax transformation; the plateau rule; the moving average.

Every rule here has the arithmetic of its PyTorch namesake, because the recipes of the papers were tuned
with it; tests/parity compares them live. Schedules are in schedules.py, groups of parameters in groups.py, Adam and
momentum in update_rules.py.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mljax.errors import UserError, nearest
from mljax.optim import update_rules
from mljax.optim.groups import Groups, assign
from mljax.optim.schedules import constant, make_schedule, one_cycle_momentum
from mljax.trees import flatten, map_named

RULES = ("adam", "adamw", "sgd")
PLATEAU = ("mode", "factor", "patience", "threshold", "cooldown")  # what plateau_update shares with optimizer
METRICS = ("mAP", "CF1", "OF1", "loss")  # of an evaluation, that a plateau schedule can watch: config.optim.metric


def optimizer(
    params: Any,
    *,
    name: str = "adam",
    lr: float = 1e-4,
    schedule: str = "one_cycle",
    total_steps: int | None = None,
    steps_per_epoch: int | None = None,
    schedule_epochs: float | None = None,
    pct_start: float = 0.2,
    div: float = 25.0,
    final_div: float = 1e4,
    every: float | None = None,
    boundaries: Sequence[float] = (),
    factor: float = 0.1,
    warmup_epochs: float = 0.0,
    warmup_start: float = 0.1,
    floor: float = 0.0,
    mode: str = "max",
    patience: int = 10,
    threshold: float = 1e-4,
    cooldown: int = 0,
    weight_decay: float = 0.0,
    coupled: bool | None = None,
    no_decay: Sequence[str] = (),
    momentum: float = 0.9,
    nesterov: bool = False,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    beta1_cycle: bool = True,
    groups: Groups = (),
    clip_norm: float | None = None,
    accumulate: int = 1,
) -> optax.GradientTransformation:
    """One optax transformation for everything that config.optim says about updates.

    Args:
      params: tree of arrays or shapes; only paths and shapes are read.
      name: "adam", "adamw" or "sgd".
      lr: peak of the schedule.
      schedule: "one_cycle", "step", "constant", "warmup_cosine" or "plateau".
      total_steps: batches of the run (one_cycle, warmup_cosine). steps_per_epoch: batches of an epoch.
      schedule_epochs: epochs of the schedule where the run stops earlier (ASL: 80 of which 41 are run).
      pct_start, div, final_div: of one_cycle.
      every, boundaries, factor: of step, in epochs; `factor` also of plateau.
      warmup_epochs, warmup_start: of warmup_cosine and step; from which share of lr it grows linearly, and how long.
      floor: of warmup_cosine, a share of lr.
      mode, patience, threshold, cooldown: of plateau; the trainer gives them to `plateau_update`.
      weight_decay: added to the gradient (adam, sgd), or decoupled and scaled by the rate (adamw).
      coupled: overrides which of the two.
      no_decay, groups: see `assign`. A frozen group gets zero updates and has no optimiser memory.
      momentum, nesterov: of sgd. betas, eps: of adam and adamw.
      beta1_cycle: with one_cycle, beta1 (sgd: a momentum above 0) runs .95 -> .85 -> .95 instead.
      clip_norm: largest L2 norm of the gradient of all trained parameters together, before weight decay.
      accumulate: batches whose gradients are averaged into one update; schedules count updates.
    Raises:
      UserError: an unknown name or schedule, a group or no_decay that fits nothing, a value out of range.
    """
    _check_rule(name, lr, weight_decay, betas, momentum, nesterov, accumulate, mode, clip_norm)
    rate, total = make_schedule(
        schedule,
        lr,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        schedule_epochs=schedule_epochs,
        accumulate=accumulate,
        pct_start=pct_start,
        div=div,
        final_div=final_div,
        every=every,
        boundaries=boundaries,
        factor=factor,
        warmup_epochs=warmup_epochs,
        warmup_start=warmup_start,
        floor=floor,
    )
    leaves = assign(params, groups, weight_decay=weight_decay, no_decay=no_decay)
    first = betas[0] if name != "sgd" else momentum
    beta = constant(first)
    if schedule == "one_cycle" and beta1_cycle and total and first > 0:
        beta = one_cycle_momentum(total, pct_start)
    rule = (
        update_rules.scale_by_momentum(beta, nesterov)
        if name == "sgd"
        else update_rules.scale_by_adam(beta, betas[1], eps)
    )
    if name == "sgd" and momentum == 0:
        rule = optax.identity()
    decay = [update_rules.add_decay(leaves)] if any(leaf.weight_decay for leaf in leaves.values()) else []
    early = name != "adamw" if coupled is None else coupled
    chain = [update_rules.clip(clip_norm)] if clip_norm else []
    chain += [*decay, rule] if early else [rule, *decay]
    chain += [scale_by_plateau(mode)] if schedule == "plateau" else []
    chain += [update_rules.scale_by_rate(rate, leaves)]
    trained = optax.chain(*chain)
    if accumulate > 1:
        trained = update_rules.accumulate(trained, accumulate)
    labels = map_named(lambda path, _: "frozen" if leaves[path].frozen else "trained", params)
    return optax.partition({"trained": trained, "frozen": optax.set_to_zero()}, labels)


def _check_rule(
    name: str,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    momentum: float,
    nesterov: bool,
    accumulate: int,
    mode: str,
    clip_norm: float | None,
) -> None:
    if name not in RULES:
        raise UserError(f"config.optim.name is {name!r}, which is no optimiser{nearest(name, RULES)}.")
    if not (lr > 0 and np.isfinite(lr)):
        raise UserError(f"config.optim.lr is {lr}; it is a number above 0.")
    if not weight_decay >= 0:
        raise UserError(f"config.optim.weight_decay is {weight_decay}; it is at least 0.")
    if len(betas) != 2 or not all(0 <= b < 1 for b in betas) or not 0 <= momentum < 1:
        raise UserError(f"config.optim.betas {tuple(betas)} and momentum {momentum} lie between 0 and 1.")
    if nesterov and not (name == "sgd" and momentum > 0):
        raise UserError("config.optim.nesterov needs the optimiser 'sgd' and a momentum above 0.")
    if accumulate < 1:
        raise UserError(f"config.optim.accumulate is {accumulate}; it is at least 1.")
    if mode not in ("max", "min"):
        raise UserError(f"config.optim.mode is {mode!r}; it is 'max' or 'min'.")
    if clip_norm is not None and not clip_norm > 0:
        raise UserError(f"config.optim.clip_norm is {clip_norm}; it is above 0, or None for no clipping.")


NAMES = {rule: partial(optimizer, name=rule) for rule in RULES}


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
        raise UserError("plateau_update was called and config.optim.schedule is not 'plateau'.")
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
