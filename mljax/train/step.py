"""The training step: optimizer, state, and `step(state, batch)`, which is written once for jit and pmap."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mljax import optim, parallel
from mljax.config.sections import TRAINED
from mljax.experiment import Experiment
from mljax.optim.groups import all_groups, without_label_tables
from mljax.train.loop import LARGEST
from mljax.types import Config, TrainState


def make_optimizer(config: Config, params: Any, steps_per_epoch: int, frozen: tuple[str, ...] = ()) -> Any:
    """The optax transformation of `config.optim`; what the backbone keeps frozen gets no updates and no decay."""
    section = {k: v for k, v in config.optim.items() if k not in TRAINED}
    section["groups"] = all_groups(params, frozen, section.get("groups", ()))
    total = steps_per_epoch * config.optim.epochs
    return optim.optimizer(params, total_steps=total, steps_per_epoch=steps_per_epoch, **section)


def has_plateau(config: Config) -> bool:
    """Whether the learning rate follows the evaluations."""
    return config.optim.get("schedule", {}).get("name") == "plateau"


def reduce_on_plateau(config: Config, opt_state: Any, value: float) -> Any:
    """The optimizer's state after an evaluation that found `value` of `config.optim.schedule.metric`."""
    options = {k: v for k, v in config.optim.schedule.items() if k not in ("name", "metric")}
    return optim.plateau_update(opt_state, value, **options)


def create_state(variables: dict[str, Any], tx: Any, *, ema: float, seed: int) -> TrainState:
    """The state before the first step, on the host's default device."""
    variables = dict(variables)
    params = variables.pop("params")
    averaged = {"params": without_label_tables(params), "batch_stats": variables.get("batch_stats", {})}
    return TrainState(
        step=jnp.int32(0),
        params=params,
        variables=variables,
        opt_state=tx.init(params),
        ema=jax.tree.map(jnp.copy, averaged) if ema else None,
        rng=jax.random.key_data(jax.random.key(seed)),
    )


def watched(step: Callable[[TrainState, Any], tuple[TrainState, Any]]) -> Callable[..., tuple[TrainState, Any]]:
    """The compiled step, whose metrics have under `LARGEST` the largest magnitudes of the new state's parameters and of
    its variables, (2); not finite where one of them is not.

    That is a program of its own, which the host does not wait for: the step's program, and so its numbers, stay as they
    are without it.
    """
    largest = jax.jit(lambda *trees: jnp.stack([_largest(tree) for tree in trees]))

    def run(state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        state, metrics = step(state, batch)
        mutable = {name: tree for name, tree in state.variables.items() if name != "constants"}
        return state, {**metrics, LARGEST: largest(state.params, mutable)}

    return run


def _largest(tree: Any) -> jax.Array:
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating) and x.size]
    return jnp.max(jnp.stack([jnp.max(jnp.abs(x)).astype(jnp.float32) for x in floats] or [jnp.float32(0)]))


def make_step(experiment: Experiment, tx: Any) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """`step(state, batch) -> (state, metrics)`, for jit (global arrays) and for pmap (each device's part)."""
    config, system = experiment.config, experiment.system
    axis, decay = parallel.axis_of(config.parallel), float(config.ema)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        batch = experiment.prepare(batch)
        draw = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        rngs = {"dropout": draw, "draw": draw}
        mutable = [name for name in state.variables if name != "constants"]

        def loss_of(params: Any) -> tuple[jax.Array, Any]:
            (loss, terms), changed = system.apply(
                {"params": params, **state.variables}, batch, state.step, method="loss", rngs=rngs, mutable=mutable
            )
            return loss, (terms, changed)

        (loss, (terms, changed)), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        grads, loss, terms = parallel.pmean((grads, loss, terms), axis)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p + u.astype(p.dtype), state.params, updates)
        variables = {**state.variables, **changed}
        ema = state.ema
        if ema is not None:
            now = {"params": params, "batch_stats": variables.get("batch_stats", {})}
            ema = optim.ema_update(ema, now, decay)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), "lr": optim.learning_rate(opt_state), **terms}
        return TrainState(state.step + 1, params, variables, opt_state, ema, state.rng), metrics

    return step
