"""Run directories that cannot be used, and wrong flags of the commands that read one."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import toy
from mljax import evaluate, main, predict, rundir, scoring, train
from mljax.errors import UserError
from own_data import photo, saved

pytestmark = pytest.mark.usefixtures("surroundings")

SMOKE = "--config=configs/cmsg.py:smoke"


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of a finished run, to be spoiled."""
    return shutil.copytree(finished_run, tmp_path / "run")


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
    image = tmp_path / "photo.png"
    Image.new("RGB", (9, 9)).save(image)

    def predicting(workdir):
        return refused(predict, image, f"--workdir={workdir}")

    assert "There is no folder" in predicting(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no config.json; give the --workdir of a run" in predicting(tmp_path / "empty")
    rundir.open_run(tmp_path / "started", toy.small())
    assert "holds no checkpoint yet; train it first" in predicting(tmp_path / "started")
    (run / "meta.npz").write_bytes((run / "meta.npz").read_bytes()[:100])
    assert "meta.npz is damaged" in predicting(run)
    (run / "preprocessing.json").write_text('{"mean": [')
    (run / "meta.npz").unlink()
    assert "meta.npz" in predicting(run)
    (run / "config.json").write_text("{")
    assert "config.json is damaged" in predicting(run)
    assert "config.json is damaged" in refused(main, SMOKE, f"--workdir={run}")


def test_a_damaged_report_is_made_again(shell, run):
    good = json.loads((run / "report.json").read_text())
    (run / "report.json").write_text('{"split": "sc')
    assert train.fit(toy.small(), run)["metrics"] == good["metrics"]
    assert json.loads((run / "report.json").read_text()) == good


def test_wrong_flags_of_predict_and_evaluate(refused, finished_run, tmp_path):
    good, run = tmp_path / "good.jpg", f"--workdir={finished_run}"
    photo(0).save(good)
    assert "There is no file or folder" in refused(predict, tmp_path / "nowhere.jpg", run)
    (tmp_path / "none").mkdir()
    assert "holds no image" in refused(predict, tmp_path / "none", run)
    assert "did you mean '--threshold'" in refused(predict, good, run, "--treshold=0.3")
    assert "--threshold=3 is not a probability" in refused(predict, good, run, "--threshold=3")
    assert "invalid float value: 'x'" in refused(predict, good, run, "--threshold=x")
    assert "--top=0 is not a number of labels; expected at least 1" in refused(predict, good, run, "--top=0")
    assert "required: PHOTO_OR_FOLDER" in refused(predict, run)
    (tmp_path / "file").write_text("x")
    assert "cannot be written (File exists)" in refused(predict, good, run, f"--overlay={tmp_path / 'file'}")
    assert "required: --workdir" in refused(evaluate)
    assert "'more' is not expected here" in refused(evaluate, run, "more")
    assert "no split 'vl' (did you mean 'val'?)" in refused(evaluate, run, "--split=vl")
    assert "--definition is 'envv'; expected one of" in refused(evaluate, run, "--definition=envv")
    assert "The view '9x' is not" in refused(evaluate, run, "--views=9x")
    assert "kept no averaged parameters" in refused(evaluate, run, "--ema")
    assert "invalid choice: 'bst'" in refused(evaluate, run, "--checkpoint=bst")


def test_scores_that_are_no_numbers_stop_the_run(tmp_path, monkeypatch):
    scores, count = scoring.Scorer.scores, []

    def poisoned(self, *args):
        count.append(1)
        return scores(self, *args) * (np.nan if len(count) == 2 else 1)

    monkeypatch.setattr(scoring.Scorer, "scores", poisoned)
    with pytest.raises(UserError, match=r"scores of scenes test after step 6 .* keeps the checkpoint of step 3"):
        train.fit(toy.small(), tmp_path / "run")
    assert saved(tmp_path / "run") == [3]
