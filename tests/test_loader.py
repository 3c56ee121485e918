"""Batches depend on (seed, step) alone: not on threads, worker processes, processes of the run, or a resume."""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from mljax.data.source import Files, Source
from mljax.errors import UserError
from mljax.pipeline import loader, transforms
from mljax.pipeline.failures import Failures

COUNT, BATCH, STEPS = 21, 6, 8  # more than two epochs, none of them a whole number of batches


@pytest.fixture
def source(tmp_path: Path) -> Source:
    paths = []
    for i in range(COUNT):
        paths.append(str(tmp_path / f"{i}.jpg"))
        noise = np.random.default_rng(i).integers(0, 255, (5, 6, 3), np.uint8)
        Image.fromarray(noise).resize((40 + i, 50), Image.Resampling.BICUBIC).save(paths[-1])
    labels = np.eye(COUNT, 5, dtype=np.uint8)
    ones = np.ones_like(labels)
    return Source(
        name="tiny", classes=tuple("abcde"), ids=[f"{i}.jpg" for i in range(COUNT)], labels=labels, observed=ones,
        scored=ones, read=Files(paths), fingerprint="",
    )  # fmt: skip


def batches(source: Source, start: int = 0, **options) -> list:
    transform = transforms.train(24, crop="random_resized", randaugment="package")
    options = {"threads": 0, "batch_size": BATCH, "steps": STEPS, **options}
    with contextlib.closing(loader.train_batches(source, transform, seed=3, start=start, views=2, **options)) as found:
        return list(found)


def same(one: list, other: list) -> None:
    for first, second in zip(one, other, strict=True):
        assert first.keys() == second.keys()
        for key in first:
            np.testing.assert_array_equal(first[key], second[key], err_msg=key)


def test_every_epoch_has_every_image_once(source):
    order = np.concatenate([batch["index"] for batch in batches(source)])
    assert sorted(order[:COUNT]) == sorted(order[COUNT : 2 * COUNT]) == list(range(COUNT))
    assert order[:COUNT].tolist() != order[COUNT : 2 * COUNT].tolist()


def test_worker_processes_give_the_same_batches(source):
    """From the start and after a resume, which may have another number of them."""
    whole = batches(source)
    same(batches(source, workers=2, threads=1), whole)
    same(batches(source, start=5, workers=1, threads=2), whole[5:])


@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_the_batches_of_one(source, monkeypatch, count):
    """Each has its part of the very batch, augmented alike, that one process would have."""
    whole, parts = batches(source), []
    monkeypatch.setattr(jax, "process_count", lambda: count)
    for process in range(count):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        parts.append(batches(source))
    for step, batch in enumerate(whole):
        for key in batch:
            together = np.stack([part[step][key] for part in parts], axis=1)
            np.testing.assert_array_equal(together.reshape(batch[key].shape), batch[key], err_msg=key)


def test_evaluation_is_shared_too(source, monkeypatch):
    """Every image once over all processes, in order, padded by what has mask 0; worker processes change nothing."""
    look = transforms.evaluate(24)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    seen = []
    for process in range(2):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        found = list(loader.eval_batches(source, look, batch_size=8, threads=0))
        assert all(len(batch["mask"]) == 4 for batch in found)
        seen += [int(i) for batch in found for i, mask in zip(batch["index"], batch["mask"]) if mask]
    assert seen == [*range(0, COUNT, 2), *range(1, COUNT, 2)]
    monkeypatch.undo()
    one, other = (list(loader.eval_batches(source, look, batch_size=8, threads=1, workers=w)) for w in (0, 1))
    same(one, other)


def cut(source: Source, rows) -> None:
    for row in rows:
        with open(source.read.paths[row], "r+b") as file:
            file.truncate(200)


@pytest.mark.slow
def test_the_limit_of_unreadable_images_is_that_of_the_run(source, tmp_path, monkeypatch):
    """Not of each worker: two workers that meet one such image each have met two."""
    monkeypatch.setattr(loader.tempfile, "tempdir", str(tmp_path))
    cut(source, [3])
    same(batches(source, workers=2, threads=1), batches(source))  # one is skipped, in whichever process
    cut(source, [3, 9])
    with pytest.raises(UserError, match=r"2 of 21 training images cannot be read, more than 1%; the first: "):
        batches(source, workers=2, threads=1)
    assert not list(tmp_path.glob("mljax-unreadable-*"))


def test_workers_tell_each_other(tmp_path):
    one = Failures(100, shared=tmp_path / "names")
    other = dataclasses.replace(one, bad={})
    one.add(4, "a\n1.jpg", "cut short")
    other.add(4, "a\n1.jpg", "cut short")
    with pytest.raises(UserError, match=r"2 of 100 .*: a\\n1.jpg, b.jpg. Repair"):
        other.add(7, "b.jpg", "cut short")
    one.collect()
    assert one.bad == other.bad


def test_the_list_of_bad_images_goes_on_with_the_run(tmp_path, caplog):
    """Written, read by the resumed run, and counted there; nobody's name tears a line or reaches the terminal raw."""
    path = tmp_path / "bad_images.txt"
    Failures(300).write(path)
    assert not path.exists()  # all can be read
    first = Failures(300)
    first.add(9, "b\t\x1b[31m.jpg", "not\na picture")
    first.add(2, "a.jpg", "cut short")
    first.write(path)
    assert path.read_text().splitlines() == [
        "row\timage\treason", "2\ta.jpg\tcut short", r"9" "\t" r"b\t\x1b[31m.jpg" "\t" r"not\na picture"
    ]  # fmt: skip
    resumed = Failures(300)
    resumed.read(path)
    assert set(resumed.bad) == {2, 9} and len(caplog.records) == 2 and "\x1b" not in caplog.text
    resumed.add(2, "a.jpg", "cut short")
    resumed.add(5, "c.jpg", "cut short")
    assert len(caplog.records) == 3
    with pytest.raises(UserError, match="4 of 300 training images cannot be read"):
        resumed.add(6, "d.jpg", "cut short")
    path.write_text("something else\nagain\n")
    with pytest.raises(UserError, match="is not a list of unreadable images"):
        Failures(3).read(path)


class Counted:
    def __init__(self, total: int, error: Exception | None = None):
        self.read, self.total, self.error, self.closed = 0, total, error, False

    def __next__(self) -> int:
        if self.read == self.total:
            raise self.error or StopIteration
        self.read += 1
        return self.read

    def close(self) -> None:
        self.closed = True


def test_batches_wait_on_the_device():
    """Two of them, placed before they are asked for; an error comes in its turn; closed, all is closed."""
    host = Counted(5)
    ahead = loader.Ahead(host, lambda batch: -batch, depth=2)
    assert host.read == 0 and next(ahead) == -1 and host.read == 3 and next(ahead) == -2 and host.read == 4
    assert list(ahead) == [-3, -4, -5]
    ahead.close()
    assert host.closed
    ahead = loader.Ahead(Counted(2, UserError("broken")), abs, depth=4)
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(UserError, match="broken"):
        next(ahead)
    array = next(loader.Ahead(iter([{"x": np.ones(3)}]), jax.device_put))["x"]
    assert isinstance(array, jax.Array)


def test_what_an_import_does_not_import():
    """What takes long and not every use needs comes when it is used: grain 0.1 s, plots, other frameworks."""
    heavy = "{'grain', 'tensorflow', 'torch', 'matplotlib', 'sklearn', 'clu'}"
    program = f"import sys, mljax.train, mljax.predict; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def children():
    return [p for p in multiprocessing.active_children() if p.name.startswith("grain-process-prefetch")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "says"), [(signal.SIGSTOP, "was stopped for 4 s"), (signal.SIGKILL, "exit code -9")]
)
def test_a_worker_that_is_stopped_or_killed_is_an_error(source, number, says):
    batches = loader.train_batches(
        source, transforms.train(24), batch_size=4, seed=3, start=0, steps=10_000, workers=2, threads=1
    )
    with contextlib.closing(batches):
        next(batches)
        os.kill(children()[0].pid, number)
        began = time.monotonic()
        with pytest.raises(UserError, match=says):
            for _ in range(10_000):
                next(batches)
        assert time.monotonic() - began < 10


TRAINER = """
import os, sys
sys.path.insert(0, sys.argv[1])
import multiprocessing
from mljax.data.splits import load
from mljax.pipeline import loader, transforms
if __name__ == "__main__":
    source = load({"name": "scenes", "train_images": 50}, "train")
    batches = loader.train_batches(
        source, transforms.train(24), batch_size=4, seed=3, start=0, steps=1000, workers=2, threads=1)
    next(batches)
    print(*[p.pid for p in multiprocessing.active_children()], flush=True)
    os.kill(os.getpid(), 9)
"""


@pytest.mark.slow
def test_a_killed_trainer_leaves_no_workers(tmp_path):
    (tmp_path / "trainer.py").write_text(TRAINER)
    root = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, tmp_path / "trainer.py", root], capture_output=True, text=True, timeout=120)
    pids = [int(pid) for pid in done.stdout.split()]
    assert done.returncode == -9 and len(pids) == 2, done.stderr
    until = time.monotonic() + 10
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < until
        time.sleep(0.1)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
