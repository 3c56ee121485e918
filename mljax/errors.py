"""Errors that a user can cause: one sentence that says what is wrong, where, and what to do."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Printed as one line, without a traceback, by every command of mljax."""


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
    return f" (there is: {shown})"
