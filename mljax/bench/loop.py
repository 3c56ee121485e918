"""The trainer's own loop on synthetic photos: where its time goes, and what it costs above the bare step."""

import contextlib
import dataclasses
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from mljax import experiment
from mljax.bench.model import PLAIN, synthetic_meta
from mljax.bench.timing import Turns, trace
from mljax.config.derive import derive
from mljax.data.source import Source
from mljax.experiment import Experiment
from mljax.pipeline import feature_cache
from mljax.rundir.checkpoint import Checkpoints
from mljax.rundir.progress import Meter, Writer
from mljax.train import evaluation
from mljax.train.loop import Loop, Plan
from mljax.train.stage import Cache, Splits, StageSpec, build
from mljax.train.trainer import Trainer
from mljax.types import Config, Meta, TrainState

Batches = Callable[[int, int], Iterator[Any]]  # (first step, end) -> host batches

PHOTO = (500, 375)  # w, h, as VOC's


@dataclasses.dataclass(frozen=True)
class Photos:
    """`read` of a synthetic source: one of a few JPEG files in memory."""

    files: tuple[bytes, ...]

    def __call__(self, index: int) -> bytes:
        return self.files[index % len(self.files)]


def photos(count: int = 16) -> Photos:
    """JPEG files of soft random shapes with grain, about as large as photos of this size are (30 to 60 KB)."""
    rng, files = np.random.default_rng(0), []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(256, size=(24, 32, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize(PHOTO, Image.Resampling.BICUBIC), np.float32)
        pixels = np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=85)
        files.append(buffer.getvalue())
    return Photos(tuple(files))


def source(meta: Meta, rows: int, name: str) -> Source:
    """A split of synthetic photos with labels of a synthetic meta."""
    labels = meta.labels[np.arange(rows) % len(meta.labels)]
    return Source(
        name=f"synthetic {name}", classes=meta.classes, ids=[f"{name} {i}" for i in range(rows)], labels=labels,
        observed=np.ones_like(labels), scored=np.ones_like(labels), read=photos(), fingerprint="synthetic",
    )  # fmt: skip


@dataclasses.dataclass
class Shares:
    """Seconds of a training loop.

    Attributes:
      steps: that were timed.
      total: of all.
      input: in which the loop waited for a batch.
      evaluation: in which it evaluated.
    """

    steps: int
    total: float
    input: float
    evaluation: float

    def percent(self) -> dict[str, float]:
        """Of the total; the step is what the other two leave."""
        step = self.total - self.input - self.evaluation
        seconds = {"step": step, "input": self.input, "evaluation": self.evaluation}
        return {name: 100 * value / self.total for name, value in seconds.items()}


class Rehearsal:
    """The trainer's stage on synthetic photos, and hooks of its loop that measure time and keep nothing.

    Attributes:
      stage: whole, with a new folder of checkpoints that stays empty.
      state: to start from.
      eval: the split that is evaluated.
      waited, evaluated: seconds in which the loop waited for batches and in which it evaluated.
    """

    def __init__(self, config: Config, writer: Writer, checkpoints: Checkpoints, steps: int, labels: int | None):
        config = derive(config, {"weights.name": None})
        self.meta, size = synthetic_meta(config, labels), config.optim.batch_size
        self.eval = source(self.meta, steps * size, "evaluation")  # as many as were trained on: an epoch of each
        photos = source(self.meta, max(size, min(steps * size, 4096)), "training")
        self.stage, self.state = build(
            StageSpec(config, writer.workdir), writer, Splits(photos, self.eval),
            experiment.assemble(config, self.meta, PLAIN), checkpoints,
            epoch=100, make_cache=synthetic_cache,  # a schedule wants some steps
        )  # fmt: skip
        self.trainer = Trainer(self.stage)
        self.waited = self.evaluated = 0.0

    def run(self, state: TrainState, steps: int, batches: Batches) -> TrainState:
        """The trainer's loop over so many steps, an epoch that ends with an evaluation."""
        stage, start = self.stage, int(state.step)
        end = start + steps
        plan = Plan(end, end, end, stage.config.log_every)
        meter = Meter(stage.writer, "", start, end, stage.config.optim.batch_size)
        return Loop(plan, stage.step, stage.place, batches, self, meter).run(state)

    def batches(self, start: int, end: int) -> Generator[Any, None, None]:
        """The stage's batches; waiting for them is timed."""
        batches: Any = self.stage.batches(start, end)
        with contextlib.closing(batches):
            for _ in range(start, end):
                began = time.perf_counter()
                batch = next(batches)
                self.waited += time.perf_counter() - began
                yield batch

    # --- hooks -------------------------------------------------------------------------------------------------------

    def before_epoch(self, state: TrainState, epoch: int) -> TrainState:
        return self.trainer.before_epoch(state, epoch)

    def evaluate(self, state: TrainState, step: int, meter: Meter) -> TrainState:
        jax.block_until_ready(state.params)
        stage, began = self.stage, time.perf_counter()
        evaluation.evaluate(state, stage.scorer, self.eval, stage.config, stage.cached_eval)
        self.evaluated += time.perf_counter() - began
        return state

    def save(self, state: TrainState, step: int) -> None:
        """A rehearsal keeps nothing."""

    def flush(self) -> None:
        """Nothing was saved."""


class WithoutEvaluation(Rehearsal):
    """A rehearsal of the steps alone."""

    def evaluate(self, state: TrainState, step: int, meter: Meter) -> TrainState:
        jax.block_until_ready(state.params)
        return state


def synthetic_cache(
    spec: StageSpec, writer: Writer, splits: Splits, experiment: Experiment, variables: Mapping[str, Any]
) -> Cache:
    """Random endpoints in place of computed ones, the same for every image."""
    config, encode, rng = spec.config, experiment.encode(variables), np.random.default_rng(0)

    def endpoints(text: str) -> dict[str, np.ndarray]:
        image = np.zeros((1, *[feature_cache.view(text).size] * 2, 3), np.uint8)
        shapes = {name: x.shape[1:] for name, x in jax.eval_shape(encode, image).items()}
        drawn = {name: rng.uniform(0, 1, (1, *shape)).astype(np.float16) for name, shape in shapes.items()}
        return {name: np.broadcast_to(x, (2**20, *x.shape[1:])) for name, x in drawn.items()}

    views = {text: endpoints(text) for text in dict.fromkeys((*config.cache.train_views, *config.cache.eval_views))}
    maps = {text: views[text] for text in config.cache.train_views}
    size = config.optim.batch_size
    batches = feature_cache.CachedBatches(splits.train, maps, size, config.seed, config.input.views)
    return Cache(batches, {feature_cache.view(text).text: views[text] for text in config.cache.eval_views})


@contextlib.contextmanager
def _opened() -> Iterator[tuple[Writer, Checkpoints]]:
    """A writer that prints nothing, and checkpoints, both in a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory() as folder, Writer(Path(folder)) as writer:
        writer.live, writer.console.quiet = False, True
        with Checkpoints(Path(folder) / "checkpoints" / "0") as checkpoints:
            yield writer, checkpoints


def shares(config: Config, steps: int = 12, labels: int | None = None, profile: str | None = None) -> Shares:
    """Train some steps and evaluate as many images, after everything is compiled: where the time goes.

    With `profile` a trace of it is written there: input threads, copies to the device, and steps beside each other.
    """
    with _opened() as (writer, checkpoints):
        rehearsal = Rehearsal(config, writer, checkpoints, 1, labels)
        state = rehearsal.run(rehearsal.state, 1, rehearsal.batches)  # compiles the step and the evaluation
        rehearsal.eval = source(rehearsal.meta, steps * config.optim.batch_size, "evaluation")
        rehearsal.waited = rehearsal.evaluated = 0.0
        jax.block_until_ready(state)
        began = time.perf_counter()
        with trace(profile):
            rehearsal.run(state, steps, rehearsal.batches)
            total = time.perf_counter() - began
        return Shares(steps, total, rehearsal.waited, rehearsal.evaluated)


def overhead(config: Config, rounds: int = 5, steps: int = 20, labels: int | None = None) -> Turns:
    """The trainer's loop over a batch that is there, in turns with the bare compiled step: sides "trainer", "step".

    The loop puts the batch on the device, keeps and fetches metrics, writes metrics.jsonl and the live line; reading
    and augmenting images is not in it (`shares` measures that).
    """
    with _opened() as (writer, checkpoints):
        rehearsal = WithoutEvaluation(config, writer, checkpoints, steps, labels)
        stage, state = rehearsal.stage, rehearsal.state
        with contextlib.closing(rehearsal.batches(0, steps)) as batches:
            batch = next(batches)
        placed = stage.place(batch)

        def loop() -> None:
            nonlocal state
            state = rehearsal.run(state, steps, lambda start, end: (batch for _ in range(start, end)))

        def bare() -> None:
            nonlocal state
            for _ in range(steps):
                state, metrics = stage.step(state, placed)
            jax.block_until_ready((state, metrics))

        loop()
        bare()
        turns = Turns({"trainer": [], "step": []}, {"trainer": [], "step": []})
        for i in range(rounds):
            for name, run in (("trainer", loop), ("step", bare))[:: 1 if i % 2 == 0 else -1]:
                wall, cpu = time.perf_counter(), time.process_time()
                run()
                turns.wall[name].append((time.perf_counter() - wall) / steps)
                turns.cpu[name].append((time.process_time() - cpu) / steps)
        return turns


def metrics_seconds(rows: int, labels: int, rounds: int = 3) -> float:
    """Seconds for all metrics of (rows labels) random scores, the median of some rounds."""
    from mljax import metrics

    rng = np.random.default_rng(0)
    scores = rng.normal(size=(rows, labels)).astype(np.float32)
    truth = (rng.random((rows, labels)) < 0.04).astype(np.uint8)
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        metrics.evaluate(scores, truth, np.ones_like(truth), classes=[str(i) for i in range(labels)])
        times.append(time.perf_counter() - began)
    return statistics.median(times)
