"""What readers hand on: labels that are labels, and names that a terminal can show."""

import dataclasses

import numpy as np
import pytest

from mljax.data import splits
from mljax.data.source import Source, checked
from mljax.data.stats import describe
from mljax.errors import UserError, printable

SCENES = {"name": "scenes", "train_images": 3}


def source(labels, **changes):
    ones = np.ones((3, 2), np.uint8)
    return Source(**{
        "name": "own", "classes": ("cat", "dog"), "ids": ["a", "b", "c"], "labels": np.asarray(labels),
        "observed": ones, "scored": ones, "read": lambda row: b"", "fingerprint": "x", **changes,
    })  # fmt: skip


GOOD = np.array([[0, 1], [1, 1], [0, 0]], np.uint8)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, bool, np.float32])
def test_labels_of_any_kind(dtype):
    assert len(checked(source(GOOD.astype(dtype)))) == 3
    assert len(checked(source(GOOD * np.float32(0.25)))) == 3  # soft ones


@pytest.mark.parametrize(
    ("value", "dtype", "says"),
    [
        (2, np.uint8, "labels 2 for 'dog' in row 1 .'b'.; expected 0 or 1"),
        (-1, np.int8, "labels -1 for 'dog' in row 1"),
        (255, np.uint8, "labels 255"),
        (1.5, np.float32, "labels 1.5 for 'dog' in row 1 .'b'.; expected 0 to 1"),
        (np.nan, np.float32, "labels nan for 'dog' in row 1"),
        (np.inf, np.float32, "labels inf"),
    ],
)
def test_labels_that_are_none(value, dtype, says):
    labels = GOOD.astype(dtype)
    labels[1, 1] = value
    with pytest.raises(UserError, match=f"own has {says}"):
        checked(source(labels))
    with pytest.raises(UserError, match="own has observed"):
        checked(source(GOOD, observed=labels))
    with pytest.raises(UserError, match=r"own has labels of shape .3, 1.; expected .3, 2., images and classes"):
        checked(source(GOOD[:, :1]))


def test_the_splits_of_every_reader_are_checked(monkeypatch):
    wrong = dataclasses.replace(splits.load(SCENES, "train"))
    wrong.labels[2, 4] = 3
    monkeypatch.setattr(splits, "build", lambda *args, **kwargs: wrong)
    for split in ("train", "train[1:]", "train[spml:train]"):
        with pytest.raises(UserError, match="scenes train has labels 3 for .* in row 2 "):
            splits.load(SCENES, split)


def test_what_is_not_a_name():
    with pytest.raises(UserError, match="The split 5 is not a name"):
        splits.load(SCENES, 5)  # pyright: ignore[reportArgumentType]
    for root in (7, ["a"], "a\0b"):
        with pytest.raises(UserError, match="data folder .* is not a path"):
            splits.load({"name": "folders", "root": root}, "train")


HOSTILE = "\x1b[31mred\x07 \u202eltr\r\n\u2028\x9b2J"


def test_control_characters_never_reach_a_terminal():
    shown = r"\x1b[31mred\x07 \u202eltr\r\n\u2028\x9b2J"
    assert printable(HOSTILE) == shown and printable("tv monitor, Käse, 犬") == "tv monitor, Käse, 犬"
    assert printable("caf\udce9") == r"caf\udce9"
    assert str(UserError(f"a {HOSTILE}")) == "a " + shown
    text = describe([source(GOOD, classes=(HOSTILE, "dog"))])
    assert shown in text and not set(text) & set("\x1b\x07\u202e\r\u2028\x9b")
