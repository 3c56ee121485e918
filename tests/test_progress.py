"""What a run logs and shows: metrics, events, the line of training, the table of a model."""

import io
import json
import struct
import time

import numpy as np
import pytest
from rich.console import Console
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

import toy
from mljax import parallel, train
from mljax.errors import UserError
from mljax.rundir import progress
from mljax.rundir.progress import Meter, Writer
from own_data import steps_logged

pytestmark = pytest.mark.usefixtures("surroundings")


def events(workdir):
    found = []
    for path in sorted(workdir.glob("events.out.tfevents.*")):
        data, i = path.read_bytes(), 0
        while i < len(data):
            (length,) = struct.unpack("<Q", data[i : i + 8])
            event = event_pb2.Event.FromString(data[i + 12 : i + 12 + length])
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            i += 16 + length
    return found


def test_metrics_after_the_restored_step_are_measured_again_not_twice(tmp_path):
    with Writer(tmp_path) as writer:
        for step in range(1, 5):
            writer.scalars(step, {"loss": 1 / step, "mAP": None}, 0)
        for step in (1, 2, 3):
            writer.scalars(step, {"loss": 0.5}, 1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "sta')  # killed while it wrote
    with Writer(tmp_path) as writer:
        writer.resume(1, 2)
        assert steps_logged(tmp_path) == [(0, 1), (0, 2), (0, 3), (0, 4), (1, 1), (1, 2)]
        writer.scalars(3, {"loss": 0.25}, 1)
    assert steps_logged(tmp_path)[-1] == (1, 3)
    assert events(tmp_path) == [
        (1, "loss", 1.0), (2, "loss", 0.5), (3, "loss", pytest.approx(1 / 3)), (4, "loss", 0.25),
        (1, "stage1/loss", 0.5), (2, "stage1/loss", 0.5), (3, "stage1/loss", 0.25),
    ]  # fmt: skip
    before = (tmp_path / "metrics.jsonl").read_bytes()
    Writer(tmp_path).resume(1, 3)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    Writer(tmp_path).resume(0, 0)
    assert steps_logged(tmp_path) == [] and events(tmp_path) == []


def test_events_have_the_checksums_of_tensorboard(tmp_path):
    with Writer(tmp_path) as writer:
        writer.scalars(1, {"loss": 1.0}, 0)
    (path,) = tmp_path.glob("events*")
    data = path.read_bytes()
    assert int.from_bytes(data[8:12], "little") == masked_crc32c(data[:8])


def test_the_line_of_training(tmp_path, monkeypatch):
    """Compiling is not speed; a terminal gets its cursor back when something goes wrong."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    writer = Writer(tmp_path)
    writer.console, writer.live = Console(file=io.StringIO(), width=120), False
    with writer, Meter(writer, "", 0, 1001, 32) as meter:
        now[0] = 60.0
        meter.compiled(1)
        meter.update([(1, {"loss": 0.7})], 0)
        now[0] = 80.0
        meter.update([(101, {"loss": 0.123456})], 0)
        meter.evaluated({"raw": {"mAP": None, "OF1": 50.0}}, 100.0)
    assert writer.console.file.getvalue().splitlines() == [
        "compiled in 60 s",
        "step    1/1001  loss 0.7000",
        "step  101/1001  loss 0.1235  160 images/s  3 min 00 s left",
        "step  101/1001  raw mAP - OF1 50.00  evaluated in 1 min 40 s",
    ]
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert "images_per_s" not in first and second["images_per_s"] == 160.0
    writer = Writer(tmp_path)
    writer.console, writer.live = Console(file=io.StringIO(), width=120, force_terminal=True), True
    with pytest.raises(ZeroDivisionError), writer, Meter(writer, "stage 1/2 ", 0, 9, 32):
        raise ZeroDivisionError
    assert (
        writer.console.file.getvalue().endswith("\x1b[?25h") and "stage 1/2 training" in writer.console.file.getvalue()
    )


def test_the_table_of_a_model_is_by_module():
    params = {"backbone": {"a": np.zeros((1000, 300), np.float32), "b": np.zeros(7, np.float32)}, "head": np.zeros(5)}
    assert progress.by_module(params).splitlines() == [
        "module    parameters  trained        MB  arrays",
        "backbone     300,007  300,007      1.20       2",
        "head               5        5      0.00       1",
        "in all       300,012  300,012      1.20       3",
    ]
    assert progress.by_module(params, {"backbone/a", "backbone/b"}).splitlines()[1:] == [
        "backbone     300,007   frozen      1.20       2",
        "head               5        5      0.00       1",
        "in all       300,012        5      1.20       3",
    ]
    assert progress.by_module(params, {"backbone/a"}).splitlines()[1].split() == [
        "backbone",
        "300,007",
        "7",
        "1.20",
        "2",
    ]
    assert [progress.duration(s) for s in (8.4, 99, 125, 11220)] == ["8 s", "99 s", "2 min 05 s", "3 h 07 min"]


@pytest.mark.parametrize(
    ("changes", "trained"),
    [
        ({"backbone__frozen": "all"}, {"backbone": "frozen"}),
        ({"optim__groups": (("^backbone/", {"frozen": True}),)}, {"backbone": "frozen"}),
        ({"backbone__frozen": "stem"}, {"backbone": "fewer"}),
        ({}, {}),
    ],
)
def test_a_run_begins_with_what_is_trained(tmp_path, monkeypatch, capsys, changes, trained):
    """What the backbone keeps frozen, and what the config's groups do."""
    monkeypatch.setattr(parallel, "compile_step", lambda *_: (_ for _ in ()).throw(UserError("here it ends")))
    with pytest.raises(UserError, match="here it ends"):
        train.fit(toy.small(**changes), tmp_path / "run")
    lines = capsys.readouterr().err.splitlines()
    head = next(
        i for i, line in enumerate(lines) if line.split() == ["module", "parameters", "trained", "MB", "arrays"]
    )
    rows = {}
    for line in lines[head + 1 :]:
        name, count, of_these, *_ = line.rsplit(maxsplit=4)
        rows[name] = (int(count.replace(",", "")), 0 if of_these == "frozen" else int(of_these.replace(",", "")))
    whole = rows.pop("in all")
    assert whole == tuple(map(sum, zip(*rows.values()))) and set(rows) > {"backbone"}
    for name, (count, of_these) in rows.items():
        told = trained.get(name)
        assert of_these == (0 if told == "frozen" else of_these if told else count) and (
            told != "fewer" or of_these < count
        )
