"""Configs as JSON text, and the differences between two of them."""

import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from mljax.config.base import base
from mljax.types import Config


def to_json(config: Config) -> str:
    """One canonical text for a config, as it lies in a run directory."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True, default=list)


def from_json(text: str) -> Config:
    """The config of a run directory; lists come back as the tuples that they were."""

    def tuples(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: tuples(v) for k, v in value.items()}
        return tuple(tuples(v) for v in value) if isinstance(value, list) else value

    return ConfigDict(tuples(json.loads(text)))


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two configs, as `key: old -> new`."""
    found: list[str] = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key, "(absent)"), new.get(key, "(absent)")
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return found


def completed(text: dict[str, Any]) -> dict[str, Any]:
    """A run's config as a dict, with the keys that versions since then have added, at the values they had by default.

    Only of sections whose keys are the same in every experiment: the others are what their constructors take.
    """
    known = json.loads(to_json(base()))
    for key in ("input", "cache", "weights", "eval"):
        if isinstance(text.get(key), dict):
            text[key] = {**known[key], **text[key]}
    return {**known, **text}
