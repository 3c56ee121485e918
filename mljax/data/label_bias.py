"""Which positive of an image an annotator names first: label bias from the instances of a source, or from weights."""

from pathlib import Path

import numpy as np

from mljax import untrusted
from mljax.data.files import some
from mljax.data.source import Source
from mljax.errors import UserError, nearest

BIASES = ("uniform", "size", "location", "semantic")
NEAR = 0.0005  # the distance of an instance that stands exactly in the middle, as the authors' code has it


def chances(source: Source, positive: np.ndarray, bias: str, weights: str = "") -> np.ndarray:
    """(N l) float64 weights of the positives of each image, 0 elsewhere; a row of zeros tells them not apart.

    Args:
      source: `instances` are asked for by "size" and "location".
      positive: (N l) bool.
      bias: "uniform", "size", "location" or "semantic".
      weights: of "semantic": a JSON file {class: weight}.
    Raises:
      UserError: an unknown bias, no instances, no file of weights or a wrong one.
    Reference: Arroyo, Perona and Cole, "Understanding Label Bias in Single Positive Multi-Label Learning", 2023.
    """
    if bias not in BIASES:
        raise UserError(f"config.observe.bias is {bias!r}{nearest(str(bias), BIASES)}.")
    if weights and bias != "semantic":
        raise UserError(f"config.observe.weights is for bias='semantic', not for {bias!r}; leave it out.")
    if bias == "uniform":
        found = np.ones(positive.shape)
    elif bias == "semantic":
        found = np.broadcast_to(_class_weights(weights, source.classes), positive.shape)
    else:
        found = _of_instances(source, bias)
    return np.where(positive, found, 0.0)


def _of_instances(source: Source, bias: str) -> np.ndarray:
    """(N l): the sum over the instances of a class of their area, or of 1 / distance to the middle."""
    if source.instances is None:
        raise UserError(
            f"config.observe.bias={bias!r} needs to know where things stand, and {source.name} does not say; use"
            " bias='uniform' or 'semantic', or a data set with boxes (scenes, VOC, COCO)."
        )
    found = np.zeros(source.labels.shape)
    for row in range(len(source)):
        size, labels, boxes, areas = source.instances(row)
        if bias == "size":
            values = areas
        else:
            away = boxes[:, :2] + boxes[:, 2:] / 2 - np.asarray(size, np.float64)[None] / 2
            distance = np.sqrt((away**2).sum(axis=1))
            values = 1 / np.where(distance > 0, distance, NEAR)
        np.add.at(found[row], labels, values)
    return found


def _class_weights(weights: str, classes: tuple[str, ...]) -> np.ndarray:
    """(1 l) from a JSON file."""
    if not weights:
        raise UserError(
            "config.observe.bias='semantic' needs a weight for every class: set config.observe.weights to a JSON file"
            " {class: weight}."
        )
    path = Path(weights).expanduser()
    try:
        found = untrusted.read_json(path)
        values = {str(name): float(value) for name, value in found.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"config.observe.weights {str(path)!r} is not a JSON file {{class: weight}} ({type(error).__name__})."
        ) from None
    if missing := [name for name in classes if name not in values]:
        raise UserError(f"config.observe.weights {str(path)!r} has no weight for {some(missing)}.")
    row = np.array([[values[name] for name in classes]])
    if not np.isfinite(row).all() or (row < 0).any():
        raise UserError(f"config.observe.weights {str(path)!r} has a weight that is not a number of at least 0.")
    return row
