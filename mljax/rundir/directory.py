"""A run directory as a whole: who may train in it, and what was trained there."""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mljax.cache import not_world_writable
from mljax.config.text import completed, differences, from_json, to_json
from mljax.errors import UserError
from mljax.interrupt import cleaning
from mljax.rundir.environment import environment
from mljax.rundir.files import check_path, damaged, read_arrays, read_json, write_arrays, write_json
from mljax.rundir.lock import locked
from mljax.types import Config, Meta

# Keys that change how fast or how loudly a run goes, or on what, but not what it computes.
FREE = (
    "log_every",
    "devices",
    "parallel",
    "input.threads",
    "input.workers",
    "eval.batch_size",
    "data.root",
    "data.digest",
    "data.changed",
    "cache.limit_gb",
)
BAD_IMAGES = "bad_images.txt"  # a list that stays, whatever becomes of the run
# What a start writes before anything is trained; the next one writes all of it anew.
START_FILES = (
    *("config.json", "env.json", "preprocessing.json", "meta.npz", "model.txt"),
    *("data.json", "data.npz"),
)
# What a finished run is read by, and can be made again from its checkpoints.
FINISHED = {
    "report.json": read_json,
    "scores.npz": read_arrays,
    "preprocessing.json": read_json,
    "meta.npz": read_arrays,
}


def untouched(workdir: Path) -> bool:
    """Whether the run there never came to train: neither a measurement nor a checkpoint nor a report."""
    kept = (workdir / "metrics.jsonl", workdir / "report.json")
    return not any(p.exists() for p in kept) and not any(workdir.glob("checkpoints/*/[0-9]*"))


def check_same(workdir: Path, config: Config) -> None:
    """Compare a config with that of the run in a directory; keys of `FREE` may differ, newer keys have their defaults.

    Raises:
      UserError: the directory holds a run of another config; the sentence names what differs.
    """
    old, new = completed(read_json(workdir / "config.json")), json.loads(to_json(config))
    changed = differences(_by_stage(old), _by_stage(new))
    changed = [d for d in changed if not re.sub(r"^stages\[\d+\]\.", "", d).startswith(tuple(f"{k}:" for k in FREE))]
    if changed:
        more = f" (and {len(changed) - 6} more)" if len(changed) > 6 else ""
        raise UserError(
            f"{workdir} holds a run of another config; it differs in {'; '.join(changed[:6])}{more}."
            " Choose another --workdir, or delete this one."
        )


def _by_stage(config: dict[str, Any]) -> dict[str, Any]:
    """A config with what its stages change under the names `stages[0]`, `stages[1]`, .., as overrides have them."""
    rest = {key: value for key, value in config.items() if key != "stages"}
    return rest | {f"stages[{i}]": stage for i, stage in enumerate(config.get("stages") or ())}


def open_run(workdir: Path, config: Config) -> None:
    """Make the directory, or check that it belongs to the same config.

    A run that never came to train, because something in its config or data was wrong, gives its directory to the next.

    Raises:
      UserError: the directory holds a run of another config; the sentence names what differs.
    """
    _make(workdir)
    if (workdir / "config.json").is_file() and not untouched(workdir):
        check_same(workdir, config)
        return
    write_json(workdir / "config.json", json.loads(to_json(config)))
    write_json(workdir / "env.json", environment(config))


def _make(workdir: Path) -> None:
    """Make the directory unless it is there, and holds a run or nothing."""
    check_path(workdir)
    if workdir.is_file():
        raise UserError(f"The workdir {workdir} is a file; choose another --workdir.")
    if not (workdir / "config.json").is_file() and workdir.is_dir() and _visible(workdir):
        raise UserError(f"{workdir} is not empty and holds no run of mljax; choose another --workdir.")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The workdir {workdir} cannot be made ({error.strerror}); choose another --workdir.") from None


@contextlib.contextmanager
def opened(workdir: Path, config: Config) -> Iterator[None]:
    """`open_run` for as long as a run lasts, with the directory locked and nothing in it writable by everybody.

    A start that fails before it trains leaves behind what was there before, if the directory was absent or empty; one
    that holds an earlier run, or anything else, stays as it is.
    """
    check_path(workdir)
    absent = [folder for folder in (workdir, *workdir.parents) if not os.path.exists(folder)]
    empty = workdir in absent or (workdir.is_dir() and not _visible(workdir))

    def remove() -> None:
        with contextlib.suppress(OSError):
            for folder in absent:
                folder.rmdir()  # not if something is in it

    with _undone(remove), not_world_writable():
        _make(workdir)
        with locked(workdir), _undone(lambda: _clean(workdir)) if empty else contextlib.nullcontext():
            open_run(workdir, config)
            yield


@contextlib.contextmanager
def _undone(undo: Callable[[], None]) -> Iterator[None]:
    """What is to be done where an error, or a signal, ends this."""
    with cleaning(undo):
        try:
            yield
        except BaseException:
            undo()
            raise


def _clean(workdir: Path) -> None:
    """Remove what a start has written that never came to train."""
    with contextlib.suppress(OSError):
        if untouched(workdir):
            for name in START_FILES:
                (workdir / name).unlink(missing_ok=True)
            for folder, _, _ in os.walk(workdir / "checkpoints", topdown=False):
                os.rmdir(folder)  # no file is in it


def _visible(folder: Path) -> bool:
    return any(not p.name.startswith(".") and p.name != BAD_IMAGES for p in folder.iterdir())


def save_meta(workdir: Path, meta: Meta, preprocessing: dict[str, Any]) -> None:
    """Keep what the system was built from, so that it can be built again without data and weights files."""
    write_json(workdir / "preprocessing.json", json.loads(json.dumps(preprocessing, default=str)))
    arrays: dict[str, Any] = {
        "classes": np.array(meta.classes),
        "name": np.array(meta.name),
        "labels": np.packbits(meta.labels, axis=1),
        "observed": np.packbits(meta.observed, axis=1),
    }
    if meta.vectors is not None:
        arrays["vectors"] = meta.vectors
    write_arrays(workdir / "meta.npz", **arrays)


def load_meta(workdir: Path) -> Meta:
    """What the system of a run was built from."""
    path = workdir / "meta.npz"
    if not path.is_file():
        raise UserError(f"{workdir} holds no meta.npz: the run there never started training.")
    arrays = read_arrays(path)
    try:
        classes = tuple(str(c) for c in arrays["classes"])
        return Meta(
            name=str(arrays["name"]),
            classes=classes,
            labels=np.unpackbits(arrays["labels"], axis=1)[:, : len(classes)],
            observed=np.unpackbits(arrays["observed"], axis=1)[:, : len(classes)],
            vectors=arrays.get("vectors"),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(path, error) from None


def load_config(workdir: Path) -> Config:
    """The config of a run; keys that are newer than the run have their defaults."""
    return from_json(json.dumps(completed(read_json(workdir / "config.json"))))


def load_preprocessing(workdir: Path) -> dict[str, Any]:
    """Mean, std and provenance of the weights that a run started from."""
    return read_json(workdir / "preprocessing.json")


def unsound(workdir: Path) -> list[str]:
    """The files of `FINISHED` that are damaged or missing."""
    names = []
    for name, read in FINISHED.items():
        try:
            read(workdir / name)
        except UserError:
            names.append(name)
    return names
