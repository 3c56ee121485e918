"""section(name=..., **kw) -> object, by import: the list of systems is the list of files.

A module in `mljax/systems`, `mljax/backbones` or `mljax/data` offers what it builds in `NAMES: dict[str, callable]`.
`losses` and `optim` are single modules with the same table. Adding a system is adding a file.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Collection, Mapping
from functools import cache, partial
from typing import Any

from mljax.errors import UserError, nearest
from mljax.types import missing_members

OF_LINEN = ("parent", "name")  # fields that every linen module has
APART = ("data.observe",)  # a table of its own kind inside the package of another


@cache
def names(kind: str) -> dict[str, Callable[..., Any]]:
    """All names of a kind ("systems", "backbones", "data", "losses", ..) with what builds them.

    A file that does not import is left out, so that it breaks nobody else's run; `find` says so to who asks for it.
    """
    return {name: constructor for file in files(kind) for name, constructor in _table(kind, file)[0].items()}


def files(kind: str) -> list[str]:
    """The files of a kind, without those that begin with an underscore; "" is the face of the folder."""
    module = importlib.import_module(f"mljax.{kind}")
    found = [info.name for info in pkgutil.iter_modules(getattr(module, "__path__", []))]
    return ["", *(f for f in found if not f.startswith("_") and f"{kind}.{f}" not in APART)]


@cache
def _table(kind: str, file: str) -> tuple[dict[str, Callable[..., Any]], str]:
    """The names in a file, and why it cannot be imported, or an empty text."""
    try:
        module = importlib.import_module(f"mljax.{kind}.{file}".rstrip("."))
    except Exception as error:  # whatever a file does when it is imported
        told = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".")
        return {}, f"mljax/{kind.replace('.', '/')}/{file}.py cannot be imported ({told})"
    return dict(getattr(module, "NAMES", {})), ""


def keywords(constructor: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The keywords that a config section may set: those of the constructor's signature."""
    return {
        name: parameter
        for name, parameter in inspect.signature(constructor).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and not (name in OF_LINEN and _class(constructor))
    }


def _class(constructor: Callable[..., Any]) -> type | None:
    """The class that a constructor is, or is a variant of: `partial(ResNet, depths=..)`."""
    target = constructor.func if isinstance(constructor, partial) else constructor
    return target if inspect.isclass(target) else None


def find(kind: str, name: str) -> Callable[..., Any]:
    """What builds a name of a kind.

    Raises:
      UserError: no file of the kind has the name; the nearest one is in the sentence, and files that do not import.
    """
    own = _table(kind, name) if name in files(kind) else ({}, "")  # most files are named for what they hold
    if own[1]:
        raise UserError(f"{own[1]}; mend the file, or remove it.")
    table = own[0] if name in own[0] else names(kind)
    if name not in table:
        broken = [problem for file in files(kind) if (problem := _table(kind, file)[1])]
        told = f"; it may be in a file that is broken: {'; '.join(broken)}" if broken else ""
        raise UserError(f"There is no {name!r} among the {kind}{nearest(name, table)}{told}.")
    return _complete(kind, table[name])


def _complete(kind: str, constructor: Callable[..., Any]) -> Callable[..., Any]:
    """A class, or a variant of one, that has all members of its kind's contract, `mljax.types.System` or `Backbone`."""
    cls = _class(constructor)
    missing = missing_members(kind, cls) if cls else []
    if cls and missing:
        place = cls.__module__.replace(".", "/")
        raise UserError(
            f"{cls.__name__} in {place}.py has no {' and no '.join(missing)}; every class in mljax/{kind} needs"
            " it (the contract is in mljax/types.py)."
        )
    return constructor


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
