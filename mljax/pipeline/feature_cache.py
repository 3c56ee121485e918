"""The feature cache: endpoints of a frozen backbone, computed once per image and view, kept as float16 memory maps.

A view is written `SIZE[:flip][:crop]`: "320", "320:flip", "448:c80" (the central 80 % of each side), "448:tl80" (top
left; also tr, bl, br). All are deterministic, so that training on several views and averaging over them at test time
works on cached features as on images.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from mljax import untrusted
from mljax.cache import cache_dir
from mljax.data.source import Source
from mljax.errors import UserError
from mljax.interrupt import cleaning
from mljax.pipeline import loader
from mljax.pipeline.failures import Failures
from mljax.waiting import Patient

CORNERS = {"tl": (0.0, 0.0), "tr": (1.0, 0.0), "bl": (0.0, 1.0), "br": (1.0, 1.0), "c": (0.5, 0.5)}


@dataclasses.dataclass(frozen=True)
class View:
    """One deterministic view of an image: crop, squish to a square, perhaps mirror."""

    text: str
    size: int
    flip: bool
    corner: str = "c"
    share: float = 1.0

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
        del rng
        (x, y), (w, h) = CORNERS[self.corner], image.size
        cw, ch = max(1.0, w * self.share), max(1.0, h * self.share)
        box = (x * (w - cw), y * (h - ch), x * (w - cw) + cw, y * (h - ch) + ch)
        out = np.asarray(image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box))
        return out[:, ::-1] if self.flip else out


def view(text: str) -> View:
    """Parse `SIZE[:flip][:crop]`."""
    text = str(text)  # of a config: 320
    match = re.fullmatch(r"([1-9]\d{0,4})(:flip)?(?::(tl|tr|bl|br|c)(\d\d))?", text, flags=re.ASCII)
    if not match:
        raise UserError(f"The view {text!r} is not SIZE[:flip][:tl|tr|bl|br|c PERCENT], e.g. '320:flip' or '448:c80'.")
    size, flip, corner, share = match.groups()
    return View(text, int(size), bool(flip), corner or "c", int(share) / 100 if share else 1.0)


Encode = Callable[[np.ndarray], Mapping[str, jax.Array]]


def endpoints(
    source: Source,
    views: tuple[View, ...],
    encode: Encode,
    *,
    key: str,
    batch_size: int = 32,
    limit_gb: float = 30.0,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    failures: Failures | None = None,
) -> dict[str, dict[str, Any]]:
    """The endpoints of a split for several views, from the cache or computed now.

    Args:
      encode: (b h w 3) uint8 -> {stride: (b h w d)}.
      key: what the endpoints depend on besides the data: backbone, weights, normalisation.
      limit_gb: the least recently used entries beyond it are deleted.
      failures: of a training split: collects the images that cannot be read, whose rows are zeros; None: an error.
    Returns:
      {view text: {stride: (N h w d) float16 memory map}}. A subset shares the entries of what it is taken from.
    """
    whole = source.base or source
    endpoints = {}
    for one in views:
        digest = hashlib.sha256(json.dumps([whole.fingerprint, len(whole), one.text, key]).encode()).hexdigest()[:24]
        folder = cache_dir() / "features" / digest
        opened = _open(folder)
        if opened is None:
            with cleaning(functools.partial(shutil.rmtree, _partial(folder), ignore_errors=True)):
                _compute(whole, one, encode, folder, batch_size, progress, failures)
            opened = _open(folder)
        if opened is None:
            raise UserError(f"The cached features in {folder} cannot be read back; check the disk of MLJAX_CACHE.")
        maps, unreadable = opened
        _report(source, unreadable, failures)
        endpoints[one.text] = (
            maps if source.indices is None else {name: Rows(x, source.indices) for name, x in maps.items()}
        )
        _limit(cache_dir() / "features", limit_gb, keep=folder)
    return endpoints


def _open(folder: Path) -> tuple[dict[str, np.ndarray], dict[int, str]] | None:
    """The maps of an entry and which rows of it could not be read, and why; None if it is absent or damaged."""
    try:
        done = untrusted.read_json(folder / "done.json")
        maps = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in done["endpoints"]}
        unreadable = {int(row): str(why) for row, why in done.get("unreadable", {}).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    with contextlib.suppress(OSError):
        (folder / "done.json").touch()  # used now
    return maps, unreadable


def _report(source: Source, unreadable: Mapping[int, str], failures: Failures | None) -> None:
    """Hand the unreadable rows of a split, given as rows of what it is a subset of, to who collects them."""
    rows = range(len(source)) if source.indices is None else source.indices
    for row, whole_row in enumerate(rows) if unreadable else ():
        if (why := unreadable.get(int(whole_row))) is not None:
            if failures is None:
                raise loader.incomplete(why, source)
            failures.add(row, str(source.ids[row]), why)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Some rows of a memory map, read when asked for."""

    whole: np.ndarray
    indices: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.indices), *self.whole.shape[1:])

    def __getitem__(self, chosen: Any) -> np.ndarray:
        return self.whole[self.indices[chosen]]


def _compute(
    source: Source,
    transform: View,
    encode: Encode,
    folder: Path,
    batch_size: int,
    progress: Callable[[str, int, int], None],
    failures: Failures | None,
) -> None:
    """Write one view's endpoints beside their place, then rename: an interrupted run leaves nothing half-written."""
    partial = _partial(folder)
    maps: dict[str, np.memmap] = {}
    unreadable: dict[int, str] = {}
    try:
        partial.mkdir(parents=True)
        done = 0
        for batch in loader.eval_batches(source, transform, batch_size=batch_size, failures=failures):
            features = {name: np.array(x, np.float16) for name, x in encode(batch["image"]).items()}
            count = min(len(batch["mask"]), len(source) - done)
            bad = batch["mask"][:count] == 0
            if failures is not None:
                unreadable |= {row: failures.bad[row][1] for row in (done + np.flatnonzero(bad)).tolist()}
            for name, x in features.items():
                if name not in maps:
                    maps[name] = _new_map(partial / f"{name}.npy", (len(source), *x.shape[1:]))
                x[:count][bad] = 0
                maps[name][done : done + count] = x[:count]
            done += count
            progress(f"features of {source.name}, view {transform.text}", done, len(source))
        for x in maps.values():
            x.flush()
        done_json = {"endpoints": sorted(maps), "source": source.name, "unreadable": unreadable}
        (partial / "done.json").write_text(json.dumps(done_json))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except OSError as error:
        raise UserError(
            f"The feature cache in {folder.parent} cannot be written ({error.strerror}); free space there or set"
            " MLJAX_CACHE to another folder."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _partial(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.{os.getpid()}.partial")


def _new_map(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """A memory map with its space on the disk taken now: a disk that fills later would kill the process (SIGBUS)."""
    array = np.lib.format.open_memmap(path, "w+", np.float16, shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _limit(root: Path, limit_gb: float, keep: Path) -> None:
    """Delete the least recently used entries beyond the limit; never the one in use."""
    entries = sorted((f for f in root.iterdir() if f != keep and (f / "done.json").is_file()), key=_used, reverse=True)
    for stale in root.glob("*.partial"):  # of a run that was killed
        if time.time() - stale.stat().st_mtime > 86400:
            shutil.rmtree(stale, ignore_errors=True)
    total = sum(f.stat().st_size for f in keep.iterdir())
    for entry in entries:
        total += sum(f.stat().st_size for f in entry.iterdir())
        if total > limit_gb * 1e9:
            shutil.rmtree(entry, ignore_errors=True)


def _used(folder: Path) -> float:
    return (folder / "done.json").stat().st_mtime


@dataclasses.dataclass
class CachedBatches:
    """Batches of cached endpoints: `batches[step]` depends on (seed, step) alone.

    Each step draws one size among the views' sizes, each example one view of that size.
    """

    source: Source
    maps: Mapping[str, Mapping[str, np.ndarray]]
    batch_size: int
    seed: int
    views: int = 1
    unreadable: Collection[int] = ()  # rows that batches carry with mask 0, as the loader does

    def __post_init__(self) -> None:
        self.by_size: dict[int, list[str]] = {}
        for text in self.maps:
            self.by_size.setdefault(view(text).size, []).append(text)
        if self.views > 1 and max(len(v) for v in self.by_size.values()) < self.views:
            raise UserError(
                f"The system asks for {self.views} views of an image and config.cache.train_views offers no"
                f" {self.views} of one size; add some, e.g. ('320', '320:flip')."
            )

    def __getitem__(self, step: int) -> dict[str, Any]:
        step = int(step)
        count, process = jax.process_count(), jax.process_index()
        first = step * self.batch_size
        epochs = range(first // len(self.source), (first + self.batch_size - 1) // len(self.source) + 1)
        order = np.concatenate([np.random.default_rng([self.seed, 1, e]).permutation(len(self.source)) for e in epochs])
        offset = first - epochs[0] * len(self.source)
        chosen = order[offset : offset + self.batch_size]
        rng = np.random.default_rng([self.seed, 2, step])
        sizes = sorted(s for s, v in self.by_size.items() if len(v) >= self.views)
        texts = self.by_size[sizes[rng.integers(len(sizes))]]
        picks = np.stack([rng.permutation(len(texts))[: self.views] for _ in chosen])
        chosen, picks = chosen[process::count], picks[process::count]
        batch = examples(self.source, chosen)
        bad = np.isin(chosen, list(self.unreadable))
        for name in ("labels", "observed", "mask"):
            batch[name][bad] = 0
        views = [self._gather(texts, chosen, picks[:, v]) for v in range(self.views)]
        batch["endpoints"] = views[0]
        if self.views > 1:
            batch["views"] = jax.tree.map(lambda *x: np.stack(x, axis=1), *views)
        return batch

    def _gather(self, texts: list[str], chosen: np.ndarray, pick: np.ndarray) -> dict[str, np.ndarray]:
        return {
            name: np.stack([self.maps[texts[p]][name][i] for i, p in zip(chosen, pick)]) for name in self.maps[texts[0]]
        }

    def iterate(self, start: int, steps: int) -> Iterator[dict[str, Any]]:
        """Batches `start` .. `steps`, prepared a few ahead in threads."""
        import grain  # 0.1 s, so where it is used

        data = grain.MapDataset.range(start, steps).map(self.__getitem__)
        return Patient(iter(data.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))))


def examples(source: Source, chosen: np.ndarray) -> dict[str, Any]:
    """Everything of a batch but its image."""
    return {
        "labels": source.labels[chosen].astype(np.float32),
        "observed": source.observed[chosen].astype(np.float32),
        "index": chosen.astype(np.int32),
        "mask": np.ones(len(chosen), np.float32),
    }


def cached_eval_batches(source: Source, maps: Mapping[str, np.ndarray], batch_size: int) -> Iterator[dict[str, Any]]:
    """Every example once, in order, the last batch padded; one view."""
    process, count = jax.process_index(), jax.process_count()
    mine = np.arange(len(source))[process::count]
    local = batch_size // count
    for first in range(0, len(mine), local):
        chosen = mine[first : first + local]
        batch = examples(source, chosen) | {"endpoints": {name: np.asarray(x[chosen]) for name, x in maps.items()}}
        yield loader.pad(batch, local)
