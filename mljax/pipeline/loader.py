"""From a source to batches: grain shuffles, decodes, augments; every random choice depends on (seed, step) alone.

A resume slices the batched data set at its step, so any number of threads or workers, and a resume, give the same
batches. Who decodes and who resizes is in `mljax.pipeline.picture`.
"""

import collections
import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mljax.data.source import Source
from mljax.errors import UserError
from mljax.interrupt import Stop
from mljax.pipeline import processes
from mljax.pipeline.failures import Failures
from mljax.pipeline.images import ImageError, decode
from mljax.pipeline.picture import Picture
from mljax.waiting import Patient

Transform = Callable[[Any, np.random.Generator], np.ndarray]
BLACK = np.zeros((64, 64, 3), np.uint8)  # what stands for an image that cannot be read


def incomplete(why: str, source: Source) -> UserError:
    """An image that an evaluation misses: its numbers would not be those of the split."""
    return UserError(f"{why.rstrip('.')} ({source.name} is evaluated, and must be complete).")


@dataclasses.dataclass
class Load:
    """index, random generator -> a record with its augmented image (h w 3) uint8, or views (v h w 3) besides.

    With `failures`, an image that cannot be read is a black one without known labels, and its mask is 0.
    """

    source: Source
    transform: Transform
    views: int = 1
    failures: Failures | None = None

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        index = int(index)
        opened = Picture if getattr(self.transform, "pictures", False) else decode
        labels, observed, mask = self.source.labels[index], self.source.observed[index], np.float32(1)
        try:
            picture = opened(self.source.read(index), where=str(self.source.ids[index]))
            views = [self.transform(picture, rng) for _ in range(self.views)]
        except (ImageError, OSError) as error:
            if self.failures is None:
                raise incomplete(str(error), self.source) from None
            self.failures.add(index, str(self.source.ids[index]), str(error))
            views = [self.transform(opened(BLACK), rng) for _ in range(self.views)]
            labels, observed, mask = np.zeros_like(labels), np.zeros_like(observed), np.float32(0)
        out = {
            "image": views[0],
            "labels": labels.astype(np.float32),
            "observed": observed.astype(np.float32),
            "index": np.int32(index),
            "mask": mask,
        }
        if self.views > 1:
            out["views"] = np.stack(views)
        return out


def train_batches(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    start: int,
    steps: int,
    views: int = 1,
    threads: int = 8,
    workers: int = 0,
    failures: Failures | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches `start` .. `steps` of an endless shuffled stream; each epoch is a new order.

    Args:
      batch_size: over all processes; this process gets its share: of P processes the p-th has every P-th example of
        the same batch, augmented in the same way, that one process alone would have.
      seed: of order and augmentation.
      start: the first step wanted: a resume slices here.
      steps: of the whole run.
      views: augmented images of each example.
      threads, workers: of this process; or worker processes, each with as many threads.
      failures: collects the images that cannot be read, whose mask is 0; with workers, complete once `close` was
        called. None: they are only logged and counted.
    Raises:
      UserError: more images than `failures` allows cannot be read.
    """
    import grain

    process, count = jax.process_index(), jax.process_count()
    failures = Failures(len(source)) if failures is None else failures
    failures.shared = _shared_file() if workers else None
    epochs = -(-steps * batch_size // len(source)) + 1
    # The slice of all keeps shuffle and random_map at the places from which grain derives their seeds, as they were.
    data = grain.MapDataset.range(len(source)).seed(seed)[0::1].shuffle().repeat(epochs)
    data = data.random_map(Load(source, transform, views, failures))[process::count]
    data = data.batch(batch_size // count, drop_remainder=True)[start:steps]
    return _iterate(data, threads, workers, batch_size, failures)


def _shared_file() -> Path:
    handle, name = tempfile.mkstemp(prefix="mljax-unreadable-")
    os.close(handle)
    return Path(name)


def eval_batches(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    threads: int = 8,
    workers: int = 0,
    failures: Failures | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Every image once, in order; the last batch is padded by copies that carry mask 0.

    An image that cannot be read is an error; with `failures` its mask is 0.
    """
    import grain

    process, count = jax.process_index(), jax.process_count()
    data = grain.MapDataset.range(len(source)).seed(0)[process::count].random_map(Load(source, transform, 1, failures))
    local = batch_size // count
    for batch in _iterate(data.batch(local, drop_remainder=False), threads, workers, batch_size):
        yield pad(batch, local)


def pad(batch: dict[str, Any], size: int) -> dict[str, Any]:
    """Fill a batch up to `size` by repeating its last example, with mask 0."""
    missing = size - len(batch["mask"])
    if not missing:
        return batch

    def fill(x: np.ndarray) -> np.ndarray:
        return np.concatenate([x, np.repeat(x[-1:], missing, axis=0)])

    filled = jax.tree.map(fill, batch)
    filled["mask"][-missing:] = 0
    return filled


class Ahead:
    """Batches on their devices before they are asked for: they are copied there while the device computes.

    Args:
      batches: an iterator of host batches; `close` closes it.
      place: host batch -> device arrays; returns before the copy is done, as `jax.device_put` does.
      depth: batches that wait on the device.
    """

    def __init__(self, batches: Any, place: Callable[[Any], Any], depth: int = 2):
        self.batches, self.place, self.depth = batches, place, depth
        self.waiting: collections.deque[Any] = collections.deque()
        self.end: Exception | None = None  # raised when its turn comes: what came before it is trained on

    def __iter__(self) -> "Ahead":
        return self

    def __next__(self) -> Any:
        while self.end is None and len(self.waiting) <= self.depth:
            try:
                self.waiting.append(self.place(next(self.batches)))
            except Stop:
                raise
            except Exception as error:
                self.end = error
        if self.waiting:
            return self.waiting.popleft()
        assert self.end is not None
        raise self.end

    def close(self) -> None:
        self.waiting.clear()
        self.batches.close()


def _iterate(data: Any, threads: int, workers: int, batch_size: int, failures: Failures | None = None) -> Iterator[Any]:
    """Batches of a grain MapDataset, which is imported where it is used: it takes 0.1 s."""
    import grain

    # The buffer counts elements of the last MapDataset, that is batches: the default of 500 would fill the memory. A
    # thread makes one of them, so more threads than that would wait.
    ahead = max(2, min(threads, 512 // batch_size))
    options = grain.ReadOptions(num_threads=min(threads, ahead), prefetch_buffer_size=ahead)
    iterator = data.to_iter_dataset(options)
    if workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():  # grain's workers refuse to start otherwise (notebooks, tests)
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=workers)
        iterator = iterator.mp_prefetch(options, worker_init_fn=processes.start)
        return Patient(processes.Shielded(iter(iterator), workers, failures))
    return Patient(iter(iterator))
