"""What changed since a run began: every kind of change is seen, and nothing else."""

import dataclasses
import time
import zlib

import numpy as np
import pytest

from mljax.data import fingerprint
from mljax.data.source import Files, Source
from mljax.errors import UserError

CLASSES = ("cat", "dog", "ox")


@pytest.fixture
def source(tmp_path):
    return files(tmp_path / "photos", 100)


def files(folder, count, seed=0):
    folder.mkdir()
    rng, paths = np.random.default_rng(seed), []
    for i in range(count):
        paths.append(str(folder / f"{i}.jpg"))
        (folder / f"{i}.jpg").write_bytes(rng.bytes(200 + i % 7))
    labels = rng.integers(0, 2, (count, 3)).astype(np.uint8)
    ones = np.ones_like(labels)
    return Source(
        name="own", classes=CLASSES, ids=[f"{seed}/{i}.jpg" for i in range(count)], labels=labels, observed=ones,
        scored=ones, read=Files(paths), fingerprint="x",
    )  # fmt: skip


def test_a_record(source):
    one = fingerprint.record(source)
    assert one["classes"] == list(CLASSES) and one["count"] == 100
    assert one["rows"].shape == (100,) and one["rows"].dtype == np.uint32
    assert len(one["images"]) == fingerprint.SAMPLE and set(one["images"]) < set(range(100))
    for row, crc in one["images"].items():
        assert crc == zlib.crc32(source.read(row))
    again = fingerprint.record(source)
    assert again["images"] == one["images"] and (again["rows"] == one["rows"]).all()
    assert len(fingerprint.record(source, "whole")["images"]) == 100
    assert fingerprint.record(source, "none")["images"] == {}
    with pytest.raises(UserError, match="images is 'all'; expected one of none, sampled, whole"):
        fingerprint.record(source, "all")


def test_rows_that_changed_and_no_others(source):
    before = fingerprint.record(source, "none")["rows"]

    def changed(**values):
        return np.flatnonzero(fingerprint.row_sums(dataclasses.replace(source, **values)) != before).tolist()

    labels, observed, ids = source.labels.copy(), source.observed.copy(), list(source.ids)
    labels[7, 1] ^= 1
    observed[9, 2] = 0
    ids[11] = "other.jpg"
    assert changed() == []
    assert changed(labels=labels) == [7] and changed(observed=observed) == [9] and changed(ids=ids) == [11]
    assert len(changed(ids=ids[::-1])) >= 99 and changed(classes=("dog", "cat", "ox")) == []
    soft = source.labels.astype(np.float32)
    one = fingerprint.row_sums(dataclasses.replace(source, labels=soft))
    soft[3, 0] += 0.25
    assert np.flatnonzero(fingerprint.row_sums(dataclasses.replace(source, labels=soft)) != one).tolist() == [3]
    assert len(fingerprint.record(source.subset(np.arange(0), "[]"))["rows"]) == 0


def test_images_that_changed_or_went(source, tmp_path):
    before = fingerprint.record(source, "whole")["images"]
    path = tmp_path / "photos" / "5.jpg"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    (tmp_path / "photos" / "6.jpg").unlink()
    after = fingerprint.record(source, "whole")["images"]
    assert 6 not in after and [row for row in after if after[row] != before[row]] == [5]


def test_a_hundred_thousand_rows_are_quick(source):
    big = source.subset(np.arange(100_000) % 100, "")
    began = time.process_time()
    assert len(fingerprint.record(big)["rows"]) == 100_000
    assert time.process_time() - began < 2


def test_the_same_photos_in_both_splits(source, tmp_path):
    other = files(tmp_path / "other", 30, seed=1)
    assert fingerprint.overlap(source, other) == 0
    assert fingerprint.overlap(source, source.subset(np.arange(5), "[:5]")) == 5
    for i in (3, 8):  # the same bytes under other names
        (tmp_path / "other" / f"{i}.jpg").write_bytes((tmp_path / "photos" / f"{40 + i}.jpg").read_bytes())
    assert fingerprint.overlap(source, other) == 2
    assert fingerprint.overlap(source.subset(np.arange(45), "[:45]"), other) == 1
    renamed = dataclasses.replace(other, ids=[*source.ids[:2], *other.ids[2:]])
    assert fingerprint.overlap(source, renamed) == 4
