"""Command line of mljax.main: a config file with words, and overrides of its keys.

absl's config flags answer a wrong key with a traceback, look for files in the working directory only, and know no key
that a section does not write out; here a section takes every keyword of what it names.
"""

import argparse
import ast
import importlib.util
import re
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from ml_collections import ConfigDict

from mljax.build import keywords, names
from mljax.errors import UserError, nearest
from mljax.types import Config

FLAGS = ("--config", "--workdir", "--list", "--help")
KINDS = {  # sections that name something
    "data": "data",
    "observe": "data.observe",
    "backbone": "backbones",
    "system": "systems",
    "loss": "losses",
}
USAGE = """usage: python -m mljax.main --config=FILE[:WORD,WORD..] --workdir=FOLDER [--config.KEY=VALUE ..]

  --config=FILE[:WORDS]   an experiment, e.g. configs/cmsg.py:voc2007,smoke (words are explained in the file)
  --workdir=FOLDER        run directory; running again resumes, or prints the table of a finished run
  --config.KEY=VALUE      override, e.g. --config.optim.epochs=3 --config.parallel=pmap
  --list                  names of systems, backbones, data sets and losses
  --help                  this text
"""


def read_config(argument: str) -> Any:
    """`FILE[:WORDS]` -> the locked config; the file is looked for here and beside the package."""
    file, _, words = argument.partition(":")
    if not file:
        raise UserError("The flag --config names no file; give --config=configs/cmsg.py, for example.")
    roots = (Path.cwd(), Path(__file__).parents[1])
    path = next((r / file for r in roots if (r / file).is_file()), None)
    if path is None:
        known = sorted({f"{p.parent.name}/{p.name}" for r in roots for p in (r / "configs").glob("[!_]*.py")})
        raise UserError(f"There is no config file {file!r}{nearest(file, known)}.")
    spec = importlib.util.spec_from_file_location(f"mljax_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"The config file {path} is no Python file; a config is a .py with a function get_config.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"The config file {path} has no function get_config; see configs/cmsg.py for an example.")
        config = module.get_config(words or None)
    except UserError:
        raise
    except Exception as error:
        told = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".")
        raise UserError(f"The config file {path} fails{_line_of(error, path)} with {told}.") from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"get_config of {path} returns {type(config).__name__}; a config of mljax.config.base() is due."
        )
    return config.lock()


def _line_of(error: Exception, path: Path) -> str:
    """Where in the config file an error comes from."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path]
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename) == path:
        lines.append(error.lineno)
    return f" in line {lines[-1]}" if lines else ""


def override(config: Config, key: str, text: str) -> None:
    """`--config.a.b=text`: an existing key, a value of its type; numbers, None and tuples as Python writes them.

    `--config.stages[1].a.b=text` is for the second stage alone.
    """
    if match := re.fullmatch(r"stages\[(\d+)\]\.(.+)", key):
        return _override_stage(config, int(match[1]), match[2], text)
    *path, last = key.split(".")
    section: Any = config
    for i, name in enumerate(path):
        if name not in section:
            raise UserError(f"--config.{key}: there is no key {name!r}{nearest(name, section.keys())}.")
        section = section[name]
        if not isinstance(section, ConfigDict):
            raise UserError(f"--config.{key}: {'.'.join(path[: i + 1])!r} is a value and has no keys.")
    # Sections that name a constructor take any of its keywords; `build` checks them, and names the nearest.
    free = "name" in section or ".".join(path) in ("optim", "input.train", "input.eval")
    if last not in section and not (free and last):
        raise UserError(f"--config.{key}: there is no key {last!r}{nearest(last, section.keys())}.")
    stages = config.get("stages")
    if stages and isinstance(stages, tuple) and all(_says(stage, config, key.split(".")) for stage in stages):
        raise UserError(
            f"--config.{key}={text} has no effect: every stage of this config says its own {key}; give it to one, as in"
            f" --config.stages[0].{key}={text}."
        )
    old = section.get(last)
    if old is None and last in section and section.get_type(last) is str:
        old = ""  # a text that is not set yet
    if last not in section and "," in text and isinstance(_default(".".join(path), section.get("name"), last), tuple):
        old = ()
    value = _value(old, key, text)
    kind = KINDS.get(".".join(path))
    stale = set()  # settings of what had the name before, which the new one does not know
    if last == "name" and kind is not None and value != old and value in names(kind):
        stale = set(section.keys()) - {"name", "reduction", *keywords(names(kind)[value])}
    try:
        with config.unlocked():
            section[last] = value
            for name in stale:
                del section[name]
    except (TypeError, ValueError):
        wanted = section.get_type(last).__name__
        raise UserError(f"--config.{key}={text}: a value of type {wanted} is wanted.") from None


def _override_stage(config: Config, index: int, key: str, text: str) -> None:
    """An override of what one stage runs, kept in what that stage changes of the base."""
    from mljax.rundir import stage_configs

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
    if path[-1] == "name":  # its other settings went with it
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


def _says(partial: Any, section: Any, path: list[str]) -> bool:
    """Whether what a stage changes of a section leaves nothing of the section's value at a path."""
    key, *rest = path
    if not isinstance(partial, Mapping | ConfigDict) or key not in partial:
        return False
    own, base = partial[key], section.get(key)
    if not rest or not isinstance(own, Mapping | ConfigDict) or not isinstance(base, ConfigDict):
        return not isinstance(own, Mapping | ConfigDict)
    if own.get("name", base.get("name")) != base.get("name"):
        return True  # another thing stands in its place
    return _says(own, base, rest)


def _default(where: str, name: Any, key: str) -> Any:
    """Of a setting that the config does not write out: what its constructor says."""
    kind = KINDS.get(where)
    if kind is None or name not in names(kind):
        return None
    parameter = keywords(names(kind)[name]).get(key)
    return None if parameter is None else parameter.default


def _value(old: Any, key: str, text: str) -> Any:
    """What a text means in the place of a value."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    if isinstance(old, ConfigDict) and not isinstance(value, dict):
        some = sorted(old.keys())
        hint = f", e.g. --config.{key}.{'name' if 'name' in some else some[0]}={text}" if some else ""
        raise UserError(f"--config.{key}={text}: {key!r} is a section; set its keys one by one{hint}.")
    if isinstance(old, tuple) and isinstance(value, list):
        value = tuple(value)
    if isinstance(old, tuple) and not isinstance(value, tuple):
        value = tuple(v for v in text.split(",") if v) if isinstance(value, str) else (value,)
    # "none" is a choice of some settings (config.system.mode, config.vectors), and the absence of weights
    nothing = value is None and (text == "None" or key == "weights.name")
    if isinstance(old, str) and not nothing:
        return value if isinstance(value, str) else text
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    wrong = old is not None and value is not None and type(value) is not type(old) and not isinstance(old, ConfigDict)
    if wrong:
        raise UserError(f"--config.{key}={text}: a value of type {type(old).__name__} is wanted, like {old!r}.")
    return value


def parse(argv: list[str]) -> dict[str, Any]:
    """Flags -> {"config", "workdir", "overrides", "list", "help"}; what is left over is an error."""
    found: dict[str, Any] = {"overrides": []}
    rest = list(argv)
    while rest:
        flag = rest.pop(0)
        name, equals, value = flag.partition("=")
        name = re.sub("^--?", "--", name)
        if name in ("--help", "-h", "--h"):
            found["help"] = True
        elif name == "--list":
            found["list"] = True
        elif name in ("--config", "--workdir") or name.startswith("--config."):
            if not equals:
                if not rest:
                    raise UserError(f"The flag {name} needs a value: {name}=...")
                value = rest.pop(0)
                if value.startswith("--"):
                    raise UserError(f"The flag {name} needs a value before {value.partition('=')[0]}: {name}=...")
            if name.startswith("--config."):
                found["overrides"].append((name.removeprefix("--config."), value))
            elif not value:
                raise UserError(f"The flag {name} is empty: {name}=...")
            else:
                found[name[2:]] = value
        elif flag.startswith("-"):
            hint = f" (did you mean --config.{name[2:]}?)" if "." in name else nearest(name, FLAGS)
            raise UserError(f"There is no flag {name}{hint}.")
        else:
            word = flag.partition("=")[0]
            close = f"--config.{word}" if "." in word else f"--{word}"
            hint = f" (did you mean {close}=..?)" if equals and ("." in word or close in FLAGS) else ""
            raise UserError(f"The argument {flag!r} is left over{hint}; settings are written --config.KEY=VALUE.")
    found["overrides"].sort(key=_order)
    return found


def _order(item: tuple[str, str]) -> tuple[bool, bool]:
    """What a stage changes comes after what all have; a name before its settings, which are those of the new name."""
    return item[0].startswith("stages["), not item[0].endswith(".name")


def split_overrides(argv: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The other arguments, and the settings written --config.KEY=VALUE; names first, others depend on them."""
    words, rest, found = list(argv), [], []
    while words:
        word = words.pop(0)
        match = re.fullmatch(r"--?config\.([^=]+)(?:=(.*))?", word, flags=re.S)
        if not match:
            rest.append(word)
        elif match[2] is None and (not words or words[0].startswith("--")):
            raise UserError(f"The flag {word} needs a value: {word}=...")
        else:
            found.append((match[1], words.pop(0) if match[2] is None else match[2]))
    return rest, sorted(found, key=_order)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one sentence, with the nearest flag; no flag may be shortened."""

    def __init__(self, module: str, text: str | None):
        super().__init__(prog=f"python -m mljax.{module}", description=(text or "").split("\n")[0], allow_abbrev=False)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            flag = next((word for word in rest if word.startswith("-")), None)
            if flag is None:
                raise UserError(f"The argument {rest[0]!r} is left over; see {self.prog} --help.")
            flag = flag.partition("=")[0]
            flags = [option for action in self._actions for option in action.option_strings]
            raise UserError(f"There is no flag {flag}{nearest(flag, [f for f in flags if f.startswith('--')])}.")
        return found

    def parse_overrides(self, argv: list[str] | None) -> tuple[Any, list[tuple[str, str]]]:
        """The arguments, and the settings written --config.KEY=VALUE among them."""
        rest, found = split_overrides(sys.argv[1:] if argv is None else argv)
        return self.parse_args(rest), found

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message[:1].upper()}{message[1:].rstrip('.')}; see {self.prog} --help.")
