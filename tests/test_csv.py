"""The CSV reader against files as people write them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mljax.data.table import table
from mljax.errors import UserError

GOOD = """image,labels,split
a.jpg,dog|cat,train
b.jpg,cat,train
c.jpg,,train
d.jpg,dog,val
"""


def write(folder: Path, text: str | bytes, images: str = "abcdefgh") -> str:
    path = folder / "labels.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    for name in images:
        (folder / f"{name}.jpg").write_bytes(f"photo {name}".encode())
    return str(path)


def test_labels_in_order(tmp_path: Path):
    source = table("train", file=write(tmp_path, GOOD))
    assert source.classes == ("cat", "dog") and list(source.ids) == ["a.jpg", "b.jpg", "c.jpg"]
    assert source.labels.tolist() == [[1, 1], [1, 0], [0, 0]]  # an image without labels is legal
    assert source.labels.dtype == np.uint8 and source.observed.all() and source.scored.all()
    assert source.name == f"{tmp_path.name}/labels.csv train" and source.read(1) == b"photo b"
    assert table("val", file=write(tmp_path, GOOD), title="pets").name == "pets val"
    assert table("val", file=write(tmp_path, GOOD)).labels.tolist() == [[0, 1]]


@pytest.mark.parametrize(
    "text",
    [
        GOOD.replace("\n", "\r\n"),
        b"\xef\xbb\xbf" + GOOD.encode(),
        GOOD.replace("b.jpg", "\n ,, \n\nb.jpg"),
        GOOD.replace("dog|cat", '" dog | cat ||dog"').replace("a.jpg", " ./a.jpg "),
        "weather,split,labels,image\n"
        + "".join(f"sun,{s},{l},{i}\n" for i, l, s in (r.split(",") for r in GOOD.split()[1:])),
    ],
    ids=["crlf", "bom", "empty rows", "spaces and repeats", "other columns"],
)
def test_irregular_files_read_the_same(tmp_path: Path, text):
    source = table("train", file=write(tmp_path, text))
    assert source.labels.tolist() == [[1, 1], [1, 0], [0, 0]] and list(source.ids) == ["a.jpg", "b.jpg", "c.jpg"]


def test_separators_and_quoted_commas(tmp_path: Path):
    text = GOOD.replace("|", ";").replace("a.jpg", '"a, first.jpg"')
    file = write(tmp_path, text)
    (tmp_path / "a, first.jpg").write_bytes(b"x")
    assert table("train", file=file, separator=";").labels.tolist() == [[1, 1], [1, 0], [0, 0]]
    file = write(tmp_path, GOOD.replace("dog|cat", '"dog,cat"'))
    assert table("train", file=file, separator=",").classes == ("cat", "dog")
    file = write(tmp_path, GOOD.replace(",", ";"))
    assert table("train", file=file, delimiter=";").classes == ("cat", "dog")


def test_images_folder_and_other_headers(tmp_path: Path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "z.jpg").write_bytes(b"z")
    file = write(tmp_path, "path,tags,part\nz.jpg,cat,train\n")
    named: dict = {"image_column": "path", "labels_column": "tags", "split_column": "part"}
    assert table("train", file=file, images="photos", **named).read(0) == b"z"
    with pytest.raises(UserError, match=r"1 images, of which 1 are not there, first .*z.jpg'.*'images'"):
        table("train", file=file, **named)
    with pytest.raises(UserError, match=r"folder of images .*fotos"):
        table("train", file=file, images="fotos", **named)


def test_file_under_the_data_folder(tmp_path: Path, monkeypatch):
    write(tmp_path, GOOD)
    monkeypatch.setenv("MLJAX_DATA", str(tmp_path))
    assert len(table("val", file="labels.csv")) == 1
    with pytest.raises(UserError, match=r"no file 'label.csv'"):
        table("val", file="label.csv")
    with pytest.raises(UserError, match="No CSV is named"):
        table("val", file="")


def test_given_classes(tmp_path: Path):
    file = write(tmp_path, GOOD)
    assert table("val", file=file, classes=["emu", "dog", "cat"]).labels.tolist() == [[0, 1, 0]]
    (tmp_path / "names.txt").write_text("dog\ncat\n\n")
    assert table("train", file=file, classes="names.txt").labels.tolist() == [[1, 1], [0, 1], [0, 0]]
    with pytest.raises(UserError, match=r"Line 2 of .* has the label 'dog', not one of 'classes' \(is it 'Dog'\?\)"):
        table("train", file=file, classes=["Dog", "cat"])
    with pytest.raises(UserError, match="names a label twice"):
        table("train", file=file, classes=["dog", "cat", "dog"])
    with pytest.raises(UserError, match="no list of classes"):
        table("train", file=file, classes="nam.txt")


def test_label_seen_only_in_val(tmp_path: Path):
    file = write(tmp_path, GOOD.replace("d.jpg,dog", "d.jpg,dog|sheep"))
    with pytest.raises(
        UserError, match=r"no image of the split 'train' has: 'sheep' \(line 5.*'val'\).*list 'classes'"
    ):
        table("val", file=file)
    assert table("val", file=file, classes=["cat", "dog", "sheep"]).labels.tolist() == [[0, 1, 1]]


def test_label_seen_only_in_train_is_no_problem(tmp_path: Path):
    assert table("val", file=write(tmp_path, GOOD)).labels[:, 0].tolist() == [0]


def test_val_share_is_deterministic_and_stable(tmp_path: Path):
    head = "image,labels\n"
    rows = [f"photos/{i}.jpg,cat\n" for i in range(400)]
    (tmp_path / "photos").mkdir()
    for i in range(400):
        (tmp_path / "photos" / f"{i}.jpg").touch()
    val = list(table("val", file=write(tmp_path, head + "".join(rows)), val_share=0.2).ids)
    train = list(table("train", file=write(tmp_path, head + "".join(rows)), val_share=0.2).ids)
    assert sorted(val + train) == sorted(f"photos/{i}.jpg" for i in range(400))
    assert 50 < len(val) < 110  # five standard deviations about 80
    fewer = list(table("val", file=write(tmp_path, head + "".join(reversed(rows[:200]))), val_share=0.2).ids)
    assert fewer == [name for name in reversed(val) if int(name[7:-4]) < 200]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace("image", "file"), r"no column 'image' \(available: file, labels, split\)"),
        (GOOD.replace("labels", "label"), r"no column 'labels' \(did you mean 'label'\?\).*labels_column"),
        (GOOD.replace("split", "spilt"), r"no column 'split' \(did you mean 'spilt'\?\).*val_share"),
        (GOOD.partition("\n")[2], "looks like an image: add a header"),
        (GOOD.replace(",", ";"), "set delimiter=';'"),
        (GOOD.replace("labels", "split"), "column 'split' more than once"),
        (GOOD.replace("dog|cat", "dog;cat"), r"'dog;cat', with ';' inside: set separator=';'"),
        (GOOD.replace("b.jpg,cat", "b.jpg,Cat"), r"in two ways, 'Cat' \(line 3\) and 'cat' \(line 2\)"),
        (GOOD.replace("b.jpg,cat", "b.jpg,tv monitor|tvmonitor"), "'tv monitor' .*'tvmonitor'"),
        (GOOD.replace("c.jpg,,train", "c.jpg,,Train"), "spells a split in two ways, 'Train' and 'train'"),
        (GOOD.replace("c.jpg", "a.jpg"), r"'a.jpg' twice, in lines 2 and 4"),
        (GOOD.replace("d.jpg", "sub/../a.jpg"), r"'a.jpg' twice in the splits 'train' and 'val', in lines 2 and 5"),
        (GOOD.replace("b.jpg,cat", "b.jpg,cat,dog"), "Line 3 of .* has 4 fields where the header has 3"),
        (GOOD.replace("b.jpg,cat", ",cat"), "Line 3 of .* names no image"),
        (GOOD.replace("dog,val", "dog,"), "Line 5 of .* names no split"),
        (
            GOOD.replace("train", "training"),
            r"no images in the split 'train' \(did you mean 'training'\?\).*train_split",
        ),
        (
            GOOD.replace("a.jpg", "x.jpg").replace("b.jpg", "y.jpg"),
            r"names 3 images, of which 2 are not there, .*x.jpg'",
        ),
        ("image,labels,split\n", "has no rows"),
        ("", "has no rows"),
        ("image,labels,split\na.jpg,,train\n", "No image of .* has a label"),
        (GOOD.replace("dog", "hündin").encode("latin-1"), "not UTF-8"),
    ],
)
def test_broken_files(tmp_path: Path, text, message: str):
    with pytest.raises(UserError, match=message):
        table("train", file=write(tmp_path, text))


def test_without_rows_of_val_the_way_on_is_told(tmp_path: Path):
    file = write(tmp_path, GOOD.replace(",val", ",train"))
    with pytest.raises(UserError) as error:
        table("val", file=file)
    told = str(error.value)
    assert "has no images in the split 'val' (available: train): write it into the column 'split' of some rows" in told
    assert "take that column out and set val_share=0.2 (--config.data.val_share=0.2)" in told
    without = write(tmp_path, "\n".join(line.rpartition(",")[0] for line in GOOD.splitlines()) + "\n")
    with pytest.raises(UserError, match=r"no images in the split 'val' .*with val_share=1e-06 .*raise it"):
        table("val", file=without, val_share=1e-6)


def test_wrong_settings(tmp_path: Path):
    file = write(tmp_path, GOOD)
    with pytest.raises(UserError, match=r"no images in the split 'vla' \(did you mean 'val'\?\)"):
        table("vla", file=file)
    with pytest.raises(UserError, match=r"val_share=0.2 is not needed"):
        table("val", file=file, val_share=0.2)
    with pytest.raises(UserError, match=r"val_share=1.5"):
        table("val", file=file, val_share=1.5)
    with pytest.raises(UserError, match="separator=''"):
        table("val", file=file, separator="")


def test_real_photos(real_data: Path):
    train, val = (table(split, file=str(real_data / "coco_photos" / "labels.csv")) for split in ("train", "val"))
    assert (len(train), len(val)) == (338, 112)
    assert train.classes == val.classes == tuple(sorted(train.classes)) and len(train.classes) == 80
    absent = [name for name, count in zip(val.classes, val.labels.sum(0)) if count == 0]
    assert absent == ["hair drier", "sheep"]
    assert (train.labels.sum(1) == 0).sum() + (val.labels.sum(1) == 0).sum() == 2
    assert train.read(0)[:2] == b"\xff\xd8"


MILLION = r"""
import csv, json, os, re, sys, time
import numpy as np
from mljax.data import files
from mljax.data.table import table
def status(path, of=os.stat, there=sys.argv[1]):  # of one file: a million would take longer to make than to read
    return of(there)
files.os = type("os", (), {**vars(os), "stat": staticmethod(status)})
cpu = time.process_time()
source = table("train", file=sys.argv[1])
opened = time.process_time() - cpu
assert len(source) == 1_000_000 and len(source.classes) == 80
def peak():  # of this program; getrusage would tell that of pytest, which started it, where it is larger
    return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024 / 1e9
def reading(rows):
    began = time.process_time()
    for row in rows:
        record = source.labels[int(row)], source.read.paths[int(row)], source.ids[int(row)]
        assert record[1].endswith(record[2]) and int(record[2][2:-4]) == row
    return (time.process_time() - began) / len(rows)
rng = np.random.default_rng(0)
near, far = reading(rng.integers(0, 1000, 20_000)), reading(rng.integers(0, 1_000_000, 20_000))
gigabytes = peak()
def plain():  # a pass of Python's own reader, which counts the labels: what the time is compared with
    began, counts = time.process_time(), {}
    with open(sys.argv[1], newline="") as file:
        for _, labels, _ in csv.reader(file):
            for label in labels.split("|"):
                counts[label] = counts.get(label, 0) + 1
    return time.process_time() - began
print(json.dumps([opened / min(plain(), plain()), gigabytes, near, far]))
"""


@pytest.mark.slow
def test_a_million_rows(tmp_path: Path):
    """Opens in less than ten times a plain pass of the file and 1 GB in all; a row's place does not matter."""
    rng = np.random.default_rng(0)
    names = [f"thing {i:02d}" for i in range(80)]
    rows = ["|".join(names[i] for i in chosen) for chosen in np.sort(rng.integers(0, 80, (1_000_000, 3)))]
    lines = [f"a/{i}.jpg,{labels},train" for i, labels in enumerate(rows)]
    (tmp_path / "labels.csv").write_text("\n".join(["image,labels,split", *lines]))
    script = [sys.executable, "-c", MILLION, str(tmp_path / "labels.csv")]
    # the best of three, as a ratio: on a busy machine CPU time grows too
    runs = [subprocess.run(script, capture_output=True, text=True, check=True).stdout for _ in range(3)]
    passes, gigabytes, near, far = min(map(json.loads, runs))
    assert passes < 10 and gigabytes < 1 and far < 10 * near, runs
