"""What every command shares: its argument parser, and how its errors end."""

import argparse
import contextlib
import copy
import errno
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from mljax import interrupt
from mljax.cache import not_world_writable, setup_jax
from mljax.config.flags import split_overrides
from mljax.errors import UserError, exhausted, nearest, printable, printable_lines


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
    log.handlers, log.propagate = [_handler()], False
    try:
        with contextlib.redirect_stdout(Printable(sys.stdout)), not_world_writable():
            setup_jax()
            return run()
    except UserError as error:
        _say(f"mljax: {error}")
        return 2
    except (MemoryError, RuntimeError) as error:
        if not exhausted(error):
            raise
        hint = "take smaller batches (config.eval.batch_size in a run's directory, --batch of a benchmark) or images"
        _say(f"mljax: The memory is full; {hint}.")
        return 2
    except interrupt.Stop as stop:
        _say(f"mljax: {stop}")
        return stop.status
    except BrokenPipeError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, ValueError) as error:
        if (text := _of_system(error)) is None:
            raise
        _say(f"mljax: {UserError(text)}")
        return 2
    except KeyboardInterrupt:
        _say("mljax: stopped")
        return 130
    except BaseException:
        interrupt.wait_if_ending()
        raise


def _say(text: str) -> None:
    """The last word of a command."""
    print(text, file=sys.stderr)
    interrupt.hush()


class Printable:
    """A text stream whose lines hold no control characters: names of classes and files may bring some along."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> int:
        return self.stream.write(printable_lines(text))

    def flush(self) -> None:
        self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _handler() -> logging.Handler:
    """Warnings as plain lines on stderr."""
    handler = copy.copy(logging.lastResort) or logging.NullHandler()
    handler.setFormatter(_Plain())
    return handler


# Failures of the system that are a user's to mend, wherever they come up.
_ADVICE = {
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "links lead in a circle",
    errno.EMFILE: "raise the limit of open files (ulimit -n), or lower config.input.workers",
    errno.ENFILE: "close other programs, or raise the system's limit of open files",
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.EROFS: "choose a folder that can be written",
    errno.EIO: "check the disk",
    errno.ESTALE: "check the mount",
}


def _of_system(error: OSError | ValueError) -> str | None:
    """A sentence for an error that says nothing of this program; None for any other."""
    if isinstance(error, ValueError):
        return "A path contains a NUL character; give another." if "embedded null" in str(error) else None
    advice = _ADVICE.get(error.errno or 0)
    if advice is None:
        return None
    where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else "A file"
    return f"{where} cannot be used ({(error.strerror or '').lower()}); {advice}."
