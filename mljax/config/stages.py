"""The config of each stage of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from mljax.errors import UserError, nearest

if TYPE_CHECKING:
    from mljax.types import Config


def stage_configs(config: Config) -> list[Config]:
    """The config of each stage: the base with the stage's partial laid over it, in order."""
    stages = []
    if not isinstance(config.stages, tuple):
        raise UserError(f"config.stages is {config.stages!r}; expected a tuple of what each stage changes.")
    for i, partial in enumerate(config.stages or ({},)):
        if not isinstance(partial, Mapping | ConfigDict):
            raise UserError(f"config.stages[{i}] is {partial!r}; a stage is a dict of what it changes.")
        stage = ConfigDict(config.to_dict())
        stage.stages = ()
        _overlay(stage, partial, f"config.stages[{i}]")
        stages.append(stage)
    return stages


def _overlay(config: Any, partial: Any, where: str) -> None:
    with config.unlocked():
        for key, value in partial.items():
            if key not in config:
                raise UserError(f"{where} has no key {key!r}{nearest(key, config.keys())}.")
            section = config[key] if isinstance(config[key], ConfigDict) else None
            if section is not None and not isinstance(value, Mapping | ConfigDict):
                raise UserError(f"{where}.{key} is {value!r}; expected a section, a dict of its keys.")
            try:
                if section is None:
                    config[key] = value
                else:
                    config[key] = _laid_over(section, value)
            except TypeError:
                raise UserError(f"{where}.{key} has a value of another type than config.{key}: {value!r}.") from None


def _laid_over(section: Any, partial: Any) -> Any:
    """A section with what a stage changes of it; a stage that names something else gives all of its settings."""
    if partial.get("name", section.get("name")) != section.get("name"):
        return partial
    changed = section.copy_and_resolve_references()
    with changed.unlocked():
        for key, value in partial.items():
            inner = changed.get(key)
            both = isinstance(inner, ConfigDict) and isinstance(value, Mapping | ConfigDict)
            changed[key] = _laid_over(inner, value) if both else value
    return changed
