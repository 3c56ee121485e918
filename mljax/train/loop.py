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
LARGEST = "state/largest"  # a metric of `step.watched`: magnitudes of the new parameters and variables
MUST_BE_FINITE = ("loss", "grad_norm", LARGEST)  # metrics of a step that end the run where they are not


class Diverged(UserError):
    """A loss, a state or scores that are not finite.

    Attributes:
      batch: of the step, on the devices; None: it is not known.
      metrics: of the step, on the host.
      before: those of the step before; empty: none was looked at.
    """

    def __init__(self, message: str, batch: Any = None, metrics: Any = None, before: Any = None):
        super().__init__(message)
        self.batch, self.metrics, self.before = batch, metrics or {}, before or {}


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
      unchecked: steps of which nobody knows yet whether all is finite, with their batches.
      before: what was measured of the last step that was checked.
    """

    plan: Plan
    step: Callable[[TrainState, Any], tuple[TrainState, Any]]
    place: Callable[[Any], Any]
    batches: Callable[[int, int], Iterator[Any]]
    hooks: Hooks
    meter: Meter
    pending: list[tuple[int, Any]] = dataclasses.field(default_factory=list)
    unchecked: list[tuple[int, Any, Any]] = dataclasses.field(default_factory=list)
    before: dict[str, Any] = dataclasses.field(default_factory=dict)

    def run(self, state: TrainState) -> TrainState:
        """From a state to the end of the plan.

        Raises:
          Diverged: a loss, gradient, parameter or variable that is not finite; the state is not saved. It ends the run
            before the next step if that is known by then, and else within IN_FLIGHT steps.
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
                    while self.unchecked:  # a refresh must not see what is not finite
                        self._check()
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
        """Queue a step; returns when no more than IN_FLIGHT are unfinished, and those that are finished are checked."""
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            state, metrics = self.step(state, batch)
        self.pending.append((step, metrics))
        self.unchecked.append((step, metrics, batch))
        if len(self.pending) > IN_FLIGHT:
            jax.block_until_ready(self.pending[-IN_FLIGHT - 1][1]["loss"])
        while self.unchecked and (len(self.unchecked) > IN_FLIGHT or _ready(self.unchecked[0][1])):
            self._check()
        return state

    def _check(self) -> None:
        """Look whether all is finite of the oldest step that is not checked yet."""
        step, metrics, _ = self.unchecked[0]
        values = jax.device_get({name: metrics[name] for name in MUST_BE_FINITE if name in metrics})
        if not _finite(values):
            self._read(step + 1)
        self.unchecked.pop(0)
        self.before = values

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

        What is not finite ends the run here.
        """
        ready = [entry for entry in self.pending if entry[0] < until]
        del self.pending[: len(ready)]
        fetched, lines = jax.device_get(ready), []
        good = list(itertools.takewhile(lambda entry: _finite(entry[1]), fetched))
        for _, group in itertools.groupby(good, key=lambda entry: entry[0] // self.plan.log_every):
            steps, values = zip(*group)
            mean = {k: float(np.mean([v[k] for v in values])) for k in values[0] if k != LARGEST}
            lines.append((steps[-1] + 1, mean | {"lr": float(values[-1]["lr"])}))
        if lines:
            self.meter.update(lines, self.plan.stage)
        if len(good) < len(fetched):
            step, metrics = fetched[len(good)]
            before = fetched[len(good) - 1][1] if good else self.before
            raise Diverged(_words(step, metrics), dict((s, b) for s, _, b in self.unchecked).get(step), metrics, before)
        self.unchecked = [entry for entry in self.unchecked if entry[0] >= until]
        self.before = fetched[-1][1] if fetched else self.before


def _finite(metrics: Any) -> bool:
    return all(bool(np.isfinite(metrics[name]).all()) for name in MUST_BE_FINITE if name in metrics)


def _ready(metrics: Any) -> bool:
    """Whether what must be finite can be looked at without waiting."""
    return all(getattr(metrics[name], "is_ready", lambda: True)() for name in MUST_BE_FINITE if name in metrics)


def _words(step: int, metrics: Any) -> str:
    loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
    if np.isfinite([loss, norm]).all():
        return f"The state after step {step} is not finite (loss {loss:.4g}, gradient norm {norm:.3g})."
    return f"The loss of step {step} is {loss:.4g} (gradient norm {norm:.3g})."
