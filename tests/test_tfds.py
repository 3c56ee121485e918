"""TFDS's array_record data sets, made here by TFDS itself and read without TensorFlow."""

import io
import json
import struct
import sys

import numpy as np
import pytest
from PIL import Image

from mljax.data import _example
from mljax.data.tfds import tfds
from mljax.errors import UserError

NAMES = ["cat", "dog", "ox"]
# all labels; those with an object that is not difficult
EXAMPLES = {"train": [([0, 1], [0]), ([2], [2]), ([], []), ([1], [])], "test": [([0], [0]), ([1, 2], [1, 2])]}


def jpeg(number: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (9 + number, 8), (20 * number, 60, 90)).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """voc-like "tiny/2007" and coco-like "boxes" under one data_dir, written by TFDS as array_record."""
    import tensorflow_datasets as real

    root = tmp_path_factory.mktemp("tfds")
    label = real.features.ClassLabel(names=NAMES)

    class Base(real.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = real.core.Version("1.0.0")

        def _info(self):
            return real.core.DatasetInfo(builder=self, features=real.features.FeaturesDict(self.FEATURES))

        def _split_generators(self, manager):
            return {name: self._generate_examples(name) for name in EXAMPLES}

        def _generate_examples(self, split):
            for i, (every, easy) in enumerate(EXAMPLES[split]):
                image = io.BytesIO(jpeg(i))
                yield i, {k: v for k, v in self.example(split, i, image, every, easy).items() if k in self.FEATURES}

        @staticmethod
        def example(split, i, image, every, easy):
            objects = [{"label": v, "area": 3} for v in every for _ in range(2)]
            row = {"image": image, "image/filename": f"{split}{i}.jpg", "labels": every, "labels_no_difficult": easy}
            return row | {"objects": objects}

    common = {"image": real.features.Image(), "image/filename": real.features.Text()}

    class Tiny(Base, skip_registration=True):
        BUILDER_CONFIGS = [real.core.BuilderConfig(name="2007", version="1.0.0")]  # noqa: RUF012
        FEATURES = common | {
            "labels": real.features.Sequence(label),
            "labels_no_difficult": real.features.Sequence(label),
        }

    class Boxes(Base, skip_registration=True):
        FEATURES = common | {"objects": real.features.Sequence({"label": label, "area": np.int64})}

    for builder in (Tiny, Boxes):
        builder(data_dir=root, file_format="array_record").download_and_prepare()
    return root


@pytest.fixture
def root(prepared, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setenv("MLJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    return shutil.copytree(prepared, tmp_path / "data")


def rows(array):
    return [np.flatnonzero(row).tolist() for row in array]


def by_name(source, array):
    """TFDS shuffles what it prepares: rows in the order of the names."""
    return [rows(array)[i] for i in np.argsort(source.ids)]


def test_labels_images_and_names(root):
    source = tfds("train", training=True, dataset="tiny/2007", root=str(root), difficult="V2")
    assert source.name == "tiny 2007 (TFDS) train" and source.classes == tuple(NAMES)
    assert sorted(source.ids) == [f"train{i}.jpg" for i in range(4)]
    assert by_name(source, source.labels) == [[0], [2], [], []] and source.scored.all() and source.observed.all()
    for i, name in enumerate(source.ids):
        assert source.read(i) == jpeg(int(name[5]))
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    ("policy", "training", "labels"),
    [("V1", True, [[0, 1], [2], [], [1]]), ("V1", False, [[0], [2], [], []]), ("V4", True, [[0], [2], [], []])],
)
def test_policies_of_difficult_labels(root, policy, training, labels):
    source = tfds("train", training=training, dataset="tiny/2007", root=str(root), difficult=policy)
    assert by_name(source, source.labels) == labels
    assert by_name(source, 1 - source.scored) == [[1], [], [], [1]]


def test_splits_are_joined(root):
    source = tfds("train+test", training=True, dataset="tiny/2007", root=str(root))
    assert len(source) == 6 and sorted(source.ids)[:2] == ["test0.jpg", "test1.jpg"]
    assert {source.read(i) for i in range(6)} == {jpeg(i) for i in range(4)}


def test_splits_by_the_names_of_the_papers(root):
    """TFDS has "validation" where the devkits have "val": the one split "test" is called that here."""
    for path in (root / FOLDER).glob("*-test.*"):
        path.rename(path.with_name(path.name.replace("-test.", "-validation.")))
    path = root / FOLDER / "dataset_info.json"
    path.write_text(path.read_text().replace('"test"', '"validation"'))
    both = tfds("trainval", training=True, dataset="tiny/2007", root=str(root))
    assert len(both) == 6 and both.name == "tiny 2007 (TFDS) train+validation"
    assert len(tfds("val", training=False, dataset="tiny/2007", root=str(root))) == 2


def test_labels_of_objects(root):
    source = tfds("train", training=True, dataset="boxes", root=str(root))
    assert by_name(source, source.labels) == [[0, 1], [2], [1]] and source.name == "boxes (TFDS) train"
    assert [source.read(i) for i in range(3)] == [jpeg(int(name[5])) for name in source.ids]
    whole = tfds("train", training=True, dataset="boxes", root=str(root), annotated_only=False)
    assert len(whole) == 4 and whole.name.endswith("(all images)") and whole.fingerprint != source.fingerprint


def test_labels_are_collected_once(root, monkeypatch):
    first = tfds("train", training=True, dataset="tiny/2007", root=str(root))
    monkeypatch.setattr(_example, "parse", None)  # not called again
    again = tfds("train", training=True, dataset="tiny/2007", root=str(root))
    np.testing.assert_array_equal(again.labels, first.labels)
    assert again.ids == first.ids and again.fingerprint == first.fingerprint


def test_a_split_without_labels(root, monkeypatch):
    parse = _example.parse
    monkeypatch.setattr(
        _example, "parse", lambda *a: {k: v if k == "image/filename" else [] for k, v in parse(*a).items()}
    )
    source = tfds("test", training=False, dataset="tiny/2007", root=str(root))
    assert source.name.endswith("test (unlabelled)") and not source.observed.any() and not source.scored.any()
    with pytest.raises(UserError, match="has no labels, so it cannot be trained on"):
        tfds("test", training=True, dataset="tiny/2007", root=str(root))


def edited(path, old, new):
    path.write_text(path.read_text().replace(old, new))


FOLDER = "tiny/2007/1.0.0"
BROKEN = {
    "format": (lambda f: edited(f / "dataset_info.json", "array_record", "tfrecord"), "was prepared as tfrecord"),
    "shard": (lambda f: [p.unlink() for p in f.glob("*train*")], "The shard .* is not in"),
    "json": (lambda f: (f / "features.json").write_text("{"), "cannot be read"),
    "info": (lambda f: (f / "dataset_info.json").unlink(), "prepared no 'tiny/2007'"),
    "names": (lambda f: (f / "labels.labels.txt").write_text("cat\ncat\nox"), "names 'cat' twice"),
    "fewer": (lambda f: (f / "labels.labels.txt").write_text("cat\nox"), "has 2 names for 3 classes"),
    "length": (
        lambda f: edited(f / "dataset_info.json", '"4"', '"5"'),
        "has 4 records where 5 are expected",
    ),
    "cut": (lambda f: [p.write_bytes(p.read_bytes()[:70000]) for p in f.glob("*train*")], "cut short, damaged"),
    "range": (
        lambda f: (edited(f / "features.json", '"3"', '"1"'), (f / "labels.labels.txt").write_text("a")),
        "outside",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_folders(root, what):
    act, message = BROKEN[what]
    act(root / FOLDER)
    with pytest.raises(UserError, match=message):
        tfds("train", training=True, dataset="tiny/2007", root=str(root))


def test_choices_that_do_not_exist(root):
    for settings, message in (
        ({"dataset": "voc/2007"}, "TFDS has prepared no 'voc/2007'.*prepare tfds:voc/2007 --root=/"),
        ({"version": "2.0.0"}, "no version 2.0.0 of 'tiny/2007'"),
        ({"labels": "label"}, r"no class labels 'label' .did you mean 'labels'"),
        ({"difficult": "V3"}, "difficult='V3' is not a policy"),
        ({"image": "picture"}, "no feature 'picture'"),
    ):
        with pytest.raises(UserError, match=message):
            tfds("train", training=True, root=str(root), **{"dataset": "tiny/2007"} | settings)
    with pytest.raises(UserError, match="no split 'trian' .did you mean 'train'"):
        tfds("trian", training=True, dataset="tiny/2007", root=str(root))


def test_prepare_says_what_it_needs(tmp_path):
    from mljax.data.prepare import prepare

    with pytest.raises(UserError, match=r"needs TensorFlow .*pip install 'mljax\[tf\]'"):
        prepare("tfds:voc/2007", tmp_path)


# --- records by hand: what protobuf's wire format may hold -----------------------------------------------------------


def number(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field(tag: int, content: bytes) -> bytes:
    return number(tag << 3 | 2) + number(len(content)) + content


def example(**features: bytes) -> bytes:
    entries = [field(1, field(1, k.encode()) + field(2, v)) for k, v in features.items()]
    return field(1, b"".join(entries))


def test_every_kind_of_list():
    unpacked = field(3, b"".join(number(1 << 3) + number(v) for v in (5, -3)))
    packed_ints = field(3, field(1, number(2**40) + number(-1)))
    floats = field(2, field(1, struct.pack("<2f", 0.5, -2)) + number(1 << 3 | 5) + struct.pack("<f", 7))
    unknown = number(9 << 3) + number(300) + number(8 << 3 | 1) + bytes(8) + field(7, b"more")
    found = _example.parse(
        example(text=field(1, field(1, b"a") + field(1, b"")), ints=unpacked, more=packed_ints, floats=floats, none=b"")
        + unknown
    )
    assert found["text"] == [b"a", b""] and found["none"] == []
    assert found["ints"].tolist() == [5, -3] and found["more"].tolist() == [2**40, -1]
    assert found["floats"].tolist() == [0.5, -2.0, 7.0]
    assert set(_example.parse(example(a=unpacked, b=floats), ("b",))) == {"b"}


def test_other_bytes_are_no_example():
    whole = example(a=field(3, field(1, number(4))))
    for cut in range(1, len(whole)):
        with pytest.raises(_example.BadExample):
            _example.parse(whole[:cut])
    for data in (b"\xff" * 12, b"\x0b", b"\x08\x01", b"\x0a\x02\x0d\x01"):
        with pytest.raises(_example.BadExample):
            _example.parse(data)


def test_a_damaged_record_is_told(root, monkeypatch):
    from array_record.python.array_record_module import ArrayRecordWriter

    folder = root / FOLDER
    path = next(folder.glob("*train*"))
    path.unlink()
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for _ in range(4):
        writer.write(b"\xff\xff no example")
    writer.close()
    with pytest.raises(UserError, match="Record 0 of .* is damaged"):
        tfds("train", training=True, dataset="tiny/2007", root=str(root))
    assert json.loads((folder / "dataset_info.json").read_text())["splits"][0]["shardLengths"] == ["4"]
