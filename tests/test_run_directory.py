"""Run directories: one writer, files that are what was saved or refused, data that changed, paths and permissions."""

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import numpy as np
import pytest

import toy
from mljax import predict, rundir, train
from mljax.config.reading import read_config
from mljax.errors import UserError
from mljax.rundir import manifest, measurements
from mljax.rundir.checkpoint import Checkpoints
from mljax.rundir.progress import Writer
from mljax.types import Meta
from toy import golden_file

# One run, one writer


def test_a_second_writer_is_told_who_the_first_is(tmp_path):
    with rundir.locked(tmp_path):
        with pytest.raises(UserError) as error, rundir.locked(tmp_path):
            pass
        assert f"{tmp_path} is in use by process {os.getpid()} on {socket.gethostname()} since 20" in str(error.value)
        assert "wait until that run ends, stop it, or choose another --workdir" in str(error.value)
    assert not list(tmp_path.iterdir())
    with rundir.locked(tmp_path):
        pass


@pytest.mark.parametrize("left", ["", "{", '{"host": "gone", "pid": 1, "since": "2020"}'])
def test_what_a_dead_process_left_of_a_lock_does_not_count(tmp_path, left):
    (tmp_path / ".lock").write_text(left)
    with rundir.locked(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_a_lock_ends_with_its_process_not_with_a_forked_child(tmp_path):
    """The holder forks a child, and is killed; the child lives on."""
    code = """
        import os, sys, time
        from pathlib import Path
        from mljax.rundir.lock import locked
        with locked(Path(sys.argv[1])):
            child = os.fork()
            if child == 0:
                print(os.getpid(), flush=True)
                time.sleep(60)
                os._exit(0)
            time.sleep(60)
    """
    env = {**os.environ, "PYTHONPATH": str(toy.ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        with pytest.raises(UserError, match=f"in use by process {process.pid} on"), rundir.locked(tmp_path):
            pass
        process.kill()
        process.wait()
        os.kill(child, 0)  # it is alive
        with rundir.locked(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()


def test_a_refused_writer_leaves_a_running_one_alone(tmp_path):
    config = toy.config("baseline")
    with rundir.opened(tmp_path / "run", config):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError, match="is in use by"), rundir.opened(tmp_path / "run", config):
            pass
        assert sorted(tmp_path.rglob("*")) == before
        assert rundir.load_config(tmp_path / "run").optim.lr == config.optim.lr  # reading needs no lock


# Digests


@pytest.fixture
def files(tmp_path):
    """The small files of a run, and what reading each gives."""
    labels = np.eye(3, dtype=np.uint8)
    meta = Meta(name="own", classes=("cat", "dog", "owl"), labels=labels, observed=labels, vectors=np.ones((3, 2)))
    rundir.open_run(tmp_path, toy.config("baseline"))
    rundir.save_meta(tmp_path, meta, {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "weights": None})
    rundir.write_json(tmp_path / "report.json", {"metrics": {"mAP": 81.25, "OF1": float("nan")}, "left_out": ()})
    rundir.write_arrays(tmp_path / "scores.npz", scores=np.ones((2, 3), np.float32), ids=np.array(["a", "b"]))
    return tmp_path


READ = {
    "config.json": lambda path: rundir.load_config(path.parent).to_json(),
    "preprocessing.json": lambda path: json.dumps(rundir.load_preprocessing(path.parent)),
    "report.json": lambda path: json.dumps(rundir.read_json(path)),
    "meta.npz": lambda path: repr(rundir.load_meta(path.parent)),
    "scores.npz": lambda path: repr(rundir.read_arrays(path)),
}


@pytest.mark.parametrize("name", READ)
def test_a_flipped_bit_is_refused_or_changes_nothing(files, name):
    path, rng = files / name, np.random.default_rng(0)
    whole, expected, refused = path.read_bytes(), READ[name](path), 0
    for place in rng.choice(len(whole) * 8, min(len(whole) * 8, 400), replace=False):
        data = bytearray(whole)
        data[place // 8] ^= 1 << (place % 8)
        path.write_bytes(data)
        try:
            assert READ[name](path) == expected, (place, bytes(data))
        except UserError as error:
            refused += 1
            assert name in str(error) and "\n" not in str(error)
    assert refused > 200
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=f"{name} is damaged"):
            READ[name](path)


def test_a_changed_digit_says_what_to_do(files):
    path = files / "preprocessing.json"
    path.write_text(path.read_text().replace("0.229", "0.228"))
    with pytest.raises(UserError, match=r"preprocessing.json is damaged \(its content is not what was saved\); run"):
        rundir.load_preprocessing(files)
    path = files / "config.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(UserError, match=r"config.json is damaged \(.*\); restore it from a backup, or choose another"):
        rundir.load_config(files)


def test_a_json_file_may_be_indented_anew(files):
    path = files / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    assert rundir.read_json(path)["metrics"]["mAP"] == 81.25


def test_a_run_of_the_released_version_is_read(tmp_path):
    with tarfile.open(golden_file("released_run.tar.xz")) as archive:
        archive.extractall(tmp_path, filter="data")
    run = tmp_path / "released"
    rundir.check_same(run, read_config("configs/baseline.py:smoke"))
    assert len(rundir.load_meta(run).classes) == 20 and rundir.load_preprocessing(run)["std"]
    assert rundir.unsound(run) == [] and rundir.read_arrays(run / "scores.npz")["scores"].shape == (24, 20)
    assert [line["step"] for line in rundir.read_metrics(run) if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_a_damaged_line_of_metrics_is_set_aside_and_said(tmp_path, capsys, caplog):
    with Writer(tmp_path) as writer:
        for step in range(1, 5):
            writer.scalars(step, {"loss": 1 / step}, 0)
    path = tmp_path / measurements.NAME
    lines = path.read_text().splitlines(keepends=True)
    assert {**rundir.read_metrics(tmp_path)[1], "digest": json.loads(lines[1])["digest"]} == json.loads(lines[1])
    assert not caplog.records
    damaged = lines[1].replace("0.5", "0.7")
    path.write_text(lines[0] + damaged + lines[2] + lines[3] + '{"step": 5, "lo')
    assert [line["step"] for line in rundir.read_metrics(tmp_path)] == [1, 3, 4]
    assert "metrics.jsonl has 1 damaged line; left out" in caplog.text
    with Writer(tmp_path) as writer:
        writer.resume(0, 3)
    assert path.read_text() == lines[0] + lines[2]
    assert (tmp_path / measurements.DAMAGED).read_text() == damaged
    assert "metrics.jsonl has 1 damaged line; moved to metrics.damaged.jsonl" in capsys.readouterr().err


# Paths


@pytest.mark.parametrize("name, said", [("a\0b", "contains a NUL"), ("x" * 300, "too long"), ("y/" * 2000, "too long")])
def test_paths_that_no_system_takes(tmp_path, name, said):
    workdir = Path(f"{tmp_path}/{name}")
    config = toy.config("baseline")
    calls = (
        lambda: predict.load(workdir),
        lambda: rundir.open_run(workdir, config),
        lambda: train.fit(config, workdir),
    )
    for call in calls:
        with pytest.raises(UserError, match=said) as error:
            call()
        assert "\0" not in str(error.value) and len(str(error.value)) < 300
    assert not list(tmp_path.iterdir())


# Whole runs


def last_state(workdir):
    with Checkpoints(workdir / "checkpoints" / "0", read_only=True) as checkpoints:
        state = checkpoints.restore_params("last")
        return checkpoints.restored, toy.flat({key: state[key] for key in ("params", "variables")})


def test_a_run_mends_itself(tmp_path, caplog):
    """Under a umask that allows everything: nothing is writable by everybody. Then what rots is noticed."""
    run, config, umask = tmp_path / "new" / "run", toy.config("baseline", optim__epochs=3, eval__every=1), os.umask(0)
    try:
        train.fit(config, run)
    finally:
        os.umask(umask)
    assert not [p for p in (run.parent, *run.parent.rglob("*")) if p.stat().st_mode & stat.S_IWOTH]
    assert not (run / ".lock").exists() and os.umask(umask) == umask
    step, state = last_state(run)
    report, scores = (run / "report.json").read_text(), rundir.read_arrays(run / "scores.npz")["scores"]

    path = run / "preprocessing.json"
    path.write_text(path.read_text().replace('"std": [\n    0.', '"std": [\n    1.'))
    with pytest.raises(UserError, match="preprocessing.json is damaged .* run the training command again"):
        predict.load(run)
    (run / "scores.npz").write_bytes(b"x")
    train.fit(config, run)
    assert f"scores.npz, preprocessing.json in {run} is damaged or missing; made again" in caplog.text
    assert predict.load(run).step == step
    assert (run / "report.json").read_text() == report and rundir.unsound(run) == []
    assert (rundir.read_arrays(run / "scores.npz")["scores"] == scores).all()

    caplog.clear()
    (run / "report.json").unlink()
    shutil.rmtree(run / "checkpoints" / "0" / str(step) / "training")
    train.fit(config, run)
    assert f"it is set aside as damaged-{step}, and step " in caplog.text
    again, other = last_state(run)
    assert again == step and all((other[key] == value).all() for key, value in state.items())
    assert json.loads((run / "report.json").read_text())["metrics"] == json.loads(report)["metrics"]


def test_a_state_that_is_not_finite_ends_a_run(tmp_path, monkeypatch):
    poison = lambda leaves: "variables/memory/mean" if leaves["step"] == 6 else None  # noqa: E731
    monkeypatch.setattr(manifest, "not_finite", poison)
    said = r"^variables/memory/mean is not finite after step 6; training stopped and keeps the checkpoint of step 3\."
    with pytest.raises(train.Diverged, match=said):
        train.fit(toy.config("baseline", optim__epochs=3, eval__every=1), tmp_path / "run")
    assert last_state(tmp_path / "run")[0] == 3
