"""Cluster centres of label features, for SARB: k-means that is a function of its input."""

import numpy as np
from jaxtyping import Float, Int

ROUNDS = 100
BLOCK = 4096  # rows whose distances are computed at a time


def prototypes(
    features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], *, classes: int, count: int
) -> Float[np.ndarray, "{classes} {count} d"]:
    """The centres of each label's features.

    Args:
      features: each of one label.
      labels: the label of each feature.
      classes: how many labels there are.
      count: centres per label.
    Returns:
      In float32, zeros for a label without features.
    """
    centres = np.zeros((classes, count, features.shape[-1]), np.float32)
    for label in np.unique(labels):
        centres[label] = kmeans(features[labels == label], count)
    return centres


def kmeans(x: Float[np.ndarray, "n d"], count: int, seed: int = 0) -> Float[np.ndarray, "{count} d"]:
    """Centres of the rows of x, at least one, by Lloyd's rounds from a k-means++ start.

    Deterministic: the start is drawn with `seed`, of equal distances the first centre counts. With fewer different rows
    than centres, some centres are the same. A centre that loses all its rows stays where it is.
    Reference: Arthur and Vassilvitskii, "k-means++", SODA 2007. Differs from scikit-learn's: one start, not several.
    """
    x = np.asarray(x, np.float32)
    centres = _start(x, count, np.random.default_rng(seed))
    assigned = np.full(len(x), -1)
    for _ in range(ROUNDS):
        nearest = _nearest(x, centres)
        if np.array_equal(nearest, assigned):
            break
        assigned = nearest
        sizes = np.bincount(assigned, minlength=count)
        sums = np.stack([x[assigned == k].sum(0, dtype=np.float64) for k in range(count)])
        centres = np.where(sizes[:, None] > 0, sums / np.maximum(sizes, 1)[:, None], centres).astype(np.float32)
    return centres


def _start(x: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """k-means++: each next centre is a row drawn by its squared distance to those before."""
    chosen = [int(rng.integers(len(x)))]
    distance = np.square(x - x[chosen[0]]).sum(1, dtype=np.float64)
    while len(chosen) < count:
        total = distance.sum()
        chances = distance / total if total > 0 else np.full(len(x), 1 / len(x))
        chosen.append(int(rng.choice(len(x), p=chances)))
        distance = np.minimum(distance, np.square(x - x[chosen[-1]]).sum(1, dtype=np.float64))
    return x[chosen].astype(np.float32)


def _nearest(x: np.ndarray, centres: np.ndarray) -> np.ndarray:
    lengths = np.square(centres).sum(1)
    parts = [np.argmin(lengths - 2 * (x[i : i + BLOCK] @ centres.T), axis=1) for i in range(0, len(x), BLOCK)]
    return np.concatenate(parts)
