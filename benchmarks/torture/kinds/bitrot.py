"""Flipped bits, truncated, missing and swapped files, over every file of a run directory: nothing wrong in silence.

What a run keeps is loaded as its users load it. The outcome of every reader is the very same values, or an error, or
values of an older checkpoint together with a warning; anything else is silent damage.
"""

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.torture import processes, runs
from benchmarks.torture.harness import Case, Failed, Kind, once
from mljax import rundir, scoring, seal
from mljax.config.text import to_json
from mljax.errors import UserError
from mljax.rundir import verify
from mljax.rundir.checkpoint import Checkpoints
from mljax.rundir.measurements import read_metrics
from mljax.trees import flatten
from mljax.types import TrainState

NOT_READ = ("model.txt", "events.out.tfevents")  # for people and TensorBoard, whose format has its own checksums
COST, MIB = 0.30, 64

# --- readers ----------------------------------------------------------------------------------------------------------


def _checkpoint(which: str) -> Callable[[Path], Any]:
    """The step that is restored and the digest of its arrays; the template has the shapes of the undamaged one."""

    def read(workdir: Path) -> Any:
        folder = workdir / "checkpoints" / "0"
        template = _template(json.loads((workdir.parent / "shapes.json").read_text()))
        with Checkpoints(folder, read_only=True) as checkpoints:
            state = checkpoints.restore(template, which)
            return [checkpoints.restored, {path: seal.crc(np.asarray(x)) for path, x in flatten(state).items()}]

    return read


def _template(shapes: dict[str, Any]) -> Any:
    from mljax.trees import nest

    tree = nest({path: np.zeros(shape, dtype) for path, (dtype, shape) in shapes.items()})
    return TrainState(**{name: tree.get(name, {}) for name in TrainState.__dataclass_fields__})


def _meta(workdir: Path) -> Any:
    meta = rundir.load_meta(workdir)
    return [meta.name, meta.classes, *(None if x is None else seal.crc(x) for x in _arrays(meta))]


def _arrays(meta: Any) -> list[Any]:
    return [meta.labels, meta.observed, meta.vectors]


READERS: dict[str, Callable[[Path], Any]] = {
    "config.json": lambda workdir: to_json(rundir.load_config(workdir)),
    "meta.npz": _meta,
    "preprocessing.json": rundir.load_preprocessing,
    "report.json": lambda workdir: rundir.read_json(workdir / "report.json"),
    "scores.npz": lambda workdir: seal.of_arrays(rundir.read_arrays(workdir / "scores.npz")),
    "env.json": lambda workdir: rundir.read_json(workdir / "env.json"),
    "metrics.jsonl": lambda workdir: json.dumps(read_metrics(workdir)),
    "data.json": lambda workdir: rundir.read_json(workdir / "data.json"),
    "data.npz": lambda workdir: seal.of_arrays(rundir.read_arrays(workdir / "data.npz")),
    "finished": lambda workdir: json.dumps(_quietly(scoring.finished, workdir)),
    "state": _checkpoint("last"),
    "best": _checkpoint("best"),
}


def _quietly(function: Callable[[Path], Any], workdir: Path) -> Any:
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        return function(workdir)


def readers_of(name: str, last: str, best: str) -> list[str]:
    """The readers that a file of a run directory concerns.

    Args:
      last, best: the steps of these names; only their arrays are read, and the records of all.
    """
    if name.startswith("checkpoints"):
        _, _, step, part, *_ = [*name.split("/"), ""]
        if part == "record":
            return ["state", "best"]
        return [reader for reader, read in (("state", last), ("best", best)) if step == read][:1]
    chosen = [name] if name in READERS else []
    return chosen + (["finished"] if name in ("report.json", "scores.npz", "meta.npz", "preprocessing.json") else [])


def outcome(reader: str, workdir: Path) -> tuple[str, Any]:
    """("value" | "said" | "error", what was read or said)."""
    with _warnings() as said:
        try:
            value = READERS[reader](workdir)
        except UserError as error:
            return "error", str(error)
    value = json.loads(json.dumps(value))
    return ("said", [value, said]) if said else ("value", value)


@contextlib.contextmanager
def _warnings() -> Iterator[list[str]]:
    said: list[str] = []
    handler, log = logging.Handler(), logging.getLogger("mljax")
    handler.emit = lambda record: said.append(record.getMessage())
    log.addHandler(handler)
    try:
        yield said
    finally:
        log.removeHandler(handler)


# --- cases ------------------------------------------------------------------------------------------------------------


class Copy:
    """A worker's own copy of the run, its files, and what its readers give while it is whole."""

    def __init__(self, case: Case):
        kept = once(case.shared / "kept", lambda folder: _make(case, folder))
        self.base = case.shared / f"copy{os.getpid()}"
        shutil.rmtree(self.base, ignore_errors=True)
        shutil.copytree(kept, self.base)
        self.run = self.base / "run"
        every = [p.relative_to(self.run).as_posix() for p in self.run.rglob("*") if p.is_file()]
        self.files = sorted(name for name in every if not name.startswith(NOT_READ))
        with Checkpoints(self.run / "checkpoints" / "0", read_only=True) as checkpoints:
            self.last, self.best = str(checkpoints.latest), str(checkpoints.best)
            leaves = {step: verify.record(checkpoints._path(step))["leaves"] for step in checkpoints.steps}
            self.steps = {step: {p: entry[2] for p, entry in entries.items()} for step, entries in leaves.items()}
        readers = {reader for name in self.files for reader in self.readers(name)}
        self.whole = {reader: outcome(reader, self.run) for reader in readers}
        if bad := [reader for reader, (how, _) in self.whole.items() if how != "value"]:
            raise Failed(f"the undamaged run is not read by {bad}: {self.whole[bad[0]]}")

    def readers(self, name: str) -> list[str]:
        return readers_of(name, self.last, self.best)

    def judge(self, reader: str) -> str:
        """What is wrong with what a reader gives now; empty if nothing is."""
        how, value = outcome(reader, self.run)
        if how == "error" or (how == "value" and value == self.whole[reader][1]):
            return ""
        read = value[0] if how == "said" else value
        if reader in ("state", "best"):
            step, arrays = read
            expected = {p: crc for p, crc in self.steps.get(step, {}).items() if p in arrays}
            if arrays != expected or not arrays:
                return f"{reader}: arrays of step {step} are not those that were saved"
            return "" if how == "said" else f"{reader}: step {step} without a word, not {self.whole[reader][1][0]}"
        return "" if how == "said" else f"{reader}: another value without a word"


_copies: dict[int, Copy] = {}


def _make(case: Case, folder: Path) -> None:
    argv = runs.argv("baseline", folder / "run", "--config.backbone.widths=(4,4,4,4)", "--config.ema=0.9")
    process = processes.forked(argv, folder / "log", after=lambda: _shapes(folder))
    if process.wait(runs.LIMIT):
        raise Failed(f"the run to be damaged failed: {process.err[-300:]!r}")


def _shapes(folder: Path) -> None:
    with Checkpoints(folder / "run" / "checkpoints" / "0", read_only=True) as checkpoints:
        leaves = verify.record(checkpoints._path(checkpoints.steps[-1]))["leaves"]
    (folder / "shapes.json").write_text(json.dumps({p: [dtype, shape] for p, (dtype, shape, _) in leaves.items()}))


def case(case: Case) -> dict[str, Any] | None:
    if os.getpid() not in _copies:
        _copies[os.getpid()] = Copy(case)
    if case.what == "cost of digests":
        return _cost(case)
    copy = _copies[os.getpid()]
    name = copy.files[case.index % len(copy.files)]
    path = copy.run / name
    before = path.read_bytes()
    other = _partner(copy, name, case.rng) if case.what == "swapped" else None
    kept = other.read_bytes() if other is not None else b""
    how = _damage(path, before, other, kept, case)
    try:
        wrong = [text for reader in copy.readers(name) if (text := copy.judge(reader))]
    finally:
        path.write_bytes(before)
        if other is not None:
            other.write_bytes(kept)
    if wrong:
        raise Failed(f"{name}, {how}: {'; '.join(wrong)}")
    return None


def _partner(copy: Copy, name: str, rng: np.random.Generator) -> Path:
    """A file to change places with: of the same name in another checkpoint, else any other."""
    same = [f for f in copy.files if f != name and Path(f).name == Path(name).name]
    others = same or [f for f in copy.files if f != name]
    return copy.run / others[int(rng.integers(len(others)))]


def _damage(path: Path, before: bytes, other: Path | None, kept: bytes, case: Case) -> str:
    rng = case.rng
    if case.what == "flip" and before:
        at, bit = int(rng.integers(len(before))), int(rng.integers(8))
        damaged = bytearray(before)
        damaged[at] ^= 1 << bit
        path.write_bytes(damaged)
        return f"bit {bit} of byte {at}"
    if case.what == "truncation" and before:
        size = int(rng.integers(len(before)))
        path.write_bytes(before[:size])
        return f"cut to {size} of {len(before)} bytes"
    if other is not None:
        path.write_bytes(kept)
        other.write_bytes(before)
        return f"in the place of {other.parent.name}/{other.name}"
    path.unlink()
    return "missing"


def _cost(case: Case) -> dict[str, Any]:
    """The time of all digests of a state, as a share of saving it and waiting until it is on the disk."""
    rng = np.random.default_rng(0)
    params = {str(i): rng.standard_normal(MIB * 2**20 // 4 // 8, np.float32) for i in range(8)}
    fields: Any = (np.int32(1), params, {}, {}, None, np.zeros(2, np.uint32))
    state = TrainState(*fields)
    shares = []
    for attempt in range(5):
        began = time.perf_counter()
        with Checkpoints(case.folder / str(attempt)) as checkpoints:
            checkpoints.save(1, state)
        whole, began = time.perf_counter() - began, time.perf_counter()
        for leaf in params.values():
            seal.crc(leaf)
        shares.append((time.perf_counter() - began) / whole)
    share = float(np.median(shares[1:]))
    if share > COST:
        raise Failed(f"digests take {share:.0%} of a blocking save of {MIB} MiB")
    return {"figures": {"digests, % of a blocking save": round(100 * share, 1)}}


KIND = Kind(
    name="bitrot",
    goal="flips, truncations, missing, swapped over every file: none silent; digests <= 30 % of a blocking save",
    plan={"flip": 10_000, "truncation": 200, "missing": 100, "swapped": 50, "cost of digests": 1},
    case=case,
    limit=60.0,
)
