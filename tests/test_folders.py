"""Images in class folders."""

import hashlib
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


def test_a_share_is_held_out_by_file_name(tmp_path: Path):
    """The same photos whatever is added; one that lies in two folders is on one side."""
    make(tmp_path, *(f"train/{'dog' if i % 2 else 'cat'}/{i}.jpg" for i in range(400)), "train/dog/0.jpg")

    def ids(split: str) -> set[str]:
        source = folders(split, root=str(tmp_path), val_share=0.2)
        assert source.classes == ("cat", "dog") and source.name == f"{tmp_path.name} {split}"
        rows = [[int(i % 2 == 0), int(i % 2 or i == 0)] for i in (int(name[4:-4]) for name in source.ids)]
        assert source.labels.tolist() == rows
        return set(source.ids)

    train, val = ids("train"), ids("val")
    assert not train & val and len(train | val) == 400 and 50 < len(val) < 110  # five standard deviations about 80
    expected = {
        name for name in train | val if int(hashlib.sha256(name[4:].encode()).hexdigest()[:12], 16) < 0.2 * 16**12
    }
    assert val == expected
    make(tmp_path, *(f"train/cat/new{i}.jpg" for i in range(50)))
    assert {n for n in folders("val", root=str(tmp_path), val_share=0.2).ids if "new" not in n} == val


def test_without_a_folder_val_the_way_on_is_told(tmp_path: Path):
    make(tmp_path, "train/dog/1.jpg", "train/cat/2.jpg")

    def said(split: str, **settings) -> str:
        with pytest.raises(UserError) as error:
            folders(split, root=str(tmp_path), **settings)
        return str(error.value)

    told = said("val")
    assert told.startswith(
        f"There is no split 'val' in {str(tmp_path)!r} (available: train): make it, or set val_share=0.2"
    )
    assert "--config.data.val_share=0.2" in told and "a fifth of 'train'" in told
    assert "val_share" not in said("test")
    assert "there are the splits 'train' and 'val', not 'test'" in said("test", val_share=0.2)
    assert "There is no split 'trian'" in said("train", val_share=0.2, train_split="trian")
    assert "val_share=1.5 is not a share" in said("val", val_share=1.5)
    assert "leaves 'val' without a photo" in said("val", val_share=1e-9)
    (tmp_path / "val").mkdir()
    assert said("val").endswith("or remove it and set val_share=0.2.")
    assert "has a folder 'val', so val_share=0.2 is not needed" in said("val", val_share=0.2)


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
