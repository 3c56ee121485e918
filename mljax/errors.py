"""Errors that a user can cause: one sentence that says what is wrong, where, and what to do."""

import difflib
import errno
import re
import unicodedata
from collections.abc import Iterable


class UserError(Exception):
    """Printed as one line, without a traceback, by every command of mljax.

    Control characters are escaped, line ends among them, and words that fill a terminal are shortened.

    Args:
      message: the sentence.
      lines: a list to be printed below it.
    """

    def __init__(self, message: str = "", lines: Iterable[str] = ()):
        text = _INDENTED.sub(" ", str(message))
        super().__init__("\n".join([printable(_ENDLESS.sub(r"\1..\2", text)), *map(printable, lines)]))


_INDENTED = re.compile(r"\n +")  # in the repr of nested dicts
_ENDLESS = re.compile(r"(\S{200})\S{200,}(\S{40})")


def printable(text: str) -> str:
    """A name for a terminal or a table: control characters, line ends and invisible marks are escaped as \\x1b."""
    if text.isprintable():
        return text
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in _UNSEEN else c for c in text
    )  # a lone surrogate, of a file name that is not UTF-8, is among them


def printable_lines(text: str) -> str:
    """A text of several lines, each of them `printable`; tabs stay."""
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    return re.sub(r"[^\n\t]+", lambda part: printable(part[0]), text)


_UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def remedy(code: int | None, otherwise: str) -> str:
    """What to do about a failed write: `otherwise`, unless it is the number of open files."""
    return "raise the limit of open files (ulimit -n)" if code in (errno.EMFILE, errno.ENFILE) else otherwise


class OutOfMemory(UserError):
    """The memory does not hold a batch of a run.

    Attributes:
      section: of the config whose batch_size it is: "optim" of a training step, "eval" of an evaluation.
      what: names the batch.
      stage: of the run, from 1.
      labels: how many there are; None: not known.
    """

    def __init__(self, section: str, batch: int, size: int, stage: int, count: int, labels: int | None = None):
        of = f" of stage {stage}" if count > 1 else ""
        name = {"optim": "A batch", "eval": "An evaluation batch"}[section]
        self.section, self.stage, self.labels = section, stage, labels
        self.what = f"{name} of {batch} at {size} pixels{of} does not fit the memory"
        super().__init__(f"{self.what}; lower config.{section}.batch_size.")


def nearest(name: str, options: Iterable[str]) -> str:
    """A hint ` (did you mean 'x'?)` for the option nearest to `name`, or the list of a few options.

    Args:
      name: what the user wrote.
      options: the names that exist.
    Returns:
      A string to append to a sentence; empty if there are no options.
    """
    options = sorted(map(str, options))
    close = difflib.get_close_matches(str(name), options, n=1, cutoff=0.6)
    if close:
        return f" (did you mean {close[0]!r}?)"
    if not options:
        return ""
    shown = ", ".join(options[:12]) + (", ..." if len(options) > 12 else "")
    return f" (available: {shown})"


def one_of(where: str, value: object, options: Iterable[str]) -> None:
    """Check a setting that takes one of a few names.

    Args:
      where: the setting, as the sentence names it: "config.system.mode".
      value: what the user set.
      options: the names that exist.
    Raises:
      UserError: the value is none of them.
    """
    options = tuple(options)
    if value not in options:
        close = difflib.get_close_matches(str(value), options, n=1, cutoff=0.6)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise UserError(f"{where} is {value!r}; expected one of {', '.join(options)}{hint}.")


def at_least(where: str, value: float | None, minimum: float) -> None:
    """Check a number that has a minimum; None, for settings that may have no number, passes.

    Raises:
      UserError: the number is smaller.
    """
    if value is not None and value < minimum:
        raise UserError(f"{where} is {value}; expected at least {minimum}.")


def exhausted(error: BaseException) -> bool:
    """Whether an error says that the memory of a device or of the machine is full."""
    words = re.search("resource_exhausted|out.of.memory|failed to allocate", str(error), flags=re.I)
    return isinstance(error, MemoryError) or words is not None
