"""The user's cache folder, files that are either whole or not there, and who may write to them."""

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mljax.errors import UserError
from mljax.interrupt import remove_at_end

LIMIT = 2 * 2**30  # bytes of compiled programs


def cache_dir() -> Path:
    """$MLJAX_CACHE, or ~/.cache/mljax; made if it is not there.

    Raises:
      UserError: it cannot be made or written to.
    """
    folder = Path(os.environ.get("MLJAX_CACHE") or Path.home() / ".cache" / "mljax")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(folder, os.W_OK | os.X_OK) else "no permission to write"
    except OSError as error:
        reason = error.strerror
    if reason is not None:
        raise UserError(f"The cache folder {folder} cannot be used ({reason}); set MLJAX_CACHE to one that can.")
    return folder


def setup_jax() -> None:
    """Where jax keeps compiled programs, for every command, notebook and run of this user; at most 2 GiB of them.

    A folder that the user gave to jax, by its environment or its config, stays as it is. Of a jax that is imported
    already the config is changed, since it has read its environment.
    """
    folder = cache_dir() / "xla"
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    loaded: Any = sys.modules.get("jax")
    if loaded is not None and loaded.config.jax_compilation_cache_dir is not None:
        return
    for program in folder.glob("*-cache"):  # one whose writer was killed would keep jax from storing any other
        with contextlib.suppress(OSError):
            if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
                program.unlink()
    if loaded is None:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(LIMIT))
        return
    from jax.experimental.compilation_cache import compilation_cache

    loaded.config.update("jax_compilation_cache_dir", str(folder))
    if loaded.config.jax_compilation_cache_max_size == -1:
        loaded.config.update("jax_compilation_cache_max_size", LIMIT)
    compilation_cache.reset_cache()  # it may have found before that there was none


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` that takes its place at the end; an error leaves nothing behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    with remove_at_end(temporary):
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def not_world_writable() -> Iterator[None]:
    """Whatever the user's umask, nobody but owner and group may write to what is made within."""
    before = os.umask(0o022)
    os.umask(before | 0o002)
    try:
        yield
    finally:
        os.umask(before)
