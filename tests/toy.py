"""Tiny runs of every config: what the tests of systems, parallelism, configs and resume iterate over."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mljax import experiment, parallel, train
from mljax.config.reading import read_config
from mljax.pipeline import loader
from mljax.trees import flatten

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("[!_]*.py"))
PLAIN = {"mean": [0.5] * 3, "std": [0.25] * 3, "weights": None}


def config(name: str, words: str = "smoke", **changes: Any) -> Any:
    """A config by file name, unlocked, with `a__b=value` changes."""
    found = read_config(f"configs/{name}.py:{words}").unlock()
    for key, value in changes.items():
        *path, last = key.split("__")
        section = found
        for part in path:
            section = section[part]
        section[last] = value
    return found


def without_dropout(found: Any) -> Any:
    for key in ("dropout", "drop_path"):
        if key in found.system:
            found.system[key] = 0.0
    return found


def assembled(found: Any) -> tuple[experiment.Experiment, Any]:
    """The experiment of a config and its training source."""
    source = experiment.source(found, found.splits.train, training=True)
    return experiment.assemble(found, experiment.make_meta(found, source), PLAIN), source


def batches(found: Any, source: Any, run: experiment.Experiment, steps: int) -> list[Any]:
    size = found.optim.batch_size
    options = {"batch_size": size, "seed": 0, "start": 0, "steps": steps, "views": found.input.views, "threads": 0}
    return list(loader.train_batches(source, run.train_transform(), **options))


def steps(
    found: Any, devices: int, count: int = 3, memory: Any = None, terms: list[Any] | None = None
) -> tuple[Any, list[float]]:
    """The state after a few steps on so many simulated devices, as host arrays, and the losses.

    Args:
      memory: changes variables["memory"] before the first step. terms: takes the metrics of every step.
    """
    run, source = assembled(found)
    variables = experiment.init_variables(run, found.seed)
    if memory is not None:
        variables = {**variables, "memory": memory(dict(variables["memory"]))}
    tx = train.make_optimizer(found, variables["params"], 10, run.system.backbone.frozen_parameters)
    state = train.create_state(variables, tx, ema=found.ema, seed=0)
    step, place_state, place = parallel.compile_step(train.make_step(run, tx), found.parallel, jax.devices()[:devices])
    state, losses = place_state(state), []
    for batch in batches(found, source, run, count):
        state, metrics = step(state, place(batch))
        losses.append(float(metrics["loss"]))
        if terms is not None:
            terms.append(jax.device_get(metrics))
    return jax.device_get(state), losses


def loss_and_gradients(system: Any, variables: Any, batch: Any, step: int) -> tuple[jax.Array, Any]:
    """The loss of a batch at a step, and its gradient at every parameter."""
    params, rest = variables["params"], {k: v for k, v in variables.items() if k != "params"}

    def loss(params: Any) -> jax.Array:
        (value, _), _ = system.apply(
            {"params": params, **rest}, batch, jnp.int32(step), method="loss",
            rngs={"dropout": jax.random.key(0), "draw": jax.random.key(1)},
            mutable=[k for k in rest if k != "constants"],
        )  # fmt: skip
        return value

    return jax.value_and_grad(loss)(params)


def flat(tree: Any) -> dict[str, np.ndarray]:
    return {path: np.asarray(x) for path, x in flatten(tree).items()}
