"""Figures of SST: co-occurrence of an image and pseudo labels; their numbers by plain loops from the variables."""

import argparse
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import toy
from mljax import experiment, predict, train
from mljax.analyze import command, pseudo_labels
from mljax.errors import UserError


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pseudo") / "run"
    found = toy.config("sst", optim__epochs=3, system__memory=6, system__drop=0.1, system__last=0.7)
    train.fit(toy.shallow(found), folder)
    return folder


@pytest.fixture(scope="module")
def seen(workdir):
    """What training saw, all labels, and by loops each branch's score of every label (N l)."""
    run = predict.load(workdir)
    known = experiment.source(run.experiment.config, "train", training=True)
    whole = experiment.source(run.experiment.config, "train", training=False)
    memory = np.asarray(run.variables["memory"]["features"], np.float64)
    labels = known.labels.shape[1]
    pairs = list(itertools.combinations(range(labels), 2))
    scores = {"ist": np.zeros(known.labels.shape), "cst": np.zeros(known.labels.shape)}
    matrices = np.zeros((len(known), labels, labels))
    row = 0
    for _, _, out in run.stream([known.read(i) for i in range(len(known))]):
        for f, logits in zip(out.label_features.astype(np.float64), out.extra["pair_logits"].astype(np.float64)):
            for (i, j), x in zip(pairs, logits):
                matrices[row, i, j] = matrices[row, j, i] = 1 / (1 + np.exp(-x))
            matrices[row] += np.eye(labels)
            mine = np.flatnonzero(known.labels[row] * known.observed[row])
            for label in range(labels):
                scores["ist"][row, label] = sum(matrices[row, label, j] for j in mine) / max(len(mine), 1)
                for m in memory[label]:
                    length = np.linalg.norm(m) * np.linalg.norm(f[label])
                    scores["cst"][row, label] += m @ f[label] / length / len(memory[label]) if length else 0
            row += 1
    return run, known, whole, scores, matrices


def size(path):
    with Image.open(path) as picture:
        return picture.size


def call(workdir, *argv):
    assert command.main([f"--workdir={workdir}", *argv]) == 0


def counted(scores, known, whole, theta):
    """found, precision, recall by loops."""
    found = right = hidden = 0
    for i, c in itertools.product(*map(range, known.labels.shape)):
        if not known.observed[i, c]:
            hidden += whole.labels[i, c]
            if max(s[i, c] for s in scores) >= theta:
                found, right = found + 1, right + whole.labels[i, c]
    return {"found": found, "precision": right / found if found else None, "recall": right / hidden}


def test_pseudo_labels_of_a_run(workdir, seen, tmp_path, capsys):
    _, known, whole, scores, _ = seen
    call(workdir, "pseudo", "--threshold=0.2", "--count=5", f"--out={tmp_path}")
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "pseudo.json").read_text())["pseudo"]
    unknown = known.observed == 0
    assert found["chance"] == pytest.approx(whole.labels[unknown].mean())
    assert found["known"] == pytest.approx(known.observed.mean())
    assert [line["theta"] for line in found["at"]] == pytest.approx([0.95, 0.85])  # of the epochs 1 and 2
    for line in found["at"]:
        for name, branches in (("ist", ["ist"]), ("cst", ["cst"]), ("either", ["ist", "cst"])):
            assert line[name] == pytest.approx(counted([scores[b] for b in branches], known, whole, line["theta"]))
    assert [line["epoch"] for line in found["epochs"]] == [1, 2]
    assert f"{found['chance']:.1%} of the unknown labels are positive" in said
    width, height = size(tmp_path / found["picture"])
    assert found["threshold"] == 0.2 and width > 4 * 200 and height > 2 * 200


def test_numbers_at_a_threshold():
    rng = np.random.default_rng(0)
    scores = {name: rng.random((7, 4)) for name in ("ist", "cst")}
    unknown, truth = rng.random((7, 4)) < 0.6, rng.random((7, 4)) < 0.4
    known, whole = SimpleNamespace(observed=~unknown, labels=truth), SimpleNamespace(labels=truth)
    for line in pseudo_labels.by_threshold(scores, unknown, truth, [0.3, 0.8]):
        assert line["ist"] == counted([scores["ist"]], known, whole, line["theta"])
        assert line["either"] == counted(list(scores.values()), known, whole, line["theta"])
    nothing = pseudo_labels.by_threshold(scores, np.zeros_like(unknown), truth, [0.5])[0]["cst"]
    assert nothing == {"found": 0, "precision": None, "recall": None}


def test_cooccurrence_of_images_and_of_a_photo(workdir, seen, tmp_path, capsys):
    run, known, _, _, matrices = seen
    call(workdir, "cooccurrence", "--split=train", "--count=2", "--top=5", f"--out={tmp_path}")
    found = json.loads((tmp_path / "cooccurrence.json").read_text())["cooccurrence"]
    assert len(found) == 2
    ids = [str(name) for name in known.ids]
    for told in found:
        matrix = matrices[ids.index(told["image"])]
        for pair in told["strongest"]:
            i, j = (run.classes.index(name) for name in pair["labels"])
            assert pair["p"] == pytest.approx(matrix[i, j], rel=1e-3)
        assert size(tmp_path / told["picture"])[0] > 1000
    photo = tmp_path / "mine.png"
    Image.new("RGB", (80, 60), "red").save(photo)
    names = run.classes[:3]
    call(workdir, "cooccurrence", f"--photo={photo}", f"--labels={','.join(names)}", f"--out={tmp_path}")
    told = json.loads((tmp_path / "cooccurrence.json").read_text())["cooccurrence"][0]
    assert told["true"] is None and len(told["strongest"]) == 3
    assert {name for pair in told["strongest"] for name in pair["labels"]} == set(names)


def test_no_pseudo_label_is_no_picture(workdir, tmp_path, capsys):
    call(workdir, "pseudo", "--threshold=1", f"--out={tmp_path}")
    assert json.loads((tmp_path / "pseudo.json").read_text())["pseudo"]["picture"] is None
    assert "lower --threshold to see some" in capsys.readouterr().out and not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["pseudo", "--threshold=2"], "--threshold=2 is not a similarity or probability; expected 0 to 1"),
        (["pseudo", "--count=0"], "--count must be at least 1"),
        (["cooccurrence", "--top=1"], "--top at least 2 labels"),
        (["cooccurrence", "--labels=cow,ghost"], "'ghost' is not a label of this run"),
    ],
)
def test_wrong_flags(workdir, argv, said):
    with pytest.raises(UserError, match=said):
        command.main([f"--workdir={workdir}", *argv])


def test_a_run_with_the_data_sets_cooccurrence_is_told_what_it_lacks():
    system = SimpleNamespace(cooccurrence="dataset", _pairs=False)  # of the word `dataset`, which has IST
    inputs: object = SimpleNamespace(run=SimpleNamespace(experiment=SimpleNamespace(system=system)))
    with pytest.raises(UserError, match="cooccurrence='dataset'.*expected a run with cooccurrence='image'"):
        pseudo_labels.cooccurrence(inputs, argparse.Namespace(count=1, top=2, photo=None, labels=None))


def test_runs_of_other_systems(tmp_path):
    config = SimpleNamespace(system=SimpleNamespace(name="cmsg"))
    inputs = SimpleNamespace(run=SimpleNamespace(experiment=SimpleNamespace(system=object(), config=config)))
    with pytest.raises(UserError, match="'cmsg' of this run makes no pseudo-labels"):
        pseudo_labels.pseudo_labels(inputs, argparse.Namespace(count=1, threshold=None))
    with pytest.raises(UserError, match="'cmsg' of this run learns no co-occurrence"):
        pseudo_labels.cooccurrence(inputs, argparse.Namespace(count=1, top=3))
