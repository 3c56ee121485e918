"""What tests share: made-up metadata and batches, golden cases, and tiny runs of every config."""

import copy
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mljax import experiment, parallel, tracing, train
from mljax.config.reading import read_config
from mljax.pipeline import loader
from mljax.trees import flatten
from mljax.types import Meta

TESTS = Path(__file__).parent
ROOT = TESTS.parent
CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("[!_]*.py"))
PLAIN = {"mean": [0.5] * 3, "std": [0.25] * 3, "weights": None}


def slow_but(names: Iterable[str], quick: Iterable[str]) -> list[Any]:
    """Parameters of a test, of which all but some are for `make slow`."""
    kept = set(quick)
    return [name if name in kept else pytest.param(name, marks=pytest.mark.slow) for name in names]


# --- metadata and batches ---------------------------------------------------------------------------------------------


def meta(
    labels: int | np.ndarray = 6,
    *,
    images: int = 40,
    observed: np.ndarray | None = None,
    vectors: int | np.ndarray | None = None,
    classes: tuple[str, ...] = (),
    seed: int = 0,
) -> Meta:
    """A training split of so many labels, each true for 40% of the images.

    Args:
      labels: how many, or (N l) zeros and ones themselves.
      observed: (N l); all known unless given. Labels that are not known are zero.
      vectors: the width of drawn label vectors, or (l e) vectors themselves.
    """
    rng = np.random.default_rng(seed)
    y = (rng.random((images, labels)) < 0.4) if isinstance(labels, int) else np.asarray(labels)
    known = np.ones(y.shape, np.uint8) if observed is None else np.asarray(observed).astype(np.uint8)
    if isinstance(vectors, int):
        vectors = rng.normal(size=(y.shape[1], vectors))
    return Meta(
        name="toy",
        classes=classes or tuple(f"c{i}" for i in range(y.shape[1])),
        labels=y.astype(np.uint8) * known,
        observed=known,
        vectors=None if vectors is None else np.asarray(vectors, np.float32),
    )


def batch(
    features: Any,
    labels: int | np.ndarray = 6,
    *,
    observed: np.ndarray | float = 1.0,
    mask: np.ndarray | None = None,
    seed: int = 0,
    **more: Any,
) -> dict[str, Any]:
    """A batch of a backbone's endpoints, as a system's `loss` and `__call__` take it.

    Args:
      features: (b h w d) of stride 32, their shape to draw normal ones, or a dict by stride.
      labels: how many, each true for 40% of the images, or (b l) labels themselves.
      observed: (b l) zeros and ones, or the share that is drawn as known. Labels that are not known are zero.
      mask: (b); no padding unless given.
      more: other entries, e.g. `views`, also in place of those here.
    """
    rng = np.random.default_rng(seed)
    if isinstance(features, tuple):
        features = rng.normal(size=features).astype(np.float32)
    endpoints = features if isinstance(features, Mapping) else {"32": features}
    b = len(next(iter(endpoints.values())))
    y = (rng.random((b, labels)) < 0.4) if isinstance(labels, int) else np.asarray(labels)
    known = rng.random(y.shape) < observed if isinstance(observed, float) else np.asarray(observed)
    return {
        "endpoints": endpoints,
        "labels": np.float32(y * known),
        "observed": np.float32(known),
        "mask": np.ones(b, np.float32) if mask is None else np.float32(mask),
        "index": np.arange(b, dtype=np.int32),
        **more,
    }


# --- golden cases -----------------------------------------------------------------------------------------------------


def data_root() -> Path | None:
    """The folder of real photos, labels and weights: $MLJAX_DATA, or ../shared/data beside the checkout."""
    for root in (os.environ.get("MLJAX_DATA"), ROOT.parent / "shared" / "data"):
        if root and Path(root).is_dir():
            return Path(root)
    return None


def golden_file(name: str) -> Path:
    """A golden case: kept here if small, else beside the data; the test skips where it is absent."""
    root = data_root()
    for path in (TESTS / "golden" / name, *([root.parent / "golden" / name] if root else [])):
        if path.is_file():
            return path
    pytest.skip(f"golden case {name} is not on this machine")


def golden(name: str, prefix: str = "") -> dict[str, np.ndarray]:
    """The arrays of `golden_file(name + ".npz")` whose names start with a prefix, by the rest of the name."""
    with np.load(golden_file(f"{name}.npz")) as file:
        return below(prefix, file)


def below(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays whose names start with a prefix, by the rest of the name."""
    return {name.removeprefix(prefix): arrays[name] for name in arrays if name.startswith(prefix)}


def weights(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The authors' parameters in a golden case, by their names."""
    return below("w/", arrays)


def close(actual: Any, expected: Any, **tolerance: float) -> None:
    """Within the tolerance of golden cases, or another."""
    np.testing.assert_allclose(actual, expected, **({"rtol": 1e-4, "atol": 1e-5} | tolerance))


def nhwc(x: np.ndarray) -> np.ndarray:
    """(b d h w), as torch has maps -> (b h w d)."""
    return np.moveaxis(x, 1, -1)


def flat(tree: Any) -> dict[str, np.ndarray]:
    """Host arrays by their paths "a/b/c"."""
    return {path: np.asarray(x) for path, x in flatten(tree).items()}


def shapes(tree: Any) -> Any:
    """The shape of every leaf."""
    return jax.tree.map(lambda x: tuple(x.shape), tree)


# --- tiny runs --------------------------------------------------------------------------------------------------------


def config(name: str, words: str = "smoke", **changes: Any) -> Any:
    """A config by file name, unlocked, with `a__b=value` changes; of a smoke run on the first blocks of its net."""
    found = read_config(f"configs/{name}.py:{words}").unlock()
    if "smoke" in words.split(","):
        several = len(found.backbone.get("endpoints", ())) > 1
        found.backbone.endpoints = ("4", "8") if several else ("4",)
        found.input.size = 32
    for key, value in changes.items():
        *path, last = key.split("__")
        section = found
        for part in path:
            section = section[part]
        section[last] = value
    return found


def small(**changes: Any) -> Any:
    """The baseline on a net whose steps compile in seconds."""
    found = config("baseline", optim__epochs=3, **changes)
    found.backbone.widths = (4, 4, 4, 4)
    return found


def without_dropout(found: Any) -> Any:
    for key in ("dropout", "drop_path"):
        if key in found.system:
            found.system[key] = 0.0
    return found


def shallow(found: Any) -> Any:
    """One layer of each kind: every part, and little to compile."""
    for section in (found.system, found.system.get("net", {})):
        for key in ("layers", "saa_layers", "encoder_layers", "decoder_layers", "token_layers", "steps"):
            if key in section:
                section[key] = min(section[key], 1)
    return found


def assembled(found: Any) -> tuple[experiment.Experiment, Any]:
    """The experiment of a config and its training source."""
    source = experiment.source(found, found.splits.train, training=True)
    return experiment.assemble(found, experiment.make_meta(found, source), PLAIN), source


def batches(found: Any, source: Any, run: experiment.Experiment, steps: int) -> list[Any]:
    size = found.optim.batch_size
    options = {"batch_size": size, "seed": 0, "start": 0, "steps": steps, "views": found.input.views, "threads": 0}
    return list(loader.train_batches(source, run.train_transform(), **options))


class Steps:
    """A few steps of a config on simulated devices; the step is traced once for each kind of parallelism.

    Args:
      memory: changes variables["memory"] before the first step.
    Attributes:
      terms: the metrics of every step of the last call.
    """

    def __init__(self, found: Any, memory: Any = None):
        self.config, self.terms = found, []
        run, source = assembled(found)
        variables = experiment.init_variables(run, found.seed)
        if memory is not None:
            variables = {**variables, "memory": memory(dict(variables["memory"]))}
        self.variables = jax.device_get(variables)  # a step takes those on devices away
        self.batches = batches(found, source, run, 3)
        self.made: dict[str, Any] = {}

    def __call__(self, kind: str, devices: int) -> tuple[Any, list[float]]:
        """The state after three steps, as host arrays, and the losses."""
        if kind not in self.made:
            found = copy.deepcopy(self.config)
            found.parallel = kind
            run, _ = assembled(found)
            tx = train.make_optimizer(found, self.variables["params"], 10, run.system.backbone.frozen_parameters)
            self.made[kind] = tx, train.make_step(run, tx)
        tx, step = self.made[kind]
        state = train.create_state(self.variables, tx, ema=self.config.ema, seed=0)
        step, place_state, place = parallel.compile_step(step, kind, jax.devices()[:devices])
        state, self.terms = place_state(state), []
        for batch in self.batches:
            state, metrics = step(state, place(batch))
            self.terms.append(jax.device_get(metrics))
        return jax.device_get(state), [float(terms["loss"]) for terms in self.terms]


def init(system: Any, *args: Any, **kwargs: Any) -> Any:
    """The variables that a module starts with, from fixed keys."""
    keys = {name: jax.random.key(i) for i, name in enumerate(("params", "dropout", "draw"))}
    return tracing.pruned(lambda keys: system.init(keys, *args, **kwargs))(keys)


def apply(module: Any, variables: Any, *args: Any, **settings: Any) -> Any:
    """`module.apply`, compiled as one program."""
    return jax.jit(lambda variables, args: module.apply(variables, *args, **settings))(variables, args)


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
