"""Tables, folders and label vectors of a user that do not fit."""

import numpy as np
import pytest

from mljax import main
from mljax.errors import UserError
from mljax.rundir.progress import Writer
from mljax.train.stage import StageSpec, load_splits
from own_data import ROWS, own, table

pytestmark = pytest.mark.usefixtures("surroundings")


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
    assert "/nowhere/x.pth is missing" in said


def test_classes_without_a_positive_are_named(tmp_path, capsys):
    found = own(table(tmp_path / "own", ROWS).parent)
    found.data.classes, found.optim.batch_size = ("dog", "cat", "unicorn"), 4
    load_splits(StageSpec(found, tmp_path / "run"), Writer(tmp_path))
    assert "has no image with 'unicorn': nothing is learnt of these" in capsys.readouterr().err
