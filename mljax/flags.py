"""Command line of mljax.main: a config file with words, and overrides of its keys.

absl's config flags answer a wrong key with a traceback, look for files in the working directory only, and know no key that
a section does not write out; here a section takes every keyword of what it names.
"""

import ast
import importlib.util
import re
from pathlib import Path
from typing import Any

from mljax.errors import UserError, nearest

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
    roots = (Path.cwd(), Path(__file__).parents[1])
    path = next((r / file for r in roots if (r / file).is_file()), None)
    if path is None:
        known = sorted({f"{p.parent.name}/{p.name}" for r in roots for p in (r / "configs").glob("[!_]*.py")})
        raise UserError(f"There is no config file {file!r}{nearest(file, known)}.")
    spec = importlib.util.spec_from_file_location(f"mljax_config_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(words or None)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"The config file {path} fails with {type(error).__name__}: {error}.") from error
    return config.lock()


def override(config: Any, key: str, text: str) -> None:
    """`--config.a.b=text`: an existing key, a value of its type; numbers, booleans, None, tuples as Python writes them."""
    from ml_collections import ConfigDict

    *path, last = key.split(".")
    section = config
    for name in path:
        if not isinstance(section, ConfigDict) or name not in section:
            raise UserError(
                f"--config.{key}: there is no key {name!r}{nearest(name, getattr(section, 'keys', list)())}."
            )
        section = section[name]
    if not isinstance(section, ConfigDict):
        raise UserError(f"--config.{key}: {path[-1]!r} is a value and has no keys.")
    # Sections that name a constructor take any of its keywords; `build` checks them, and names the nearest.
    free = "name" in section or ".".join(path) in ("optim", "eval", "input.train", "input.eval")
    if last not in section and not free:
        raise UserError(f"--config.{key}: there is no key {last!r}{nearest(last, section.keys())}.")
    old = section.get(last)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    if isinstance(old, tuple) and not isinstance(value, tuple):
        value = tuple(v for v in text.split(",") if v) if isinstance(value, str) else (value,)
    if isinstance(old, str) and value is not None and not isinstance(value, str):
        value = text
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    wrong = old is not None and value is not None and type(value) is not type(old)
    if wrong and not (isinstance(old, str) or (isinstance(old, ConfigDict) and isinstance(value, dict))):
        raise UserError(f"--config.{key}={text}: a value of type {type(old).__name__} is wanted, like {old!r}.")
    with config.unlocked():
        section[last] = value


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
            if name.startswith("--config."):
                found["overrides"].append((name.removeprefix("--config."), value))
            else:
                found[name[2:]] = value
        elif flag.startswith("-"):
            raise UserError(f"There is no flag {name}{nearest(name, ('--config', '--workdir', '--list', '--help'))}.")
        else:
            raise UserError(f"The argument {flag!r} is left over; settings are written --config.KEY=VALUE.")
    return found
