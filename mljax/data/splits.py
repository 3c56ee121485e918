"""Splits of a data section by name, slice or the single-positive code's own rule."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mljax.build import build
from mljax.config.sections import OF_DATA
from mljax.data import prepare, spml
from mljax.data.files import Absent
from mljax.data.source import Source, checked
from mljax.errors import UserError


def load(section: Mapping[str, Any], split: str) -> Source:
    """Build a split of a data section: `NAME`, `NAME[a:b]` (a Python slice of its order, e.g. "trainval[:-500]"), or
    `NAME[spml:train]` and `NAME[spml:val]`, the 80 and 20 % of the single-positive code.

    Args:
      section: the settings of a reader, and of `OF_DATA`, which are not the reader's.
    Raises:
      UserError: no such split, labels other than 0 and 1, or what the reader raises, with how to get absent data.
    """
    if not isinstance(split, str):
        raise UserError(f"The split {split!r} is not a name; expected one such as 'train'.")
    section = {key: value for key, value in section.items() if key not in OF_DATA}
    try:
        return _load(section, split)
    except Absent as error:
        raise UserError(f"{str(error).rstrip('.')}{prepare.advice(section)}.") from None


def _load(section: Mapping[str, Any], split: str) -> Source:
    if part := re.fullmatch(r"([^\[\]]+)\[spml:(train|val)\]", split):
        source = checked(build("data", section, split=part[1]))
        return source.subset(spml.split(source.ids, part[2]), f"[spml:{part[2]}]")
    match = re.fullmatch(r"([^\[\]]+)(?:\[(-?\d*):(-?\d*)\])?", split)
    if not match:
        raise UserError(f"The split {split!r} is not a name or a slice like 'trainval[:-500]'.")
    name, start, stop = match.groups()
    source = checked(build("data", section, split=name))
    if start is None:
        return source
    indices = np.arange(len(source))[int(start) if start else None : int(stop) if stop else None]
    if not len(indices):
        raise UserError(f"The split {split!r} is empty: {name!r} has {len(source)} images.")
    return source.subset(indices, f"[{start}:{stop}]")
