"""The trainer's own loop on synthetic photos: where its time goes, and what it costs above the bare step."""

import contextlib
import dataclasses
import io
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from mljax import experiment, scoring, train
from mljax.bench.model import PLAIN, synthetic_meta
from mljax.bench.timing import Turns, trace
from mljax.data.source import Source
from mljax.pipeline import feature_cache
from mljax.rundir import progress
from mljax.rundir.checkpoint import Checkpoints
from mljax.types import Config, Meta

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
    chosen = np.arange(rows) % len(meta.labels)
    labels = meta.labels[chosen]
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
        found = {"input": self.input, "evaluation": self.evaluation}
        found = {"step": self.total - sum(found.values()), **found}
        return {name: 100 * value / self.total for name, value in found.items()}


class Rehearsal(train.Stage):
    """The trainer's stage on synthetic photos, with a clock; nothing of it is kept."""

    def __init__(self, config: Config, workdir: Path, writer: progress.Writer, steps: int, labels: int | None):
        super().__init__(config, workdir, 0, 1, writer)
        self.steps_per_epoch, self.total = 100, steps  # a schedule wants some steps
        self.meta = synthetic_meta(config, labels)
        size = config.optim.batch_size
        self.train = source(self.meta, max(size, min(steps * size, 4096)), "training")
        self.eval = source(self.meta, steps * size, "evaluation")  # as many as were trained on: an epoch of each
        self.ready = None  # a host batch that takes the place of the input
        self.waited = self.evaluated = 0.0
        self.finished = 0.0

    def prepare(self) -> Any:
        """Build and compile everything; returns the state."""
        self.experiment = experiment.assemble(self.config, self.meta, PLAIN)
        self.checkpoints = Checkpoints(self.folder, keep_best_of="mAP")
        state = self._initial()
        self.steps_per_epoch = self.total
        return state

    def _cache(self, variables: Any) -> None:
        """Random endpoints in place of a cache, the same for every image."""
        config, self.cached, self.cached_eval = self.config, None, None
        if not config.cache.train_views:
            return
        encode, rng = self.experiment.encode(variables), np.random.default_rng(0)

        def maps(text: str) -> dict[str, np.ndarray]:
            image = np.zeros((1, *[feature_cache.view(text).size] * 2, 3), np.uint8)
            found = {name: x.shape[1:] for name, x in jax.eval_shape(encode, image).items()}
            drawn = {name: rng.uniform(0, 1, (1, *shape)).astype(np.float16) for name, shape in found.items()}
            return {name: np.broadcast_to(x, (2**20, *x.shape[1:])) for name, x in drawn.items()}

        looks = {text: maps(text) for text in dict.fromkeys((*config.cache.train_views, *config.cache.eval_views))}
        train_maps = {text: looks[text] for text in config.cache.train_views}
        size, views = config.optim.batch_size, config.input.views
        self.cached = feature_cache.CachedBatches(self.train, train_maps, size, config.seed, views)
        self.cached_eval = {feature_cache.view(text).text: looks[text] for text in config.cache.eval_views}

    def _batches(self, start: int) -> Iterator[Any]:
        if self.ready is not None:
            for _ in range(start, self.total):
                yield self.ready
            return
        batches = iter(super()._batches(start))
        try:
            for _ in range(start, self.total):
                began = time.perf_counter()
                batch = next(batches)
                self.waited += time.perf_counter() - began
                yield batch
        finally:
            batches.close()

    def _evaluate(self, state: Any, step: int, meter: Any) -> Any:
        jax.block_until_ready(state.params)
        self.finished = time.perf_counter()
        if self.ready is None:
            scoring.raw_and_ema(self, state)
        self.evaluated += time.perf_counter() - self.finished
        return state

    def _save(self, *_: Any) -> None:
        """A rehearsal keeps nothing."""


def _opened(config: Config, folder: str) -> progress.Writer:
    writer = progress.Writer(Path(folder))
    writer.live, writer.console.quiet = False, True
    return writer


def shares(config: Config, steps: int = 12, labels: int | None = None, profile: str | None = None) -> Shares:
    """Train some steps and evaluate as many images, after everything is compiled: where the time goes.

    With `profile` a trace of it is written there: input threads, copies to the device, and steps beside each other.
    """
    with tempfile.TemporaryDirectory() as folder, _opened(config, folder) as writer:
        stage = Rehearsal(config, Path(folder), writer, 1, labels)
        with config.unlocked():
            config.eval.every = 1
        state = stage._loop(stage.prepare())  # compiles the step and the evaluation
        stage.total = stage.steps_per_epoch = steps + 1  # goes on behind the first step
        stage.eval = source(stage.meta, steps * config.optim.batch_size, "evaluation")
        stage.waited = stage.evaluated = 0.0
        jax.block_until_ready(state)
        began = time.perf_counter()
        with trace(profile):
            stage._loop(state)
            total = time.perf_counter() - began
        stage.checkpoints.__exit__(None, None, None)
        return Shares(steps, total, stage.waited, stage.evaluated)


def overhead(config: Config, rounds: int = 5, steps: int = 20, labels: int | None = None) -> Turns:
    """The trainer's loop over a batch that is there, in turns with the bare compiled step: sides "trainer", "step".

    The loop puts the batch on the device, keeps and fetches metrics, writes metrics.jsonl and the live line; reading
    and augmenting images is not in it (`shares` tells of that).
    """
    with tempfile.TemporaryDirectory() as folder, _opened(config, folder) as writer:
        stage = Rehearsal(config, Path(folder), writer, steps, labels)
        found = Turns({"trainer": [], "step": []}, {"trainer": [], "step": []})
        state = stage.prepare()
        batches: Any = stage._batches(0)
        with contextlib.closing(batches):
            stage.ready = next(batches)
        placed = stage.place(stage.ready)

        def loop() -> None:
            nonlocal state
            start = int(state.step)
            stage.total = stage.steps_per_epoch = start + steps
            state = stage._loop(state)

        def bare() -> None:
            nonlocal state
            for _ in range(steps):
                state, metrics = stage.step(state, placed)
            jax.block_until_ready((state, metrics))

        loop()
        bare()
        for i in range(rounds):
            for name, run in (("trainer", loop), ("step", bare))[:: 1 if i % 2 == 0 else -1]:
                wall, cpu = time.perf_counter(), time.process_time()
                run()
                found.wall[name].append((time.perf_counter() - wall) / steps)
                found.cpu[name].append((time.process_time() - cpu) / steps)
        stage.checkpoints.__exit__(None, None, None)
        return found


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
