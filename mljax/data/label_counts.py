"""What a split says about its labels, computed once per split for `mljax.data stats`: counts and co-occurrence.

Kept in the user's cache folder under the split's fingerprint, its observed labels and the settings.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable

import numpy as np

from mljax.cache import atomic_write, cache_dir
from mljax.data import labels
from mljax.data.source import Source


@dataclasses.dataclass(frozen=True)
class Cooccurrence:
    """Of the observed labels of a split.

    Attributes:
      counts: (l l) int64, images with both labels; the diagonal is zero.
      nums: (l) int64, images with the label.
      conditional: (l l) float32, P(j | i) at [i, j] among images where both are observed.
    """

    counts: np.ndarray
    nums: np.ndarray
    conditional: np.ndarray


def cooccurrence(source: Source) -> Cooccurrence:
    """How the labels of a split go together, from the cache or computed now."""

    def compute() -> dict[str, np.ndarray]:
        counts, nums = labels.cooccurrence(source.labels, source.observed)
        return {
            "counts": counts,
            "nums": nums,
            "conditional": labels.conditional(source.labels, source.observed),
        }

    found = _cached("cooccurrence", [source.fingerprint, len(source), _digest(source)], compute)
    return Cooccurrence(found["counts"], found["nums"], found["conditional"])


def _digest(source: Source) -> str:
    digest = hashlib.sha256()
    for array in (source.labels, source.observed):  # the latter may be thinned out after reading
        digest.update(np.packbits(array > 0).tobytes())
    return digest.hexdigest()


def _cached(kind: str, key: list[object], compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    path = cache_dir() / kind / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception:  # absent or damaged, in whichever way numpy puts it
        found = compute()
    try:
        with atomic_write(path) as temporary:
            np.savez(temporary, **found)  # pyright: ignore[reportArgumentType]
    except OSError:
        pass  # a cache that cannot be written only costs time
    return found
