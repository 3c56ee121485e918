"""Labels that training does not have: gone from its data, scored afterwards by command, against plain references."""

import json

import numpy as np
import pytest
from PIL import Image

import toy
from mljax import evaluate, experiment, predict, train, zero_shot
from mljax import run as run_module
from mljax.data import scenes, unseen
from mljax.data.nuswide import CLASSES, nuswide
from mljax.data.splits import load
from mljax.data.word_vectors import load_vectors
from mljax.errors import UserError
from torch_writer import tensors, torch_zip

HIDDEN = ("bus", "sheep", "kettle", "sofa")
SEEN = tuple(name for name in scenes.CLASSES if name not in HIDDEN)


def tensor(array):
    return tensors({"x": array})["x"]


def place(names):
    return [scenes.CLASSES.index(name) for name in names]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero_shot") / "run"
    train.fit(toy.shallow(toy.config("ml_decoder", "zero_shot,smoke", optim__epochs=4)), folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "run"
    train.fit(toy.shallow(toy.config("ml_decoder", "smoke", optim__epochs=1)), folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two test pictures of scenes as files."""
    folder, source = tmp_path_factory.mktemp("photos"), load({"name": "scenes", "size": 64}, "test")
    for i in range(2):
        Image.fromarray(source[i]["image"]).save(folder / f"{i}.png")
    return folder


def scored(workdir, name):
    with np.load(workdir / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


# --- training does not have them --------------------------------------------------------------------------------------


def test_a_split_without_classes_keeps_its_images_and_the_other_columns():
    whole = load({"name": "scenes", "train_images": 30}, "train")
    part = unseen.without(whole, HIDDEN)
    assert part.classes == SEEN and part.every == scenes.CLASSES and len(part) == 30
    for key in ("labels", "observed", "scored"):
        np.testing.assert_array_equal(getattr(part, key), getattr(whole, key)[:, place(SEEN)])
    np.testing.assert_array_equal(part[3]["image"], whole[3]["image"])
    np.testing.assert_array_equal(part[3]["labels"], whole[3]["labels"][place(SEEN)])
    assert unseen.without(whole, ()) is whole and len(unseen.without(whole, "bus, sheep").classes) == 18


def test_what_training_knows_of_hidden_labels_is_nothing():
    found = toy.config("ml_decoder", "zero_shot,smoke")
    assert found.unseen == HIDDEN
    for name, training in (("train", True), ("test", False)):
        assert experiment.source(found, name, training=training).classes == SEEN
    run, _ = toy.assembled(found)
    assert run.meta.classes == SEEN and run.meta.labels.shape[1] == run.system.meta.num_labels == 16
    np.testing.assert_array_equal(run.meta.vectors, scenes.VECTORS()[place(SEEN)])


@pytest.mark.parametrize("ending", [".npy", ".pth", "_turned.pth", ".npz"])
def test_rows_of_vectors_go_to_the_labels_that_are_left(tmp_path, ending):
    table = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
    path = tmp_path / f"vectors{ending}"
    if ending == ".npy":
        np.save(path, table)
    elif ending == ".npz":
        np.savez(path, names=np.array(scenes.CLASSES), vectors=table)
    else:
        torch_zip(path, tensor(np.ascontiguousarray(table.T) if "turned" in ending else table))
    found = toy.config("ml_decoder", "zero_shot,smoke", vectors=str(path))
    run, _ = toy.assembled(found)
    np.testing.assert_array_equal(run.meta.vectors, table[place(SEEN)])


def test_files_of_vectors_that_do_not_fit(tmp_path):
    torch_zip(tmp_path / "wide.pth", tensor(np.ones((3, 5), np.float32)))
    with pytest.raises(UserError, match=r"has shape \(3, 5\) or no finite numbers: 20 vectors are expected"):
        load_vectors(scenes.CLASSES, source=str(tmp_path / "wide.pth"))
    torch_zip(tmp_path / "state.pth", tensors({"a": np.ones(2, np.float32)}))
    with pytest.raises(UserError, match="cannot be read as label vectors .*: give one tensor"):
        load_vectors(scenes.CLASSES, source=str(tmp_path / "state.pth"))


def test_hidden_labels_that_do_not_exist_or_are_all():
    source = load({"name": "scenes", "train_images": 5}, "train")
    with pytest.raises(UserError, match=r"config.unseen has 'shep', which is not a label .*did you mean 'sheep'"):
        unseen.without(source, ("shep",))
    with pytest.raises(UserError, match="config.unseen names all labels of scenes train; leave some"):
        unseen.without(source, scenes.CLASSES)


# --- they are scored afterwards ---------------------------------------------------------------------------------------


def test_evaluate_unseen_all_and_names(workdir, capsys):
    """Every label is scored by its own vector alone, so all = seen and unseen together; the means are of plain APs."""
    own = scored(workdir, "scores")
    assert evaluate.main([f"--workdir={workdir}", "--labels=all"]) == 0
    every, report = (
        scored(workdir, "scores_test_raw_all"),
        json.loads((workdir / "report_test_raw_all.json").read_text()),
    )
    assert tuple(every["classes"]) == scenes.CLASSES and tuple(own["classes"]) == SEEN
    np.testing.assert_allclose(every["scores"][:, place(SEEN)], own["scores"], rtol=1e-4, atol=1e-4)
    assert "mAP" in capsys.readouterr().out
    aps = report["per_class_AP"]
    for what, names in (("seen", SEEN), ("unseen", HIDDEN)):
        kept = [aps[name] for name in names if aps[name] is not None]
        assert report["mAP_of"][what]["labels"] == len(kept)
        np.testing.assert_allclose(report["mAP_of"][what]["mAP"], sum(kept) / len(kept))
    evaluate.main([f"--workdir={workdir}", "--labels=unseen"])
    out = capsys.readouterr().out
    rest = scored(workdir, "scores_test_raw_unseen")
    assert tuple(rest["classes"]) == tuple(name for name in scenes.CLASSES if name in HIDDEN)
    np.testing.assert_allclose(rest["scores"], every["scores"][:, place(rest["classes"])], rtol=1e-4, atol=1e-4)
    assert "labels unseen in training" in out and "labels seen in training" not in out
    evaluate.main([f"--workdir={workdir}", "--labels=sheep,car"])
    some = scored(workdir, "scores_test_raw_labels")
    assert some["classes"].tolist() == ["sheep", "car"]
    np.testing.assert_allclose(some["scores"], every["scores"][:, place(("sheep", "car"))], rtol=1e-4, atol=1e-4)
    assert not set(json.loads((workdir / "report.json").read_text())["per_class_AP"]) & set(HIDDEN)


def test_another_data_set_is_evaluated(workdir, photos, tmp_path):
    """A CSV whose classes are a trained label, a hidden one, and one that only a file of vectors knows."""
    (tmp_path / "zoo.csv").write_text("image,labels,split\n" + "".join(
        f"{photos / name},{labels},test\n" for name, labels in (("0.png", "zebra|car"), ("1.png", "sheep"))
    ))  # fmt: skip
    table = dict(zip(scenes.CLASSES, scenes.VECTORS())) | {"zebra": scenes.VECTORS()[3]}
    np.savez(tmp_path / "zoo.npz", names=np.array(list(table)), vectors=np.stack(list(table.values())))
    data = ["--config.data.name=csv", f"--config.data.file={tmp_path / 'zoo.csv'}"]
    argv = [f"--workdir={workdir}", "--labels=all", *data]
    with pytest.raises(UserError, match="There is no vector for 'sheep'; give --vectors"):
        evaluate.main(argv)
    assert evaluate.main([*argv, f"--vectors={tmp_path / 'zoo.npz'}"]) == 0
    found = scored(workdir, "scores_test_raw_all")
    run = predict.load(workdir)
    images = [photos / "0.png", photos / "1.png"]
    wanted = run.with_labels(list(found["classes"]), np.stack([table[str(name)] for name in found["classes"]]))
    np.testing.assert_allclose(run_module.sigmoid(found["scores"]), wanted.scores(images), atol=1e-4)
    with pytest.raises(UserError, match="has other classes than this run; .* ML-Decoder with --labels=all"):
        evaluate.main([f"--workdir={workdir}", *data])
    with pytest.raises(UserError, match="--config.optim.lr cannot be changed after training"):
        evaluate.main([f"--workdir={workdir}", "--config.optim.lr=1"])


def test_predict_by_command(workdir, photos, capsys):
    run = predict.load(workdir)
    images = [photos / "0.png", photos / "1.png"]
    argv = [*map(str, images), f"--workdir={workdir}", "--json", "--top=3"]
    assert predict.main([*argv, "--labels=sheep, car,kettle"]) == 0
    lines = [json.loads(line)["labels"] for line in capsys.readouterr().out.splitlines()]
    alone = run.scores(images)[:, SEEN.index("car")]
    for found, car in zip(lines, alone, strict=True):
        assert set(found) == {"sheep", "car", "kettle"}
        np.testing.assert_allclose(found["car"], car, atol=2e-4)
    with pytest.raises(UserError, match="scenes brings label vectors for its own labels along and none for 'zebra'"):
        predict.main([*argv, "--labels=zebra"])
    with pytest.raises(UserError, match="--vectors has the vectors of new labels; name them with --labels"):
        predict.main([*argv, "--vectors=glove"])


def test_vectors_are_given_or_looked_up(workdir, photos, tmp_path):
    """A new label with the vector of a trained one scores as that one; trained labels keep their own vectors."""
    run, images = predict.load(workdir), [photos / "0.png"]
    car = scenes.VECTORS()[scenes.CLASSES.index("car")]
    np.savez(tmp_path / "v.npz", names=np.array(["taxi", "car"]), vectors=np.stack([car, -car]))
    wanted = run.scores(images)[:, SEEN.index("car")]
    by_file = run.with_labels(["taxi", "Car"], str(tmp_path / "v.npz"))
    by_hand = run.with_labels(["taxi"], car[None])
    assert by_file.classes == ("taxi", "Car") and run.classes == SEEN
    np.testing.assert_allclose(by_file.scores(images), [[wanted[0], wanted[0]]], atol=1e-5)
    np.testing.assert_allclose(by_hand.scores(images)[:, 0], wanted, atol=1e-5)
    assert by_hand.attention(images).shape[1] == 1


def test_labels_that_cannot_be_scored(workdir, plain, tmp_path):
    run = predict.load(workdir)
    cases = {
        ("car", "Car"): "'Car' and 'car' are one|'car' and 'Car' are one",
        ("car", "car"): "The labels 'car' and 'car' are one; name it once",
        (): "No label is named",
    }
    for labels, said in cases.items():
        with pytest.raises(UserError, match=said):
            run.with_labels(labels)
    np.savez(tmp_path / "narrow.npz", names=np.array(["zebra"]), vectors=np.ones((1, 7), np.float32))
    with pytest.raises(UserError, match="new labels have 7 numbers and those of the training 32; .* the same source"):
        run.with_labels(["zebra", "car"], str(tmp_path / "narrow.npz"))
    with pytest.raises(UserError, match=r"have the shape \(1, 7\) and should have \(labels, 32\)"):
        run.with_labels(["zebra"], str(tmp_path / "narrow.npz"))
    np.save(tmp_path / "rows.npy", np.ones((1, 32), np.float32))
    with pytest.raises(UserError, match="vectors without names, so 'zebra' cannot be looked up in it"):
        run.with_labels(["zebra"], str(tmp_path / "rows.npy"))
    with pytest.raises(UserError, match=r"The vectors have the shape \(2, 32\); 1 labels need \(1, e\)"):
        run.with_labels(["zebra"], np.ones((2, 32), np.float32))
    with pytest.raises(UserError, match=r"scenes test has no label 'shep' .did you mean 'sheep'.*all, seen, unseen"):
        run.evaluate(labels="shep")
    with pytest.raises(UserError, match="train it with config.system.zero_shot=True"):
        predict.load(plain).evaluate(labels="all")


def test_a_system_that_is_bound_to_its_labels_says_so():
    run, _ = toy.assembled(toy.config("baseline"))
    with pytest.raises(UserError, match="'baseline' is bound to the labels .* train configs/ml_decoder.py:zero_shot"):
        zero_shot.with_labels(run, {}, ["zebra"])


# --- NUS-WIDE's zero-shot lists ---------------------------------------------------------------------------------------


def test_nuswide_with_its_tags(tmp_path):
    folder = tmp_path / "nus_wide"
    folder.mkdir()
    rows = ["path,labels,split", 'a.jpg,"[abc, zebra]",train', 'b.jpg,"[xyz]",val', 'c.jpg,"[person, xyz]",train']
    (folder / "data.csv").write_text("\n".join(rows))
    for name in "abc":
        (folder / f"{name}.jpg").write_bytes(b"photo")
    found = nuswide("train", training=True, root=str(tmp_path), variant="zsl")
    assert found.classes == ("abc", "person", "xyz", "zebra") and list(found.ids) == ["a.jpg", "c.jpg"]
    np.testing.assert_array_equal(found.labels, [[1, 0, 0, 1], [0, 1, 1, 0]])
    val = nuswide("val", training=False, root=str(tmp_path), variant="zsl")
    np.testing.assert_array_equal(val.labels, [[0, 0, 1, 0]])
    assert unseen.without(found, ("person", "zebra")).labels.tolist() == [[1, 0], [0, 1]]
    chosen = toy.config("ml_decoder", "nuswide_zero_shot")
    assert chosen.unseen == CLASSES and chosen.data.variant == "zsl" and chosen.system.zero_shot
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no nus_wide/data.csv under"):
        nuswide("train", training=True, root=str(tmp_path / "empty"), variant="zsl")
