"""Config files: `FILE[:WORDS]` -> the locked config."""

import importlib.util
import traceback
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mljax.errors import UserError, nearest


def read_config(argument: str) -> Any:
    """`FILE[:WORDS]` -> the locked config; the file is looked for here and beside the package."""
    file, _, words = argument.partition(":")
    if not file:
        raise UserError("The flag --config names no file; give --config=configs/cmsg.py, for example.")
    roots = (Path.cwd(), Path(__file__).parents[2])
    path = next((r / file for r in roots if (r / file).is_file()), None)
    if path is None:
        known = sorted({f"{p.parent.name}/{p.name}" for r in roots for p in (r / "configs").glob("[!_]*.py")})
        raise UserError(f"There is no config file {file!r}{nearest(file, known)}.")
    spec = importlib.util.spec_from_file_location(f"mljax_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file; expected a .py with a function get_config.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"The config file {path} has no function get_config; see configs/cmsg.py for an example.")
        config = module.get_config(words or None)
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".")
        raise UserError(f"The config file {path} fails{_line_of(error, path)} with {reason}.") from error
    if not isinstance(config, ConfigDict):
        kind = type(config).__name__
        raise UserError(f"get_config of {path} returns {kind}; expected a config that starts from mljax.config.base().")
    return config.lock()


def _line_of(error: Exception, path: Path) -> str:
    """Where in the config file an error comes from."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path]
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename) == path:
        lines.append(error.lineno)
    return f" in line {lines[-1]}" if lines else ""
