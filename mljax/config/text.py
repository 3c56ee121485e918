"""Configs as JSON text, and the differences between two of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from mljax.config.base import base

if TYPE_CHECKING:
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


# Settings of each schedule that `config.optim` itself had while its `schedule` was a name.
FLAT = {
    "one_cycle": ("schedule_epochs", "pct_start", "div", "final_div", "beta1_cycle"),
    "step": ("every", "boundaries", "factor", "warmup_epochs", "warmup_start"),
    "constant": (),
    "warmup_cosine": ("schedule_epochs", "warmup_epochs", "warmup_start", "floor"),
    "plateau": ("metric", "mode", "factor", "patience", "threshold", "cooldown"),
}
ALL_FLAT = frozenset(key for keys in FLAT.values() for key in keys)
RULES = {"adam": ("betas", "eps"), "adamw": ("betas", "eps"), "sgd": ("momentum", "nesterov")}


def completed(text: dict[str, Any]) -> dict[str, Any]:
    """A run's config as a dict, in the form of this version: new keys have the values that they had by default.

    Keys are added to sections whose keys are the same in every experiment alone: those of the others are what their
    constructors take. The schedule of an optimiser, a name among its other settings in earlier versions, becomes a
    section; settings that the run's schedule or rule never used are left out.
    """
    known = json.loads(to_json(base()))
    for key in ("input", "cache", "weights", "eval"):
        if isinstance(text.get(key), dict):
            text[key] = {**known[key], **text[key]}
    return {**known, **_with_schedules(text)}


def _with_schedules(config: dict[str, Any]) -> dict[str, Any]:
    """A config whose optimisers, its own and those of its stages, have a section for their schedule."""
    optim = config.get("optim")
    if not isinstance(optim, dict):
        return config
    stages = [
        {**stage, "optim": _scheduled(stage["optim"], optim)} if isinstance(stage.get("optim"), dict) else stage
        for stage in config.get("stages") or ()
    ]
    return {**config, "optim": _scheduled(optim, {}), **({"stages": stages} if "stages" in config else {})}


def _scheduled(optim: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's section, or with its base what a stage changes of it, with its schedule as a section."""
    flat = {key: value for key, value in optim.items() if key in ALL_FLAT}
    if isinstance(optim.get("schedule"), dict) or not (flat or "schedule" in optim):
        return optim
    name = optim.get("name", base.get("name", "adam"))
    inherited = base if name == base.get("name") else {}
    before = inherited.get("schedule", "one_cycle")
    schedule = optim.get("schedule", before)
    if schedule != before:  # it stands alone, so it says what it had of the base too
        flat = {**{key: value for key, value in inherited.items() if key in ALL_FLAT}, **flat}
    used = {key: value for key, value in flat.items() if key in FLAT[schedule] and value is not None}
    if "schedule_epochs" in used:
        used["epochs"] = used.pop("schedule_epochs")
    whole = not inherited or schedule != before
    unused = {key for rule in RULES.values() for key in rule} - set(RULES.get(name, ()))
    kept = {k: v for k, v in optim.items() if k not in ALL_FLAT | unused | {"schedule"}}
    if kept.get("coupled", ...) is None:
        del kept["coupled"]
    section = {"name": schedule, **used} if whole else used
    return {**kept, "schedule": section} if section else kept
