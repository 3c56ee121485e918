"""Ctrl-C and SIGTERM: the step is finished, the state is saved, and the status says so, at any moment of a command."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import toy
from mljax import interrupt, main, scoring, train

pytestmark = pytest.mark.usefixtures("surroundings")

SMOKE = "--config=configs/cmsg.py:smoke"


def test_ctrl_c_asks_and_then_insists(monkeypatch, capfd):
    now, before = [100.0], signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with pytest.raises(interrupt.Stop, match="the last checkpoint is whole"), interrupt.interruptible() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert len(signals.times) == 1
        assert "as soon as it is saved; press Ctrl-C again to leave at once" in capfd.readouterr().err
        os.kill(os.getpid(), signal.SIGTERM)  # the same one, passed on by a launcher
        assert len(signals.times) == 1
        now[0] += 5
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_ends_the_command_with_130(shell, tmp_path, monkeypatch):
    def stopping(*_):
        raise interrupt.Stop("stopped at step 3 of 9 and saved; run the same command to go on")

    monkeypatch.setattr(train, "fit", stopping)
    status, lines = shell(main, SMOKE, f"--workdir={tmp_path / 'run'}")
    assert status == 130 and lines == ["mljax: stopped at step 3 of 9 and saved; run the same command to go on"]

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "fit", interrupted)
    assert shell(main, SMOKE, f"--workdir={tmp_path / 'run'}") == (130, ["mljax: stopped"])


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_evaluation_stops_between_batches_and_its_state_is_saved(tmp_path, monkeypatch, number, status):
    config, workdir = toy.small(), tmp_path / "run"
    expected = train.fit(config, tmp_path / "undisturbed")
    delayed = scoring.delayed

    def signalled(items, depth=2):
        for count, item in enumerate(delayed(items, depth)):
            if count == 0:
                os.kill(os.getpid(), number)
            yield item

    monkeypatch.setattr(scoring, "delayed", signalled)
    with pytest.raises(interrupt.Stop, match="stopped at step 3 of 9 and saved") as stop:
        train.fit(config, workdir)
    assert stop.value.status == status
    monkeypatch.setattr(scoring, "delayed", delayed)
    assert train.fit(config, workdir)["metrics"] == expected["metrics"]
    lines = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert lines == sorted(lines) and max(lines) == 9


# --- processes --------------------------------------------------------------------------------------------------------

# Runs a module as `python -m` does, after some lines that change it.
CHANGED = """
import sys, runpy, os
sys.argv[0], sys.orig_argv = "-m", [sys.executable, "-m", "mljax.main"]
import mljax
{lines}
runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
"""


def started(tmp_path, *flags, module="mljax.main", lines=""):
    """A command as a process; with `lines`, something in it is changed."""
    words = ["-c", CHANGED.format(lines=lines, module=module)] if lines else ["-m", module]
    environment = os.environ | {"TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": str(toy.ROOT)}
    environment |= {"JAX_COMPILATION_CACHE_DIR": os.path.join("/tmp", "mljax-test-cache")}
    (tmp_path / "tmp").mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, *words, *map(str, flags)], cwd=toy.ROOT, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def training(tmp_path, *flags, **options):
    run = ("--config=configs/baseline.py:smoke", f"--workdir={tmp_path / 'run'}", "--config.log_every=1")
    return started(tmp_path, *run, "--config.backbone.widths=4,4,4,4", *flags, **options)


def ended(process, number, within=20.0):
    """The lines of stderr of a process that is signalled; checks how it ends."""
    process.send_signal(number)
    began = time.monotonic()
    _, text = process.communicate(timeout=120)
    assert time.monotonic() - began < within
    assert process.returncode == 128 + number, text
    assert "Traceback" not in text and "Exception" not in text and "Warning" not in text, text
    return text.strip().splitlines()


def wait_for(process, text):
    for line in process.stderr:
        if text in line:
            return
    raise AssertionError(f"it ended without {text!r}")


def leftovers(tmp_path):
    """Temporary files, and what a run leaves in its directory besides what it keeps."""
    run = tmp_path / "run"
    names = [p.name for p in run.rglob("*")] if run.exists() else []
    return [*os.listdir(tmp_path / "tmp"), *(n for n in names if n.startswith(".") or "tmp" in n)]


# Signals itself when a module is imported.
WHEN_IMPORTED = """
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.slow
@pytest.mark.parametrize("module", ["main", "evaluate", "predict", "data", "weights", "analyze", "bench", "sweep"])
def test_while_it_starts(tmp_path, module):
    flags = [f"--workdir={tmp_path / 'run'}", "--config=configs/cmsg.py:smoke"]
    numbers = (signal.SIGTERM, signal.SIGINT) if module == "main" else (signal.SIGTERM,)
    for number, name in zip(numbers, ("jax", "mljax.errors")):
        lines = WHEN_IMPORTED.format(name=name if module in ("main", "predict") else "mljax.cache", number=int(number))
        process = started(tmp_path, *flags, module=f"mljax.{module}", lines=lines)
        _, text = process.communicate(timeout=60)
        assert (process.returncode, text) == (128 + number, "mljax: stopped\n")
        assert not (tmp_path / "run").exists() and not leftovers(tmp_path)


def test_from_the_first_line_on(tmp_path):
    process = started(tmp_path, "--list")
    while process.poll() is None and not handles(process.pid):
        time.sleep(0.001)
    assert ended(process, signal.SIGTERM, within=5) == ["mljax: stopped"]


def handles(pid):
    """Whether a process has a handler of SIGTERM."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("SigCgt:")[2].split()[0], 16) >> (signal.SIGTERM - 1) & 1


@pytest.mark.slow
def test_in_a_compilation_and_before_anything_is_trained(tmp_path):
    """The main thread sits in a call that no signal ends: of C, without the interpreter."""
    stuck = "import ctypes, mljax.train.trainer as t\nt.build = lambda *a, **k: ctypes.CDLL(None).usleep(60_000_000)"
    process = training(tmp_path, lines=stuck)
    wait_for(process, "an epoch")
    time.sleep(1)
    assert ended(process, signal.SIGTERM, within=10)[-1] == "mljax: stopped"
    assert not (tmp_path / "run").exists() and not leftovers(tmp_path)


# An evaluation that hangs in C with a state that is not saved, where the file `hang` is.
HANGING = """
import ctypes, mljax.train.evaluation as e
plain = e.evaluate
def evaluate(state, *rest):
    if int(state.step) == 6 and os.path.exists({path!r}):
        print("hangs", file=sys.stderr, flush=True)
        libc = ctypes.CDLL(None)
        while True:
            libc.sleep(600)
    return plain(state, *rest)
e.evaluate = evaluate
"""


@pytest.mark.slow
def test_in_an_evaluation_that_never_asks(tmp_path):
    (tmp_path / "hang").touch()
    flags = ("--config.optim.epochs=3",)
    process = training(tmp_path, *flags, lines=HANGING.format(path=str(tmp_path / "hang")))
    wait_for(process, "hangs")
    ended(process, signal.SIGTERM)
    assert not leftovers(tmp_path)
    process = training(tmp_path, *flags)
    wait_for(process, "resumed at step 6")
    process.communicate(timeout=120)
    assert process.returncode == 0 and (tmp_path / "run" / "report.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_while_it_trains_and_then_goes_on(tmp_path, workers):
    flags = ("--config.optim.epochs=40", "--config.eval.every=20", f"--config.input.workers={workers}")
    process = training(tmp_path, *flags)
    wait_for(process, "step ")
    lines = ended(process, signal.SIGINT)
    assert "and saved; run the same command to go on" in lines[-1]
    process = training(tmp_path, *flags)
    wait_for(process, "resumed at step")
    assert "mljax: stopped" in ended(process, signal.SIGTERM)[-1] and not leftovers(tmp_path)


@pytest.mark.slow
def test_a_second_signal_ends_at_once(tmp_path):
    (tmp_path / "hang").touch()
    process = training(tmp_path, "--config.optim.epochs=3", lines=HANGING.format(path=str(tmp_path / "hang")))
    wait_for(process, "hangs")
    threading.Timer(interrupt.ECHO + 0.5, process.send_signal, [signal.SIGTERM]).start()
    began = time.monotonic()
    assert ended(process, signal.SIGINT)[-1] == "mljax: stopped"
    assert time.monotonic() - began < interrupt.GRACE


@pytest.mark.slow
def test_a_sweep_ends_its_runs(tmp_path):
    flags = ("--config=configs/baseline.py:smoke", f"--workdir={tmp_path / 'all'}", "--config.optim.epochs=500")
    process = started(tmp_path, *flags, module="mljax.sweep")
    wait_for(process, "an epoch")
    tasks = Path(f"/proc/{process.pid}/task").iterdir()
    runs = {int(pid) for task in tasks for pid in (task / "children").read_text().split()}
    assert runs
    ended(process, signal.SIGTERM, within=60)
    assert not any(Path(f"/proc/{pid}").exists() for pid in runs)
