"""What changed since a run began: every kind of change is seen, and nothing else."""

import dataclasses
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
    assert one.classes == CLASSES and list(one.names) == source.ids
    assert [one.ids[3], one.ids.dtype, one.ids.shape] == [zlib.crc32(b"0/3.jpg"), np.uint32, (100,)]
    assert one.labels[5] == zlib.crc32(np.packbits(source.labels[5]).tobytes()) and len(set(one.known.tolist())) == 1
    assert len(one.images) == fingerprint.SAMPLE and set(one.images) < set(range(100))
    for row, crc in one.images.items():
        assert crc == zlib.crc32(source.read(row))
    again = fingerprint.record(source)
    assert all((array == again.arrays[name]).all() for name, array in one.arrays.items())
    assert len(fingerprint.record(source, "whole").images) == 100
    assert fingerprint.record(source, "none").images == {}
    with pytest.raises(UserError, match="config.data.digest is 'all'; expected one of none, sampled, whole"):
        fingerprint.record(source, "all")


def test_rows_that_changed_and_no_others(source, monkeypatch):
    before = fingerprint.record(source, "none")

    def changed(**values):
        after = fingerprint.record(dataclasses.replace(source, **values), "none")
        names = ("ids", "labels", "known")
        return {n: np.flatnonzero(getattr(after, n) != getattr(before, n)).tolist() for n in names}

    labels, observed, scored, ids = source.labels.copy(), source.observed.copy(), source.scored.copy(), list(source.ids)
    labels[7, 1] ^= 1
    observed[9, 2] = 0
    scored[99, 0] = 0
    ids[11] = "other\ud800.jpg"
    none = {"ids": [], "labels": [], "known": []}
    for _ in range(2):
        assert changed() == none and changed(classes=("dog", "cat", "ox")) == none
        assert changed(labels=labels) == none | {"labels": [7]} and changed(ids=ids) == none | {"ids": [11]}
        assert changed(observed=observed) == none | {"known": [9]} and changed(scored=scored) == none | {"known": [99]}
        assert len(changed(ids=ids[::-1])["ids"]) >= 99
        monkeypatch.setattr(fingerprint, "ROWS", 10)  # in parts, the same sums
    soft = source.labels.astype(np.float32)
    one = fingerprint.row_sums(soft)
    soft[3, 0] += 0.25
    assert np.flatnonzero(fingerprint.row_sums(soft) != one).tolist() == [3]
    assert len(fingerprint.record(source.subset(np.arange(0), "[]")).ids) == 0


def test_images_that_changed_or_went(source, tmp_path):
    before = fingerprint.record(source, "whole").images
    path = tmp_path / "photos" / "5.jpg"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    (tmp_path / "photos" / "6.jpg").unlink()
    after = fingerprint.record(source, "whole").images
    assert 6 not in after and [row for row in after if after[row] != before[row]] == [5]


def test_the_same_photos_in_both_splits(source, tmp_path):
    def overlap(one, two, images="sampled"):
        return fingerprint.overlap(one, two, fingerprint.record(one, images), fingerprint.record(two, images))

    other = files(tmp_path / "other", 30, seed=1)
    assert overlap(source, other) == (0, 0)
    assert overlap(source, source.subset(np.arange(5), "[:5]")) == (5, 0)
    for i in (3, 8):  # the same bytes under other names
        (tmp_path / "other" / f"{i}.jpg").write_bytes((tmp_path / "photos" / f"{40 + i}.jpg").read_bytes())
    assert overlap(source, other) == overlap(source, other, "whole") == (0, 2)
    assert overlap(source.subset(np.arange(45), "[:45]"), other) == (0, 1)
    renamed = dataclasses.replace(other, ids=[*source.ids[:2], *other.ids[2:]])
    assert overlap(source, renamed) == (0, 2)  # folders name other photos alike
    for i in (0, 1):
        (tmp_path / "other" / f"{i}.jpg").write_bytes((tmp_path / "photos" / f"{i}.jpg").read_bytes())
    assert overlap(source, renamed) == (2, 2)
    arrays = dataclasses.replace(source, read=lambda row: np.full((2, 2, 3), row, np.uint8))
    assert overlap(arrays, arrays.subset(np.arange(70), "[:70]")) == (70, 0)
    named = dataclasses.replace(arrays.subset(np.arange(5), ""), ids=list("abcde"))
    assert overlap(arrays, named, "whole") == (0, 5)


def test_equal_lengths_are_read_up_to_a_limit(source, tmp_path, monkeypatch):
    other, reads = files(tmp_path / "other", 30, seed=1), []
    monkeypatch.setattr(fingerprint, "MOST", 10)
    read = source.read
    counted = dataclasses.replace(source, read=Files(read.paths))
    original = Files.__call__
    monkeypatch.setattr(Files, "__call__", lambda self, row: [reads.append(row), original(self, row)][1])
    nothing = fingerprint.record(counted, "none")
    fingerprint.overlap(counted, other, nothing, fingerprint.record(other, "none"))
    assert reads == []
    evaluated = fingerprint.record(other)
    reads.clear()
    fingerprint.overlap(counted, other, nothing, evaluated)
    assert len(reads) == 10
