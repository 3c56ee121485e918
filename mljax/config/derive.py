"""Copies of a config that differ in some keys: a config that is locked is never changed."""

import copy
from collections.abc import Mapping
from typing import Any

from mljax.types import Config


def derive(config: Config, changes: Mapping[str, Any]) -> Config:
    """A locked copy with other values: derive(config, {"eval.definition": "env", "ema": 0.0}).

    Args:
      config: not changed.
      changes: path of a key -> value; the last name of a path may be new, such as a setting that a system has and the
        config does not write out.
    """
    derived = copy.deepcopy(config).unlock()
    for path, value in changes.items():
        *sections, last = path.split(".")
        section = derived
        for name in sections:
            section = section[name]
        section[last] = value
    return derived.lock()
