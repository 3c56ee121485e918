"""A config is checked whole before a run touches its folder: whatever is wrong with it is one sentence.

What a section's own constructor knows (settings of a system, a loss, a data set) is checked where it is built; here
are the keys that every experiment has, their types and their ranges.
"""

import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from mljax.build import find
from mljax.config import base
from mljax.data import features
from mljax.errors import UserError, nearest
from mljax.metrics import DEFINITIONS

KINDS = {"data": "data", "backbone": "backbones", "system": "systems", "loss": "losses"}
OPEN = (*KINDS, "optim", "input.train", "input.eval")  # their keys are the keywords of what they name

# key: the least and the largest value
RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**31 - 1),
    "devices": (1, math.inf),
    "input.size": (1, 2**13),
    "input.views": (1, math.inf),
    "input.threads": (0, math.inf),
    "input.workers": (0, math.inf),
    "cache.limit_gb": (0, math.inf),
    "optim.epochs": (1, math.inf),
    "optim.batch_size": (1, math.inf),
    "ema": (0, 1 - 1e-9),
    "eval.every": (1, math.inf),
    "eval.batch_size": (1, math.inf),
    "log_every": (1, math.inf),
}
CHOICES: dict[str, tuple[str, ...]] = {
    "parallel": ("jit", "pmap"),
    "dtype": ("float32", "bfloat16"),
    "eval.select": ("last", "best", "best_of_raw_and_ema"),
    "eval.definition": DEFINITIONS,
    "eval.scored_in": ("AP", "all"),
    "start": ("last", "best", "ema"),
}
WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", tuple: "a tuple"}


def check(config: ConfigDict) -> None:
    """The config of a run or of one of its stages, against the keys that every experiment has.

    Raises:
      UserError: the first key that is missing, unknown, of another type, or out of its range.
    """
    found = config.to_dict()
    _section(found, base().to_dict(), "")
    for key, (least, most) in RANGES.items():
        value = _at(found, key)
        if value is not None and not (_fits(value, 0.0) and least <= value <= most):
            shown = (
                f"at least {least:g}" if most == math.inf else f"from {least:g} to {'below 1' if most < 1 else most}"
            )
            raise UserError(f"config.{key} is {value!r}; it must be {shown}.")
    for key, options in CHOICES.items():
        value = _at(found, key)
        if value not in options:
            raise UserError(f"config.{key} is {value!r}{nearest(value, options)}.")
    for key, kind in KINDS.items():
        if not isinstance(found[key].get("name"), str):
            raise UserError(f"config.{key} has no 'name', which says what to take of the {kind}.")
        find(kind, found[key]["name"])
    for text in (*found["cache"]["train_views"], *found["cache"]["eval_views"]):
        features.view(str(text))


def _section(section: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    """Keys and types, section by section; the keys of an open section are its constructor's."""
    for key in section:
        if key not in known and where.rstrip(".") not in OPEN:
            raise UserError(f"There is no key config.{where}{key}{nearest(key, known)}.")
    for key, expected in known.items():
        path = f"{where}{key}"
        if isinstance(expected, Mapping):
            value = section.get(key)
            if not isinstance(value, Mapping):
                raise UserError(f"config.{path} is {value!r}; it is a section, whose keys are set one by one.")
            if path not in OPEN or path == "optim":
                _section(value, expected, f"{path}.")
        elif key not in section:
            if where != "optim." or key in ("epochs", "batch_size"):
                raise UserError(f"There is no config.{path}; start a config from mljax.config.base().")
        elif not _fits(section[key], expected):
            raise UserError(
                f"config.{path} is {section[key]!r}; it must be {WORDS[type(expected)]}, like {expected!r}."
            )


def _fits(value: Any, expected: Any) -> bool:
    if expected is None or (isinstance(expected, tuple) and isinstance(value, list)):
        return True
    if isinstance(value, bool) or isinstance(expected, bool):
        return type(value) is type(expected)
    if isinstance(expected, float):
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, type(expected))


def _at(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value[part]
    return value
