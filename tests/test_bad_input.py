"""What a user gets wrong: one sentence that says what, where and what to do, exit status 2, and nothing is lost."""

import errno
import io
import json
import logging
import os
import resource
import shutil
import signal
import struct
import time

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

import toy
from mljax import evaluate, interrupt, main, predict, rundir, scoring, train
from mljax.data import source
from mljax.errors import UserError
from mljax.pipeline import feature_cache, loader
from mljax.rundir import progress
from mljax.rundir.checkpoint import Checkpoints
from mljax.rundir.progress import Meter, Writer


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path_factory):
    """A cache folder of the test's own, and what `guarded` sets put back."""
    monkeypatch.setenv("MLJAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    for name in ("DIR", "MAX_SIZE"):
        monkeypatch.setenv(f"JAX_COMPILATION_CACHE_{name}", os.environ.get(f"JAX_COMPILATION_CACHE_{name}", "0"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")
    yield
    log = logging.getLogger("mljax")
    log.handlers, log.propagate = [], True


@pytest.fixture
def told(capsys):
    """Runs a command as a shell does: its exit status, and the lines of stderr."""

    def run(command, *argv):
        capsys.readouterr()
        status = main.guarded(lambda: command.main([str(word) for word in argv]))
        lines = capsys.readouterr().err.strip().splitlines()
        assert not any("Traceback" in line for line in lines)
        return status, lines

    return run


@pytest.fixture
def refused(told):
    """Exit status 2 and one sentence, the last line of stderr."""

    def run(command, *argv):
        status, lines = told(command, *argv)
        assert status == 2, lines
        assert lines[-1].startswith("mljax: ") and sum(line.startswith("mljax: ") for line in lines) == 1, lines
        return lines[-1].removeprefix("mljax: ")

    return run


def small(**changes):
    """A config whose steps compile in seconds."""
    found = toy.config("baseline", optim__epochs=3, **changes)
    found.backbone.widths = (4, 4, 4, 4)
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained") / "run"
    train.fit(small(), workdir)
    return workdir


@pytest.fixture
def run(trained, tmp_path):
    """A copy of a finished run, to be spoiled."""
    return shutil.copytree(trained, tmp_path / "run")


SMOKE = "--config=configs/cmsg.py:smoke"


# --- work folders ----------------------------------------------------------------------------------------------------


def test_workdir_of_another_config(refused, run):
    before = (run / "config.json").read_bytes()
    said = refused(main, "--config=configs/baseline.py:smoke", f"--workdir={run}", "--config.optim.lr=0.5")
    assert "holds a run of another config" in said and "optim.lr: 0.003 -> 0.5" in said
    assert (run / "config.json").read_bytes() == before


def test_workdirs_that_are_none(refused, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    assert "file is a file" in refused(main, SMOKE, f"--workdir={tmp_path / 'file'}")
    assert "cannot be made (Not a directory)" in refused(main, SMOKE, f"--workdir={tmp_path / 'file' / 'x'}")
    assert "not empty and holds no run" in refused(main, SMOKE, f"--workdir={tmp_path / 'mine'}")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_cache_folder_that_cannot_be_made(refused, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("MLJAX_CACHE", str(tmp_path / "file" / "cache"))
    said = refused(main, SMOKE, f"--workdir={tmp_path / 'run'}")
    assert "cache cannot be used (Not a directory); set MLJAX_CACHE" in said


def test_a_run_that_cannot_predict(refused, tmp_path, run):
    photo = tmp_path / "photo.png"
    Image.new("RGB", (9, 9)).save(photo)

    def predicting(workdir):
        return refused(predict, photo, f"--workdir={workdir}")

    assert "There is no folder" in predicting(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no config.json; give the --workdir of a run" in predicting(tmp_path / "empty")
    rundir.open_run(tmp_path / "started", small())
    assert "holds no checkpoint yet; train it first" in predicting(tmp_path / "started")
    (run / "meta.npz").write_bytes((run / "meta.npz").read_bytes()[:100])
    assert "meta.npz is damaged" in predicting(run)
    (run / "preprocessing.json").write_text('{"mean": [')
    (run / "meta.npz").unlink()
    assert "meta.npz" in predicting(run)
    (run / "config.json").write_text("{")
    assert "config.json is damaged" in predicting(run)
    assert "config.json is damaged" in refused(main, SMOKE, f"--workdir={run}")


def test_a_damaged_report_is_made_again(told, run):
    good = json.loads((run / "report.json").read_text())
    (run / "report.json").write_text('{"split": "sc')
    assert train.fit(small(), run)["metrics"] == good["metrics"]
    assert json.loads((run / "report.json").read_text()) == good


# --- prediction and evaluation ---------------------------------------------------------------------------------------


def photo(seed, size=(40, 30)):
    noise = np.random.default_rng(seed).integers(0, 255, (size[1] // 10, size[0] // 10, 3)).astype(np.uint8)
    return Image.fromarray(noise).resize(size)


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A folder of photos as people have them: eight of ten kinds can be read."""
    folder = tmp_path_factory.mktemp("odd")
    picture = photo(0)
    picture.save(folder / "good.jpg")
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    picture.convert("P").save(folder / "palette.png")
    picture.convert("L").save(folder / "grey.jpg")
    picture.convert("RGBA").save(folder / "rgba.png")
    Image.fromarray(np.linspace(0, 65535, 1200).reshape(30, 40).astype(np.uint16)).save(folder / "deep.png")
    picture.save(folder / "animated.gif", save_all=True, append_images=[photo(1), photo(2)])
    Image.new("RGB", (1, 1), "red").save(folder / "pixel.png")
    whole = (folder / "good.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    header = b"P4\n30000 30000\n"  # 900 million pixels, none of them there: refused before they are asked for
    (folder / "huge.png").write_bytes(header)
    (folder / "._good.jpg").write_bytes(b"of another system")
    return folder


def test_predict_reports_each_photo_and_goes_on(trained, odd, tmp_path, capsys):
    argv = [str(odd), f"--workdir={trained}", "--top=2", "--json", f"--overlay={tmp_path / 'maps'}"]
    assert predict.main(argv) == 1
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    read = {os.path.basename(line["image"]) for line in lines if len(line.get("labels", ())) == 2}
    good = {"good.jpg", "cmyk.jpg", "palette.png", "grey.jpg", "rgba.png", "deep.png", "animated.gif", "pixel.png"}
    assert read == good
    bad = {os.path.basename(line["image"]): line["error"] for line in lines if "error" in line}
    assert bad.keys() == {"truncated.jpg", "empty.jpg", "huge.png"}
    assert "is empty (0 bytes)" in bad["empty.jpg"] and "too large" in bad["huge.png"]
    assert "truncated" in bad["truncated.jpg"] and "3 of 11 photos could not be read" in err
    assert len(list((tmp_path / "maps").iterdir())) == 2 * len(good)


def test_photos_of_one_name_keep_their_overlays(trained, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        photo(3).save(tmp_path / folder / "x.jpg")
    assert predict.main([str(tmp_path / "a"), str(tmp_path / "b"), f"--workdir={trained}", "--top=1",
                         f"--overlay={tmp_path / 'maps'}"]) == 0  # fmt: skip
    assert len(list((tmp_path / "maps").iterdir())) == 2


def test_wrong_flags_of_predict_and_evaluate(refused, trained, odd, tmp_path):
    good, run = odd / "good.jpg", f"--workdir={trained}"
    assert "There is no file or folder" in refused(predict, tmp_path / "nowhere.jpg", run)
    (tmp_path / "none").mkdir()
    assert "holds no image" in refused(predict, tmp_path / "none", run)
    assert "did you mean '--threshold'" in refused(predict, good, run, "--treshold=0.3")
    assert "--threshold=3 is no probability" in refused(predict, good, run, "--threshold=3")
    assert "invalid float value: 'x'" in refused(predict, good, run, "--threshold=x")
    assert "--top=0 asks for no label" in refused(predict, good, run, "--top=0")
    assert "required: PHOTO_OR_FOLDER" in refused(predict, run)
    (tmp_path / "file").write_text("x")
    assert "cannot be written (File exists)" in refused(predict, good, run, f"--overlay={tmp_path / 'file'}")
    assert "required: --workdir" in refused(evaluate)
    assert "'more' is not expected here" in refused(evaluate, run, "more")
    assert "no split 'vl' (did you mean 'val'?)" in refused(evaluate, run, "--split=vl")
    assert "no definition 'envv'" in refused(evaluate, run, "--definition=envv")
    assert "The view '9x' is not" in refused(evaluate, run, "--views=9x")
    assert "kept no averaged parameters" in refused(evaluate, run, "--ema")
    assert "invalid choice: 'bst'" in refused(evaluate, run, "--checkpoint=bst")


# --- data ------------------------------------------------------------------------------------------------------------


def table(folder, rows, header="image,labels,split", count=8):
    folder.mkdir(exist_ok=True)
    for i in range(count):
        photo(i).save(folder / f"{i}.png")
    (folder / "labels.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder / "labels.csv"


ROWS = [f"{i}.png,{'cat' if i % 2 else 'cat|dog'},{'val' if i > 5 else 'train'}" for i in range(8)]


@pytest.mark.parametrize(
    ("rows", "header", "sentence"),
    [
        (ROWS, "image,label,split", "has no column 'labels' (did you mean 'label'?)"),
        ([*ROWS, "0.png,dog,train"], None, "names the image '0.png' twice, in lines 2 and 10"),
        ([*ROWS[:5], "5.png,Cat,train", *ROWS[6:]], None, "spells a label in two ways, 'Cat' (line 7) and 'cat'"),
        ([*ROWS[:7], "7.png,bird,val"], None, "has labels that no image of the split 'train' has: 'bird'"),
        ([*ROWS, "9.png,cat,train"], None, "1 are not there, first"),
        ([], None, "has no rows"),
    ],
)
def test_wrong_tables(refused, tmp_path, rows, header, sentence):
    file = table(tmp_path / "own", rows, header or "image,labels,split")
    argv = ["--config=configs/baseline.py:csv", f"--workdir={tmp_path / 'run'}", f"--config.data.file={file}"]
    assert sentence in refused(main, *argv, "--config.optim.batch_size=2")


def test_absent_data(refused, tmp_path, monkeypatch):
    argv = ["--config=configs/baseline.py:voc2007", f"--workdir={tmp_path / 'run'}"]
    monkeypatch.delenv("MLJAX_DATA", raising=False)
    assert "set 'root' in the data section or the environment variable MLJAX_DATA" in refused(main, *argv)
    monkeypatch.setenv("MLJAX_DATA", str(tmp_path / "nowhere"))
    assert "nowhere', which is not a folder" in refused(main, *argv)
    (tmp_path / "nowhere").mkdir()
    assert "There is no 'VOCdevkit/VOC2007' under" in refused(main, *argv)
    assert "set 'file' in the data section" in refused(main, "--config=configs/baseline.py:csv", *argv[1:])


def test_labels_without_vectors(refused, tmp_path, monkeypatch):
    file = table(tmp_path / "own", ROWS)
    np.savez(tmp_path / "vectors.npz", names=np.array(["cat"]), vectors=np.ones((1, 3), np.float32))
    argv = ["--config=configs/cmsg.py:csv", f"--workdir={tmp_path / 'run'}", f"--config.data.file={file}"]
    argv += ["--config.optim.batch_size=2"]
    said = refused(main, *argv, f"--config.vectors={tmp_path / 'vectors.npz'}")
    assert "has no vector for 'dog': give a vectors file" in said and "co-occurrence" in said

    def offline(folder):
        raise UserError("GloVe vectors could not be downloaded (offline): put glove.6B.300d.txt into the cache.")

    monkeypatch.setattr("mljax.data.glove.fetch", offline)
    monkeypatch.delenv("MLJAX_DATA", raising=False)
    said = refused(main, *argv)
    assert "could not be downloaded" in said and "runs with --config.vectors=none" in said
    said = refused(main, *argv, "--config.weights.name=/nowhere/x.pth", "--config.vectors=none")
    assert "/nowhere/x.pth is not there" in said


def own(folder, **changes):
    found = small(**changes)
    found.data = {"name": "csv", "file": str(folder / "labels.csv")}
    found.splits.eval = "val"
    found.vectors = "none"
    found.optim.batch_size = found.eval.batch_size = 16
    return found


def damage(path):
    path.write_bytes(path.read_bytes()[:45])


def test_classes_without_a_positive_are_named(tmp_path, capsys):
    found = own(table(tmp_path / "own", ROWS).parent)
    found.data.classes, found.optim.batch_size = ("dog", "cat", "unicorn"), 4
    train.Stage(found, tmp_path / "run", 0, 1, Writer(tmp_path))._sources()
    assert "has no image with 'unicorn': nothing is learnt of these" in capsys.readouterr().err


def test_one_class_and_images_that_cannot_be_read(tmp_path, capsys, caplog):
    """One to train on is skipped and named once; one to evaluate stops the run, which goes on when it is mended."""
    rows = [f"{i}.png,{'cat' if i % 2 else ''},{'val' if i > 99 else 'train'}" for i in range(108)]
    table(tmp_path / "own", rows, count=108)
    whole = (tmp_path / "own" / "105.png").read_bytes()
    damage(tmp_path / "own" / "7.png")
    damage(tmp_path / "own" / "105.png")
    with pytest.raises(UserError, match=r"image 105.png is truncated.*own/labels.csv val is evaluated"):
        train.fit(own(tmp_path / "own"), tmp_path / "run")
    assert [r.getMessage()[:44] for r in caplog.records] == ["skipped unreadable image 1: The image 7.png "]
    assert saved(tmp_path / "run") == [6]  # the epoch before it is kept
    (tmp_path / "own" / "105.png").write_bytes(whole)
    report = train.fit(own(tmp_path / "own"), tmp_path / "run")
    assert "resumed at step 6 of 18" in capsys.readouterr().err
    assert set(report["per_class_AP"]) == {"cat"} and report["step"] == 18


def saved(workdir):
    with Checkpoints(workdir / "checkpoints" / "0", keep_best_of="mAP", read_only=True) as checkpoints:
        return checkpoints.steps


def pictures(folder, count, bad=()):
    """A source of PNG files, some of them cut off."""
    folder.mkdir()
    paths = []
    for i in range(count):
        paths.append(folder / f"{i}.png")
        Image.new("RGB", (8, 8), (i, i, i)).save(paths[-1])
    for i in bad:
        damage(paths[i])
    labels = np.arange(count, dtype=np.uint8)[:, None] % 2
    ones = np.ones_like(labels)
    return source.Source(
        name="own train", classes=("odd",), ids=[p.name for p in paths], labels=labels, observed=ones, scored=ones,
        read=source.Files([str(p) for p in paths]), fingerprint=str(folder),
    )  # fmt: skip


def read_all(found, steps, **options):
    look = feature_cache.view("8")
    return list(loader.train_batches(found, look, batch_size=4, seed=0, start=0, steps=steps, **options))


def test_more_than_one_percent_unreadable_stops(tmp_path, caplog):
    batches = read_all(pictures(tmp_path / "few", 200, bad=[3, 150]), 50)
    assert len(batches) == 50 and len(caplog.records) == 2  # 1 %: skipped, each named
    assert {4, 151} <= {int(i) for batch in batches for i in batch["index"]}
    assert not {3, 150} & {int(i) for batch in batches for i in batch["index"]}
    with pytest.raises(UserError, match=r"3 of 200 training images cannot be read, more than 1%; the first: .*png"):
        read_all(pictures(tmp_path / "many", 200, bad=[3, 90, 150]), 50)


def test_cached_features_skip_what_training_skips(tmp_path, monkeypatch, caplog):
    """Rows of unreadable images are never in a batch; what is cached says so again; an evaluation refuses."""
    found = pictures(tmp_path / "own", 100, bad=[99])
    calls = []

    def encode(image):
        calls.append(len(image))
        return {"32": image[:, :1, :1, :1].astype(np.float32)}

    def endpoints(which, failures):
        looks = (feature_cache.view("8"),)
        return feature_cache.endpoints(which, looks, encode, key="k", batch_size=32, failures=failures)

    for _ in range(2):  # computed, then read
        failures = loader.Failures(100)
        maps = endpoints(found, failures)
        assert failures.rows == {99} and "99.png" in failures.found and maps["8"]["32"][99] == 0
    assert len(calls) == 4 and len(caplog.records) == 2
    batches = feature_cache.CachedBatches(found, maps, 50, 0, unreadable=failures.rows)
    chosen = np.concatenate([batches[step]["index"] for step in range(2)])
    assert sorted(chosen) == [0, *range(99)]  # the next readable one stands in, its labels and features with it
    step = batches[0]
    np.testing.assert_array_equal(step["endpoints"]["32"].ravel(), step["index"])
    np.testing.assert_array_equal(step["labels"].ravel(), step["index"] % 2)
    with pytest.raises(UserError, match=r"99.png is truncated.*must be complete"):
        endpoints(found, None)
    endpoints(found.subset(np.arange(50), "[:50]"), None)  # which does not hold it
    cache = feature_cache.cache_dir() / "features"
    (entry,) = [f for f in cache.iterdir() if (f / "32.npy").is_file()]
    (entry / "32.npy").write_bytes(b"damaged")
    endpoints(found, loader.Failures(100))
    assert len(calls) == 8  # computed anew

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"feature cache in .* cannot be written \(No space left"):
        endpoints(pictures(tmp_path / "other", 8), None)
    assert not list(cache.glob("*.partial"))


# --- nothing is lost -------------------------------------------------------------------------------------------------


def steps_logged(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["stage"], line["step"]) for line in lines if "loss" in line]


def report(workdir):
    return json.loads((workdir / "report.json").read_text())["metrics"]


def test_disk_full_keeps_the_last_checkpoint(tmp_path, monkeypatch, trained):
    """The system refuses to write files above a limit, from the second checkpoint on; then there is room again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    save, count = train.Stage._save, []

    def limited(self, *args, **options):
        count.append(1)
        if len(count) == 2:
            self.checkpoints.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
        return save(self, *args, **options)

    found = small()
    try:
        with monkeypatch.context() as patch, pytest.raises(UserError, match=r"cannot be written .*File too large") as e:
            patch.setattr(train.Stage, "_save", limited)
            train.fit(found, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "older checkpoints are whole" in str(e.value) or "metrics" in str(e.value).lower()
    assert saved(tmp_path / "run") == [3]
    train.fit(found, tmp_path / "run")
    assert steps_logged(tmp_path / "run") == [(0, step) for step in range(1, 10)]
    assert report(tmp_path / "run") == report(trained)


def test_files_of_a_run_on_a_full_disk(tmp_path, monkeypatch, trained):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(UserError, match=r"meta.npz cannot be written \(No space left"):
        rundir.save_meta(tmp_path, rundir.load_meta(trained), {})
    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(UserError, match=r"config.json cannot be written \(No space left"):
        rundir.open_run(tmp_path / "run", small())
    assert not list((tmp_path / "run").iterdir())
    with pytest.raises(UserError, match=r"Metrics cannot be written to"), Writer(tmp_path) as writer:
        monkeypatch.setattr("pathlib.Path.open", full)
        writer.scalars(1, {"loss": 1.0}, 0)


def test_scores_that_are_no_numbers_stop_the_run(tmp_path, monkeypatch):
    scores, count = scoring.Scorer.scores, []

    def poisoned(self, *args):
        count.append(1)
        return scores(self, *args) * (np.nan if len(count) == 2 else 1)

    monkeypatch.setattr(scoring.Scorer, "scores", poisoned)
    with pytest.raises(UserError, match=r"scores of scenes test after step 6 .* keeps the checkpoint of step 3"):
        train.fit(small(), tmp_path / "run")
    assert saved(tmp_path / "run") == [3]


def test_ctrl_c_asks_and_then_insists(monkeypatch, capfd):
    now, before = [100.0], signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with pytest.raises(interrupt.Stop, match="the last checkpoint is whole"), interrupt.interruptible() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert len(asked) == 1
        assert "as soon as it is saved; press Ctrl-C again to leave at once" in capfd.readouterr().err
        os.kill(os.getpid(), signal.SIGINT)  # the same one, passed on by a launcher
        now[0] += 5
        os.kill(os.getpid(), signal.SIGTERM)  # a cluster that repeats itself
        assert len(asked) == 1
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_ends_the_command_with_130(told, tmp_path, monkeypatch):
    def stopping(*_):
        raise interrupt.Stop("stopped at step 3 of 9 and saved; run the same command to go on")

    monkeypatch.setattr(train, "fit", stopping)
    status, lines = told(main, SMOKE, f"--workdir={tmp_path / 'run'}")
    assert status == 130 and lines == ["mljax: stopped at step 3 of 9 and saved; run the same command to go on"]

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "fit", interrupted)
    assert told(main, SMOKE, f"--workdir={tmp_path / 'run'}") == (130, ["mljax: stopped"])


# --- what is measured, and what is seen ------------------------------------------------------------------------------


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
    monkeypatch.setattr(train.parallel, "compile_step", lambda *_: (_ for _ in ()).throw(UserError("here it ends")))
    with pytest.raises(UserError, match="here it ends"):
        train.fit(small(**changes), tmp_path / "run")
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
