"""Training commands as processes that can be killed: forked from a worker that has imported everything, or started.

A forked one saves the seconds of imports, and can be changed first (`hook`): the worker never touches a device, so that
each fork starts JAX itself. It runs `python -m mljax.main` as the interpreter would, its exit included.
"""

import atexit
import contextlib
import ctypes
import dataclasses
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.torture.harness import ROOT, Failed

LAUNCH = Path(__file__).with_name("launch.py")


@dataclasses.dataclass
class Process:
    """A training command that runs, or ran, in a session of its own.

    Attributes:
      pid: also of its session.
      folder: holds `out`, `err` and `after` of it.
      status: as a shell has it, 128 + the signal for one that a signal ended; None while it runs.
    """

    pid: int
    folder: Path
    status: int | None = None

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text(errors="replace")

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text(errors="replace")

    @property
    def after(self) -> Any:
        """What `after` returned; None if the process did not come that far."""
        path = self.folder / "after"
        return json.loads(path.read_text()) if path.is_file() else None

    def poll(self) -> int | None:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = _shell(status)
        return self.status

    def wait(self, limit: float) -> int:
        """The exit status; a `Failed` and a kill after `limit` seconds."""
        end = time.monotonic() + limit
        while self.poll() is None:
            if time.monotonic() > end:
                self.end()
                raise Failed(f"no exit within {limit:.0f} s; last said {self.err.strip()[-300:]!r}")
            time.sleep(0.01)
        assert self.status is not None
        return self.status

    def send(self, number: int) -> bool:
        """Send a signal; False if the process had ended."""
        if self.poll() is not None:
            return False
        os.kill(self.pid, number)
        return True

    def session(self) -> dict[int, str]:
        """Other processes of its session that are alive: pid -> command."""
        return {pid: command for pid, command in _processes(self.pid).items() if pid != self.pid}

    def end(self) -> None:
        """Kill it and all of its session."""
        for pid in _processes(self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.status is None:
            _, status = os.waitpid(self.pid, 0)
            self.status = _shell(status)


def _shell(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _processes(session: int) -> dict[int, str]:
    """Processes of a session that are alive, and no zombies."""
    alive = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError, IndexError, ValueError):
                state, _, _, owner, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(owner) == session and state != "Z":
                    alive[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
    return alive


def forked(
    argv: list[str],
    folder: Path,
    *,
    hook: Callable[[], Any] | None = None,
    after: Callable[[], Any] | None = None,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
) -> Process:
    """Start `python -m mljax.main` as a fork of this process.

    Args:
      folder: of its output.
      hook: called in it first; it may change modules.
      after: called in it when the command has ended with status 0; what it returns is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    preload()
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return Process(pid, folder)
    status = 70
    try:
        _enter(folder, cwd, env or {})
        if hook is not None:
            hook()
        status = _run_main(argv)
        if status == 0 and after is not None:
            (folder / "after").write_text(json.dumps(after()))
    except BaseException:
        traceback.print_exc()
    finally:
        _leave(status)
    raise AssertionError


def started(argv: list[str], folder: Path, *, env: Mapping[str, str] | None = None) -> Process:
    """Start `python -m mljax.main` as a process of its own, and return when it begins to import mljax."""
    folder.mkdir(parents=True, exist_ok=True)
    reading, writing = os.pipe()
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        child = subprocess.Popen(
            [sys.executable, str(LAUNCH), str(writing), *argv], cwd=ROOT, env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL, stdout=out, stderr=err, pass_fds=(writing,), start_new_session=True,
        )  # fmt: skip
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)
    child.returncode = 0  # it is waited for here, not by subprocess
    return Process(child.pid, folder)


def preload() -> None:
    """Import what a training run imports, once."""
    if "mljax.train" in sys.modules and getattr(preload, "done", False):
        return
    from mljax.cache import setup_jax

    setup_jax()
    names = ("main", "train", "run", "evaluate", "backbones.small", "data.scenes", "data.table", "pipeline.loader")
    systems = ("baseline", "cmsg", "sst", "role")
    for name in (*names, *(f"systems.{system}" for system in systems)):
        importlib.import_module(f"mljax.{name}")
    for name in ("orbax.checkpoint", "grain", "clu.parameter_overview", "tensorboardX"):
        importlib.import_module(name)
    from jax._src import xla_bridge

    assert not xla_bridge.backends_are_initialized(), "a worker that forks must not touch a device"
    gc.freeze()
    preload.done = True


def _enter(folder: Path, cwd: Path, env: Mapping[str, str]) -> None:
    os.setsid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # with the worker, should that be killed
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for name, number in (("out", 1), ("err", 2)):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, number)
        os.close(file)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", buffering=1) for n in (1, 2))
    os.environ.update(env)
    os.chdir(cwd)


def _run_main(argv: list[str]) -> int:
    """`python -m mljax.main ARGV` in this process -> its exit status."""
    from mljax import interrupt

    sys.argv, sys.orig_argv = ["-m", *argv], [sys.executable, "-m", "mljax.main", *argv]
    interrupt._pid = os.getpid()  # of the fork, whose signals and exit are those of the command
    interrupt.install()
    sys.modules.pop("mljax.main", None)
    try:
        runpy.run_module("mljax.main", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, int) or end.code is None:
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # as the interpreter does where nothing catches it
        traceback.print_exc()
        return 130
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _leave(status: int) -> None:
    """End as the interpreter does: threads, then exit functions."""
    try:
        getattr(threading, "_shutdown")()  # noqa: B009
        getattr(atexit, "_run_exitfuncs")()  # noqa: B009
        sys.stdout.flush()
        sys.stderr.flush()
    except KeyboardInterrupt:
        traceback.print_exc()
    finally:
        os._exit(status)


# --- changing what a fork runs ----------------------------------------------------------------------------------------


def before(place: str, nth: int, action: Callable[[], Any]) -> None:
    """Let the n-th call of "module:Class.name" start with an action."""
    _wrap(place, nth, lambda call: (action(), call())[1])


def behind(place: str, nth: int, action: Callable[[], Any]) -> None:
    """Let the n-th call of "module:Class.name" end with an action."""

    def run(call: Callable[[], Any]) -> Any:
        result = call()
        action()
        return result

    _wrap(place, nth, run)


def _wrap(place: str, nth: int, run: Callable[[Callable[[], Any]], Any]) -> None:
    module, _, path = place.partition(":")
    owner: Any = importlib.import_module(module)
    *classes, name = path.split(".")
    for part in classes:
        owner = getattr(owner, part)
    function, calls = getattr(owner, name), [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == nth:
            return run(lambda: function(*args, **kwargs))
        return function(*args, **kwargs)

    setattr(owner, name, wrapped)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def ending(process: Process) -> Iterator[Process]:
    """Nothing of a process is left when the block is."""
    try:
        yield process
    finally:
        process.end()
