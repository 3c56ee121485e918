"""What every command shares: its argument parser, and how its errors end."""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from mljax import interrupt
from mljax.cache import setup_jax
from mljax.config.flags import split_overrides
from mljax.errors import UserError, exhausted, nearest


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one sentence, with the nearest flag; no flag may be shortened."""

    def __init__(self, module: str, text: str | None):
        super().__init__(prog=f"python -m mljax.{module}", description=(text or "").split("\n")[0], allow_abbrev=False)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        parsed, rest = self.parse_known_args(args, namespace)
        if rest:
            flag = next((word for word in rest if word.startswith("-")), None)
            if flag is None:
                raise UserError(f"The argument {rest[0]!r} is not expected here; see {self.prog} --help.")
            flag = flag.partition("=")[0]
            flags = [option for action in self._actions for option in action.option_strings]
            raise UserError(f"There is no flag {flag}{nearest(flag, [f for f in flags if f.startswith('--')])}.")
        return parsed

    def parse_overrides(self, argv: list[str] | None) -> tuple[Any, list[tuple[str, str]]]:
        """The arguments, and the settings written --config.KEY=VALUE among them."""
        rest, settings = split_overrides(sys.argv[1:] if argv is None else argv)
        return self.parse_args(rest), settings

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message[:1].upper()}{message[1:].rstrip('.')}; see {self.prog} --help.")


def guarded(run: Callable[[], int]) -> int:
    """Run a command; returns its exit status.

    0: it did what it says. 2: an error that a user can correct, which is one line on stderr. 130 and 143: stopped by
    Ctrl-C or SIGTERM.
    """
    interrupt.watch()
    return interrupt.leave(_run(run))


def _run(run: Callable[[], int]) -> int:
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
        hint = "take smaller batches (config.eval.batch_size in a run's directory, --batch of a benchmark) or images"
        print(f"mljax: The memory is full; {hint}.", file=sys.stderr)
        return 2
    except interrupt.Stop as stop:
        print(f"mljax: {stop}", file=sys.stderr)
        return stop.status
    except KeyboardInterrupt:
        print("mljax: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except BaseException:
        interrupt.wait_if_ending()
        raise
