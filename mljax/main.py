"""Train and evaluate: flags -> config -> fit.

python -m mljax.main --config=configs/cmsg.py --workdir=runs/cmsg
python -m mljax.main --config=configs/cmsg.py:voc2007,smoke --workdir=/tmp/x --config.optim.epochs=3
python -m mljax.main --list
"""

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

from mljax.errors import UserError
from mljax.flags import USAGE, override, parse, read_config


def main(argv: list[str] | None = None) -> int:
    flags = parse(sys.argv[1:] if argv is None else argv)
    if flags.get("help"):
        print(USAGE, end="")
        return 0
    if flags.get("list"):
        from mljax.experiment import listing

        print(listing())
        return 0
    for name in ("config", "workdir"):
        if name not in flags:
            raise UserError(f"The flag --{name} is missing; see --help.")
    config = read_config(flags["config"])
    for key, value in flags["overrides"]:
        override(config, key, value)
    from mljax.train import Stop, fit

    try:
        fit(config, Path(flags["workdir"]))
    except Stop as stop:
        print(f"mljax: {stop}", file=sys.stderr)
        return 130
    return 0


def guarded(run: Callable[[], int]) -> int:
    """Run a command: what a user can mend is one line on stderr, and exit status 2."""
    try:
        setup_jax()
        return run()
    except UserError as error:
        print(f"mljax: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print("mljax: The memory is full; lower config.optim.batch_size or config.input.size.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mljax: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def setup_jax() -> None:
    """Before jax starts: the persistent compile cache, and no memory grabbed that others on the GPU need."""
    from mljax.cache import cache_dir

    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_dir() / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2 * 2**30))


if __name__ == "__main__":
    sys.exit(guarded(main))
