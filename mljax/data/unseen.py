"""Classes that training does not have (`config.unseen`): a split without them, and the vectors of the rest.

The images of such classes stay, those without any other label too, as in the code of ML-Decoder.
"""

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mljax.build import find
from mljax.data.source import Source
from mljax.errors import UserError, nearest


def without(source: Source, unseen: Sequence[str]) -> Source:
    """A split without some of its classes.

    Raises:
      UserError: the split has no class of that name, or none is left.
    """
    unseen = named(unseen)
    for name in unseen:
        if name not in source.classes:
            raise UserError(
                f"config.unseen has {name!r}, which is not a label of {source.name}{nearest(name, source.classes)}."
            )
    if not unseen:
        return source
    kept = [name for name in source.classes if name not in unseen]
    if not kept:
        raise UserError(f"config.unseen names all labels of {source.name}; leave some to train on.")
    return columns(source, kept)


def named(labels: Any) -> tuple[str, ...]:
    """Names given as a tuple, or as one text with commas."""
    parts = labels.split(",") if isinstance(labels, str) else labels
    return tuple(str(part).strip() for part in parts if str(part).strip())


def columns(source: Source, classes: Sequence[str]) -> Source:
    """A split with some of its classes, in their order; `every` remembers all of them."""
    chosen = [source.classes.index(name) for name in classes]
    return dataclasses.replace(
        source,
        classes=tuple(classes),
        labels=source.labels[:, chosen],
        observed=source.observed[:, chosen],
        scored=source.scored[:, chosen],
        every=source.every or source.classes,
        instances=None,
    )


def brings(data: str, classes: Sequence[str]) -> bool:
    """Whether a data set brings vectors of all these labels along."""
    module = importlib.import_module(find("data", data).__module__)
    return hasattr(module, "VECTORS") and set(classes) <= set(module.CLASSES)


def own_vectors(data: str, classes: Sequence[str]) -> np.ndarray | None:
    """(l e) of labels of a data set that brings vectors along; None if it does not."""
    module = importlib.import_module(find("data", data).__module__)
    if not hasattr(module, "VECTORS"):
        return None
    for name in classes:
        if name not in module.CLASSES:
            raise UserError(
                f"{data} brings label vectors for its own labels along and none for {name!r}"
                f"{nearest(name, module.CLASSES)}; vectors of other origin do not fit, so choose among its labels."
            )
    return module.VECTORS()[[module.CLASSES.index(name) for name in classes]]
