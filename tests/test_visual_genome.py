"""VG-200 and VG-500 on a small tree in the layout of SSGRL and SST."""

import json
from pathlib import Path

import numpy as np
import pytest

from mljax.data.visual_genome import visual_genome
from mljax.errors import UserError

LABELS = {"1.jpg": [0, 199], "2.jpg": [3], "2410753.jpg": [], "9.jpg": [7]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "vg"
    for name in ("VG_100K", "VG_100K_2"):
        (folder / name).mkdir(parents=True)
    (folder / "train_list_500.txt").write_text("2.jpg\r\n1.jpg \r\n2410753.jpg")  # no newline at the end
    (folder / "test_list_500.txt").write_text("9.jpg\n")
    (folder / "vg_category_200_labels_index.json").write_text(json.dumps(LABELS))
    (folder / "vg_category_500_labels_index.json").write_text(json.dumps(LABELS | {"2.jpg": [499]}))
    for name in LABELS:
        (folder / ("VG_100K_2" if name == "1.jpg" else "VG_100K") / name).write_bytes(b"photo " + name.encode())
    return folder


def test_lists_and_labels(folder):
    source = visual_genome("train", root=str(folder.parent))
    assert source.name == "VG-200 train" and source.ids == ["2.jpg", "1.jpg", "2410753.jpg"]
    assert [np.flatnonzero(row).tolist() for row in source.labels] == [[3], [0, 199], []]
    assert source.labels.shape == (3, 200) and source.classes[3] == "label 3"
    assert source.read(1) == b"photo 1.jpg" and source.read(2) == b"photo 2410753.jpg"
    larger = visual_genome("train", root=str(folder), size=500)
    assert larger.labels.shape == (3, 500) and np.flatnonzero(larger.labels[0]).tolist() == [499]
    assert len(visual_genome("test", root=str(folder))) == 1


def test_names_of_labels(folder):
    (folder / "vg_category_200.txt").write_text("\n".join(f"thing {i}" for i in range(200)))
    assert visual_genome("test", root=str(folder)).classes[199] == "thing 199"
    (folder / "mine.txt").write_text("\n".join(["a b", "a-b", *(f"thing {i}" for i in range(198))]))
    with pytest.raises(UserError, match="one label spelled in two ways"):
        visual_genome("test", root=str(folder), names="mine.txt")
    (folder / "mine.txt").write_text("a\na\n")
    with pytest.raises(UserError, match="names 'a' twice"):
        visual_genome("test", root=str(folder), names="mine.txt")
    (folder / "mine.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match="has 2 names, where 200"):
        visual_genome("test", root=str(folder), names="mine.txt")


def test_absent_images(folder):
    (folder / "VG_100K" / "2.jpg").unlink()
    with pytest.raises(UserError, match=r"of which 1 are not there, first .*2.jpg"):
        visual_genome("train", root=str(folder))
    source = visual_genome("train", root=str(folder), absent="drop")
    assert source.name == "VG-200 train (1 not on disk left out)" and source.ids == ["1.jpg", "2410753.jpg"]
    assert np.flatnonzero(source.labels[0]).tolist() == [0, 199]


def table(folder: Path, text: str) -> None:
    (folder / "vg_category_200_labels_index.json").write_text(text)


BROKEN = {
    "other set": (lambda f: table(f, json.dumps({"7.jpg": [1]})), "has no labels for '2.jpg'"),
    "outside": (lambda f: table(f, json.dumps(LABELS | {"1.jpg": [200]})), r"'1.jpg' the label 200, outside 0..199"),
    "negative": (lambda f: table(f, json.dumps(LABELS | {"1.jpg": [-1]})), "the label -1, outside"),
    "cut short": (lambda f: table(f, json.dumps(LABELS)[:-9]), "cannot be read as label indices"),
    "a list": (lambda f: table(f, "[]"), "a table of file names is expected"),
    "twice": (lambda f: (f / "train_list_500.txt").write_text("1.jpg\n1.jpg"), "names '1.jpg' twice"),
    "empty": (lambda f: (f / "train_list_500.txt").write_text(" \n"), "is empty"),
    "images": (lambda f: [(f / n).rename(f / f"x{n}") for n in ("VG_100K", "VG_100K_2")], "no folder .*VG_100K"),
    "list": (lambda f: (f / "train_list_500.txt").unlink(), "no vg/train_list_500.txt under"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_trees(folder, what):
    act, message = BROKEN[what]
    act(folder)
    with pytest.raises(UserError, match=message):
        visual_genome("train", root=str(folder))


def test_choices_that_do_not_exist(folder):
    with pytest.raises(UserError, match="200 or 500 labels here, not 256"):
        visual_genome("train", root=str(folder), size=256)
    with pytest.raises(UserError, match="no split 'val'"):
        visual_genome("val", root=str(folder))
    with pytest.raises(UserError, match="folder of images .* is not there"):
        visual_genome("train", root=str(folder), images="photos")
