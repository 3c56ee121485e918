"""section(name=..., **kw) -> object, by import: the list of systems is the list of files.

A module in `mljax/systems`, `mljax/backbones` or `mljax/data` offers what it builds in `NAMES: dict[str, callable]`;
so do those of `losses` and `optim`. Adding a system is adding a file. Which names there are is read from the source
where they are written out, so that `--list` and a wrong name import nothing.
"""

import ast
import contextlib
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache, partial
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
TABLE = re.compile(  # an assignment on the top level, to its closing brace
    r"^(?:NAMES|BATCH_LOSSES)\b(?:[^\n]*\{\n(?:[ #][^\n]*\n|\n)*\}[^\n]*|[^\n]*)", re.M
)
NOUNS = {"data.observe": "observations", "optim": "optimizers", "optim.schedules": "schedules"}
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
    inside = [info.name for info in pkgutil.iter_modules([str(folder) for folder in _folders(kind)])]
    return ["", *(f for f in inside if not f.startswith("_") and f"{kind}.{f}" not in APART)]


@cache
def _names_in(kind: str, file: str) -> tuple[str, ...]:
    """The keys of `NAMES` and `BATCH_LOSSES` in a file, read from its source, else by import."""
    keys: list[str] = []
    for text in TABLE.findall(_text(kind, file)):
        try:
            value = _names_of(ast.parse(text).body[0])
        except SyntaxError:
            value = None
        if not isinstance(value, ast.Dict) or not all(isinstance(key, ast.Constant) for key in value.keys):
            return tuple(_table(kind, file)[0])
        keys += [str(key.value) for key in value.keys if isinstance(key, ast.Constant)]
    return tuple(keys)


@cache
def _text(kind: str, file: str) -> str:
    """The source of a file of a kind, or of the folder's or the only file's face; empty where there is none."""
    places = [folder / f"{file}.py" for folder in _folders(kind)] if file else _faces(kind)
    for path in places:
        with contextlib.suppress(OSError, ValueError):
            return path.read_text()
    return ""


def _folders(kind: str) -> list[Path]:
    """Where the files of a kind lie: its folder, and what was added to the path of the package."""
    package = sys.modules.get(f"mljax.{kind}")
    found = [Path(folder) for folder in getattr(package, "__path__", [])]
    return found or [ROOM.joinpath(*kind.split("."))]


def _faces(kind: str) -> list[Path]:
    path = ROOM.joinpath(*kind.split("."))
    return [path / "__init__.py", path.with_suffix(".py")]


@cache
def _source(kind: str, file: str) -> ast.Module | None:
    """The parsed source of a file of a kind; None: it is not Python."""
    try:
        return ast.parse(_text(kind, file))
    except (SyntaxError, ValueError):
        return None


def _names_of(node: ast.stmt) -> ast.expr | None:
    """What a statement assigns to `NAMES` or `BATCH_LOSSES`."""
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    named = any(isinstance(target, ast.Name) and target.id in ("NAMES", "BATCH_LOSSES") for target in targets)
    return getattr(node, "value", None) if named else None


@cache
def accepted(kind: str, name: str) -> frozenset[str] | None:
    """The keywords of what builds a name, read from its source; None where only an import would tell.

    Read are plain functions, and linen modules without another base: their arguments and their fields.
    """
    for tree in filter(None, (_source(kind, file) for file in files(kind) if name in _names_in(kind, file))):
        defined = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        for table in map(_names_of, tree.body):
            for key, value in zip(table.keys, table.values) if isinstance(table, ast.Dict) else ():
                if isinstance(key, ast.Constant) and key.value == name:
                    return _keywords_of(defined.get(_defined(value)))
    return None


def _defined(value: ast.expr) -> str:
    """The name in `constructor` or `partial(constructor, ..)`."""
    value = value.args[0] if isinstance(value, ast.Call) and value.args else value
    return value.id if isinstance(value, ast.Name) else ""


def _keywords_of(node: ast.FunctionDef | ast.ClassDef | None) -> frozenset[str] | None:
    if isinstance(node, ast.FunctionDef) and node.args.kwarg is None and not node.decorator_list:
        return frozenset(argument.arg for argument in (*node.args.args, *node.args.kwonlyargs))
    if isinstance(node, ast.ClassDef) and [ast.unparse(base) for base in node.bases] == ["nn.Module"]:
        fields = (field.target for field in node.body if isinstance(field, ast.AnnAssign))
        return frozenset(field.id for field in fields if isinstance(field, ast.Name)) - set(OF_LINEN)
    return None


@cache
def _table(kind: str, file: str) -> tuple[dict[str, Callable[..., Any]], str]:
    """The names in a file, and why it cannot be imported, or an empty text."""
    try:
        module = importlib.import_module(f"mljax.{kind}.{file}".rstrip("."))
    except Exception as error:  # whatever a file does when it is imported
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".")
        return {}, f"mljax/{kind.replace('.', '/')}/{file}.py cannot be imported ({reason})"
    return dict(getattr(module, "NAMES", {})), ""


def forget() -> None:
    """Look at the files again: what was read of them and imported from them is kept until then."""
    for table in (names, listed, files, accepted, _names_in, _text, _source, _table):
        table.cache_clear()


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
    likely = [file for file in files(kind) if file == name or name in _names_in(kind, file)]
    for file in likely:
        table, problem = _table(kind, file)
        if problem:
            raise UserError(f"{problem}; fix the file or delete it.")
        if name in table:
            return _complete(kind, table[name])
    if name not in names(kind):
        raise unknown(kind, name, imported=True)
    return _complete(kind, names(kind)[name])


def unknown(kind: str, name: str, *, imported: bool = False) -> UserError:
    """The error of a name that no file of a kind has; files that are broken may have it.

    Args:
      imported: all files were imported, so that those that do not import are known, not only those that are not Python.
    """
    broken = [_table(kind, file)[1] for file in files(kind) if imported or _source(kind, file) is None]
    broken = [problem for problem in broken if problem]
    hint = f"; it may be in a file that is broken: {'; '.join(broken)}" if broken else ""
    return UserError(f"There is no {name!r} among the {NOUNS.get(kind, kind)}{nearest(name, listed(kind))}{hint}.")


def _complete(kind: str, constructor: Callable[..., Any]) -> Callable[..., Any]:
    """A class, or a variant of one, that has all members of its kind's contract, `mljax.types.System` or `Backbone`."""
    from mljax.types import missing_members  # imports jax, which a wrong name does not wait for

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
    for key in settings:
        check_keys(where, [key], set(allowed) - set(given), others=shared, why=owners(kind, key))
    missing = [k for k, p in allowed.items() if p.default is p.empty and k not in settings and k not in given]
    if missing:
        raise UserError(f"{where} needs the setting {missing[0]!r}.")
    return constructor, settings


def settings(constructor: Callable[..., Any], section: Mapping[str, Any], where: str, **given: Any) -> Any:
    """Call a constructor with a config section that has no name; a wrong key names its neighbour."""
    check_keys(where, section, keywords(constructor))
    return constructor(**{**given, **section})


def owners(kind: str, key: str) -> str:
    """Which other names of a small kind have a setting."""
    owners = sorted(name for name in listed(kind) if key in (accepted(kind, name) or ())) if kind in NOUNS else []
    return f"; {' and '.join(map(repr, owners))} {'has' if len(owners) == 1 else 'have'} it" if owners else ""


def check_keys(
    where: str, keys: Iterable[str], allowed: Collection[str], *, others: Collection[str] = (), why: str = ""
) -> None:
    """The one check that a section of a config sets nothing that does not exist.

    Args:
      where: the section and what it names: "config.system ('cmsg')".
      keys: that it sets.
      allowed: that it may set.
      others: more names that the hint may suggest.
      why: what the sentence ends with in place of the nearest name.
    Raises:
      UserError: the first key that is not allowed, with the nearest one.
    """
    for key in keys:
        if key not in allowed:
            raise UserError(f"{where} has no setting {key!r}{why or nearest(key, {*allowed, *others})}.")
