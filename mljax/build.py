"""section(name=..., **kw) -> object, by import: the list of systems is the list of files.

A module in `mljax/systems`, `mljax/backbones` or `mljax/data` offers what it builds in `NAMES: dict[str, callable]`;
so do those of `losses` and `optim`. Adding a system is adding a file. Which names there are is read from the source
where they are written out, so that `--list` and a wrong name import nothing.
"""

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from mljax.errors import UserError, nearest

SECTIONS = {  # of a config that name what they build -> its kind, the folder or module with the names
    "data": "data",
    "observe": "data.observe",
    "backbone": "backbones",
    "system": "systems",
    "loss": "losses",
    "optim": "optim",
    "optim.schedule": "optim.schedules",
}
ROOM = Path(__file__).parent
OF_LINEN = ("parent", "name")  # fields that every linen module has
APART = ("data.observe", "optim.schedules")  # tables of their own inside the package of another


@cache
def names(kind: str) -> dict[str, Callable[..., Any]]:
    """All names of a kind ("systems", "backbones", "data", "losses", ..) with what builds them.

    A file that does not import is left out, so that it breaks nobody else's run; `find` says so to who asks for it.
    """
    return {name: constructor for file in files(kind) for name, constructor in _table(kind, file)[0].items()}


@cache
def listed(kind: str) -> frozenset[str]:
    """All names of a kind, from the source of its files; one whose names are not written out there is imported."""
    return frozenset(name for file in files(kind) for name in _names_in(kind, file))


@cache
def files(kind: str) -> list[str]:
    """The files of a kind, without those that begin with an underscore; "" is the face of the folder."""
    inside = [info.name for info in pkgutil.iter_modules([str(ROOM / kind.replace(".", "/"))])]
    return ["", *(f for f in inside if not f.startswith("_") and f"{kind}.{f}" not in APART)]


@cache
def _names_in(kind: str, file: str) -> tuple[str, ...]:
    """The keys of `NAMES` and `WHOLE` in a file, read from its source, or by import where they are not written out."""
    path = ROOM.joinpath(*kind.split("."), file)
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    try:
        tree = ast.parse(path.read_text())
    except (OSError, SyntaxError, ValueError):
        return ()
    keys: list[str] = []
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if not any(isinstance(t, ast.Name) and t.id in ("NAMES", "WHOLE") for t in targets):
            continue
        value: Any = getattr(node, "value", None)
        if not isinstance(value, ast.Dict) or not all(isinstance(key, ast.Constant) for key in value.keys):
            return () if isinstance(value, ast.Attribute) else tuple(_table(kind, file)[0])
        keys += [str(key.value) for key in value.keys if isinstance(key, ast.Constant)]
    return tuple(keys)


@cache
def _table(kind: str, file: str) -> tuple[dict[str, Callable[..., Any]], str]:
    """The names in a file, and why it cannot be imported, or an empty text."""
    try:
        module = importlib.import_module(f"mljax.{kind}.{file}".rstrip("."))
    except Exception as error:  # whatever a file does when it is imported
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".")
        return {}, f"mljax/{kind.replace('.', '/')}/{file}.py cannot be imported ({reason})"
    return dict(getattr(module, "NAMES", {})), ""


def keywords(constructor: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The keywords that a config section may set: those of the constructor's signature."""
    return {
        name: parameter
        for name, parameter in inspect.signature(constructor).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and not (name in OF_LINEN and inspect.isclass(constructor))
    }


def find(kind: str, name: str) -> Callable[..., Any]:
    """What builds a name of a kind.

    Raises:
      UserError: no file of the kind has the name; the nearest one is in the sentence, and files that do not import.
    """
    likely = [file for file in files(kind) if file == name or name in _names_in(kind, file)]
    for file in likely:
        table, problem = _table(kind, file)
        if problem:
            raise UserError(f"{problem}; mend the file, or remove it.")
        if name in table:
            return _complete(kind, table[name])
    table = names(kind)
    if name not in table:
        broken = [problem for file in files(kind) if (problem := _table(kind, file)[1])]
        hint = f"; it may be in a file that is broken: {'; '.join(broken)}" if broken else ""
        raise UserError(f"There is no {name!r} among the {kind}{nearest(name, table)}{hint}.")
    return _complete(kind, table[name])


def _complete(kind: str, constructor: Callable[..., Any]) -> Callable[..., Any]:
    """A class that has all members of its kind's contract, `mljax.types.System` or `Backbone`."""
    from mljax.types import missing_members  # imports jax, which a wrong name does not wait for

    missing = missing_members(kind, constructor) if inspect.isclass(constructor) else []
    if missing:
        place = constructor.__module__.replace(".", "/")
        raise UserError(
            f"{constructor.__name__} in {place}.py has no {' and no '.join(missing)}; every class in mljax/{kind} needs"
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
    kind: str, section: Mapping[str, Any], given: Collection[str] = (), where: str = "", shared: Collection[str] = ()
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What a config section names and the settings for it, all of them keywords that it has; raises as `build` does.

    Args:
      given: names of the arguments that do not come from the config.
      where: the section, as messages name it; empty: the one of the kind.
      shared: other keys of the section, for the hint of the nearest one.
    """
    settings = dict(section)
    where = where or next((f"config.{key}" for key, value in SECTIONS.items() if value == kind), kind)
    name = settings.pop("name", None)
    if not isinstance(name, str):
        raise UserError(f"{where}.name is {'missing' if name is None else repr(name)}{nearest('', listed(kind))}.")
    constructor = find(kind, name)
    allowed = keywords(constructor)
    where = f"{where} ({name!r})"
    check_keys(where, settings, set(allowed) - set(given), others=shared)
    missing = [k for k, p in allowed.items() if p.default is p.empty and k not in settings and k not in given]
    if missing:
        raise UserError(f"{where} needs the setting {missing[0]!r}.")
    return constructor, settings


def settings(constructor: Callable[..., Any], section: Mapping[str, Any], where: str, **given: Any) -> Any:
    """Call a constructor with a config section that has no name; a wrong key names its neighbour."""
    check_keys(where, section, keywords(constructor))
    return constructor(**{**given, **section})


def check_keys(
    where: str, keys: Iterable[str], allowed: Collection[str], *, others: Collection[str] = (), why: str = ""
) -> None:
    """The one check that a section of a config sets nothing that does not exist.

    Args:
      where: the section and what it names: "config.system ('cmsg')".
      keys: that it sets.
      allowed: that it may set.
      others: more names that the hint may suggest.
      why: what the sentence ends with.
    Raises:
      UserError: the first key that is not allowed, with the nearest one.
    """
    for key in keys:
        if key not in allowed:
            raise UserError(f"{where} has no setting {key!r}{nearest(key, {*allowed, *others})}{why}.")
