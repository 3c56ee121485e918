"""From a config to the objects of a run: sources, meta, system, weights, variables. Config stops here."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mljax import rundir, tracing, weights
from mljax.build import build, find, keywords, settings
from mljax.data import digests, unseen
from mljax.data.observe import observe
from mljax.data.source import Source
from mljax.data.splits import load
from mljax.errors import UserError, one_of
from mljax.losses.criterion import Criterion
from mljax.parallel import axis_of
from mljax.pipeline import feature_cache, transforms
from mljax.trees import flatten, merge
from mljax.types import Batch, Config, Meta

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What training, evaluation and prediction share.

    Attributes:
      config: of the stage.
      meta: of the training split.
      system: the linen module.
      mean, std: (3,) of the backbone's weights, for values in [0, 1].
    """

    config: Config
    meta: Meta
    system: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def prepare(self, batch: Batch) -> dict[str, Any]:
        """On the device: uint8 images to normalised floats; cached endpoints pass through."""
        batch = dict(batch)
        for key in ("image", "views"):
            if key in batch and not isinstance(batch[key], Mapping):
                batch[key] = normalise(batch[key], self.mean, self.std, DTYPES[self.config.dtype])
        return batch

    def scores(self, variables: Mapping[str, Any], batch: Batch) -> jax.Array:
        """(b l) scores on the scale of logits, in evaluation mode: the system's own `scores`, or its logits."""
        batch = self.prepare(batch)
        if hasattr(self.system, "scores"):
            scores: Any = self.system.apply(variables, batch, method="scores")
            return scores.astype(jnp.float32)
        out: Any = self.system.apply(variables, batch, train=False)
        return out.logits.astype(jnp.float32)

    def encode(self, variables: Mapping[str, Any]) -> Callable[[np.ndarray], dict[str, jax.Array]]:
        """(b h w 3) uint8 -> the frozen backbone's endpoints, for the feature cache."""
        backbone = self.system.backbone.clone(parent=None, name=None)
        inner = {c: v["backbone"] for c, v in variables.items() if "backbone" in v}

        @jax.jit
        def run(inner: Any, image: jax.Array) -> dict[str, jax.Array]:
            return backbone.apply(inner, normalise(image, self.mean, self.std), train=False)

        return lambda image: run(inner, image)

    @property
    def eval_views(self) -> tuple[feature_cache.View, ...]:
        return tuple(feature_cache.view(v) for v in self.config.cache.eval_views)

    def eval_transform(self) -> Callable[..., np.ndarray]:
        return settings(transforms.evaluate, self.config.input.eval, "config.input.eval", size=self.config.input.size)

    def train_transform(self) -> Callable[..., np.ndarray]:
        return settings(transforms.train, self.config.input.train, "config.input.train", size=self.config.input.size)


def normalise(image: jax.Array, mean: Any, std: Any, dtype: Any = jnp.float32) -> jax.Array:
    """uint8 (.. 3) -> (x / 255 - mean) / std in `dtype`."""
    mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    scale, shift = 1 / (255 * std), -mean / std
    shape = (1,) * (image.ndim - 1) + (3,)
    return (image.astype(jnp.float32) * scale.reshape(shape) + shift.reshape(shape)).astype(dtype)


def source(config: Config, split: str, *, training: bool) -> Source:
    """A split of the run's data set; `config.splits` names the usual ones, any other split may be asked for.

    A split to train on shows what `config.observe` lets through; hidden labels are gone from here on, and so are the
    classes of `config.unseen`. Images are compared with their digests, where these were written.
    """
    section = dict(config.data)
    constructor = find("data", section.get("name", ""))
    if "training" in keywords(constructor):
        section["training"] = training
    whole = unseen.without(digests.verified(load(section, split), section), config.unseen)
    return observe(whole, config.observe) if training else whole


def make_meta(config: Config, train: Source) -> Meta:
    """The metadata of a training split, with label vectors where the config asks for them."""
    return Meta(
        name=train.name,
        classes=tuple(train.classes),
        labels=train.labels * train.observed,
        observed=train.observed,
        vectors=label_vectors(config, train.classes, train.every),
    )


def label_vectors(config: Config, classes: tuple[str, ...], every: tuple[str, ...] = ()) -> np.ndarray | None:
    """(l e) by `config.vectors`: "auto" takes what the data set brings along, else a file or "glove".

    Args:
      every: all classes of the data set where `classes` are some of them: files without names are in their order.
    """
    if config.vectors == "none":
        return None
    if config.vectors == "auto":
        return unseen.own_vectors(config.data.name, classes)
    from mljax.data.word_vectors import UNNAMED, load_vectors

    try:
        whole = every if config.vectors.endswith(UNNAMED) else ()
        vectors = load_vectors(whole or classes, source=config.vectors, root=config.data.get("root"))
        return vectors[[whole.index(name) for name in classes]] if whole else vectors
    except UserError as error:
        if "config.vectors" in str(error):
            raise
        advice = "a system that can do without label vectors runs with --config.vectors=none"
        raise UserError(f"{str(error).rstrip('.')}; {advice}.") from None


def preprocessing(config: Config) -> dict[str, Any]:
    """What travels with the weights of a config: mean, std and provenance; a run directory keeps it.

    `config.weights.mean` and `std`, if they are set, replace those that the weights were made with.
    """
    mean, std, provenance = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), None
    if config.weights.name is not None:
        record = weights.resolve(config.weights.name, config.backbone.name)
        (mean, std), provenance = weights.preprocessing(record), dataclasses.asdict(record)
    mean, std = tuple(config.weights.mean) or mean, tuple(config.weights.std) or std
    return {"mean": list(mean), "std": list(std), "weights": provenance}


def metadata(config: Config, train: Source, resumed: Path | None = None) -> tuple[Meta, dict[str, Any]]:
    """`make_meta` and `preprocessing` for training; a weight file that is not here is downloaded now.

    A training that starts from another run (`config.init`) normalises images as that run did.

    Args:
      resumed: the run directory of a training that goes on and no longer needs the run of `config.init`.
    Raises:
      UserError: label vectors or weights are missing; one sentence names both if both are.
    """
    meta, values, problems = None, {}, []
    try:
        meta = make_meta(config, train)
    except UserError as error:
        problems.append(error)
    try:
        values = _preprocessing_of(resumed or config.init) if config.init else preprocessing(config)
        if config.weights.name is not None and not config.init:
            weights.locate(weights.resolve(config.weights.name, config.backbone.name))
    except UserError as error:
        problems.append(error)
    if len(problems) > 1:
        first, second = (str(error).rstrip(".") for error in problems)
        raise UserError(f"Two things are missing: (1) {first}; (2) {second}.")
    if meta is None or problems:
        raise problems[0]
    return meta, values


def _preprocessing_of(workdir: str | Path) -> dict[str, Any]:
    try:
        return rundir.load_preprocessing(Path(workdir))
    except UserError as error:
        raise UserError(f"config.init={str(workdir)!r} is not a run: {error}") from None


def assemble(config: Config, meta: Meta, values: Mapping[str, Any], *, training: bool = True) -> Experiment:
    """Build the system of a config for the metadata of a training split.

    Args:
      values: those of `preprocessing`.
      training: whether it will be trained; if not, warnings about the training split are left out.
    """
    log = logging.getLogger("mljax.training")
    level = log.level
    if not training:
        log.setLevel(logging.ERROR)
    try:
        return _assembled(config, meta, values)
    finally:
        log.setLevel(level)


def _assembled(config: Config, meta: Meta, values: Mapping[str, Any]) -> Experiment:
    one_of("config.dtype", config.dtype, DTYPES)
    if not meta.num_labels:
        raise UserError(f"{meta.name} has no classes.")
    common = {"dtype": DTYPES[config.dtype], "axis": axis_of(config.parallel)}
    backbone = build("backbones", config.backbone, **common)
    common["steps_per_epoch"] = max(len(meta.labels) // config.optim.batch_size, 1)  # for schedules of systems
    system = build(
        "systems", config.system, backbone=backbone, criterion=Criterion.from_config(config.loss), meta=meta, **common
    )
    return Experiment(config, meta, system, tuple(values["mean"]), tuple(values["std"]))


def example_batch(experiment: Experiment, batch_size: int, endpoints: Mapping[str, tuple[int, ...]] | None = None):
    """A batch of zeros as the system will see it, for initialisation and shapes."""
    size, labels = experiment.config.input.size, experiment.meta.num_labels
    batch: dict[str, Any] = {
        "image": np.zeros((batch_size, size, size, 3), np.uint8),
        "labels": np.zeros((batch_size, labels), np.float32),
        "observed": np.ones((batch_size, labels), np.float32),
        "index": np.zeros((batch_size,), np.int32),
        "mask": np.ones((batch_size,), np.float32),
    }
    views = experiment.config.input.views
    if views > 1:
        batch["views"] = np.zeros((batch_size, views, size, size, 3), np.uint8)
    if endpoints:
        del batch["image"]
        batch["endpoints"] = {k: np.zeros((batch_size, *s), np.float16) for k, s in endpoints.items()}
    return batch


def init_variables(experiment: Experiment, seed: int) -> dict[str, Any]:
    """Random variables with the pretrained backbone merged in, strictly."""
    batch = example_batch(experiment, 2)
    key, draw = jax.random.split(jax.random.key(seed))

    def variables_of(rngs: Any, batch: Any) -> Any:
        result, variables = experiment.system.init_with_output(rngs, batch, jnp.int32(0), method="loss")
        if not (isinstance(result, tuple) and len(result) == 2 and jnp.ndim(result[0]) == 0):
            name, kind = experiment.config.system.name, type(result).__name__
            raise UserError(f"`loss` of the system {name!r} returns a {kind}; expected (loss, {{name: value}}).")
        return variables

    def init(keys: Any) -> Any:
        rngs = {"params": keys[0], "dropout": keys[1], "draw": keys[1]}
        prepared = experiment.prepare(batch)
        if axis_of(experiment.config.parallel) is None:
            return variables_of(rngs, prepared)
        # collectives need their axis at initialisation too: one device stands for all
        lift = jax.vmap(lambda b: variables_of(rngs, b), axis_name="data")
        return jax.tree.map(lambda x: x[0], lift(jax.tree.map(lambda x: x[None], prepared)))

    variables = tracing.pruned(init)((key, draw))
    config = experiment.config
    if config.weights.name is None or config.get("init"):  # that run has more than a backbone
        return variables
    record = weights.resolve(config.weights.name, config.backbone.name)
    loaded = weights.load(
        record, config.backbone.name, prefix=config.weights.prefix,
        in_channels=config.backbone.get("in_channels", 3), model=experiment.system.backbone,
    )  # fmt: skip
    for collection in ("params", "batch_stats"):
        if "backbone" in variables.get(collection, {}):
            fresh = variables[collection]["backbone"]
            merged = merge(fresh, loaded.get(collection, {}), skip=tuple(config.weights.skip))
            variables[collection] = {**variables[collection], "backbone": merged}
    return variables


def cache_key(experiment: Experiment, variables: Mapping[str, Any]) -> str:
    """What cached endpoints depend on besides the images."""
    section = {k: v for k, v in experiment.config.backbone.items()}
    head = json.dumps([section, experiment.config.dtype, experiment.mean, experiment.std], sort_keys=True, default=str)
    digest = hashlib.sha256(head.encode())
    for collection in ("params", "batch_stats"):
        for path, leaf in flatten(variables.get(collection, {}).get("backbone", {})).items():
            digest.update(path.encode())
            digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()
