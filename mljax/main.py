"""Train and evaluate: flags -> config -> fit.

python -m mljax.main --config=configs/cmsg.py --workdir=runs/cmsg
python -m mljax.main --config=configs/cmsg.py:voc2007,smoke --workdir=/tmp/x --config.optim.epochs=3
python -m mljax.main --list
"""

import contextlib
import logging
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from mljax.cache import setup_jax
from mljax.errors import Full, UserError, exhausted
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
    except Full as full:
        words = [f"--config={flags['config']}"]
        words += [f"--config.{key}={value}" for key, value in flags["overrides"] if key != f"{full.section}.batch_size"]
        words += [f"--stage={full.stage}"] if len(config.stages) > 1 else []
        words += [f"--labels={full.labels}"] if full.labels else []
        words += ["--find-batch", *(["--only=infer"] if full.section == "eval" else [])]
        command = f"python -m mljax.bench {shlex.join(words)}"
        raise UserError(f"{full.what}; the largest that does is found by: {command}") from None
    return 0


def guarded(run: Callable[[], int]) -> int:
    """Run a command: what a user can mend is one line on stderr, and exit status 2."""
    log = logging.getLogger("mljax")
    log.handlers, log.propagate = [logging.lastResort or logging.NullHandler()], False  # plain lines
    try:
        setup_jax()
        return run()
    except UserError as error:
        print(f"mljax: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not exhausted(error):
            raise
        told = "take smaller batches (config.eval.batch_size in a run's directory, --batch of a benchmark) or images"
        print(f"mljax: The memory is full; {told}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mljax: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
