"""Labels of an image that are known beforehand and given to a system that predicts with known labels (C-Tran)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mljax.errors import UserError, nearest
from mljax.experiment import Experiment

Known = Sequence[Mapping[str, Any]]  # of each image, the labels that are known: {"dog": 1, "cat": 0}


def to_array(known: Known | None, count: int, experiment: Experiment) -> np.ndarray:
    """(count 2 l) float32: which labels are known of each of `count` images, and their values.

    Raises:
      UserError: the system does not take known labels, `known` is not one dict an image, or a name is not a label.
    """
    classes = experiment.meta.classes
    array = np.zeros((count, 2, len(classes)), np.float32)
    if known is None:
        return array
    if not hasattr(experiment.system, "known_labels"):
        raise UserError(
            f"The system {experiment.config.system.name!r} does not take known labels; leave out `known`, or train a"
            " 'c_tran'."
        )
    if isinstance(known, Mapping) or len(known) != count:
        raise UserError(f"`known` must be a list with one dict for each of the {count} images, {{}} for none known.")
    for row, labels in zip(array, known):
        for label, value in labels.items():
            if label not in classes:
                raise UserError(f"`known` names {label!r}, which is not a label of this run{nearest(label, classes)}.")
            if value not in (0, 1):
                raise UserError(f"`known` has {label!r}: {value!r}; 1 means present, 0 absent.")
            row[:, classes.index(label)] = 1, value
    return array


def from_text(text: str) -> dict[str, int]:
    """ "dog=1,cat=0" -> {"dog": 1, "cat": 0}."""
    known = {}
    for item in text.split(","):
        name, _, value = item.rpartition("=")
        if not name.strip() or value.strip() not in ("0", "1"):
            raise UserError(f"--known={text}: {item!r} is not LABEL=1 (present) or LABEL=0 (absent).")
        known[name.strip()] = int(value)
    return known
