"""Config files: `FILE[:WORDS]` -> the locked config; or config.json of a run directory, which runs no code."""

import importlib.util
import json
import traceback
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, config_dict

from mljax.config.base import base
from mljax.config.text import completed, from_json
from mljax.errors import UserError, nearest

LARGEST = 2**22  # bytes of a config.json


def read_config(argument: str) -> Any:
    """`FILE[:WORDS]` -> the locked config; the file is looked for here and beside the package.

    A file that ends in .json is that of a run directory: what the run was trained with, overrides included. Nothing of
    it is executed.
    """
    file, _, words = argument.partition(":")
    if not file:
        raise UserError("The flag --config names no file; give --config=configs/cmsg.py, for example.")
    roots = (Path.cwd(), Path(__file__).parents[2])
    path = next((r / file for r in roots if (r / file).is_file()), None)
    if path is None:
        known = sorted({f"{p.parent.name}/{p.name}" for r in roots for p in (r / "configs").glob("[!_]*.py")})
        raise UserError(f"There is no config file {file!r}{nearest(file, known)}.")
    if path.suffix == ".json":
        if words:
            raise UserError(
                f"{file} takes no words ({words!r}), which are for .py files; set keys by --config.KEY=VALUE."
            )
        return read_json(path)
    spec = importlib.util.spec_from_file_location(f"mljax_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file; expected a .py with a function get_config.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"The config file {path} has no function get_config; CONTRIBUTING.md has an example.")
        config = module.get_config(words or None)
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".")
        raise UserError(f"The config file {path} fails{_line_of(error, path)} with {reason}.") from error
    if not isinstance(config, ConfigDict):
        kind = type(config).__name__
        raise UserError(f"get_config of {path} returns {kind}; expected a config that starts from mljax.config.base().")
    if words and not config.get("experiment"):
        raise UserError(
            f"The config file {path} does not heed the words {words!r}; end its get_config(words) with"
            " `return c.choose(config, words, WORDS)`."
        )
    return config.lock()


def _line_of(error: Exception, path: Path) -> str:
    """Where in the config file an error comes from."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path]
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename) == path:
        lines.append(error.lineno)
    return f" in line {lines[-1]}" if lines else ""


def read_json(path: Path) -> Any:
    """The locked config of a run directory's config.json; keys that are newer than the run have their defaults.

    Raises:
      UserError: it is damaged, or something else.
    """
    from mljax import seal  # imports numpy, which a .py file does not wait for

    try:
        with path.open("rb") as file:
            text = file.read(LARGEST + 1)
        content = json.loads(text) if len(text) <= LARGEST else None
        if not isinstance(content, dict) or not isinstance(content.get("optim"), dict):
            raise ValueError("it does not hold the sections of a config")
        config = from_json(json.dumps(completed(seal.unsealed(content))))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise UserError(
            f"{path} is not a sound config.json of a run ({reason}); restore it, or give a .py file."
        ) from None
    _retype(config, base())
    return config.lock()


def _retype(config: ConfigDict, known: ConfigDict) -> None:
    """None, which JSON holds without a type, gets that of the default, so that overrides are read as it says."""
    for key in known:
        old, new = known[key], config.get(key)
        if isinstance(new, ConfigDict) and isinstance(old, ConfigDict):
            _retype(new, old)
        elif key in config and new is None and old is None and known.get_type(key) is not type(None):
            config[key] = config_dict.placeholder(known.get_type(key))
