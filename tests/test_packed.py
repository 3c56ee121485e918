"""Packing into array_record shards: the same images and labels come back; interrupted, it goes on."""

import dataclasses
import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from mljax.data import observe
from mljax.data.packed import packed
from mljax.data.scenes import scenes
from mljax.data.source import Files, Source
from mljax.data.splits import load
from mljax.data.voc import voc
from mljax.errors import UserError
from mljax.pipeline import pack as packing
from mljax.pipeline.images import decode
from mljax.pipeline.pack import pack


def photos(folder: Path, count: int = 10, side: int = 40) -> Source:
    """JPEG files, every third a PNG; the last label is difficult in the first photo."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    paths = []
    for i in range(count):
        path = folder / f"{i}.{'png' if i % 3 == 2 else 'jpg'}"
        blurred = Image.fromarray(rng.integers(0, 255, (5, 5, 3), np.uint8))
        blurred.resize((side + 2 * i, side), Image.Resampling.BICUBIC).save(path)
        paths.append(str(path))
    labels = (rng.random((count, 5)) < 0.4).astype(np.uint8)
    scored = np.ones_like(labels)
    scored[0, 4] = 0
    return Source(
        name="photos train", classes=tuple("abcde"), ids=[f"id {i}" for i in range(count)], labels=labels,
        observed=np.ones_like(labels), scored=scored, read=Files(paths), fingerprint="abc",
    )  # fmt: skip


def both(source: Source) -> dict[bool, Source]:
    return {True: source, False: source}


def same(one: Source, other: Source) -> None:
    assert one.name == other.name and one.classes == other.classes and list(one.ids) == list(other.ids)
    for name in ("labels", "observed", "scored"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_bytes_labels_and_names_come_back(tmp_path):
    source = photos(tmp_path / "in")
    assert pack(both(source), tmp_path / "out" / "train", shard=4)
    found = packed("train", training=True, root=str(tmp_path / "out"))
    same(found, source)
    assert [found.read(i) for i in (9, 0, 4, 3)] == [source.read(i) for i in (9, 0, 4, 3)]
    assert found.fingerprint == source.fingerprint  # cached features serve both
    assert len(list((tmp_path / "out" / "train").glob("*.array_record"))) == 3
    assert not pack(both(source), tmp_path / "out" / "train", shard=4)  # it was there
    part = load({"name": "packed", "root": str(tmp_path / "out"), "training": False}, "train[3:5]")
    assert part.read(1) == source.read(4)


def test_reading_in_threads_and_after_pickling(tmp_path):
    source = photos(tmp_path / "in", 30)
    pack(both(source), tmp_path / "out" / "train", shard=7)
    found = packed("train", training=True, root=str(tmp_path / "out"))
    read = pickle.loads(pickle.dumps(found.read))
    rows = np.random.default_rng(0).integers(0, 30, 200).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, rows)) == [source.read(row) for row in rows]
    with pytest.raises(IndexError):
        read(30)


def test_labels_of_training_and_evaluation_are_both_kept(tmp_path):
    train, evaluated = photos(tmp_path / "in"), photos(tmp_path / "in")
    train.labels[0, 4], evaluated.labels[0, 4] = 1, 0
    pack({True: train, False: evaluated}, tmp_path / "out" / "x")
    for training, expected in ((True, train), (False, evaluated)):
        same(packed("x", training=training, root=str(tmp_path / "out")), expected)


def test_short_side(tmp_path):
    source = photos(tmp_path / "in", 6, side=40)
    pack(both(source), tmp_path / "out" / "train", short_side=20, quality=95)
    found = packed("train", training=True, root=str(tmp_path / "out"))
    assert found.name == "photos train (short side 20)" and found.fingerprint != source.fingerprint
    for i in range(6):
        image, whole = decode(found.read(i)), decode(source.read(i))
        assert image.size == (round((40 + 2 * i) / 2), 20) and found.read(i)[:2] == b"\xff\xd8"
        expected = np.asarray(whole.resize(image.size, Image.Resampling.BILINEAR), np.float64)
        assert np.abs(np.asarray(image) - expected).mean() < 3
    pack(both(source), tmp_path / "larger" / "train", short_side=40)
    kept = packed("train", training=True, root=str(tmp_path / "larger"))
    assert [kept.read(i) for i in range(6)] == [source.read(i) for i in range(6)]  # nothing is made larger


def test_arrays_are_kept_without_loss(tmp_path):
    source = scenes("train", train_images=5, size=48)
    pack(both(source), tmp_path / "train")
    found = packed("train", training=True, root=str(tmp_path))
    for i in range(5):
        np.testing.assert_array_equal(np.asarray(decode(found.read(i))), source.read(i))


def test_where_things_stand_is_kept(tmp_path):
    """Label bias chooses the same labels of a packed split, also where its images are made smaller."""
    whole = scenes("train", train_images=12)
    for name, short_side in (("whole", None), ("small", 48)):
        pack(both(whole), tmp_path / name / "train", short_side=short_side, shard=5)
        found = packed("train", training=True, root=str(tmp_path / name))
        for row in range(len(whole)):
            one, other = found.instances(row), whole.instances(row)
            assert one.size == tuple(map(float, other.size))
            for values, expected in zip(one[1:], other[1:], strict=True):
                np.testing.assert_array_equal(values, expected)
        for bias in ("size", "location"):
            section = {"name": "single_positive", "bias": bias}
            expected = observe.observe(whole, section).observed
            np.testing.assert_array_equal(observe.observe(found, section).observed, expected)
    (tmp_path / "small" / "train" / "instances.npz").write_bytes(b"damaged")
    found = packed("train", training=True, root=str(tmp_path / "small"))
    with pytest.raises(UserError, match=r"boxes .*instances.npz' cannot be read .*: pack the split again"):
        found.instances(0)


def test_without_annotations_it_is_packed_without_boxes(tmp_path, caplog):
    def none(index: int):
        raise UserError("The boxes of 'x.xml' cannot be read.")

    source = dataclasses.replace(photos(tmp_path / "in"), instances=none)
    pack(both(source), tmp_path / "out" / "train")
    assert "Packed without boxes, which config.observe.bias='size' and 'location' ask for" in caplog.text
    assert packed("train", training=True, root=str(tmp_path / "out")).instances is None


def test_interrupted_it_goes_on(tmp_path, monkeypatch):
    """Whatever is killed leaves whole shards only, and they are not written again."""
    source, folder = photos(tmp_path / "in"), tmp_path / "out" / "train"
    write, calls = packing._write, []

    def failing(path, records):
        calls.append(path.name)
        if len(calls) == 3:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        write(path, records)

    monkeypatch.setattr(packing, "_write", failing)
    with pytest.raises(KeyboardInterrupt):
        pack(both(source), folder, shard=3)
    assert sorted(p.name for p in folder.glob("*.array_record")) == ["00000.array_record", "00001.array_record"]
    with pytest.raises(UserError, match="The packed split 'train' .* is not complete: run the command again"):
        packed("train", training=True, root=str(tmp_path / "out"))
    (folder / ".00002.77.array_record").write_bytes(b"left by a kill")
    monkeypatch.setattr(packing, "_write", lambda path, records: calls.append("more") or write(path, records))
    assert pack(both(source), folder, shard=3)
    assert calls.count("more") == 2 and not list(folder.glob(".*.array_record"))
    found = packed("train", training=True, root=str(tmp_path / "out"))
    assert [found.read(i) for i in range(10)] == [source.read(i) for i in range(10)]


def test_what_is_wrong_is_told(tmp_path):
    source, out = photos(tmp_path / "in"), tmp_path / "out"
    pack(both(source), out / "train", shard=4)
    with pytest.raises(UserError, match="'trian' is not a packed split of .* .did you mean 'train'"):
        packed("trian", training=True, root=str(out))
    with pytest.raises(UserError, match="was started with short_side=None"):
        pack(both(source), out / "train", shard=4, short_side=20)
    with pytest.raises(UserError, match="holds other files"):
        pack(both(source), tmp_path / "in")
    with pytest.raises(UserError, match="must be at least 1"):
        pack(both(source), tmp_path / "x", short_side=0)
    shard = out / "train" / "00001.array_record"
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"00001.array_record' has \d+ of \d+ bytes"):
        packed("train", training=True, root=str(out))
    shard.unlink()
    with pytest.raises(UserError, match="00001.array_record' is missing"):
        packed("train", training=True, root=str(out))
    shard.write_bytes(b"\0" * len(content))
    with pytest.raises(UserError, match="cut short, damaged or not there"):
        packed("train", training=True, root=str(out)).read(5)
    shard.write_bytes(content)
    facts = json.loads((out / "train" / "done.json").read_text())
    (out / "train" / facts["arrays"]["1"]["labels"]).unlink()
    with pytest.raises(UserError, match="pack the split again"):
        packed("train", training=True, root=str(out))


def test_an_image_that_cannot_be_read_stops_the_packing(tmp_path):
    source = photos(tmp_path / "in")
    Path(source.read.paths[5]).write_bytes(b"\xff\xd8 not a photo")
    with pytest.raises(UserError, match="image id 5"):
        pack(both(source), tmp_path / "out" / "train")


def million(folder: Path, count: int = 1_000_000, shard: int = 10_000) -> None:
    """A packed split with records of a few bytes, as `pack` lays it out."""
    folder.mkdir(parents=True)
    sizes = []
    for number in range(count // shard):
        path = folder / f"{number:05d}.array_record"
        writer = ArrayRecordWriter(str(path), packing.OPTIONS)
        for i in range(shard):
            writer.write((number * shard + i).to_bytes(8, "little"))
        writer.close()
        sizes.append(path.stat().st_size)
    labels = np.zeros((count, 80), np.uint8)
    labels[:, 3] = 1
    np.save(folder / "labels.npy", labels)
    (folder / "ids.json").write_text(json.dumps([f"COCO_train2014_{i:012d}.jpg" for i in range(count)]))
    facts = {"labels": "labels.npy", "observed": "ones", "scored": "ones"}
    done = {"format": 1, "images": count, "shard": shard, "short_side": None, "quality": None, "sizes": sizes}
    done |= {"classes": [str(i) for i in range(80)], "arrays": {"0": facts, "1": facts}}
    done |= {"names": {"0": "m", "1": "m"}, "fingerprint": {"0": "f", "1": "f"}}
    (folder / "done.json").write_text(json.dumps(done))


OPENING = r"""
import re, sys, time
import numpy as np
from mljax.data.packed import packed
from mljax.pipeline import pack as packing
began = time.process_time()
source = packed("train", training=True, root=sys.argv[1])
opened = time.process_time() - began
assert len(source) == 1_000_000
def peak():  # of this program; getrusage would tell that of pytest, which started it, where it is larger
    return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024 / 1e9
def reading(rows):
    began = time.process_time()
    for row in rows:
        assert int.from_bytes(source.read(int(row)), "little") == row
    return (time.process_time() - began) / len(rows)
rng = np.random.default_rng(0)
for shard in range(100):
    source.read(shard * 10_000)
near, far = reading(rng.integers(0, 10_000, 2000)), reading(rng.integers(0, 1_000_000, 2000))
print(opened, peak(), near, far)
"""


@pytest.mark.slow
def test_a_million_rows(tmp_path):
    """Opens in under 5 s of CPU time and 1 GB, the whole process counted; a record's place does not matter."""
    million(tmp_path / "train")
    answer = subprocess.run([sys.executable, "-c", OPENING, str(tmp_path)], capture_output=True, text=True, check=True)
    opened, gigabytes, near, far = map(float, answer.stdout.split())
    assert opened < 5 and gigabytes < 1 and far < 10 * near and far < 1e-3, answer.stdout


@pytest.mark.slow
def test_real_photos_come_back_bit_for_bit(real_data, tmp_path):
    """3,700 photos, packed and read back."""
    for split in ("trainval", "test"):
        sources = {
            training: voc(split, training=training, root=str(real_data), variant="VOC2007 re-split")
            for training in (True, False)
        }
        pack(sources, tmp_path / split)
        for training, source in sources.items():
            found = packed(split, training=training, root=str(tmp_path))
            same(found, source)
        for i in range(len(source)):
            np.testing.assert_array_equal(np.asarray(decode(found.read(i))), np.asarray(decode(source.read(i))))
