"""Ctrl-C and SIGTERM: the step is finished, the state is saved, and the status says so."""

import os
import signal
import time

import pytest

from mljax import interrupt, main, train

pytestmark = pytest.mark.usefixtures("surroundings")

SMOKE = "--config=configs/cmsg.py:smoke"


def test_ctrl_c_asks_and_then_insists(monkeypatch, capfd):
    now, before = [100.0], signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with pytest.raises(interrupt.Stop, match="the last checkpoint is whole"), interrupt.interruptible() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert len(signals) == 1
        assert "as soon as it is saved; press Ctrl-C again to leave at once" in capfd.readouterr().err
        os.kill(os.getpid(), signal.SIGINT)  # the same one, passed on by a launcher
        now[0] += 5
        os.kill(os.getpid(), signal.SIGTERM)  # a cluster that repeats itself
        assert len(signals) == 1
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
