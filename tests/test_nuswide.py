"""NUS-WIDE in its three forms, on small trees in the real layouts, with the irregularities that these have."""

from pathlib import Path

import numpy as np
import pytest

from mljax.data.nuswide import CLASSES, nuswide
from mljax.errors import UserError

# image -> labels; the third has none of the 81 and is dropped where only labelled images count
TRAIN = {"actor\\0001_2124494179.jpg": ["person", "sky"], "zoo\\0002_1.jpg": ["zebra"], "zoo\\0003_2.jpg": []}
TEST = {"actor\\0004_3.jpg": ["airport"], "zoo\\0005_4.jpg": ["person", "zebra"]}
PHOTO = b"photo of "


def write_photos(folder: Path, names) -> None:
    for name in names:
        path = folder / name.replace("\\", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PHOTO + path.name.encode())


def official(root: Path, *, every: bool = False) -> Path:
    folder = root / "NUS-WIDE"
    lists, labels = folder / "ImageList", folder / "Groundtruth" / ("AllLabels" if every else "TrainTestLabels")
    for place in (lists, labels):
        place.mkdir(parents=True)
    write_photos(folder / "Flickr", [*TRAIN, *TEST])
    together = dict(sorted({**TRAIN, **TEST}.items(), reverse=True))  # Imagelist.txt has an order of its own
    for name, images in (("TrainImagelist", TRAIN), ("TestImagelist", TEST), ("Imagelist", together)):
        (lists / f"{name}.txt").write_text(" \r\n".join(images))  # no newline at the end, spaces before the others
    (folder / "Concepts81.txt").write_text("\n".join(CLASSES))
    parts = {"": together} if every else {"_Train": TRAIN, "_Test": TEST}
    for part, images in parts.items():
        for concept in CLASSES:
            lines = [str(int(concept in names)) for names in images.values()]
            (labels / f"Labels_{concept}{part}.txt").write_text("\n".join(lines) + "\n")
    return folder


def csv_tree(root: Path) -> Path:
    folder = root / "nus_wide"
    rows = [
        "filepath,label,split_name",
        "images/0001.jpg,\"['clouds', 'sky']\",train",
        "images/0002.jpg,\"['zebra']\",val",
        "",
        "images/0003.jpg,\"['sky']\",train",
    ]
    folder.mkdir(parents=True)
    (folder / "nus_wid_data.csv").write_text("\n".join(rows))
    write_photos(folder, [f"images/000{i}.jpg" for i in (1, 2, 3)])
    return folder


def arrays(root: Path) -> Path:
    folder = root / "nuswide"
    folder.mkdir()
    labels = np.zeros((2, 81))
    labels[0, [3, 5]] = labels[1, 80] = 1
    seen = labels.copy()
    seen[0, 5] = 0
    for split in ("train", "val"):
        np.save(folder / f"formatted_{split}_images.npy", np.array(["a/1.jpg", "b/2.jpg"]))
        np.save(folder / f"formatted_{split}_labels.npy", labels)
        np.save(folder / f"formatted_{split}_labels_obs.npy", seen)
    write_photos(folder / "Flickr", ["a/1.jpg", "b/2.jpg"])
    return folder


def named(source):
    return [{CLASSES[i] for i in np.flatnonzero(row)} for row in source.labels]


def test_classes():
    assert len(CLASSES) == len(set(CLASSES)) == 81 and list(CLASSES) == sorted(CLASSES)


@pytest.mark.parametrize("every", [False, True])
def test_official_lists(tmp_path, every):
    official(tmp_path, every=every)
    source = nuswide("train", training=True, root=str(tmp_path))
    assert source.name == "NUS-WIDE official train" and source.ids == ["actor/0001_2124494179.jpg", "zoo/0002_1.jpg"]
    assert named(source) == [{"person", "sky"}, {"zebra"}] and source.observed.all()
    assert source.read(1) == PHOTO + b"0002_1.jpg"
    whole = nuswide("train", training=True, root=str(tmp_path), annotated_only=False)
    assert len(whole) == 3 and whole.name == "NUS-WIDE official train (all images)"
    assert named(nuswide("test", training=False, root=str(tmp_path / "NUS-WIDE"))) == [{"airport"}, {"person", "zebra"}]


def test_absent_images(tmp_path):
    folder = official(tmp_path)
    (folder / "Flickr" / "zoo" / "0002_1.jpg").unlink()
    with pytest.raises(UserError, match=r"names 2 images, of which 1 are not there.*absent='drop'"):
        nuswide("train", training=True, root=str(tmp_path))
    source = nuswide("train", training=True, root=str(tmp_path), absent="drop")
    assert source.name == "NUS-WIDE official train (1 not on disk left out)" and len(source) == 1
    with pytest.raises(UserError, match="absent='dorp' does not exist .did you mean 'drop'"):
        nuswide("train", training=True, root=str(tmp_path), absent="dorp")
    (folder / "Flickr" / "actor" / "0001_2124494179.jpg").unlink()
    with pytest.raises(UserError, match="names 2 images, of which none is there"):
        nuswide("train", training=True, root=str(tmp_path), absent="drop")


def test_csv_of_asl(tmp_path):
    csv_tree(tmp_path)
    source = nuswide("train", training=True, root=str(tmp_path), variant="asl")
    assert source.name == "NUS-WIDE asl train" and named(source) == [{"clouds", "sky"}, {"sky"}]
    assert source.classes == CLASSES and source.read(1) == PHOTO + b"0003.jpg"
    assert named(nuswide("val", training=False, root=str(tmp_path), variant="asl")) == [{"zebra"}]


def test_arrays_of_spml(tmp_path):
    arrays(tmp_path)
    source = nuswide("train", training=True, root=str(tmp_path), variant="spml")
    assert named(source) == [{"bear", "boats"}, {"zebra"}] and source.observed.all()
    single = nuswide("train", training=True, root=str(tmp_path), variant="spml", single_positive=True)
    assert np.argwhere(single.observed).tolist() == [[0, 3], [1, 80]]
    assert nuswide("val", training=False, root=str(tmp_path), variant="spml", single_positive=True).observed.all()


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


LABELS = "Groundtruth/TrainTestLabels/Labels_zebra_Train.txt"
BROKEN = {
    "list": (lambda f: (f / "ImageList/TrainImagelist.txt").unlink(), "TrainImagelist.txt' cannot be read"),
    "empty": (lambda f: (f / "ImageList/TrainImagelist.txt").write_text("\n"), "is empty"),
    "twice": (lambda f: change(f / "ImageList/TrainImagelist.txt", "0003_2", "0002_1"), "names 'zoo/0002_1.jpg' twice"),
    "cut short": (lambda f: (f / LABELS).write_text("0\n1"), "has 2 lines against 3 images of TrainImagelist.txt"),
    "not a digit": (lambda f: (f / LABELS).write_text("0\n1\nx"), "has a line that is neither 0 nor 1"),
    "two in a line": (lambda f: (f / LABELS).write_text("0\n11\n"), "has a line that is neither 0 nor 1"),
    "concept file": (lambda f: (f / LABELS).unlink(), "Labels_zebra_Train.txt' cannot be read"),
    "labels": (lambda f: (f / "Groundtruth").rename(f / "Truth"), "neither TrainTestLabels nor AllLabels"),
    "unknown class": (lambda f: change(f / "Concepts81.txt", "zebra", "zebras"), "'zebras', not one of NUS-WIDE's 81"),
    "one name twice": (lambda f: change(f / "Concepts81.txt", "zebra", "train"), "names 'train' twice"),
    "order": (lambda f: change(f / "Concepts81.txt", "airport\nanimal", "animal\nairport"), "another order"),
    "binary": (lambda f: (f / "ImageList/TrainImagelist.txt").write_bytes(b"\xff\xd8"), "not a text file"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_official_trees(tmp_path, what):
    act, message = BROKEN[what]
    act(official(tmp_path))
    with pytest.raises(UserError, match=message):
        nuswide("train", training=True, root=str(tmp_path))


CSV = {
    "label": ("'zebra'", "'zebr'", "Line 3 .* the label 'zebr', not one of NUS-WIDE's 81 .did you mean 'zebra'"),
    "twice": ("0003", "0001", "'images/0001.jpg' twice, in lines 2 and 5"),
    "fields": (",val", "", "Line 3 .* has 2 fields"),
    "split": (",val", ",test", "no images in the split 'val'"),
}


@pytest.mark.parametrize("what", CSV)
def test_broken_csv(tmp_path, what):
    old, new, message = CSV[what]
    change(csv_tree(tmp_path) / "nus_wid_data.csv", old, new)
    with pytest.raises(UserError, match=message):
        nuswide("val", training=False, root=str(tmp_path), variant="asl")


def test_broken_arrays(tmp_path):
    folder = arrays(tmp_path)
    seen = np.ones((2, 81))
    np.save(folder / "formatted_train_labels_obs.npy", seen)
    with pytest.raises(UserError, match="has labels that labels.npy has not"):
        nuswide("train", training=True, root=str(tmp_path), variant="spml", single_positive=True)
    np.save(folder / "formatted_train_labels.npy", seen[:, :20])
    with pytest.raises(UserError, match=r"has shape \(2, 20\)"):
        nuswide("train", training=True, root=str(tmp_path), variant="spml")
    path = folder / "formatted_train_images.npy"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match="cannot be read as an array of paths"):
        nuswide("train", training=True, root=str(tmp_path), variant="spml")


def test_choices_that_do_not_exist(tmp_path):
    official(tmp_path)
    with pytest.raises(UserError, match="no variant 'oficial' .did you mean 'official'"):
        nuswide("train", training=True, root=str(tmp_path), variant="oficial")
    with pytest.raises(UserError, match=r"NUS-WIDE .asl. has no split 'test'"):
        nuswide("test", training=False, root=str(tmp_path), variant="asl")
    with pytest.raises(UserError, match="no nus_wide/nus_wid_data.csv under"):
        nuswide("train", training=True, root=str(tmp_path), variant="asl")
    with pytest.raises(UserError, match="single_positive belongs to variant='spml'"):
        nuswide("train", training=True, root=str(tmp_path), single_positive=True)
    with pytest.raises(UserError, match="folder of images .* is not there"):
        nuswide("train", training=True, root=str(tmp_path), images="photos")
