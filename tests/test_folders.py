"""Images in class folders."""

import os
from pathlib import Path

import pytest

from mljax.data.folders import folders
from mljax.errors import UserError


def make(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"photo " + path.name.encode())
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make(
        tmp_path, "train/dog/1.jpg", "train/cat/2.JPG", "train/cat/3.png", "val/dog/9.jpg", "train/cat/notes.txt"
    )


def test_one_label(root: Path):
    source = folders("train", root=str(root))
    assert source.classes == ("cat", "dog") and list(source.ids) == ["cat/2.JPG", "cat/3.png", "dog/1.jpg"]
    assert source.labels.tolist() == [[1, 0], [1, 0], [0, 1]] and source.observed.all() and source.scored.all()
    assert source.read(2) == b"photo 1.jpg" and source.name == f"{root.name} train"
    assert folders("val", root=str(root)).labels.tolist() == [[0, 1]]
    assert folders("val", root=str(root), classes=("dog", "emu", "cat")).labels.tolist() == [[1, 0, 0]]


def test_the_same_photo_in_several_folders_has_all_their_labels(root: Path):
    make(root, "train/dog/2.JPG", "train/free.jpg", "train/3.png")
    os.symlink(root / "train/dog/1.jpg", root / "train/cat/1.jpg")
    source = folders("train", root=str(root))
    assert dict(zip(source.ids, source.labels.tolist())) == {
        "cat/1.jpg": [1, 1],
        "cat/2.JPG": [1, 1],
        "cat/3.png": [1, 0],  # lies in the split's folder too
        "free.jpg": [0, 0],
    }


def test_different_photos_of_the_same_name_stay_two(root: Path):
    (root / "train/dog/3.png").write_bytes(b"photo 4.png")  # as long as the other, and not it
    source = folders("train", root=str(root))
    assert dict(zip(source.ids, source.labels.tolist()))["cat/3.png"] == [1, 0]
    assert dict(zip(source.ids, source.labels.tolist()))["dog/3.png"] == [0, 1]


def test_errors(root: Path):
    def fails(message: str, split: str = "train", **settings):
        with pytest.raises(UserError, match=message):
            folders(split, **{"root": str(root), **settings})

    fails(r"no split 'vla' .*did you mean 'val'", split="vla")
    fails("not a folder", root=str(root / "nowhere"))
    fails("no folder 'trian'.*did you mean 'train'", train_split="trian")
    fails("names a label twice", classes=("dog", "cat", "dog"))
    fails(r"'classes' does not have: 'cat'", classes=("dog",))
    (root / "empty").mkdir()
    fails("holds no images", split="empty")
    fails("no class folders", split="empty", train_split="empty")
    make(root, "val/emu/5.jpg")
    fails(r"the split 'train' does not have: 'emu'", split="val")
    os.symlink(root / "gone.jpg", root / "train/cat/gone.jpg")
    fails(r"4 images, of which 1 are not there, first .*gone.jpg'.*broken links")
    (root / "train/Dog").mkdir()
    fails(r"hold no images: 'Dog'")
    make(root, "train/Dog/6.jpg")
    fails(r"two ways, 'Dog' and 'dog'")
