"""Labels that are known of an image beforehand and told to a system that predicts with some known (C-Tran)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mljax.errors import UserError, nearest
from mljax.experiment import Experiment

Known = Sequence[Mapping[str, Any]]  # of each image, the labels that are known: {"dog": 1, "cat": 0}


def to_array(known: Known | None, count: int, run: Experiment) -> np.ndarray:
    """(count 2 l) float32: which labels are known of each of `count` images, and their values.

    Raises:
      UserError: the system cannot be told labels, `known` is not one dict an image, or names no label of the run.
    """
    classes = run.meta.classes
    told = np.zeros((count, 2, len(classes)), np.float32)
    if known is None:
        return told
    if not hasattr(run.system, "given"):
        raise UserError(
            f"The system {run.config.system.name!r} cannot be told labels; leave out `known`, or train a 'c_tran'."
        )
    if isinstance(known, Mapping) or len(known) != count:
        raise UserError(f"`known` must be a list with one dict for each of the {count} images, {{}} for none known.")
    for row, labels in zip(told, known):
        for label, value in labels.items():
            if label not in classes:
                raise UserError(f"`known` names {label!r}, which is no label of this run{nearest(label, classes)}.")
            if value not in (0, 1):
                raise UserError(f"`known` has {label!r}: {value!r}; 1 means present, 0 absent.")
            row[:, classes.index(label)] = 1, value
    return told


def from_text(text: str) -> dict[str, int]:
    """ "dog=1,cat=0" -> {"dog": 1, "cat": 0}."""
    found = {}
    for item in text.split(","):
        name, _, value = item.rpartition("=")
        if not name.strip() or value.strip() not in ("0", "1"):
            raise UserError(f"--known={text}: {item!r} is no LABEL=1 (present) or LABEL=0 (absent).")
        found[name.strip()] = int(value)
    return found
