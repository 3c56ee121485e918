"""The single-positive code's own random streams: which rows validate, and which labels are seen.

Reference: Cole et al., "Multi-Label Learning from Single Positive Labels", CVPR 2021, repository
elijahcole/single-positive-multi-label (MIT). An image's negatives are shuffled there after its positives, even where no
negative is kept, so both take numbers from the stream.
"""

import random
import re
from collections.abc import Sequence

import numpy as np

SEED = 1200
VALIDATION = 0.2


def order(ids: Sequence[str]) -> np.ndarray:
    """(N) rows in the order of the code: COCO's by image id sorted as text, VOC's by name, others as they are."""
    for pattern in (r"(?:.*/)?COCO_\w+?_0*(\d+)\.\w+", r"(\d{4}_\d{6})"):
        found = [re.fullmatch(pattern, str(name)) for name in ids]
        if all(found):
            return np.argsort(np.array([match[1] for match in found if match]), kind="stable")
    return np.arange(len(ids))


def split(ids: Sequence[str], part: str) -> np.ndarray:
    """Rows of the code's "train" or "val": the last fifth of a permutation validates; both in the code's order."""
    rows = order(ids)
    count = round(VALIDATION * len(rows))
    drawn = np.random.RandomState(SEED).permutation(len(rows))
    first = len(rows) - count
    return rows[np.sort(drawn[:first] if part == "train" else drawn[first:])]


def draw(positive: np.ndarray, negative: np.ndarray, negatives: int, ids: Sequence[str], seed: int) -> np.ndarray:
    """(N l) bool: of each row the first of its shuffled positives, and `negatives` (-1: all) of its negatives."""
    observed, rng = np.zeros(positive.shape, bool), np.random.RandomState(seed)
    for row in order(ids):
        for kind, count in ((positive, 1), (negative, negatives)):
            columns = np.flatnonzero(kind[row])
            rng.shuffle(columns)
            observed[row, columns if count < 0 else columns[:count]] = True
    return observed


def draw_biased(positive: np.ndarray, chances: np.ndarray, ids: Sequence[str], seed: int) -> np.ndarray:
    """(N l) bool: one positive of each row by weight, from Python's generator.

    The code draws among columns by their weights, and evenly among the positives where all weights are 0.
    """
    chosen, rng = np.zeros(positive.shape, bool), random.Random(seed)
    for row in order(ids):
        columns = np.flatnonzero(positive[row]).tolist()
        if not columns:
            continue
        weights = chances[row].tolist()
        column = rng.choices(range(len(weights)), weights)[0] if any(weights) else rng.choice(columns)
        chosen[row, column] = True
    return chosen
