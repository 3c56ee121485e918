"""What training may see: streams of the papers' code, purity, masks as files, partial CSVs, and that nothing leaks."""

import dataclasses
import random

import numpy as np
import pytest

import toy
from mljax import experiment
from mljax.check import check
from mljax.commands import data as command
from mljax.config.overrides import override
from mljax.config.reading import read_config
from mljax.data import label_bias, masks, observe, spml
from mljax.data.source import Instances, Source
from mljax.data.splits import load
from mljax.data.table import table
from mljax.errors import UserError


def source(n=60, l=7, seed=0, ids=None, **changes):
    labels = (np.random.default_rng(seed).random((n, l)) < 0.35).astype(np.uint8)
    ones = np.ones_like(labels)
    facts = {
        "name": "toy train",
        "classes": tuple("abcdefghijklmnopqrst"[:l]),
        "ids": ids or [f"{i}.jpg" for i in range(n)],
        "labels": labels,
        "observed": ones,
        "scored": ones,
        "read": lambda i: np.full((4, 4, 3), i, np.uint8),
        "fingerprint": "f",
    }
    return Source(**(facts | changes))


# --- known proportion ---------------------------------------------------------------------------------------------


def test_baselines_on_the_resplit_see_what_sst_sees():
    """One draw for all rows of a table."""
    seen = [
        toy.config(name, "voc_resplit,known=0.3").observe.to_dict()
        for name in ("sst", "sarb", "ssgrl", "ml_gcn", "partial_bce", "curriculum")
    ]
    assert seen == [{"name": "known", "proportion": 0.3, "mode": "hcp"}] * 6


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"name": "known", "proportion": 1.5}, "config.observe.proportion is 1.5; it is a number from 0 to 1"),
        ({"name": "candidates", "rate": -0.1}, "config.observe.rate is -0.1; it is a number from 0 to 1"),
        ({"name": "single_positive", "bias": "siez"}, "config.observe.bias is 'siez' .did you mean 'size'"),
    ],
)
def test_ranges_are_checked_before_any_data_are_read(section, said):
    with pytest.raises(UserError, match=said):
        observe.check(section)


def test_hcp_stream():
    """systems.md 6.3 and 12: the global generator seeded with 0, row-major."""
    first = [0.5488, 0.7152, 0.6028, 0.5449, 0.4237, 0.6459, 0.4376, 0.8918, 0.9637, 0.3834]
    whole = source(2, 5, labels=np.ones((2, 5), np.uint8))
    for share in (0.4, 0.44, 0.6, 0.9):
        found = observe.observe(whole, {"name": "known", "proportion": share, "mode": "hcp"})
        np.testing.assert_array_equal(found.observed.reshape(-1), np.array(first) < share)
    np.random.seed(0)  # noqa: NPY002
    u = np.random.uniform(0, 1, (60, 7))  # noqa: NPY002
    whole = source()
    found = observe.observe(whole, {"name": "known", "proportion": 0.3, "mode": "hcp"})
    np.testing.assert_array_equal(found.observed, u < 0.3)
    np.testing.assert_array_equal(found.labels, whole.labels * (u < 0.3))


@pytest.mark.parametrize("mode", ["nested", "hcp"])
def test_proportions_are_nested_and_near_their_share(mode):
    whole = source(2000, 10)
    before = np.zeros(whole.labels.shape, np.uint8)
    for share in (0.1, 0.2, 0.5, 0.9, 1.0):
        found = observe.observe(whole, {"name": "known", "proportion": share, "mode": mode})
        assert (found.observed >= before).all() and abs(found.observed.mean() - share) < 0.01
        assert not (found.labels * (1 - found.observed)).any()
        before = found.observed


SECTIONS = [
    {"name": "known", "proportion": 0.3},
    {"name": "known", "proportion": 0.3, "mode": "hcp"},
    {"name": "single_positive"},
    {"name": "single_positive", "negatives": 2},
    {"name": "candidates", "rate": 0.2},
]


@pytest.mark.parametrize("section", SECTIONS)
def test_a_function_of_seed_and_index(section):
    whole = source()
    found = observe.observe(whole, section)
    again = observe.observe(whole, section)
    np.testing.assert_array_equal(found.observed, again.observed)
    np.testing.assert_array_equal(found.labels, again.labels)
    # more images change nothing for those before; a slice sees what the whole sees
    shorter = observe.observe(source(60).subset(np.arange(60), ""), section)
    less = source(60)
    less = dataclasses.replace(
        less, labels=less.labels[:25], observed=less.observed[:25], scored=less.scored[:25], ids=less.ids[:25]
    )
    np.testing.assert_array_equal(observe.observe(less, section).labels, found.labels[:25])
    np.testing.assert_array_equal(shorter.labels, found.labels)
    rows = np.array([40, 3, 17])
    part = observe.observe(whole.subset(rows, "[some]"), section)
    np.testing.assert_array_equal(part.labels, found.labels[rows])
    np.testing.assert_array_equal(part.observed, found.observed[rows])
    other = observe.observe(whole, {**section, "seed": 5})
    assert (other.observed != found.observed).any() or (other.labels != found.labels).any()


@pytest.mark.parametrize("section", SECTIONS)
def test_nothing_hidden_is_left_in_what_trains(section):
    whole = source()
    part = observe.observe(whole.subset(np.arange(50), "[:50]"), section)
    for found in (observe.observe(whole, section), part, part.base):
        assert not (found.labels[found.observed == 0]).any() and found.instances is None
        assert (found[7]["labels"] <= found[7]["observed"]).all()
    assert part.fingerprint == whole.subset(np.arange(50), "[:50]").fingerprint  # cached features are shared


def test_what_the_source_does_not_know_stays_hidden():
    known = (np.random.default_rng(1).random((60, 7)) < 0.5).astype(np.uint8)
    whole = source(observed=known)
    whole = dataclasses.replace(whole, labels=whole.labels * known)
    for section in SECTIONS:
        found = observe.observe(whole, section)
        assert (found.observed <= known).all() and (found.labels <= known).all()
    assert (observe.observe(whole, {"name": "all"}).observed == known).all()


# --- single positive ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("negatives", [0, 1, -1])
def test_spml_stream(negatives):
    """Positives, then negatives of each image are shuffled in turn by one generator; the first ones are kept."""
    whole = source()
    rng, expected = np.random.RandomState(1200), np.zeros(whole.labels.shape, np.uint8)
    for i in range(len(whole)):
        for value, count in ((1, 1), (0, negatives)):
            found = np.nonzero(whole.labels[i] == value)[0]
            rng.shuffle(found)
            expected[i, found if count == -1 else found[:count]] = 1
    found = observe.observe(whole, {"name": "single_positive", "mode": "spml", "negatives": negatives})
    np.testing.assert_array_equal(found.observed, expected)
    assert (found.labels.sum(1) == whole.labels.any(1)).all()


def test_spml_split_and_orders():
    np.testing.assert_array_equal(np.random.RandomState(1200).permutation(10), [9, 4, 6, 1, 8, 5, 2, 0, 7, 3])
    names = [f"{i}.jpg" for i in range(10)]
    assert spml.split(names, "train").tolist() == [0, 1, 2, 4, 5, 6, 8, 9]  # the last two of the permutation validate
    assert spml.split(names, "val").tolist() == [3, 7]
    coco = [f"COCO_train2014_{i:012d}.jpg" for i in (9, 30, 100, 1000, 25)]
    assert [coco[i][-8:-4] for i in spml.order(coco)] == ["0100", "1000", "0025", "0030", "0009"]  # as text
    assert spml.order(["2008_000007", "2008_000002"]).tolist() == [1, 0]
    train = load({"name": "scenes", "train_images": 50}, "train[spml:train]")
    val = load({"name": "scenes", "train_images": 50}, "train[spml:val]")
    assert len(train) == 40 and len(val) == 10 and not set(train.ids) & set(val.ids)
    found = observe.observe(train, {"name": "single_positive", "mode": "spml"})
    whole = observe.observe(
        load({"name": "scenes", "train_images": 50}, "train"), {"name": "single_positive", "mode": "spml"}
    )
    np.testing.assert_array_equal(found.labels, whole.labels[train.indices])


def test_spml_stream_follows_the_order_of_the_code():
    ids = [f"COCO_train2014_{i:012d}.jpg" for i in range(60)]
    found = observe.observe(source(ids=ids), {"name": "single_positive", "mode": "spml"})
    order = sorted(range(60), key=str)
    labels = source().labels[order]
    straight = observe.observe(source(labels=labels), {"name": "single_positive", "mode": "spml"})
    np.testing.assert_array_equal(found.labels[order], straight.labels)


def test_uniform_choice_is_even():
    whole = source(3000, 4, labels=np.tile(np.array([[1, 1, 0, 1]], np.uint8), (3000, 1)))
    found = observe.observe(whole, {"name": "single_positive"})
    np.testing.assert_allclose(found.labels.mean(0), [1 / 3, 1 / 3, 0, 1 / 3], atol=0.03)
    assert (found.observed.sum(1) == 1).all()


def instances(index):
    """A large a in the corner, a small b in the very middle, two middling c."""
    del index
    boxes = np.array([[0, 0, 60, 40], [48, 23, 4, 4], [70, 10, 10, 10], [70, 30, 10, 10]], float)
    return Instances((100, 50), np.array([0, 1, 2, 2]), boxes, boxes[:, 2] * boxes[:, 3])


def test_bias_weights():
    labels = np.tile(np.array([[1, 1, 1, 0]], np.uint8), (2, 1))
    labels[1, 0] = 0
    whole = source(2, 4, labels=labels, instances=instances)
    size = label_bias.chances(whole, labels > 0, "size")
    np.testing.assert_allclose(size, [[2400, 16, 200, 0], [0, 16, 200, 0]])
    location = label_bias.chances(whole, labels > 0, "location")
    centre = [1 / np.hypot(20, 5), 1 / 0.0005, 1 / np.hypot(25, 10) + 1 / np.hypot(25, 10), 0]
    np.testing.assert_allclose(location[0], centre)


@pytest.mark.parametrize("mode", ["index", "spml"])
def test_bias_decides_how_often(mode, tmp_path):
    labels = np.tile(np.array([[1, 1, 1, 0]], np.uint8), (4000, 1))
    whole = source(4000, 4, labels=labels, instances=instances)
    found = observe.observe(whole, {"name": "single_positive", "bias": "size", "mode": mode})
    np.testing.assert_allclose(found.labels.mean(0), np.array([2400, 16, 200, 0]) / 2616, atol=0.02)
    path = tmp_path / "clicks.json"
    path.write_text('{"a": 0.1, "b": 0.6, "c": 0.3, "d": 0.9}')
    section = {"name": "single_positive", "bias": "semantic", "weights": str(path), "mode": mode}
    found = observe.observe(whole, section)
    np.testing.assert_allclose(found.labels.mean(0), [0.1, 0.6, 0.3, 0], atol=0.03)
    path.write_text('{"a": 0, "b": 0, "c": 0, "d": 1}')  # nothing tells the positives apart
    np.testing.assert_allclose(observe.observe(whole, section).labels.mean(0), [1 / 3, 1 / 3, 1 / 3, 0], atol=0.03)


def test_biased_stream_is_pythons():
    whole = source(30, 5, instances=lambda i: Instances((10, 10), np.arange(5), np.ones((5, 4)), np.arange(1.0, 6)))
    found = observe.observe(whole, {"name": "single_positive", "bias": "size", "mode": "spml", "seed": 1200})
    rng = random.Random(1200)
    for i in range(30):
        weights = [float(w) * int(y) for w, y in zip(range(1, 6), whole.labels[i])]
        if any(weights):
            assert found.labels[i].tolist() == np.eye(5, dtype=int)[rng.choices(range(5), weights=weights)[0]].tolist()


def test_scenes_and_voc_say_where_things_stand(tmp_path):
    whole = load({"name": "scenes", "train_images": 20}, "train")
    for i in range(20):
        found = whole.instances(i)
        assert set(found.labels.tolist()) == set(np.flatnonzero(whole.labels[i]).tolist())
        assert (found.areas > 0).all() and found.boxes.shape == (len(found.labels), 4)
    observe.observe(whole, {"name": "single_positive", "bias": "size"})
    with pytest.raises(UserError, match="bias='size' needs to know where things stand, and toy train does not say"):
        observe.observe(source(), {"name": "single_positive", "bias": "size"})
    with pytest.raises(UserError, match="needs a weight for every class"):
        observe.observe(source(), {"name": "single_positive", "bias": "semantic"})
    (tmp_path / "w.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="has no weight for 'b', 'c', 'd' and 3 more"):
        observe.observe(source(), {"name": "single_positive", "bias": "semantic", "weights": str(tmp_path / "w.json")})


def test_boxes_of_real_photos(real_data):
    whole = load(
        {"name": "voc", "root": str(real_data), "variant": "VOC2007 re-split", "training": True}, "trainval[:30]"
    )
    for i in range(30):
        found = whole.instances(i)
        assert set(np.flatnonzero(whole.labels[i])) <= set(found.labels.tolist())
        width, height = found.size
        assert (found.boxes[:, 2] <= width).all() and (found.boxes[:, 3] <= height).all() and (found.areas > 0).all()


# --- candidates ---------------------------------------------------------------------------------------------------


def test_candidates_hold_all_true_labels_and_noise():
    whole = source(3000)
    found = observe.observe(whole, {"name": "candidates", "rate": 0.2})
    assert (found.labels >= whole.labels).all() and found.observed.all()
    noise = found.labels[whole.labels == 0]
    assert abs(noise.mean() - 0.2) < 0.01
    assert (observe.observe(whole, {"name": "candidates", "rate": 0.0}).labels == whole.labels).all()


# --- masks as files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", SECTIONS)
def test_masks_are_written_and_read_back(section, tmp_path):
    whole = source()
    found = observe.observe(whole, section)
    masks.write(tmp_path / "m.npz", found, noisy=section["name"] == "candidates")
    read = observe.observe(whole, {"name": "file", "path": str(tmp_path / "m.npz")})
    np.testing.assert_array_equal(read.labels, found.labels)
    np.testing.assert_array_equal(read.observed, found.observed)
    part = observe.observe(whole.subset(np.arange(9, 30), "[9:30]"), {"name": "file", "path": str(tmp_path / "m.npz")})
    np.testing.assert_array_equal(part.labels, found.labels[9:30])


def damaged(path, **changes):
    with np.load(path) as arrays:
        found = {k: arrays[k] for k in arrays.files}
    for key, value in changes.items():
        if value is None:
            del found[key]
        else:
            found[key] = value(found[key])
    np.savez(path, **found)


def flipped(x):
    x = x.copy()
    x[0, 0] = 1 - x[0, 0]
    return x


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"observed": lambda x: x[:-1]}, r"observed of shape \(59, 7\), and toy train has 60 images of 7 labels"),
        ({"labels": lambda x: x[:, :-1]}, r"labels of shape \(60, 6\)"),
        ({"fingerprint": lambda x: np.array("other")}, "images or classes are not those of toy train"),
        ({"observed": lambda x: x * 2}, "values other than 0 and 1 in observed"),
        ({"labels": flipped}, "'a' of '0.jpg' contradicts the label of the data set"),
        ({"observed": lambda x: x * 0}, "is positive and hidden at once"),
        ({"observed": None}, "have no array 'observed'"),
    ],
)
def test_masks_that_do_not_fit(changes, said, tmp_path):
    path = tmp_path / "m.npz"
    masks.write(path, observe.observe(source(), {"name": "all"}))
    damaged(path, **changes)
    with pytest.raises(UserError, match=said) as error:
        observe.observe(source(), {"name": "file", "path": str(path)})
    assert str(error.value).count("\n") == 0


def test_masks_that_cannot_be_read(tmp_path):
    for path, said in ((tmp_path / "no.npz", "cannot be read"), ("", "needs config.observe.path")):
        with pytest.raises(UserError, match=said):
            observe.observe(source(), {"name": "file", "path": str(path)})
    (tmp_path / "x.npz").write_bytes(b"nothing")
    with pytest.raises(UserError, match="are not a complete .npz file of `mljax.data observe`"):
        observe.observe(source(), {"name": "file", "path": str(tmp_path / "x.npz")})
    masks.write(tmp_path / "m.npz", source())
    with pytest.raises(UserError, match="images or classes"):
        observe.observe(source(ids=[f"{i}.png" for i in range(60)]), {"name": "file", "path": str(tmp_path / "m.npz")})


def test_the_command_writes_what_a_config_observes(tmp_path, capsys):
    out = tmp_path / "masks.npz"
    words = ["observe", "configs/role.py:smoke", f"--out={out}", "--config.observe.seed=3"]
    assert command.main(words) == 0 and "5.0% known" in capsys.readouterr().out
    found = toy.config("role", observe__seed=3)
    expected = experiment.source(found, "train", training=True)
    found.observe = {"name": "file", "path": str(out)}
    np.testing.assert_array_equal(experiment.source(found, "train", training=True).labels, expected.labels)


# --- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"name": "knwn"}, "observe.name is 'knwn' .did you mean 'known'"),
        ({"name": "known", "proporton": 0.1}, "no setting 'proporton' .did you mean 'proportion'"),
        ({"name": "known", "proportion": 1.5}, "proportion is 1.5; it is a number from 0 to 1"),
        ({"name": "known", "proportion": -0.1}, "proportion is -0.1"),
        ({"name": "known", "proportion": float("nan")}, "proportion is nan"),
        ({"name": "known", "mode": "hpc"}, "mode is 'hpc' .did you mean 'hcp'"),
        ({"name": "known", "proportion": 0.0}, "No label of toy train .0% known. is known"),
        ({"name": "single_positive", "bias": "sise"}, "did you mean 'size'"),
        ({"name": "single_positive", "negatives": -2}, "negatives is -2"),
        ({"name": "single_positive", "weights": "x.json"}, "is for bias='semantic'"),
        ({"name": "single_positive", "seed": -1}, "seed is -1"),
        ({"name": "candidates", "rate": 2}, "rate is 2"),
    ],
)
def test_wrong_settings(section, said):
    with pytest.raises(UserError, match=said):
        observe.observe(source(), section)


def test_nothing_known_at_all():
    empty = source(observed=np.zeros((60, 7), np.uint8), labels=np.zeros((60, 7), np.uint8))
    with pytest.raises(UserError, match="No label of toy train is known"):
        observe.observe(empty, {"name": "all"})
    no_positives = source(labels=np.zeros((60, 7), np.uint8))
    with pytest.raises(UserError, match="No label of toy train .single positive. is known"):
        observe.observe(no_positives, {"name": "single_positive"})


def test_the_config_checks_its_section_and_takes_overrides():
    found = read_config("configs/baseline.py:smoke")
    override(found, "observe.name", "known")
    override(found, "observe.proportion", "0.2")
    check(found)
    whole = experiment.source(found, "train", training=False)
    seen = experiment.source(found, "train", training=True)
    assert whole.observed.all() and 0.1 < seen.observed.mean() < 0.3
    meta = experiment.make_meta(found, seen)
    assert (meta.observed == seen.observed).all() and not meta.labels[meta.observed == 0].any()
    override(found, "observe.name", "single_positive")  # what `known` alone had is gone
    check(found)
    override(found, "observe.sed", "3")
    with pytest.raises(UserError, match="no setting 'sed' .did you mean 'seed'"):
        check(found)


# --- a CSV that knows a part --------------------------------------------------------------------------------------


def csv(folder, text):
    for name in "abcd":
        (folder / f"{name}.jpg").write_bytes(b"photo")
    (folder / "labels.csv").write_text(text)
    return str(folder / "labels.csv")


def test_csv_with_known_negatives(tmp_path):
    text = "image,labels,negatives,split\na.jpg,dog|cat,,train\nb.jpg,cat,dog,train\nc.jpg,emu,*,train\n"
    text += "d.jpg,dog,cat,val\n"
    found = table("train", file=csv(tmp_path, text))
    assert found.classes == ("cat", "dog", "emu")
    assert found.labels.tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 1]]
    assert found.observed.tolist() == [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    assert found.scored.tolist() == found.observed.tolist()
    renamed = csv(tmp_path, text.replace("negatives", "absent"))
    assert table("train", file=renamed, negatives_column="absent").observed.tolist() == found.observed.tolist()
    with pytest.raises(UserError, match="no column 'absentt' .did you mean 'absent'"):
        table("train", file=renamed, negatives_column="absentt")


def test_csv_with_question_marks(tmp_path):
    text = "image,labels,split\na.jpg,dog|?cat,train\nb.jpg,cat|?,train\nc.jpg,emu,train\nd.jpg,dog,val\n"
    found = table("train", file=csv(tmp_path, text))
    assert found.labels.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]
    assert found.observed.tolist() == [[0, 1, 1], [1, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("a.jpg,dog|cat,cat,train", "Line 2 of .* contradicts itself about 'cat'"),
        ("a.jpg,dog|?dog,,train", "contradicts itself about 'dog'"),
        ("a.jpg,dog|?cat,cat,train", "contradicts itself about 'cat'"),
        ("a.jpg,dog,catt,train", "no image of the split 'train' has: 'catt'"),
    ],
)
def test_csv_that_contradicts_itself(tmp_path, row, said):
    text = f"image,labels,negatives,split\n{row}\nb.jpg,cat,dog,train\nd.jpg,dog,cat,val\n"
    with pytest.raises(UserError, match=said):
        table("train", file=csv(tmp_path, text))
