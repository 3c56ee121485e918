"""The rows of a CSV of images and labels as columns: a million of them open in seconds.

Rows say the same again and again, so what label fields say is taken apart once, and kept as numbers of names.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Partial(NamedTuple):
    """What label fields say beside the labels."""

    unknown: tuple[str, ...]  # "?": all that is not named
    negatives: tuple[str, ...] | None  # "*": all others; None: there is no such column


@dataclasses.dataclass(frozen=True)
class Rows:
    """N rows as columns; K different things are said by their label fields.

    Attributes:
      images: paths, as they are written but for slashes and dots.
      lines: (N) of the file, from 1.
      splits, split: the names, and (N) which of them.
      names: every label that is spoken of.
      said: (N) which of the K.
      first: (K) the first row that says it.
      labels, ends: numbers of names, those of k from ends[k - 1] to ends[k].
      partial: of those k that say more than labels.
    """

    images: list[str]
    lines: np.ndarray
    splits: list[str]
    split: np.ndarray
    names: list[str]
    said: np.ndarray
    first: np.ndarray
    labels: np.ndarray
    ends: np.ndarray
    partial: dict[int, Partial]

    def of(self, split: str) -> np.ndarray:
        """(n) the rows of a split."""
        return np.flatnonzero(self.split == self.splits.index(split)) if split in self.splits else np.zeros(0, np.int64)

    def line_of(self, name: str) -> tuple[int, str]:
        """The first line that speaks of a label, and its split."""
        found = np.searchsorted(self.ends, np.flatnonzero(self.labels == self.names.index(name))[:1], side="right")
        more = [k for k, one in self.partial.items() if name in one.unknown or name in (one.negatives or ())]
        row = self.first[min([*found, *more])]
        return int(self.lines[row]), self.splits[self.split[row]]

    def labels_of(self, said: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of some of the K -> (m) which of them, (m) numbers of names."""
        starts = np.concatenate([[0], self.ends[:-1]])[said]
        counts = self.ends[said] - starts
        inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(np.arange(len(said)), counts), self.labels[np.repeat(starts, counts) + inside]


def arrays(rows: Rows, chosen: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Labels and observed, (N l) uint8, of some rows."""
    used = np.zeros(len(rows.first), bool)
    used[rows.said[chosen]] = True
    said, inverse = np.flatnonzero(used), (np.cumsum(used) - 1)[rows.said[chosen]]
    index = {name: column for column, name in enumerate(names)}
    column = np.array([index.get(name, -1) for name in rows.names], np.int64)
    labels = np.zeros((len(said), len(names)), np.uint8)
    where, numbers = rows.labels_of(said)
    labels[where, column[numbers]] = 1
    observed = np.ones_like(labels)
    for row, number in enumerate(said.tolist()) if rows.partial else ():
        if (one := rows.partial.get(number)) is None:
            continue
        if "?" in one.unknown or (one.negatives is not None and "*" not in one.negatives):
            observed[row] = labels[row]
            observed[row, [index[name] for name in one.negatives or () if name != "*"]] = 1
        observed[row, [index[name] for name in one.unknown if name != "?"]] = 0
    return labels[inverse], observed[inverse] if rows.partial else np.ones((len(chosen), len(names)), np.uint8)
