"""The config of each stage of a run."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from mljax.errors import UserError, nearest
from mljax.types import Config


def stage_configs(config: Config) -> list[Config]:
    """The config of each stage: the base with the stage's partial laid over it, in order."""
    stages = []
    if not isinstance(config.stages, tuple):
        raise UserError(f"config.stages is {config.stages!r}; it must be a tuple of what each stage changes.")
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
                raise UserError(f"{where}.{key} is {value!r}; it is a section, so a dict of its keys is wanted.")
            try:
                if section is not None and value.get("name", section.get("name")) == section.get("name"):
                    section.update(dict(value))
                else:
                    config[key] = value
            except TypeError:
                raise UserError(f"{where}.{key} has a value of another type than config.{key}: {value!r}.") from None
