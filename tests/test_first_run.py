"""What somebody meets who follows the README for the first time: sentences with the cause, nothing left over."""

import json
from pathlib import Path

import pytest
from PIL import Image

import toy
from mljax import experiment, main, predict, rundir, train
from mljax.errors import UserError
from mljax.rundir.checkpoint import Checkpoints


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    """No data and a cache folder of the test's own."""
    monkeypatch.setenv("MLJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLJAX_DATA", raising=False)


def refused(*argv):
    """The sentence that a command ends with."""
    with pytest.raises(UserError) as error:
        main.main([str(word) for word in argv])
    return str(error.value)


def photos(folder, count=8):
    """A CSV of photos: `csv` trains on them."""
    folder.mkdir()
    rows = ["image,labels,split"]
    for i in range(count):
        Image.new("RGB", (9, 9), (i, i, i)).save(folder / f"{i}.png")
        rows.append(f"{i}.png,{'cat' if i % 2 else 'cat|dog'},{'val' if i > 5 else 'train'}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return f"--config.data.file={folder / 'labels.csv'}"


# --- the word smoke --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "setting", "sentence"),
    [
        ("csv,smoke", "data.file=labels.csv", "'smoke' has put 'scenes' in the place of what 'csv' names"),
        ("voc2007,star,smoke", "data.year=2012", "put 'scenes' in the place of what 'voc2007,star' names"),
        ("voc2007,smoke", "backbone.layers=50", "'smoke' has put 'small' in the place of what 'voc2007' names"),
    ],
)
def test_smoke_is_named_where_it_is_the_cause(tmp_path, words, setting, sentence):
    said = refused(f"--config=configs/cmsg.py:{words}", f"--workdir={tmp_path / 'run'}", f"--config.{setting}")
    assert f"has no setting {setting.partition('=')[0].partition('.')[2]!r}" in said
    assert sentence in said and said.endswith("so leave 'smoke' out.")


@pytest.mark.parametrize(("words", "setting"), [("smoke", "data.file=x"), ("csv,smoke", "system.fil=1")])
def test_smoke_is_not_named_where_it_is_not(tmp_path, words, setting):
    said = refused(f"--config=configs/cmsg.py:{words}", f"--workdir={tmp_path / 'run'}", f"--config.{setting}")
    assert "has no setting" in said and "'smoke'" not in said


# --- what is missing -------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch):
    def fetch(folder):
        raise UserError(f"GloVe vectors could not be downloaded (offline): put them into {str(folder)!r}.")

    monkeypatch.setattr("mljax.data.glove.fetch", fetch)
    monkeypatch.setattr(experiment, "init_variables", lambda *_: pytest.fail("a model was made before all was there"))


def test_vectors_and_weights_that_are_missing_are_told_at_once(tmp_path, offline):
    argv = ["--config=configs/cmsg.py:csv", f"--workdir={tmp_path / 'run'}", photos(tmp_path / "own")]
    said = refused(*argv, "--config.optim.batch_size=2")
    assert said.startswith("Two things are missing: (1) GloVe vectors could not be downloaded (offline)")
    assert (
        "; (2) The file mobilenet_v1_imagenet_to_conv_pw_12.npz of the weights 'mobilenet_v1_keras' is missing" in said
    )
    assert "runs with --config.vectors=none" in said and ".;" not in said and said.count(". ") == 0


@pytest.mark.parametrize("setting", ["vectors=none", "weights.name=none"])
def test_one_that_is_missing_is_told_alone(tmp_path, offline, setting):
    argv = ["--config=configs/cmsg.py:csv", f"--workdir={tmp_path / 'run'}", photos(tmp_path / "own")]
    said = refused(
        *argv, "--config.optim.batch_size=2", f"--config.{setting}", "--config.system.correlation=cooccurrence"
    )
    assert said.startswith("The file mobilenet_v1" if setting == "vectors=none" else "GloVe vectors could not")


@pytest.mark.parametrize(
    ("config", "command"),
    [
        ("configs/baseline.py:voc2007", "mljax.data prepare voc2007 --root={root} fetches it"),
        ("configs/baseline.py:voc2012", "mljax.data prepare voc2012 --root={root} fetches it"),
        ("configs/baseline.py:coco2014", "mljax.data prepare coco2014 --root={root} fetches it"),
        ("configs/ml_gcn.py:nuswide", "mljax.data prepare nuswide --root={root} says what to put where"),
        ("configs/sst.py:vg200", "mljax.data prepare visual_genome --root={root} says what to put where"),
    ],
)
@pytest.mark.parametrize("where", ["nowhere", "", "spaced out"])
def test_absent_data_come_with_the_command_that_fetches_them(tmp_path, monkeypatch, config, command, where):
    root = tmp_path / where if where else "data"
    if where:
        monkeypatch.setenv("MLJAX_DATA", str(root))
    if where == "spaced out":
        root.mkdir()
        root = f"'{root}'"
    said = refused(f"--config={config}", f"--workdir={tmp_path / 'run'}")
    assert said.endswith(f"; python -m {command.format(root=root)}.")
    assert "MLJAX_DATA" in said


def test_other_splits_than_the_official_ones_are_not_fetched(tmp_path):
    """What `prepare` fetches would be trained on under the name of the re-split."""
    said = refused("--config=configs/baseline.py:voc_resplit", f"--workdir={tmp_path / 'run'}")
    assert said.endswith("MLJAX_DATA.") and "prepare" not in said


# --- a failed start --------------------------------------------------------------------------------------------------

SMOKE = "--config=configs/cmsg.py:smoke"


@pytest.mark.parametrize(
    "settings",
    [
        ["--config=configs/baseline.py:voc2007"],
        ["--config=configs/baseline.py:csv"],
        [SMOKE, "--config.vectors=nowhere.npz"],
        [SMOKE, "--config.weights.name=/nowhere/x.pth"],
        [SMOKE, "--config.system.mode=ad"],
        [SMOKE, "--config.splits.train=trian"],
        [SMOKE, "--config.cache.train_views=64"],
    ],
)
def test_a_failed_start_leaves_nothing(tmp_path, settings):
    refused(*settings, f"--workdir={tmp_path / 'runs' / 'mine'}")
    assert not (tmp_path / "runs").exists()
    (tmp_path / "empty").mkdir()
    refused(*settings, f"--workdir={tmp_path / 'empty'}")
    assert not list((tmp_path / "empty").iterdir())


@pytest.mark.parametrize("error", [RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), KeyboardInterrupt()])
def test_a_start_that_fails_when_all_is_made_leaves_nothing(tmp_path, monkeypatch, error):
    """After the table of the model, when there is a folder of checkpoints without any."""
    seen = []

    def failing(run, tx):
        seen.append(sorted(p.name for p in (tmp_path / "run").iterdir()))
        raise error

    monkeypatch.setattr("mljax.train.stage.make_step", failing)
    found = toy.config("baseline")
    with pytest.raises(UserError if isinstance(error, RuntimeError) else KeyboardInterrupt):
        train.fit(found, tmp_path / "run")
    assert seen == [[".lock", "checkpoints", "config.json", "env.json", "meta.npz", "model.txt", "preprocessing.json"]]
    assert not (tmp_path / "run").exists()


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_what_was_there_before_stays(tmp_path):
    """A run that trained, a start that was killed, and files of somebody else."""
    found = toy.config("baseline", "csv")
    found.data.file = str(tmp_path / "nowhere.csv")
    trained, begun, mine = (tmp_path / name for name in ("trained", "begun", "mine"))
    for workdir in (trained, begun):
        rundir.open_run(workdir, found)
    (trained / "metrics.jsonl").write_text(json.dumps({"step": 1, "stage": 0, "loss": 0.5}) + "\n")
    mine.mkdir()
    (mine / "thesis.txt").write_text("x")
    for workdir in (trained, begun, mine):
        before = contents(workdir)
        with pytest.raises(UserError):
            train.fit(found, workdir)
        after = contents(workdir)
        before.pop(Path("env.json"), None)  # a start that is tried again says anew where it is
        assert {name: after[name] for name in before} == before


def test_a_start_that_fails_keeps_what_somebody_else_put_there(tmp_path, monkeypatch):
    def failing(*_):
        (tmp_path / "run" / "notes.txt").write_text("x")
        raise UserError("no")

    monkeypatch.setattr("mljax.train.trainer.load_splits", failing)
    with pytest.raises(UserError, match="no"):
        train.fit(toy.config("baseline"), tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_what_was_measured_stays(tmp_path, monkeypatch):
    """A run that fails after its first steps, before any checkpoint."""

    def failing(self, state):
        self.meter.writer.scalars(1, {"loss": 0.5}, 0)
        raise UserError("no")

    monkeypatch.setattr("mljax.train.loop.Loop.run", failing)
    with pytest.raises(UserError, match="no"):
        train.fit(toy.config("baseline"), tmp_path / "run")
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names >= {"config.json", "env.json", "meta.npz", "metrics.jsonl", "model.txt", "preprocessing.json"}


# --- prediction says nothing of training -----------------------------------------------------------------------------


def test_predicting_does_not_warn_of_training(tmp_path, caplog):
    """A run of SST on one known positive an image, whose label graph has no edges."""
    found = toy.config("sst")
    found.observe = {"name": "single_positive"}
    with caplog.at_level("WARNING", "mljax"):
        built, source = toy.assembled(found)
        assert [r.getMessage() for r in caplog.records] == [
            f"{source.name} has no image with two known labels: the label graph has no edges."
        ]
        caplog.clear()
        rundir.open_run(tmp_path / "run", found)
        rundir.save_meta(tmp_path / "run", built.meta, toy.PLAIN)
        variables = experiment.init_variables(built, 0)
        tx = train.make_optimizer(found, variables["params"], 10)
        state = train.create_state(variables, tx, ema=0.0, seed=0)
        with Checkpoints(tmp_path / "run" / "checkpoints" / "0", keep_best_of="mAP") as checkpoints:
            checkpoints.save(
                1, state, metrics={"mAP": 1.0}, meta={"stage": 0, "step": 1, "kind": "raw", "metrics": None}
            )
        run = predict.load(tmp_path / "run")
    assert run.classes == source.classes and not caplog.records
