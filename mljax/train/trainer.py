"""From a config to a trained run: stage after stage, resumed where it was left."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mljax import interrupt, parallel, rundir, scoring
from mljax.check import check
from mljax.config.stages import stage_configs
from mljax.errors import UserError
from mljax.pipeline.failures import Failures
from mljax.rundir import manifest
from mljax.rundir.checkpoint import Checkpoints, NotFinite
from mljax.rundir.progress import Meter, Writer
from mljax.train import diagnosis, evaluation
from mljax.train.loop import Diverged, Loop
from mljax.train.spec import StageSpec
from mljax.train.stage import Stage, build, compute_cache, load_splits, make_experiment, steps_per_epoch
from mljax.train.step import has_plateau, reduce_on_plateau
from mljax.trees import flatten
from mljax.types import Config, TrainState


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
    with rundir.opened(workdir, config), Writer(workdir) as writer:
        report = scoring.finished(workdir)
        if report is not None:
            return report
        for index, stage in enumerate(stages):
            spec = StageSpec(stage, workdir, index, len(stages))
            with spec.fitting("optim"):
                report = run_stage(spec, writer)
        assert report is not None, "the last stage is reported"
        return report


def run_stage(spec: StageSpec, writer: Writer) -> dict[str, Any] | None:
    """Train a stage to its end; the last stage of a run is scored and reported."""
    config = spec.config
    parallel.check_batch(config.optim.batch_size, len(spec.devices))
    splits = load_splits(spec, writer)
    with spec.fitting("optim", len(splits.train.classes)):
        experiment = make_experiment(spec, splits.train)
        splits = dataclasses.replace(splits, eval=scoring.scored_split(experiment, splits.eval))
        epoch = steps_per_epoch(config, splits.train)
        with Checkpoints(spec.folder, keep_best_of="mAP") as checkpoints, listing(splits.failures, spec):
            stage, state = build(spec, writer, splits, experiment, checkpoints, epoch=epoch, make_cache=compute_cache)
            if splits.checked is not None:
                splits.checked.save()
            trainer = Trainer(stage)
            state = trainer.train(state)
            report = trainer.report(state) if spec.is_last else None
    if spec.is_last and splits.failures is not None and (bad := splits.failures.rows()):
        were = f"{len(bad)} training images" if len(bad) > 1 else "1 training image"
        writer.line(f"{were} could not be read and {'were' if len(bad) > 1 else 'was'} left out; see {spec.bad_images}")
    return report


@contextlib.contextmanager
def listing(failures: Failures | None, spec: StageSpec) -> Iterator[None]:
    """Write the list of images that cannot be read when a stage ends, in whatever way."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(UserError, OSError):  # the error that ends the run is the one to be said
            if failures is not None:
                failures.write(spec.bad_images)
        raise
    if failures is not None:
        failures.write(spec.bad_images)


class Trainer:
    """Trains one stage; the hooks of its loop (`mljax.train.loop.Hooks`).

    Attributes:
      stage: whole.
      last: its last evaluation.
    """

    def __init__(self, stage: Stage):
        self.stage = stage
        self.last: evaluation.Evaluation | None = None

    def train(self, state: TrainState) -> TrainState:
        """From a state, fresh or restored, to the last one of the stage.

        Raises:
          Diverged: a loss or scores that are not finite; says which checkpoint is kept.
        """
        stage, step = self.stage, int(state.step)
        try:
            if self._unevaluated(step):
                stage.writer.resume(stage.spec.index, step)
                with self._meter(step) as meter:
                    state = self._evaluate(state, step, meter, again=True)
            if step < stage.plan.total:
                stage.writer.resume(stage.spec.index, step)
                loop = Loop(stage.plan, stage.step, stage.place, stage.batches, self, self._meter(step))
                state = loop.run(state)
        except Diverged as error:
            kept, ids = stage.checkpoints.latest, stage.splits.train.ids
            raise Diverged(diagnosis.sentence(error, stage.experiment, ids, kept, stage.spec.workdir)) from error
        return state

    def report(self, state: TrainState) -> dict[str, Any]:
        """Write scores.npz and report.json of what `config.eval.select` chooses, and print the table.

        The split is scored again only if the last evaluation was of something else.
        """
        stage, last = self.stage, self.last
        config, source = stage.config, stage.splits.eval
        with stage.fitting("eval"):
            chosen = evaluation.select(config, state, stage.checkpoints, source)
            scores = last.scores.get(chosen.kind) if last is not None and last.step == chosen.step else None
            if scores is None:
                scores = stage.scorer.scores(chosen.variables, source, stage.cached_eval, config)
            return scoring.write(stage.spec.workdir, scores, source, config, by=chosen.how, step=chosen.step)

    # --- between the steps -------------------------------------------------------------------------------------------

    def before_epoch(self, state: TrainState, epoch: int) -> TrainState:
        """Let a system see the whole training split: `refresh(variables, score, epoch) -> variables`."""
        stage, system = self.stage, self.stage.experiment.system
        refresh = getattr(system, "refresh", None)
        if refresh is None or epoch % getattr(system, "refresh_every", 1):
            return state
        variables = {"params": state.params, **state.variables}

        def score(split: str = "train", view: str | None = None, entries: np.ndarray | None = None) -> Any:
            training = split == "train"
            source = stage.splits.train if training else stage.splits.eval
            maps = stage.cached_train if training else None
            with stage.fitting("eval"):
                return stage.scorer.outputs(variables, source, view, stage.config, maps, entries)

        changed = refresh(jax.device_get(state.variables), score, epoch)
        if path := manifest.not_finite({f"variables/{p}": np.asarray(x) for p, x in flatten(changed).items()}):
            raise Diverged(f"{path} is not finite after the refresh before epoch {epoch}.")
        return stage.place_state(dataclasses.replace(state, variables=changed))

    def evaluate(self, state: TrainState, step: int, meter: Meter) -> TrainState:
        """Evaluate a state and save it; returns it with the learning rate that a plateau schedule asks for."""
        return self._evaluate(state, step, meter)

    def save(self, state: TrainState, step: int) -> None:
        """Save a state that was not evaluated."""
        self._save(state, step, None)

    def flush(self) -> None:
        """Wait until all checkpoints are on disk."""
        with interrupt.saving():
            self.stage.checkpoints.wait()

    def _unevaluated(self, step: int) -> bool:
        """Whether the checkpoint of this step was saved before its evaluation failed: of memory, or of an image."""
        stage = self.stage
        at_end = step and step == stage.checkpoints.latest and stage.plan.evaluates(step)
        return bool(at_end) and not stage.checkpoints.metrics()

    def _meter(self, step: int) -> Meter:
        stage = self.stage
        return Meter(stage.writer, stage.spec.label, step, stage.plan.total, stage.config.optim.batch_size)

    def _evaluate(self, state: TrainState, step: int, meter: Meter, again: bool = False) -> TrainState:
        """As `evaluate`; `again`: the state was saved before and takes its own place."""
        stage, config, began = self.stage, self.stage.config, time.perf_counter()
        source = stage.splits.eval
        meter.say("evaluating")
        try:
            with interrupt.rescued_by(lambda: self._keep(state, step, again)), stage.fitting("eval"):
                done = evaluation.evaluate(state, stage.scorer, source, config, stage.cached_eval)
        except Diverged:
            raise
        except (UserError, interrupt.Stop):  # an image cannot be read, the batch does not fit: what was trained is kept
            self._keep(state, step, again)
            raise
        self.last = done
        named = {f"{kind}/{name}": value for kind, m in done.metrics.items() for name, value in m.items()}
        stage.writer.scalars(step, named, stage.spec.index)
        meter.evaluated(done.metrics, time.perf_counter() - began)
        if has_plateau(config):
            value = evaluation.plateau_metric(done, source, config)
            state = dataclasses.replace(state, opt_state=reduce_on_plateau(config, state.opt_state, value))
        kind = done.best if config.eval.select == "best_of_raw_and_ema" else "raw"
        self._save(state, step, {"mAP": done.metrics[kind]["mAP"]}, kind, replace=again)
        return state

    def _keep(self, state: TrainState, step: int, saved: bool) -> None:
        """Have a state on disk that may be saved already."""
        if not saved:
            self.save(state, step)
        self.flush()

    def _save(
        self, state: TrainState, step: int, metrics: dict[str, Any] | None, kind: str = "raw", replace: bool = False
    ) -> None:
        spec, failures = self.stage.spec, self.stage.splits.failures
        if failures is not None:
            failures.write(spec.bad_images)
        meta = {"stage": spec.index, "step": step, "kind": kind, "metrics": metrics}
        try:
            with interrupt.saving():
                self.stage.checkpoints.save(step, state, metrics=metrics, meta=meta, replace=replace)
        except NotFinite as error:
            raise Diverged(f"{error.path} is not finite after step {step}.") from None
