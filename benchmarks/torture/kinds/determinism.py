"""The same order, batches and losses: as golden files have them, and whatever the number of threads and workers."""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.torture import pool, processes, runs
from benchmarks.torture.harness import ROOT, Case, Failed, Kind, Options, make_case, once
from mljax.data.source import Source

GOLDEN = ROOT / "tests" / "golden" / "torture.json"
IMAGES, EPOCHS, BATCH = 1000, 2, 50
STEPS = 100
# Rates of plain SGD, by which a rounding error does not grow: programs for AVX alone stay within 3e-7 of those for
# AVX-512 over the 100 steps, where AdamW at the usual rates ends percents apart.
SYSTEMS = {"cmsg": 1e-4, "sst": 1e-3, "role": 1e-3}
TOLERANCE = 1e-5  # of a loss, relative: processors differ in the order of their sums
READERS = {
    **{f"{n} workers": {"workers": n, "threads": 2} for n in (0, 1, 2, 8)},
    **{f"{n} threads": {"workers": 0, "threads": n} for n in (0, 1, 8)},
}


def case(case: Case) -> dict[str, Any]:
    if case.what == "order":
        _check_order(_in_fork(case, order))
    elif case.what in SYSTEMS:
        return _check_losses(losses(case, case.what), json.loads(GOLDEN.read_text())["losses"][case.what])
    else:
        reference = once(case.shared / "batches", lambda folder: _keep(case, folder))
        expected = json.loads((reference / "digests.json").read_text())
        made = _in_fork(case, lambda: batches(**READERS[case.what]))
        if differing := [i for i, (a, b) in enumerate(zip(made, expected, strict=True)) if a != b]:
            raise Failed(f"{len(differing)} of {len(expected)} batches differ, the first: {differing[0]}")
    return {}


def _in_fork(case: Case, function: Callable[[], Any]) -> Any:
    """What a function returns, called in a fork of this worker, which must not start JAX itself."""
    path = case.folder / "result.json"

    def hook() -> None:
        path.write_text(json.dumps(function()))
        os._exit(0)

    process = processes.forked([], case.folder / "log", hook=hook)
    process.wait(120)
    if not path.is_file():
        raise Failed(f"status {process.status}: {process.err.strip()[-300:]!r}")
    return json.loads(path.read_text())


# --- order ------------------------------------------------------------------------------------------------------------


def order() -> list[int]:
    """The rows of two epochs of 1,000 images, as batches have them."""
    from mljax.pipeline import loader

    labels = np.ones((IMAGES, 1), np.uint8)
    source = Source(
        name="order", classes=("x",), ids=[str(i) for i in range(IMAGES)], labels=labels, observed=labels,
        scored=labels, read=_grey, fingerprint="order",
    )  # fmt: skip
    steps = EPOCHS * IMAGES // BATCH
    stream = loader.train_batches(source, _plain, batch_size=BATCH, seed=0, start=0, steps=steps, threads=2)
    return [int(i) for batch in stream for i in batch["index"]]


def _grey(index: int) -> np.ndarray:
    return np.full((2, 2, 3), index % 256, np.uint8)


def _plain(image: Any, rng: np.random.Generator) -> np.ndarray:
    return np.asarray(image)


def _check_order(made: list[int]) -> None:
    expected = json.loads(GOLDEN.read_text())["order"]
    if made != expected:
        at = next((i for i, (a, b) in enumerate(zip(made, expected)) if a != b), min(len(made), len(expected)))
        raise Failed(f"row {at} of the order is {made[at : at + 1]}, not {expected[at : at + 1]}")


# --- batches ----------------------------------------------------------------------------------------------------------


def batches(workers: int, threads: int) -> list[str]:
    """A digest of every batch of two epochs of drawn scenes, augmented."""
    from mljax.data.scenes import scenes
    from mljax.pipeline import loader, transforms

    source = scenes("train", train_images=48, size=64)
    view = transforms.train(48, crop="random_resized", flip=0.5, randaugment="package", cutout=0.5)
    stream = loader.train_batches(
        source, view, batch_size=8, seed=3, start=1, steps=12, views=2, threads=threads, workers=workers
    )
    made = []
    with contextlib.closing(stream) as stream:  # pyright: ignore[reportArgumentType]
        for batch in stream:
            digest = hashlib.sha256()
            for name in sorted(batch):
                digest.update(np.ascontiguousarray(batch[name]).tobytes())
            made.append(digest.hexdigest())
    return made


def _keep(case: Case, folder: Path) -> None:
    (folder / "digests.json").write_text(json.dumps(_in_fork(case, lambda: batches(workers=0, threads=1))))


# --- losses -----------------------------------------------------------------------------------------------------------


def losses(case: Case, system: str) -> list[float]:
    """The losses of 100 steps of a tiny run."""
    workdir, epochs = case.folder / system, -(-STEPS // runs.STEPS)
    argv = runs.argv(system, workdir, f"--config.optim.epochs={epochs}", f"--config.eval.every={epochs}")
    argv += ["--config.optim.name=sgd", f"--config.optim.lr={SYSTEMS[system]}"]
    process = processes.forked(argv, case.folder / f"{system}.log")
    if process.wait(runs.LIMIT * 3):
        raise Failed(f"status {process.status}: {process.err.strip()[-300:]!r}")
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in itertools.islice((line for line in lines if "loss" in line), STEPS)]


def _check_losses(made: list[float], expected: list[float]) -> dict[str, Any]:
    if len(made) != len(expected):
        raise Failed(f"{len(made)} losses, not {len(expected)}")
    apart = np.abs(np.array(made) - expected) / np.abs(expected)
    if apart.max() > TOLERANCE:
        first = int(np.argmax(apart > TOLERANCE))
        raise Failed(f"the loss of step {first + 1} is {made[first]!r}, not {expected[first]!r}")
    return {"figures": {"relative difference of a loss": float(apart.max())}}


# --- golden files -----------------------------------------------------------------------------------------------------


def write_golden(out: Path) -> None:
    """Make tests/golden/torture.json anew: for a change of order or losses that is meant."""
    os.environ.update(pool.environment(KIND, Options(out)))
    case = make_case(KIND, 0, Options(out))
    golden = {
        "order": _in_fork(case, order),
        "losses": {system: losses(case, system) for system in SYSTEMS},
        "released": _in_fork(case, lambda: runs.digest(ROOT / "tests" / "golden" / "run_0_1")),
    }
    GOLDEN.write_text(json.dumps(golden) + "\n")
    shutil.rmtree(case.folder)


KIND = Kind(
    name="determinism",
    goal="golden order of 1,000 images, golden losses of 100 steps of three systems; workers and threads equal",
    plan={"order": 1, **dict.fromkeys(SYSTEMS, 1), **dict.fromkeys(READERS, 1)},
    case=case,
    limit=400.0,
)
