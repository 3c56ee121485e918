"""SIGTERM ends a command with status 143 and Ctrl-C with 130, at any moment, and what was trained is saved first.

While everything is saved, a signal ends the process at once: temporary files are removed, then `os._exit`. No
exception is raised from the handler, since code of others might swallow or report it. While something is unsaved
(`interruptible`), a signal is only noted, and the trainer, which asks after each step, saves and leaves; a thread sees
to it that the process also ends where nobody asks: in a compilation, or in a read that never returns.

Outside of commands, in a notebook or a test, handlers are set within `interruptible` alone, and the process goes on.
"""

import contextlib
import logging
import os
import select
import signal
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from pathlib import Path

STOPPING = b"\nstopping as soon as it is saved; press Ctrl-C again to leave at once\n"
STOPPED = b"mljax: stopped\n"
AT_ONCE = "stopped at once; the last checkpoint is whole, run the same command to go on from it"
NUMBERS = (signal.SIGINT, signal.SIGTERM)
ECHO = 1.0  # seconds in which a signal counts as the same one: launchers pass on what a terminal sends to everyone
UNASKED = 2.0  # seconds that the main thread has to end a process with nothing unsaved, before the watcher does
GRACE = 5.0  # seconds, besides ten steps, until a loop asks; then the watcher saves and ends the process
SAVING = 600.0  # seconds that saving may take: 100 GB at 200 MB/s, and some
CLEANING = 60.0  # seconds that callbacks may take; children of a sweep save within them
EXIT = 8.0  # seconds that leaving may take once all is saved: Python waits for threads of others


class Stop(Exception):
    """The process is to leave, and nothing is unsaved. `status` is that of the command."""

    def __init__(self, message: str = "stopped", number: int | None = None):
        super().__init__(message)
        self.status = 128 + (number or _signals.number or signal.SIGINT)
        _signals.leaving = time.monotonic()


class Signals:
    """The signals that came while something is unsaved; true once there is one.

    Attributes:
      times, number: when they came, and which the first was.
      unsaved: whether ending now would lose anything.
      slowest: seconds of the slowest step so far.
      rescue: saves everything from another thread; None where that is not possible.
      saving: since when something is being saved; None: nothing is.
      leaving: since when a Stop unwinds the main thread.
    """

    def __init__(self) -> None:
        self.times: list[float] = []
        self.number: int | None = None
        self.unsaved, self.slowest = False, 0.0
        self.rescue: Callable[[], object] | None = None
        self.saving: float | None = None
        self.leaving: float | None = None
        self.rescued: threading.Thread | None = None
        self.lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self.times)

    def note(self, number: int) -> None:
        """A signal came; the first is answered by a line on stderr if something is unsaved."""
        now = time.monotonic()
        if self.times and now - self.times[0] <= ECHO:
            return
        self.times.append(now)
        if self.number is None:
            self.number = number
            if self.unsaved:
                _write(STOPPING)  # a plain write: the handler may have cut into any other

    @property
    def insists(self) -> bool:
        """Whether there was a second one, that is not the first passed on."""
        return len(self.times) > 1


_signals = Signals()
_command = False  # whether this process is a command, whose signals are handled from its first line to its last
_pid = os.getpid()
_pipe: tuple[int, int] | None = None
_cleaning: dict[int, Callable[[], object]] = {}
_ending = threading.Lock()


# --- what a command does ----------------------------------------------------------------------------------------------


def install() -> None:
    """Handle signals from now on, in a process that is a command of mljax: `python -m mljax.main`."""
    global _command
    words = getattr(sys, "orig_argv", [])
    module = words[words.index("-m") + 1 : words.index("-m") + 2] if "-m" in words else []
    if sys.argv[:1] == ["-m"] and module and module[0].startswith("mljax."):
        _command = True
        for number in NUMBERS:
            signal.signal(number, _handle)


def watch() -> None:
    """Start the thread that ends a command whose main thread does not."""
    global _pipe
    if not _command or _pipe is not None:
        return
    try:
        _pipe = os.pipe()
    except OSError:  # no descriptor is left: the handler alone does what it can
        return
    for side in _pipe:
        os.set_blocking(side, False)
    signal.set_wakeup_fd(_pipe[1], warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_forget)
    threading.Thread(target=_watch, daemon=True, name="mljax-signals").start()


def leave(status: int) -> int:
    """The last thing that a command does: Python ends within `EXIT` seconds, whatever other threads wait for."""
    if not _command:
        return status
    if _signals:
        status = 128 + (_signals.number or 0)

    def end() -> None:
        time.sleep(EXIT)
        os._exit(status)

    threading.Thread(target=end, daemon=True).start()
    return status


def wait_if_ending() -> None:
    """Never returns if another thread is ending the process: what fails meanwhile is of no interest."""
    if _ending.locked():
        _park()


def _handle(number: int, frame: Any) -> None:
    if os.getpid() != _pid:  # a process that was forked off
        os._exit(128 + number)
    if _pipe is None:
        _signals.note(number)
    if _ending.locked():
        if _signals.insists:
            os._exit(128 + number)
        return
    if not _signals.unsaved or _signals.insists:
        end(number)


def _watch() -> None:
    assert _pipe is not None
    while True:
        if select.select(_pipe[:1], (), (), 0.1 if _signals else None)[0]:
            for number in os.read(_pipe[0], 64):
                if number in NUMBERS:
                    _signals.note(number)
        if _ending.locked():
            if _signals.insists:
                os._exit(128 + (_signals.number or signal.SIGTERM))
        elif _signals and _overdue():
            end(_signals.number or signal.SIGTERM)


def _overdue() -> bool:
    """Whether the watcher has to end the process."""
    signals, now = _signals, time.monotonic()
    if signals.insists:
        return True
    if signals.leaving is not None and signals.saving is None:
        return now - signals.leaving > EXIT
    if not signals.unsaved:
        return now - signals.times[0] > UNASKED
    if signals.saving is not None:
        return now - max(signals.saving, signals.times[0]) > SAVING
    if now - signals.times[0] < GRACE + 10 * signals.slowest:
        return False
    if signals.rescued is None:
        with signals.lock:
            if signals.rescue is None or signals.saving is not None:
                return signals.saving is None
            signals.rescued = threading.Thread(target=signals.rescue, daemon=True)
        signals.rescued.start()
    return not signals.rescued.is_alive() or now - signals.times[0] > SAVING


def end(number: int) -> NoReturn:
    """End the process: remove what is temporary, and leave without another word of anyone."""
    if not _ending.acquire(blocking=False):
        _park()
    hush()
    threading.Thread(target=lambda: (time.sleep(CLEANING), os._exit(128 + number)), daemon=True).start()
    for callback in reversed(list(_cleaning.values())):
        with contextlib.suppress(Exception):
            callback()
    with contextlib.suppress(Exception):
        weakref.finalize._exitfunc()  # type: ignore[attr-defined]  # temporary folders of the standard library
    threading.Thread(target=lambda: (time.sleep(UNASKED), os._exit(128 + number)), daemon=True).start()
    with contextlib.suppress(Exception):
        sys.stdout.flush()  # waits for ever where nobody reads
    if os.isatty(2):
        _write(b"\x1b[?25h\n")  # a live line hides the cursor
    _write(STOPPED)
    os._exit(128 + number)


def hush() -> None:
    """Everything was said: no word of what others find while Python ends, such as tasks that were never awaited."""
    if not _command:
        return
    sys.excepthook = sys.unraisablehook = threading.excepthook = lambda *_: None
    warnings.simplefilter("ignore")
    logging.disable()


def _park() -> NoReturn:
    """Wait for the end of the process, which another thread brings about."""
    while True:
        time.sleep(1)


def _forget() -> None:
    signal.set_wakeup_fd(-1)


def _write(text: bytes) -> None:
    with contextlib.suppress(OSError):
        os.write(2, text)


# --- what others say --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def cleaning(callback: Callable[[], object]) -> Iterator[None]:
    """Call something also where a signal ends the process; its own `finally` is not run then."""
    key = id(callback)
    _cleaning[key] = callback
    try:
        yield
    finally:
        _cleaning.pop(key, None)


def remove_at_end(path: "Path") -> contextlib.AbstractContextManager[None]:
    """A temporary file that goes where a signal ends the process."""
    return cleaning(lambda: path.unlink(missing_ok=True))


@contextlib.contextmanager
def interruptible() -> Iterator[Signals]:
    """Notes Ctrl-C and SIGTERM for a loop that asks for them and saves; a second one ends a command at once.

    Outside of commands the second one raises Stop. Set `unsaved` once there is anything to save.
    """
    global _signals
    if _command:
        try:
            yield _signals
        finally:
            _signals.unsaved = False
        return
    before, _signals = _signals, Signals()
    _signals.unsaved = True

    def handler(number: int, frame: Any) -> None:
        _signals.note(number)
        if _signals.insists:
            raise Stop(AT_ONCE)

    old: dict[int, Any] = {}
    try:
        for number in NUMBERS:
            with contextlib.suppress(ValueError):  # not in the main thread: nothing to catch there
                old[number] = signal.signal(number, handler)
        yield _signals
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)
        _signals = before


def check() -> None:
    """For loops between whose turns nothing is lost.

    Raises:
      Stop: a signal came.
    """
    if _signals:
        raise Stop


@contextlib.contextmanager
def saving() -> Iterator[None]:
    """While something is saved, which may take long, the process is not ended but by a second signal."""
    with _signals.lock:
        elsewhere = _signals.rescued is not None and threading.current_thread() is not _signals.rescued
        if not elsewhere:
            outer, _signals.saving = _signals.saving, time.monotonic()
    if elsewhere:
        _park()
    try:
        yield
    finally:
        _signals.saving = outer


@contextlib.contextmanager
def rescued_by(save: Callable[[], object]) -> Iterator[None]:
    """While something runs that cannot ask, such as a compilation: `save` is called from another thread if it lasts."""
    _signals.rescue = save
    try:
        yield
    finally:
        with _signals.lock:
            _signals.rescue = None
        if _signals.rescued is not None:
            _park()
