"""A stage of a run: what it is made of, built whole before its loop starts."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from mljax import experiment as experiments
from mljax import parallel, rundir
from mljax.data.files import some
from mljax.data.source import Source
from mljax.errors import UserError, printable
from mljax.experiment import Experiment
from mljax.optim.groups import frozen_paths
from mljax.pipeline import feature_cache, loader
from mljax.pipeline.failures import Failures
from mljax.rundir.checkpoint import Checkpoints
from mljax.rundir.progress import Writer
from mljax.scoring import Scorer
from mljax.train import warm_start
from mljax.train.data_check import Checked, check_data, readable
from mljax.train.loop import Plan
from mljax.train.spec import StageSpec
from mljax.train.step import create_state, make_optimizer, make_step, watched
from mljax.types import Config, TrainState


@dataclasses.dataclass(frozen=True)
class Splits:
    """What a stage is trained on, and what it is evaluated on as it is scored.

    Attributes:
      checked: against what the run keeps of them; None: they were made up.
      failures: collects the training images that cannot be read.
    """

    train: Source
    eval: Source
    checked: Checked | None = None
    failures: Failures | None = None


@dataclasses.dataclass(frozen=True)
class Cache:
    """Endpoints of a frozen backbone.

    Attributes:
      train: training batches of them.
      eval: view -> endpoints of the evaluation split.
    """

    train: feature_cache.CachedBatches
    eval: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Stage:
    """Everything that the loop, the evaluations and the report of a stage need.

    Attributes:
      spec: which stage of which run.
      writer: its metrics and lines.
      splits: their sources.
      experiment: its system.
      plan: its steps.
      step, place_state, place: the compiled step, and what puts a state and a batch on its devices.
      scorer: runs the system in evaluation mode.
      checkpoints: open for writing.
      cache: of endpoints, if the config asks for one.
    """

    spec: StageSpec
    writer: Writer
    splits: Splits
    experiment: Experiment
    plan: Plan
    step: Callable[[TrainState, Any], tuple[TrainState, Any]]
    place_state: Callable[[TrainState], TrainState]
    place: Callable[[Any], Any]
    scorer: Scorer
    checkpoints: Checkpoints
    cache: Cache | None = None

    @property
    def config(self) -> Config:
        return self.spec.config

    @property
    def cached_eval(self) -> Mapping[str, Any] | None:
        """Cached endpoints of the evaluation split by view."""
        return None if self.cache is None else self.cache.eval

    @property
    def cached_train(self) -> Mapping[str, Any] | None:
        """Cached endpoints of the training split by view."""
        return None if self.cache is None else self.cache.train.maps

    def fitting(self, section: str) -> contextlib.AbstractContextManager[None]:
        """As `StageSpec.fitting`."""
        return self.spec.fitting(section, len(self.splits.train.classes))

    def batches(self, start: int, end: int) -> Iterator[Any]:
        """Host batches of the steps `start` .. `end`; the same whatever was run before."""
        if self.cache is not None:
            return self.cache.train.iterate(start, end)
        config = self.config
        return loader.train_batches(
            self.splits.train, self.experiment.train_transform(), batch_size=config.optim.batch_size,
            seed=config.seed + self.spec.index, start=start, steps=end, views=config.input.views,
            threads=config.input.threads, workers=config.input.workers, failures=self.splits.failures,
        )  # fmt: skip


def load_splits(spec: StageSpec, writer: Writer) -> Splits:
    """Both splits of a config.

    Raises:
      UserError: they cannot be read, differ in their classes, are smaller than a batch, or are not what the run was
        trained on before.
    """
    config, size = spec.config, spec.config.optim.batch_size
    train = experiments.source(config, config.splits.train, training=True)
    held_out = experiments.source(config, config.splits.eval, training=False)
    if train.classes != held_out.classes:
        raise UserError(f"The classes of {train.name} and {held_out.name} differ; both splits must share one list.")
    if len(train) < size:
        raise UserError(
            f"{train.name} has {len(train)} images, fewer than a batch of {size}; lower config.optim.batch_size."
        )
    splits = Splits(train, held_out, check_data(spec, train, held_out, writer), load_failures(spec, train))
    _describe(spec, splits, writer)
    return splits


def load_failures(spec: StageSpec, train: Source) -> Failures:
    """What collects the images of a training split that cannot be read, with those that the run has met before."""
    failures = Failures(len(train), listed=spec.bad_images)

    def counts(row: int, name: str) -> bool:
        same = row < len(train) and printable(str(train.ids[row])) == name  # else of another split
        return same and not readable(train, row)

    if rundir.untouched(spec.workdir):
        spec.bad_images.unlink(missing_ok=True)  # of a start that never came to train
    else:
        failures.read(spec.bad_images, counts)
    return failures


def _describe(spec: StageSpec, splits: Splits, writer: Writer) -> None:
    train, held_out, devices = splits.train, splits.eval, spec.devices
    writer.line(
        f"{spec.label}{train.name}: {len(train)} images of {len(train.classes)} labels;"
        f" {held_out.name}: {len(held_out)} images"
    )
    epoch = steps_per_epoch(spec.config, train)
    steps = f"{epoch * spec.config.optim.epochs} steps, {epoch} an epoch"
    writer.line(f"{spec.label}{steps}, on {len(devices)} {devices[0].device_kind}")
    positives = (train.labels * train.observed).sum(0)
    if absent := [name for name, count in zip(train.classes, positives) if not count]:
        writer.line(f"{train.name} has no image with {some(absent, 8)}: nothing is learnt of these")


def steps_per_epoch(config: Config, train: Source) -> int:
    """Whole batches of the training split."""
    return len(train) // config.optim.batch_size


def make_experiment(spec: StageSpec, train: Source) -> Experiment:
    """The experiment of a stage, whose metadata it writes into the run directory."""
    config, workdir = spec.config, spec.workdir
    resumes = config.init and not rundir.untouched(workdir)  # then the run of config.init is not needed any more
    meta, values = experiments.metadata(config, train, workdir if resumes else None)
    rundir.save_meta(workdir, meta, values)
    return experiments.assemble(config, meta, values)


def build(
    spec: StageSpec,
    writer: Writer,
    splits: Splits,
    experiment: Experiment,
    checkpoints: Checkpoints,
    *,
    epoch: int,
    make_cache: Callable[[StageSpec, Writer, Splits, Experiment, Any], Cache],
) -> tuple[Stage, TrainState]:
    """A stage and the state that it starts from, on the devices.

    The state is this stage's checkpoint, or what the stage before left, or another run (`config.init`), or pretrained
    weights.

    Args:
      checkpoints: of the stage, open.
      epoch: steps of one.
      make_cache: (spec, writer, splits, experiment, variables) -> endpoints, where `config.cache` asks for them.
    """
    config, fresh = spec.config, spec.index == 0 and checkpoints.latest is None
    variables = _variables(spec, writer, experiment, fresh)
    cache = make_cache(spec, writer, splits, experiment, variables) if config.cache.train_views else None
    frozen = experiment.system.backbone.frozen_parameters
    tx = make_optimizer(config, variables["params"], epoch, frozen)
    state = jax.jit(lambda v: create_state(v, tx, ema=config.ema, seed=config.seed))(variables)
    if fresh:
        fixed = frozen_paths(variables["params"], frozen, config.optim.get("groups", ()))
        writer.model_table(variables["params"], spec.workdir, fixed)
    plan = Plan(epoch, epoch * config.optim.epochs, epoch * config.eval.every, config.log_every, spec.index)
    step, place_state, place = parallel.compile_step(make_step(experiment, tx), config.parallel, spec.devices)
    scorer = Scorer(experiment, spec.devices)
    on_devices = watched(step), place_state, place
    stage = Stage(spec, writer, splits, experiment, plan, *on_devices, scorer, checkpoints, cache)
    return stage, stage.place_state(_continued(stage, state, tx))


def _variables(spec: StageSpec, writer: Writer, experiment: Experiment, fresh: bool) -> dict[str, Any]:
    """Those of a fresh start, from pretrained weights or from another run."""
    config = spec.config
    variables = experiments.init_variables(experiment, config.seed)
    if config.init and (fresh or config.cache.train_views):  # a resume has all but what the cache is made with
        variables, taken = warm_start.from_run(config.init, variables, experiment)
        if fresh:
            writer.line(f"starts from {taken}")
    return variables


def _continued(stage: Stage, state: TrainState, tx: Any) -> TrainState:
    """The state of the checkpoint, or of the stage before; `state`, which is fresh, if there is neither."""
    spec, config = stage.spec, stage.config
    if stage.checkpoints.latest is not None:
        if stage.splits.checked is not None:
            stage.splits.checked.check_tables({"params": state.params, **state.variables}, stage.splits.train.name)
        state = stage.checkpoints.restore(jax.eval_shape(lambda: state), "last")
        stage.writer.line(f"{spec.label}resumed at step {int(state.step)} of {stage.plan.total}")
    elif spec.index:
        before = warm_start.from_stage(spec.folder.parent / f"{spec.index - 1}", config.start)
        variables = warm_start.inherit({"params": state.params, **state.variables}, before)
        state = create_state(variables, tx, ema=config.ema, seed=config.seed + spec.index)
    return state


def compute_cache(
    spec: StageSpec, writer: Writer, splits: Splits, experiment: Experiment, variables: Mapping[str, Any]
) -> Cache:
    """Compute or open the endpoints that `config.cache` asks for.

    Raises:
      UserError: the system needs images, or the backbone is not frozen.
    """
    config = spec.config
    if needs_image := getattr(experiment.system, "needs_image", ""):
        raise UserError(needs_image)
    if config.backbone.get("frozen", "") != "all":
        raise UserError("config.cache.train_views needs config.backbone.frozen='all': cached endpoints never change.")
    encode, key = experiment.encode(variables), experiments.cache_key(experiment, variables)
    labels = len(splits.train.classes)
    with writer.task() as show, spec.fitting("eval", labels):
        size = config.eval.batch_size
        options = {"key": key, "limit_gb": config.cache.limit_gb, "progress": show, "batch_size": size}
        views = tuple(feature_cache.view(v) for v in config.cache.train_views)
        failures = Failures(len(splits.train), listed=spec.bad_images)
        if splits.failures is not None:
            failures.bad |= splits.failures.bad
        maps = feature_cache.endpoints(splits.train, views, encode, failures=failures, **options)
        held_out = feature_cache.endpoints(splits.eval, experiment.eval_views, encode, **options)
        if splits.failures is not None:
            splits.failures.bad |= failures.bad
    seed, batch_size = config.seed + spec.index, config.optim.batch_size
    batches = feature_cache.CachedBatches(splits.train, maps, batch_size, seed, config.input.views, failures.bad)
    return Cache(batches, held_out)
