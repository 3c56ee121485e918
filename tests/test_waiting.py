"""Nothing hangs: reads that never answer and batches that never come are errors within a bound, which name the file."""

import dataclasses
import gc
import os
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest

import toy
from mljax import interrupt, train, waiting
from mljax.data.source import Files, Source
from mljax.errors import UserError
from mljax.pipeline import images, loader
from mljax.pipeline.failures import Failures
from mljax.train.stage import Stage


@pytest.fixture
def fifo(tmp_path):
    """A file whose reader waits for ever, as on a mount that is gone."""
    path = tmp_path / "dead.jpg"
    os.mkfifo(path)
    yield str(path)
    for _ in range(50):  # let go of those who wait
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:
            break


def hang(path, limit=None):
    with open(path, "rb") as file:
        return file.read()


@dataclasses.dataclass
class Hanging:
    """`read` of a split, which hangs at one index; also in a worker process, with a bound of its own."""

    path: str
    at: int
    bound: float = 0.3

    def __call__(self, index):
        waiting.READ = self.bound
        if index == self.at:
            return waiting.bounded(lambda: hang(self.path), self.path)
        return np.full((8, 8, 3), index, np.uint8)


def split(read, count=12):
    ones = np.ones((count, 2), np.uint8)
    return Source(
        name="toy", classes=("a", "b"), ids=[f"{i}.jpg" for i in range(count)], labels=ones, observed=ones, scored=ones,
        read=read, fingerprint="toy",
    )  # fmt: skip


def close(batches: Any) -> None:
    batches.close()


def whole(image, rng):
    return np.asarray(image)


def test_a_read_ends_within_its_bound_and_the_next_one_works(fifo, monkeypatch):
    monkeypatch.setattr(waiting, "READ", 0.2)
    began = time.monotonic()
    with pytest.raises(waiting.Stalled, match=r"Reading .*dead.jpg has not ended after 0.2 s; check the disk"):
        waiting.bounded(lambda: hang(fifo), fifo)
    assert time.monotonic() - began < 1
    assert waiting.bounded(lambda: b"well", "other") == b"well"
    with pytest.raises(FileNotFoundError):
        waiting.bounded(lambda: hang("absent"), "absent")


def test_whoever_reads_an_image_waits_no_longer(fifo, monkeypatch):
    monkeypatch.setattr(waiting, "READ", 0.2)
    for module in ("mljax.data.source", "mljax.pipeline.images"):
        monkeypatch.setattr(f"{module}.read_regular", hang)
    for read in (lambda: Files([fifo])(0), lambda: images.decode(fifo)):
        with pytest.raises(waiting.Stalled, match="dead.jpg"):
            read()


@pytest.mark.parametrize("options", [{"threads": 0}, {"threads": 4}])
def test_training_and_evaluation_stop_at_such_an_image(fifo, monkeypatch, options):
    monkeypatch.setattr(waiting, "READ", waiting.READ)
    source = split(Hanging(fifo, 5))
    failures = Failures(len(source), allowed=1.0)
    batches = loader.train_batches(source, whole, batch_size=4, seed=0, start=0, steps=3, failures=failures, **options)
    began = time.monotonic()
    with pytest.raises(UserError, match="dead.jpg has not ended after 0.3 s"):
        list(batches)
    close(batches)
    with pytest.raises(UserError, match="dead.jpg has not ended after 0.3 s"):
        list(loader.eval_batches(source, whole, batch_size=4, **options))
    assert time.monotonic() - began < 5 and not failures.bad


@pytest.mark.slow
def test_a_worker_process_says_so_too(fifo):
    batches = loader.train_batches(split(Hanging(fifo, 5)), whole, batch_size=4, seed=0, start=0, steps=3, workers=1)
    with pytest.raises(UserError, match="dead.jpg has not ended after 0.3 s"):
        list(batches)
    close(batches)


def endless(event):
    yield 1
    event.wait()


def test_a_batch_that_never_comes(monkeypatch):
    monkeypatch.setattr(waiting, "BATCH", 0.6)
    event = threading.Event()
    batches = waiting.Patient(endless(event))
    assert next(batches) == 1
    with pytest.raises(waiting.Stalled, match="no batch for 0.6 s"):
        next(batches)
    assert list(batches) == []
    event.set()
    batches.close()


def test_iterators_and_threads_are_let_go():
    before = threading.active_count()
    batches = waiting.Patient(iter(range(3)))
    assert list(batches) == [0, 1, 2] and list(batches) == []
    del batches
    gc.collect()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_a_signal_while_no_batch_comes_saves(tmp_path, monkeypatch):
    config, event, plain = toy.small(), threading.Event(), Stage.batches
    expected = train.fit(config, tmp_path / "undisturbed")

    def four(self, start, end):
        batches = plain(self, start, end)
        yield from (next(batches) for _ in range(4))
        threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGTERM]).start()
        event.wait()

    monkeypatch.setattr(Stage, "batches", lambda *args: waiting.Patient(four(*args)))
    monkeypatch.setattr(loader.Ahead, "__init__", lambda self, *args: unbuffered(self, *args))
    with pytest.raises(interrupt.Stop, match="stopped at step 4 of 9 and saved") as stop:
        train.fit(config, tmp_path / "run")
    assert stop.value.status == 143
    event.set()
    monkeypatch.undo()
    assert train.fit(config, tmp_path / "run")["metrics"] == expected["metrics"]


ahead = loader.Ahead.__init__


def unbuffered(self, batches, place):
    ahead(self, batches, place, 0)
