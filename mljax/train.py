"""The one trainer: state, step, and the loop over stages, epochs and steps. Systems supply only what differs."""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mljax import experiment, optim, parallel, rundir, scoring, warm_start
from mljax.check import check
from mljax.config.sections import TRAINED
from mljax.config.stages import stage_configs
from mljax.data.files import some
from mljax.errors import Full, UserError, exhausted
from mljax.experiment import Experiment
from mljax.interrupt import Stop, interruptible
from mljax.optim.groups import all_groups, frozen_paths, without_label_tables
from mljax.pipeline import feature_cache, loader
from mljax.rundir import progress
from mljax.rundir.checkpoint import Checkpoints
from mljax.types import Config, TrainState

LATE = 2  # steps that the devices have before them while the host looks at the numbers of the one before
FINITE = ("loss", "grad_norm")  # of a step's metrics, or the run ends


def make_optimizer(config: Config, params: Any, steps_per_epoch: int, frozen: tuple[str, ...] = ()) -> Any:
    """The optax transformation of `config.optim`; what the backbone keeps frozen gets no updates and no decay."""
    section = {k: v for k, v in config.optim.items() if k not in TRAINED}
    section["groups"] = all_groups(params, frozen, section.get("groups", ()))
    total = steps_per_epoch * config.optim.epochs
    return optim.optimizer(params, total_steps=total, steps_per_epoch=steps_per_epoch, **section)


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


def make_step(run: Experiment, tx: Any) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """`step(state, batch) -> (state, metrics)`, written once for jit (global arrays) and pmap (per device)."""
    axis, decay, system = parallel.axis_of(run.config.parallel), float(run.config.ema), run.system

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        batch = run.prepare(batch)
        draw = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        local = draw if axis is None else jax.random.fold_in(draw, jax.lax.axis_index(axis))
        rngs = {"dropout": local, "draw": draw}
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


class Diverged(UserError):
    """A loss or scores that are no numbers."""


def fit(config: Config, workdir: str | Path) -> dict[str, Any]:
    """Train all stages of a config in a run directory, resuming where it was left; returns the final report.

    Raises:
      UserError: whatever a user can mend, in one sentence; checkpoints written so far stay.
      Stop: after Ctrl-C or SIGTERM, once the state is saved.
    """
    workdir = Path(workdir)
    stages = stage_configs(config)
    for stage in stages:
        check(stage)
    with rundir.opened(workdir, config), progress.Writer(workdir) as writer:
        report = scoring.finished(workdir)
        if report is not None:
            return report
        for index, stage in enumerate(stages):
            found = Stage(stage, workdir, index, len(stages), writer)
            with found.fitting("optim"):
                report = found.run()
        assert report is not None
        return report


class Stage:
    """One stage of a run: its objects, and the loop over them."""

    def __init__(self, config: Config, workdir: Path, index: int, count: int, writer: progress.Writer):
        self.config, self.workdir, self.index, self.count = config, workdir, index, count
        self.label = f"stage {index + 1}/{count} " if count > 1 else ""
        self.writer = writer
        self.folder = workdir / "checkpoints" / f"{index}"
        self.train: Any = None
        self.scored: dict[str, tuple[int, Any]] = {}  # "raw" or "ema" -> step and scores of the last evaluation
        self.devices = parallel.devices_for(config.devices)
        parallel.check_batch(config.optim.batch_size, len(self.devices))

    @contextlib.contextmanager
    def fitting(self, section: str) -> Iterator[None]:
        """A memory that is full inside says whose batch_size it is: that of config.optim, or of config.eval."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not exhausted(error):
                raise
            config, labels = self.config, len(self.train.classes) if self.train is not None else None
            full = Full(section, config[section].batch_size, config.input.size, self.index + 1, self.count, labels)
            raise full from error

    def run(self) -> dict[str, Any]:
        """Train to the end of the stage; the last stage is scored and reported."""
        self._sources()
        self._objects()
        with Checkpoints(self.folder, keep_best_of="mAP") as self.checkpoints:
            state = self._initial()
            step = int(state.step)
            owed = step and step == self.checkpoints.latest and self._due(step) and not self.checkpoints.metrics()
            if owed:  # its memory was full, or an image could not be read
                self.writer.resume(self.index, step)
                with progress.Meter(self.writer, self.label, step, self.total, self.config.optim.batch_size) as meter:
                    state = self._evaluate(state, step, meter, again=True)
            if step < self.total:
                self.writer.resume(self.index, step)
                state = self._loop(state)
            if self.index < self.count - 1:
                return {}
            with self.fitting("eval"):
                return scoring.finish(self, state)

    # --- what a stage needs ----------------------------------------------------------------------------------------

    def _sources(self) -> None:
        config, size = self.config, self.config.optim.batch_size
        self.train = experiment.source(config, config.splits.train, training=True)
        self.eval = experiment.source(config, config.splits.eval, training=False)
        if self.train.classes != self.eval.classes:
            raise UserError(
                f"The classes of {self.train.name} and {self.eval.name} differ; both splits must share one list."
            )
        if len(self.train) < size:
            raise UserError(
                f"{self.train.name} has {len(self.train)} images, fewer than a batch of {size};"
                " lower config.optim.batch_size."
            )
        self.steps_per_epoch = len(self.train) // size
        self.total = self.steps_per_epoch * config.optim.epochs
        self.writer.line(
            f"{self.label}{self.train.name}: {len(self.train)} images of {len(self.train.classes)} labels;"
            f" {self.eval.name}: {len(self.eval)} images"
        )
        where = f"{len(self.devices)} {self.devices[0].device_kind}"
        self.writer.line(f"{self.label}{self.total} steps, {self.steps_per_epoch} an epoch, on {where}")
        positives = (self.train.labels * self.train.observed).sum(0)
        if absent := [name for name, count in zip(self.train.classes, positives) if not count]:
            self.writer.line(f"{self.train.name} has no image with {some(absent, 8)}: nothing is learnt of these")

    def _objects(self) -> None:
        begun = self.config.init and not rundir.untouched(self.workdir)  # then the other run is needed no more
        meta, values = experiment.facts(self.config, self.train, self.workdir if begun else None)
        rundir.save_meta(self.workdir, meta, values)
        self.experiment = experiment.assemble(self.config, meta, values)
        self.eval = scoring.without_given(self.experiment, self.eval)

    def _initial(self) -> TrainState:
        """The state to start from: this stage's checkpoint, what the stage before left, another run, or weights."""
        config, new = self.config, self.index == 0 and self.checkpoints.latest is None
        variables = experiment.init_variables(self.experiment, config.seed)
        if config.init and (new or config.cache.train_views):  # a resume has all but what the cache is made with
            variables, told = warm_start.of_run(config.init, variables, self.experiment)
            if new:
                self.writer.line(f"starts from {told}")
        self._cache(variables)
        frozen = self.experiment.system.backbone.frozen_parameters
        self.tx = make_optimizer(config, variables["params"], self.steps_per_epoch, frozen)
        state = jax.jit(lambda v: create_state(v, self.tx, ema=config.ema, seed=config.seed))(variables)
        if new:
            fixed = frozen_paths(variables["params"], frozen, config.optim.get("groups", ()))
            self.writer.model_table(variables["params"], self.workdir, fixed)
        self.step, self.place_state, self.place = parallel.compile_step(
            make_step(self.experiment, self.tx), config.parallel, self.devices
        )
        self.scorer = scoring.Scorer(self.experiment, self.devices)
        if self.checkpoints.latest is not None:
            state = self.checkpoints.restore(jax.eval_shape(lambda: state), "last")
            self.writer.line(f"{self.label}resumed at step {int(state.step)} of {self.total}")
        elif self.index:
            before = warm_start.of_stage(self.workdir / "checkpoints" / f"{self.index - 1}", config.start)
            variables = warm_start.take_over({"params": state.params, **state.variables}, before)
            state = create_state(variables, self.tx, ema=config.ema, seed=config.seed + self.index)
        return self.place_state(state)

    def _cache(self, variables: dict[str, Any]) -> None:
        """Compute or open cached endpoints where the config asks for them."""
        cache = self.config.cache
        self.cached = self.cached_eval = None
        if not cache.train_views:
            return
        if needs_image := getattr(self.experiment.system, "needs_image", ""):
            raise UserError(needs_image)
        if self.config.backbone.get("frozen", "") != "all":
            raise UserError(
                "config.cache.train_views needs config.backbone.frozen='all': cached endpoints never change."
            )
        encode, key = self.experiment.encode(variables), experiment.cache_key(self.experiment, variables)
        with self.writer.task() as show, self.fitting("eval"):
            size = self.config.eval.batch_size
            options = {"key": key, "limit_gb": cache.limit_gb, "progress": show, "batch_size": size}
            looks = tuple(feature_cache.view(v) for v in cache.train_views)
            failures = loader.Failures(len(self.train))
            maps = feature_cache.endpoints(self.train, looks, encode, failures=failures, **options)
            self.cached_eval = feature_cache.endpoints(self.eval, self.experiment.eval_views, encode, **options)
        self.cached = feature_cache.CachedBatches(
            self.train,
            maps,
            self.config.optim.batch_size,
            self.config.seed + self.index,
            self.config.input.views,
            failures.rows,
        )

    def _batches(self, start: int) -> Any:
        if self.cached is not None:
            return self.cached.iterate(start, self.total)
        return loader.train_batches(
            self.train, self.experiment.train_transform(), batch_size=self.config.optim.batch_size,
            seed=self.config.seed + self.index, start=start, steps=self.total, views=self.config.input.views,
            threads=self.config.input.threads, workers=self.config.input.workers,
        )  # fmt: skip

    def _due(self, step: int) -> bool:
        """Whether the state of this step is evaluated."""
        return step % (self.config.eval.every * self.steps_per_epoch) == 0 or step == self.total

    # --- the loop ----------------------------------------------------------------------------------------------------

    def _loop(self, state: TrainState) -> TrainState:
        config, start = self.config, int(state.step)
        pending: list[tuple[int, Any]] = []
        meter = progress.Meter(self.writer, self.label, start, self.total, config.optim.batch_size)
        with (
            interruptible() as asked,
            contextlib.closing(loader.Ahead(self._batches(start), self.place)) as batches,
            meter,
        ):
            for step in range(start, self.total):
                if step % self.steps_per_epoch == 0:
                    state = self._refresh(state, step // self.steps_per_epoch)
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state, metrics = self.step(state, next(batches))
                pending.append((step, metrics))
                done, late = step + 1, step + 1 - LATE
                if step == start:
                    meter.compiled(done)
                if len(pending) > LATE:
                    jax.block_until_ready(pending[-LATE - 1][1]["loss"])
                leave = bool(asked)  # once: a signal that comes later must not save what _log has not seen
                if self._due(done) or leave:
                    self._log(pending, done, meter)
                elif late % config.log_every == 0 and pending[0][0] < late:
                    self._log(pending, late, meter)
                if self._due(done):
                    state = self._evaluate(state, done, meter)
                elif leave:
                    self._save(state, done, None)
                else:
                    continue
                if asked:
                    self.checkpoints.wait()
                    raise Stop(f"stopped at step {done} of {self.total} and saved; run the same command to go on")
        self.checkpoints.wait()
        return state

    def _log(self, pending: list[tuple[int, Any]], until: int, meter: progress.Meter) -> None:
        """Fetch what the steps before `until` measured, a line for each config.log_every of them.

        A loss that is no number ends the run here. Steps from `until` on stay in flight.
        """
        ripe = [entry for entry in pending if entry[0] < until]
        del pending[: len(ripe)]
        fetched, lines = jax.device_get(ripe), []
        good = list(itertools.takewhile(lambda entry: np.isfinite([entry[1][k] for k in FINITE]).all(), fetched))
        for _, group in itertools.groupby(good, key=lambda entry: entry[0] // self.config.log_every):
            steps, values = zip(*group)
            mean = {k: float(np.mean([v[k] for v in values])) for k in values[0]}
            lines.append((steps[-1] + 1, mean | {"lr": float(values[-1]["lr"])}))
        if lines:
            meter.update(lines, self.index)
        if len(good) < len(fetched):
            step, metrics = fetched[len(good)]
            loss, norm = (float(metrics[k]) for k in FINITE)
            raise self.diverged(f"The loss of step {step} is {loss:.4g} (gradient norm {norm:.3g})")

    def diverged(self, what: str) -> Diverged:
        """The error that ends a run whose numbers are none; only what was good before is kept."""
        kept = self.checkpoints.latest
        return Diverged(
            f"{what}; training stopped and keeps {f'the checkpoint of step {kept}' if kept else 'no checkpoint'}."
            " Lower config.optim.lr or set config.optim.clip_norm, in another workdir."
        )

    def _refresh(self, state: TrainState, epoch: int) -> TrainState:
        """Let a system look at the whole training set: `refresh(variables, score, epoch) -> variables`."""
        system = self.experiment.system
        refresh = getattr(system, "refresh", None)
        if refresh is None or epoch % getattr(system, "refresh_every", 1):
            return state
        variables = {"params": state.params, **state.variables}

        def score(split: str = "train", view: str | None = None, entries: np.ndarray | None = None) -> Any:
            source, maps = (self.train, self.cached and self.cached.maps) if split == "train" else (self.eval, None)
            with self.fitting("eval"):
                return self.scorer.outputs(variables, source, view, self.config, maps, entries)

        changed = refresh(jax.device_get(state.variables), score, epoch)
        return self.place_state(dataclasses.replace(state, variables=changed))

    def _evaluate(self, state: TrainState, step: int, meter: progress.Meter, again: bool = False) -> TrainState:
        began = time.perf_counter()
        meter.say("evaluating")
        try:
            with self.fitting("eval"):
                found = scoring.raw_and_ema(self, state)
        except Diverged:
            raise
        except UserError:  # an image of the split cannot be read, or its batch does not fit: what was trained is kept
            if not again:
                self._save(state, step, None)
            raise
        metrics = {
            f"{kind}/{name}": value for kind, report in found.items() for name, value in report["metrics"].items()
        }
        best = max(found, key=lambda kind: found[kind]["metrics"].get("mAP") or -1.0)
        self.writer.scalars(step, metrics, self.index)
        meter.evaluated({k: r["metrics"] for k, r in found.items()}, time.perf_counter() - began)
        schedule = self.config.optim.get("schedule", {})
        if schedule.get("name") == "plateau":
            options = {k: v for k, v in schedule.items() if k not in ("name", "metric")}
            opt_state = optim.plateau_update(state.opt_state, scoring.watched(self, found["raw"]), **options)
            state = dataclasses.replace(state, opt_state=opt_state)
        kind = best if self.config.eval.select == "best_of_raw_and_ema" else "raw"
        self._save(state, step, {"mAP": found[kind]["metrics"]["mAP"]}, kind, replace=again)
        return state

    def _save(
        self, state: TrainState, step: int, metrics: dict[str, float] | None, kind: str = "raw", replace: bool = False
    ) -> None:
        meta = {"stage": self.index, "step": step, "kind": kind, "metrics": metrics}
        self.checkpoints.save(step, state, metrics=metrics, meta=meta, replace=replace)
