"""The VOC reader against small trees in the real layout, broken ones, and the real photos."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from mljax import scoring
from mljax.config.base import base
from mljax.data import stats
from mljax.data.voc import CLASSES, apply_policy, voc, write_submission
from mljax.errors import UserError

# id -> objects (class, difficult). 000003 has a difficult dog only, 000005 is empty.
IMAGES = {
    "000001": [("dog", 0), ("person", 0), ("dog", 1)],
    "000002": [("train", 0)],
    "000003": [("dog", 1)],
    "000004": [("tvmonitor", 0), ("person", 1)],
    "000005": [],
}
NAMED = {"variant": "tiny"}


def ternary(name: str) -> np.ndarray:
    """+1, 0, -1 by hand from IMAGES."""
    row = []
    for label in CLASSES:
        flags = [difficult for other, difficult in IMAGES[name] if other == label]
        row.append(-1 if not flags else 1 if 0 in flags else 0)
    return np.array(row)


def annotation(name: str) -> str:
    parts = "<part><name>head</name><bndbox/></part>"  # as in the person layout annotations
    objects = "".join(
        f"<object><name> {label}\n</name>{parts}{f'<difficult>{hard}</difficult>' if hard else ''}</object>"
        for label, hard in IMAGES[name]
    )
    return f"<annotation><filename>{name}.jpg</filename>{objects}</annotation>"


def tree(root: Path, *, year: str = "2007", lists: bool = True, annotations: bool = True) -> Path:
    folder = root / "VOCdevkit" / f"VOC{year}"
    main = folder / "ImageSets" / "Main"
    main.mkdir(parents=True)
    for name in ("JPEGImages", "Annotations"):
        (folder / name).mkdir()
    for name in IMAGES:
        (folder / "JPEGImages" / f"{name}.jpg").write_bytes(b"photo " + name.encode())
        if annotations:
            (folder / "Annotations" / f"{name}.xml").write_text(annotation(name))
    splits = {"trainval": list(IMAGES), "test": ["000004", "000001"]}
    for split, ids in splits.items():
        (main / f"{split}.txt").write_text("\r\n".join(f"{name} " for name in ids) + "\r\n\n")
        for column, label in enumerate(CLASSES if lists else ()):
            # irregular spaces, a tab, another order than the split's, no line end at the end
            lines = [f"{name}\t {ternary(name)[column]:>3}" for name in reversed(ids)]
            (main / f"{label}_{split}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tree(tmp_path)


def root_of(folder: Path) -> str:
    return str(folder.parents[1])


def test_canonical_order():
    assert len(CLASSES) == 20 and CLASSES[14] == "person" and list(CLASSES) == sorted(CLASSES)


@pytest.mark.parametrize("lists", [True, False])
def test_lists_and_annotations_give_the_same_labels(tmp_path: Path, lists: bool):
    folder = tree(tmp_path, lists=lists, annotations=not lists)
    source = voc("trainval", training=True, root=root_of(folder), difficult="V4", **NAMED)
    assert source.name == "tiny trainval" and source.classes == CLASSES and list(source.ids) == list(IMAGES)
    expected = np.stack([ternary(name) for name in IMAGES])
    np.testing.assert_array_equal(source.labels, expected == 1)
    np.testing.assert_array_equal(source.scored, expected != 0)
    assert source.observed.all() and source.labels.dtype == np.uint8
    assert source.read(2) == b"photo 000003"


@pytest.mark.parametrize(
    ("policy", "training", "kept", "dog", "scored"),
    [  # rows 000001, 000002, 000003 (difficult only), 000004, 000005 (empty); the label dog
        ("V1", True, [0, 1, 2, 3, 4], [1, 0, 1, 0, 0], [1, 1, 0, 1, 1]),
        ("V1", False, [0, 1, 2, 3, 4], [1, 0, 0, 0, 0], [1, 1, 0, 1, 1]),
        ("V2", True, [0, 1, 2, 3, 4], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]),
        ("V2", False, [0, 1, 2, 3, 4], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]),
        ("V3", True, [0, 1, 3], [1, 0, 0], [1, 1, 1]),
        ("V3", False, [0, 1, 3], [1, 0, 0], [1, 1, 1]),
        ("V4", True, [0, 1, 2, 3, 4], [1, 0, 0, 0, 0], [1, 1, 0, 1, 1]),
        ("V4", False, [0, 1, 2, 3, 4], [1, 0, 0, 0, 0], [1, 1, 0, 1, 1]),
    ],
)
def test_policies(folder: Path, policy, training, kept, dog, scored):
    source = voc("trainval", training=training, root=root_of(folder), difficult=policy, **NAMED)
    column = CLASSES.index("dog")
    assert list(source.ids) == [list(IMAGES)[row] for row in kept]
    assert source.labels[:, column].tolist() == dog
    assert source.scored[:, column].tolist() == scored
    assert source.read(len(kept) - 1) == f"photo {source.ids[-1]}".encode()


def test_policy_of_every_value():
    kept, labels, scored = apply_policy(np.array([[1, 0, -1], [-1, 0, -1]]), "V1", training=True)
    assert kept.tolist() == [0, 1] and labels.tolist() == [[1, 1, 0], [0, 1, 0]]
    assert scored.tolist() == [[1, 0, 1], [1, 0, 1]]


@pytest.mark.parametrize("up", [0, 1, 2])
def test_root_may_be_any_of_three_folders(folder: Path, up: int):
    root = [folder, *folder.parents][up]
    assert len(voc("test", training=False, root=str(root), **NAMED)) == 2


def test_root_from_the_environment(folder: Path, monkeypatch):
    monkeypatch.setenv("MLJAX_DATA", root_of(folder))
    assert len(voc("test", training=False, **NAMED)) == 2
    monkeypatch.delenv("MLJAX_DATA")
    with pytest.raises(UserError, match=r"set 'root'.*MLJAX_DATA"):
        voc("test", training=False, **NAMED)


def test_lists_spare_the_annotations(folder: Path):
    shutil.rmtree(folder / "Annotations")
    assert len(voc("trainval", training=True, root=root_of(folder), **NAMED)) == 5


def test_fingerprint_follows_the_images(folder: Path):
    def read() -> str:
        return voc("trainval", training=True, root=root_of(folder), **NAMED).fingerprint

    before = read()
    assert read() == before
    (folder / "JPEGImages" / "000002.jpg").write_bytes(b"another photo")
    assert read() != before


def test_official_sizes_are_insisted_on(folder: Path):
    with pytest.raises(UserError, match=r"test.txt.* has 2 images, but VOC2007 test has 4952.*variant='VOC2007 re"):
        voc("test", training=False, root=root_of(folder))
    with pytest.raises(UserError, match="name of the official splits"):
        voc("test", training=False, root=root_of(folder), variant="VOC2007")


def test_year_2012(tmp_path: Path):
    folder = tree(tmp_path, year="2012", lists=False)
    for path in (folder / "Annotations").iterdir():
        path.unlink()
    source = voc("test", training=False, root=root_of(folder), year="2012", difficult="V3", **NAMED)
    assert source.name == "tiny test (unlabelled)" and len(source) == 2
    assert not source.labels.any() and not source.observed.any() and not source.scored.any()
    with pytest.raises(UserError, match="no public labels"):
        voc("test", training=True, root=root_of(folder), year="2012", **NAMED)
    with pytest.raises(UserError, match=r"years 2007 and 2012.*'2011'"):
        voc("test", training=False, root=root_of(folder), year="2011", **NAMED)
    with pytest.raises(UserError, match=r"There is no 'VOCdevkit/VOC2007'"):
        voc("test", training=False, root=str(folder), **NAMED)


def test_submission_of_2012_test(tmp_path: Path):
    """The server's files: one a class, `id score` lines in the order of the list."""
    folder = tree(tmp_path, year="2012", lists=False, annotations=False)
    source = voc("test", training=False, root=root_of(folder), year="2012", **NAMED)
    scores = np.arange(40, dtype=np.float32).reshape(2, 20) / 8 - 1
    paths = write_submission(tmp_path / "run", source, scores)
    place = tmp_path / "run" / "results" / "VOC2012" / "Main"
    assert paths == [place / f"comp1_cls_test_{name}.txt" for name in CLASSES]
    assert (place / "comp1_cls_test_dog.txt").read_text() == "000004 0.375000\n000001 2.875000\n"
    assert write_submission(tmp_path, source, scores, competition="comp2")[0].name == "comp2_cls_test_aeroplane.txt"
    with pytest.raises(UserError, match="no classification task 'comp3'"):
        write_submission(tmp_path, source, scores, competition="comp3")
    with pytest.raises(UserError, match="not finite"):
        write_submission(tmp_path, source, scores * np.nan)


def test_evaluation_of_2012_test_writes_the_submission(tmp_path: Path, capsys):
    folder = tree(tmp_path, year="2012", lists=False, annotations=False)
    source = voc("test", training=False, root=root_of(folder), year="2012", **NAMED)
    config = base()
    config.data = {"name": "voc", "year": "2012"}
    scoring.write(tmp_path, np.zeros((2, 20), np.float32), source, config, by="last", step=1)
    said = capsys.readouterr().out
    assert "no labels here, so nothing is measured" in said and "20 files for the evaluation server" in said
    place = tmp_path / "results" / "VOC2012" / "Main"
    assert (place / "comp1_cls_test_cow.txt").read_text() == "000004 0.000000\n000001 0.000000\n"


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def without_lists(folder: Path, name: str, *change: str) -> None:
    """Only annotations are left, and one of them is changed, or removed."""
    for path in (folder / "ImageSets" / "Main").glob("*_*.txt"):
        path.unlink()
    path = folder / "Annotations" / name
    edit(path, *change) if change else path.unlink()


BROKEN = {  # what happens to (folder, main) -> what the sentence says
    "images": (
        lambda folder, main: [(folder / "JPEGImages" / f"00000{i}.jpg").unlink() for i in (2, 4)],
        r"names 5 images, of which 2 are not there, first .*000002.jpg'.*000004.jpg'",
    ),
    "split": (lambda _, main: (main / "trainval.txt").rename(main / "trainvl.txt"), "did you mean 'trainvl'"),
    "folder": (lambda _, main: shutil.rmtree(main), r"There is no folder .*Main'"),
    "a list": (lambda _, main: (main / "dog_trainval.txt").unlink(), r"19 of 20 classes.*without 'dog_trainval.txt'"),
    "lacking": (lambda _, main: edit(main / "dog_trainval.txt", "000002", "000009"), r"lacks 1 images, first '000002'"),
    "more": (
        lambda _, main: edit(main / "dog_trainval.txt", "000002", "09 1\n000002"),
        r"also names 1 images, first '09'",
    ),
    "value": (lambda _, main: edit(main / "dog_trainval.txt", "-1", "x"), r"Line \d of .*dog_trainval.txt' is "),
    "twice": (lambda _, main: edit(main / "trainval.txt", "000002", "000001"), "names images twice: '000001'"),
    "empty": (lambda _, main: (main / "trainval.txt").write_text("\n"), "is empty"),
    "binary": (lambda _, main: (main / "trainval.txt").write_bytes(b"\xff\xd8"), "not a text file"),
    "annotation": (lambda folder, _: without_lists(folder, "000003.xml"), r"1 of 5 annotations.*first '000003.xml'"),
    "xml": (lambda folder, _: without_lists(folder, "000001.xml", "</", "<"), "not valid XML"),
    "class": (
        lambda folder, _: without_lists(folder, "000001.xml", "dog", "dgo"),
        r"'dgo', which is not a VOC class \(did you mean 'dog'\?\)",
    ),
}


@pytest.mark.parametrize("what", list(BROKEN))
def test_broken_trees(folder: Path, what: str):
    act, message = BROKEN[what]
    act(folder, folder / "ImageSets" / "Main")
    with pytest.raises(UserError, match=message):
        voc("trainval", training=True, root=root_of(folder), **NAMED)


def test_unknown_policy(folder: Path):
    with pytest.raises(UserError, match="'V5'"):
        voc("test", training=False, root=root_of(folder), difficult="V5", **NAMED)


def test_real_resplit(real_data: Path):
    lists = Path(__file__).parents[1] / "benchmarks" / "voc_resplit"
    official = np.load(real_data / "labels" / "voc2007_labels.npz")
    known = dict(zip(official["test_ids"].tolist(), official["test_labels"]))
    for split, count in (("trainval", 2500), ("test", 1200)):
        source = voc(split, training=split != "test", root=str(real_data), variant="VOC2007 re-split", difficult="V4")
        assert len(source) == count and source.name == f"VOC2007 re-split {split}"
        assert (lists / f"{split}.txt").read_text().split() == list(source.ids)
        expected = np.stack([known[name] for name in source.ids])  # the re-split is of the official test split
        np.testing.assert_array_equal(source.labels, expected == 1)
        np.testing.assert_array_equal(source.scored, expected != 0)
        assert source.read(0)[:2] == b"\xff\xd8"


def test_real_annotations_agree_with_the_lists(real_data: Path, tmp_path: Path):
    """60 real annotations, read as XML, give what the class lists say."""
    real = real_data / "VOCdevkit" / "VOC2007"
    folder = tmp_path / "VOC2007"
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    for name in ("JPEGImages", "Annotations"):
        (folder / name).symlink_to(real / name)
    lists = voc("test", training=True, root=str(real_data), variant="VOC2007 re-split")
    (folder / "ImageSets" / "Main" / "test.txt").write_text("\n".join(lists.ids[:60]))
    read = voc("test", training=True, root=str(folder), variant="60 photos")
    np.testing.assert_array_equal(read.labels, lists.labels[:60])
    np.testing.assert_array_equal(read.scored, lists.scored[:60])


@pytest.mark.parametrize("split", ["trainval", "test"])
def test_official_lists_as_published(real_data: Path, tmp_path: Path, split: str):
    """All official ids and labels, written as the devkit has them, are read back and have the published counts."""
    with np.load(real_data / "labels" / "voc2007_labels.npz") as official:
        ids, ternary = official[f"{split}_ids"].tolist(), official[f"{split}_labels"]
    main = tmp_path / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main"
    main.mkdir(parents=True)
    (tmp_path / "VOCdevkit" / "VOC2007" / "JPEGImages").mkdir()
    (main / f"{split}.txt").write_text("".join(f"{name}\n" for name in ids))
    for name, column in zip(CLASSES, ternary.T):
        (main / f"{name}_{split}.txt").write_text("".join(f"{i} {v:2d}\n" for i, v in zip(ids, column)))
    for name in ids:
        (tmp_path / "VOCdevkit" / "VOC2007" / "JPEGImages" / f"{name}.jpg").touch()
    source = voc(split, training=False, root=str(tmp_path))
    assert source.name == f"VOC2007 {split}" and len(source) == {"trainval": 5011, "test": 4952}[split]
    np.testing.assert_array_equal(source.labels, ternary == 1)
    fine, wrong = stats.check(source)
    assert not wrong and len(fine) == 2 and "each of its 20 classes" in fine[1]
