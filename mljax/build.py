"""section(name=..., **kw) -> object, by import: the list of systems is the list of files.

A module in `mljax/systems`, `mljax/backbones` or `mljax/data` offers what it builds in `NAMES: dict[str, callable]`.
`losses` and `optim` are single modules with the same table. Adding a system is adding a file.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any

from mljax.errors import UserError, nearest

APART = ("data.observe",)  # a table of its own kind inside the package of another


@cache
def names(kind: str) -> dict[str, Callable[..., Any]]:
    """All names of a kind ("systems", "backbones", "data", "losses", ..) with what builds them."""
    module = importlib.import_module(f"mljax.{kind}")
    table: dict[str, Callable[..., Any]] = dict(getattr(module, "NAMES", {}))
    for name in files(kind):
        if f"{kind}.{name}" not in APART:
            table |= getattr(importlib.import_module(f"mljax.{kind}.{name}"), "NAMES", {})
    return table


def files(kind: str) -> list[str]:
    """The files of a kind, without those that begin with an underscore."""
    folder = getattr(importlib.import_module(f"mljax.{kind}"), "__path__", [])
    return [info.name for info in pkgutil.iter_modules(folder) if not info.name.startswith("_")]


def keywords(constructor: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The keywords that a config section may set: those of the constructor's signature."""
    return {
        name: parameter
        for name, parameter in inspect.signature(constructor).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


def find(kind: str, name: str) -> Callable[..., Any]:
    table = names(kind)
    if name not in table:
        raise UserError(f"There is no {name!r} among the {kind}{nearest(name, table)}.")
    return table[name]


def build(kind: str, section: Mapping[str, Any], **given: Any) -> Any:
    """Build what a config section names.

    Args:
      kind: where to look: "systems", "backbones", "data", "losses".
      section: `name` plus exactly the constructor's keywords.
      given: further arguments of the constructor that do not come from the config.
    Raises:
      UserError: no such name, or a key that is not a keyword of the constructor; the nearest name is in the sentence.
    """
    constructor, settings = checked(kind, section, given)
    allowed = keywords(constructor)
    return constructor(**settings, **{k: v for k, v in given.items() if k in allowed})


def checked(
    kind: str, section: Mapping[str, Any], given: Collection[str] = ()
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What a config section names and the settings for it, all of them keywords that it has; raises as `build` does.

    Args:
      given: names of the arguments that do not come from the config.
    """
    settings = dict(section)
    name = settings.pop("name", None)
    if name is None:
        raise UserError(f"The config section for {kind} has no 'name'{nearest('', names(kind))}.")
    constructor = find(kind, name)
    allowed = keywords(constructor)
    for key in settings:
        if key not in allowed or key in given:
            options = set(allowed) - set(given)
            raise UserError(f"{name!r} ({kind}) has no setting {key!r}{nearest(key, options)}.")
    missing = [k for k, p in allowed.items() if p.default is p.empty and k not in settings and k not in given]
    if missing:
        raise UserError(f"{name!r} ({kind}) needs the setting {missing[0]!r} in its config section.")
    return constructor, settings


def settings(constructor: Callable[..., Any], section: Mapping[str, Any], where: str, **given: Any) -> Any:
    """Call a constructor with a config section that has no name; a wrong key names its neighbour."""
    allowed = keywords(constructor)
    for key in section:
        if key not in allowed:
            raise UserError(f"{where} has no setting {key!r}{nearest(key, allowed)}.")
    return constructor(**{**given, **section})
