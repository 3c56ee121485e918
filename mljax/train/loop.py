"""The loop over the steps of a stage: it feeds the devices, reads what they measured, and heeds signals.

It knows a compiled step, where batches come from, and `Hooks` for what happens between steps. The trainer's hooks save
and evaluate (`mljax.train.trainer`); the benchmark's measure time.
"""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import numpy as np

from mljax.errors import UserError
from mljax.interrupt import Stop, interruptible, rescued_by
from mljax.pipeline.loader import Ahead
from mljax.rundir.progress import Meter
from mljax.types import TrainState

IN_FLIGHT = 2  # steps that the devices have queued while the host reads the metrics of the one before
MUST_BE_FINITE = ("loss", "grad_norm")  # metrics of a step that end the run where they are not


class Diverged(UserError):
    """A loss or scores that are not finite."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The steps of a stage and what happens at which of them.

    Attributes:
      steps_per_epoch, total: steps.
      evaluate_every: steps between evaluations; the last step is always evaluated.
      log_every: steps that a line of metrics.jsonl averages.
      stage: of the run, from 0.
    """

    steps_per_epoch: int
    total: int
    evaluate_every: int
    log_every: int
    stage: int = 0

    def evaluates(self, step: int) -> bool:
        """Whether the state after `step` steps is evaluated."""
        return step % self.evaluate_every == 0 or step == self.total


class Hooks(Protocol):
    """What happens between the steps."""

    def before_epoch(self, state: TrainState, epoch: int) -> TrainState:
        """The state to start an epoch with, counted from 0."""
        ...

    def evaluate(self, state: TrainState, step: int, meter: Meter) -> TrainState:
        """Evaluate the state after `step` steps and save it; returns the state to go on with."""
        ...

    def save(self, state: TrainState, step: int) -> None:
        """Save a state without an evaluation, because the run is asked to stop."""
        ...

    def flush(self) -> None:
        """Wait until everything that was saved is on disk."""
        ...


@dataclasses.dataclass
class Loop:
    """Runs compiled steps over batches.

    Attributes:
      plan: of the stage.
      step: (state, batch on devices) -> (state, metrics).
      place: host batch -> batch on devices.
      batches: (first step, end) -> host batches; what it returns has `close`.
      hooks: between steps.
      meter: the live line and metrics.jsonl.
      pending: steps whose metrics were not read yet.
    """

    plan: Plan
    step: Callable[[TrainState, Any], tuple[TrainState, Any]]
    place: Callable[[Any], Any]
    batches: Callable[[int, int], Iterator[Any]]
    hooks: Hooks
    meter: Meter
    pending: list[tuple[int, Any]] = dataclasses.field(default_factory=list)

    def run(self, state: TrainState) -> TrainState:
        """From a state to the end of the plan.

        Raises:
          Diverged: a loss that is not finite; the state is not saved.
          Stop: after Ctrl-C or SIGTERM, once the state is saved.
        """
        start = int(state.step)
        with (
            interruptible() as signals,
            contextlib.closing(Ahead(self.batches(start, self.plan.total), self.place)) as batches,
            self.meter,
        ):
            saved = start
            for step in range(start, self.plan.total):
                state, batch = self._before(state, step, batches, saved)
                began = time.monotonic()
                state = self._dispatch(state, step, batch)
                if step == start:
                    self.meter.compiled(step + 1)
                else:
                    signals.slowest = max(signals.slowest, time.monotonic() - began)
                signals.unsaved = True  # from here on a signal waits until the state is saved
                leave = bool(signals)  # once: a signal that comes later must not save what _read has not seen
                with self._stopping(step + 1):
                    state, done = self._after(state, step + 1, leave)
                    saved = step + 1 if done else saved
                    if done and signals:
                        raise Stop
            self.hooks.flush()
        return state

    def _before(self, state: TrainState, step: int, batches: Iterator[Any], saved: int) -> tuple[TrainState, Any]:
        """What a step needs: the state to start an epoch with, and a batch; a signal saves, if that was not done."""

        def save() -> None:
            if step > saved:
                self._read(step)
                self.hooks.save(state, step)
            self.hooks.flush()

        with self._stopping(step):
            try:
                if step % self.plan.steps_per_epoch == 0:
                    with rescued_by(save):
                        return self.hooks.before_epoch(state, step // self.plan.steps_per_epoch), next(batches)
                return state, next(batches)
            except Stop:
                save()
                raise

    @contextlib.contextmanager
    def _stopping(self, done: int) -> Iterator[None]:
        """A Stop says how far the run came, once that is on disk."""
        try:
            yield
        except Stop:
            self.hooks.flush()
            raise Stop(
                f"stopped at step {done} of {self.plan.total} and saved; run the same command to go on"
            ) from None

    def _dispatch(self, state: TrainState, step: int, batch: Any) -> TrainState:
        """Queue a step; returns when no more than IN_FLIGHT are unfinished."""
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            state, metrics = self.step(state, batch)
        self.pending.append((step, metrics))
        if len(self.pending) > IN_FLIGHT:
            jax.block_until_ready(self.pending[-IN_FLIGHT - 1][1]["loss"])
        return state

    def _after(self, state: TrainState, done: int, leave: bool) -> tuple[TrainState, bool]:
        """What follows a step: metrics, evaluation, a save if the run is to stop. Returns whether it was saved."""
        finished, evaluates = done - IN_FLIGHT, self.plan.evaluates(done)
        if evaluates or leave:
            self._read(done)
        elif finished % self.plan.log_every == 0 and self.pending[0][0] < finished:
            self._read(finished)
        if evaluates:
            return self.hooks.evaluate(state, done, self.meter), True
        if leave:
            self.hooks.save(state, done)
        return state, leave

    def _read(self, until: int) -> None:
        """Fetch what the steps before `until` measured, a line for each `log_every` of them; later ones stay queued.

        A loss that is not finite ends the run here.
        """
        ready = [entry for entry in self.pending if entry[0] < until]
        del self.pending[: len(ready)]
        fetched, lines = jax.device_get(ready), []
        good = list(itertools.takewhile(lambda entry: _finite(entry[1]), fetched))
        for _, group in itertools.groupby(good, key=lambda entry: entry[0] // self.plan.log_every):
            steps, values = zip(*group)
            mean = {k: float(np.mean([v[k] for v in values])) for k in values[0]}
            lines.append((steps[-1] + 1, mean | {"lr": float(values[-1]["lr"])}))
        if lines:
            self.meter.update(lines, self.plan.stage)
        if len(good) < len(fetched):
            step, metrics = fetched[len(good)]
            loss, norm = (float(metrics[k]) for k in MUST_BE_FINITE)
            raise Diverged(f"The loss of step {step} is {loss:.4g} (gradient norm {norm:.3g}).")


def _finite(metrics: Any) -> bool:
    return bool(np.isfinite([metrics[k] for k in MUST_BE_FINITE]).all())
