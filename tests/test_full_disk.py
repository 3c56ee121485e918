"""Nothing that was saved is lost when the disk is full."""

import errno
import os
import resource

import numpy as np
import pytest

import toy
from mljax import rundir, train
from mljax.errors import UserError
from mljax.rundir.progress import Writer
from mljax.train.trainer import Trainer
from own_data import report, saved, steps_logged

pytestmark = pytest.mark.usefixtures("surroundings")


def test_disk_full_keeps_the_last_checkpoint(tmp_path, monkeypatch, finished_run):
    """The system refuses to write files above a limit, from the second checkpoint on; then there is room again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    save, count = Trainer._save, []

    def limited(self, *args, **options):
        count.append(1)
        if len(count) == 2:
            self.flush()
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
        return save(self, *args, **options)

    found = toy.small()
    try:
        with monkeypatch.context() as patch, pytest.raises(UserError, match=r"cannot be written .*File too large") as e:
            patch.setattr(Trainer, "_save", limited)
            train.fit(found, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "older checkpoints are whole" in str(e.value) or "metrics" in str(e.value).lower()
    assert saved(tmp_path / "run") == [3]
    train.fit(found, tmp_path / "run")
    assert steps_logged(tmp_path / "run") == [(0, step) for step in range(1, 10)]
    assert report(tmp_path / "run") == report(finished_run)


def test_files_of_a_run_on_a_full_disk(tmp_path, monkeypatch, finished_run):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(UserError, match=r"meta.npz cannot be written \(No space left"):
        rundir.save_meta(tmp_path, rundir.load_meta(finished_run), {})
    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(UserError, match=r"config.json cannot be written \(No space left"):
        rundir.open_run(tmp_path / "run", toy.small())
    assert not list((tmp_path / "run").iterdir())
    with pytest.raises(UserError, match=r"Metrics cannot be written to"), Writer(tmp_path) as writer:
        monkeypatch.setattr("pathlib.Path.open", full)
        writer.scalars(1, {"loss": 1.0}, 0)
