"""Overrides of a config's keys, as in --config.optim.epochs=3."""

from __future__ import annotations

import ast
import contextlib
import copy
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from mljax.build import SECTIONS, accepted, find, keywords, listed
from mljax.errors import UserError, nearest

if TYPE_CHECKING:
    from mljax.types import Config

OPEN = ("optim", "input.train", "input.eval")  # sections whose keys are keywords of a function
SHORT = ("optim.schedule",)  # sections that may be set to a name: --config.optim.schedule=constant


def overridden(config: Config, pairs: Iterable[tuple[str, str]]) -> Config:
    """A copy of a config with some keys set, as on the command line; locked if the config is.

    Args:
      pairs: (key, value) of `--config.KEY=VALUE`, names before their settings as `flags.parse` sorts them.
    Raises:
      UserError: no such key, or a value of another type.
    """
    changed = copy.deepcopy(config)
    for key, text in pairs:
        override(changed, key, text)
    return changed


def override(config: Config, key: str, text: str) -> None:
    """Set one key of a config that is still being built: `overridden` of one pair, in place.

    The key exists, the value is of its type: numbers, None and tuples as Python writes them. "stages[1].a.b" is for the
    second stage alone, and "optim.schedule" short for "optim.schedule.name".
    """
    if match := re.fullmatch(r"stages\[(\d+)\]\.(.+)", key):
        return _override_stage(config, int(match[1]), match[2], text)
    if key in SHORT:
        key = f"{key}.name"
    *path, last = key.split(".")
    where = ".".join(path)
    section = _section(config, key, path)
    # Sections that name a constructor take any of its keywords; `build` checks them, and names the nearest.
    free = "name" in section or where in OPEN
    if last not in section and not (free and last.isidentifier() and last[0] != "_"):
        raise UserError(f"--config.{key}: there is no key {last!r}{nearest(last, section.keys())}.")
    _check_effect(config, key, text)
    old = section.get(last)
    if old is None and last in section and section.get_type(last) is str:
        old = ""  # a text that is not set yet
    if last not in section and "," in text:
        default = _default(where, section.get("name"), last)
        old = default if isinstance(default, tuple) else old
    value = _value(old, key, text)
    outdated = _outdated(where, section, value) if last == "name" and value != old else set()
    try:
        with config.unlocked():
            section[last] = value
            for name in outdated:
                del section[name]
    except (TypeError, ValueError):
        raise UserError(f"--config.{key}={text}: expected a value of type {section.get_type(last).__name__}.") from None


def _section(config: Config, key: str, path: list[str]) -> Any:
    """The section at a path of a key."""
    section: Any = config
    for i, name in enumerate(path):
        if name not in section:
            raise UserError(f"--config.{key}: there is no key {name!r}{nearest(name, section.keys())}.")
        section = section[name]
        if not isinstance(section, ConfigDict):
            raise UserError(f"--config.{key}: {'.'.join(path[: i + 1])!r} is a value and has no keys.")
    return section


def _check_effect(config: Config, key: str, text: str) -> None:
    """An override that every stage sets anew would change nothing."""
    stages = config.get("stages")
    if stages and isinstance(stages, tuple) and all(_sets(stage, config, key.split(".")) for stage in stages):
        raise UserError(
            f"--config.{key}={text} has no effect: every stage of this config sets its own {key}; set it for one stage,"
            f" such as --config.stages[0].{key}={text}."
        )


def _outdated(where: str, section: Any, name: Any) -> set[str]:
    """Settings of what a section named before that the new name does not have."""
    kind = SECTIONS.get(where)
    if kind is None or not isinstance(name, str) or name not in listed(kind):
        return set()
    before: set[str] = set()
    with contextlib.suppress(UserError):
        before = _settings(kind, section.get("name"))
    return {key for key in before if key != "name" and key in section} - _settings(kind, name)


def _settings(kind: str, name: str) -> set[str]:
    """The keywords of what builds a name; it is imported only if its source does not tell them."""
    known = accepted(kind, name)
    return set(keywords(find(kind, name)) if known is None else known)


def _override_stage(config: Config, index: int, key: str, text: str) -> None:
    """An override of what one stage runs, kept in what that stage changes of the base."""
    from mljax.config.stages import stage_configs

    count = len(config.stages)
    if index >= count:
        has = f"has {count}, counted from 0" if count else f"has none; write --config.{key}={text}"
        raise UserError(f"--config.stages[{index}].{key}={text}: this config {has}.")
    stage = stage_configs(config)[index]
    try:
        override(stage, key, text)
    except UserError as error:
        raise UserError(str(error).replace(f"--config.{key}", f"--config.stages[{index}].{key}")) from None
    path = key.split(".")
    if path[-1] == "name":  # its other settings changed with it
        path.pop()
    value: Any = stage
    for name in path:
        value = value[name]
    changed = value.to_dict() if isinstance(value, ConfigDict) else value
    with config.unlocked():
        config.stages = tuple(_with(s, path, changed) if i == index else s for i, s in enumerate(config.stages))


def _with(tree: Any, path: list[str], value: Any) -> Any:
    """A copy of nested dicts that has a value at a path."""
    if not path:
        return value
    return {**tree, path[0]: _with(tree.get(path[0], {}), path[1:], value)}


def _sets(partial: Any, section: Any, path: list[str]) -> bool:
    """Whether what a stage changes of a section leaves nothing of the section's value at a path."""
    key, *rest = path
    if not isinstance(partial, Mapping | ConfigDict) or key not in partial:
        return False
    changed, base = partial[key], section.get(key)
    if not rest or not isinstance(changed, Mapping | ConfigDict) or not isinstance(base, ConfigDict):
        return not isinstance(changed, Mapping | ConfigDict)
    if changed.get("name", base.get("name")) != base.get("name"):
        return True  # another thing stands in its place
    return _sets(changed, base, rest)


def _default(where: str, name: Any, key: str) -> Any:
    """Of a setting that the config does not write out: what its constructor says."""
    kind = SECTIONS.get(where)
    if kind is None or not isinstance(name, str) or name not in listed(kind):
        return None
    parameter = keywords(find(kind, name)).get(key)
    return None if parameter is None else parameter.default


def _names(value: Any) -> Iterator[Any]:
    """The keys of all dictionaries in a value."""
    if isinstance(value, dict):
        yield from value
        value = value.values()
    if isinstance(value, Collection) and not isinstance(value, (str, bytes)):
        for item in value:
            yield from _names(item)


def _value(old: Any, key: str, text: str) -> Any:
    """What a text means in the place of a value."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    if isinstance(value, int) and value.bit_length() > 1000:  # no float holds it
        raise UserError(f"--config.{key}={text}: the number is too large.")
    if not all(isinstance(name, str) for name in _names(value)):
        raise UserError(f"--config.{key}={text}: the keys of a section are names.")
    if isinstance(old, ConfigDict) and not isinstance(value, dict):
        some = sorted(old.keys())
        hint = f", e.g. --config.{key}.{'name' if 'name' in some else some[0]}={text}" if some else ""
        raise UserError(f"--config.{key}={text}: {key!r} is a section; set its keys one by one{hint}.")
    if isinstance(old, tuple) and isinstance(value, list):
        value = tuple(value)
    if isinstance(old, tuple) and not isinstance(value, tuple):
        value = tuple(v for v in text.split(",") if v) if isinstance(value, str) else (value,)
    if isinstance(value, tuple) and isinstance(old, tuple) and old and all(isinstance(item, str) for item in old):
        value = tuple(map(str, value))  # names that are numbers, as in backbone.endpoints=8,16
    # "none" is a choice of some settings (config.system.mode, config.vectors), and the absence of weights
    nothing = value is None and (text == "None" or key == "weights.name")
    if isinstance(old, str) and not nothing:
        return value if isinstance(value, str) else text
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    wrong = old is not None and value is not None and type(value) is not type(old) and not isinstance(old, ConfigDict)
    if wrong:
        raise UserError(f"--config.{key}={text}: expected a value of type {type(old).__name__}, such as {old!r}.")
    return value
