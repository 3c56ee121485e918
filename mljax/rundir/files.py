"""A run directory: everything that is needed to repeat and to explain a run."""

import contextlib
import io
import json
import os
import platform
import re
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from mljax.cache import atomic_write
from mljax.config.text import completed, differences, from_json, to_json
from mljax.errors import UserError
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
    "cache.limit_gb",
)
PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "mljax"),
    *("pillow", "simplejpeg", "opencv-python-headless"),  # who decodes and resizes
)
# What a start writes before anything is trained; the next one writes all of it anew.
OF_A_START = ("config.json", "env.json", "preprocessing.json", "meta.npz", "model.txt")


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of `path`, so that a reader never sees half of it."""
    try:
        with atomic_write(path) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); free space or choose another --workdir."
        ) from None


def write_text(path: Path, text: str) -> None:
    """Write a text as `written`."""
    with written(path) as temporary:
        temporary.write_text(text)


def write_arrays(path: Path, **arrays: Any) -> None:
    """Write an .npz as `written`."""
    with written(path) as temporary:
        np.savez_compressed(temporary, **arrays)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a run directory.

    Raises:
      UserError: it is absent or damaged.
    """
    if not path.is_file():
        if not path.parent.is_dir():
            raise UserError(f"There is no folder {path.parent}; give the --workdir of a run.")
        raise UserError(f"{path.parent} holds no {path.name}; give the --workdir of a run.")
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); restore it, or choose another --workdir.") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged (it holds no settings); restore it, or choose another --workdir.")
    return found


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
    path = workdir / "config.json"
    if path.is_file() and not untouched(workdir):
        check_same(workdir, config)
        return
    if workdir.is_file():
        raise UserError(f"The workdir {workdir} is a file; choose another --workdir.")
    if not path.is_file() and workdir.is_dir() and _visible(workdir):
        raise UserError(f"{workdir} is not empty and holds no run of mljax; choose another --workdir.")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The workdir {workdir} cannot be made ({error.strerror}); choose another --workdir.") from None
    write_text(path, to_json(config))
    write_text(workdir / "env.json", json.dumps(environment(config), indent=2))


@contextlib.contextmanager
def opened(workdir: Path, config: Config) -> Iterator[None]:
    """`open_run` for as long as a run lasts: a start that fails before it trains leaves behind what was there before.

    Only of a directory that was absent or empty; one that holds an earlier run, or anything else, stays as it is.
    """
    absent = [folder for folder in (workdir, *workdir.parents) if not os.path.exists(folder)]
    empty = workdir in absent or (workdir.is_dir() and not _visible(workdir))
    mine = None
    try:
        open_run(workdir, config)
        mine = _identity(workdir)
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            # another start may have taken the directory since: then the config in it is that one's
            if empty and untouched(workdir) and _identity(workdir) == mine:
                for name in OF_A_START:
                    (workdir / name).unlink(missing_ok=True)
                for folder, _, _ in os.walk(workdir / "checkpoints", topdown=False):
                    os.rmdir(folder)  # no file is in it
                for folder in absent:
                    folder.rmdir()  # not if somebody else put something there meanwhile
        raise


def _identity(workdir: Path) -> tuple[int, int] | None:
    """Which file the config of a run directory is."""
    try:
        found = (workdir / "config.json").stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _visible(folder: Path) -> bool:
    return any(not p.name.startswith(".") for p in folder.iterdir())


def environment(config: Config) -> dict[str, Any]:
    """Versions, devices, command and commit, and who decodes and resizes the images."""
    import jax

    found: dict[str, Any] = {"python": sys.version.split()[0], "platform": platform.platform(), "command": sys.argv}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found["images"] = images(config, simplejpeg=found["simplejpeg"] is not None)
    found["devices"] = [str(d) for d in jax.devices()]
    found["device_kind"] = jax.devices()[0].device_kind
    found["xla_flags"] = os.environ.get("XLA_FLAGS", "")
    try:
        here = Path(__file__).parent
        answer = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5)
        found["commit"] = answer.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        found["commit"] = None
    return found


def images(config: Config, *, simplejpeg: bool) -> str:
    """Who decodes and who resizes, in words; see docs/data.md."""
    who = {"antialias": "OpenCV, Pillow where it shrinks", "fast": "OpenCV", "nearest": "Pillow"}
    parts = ["JPEG by simplejpeg, all else by Pillow" if simplejpeg else "all by Pillow"]
    for kind in ("train", "eval"):
        resize = config.input[kind].get("resize", "bilinear")
        parts.append(f"{kind} resize {resize!r} by {who.get(resize, 'Pillow')}")
    return "; ".join(parts)


def save_meta(workdir: Path, meta: Meta, preprocessing: dict[str, Any]) -> None:
    """Keep what the system was built from, so that it can be built again without data and weights files."""
    write_text(workdir / "preprocessing.json", json.dumps(preprocessing, indent=2, default=str))
    path = workdir / "meta.npz"
    arrays: dict[str, Any] = {
        "classes": np.array(meta.classes),
        "name": np.array(meta.name),
        "labels": np.packbits(meta.labels, axis=1),
        "observed": np.packbits(meta.observed, axis=1),
    }
    if meta.vectors is not None:
        arrays["vectors"] = meta.vectors
    write_arrays(path, **arrays)


def load_meta(workdir: Path) -> Meta:
    path = workdir / "meta.npz"
    if not path.is_file():
        raise UserError(f"{workdir} holds no meta.npz: the run there never started training.")
    try:
        with np.load(io.BytesIO(path.read_bytes())) as arrays:  # numpy leaves a damaged file open
            classes = tuple(str(c) for c in arrays["classes"])
            return Meta(
                name=str(arrays["name"]),
                classes=classes,
                labels=np.unpackbits(arrays["labels"], axis=1)[:, : len(classes)],
                observed=np.unpackbits(arrays["observed"], axis=1)[:, : len(classes)],
                vectors=arrays.get("vectors"),
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{path} is damaged ({' '.join(str(error).split())}); run the training command again to write it anew."
        ) from None


def load_config(workdir: Path) -> Config:
    """The config of a run; keys that are newer than the run have their defaults."""
    return from_json(json.dumps(completed(read_json(workdir / "config.json"))))


def load_preprocessing(workdir: Path) -> dict[str, Any]:
    """Mean, std and provenance of the weights that a run started from."""
    return read_json(workdir / "preprocessing.json")


# --- configs as data -------------------------------------------------------------------------------------------------
