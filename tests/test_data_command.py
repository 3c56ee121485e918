"""python -m mljax.data: statistics and their checks, the page of samples, packing; and facts kept of a split."""

import dataclasses
import json
import re

import numpy as np
import pytest
from PIL import Image

from mljax import main, rundir
from mljax.commands import data as command
from mljax.config.reading import read_config
from mljax.data import _published_counts as published
from mljax.data import label_counts, labels, stats
from mljax.data.packed import packed
from mljax.data.source import Source
from mljax.data.splits import load
from mljax.errors import UserError
from mljax.pictures import samples
from mljax.pipeline import transforms
from mljax.pipeline.picture import _simplejpeg

SCENES = "configs/baseline.py:smoke"
NEVER = ["--config.data.train_images=30", "--config.data.test_images=12"]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MLJAX_CACHE", str(tmp_path / "cache"))


def split(name: str, labels: np.ndarray, classes, **changes) -> Source:
    ones = np.ones_like(labels)
    whole = Source(
        name=name, classes=tuple(classes), ids=[f"{name} {i}" for i in range(len(labels))], labels=labels,
        observed=ones, scored=ones, read=lambda i: np.full((20, 30, 3), i, np.uint8), fingerprint=name,
    )  # fmt: skip
    return dataclasses.replace(whole, **changes)


def official(name: str, counts, classes, images: int) -> Source:
    """A split with these counts of images per class."""
    table = (np.arange(images)[:, None] < np.array(counts)[None]).astype(np.uint8)
    return split(name, table, classes)


def test_known_counts():
    """Of systems whose papers print them: sums and sizes."""
    sums = {"VOC2007 trainval": 7306, "VOC2007 test": 7013, "COCO2014 train": 241035, "COCO2014 val": 116592}
    assert {name: sum(published.counts(name).values()) for name in sums} == sums
    assert published.counts("COCO2014 train")["person"] == 45174 and published.counts("VOC2007 test")["dog"] == 418
    assert published.counts("COCO2014 train (all images)") == published.counts("COCO2014 train")
    assert published.counts("VOC2007 re-split test") is None
    for year, total in (("VOC2007", 7306), ("VOC2012", 16682)):
        train, val, both = (np.array(published.COUNTS[f"{year} {split}"]) for split in ("train", "val", "trainval"))
        np.testing.assert_array_equal(train + val, both)
        assert both.sum() == total and (both < published.IMAGES[f"{year} trainval"][0]).all()
    for name, count in {"VOC2007 trainval": 5011, "VOC2012 test (unlabelled)": 10991, "COCO2014 val": 40137}.items():
        assert published.IMAGES[name] == (count,)
    assert published.plain_name("VOC2012 (TFDS) train+validation") == "VOC2012 trainval"
    assert published.plain_name("VOC2007 (TFDS) validation (short side 300)") == "VOC2007 val"
    assert published.IMAGES["COCO2014 train"][0] + published.IMAGES["COCO2014 val"][0] == 122218


def test_counts_of_the_published_labels(real_data):
    with np.load(real_data / "labels" / "voc2007_labels.npz", allow_pickle=False) as arrays:
        for name in ("trainval", "test"):
            ternary = arrays[f"{name}_labels"]
            source = split(f"VOC2007 {name}", (ternary >= 0).astype(np.uint8), published.VOC, scored=(ternary != 0) * 1)
            fine, wrong = stats.check(source)
            assert not wrong and len(fine) == 2 and "each of its 20 classes" in fine[1]


def test_counts_of_the_published_cooccurrence(real_data):
    """Images per class of COCO's training split, which its co-occurrence was counted on."""
    with np.load(real_data / "labels" / "coco_cooccurrence.npz", allow_pickle=False) as arrays:
        found = dict(zip(arrays["names"].tolist(), arrays["nums"].astype(int).tolist()))
    assert found == published.counts("COCO2014 train") and found["person"] == 45174 and sum(found.values()) == 241035


def test_a_wrong_class_order_or_number_of_images_is_found():
    counts = list(published.COUNTS["VOC2007 test"])
    assert stats.check(official("VOC2007 test", counts, published.VOC, 4952))[1] == []
    exchanged = [counts[1], counts[0], *counts[2:]]
    assert (
        "the order of classes is wrong" in stats.check(official("VOC2007 test", exchanged, published.VOC, 4952))[1][0]
    )
    fewer = [counts[0] - 7, *counts[1:]]
    wrong = stats.check(official("VOC2007 test", fewer, published.VOC, 4900))[1]
    assert "has 4,900 images, but 4,952 are published" in wrong[0] and "aeroplane 197 for 204" in wrong[1]
    reverse = official("VOC2007 test", counts[::-1], published.VOC[::-1], 4952)
    assert "begins with the class 'tvmonitor', not one of the papers' orders" in stats.check(reverse)[1][0]
    by_id = [published.counts("COCO2014 val")[name] for name in published.CLASS_ORDERS["COCO"][1]]
    assert stats.check(official("COCO2014 val", by_id, published.CLASS_ORDERS["COCO"][1], 40137))[1] == []
    assert "about 83,898" in stats.check(split("NUS-WIDE official test", np.ones((9, 2), np.uint8), "ab"))[1][0]
    assert "no published counts" in stats.check(split("mine", np.ones((9, 2), np.uint8), "ab"))[0][0]


def test_the_table():
    table = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 0], [1, 1, 1]], np.uint8)
    scored = np.ones_like(table)
    scored[2, 0] = 0  # a difficult object that training counts
    source = split("mine train", table, ["cat", "dog", "ox"], scored=scored)
    text = stats.describe([source, split("mine test", table[:1], ["cat", "dog", "ox"])])
    lines = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    assert lines["mine train"][2:] == ["4", "3", "5", "1.250", "3", "2", "1"]
    assert "cat" in text and "most often together: cat + dog 2, cat + ox 1, dog + ox 1" in text


def test_overlap_by_name_and_by_content():
    one, other = (split(name, np.ones((4, 2), np.uint8), "ab") for name in ("x", "y"))
    assert stats.overlap(one, other) is None
    assert "share 4 images: 'x 0'" in stats.overlap(one, other, content=True)
    same = dataclasses.replace(other, ids=["q", "x 2", "r", "s"])
    assert "x and y share 1 images: 'x 2'" in stats.overlap(one, same)
    assert "one and the same split" in stats.overlap(one, one)
    halves = one.subset(np.arange(2), "[:2]"), one.subset(np.arange(2, 4), "[2:]")
    assert stats.overlap(*halves) is None and "share 2" in stats.overlap(halves[0], one)


def test_content_is_compared_against_one_set(monkeypatch):
    """Not a set made anew for each image: twice 80,000 images of COCO would take hours."""

    class Counted(list):
        walks = 0

        def __iter__(self):
            Counted.walks += 1
            return super().__iter__()

    one, other = (split(name, np.ones((4, 2), np.uint8), "ab") for name in ("x", "y"))
    monkeypatch.setattr(stats, "_digests", lambda source: Counted([b"1", b"2", b"3", source.name.encode()]))
    assert "share 3 images" in stats.overlap(one, other, content=True) and Counted.walks == 2


def test_the_page_marks_what_training_does_not_see(tmp_path, monkeypatch, capsys):
    """Of configs/sst.py half of all labels is known, by HCP-MLR-PL's draw: here drawn once more."""
    pages = []

    def page(source, transform, **settings):
        pages.append(source)
        return Image.new("RGB", (4, 4))

    monkeypatch.setattr(samples, "page", page)
    for extra in ((), ("--split=test",)):
        code, _, err = run(capsys, "show", "configs/sst.py:smoke", *NEVER, f"--out={tmp_path}/a.png", *extra)
        assert code == 0, err
    train, test = pages
    full = load({"name": "scenes", "train_images": 30, "test_images": 12, "size": 64}, "train")
    known = np.random.RandomState(0).random_sample(full.labels.shape) < 0.5
    for row in range(30):
        told = [name if known[row, c] else f"({name})" for c, name in enumerate(full.classes) if full.labels[row, c]]
        assert samples.labels_of(train, row) == (told or ["(no label)"])
    assert "(" in "".join(samples.labels_of(train, 0) + samples.labels_of(train, 1)) and test.observed.all()


def run(capsys, *argv) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main.guarded(lambda: command.main(list(map(str, argv))))
    said = capsys.readouterr()
    return status, said.out, said.err


def test_stats_command(capsys):
    status, out, _ = run(capsys, "stats", SCENES, *NEVER, "--content")
    assert status == 0 and "by name and content" in out and "images per class" in out
    status, _, err = run(capsys, "stats", SCENES, "--config.splits.eval=train", *NEVER)
    assert status == 2 and "one and the same split" in err


@pytest.mark.parametrize("command", ["stats", "show", "pack"])
def test_data_that_are_not_there_come_with_the_command_that_fetches_them(capsys, tmp_path, monkeypatch, command):
    monkeypatch.setenv("MLJAX_DATA", str(tmp_path))
    place = [tmp_path / "packed"] if command == "pack" else []
    for config, name in (("cmsg.py:voc2007", "voc2007"), ("cmsg.py:coco2014", "coco2014")):
        status, _, err = run(capsys, command, f"configs/{config}", *place)
        assert status == 2 and err.rstrip().endswith(
            f"; python -m mljax.data prepare {name} --root={tmp_path} fetches it."
        )
    status, _, err = run(capsys, command, "configs/ml_gcn.py:nuswide", *place)
    assert status == 2 and f"mljax.data prepare nuswide --root={tmp_path} says what to put where." in err


def test_show_command(capsys, tmp_path):
    out = tmp_path / "pages" / "page.png"
    status, said, _ = run(capsys, "show", SCENES, *NEVER, f"--out={out}", "--count=3", "--views=2")
    assert status == 0 and "3 photos" in said
    with Image.open(out) as page:
        assert page.width > 2.5 * 224 and page.height > 3 * 224
    status, _, err = run(capsys, "show", SCENES, *NEVER, f"--out={out}.nothing")
    assert status == 2 and "cannot be written" in err


def test_page_shows_the_augmented_image_and_labels():
    table = np.array([[1, 0, 1]], np.uint8)
    scored, observed = np.array([[1, 0, 1]], np.uint8), np.array([[1, 1, 0]], np.uint8)
    source = split("x", table, ["cat", "dog", "ox"], scored=scored, observed=observed)
    assert samples.labels_of(source, 0) == ["cat", "dog?", "(ox)"]
    assert samples.labels_of(split("x", table * 0, "abc"), 0) == ["(no label)"]
    source = dataclasses.replace(source, read=lambda i: np.full((32, 32, 3), (250, 10, 10), np.uint8))
    page = np.asarray(samples.page(source, transforms.train(32), count=1, views=2, cell=32))
    for view in range(2):  # the original and what every augmentation makes of it, all red
        x = 8 + view * 40
        assert (page[8:40, x : x + 32] == [250, 10, 10]).all()
    with pytest.raises(UserError, match="ask for at least one"):
        samples.page(source, transforms.train(32), count=0)


def halves(i: int) -> np.ndarray:
    """Red at the left, a blue of its own at the right."""
    image = np.full((32, 32, 3), (250, 10, 10), np.uint8)
    image[:, 16:] = (10, 10, 100 + i)
    return image


def cells(page: Image.Image, columns: int, rows: int, cell: int = 32, gap: int = 8) -> list[list[np.ndarray]]:
    """The pictures of a page; it must have just so many columns."""
    array = np.asarray(page)
    assert array.shape[1] == gap + columns * (cell + gap)
    high = (array.shape[0] - gap) // rows
    return [
        [array[gap + r * high : gap + r * high + cell, gap + c * (cell + gap) :][:, :cell] for c in range(columns)]
        for r in range(rows)
    ]


def test_the_page_shows_each_different_picture_once():
    source = split("x", np.ones((3, 1), np.uint8), ["cat"], read=halves)
    fixed = transforms.train(32, crop="squish", flip=0.0)
    for row, (original, seen) in enumerate(cells(samples.page(source, fixed, count=3, views=4, cell=32), 2, 3)):
        np.testing.assert_array_equal(original, halves(row))
        np.testing.assert_array_equal(seen, halves(row))
    flipped = transforms.train(32, crop="squish", flip=0.5)
    for row, (_, *seen) in enumerate(cells(samples.page(source, flipped, count=3, views=4, cell=32), 3, 3)):
        wanted = sorted(x.tobytes() for x in (halves(row), halves(row)[:, ::-1]))
        assert sorted(np.ascontiguousarray(x).tobytes() for x in seen) == wanted
    (_, *seen), *_ = cells(samples.page(source, flipped, count=1, views=1, cell=32), 2, 1)
    assert len(seen) == 1


def test_a_row_with_fewer_different_pictures_ends_white():
    """Where one photo is its own mirror image and the other is not."""

    def read(i):
        return halves(1) if i else np.full((32, 32, 3), (250, 10, 10), np.uint8)

    source = split("x", np.ones((2, 1), np.uint8), ["cat"], read=read)
    flipped = transforms.train(32, crop="squish", flip=0.5)
    first, second = cells(samples.page(source, flipped, count=2, views=4, cell=32), 3, 2)
    assert (first[2] == 255).all() and (first[1] == [250, 10, 10]).all() and not (second[2] == 255).all(-1).any()


def test_pack_command(capsys, tmp_path):
    out = tmp_path / "packed"
    status, said, err = run(capsys, "pack", SCENES, out, *NEVER)
    assert status == 0 and "30 images" in said and "12 images" in said and "packing" in err
    assert "--config.data.name=packed" in said
    assert len(packed("train", training=True, root=str(out))) == 30
    status, said, _ = run(capsys, "pack", SCENES, out, *NEVER)
    assert status == 0 and said.count("was packed before") == 2
    status, _, err = run(capsys, "pack", SCENES, out, *NEVER, "--short-side=50")
    assert status == 2 and "was started with short_side=None" in err
    status, said, _ = run(
        capsys,
        "stats",
        SCENES,
        "--config.data.name=packed",
        f"--config.data.root={out}",
        "--config.splits.eval=test[:5]",
    )
    assert status == 0


def test_wrong_words(capsys, tmp_path):
    for argv, message in (
        (["stat", SCENES], "no command 'stat' .did you mean 'stats'"),
        (["stats", SCENES, "more"], "'more' is not expected here"),
        (["pack", SCENES], "folder to pack into is missing"),
        (["prepare", "voc2007"], "--root is missing"),
        (["prepare", "voc2007", "--root=x", "--config.seed=1"], "leave --config.KEY=VALUE out"),
        (["stats", SCENES, "--config.data.rot"], "needs a value"),
        (["stats", SCENES, "--contents"], "no flag --contents .did you mean '--content'"),
        (["stats", SCENES, "--config.data.train_imags=3"], "train_imags"),
        (["show", SCENES, "--count=0", *NEVER, f"--out={tmp_path}/x.png"], "is empty"),
        (["prepare", "voc207", f"--root={tmp_path}"], "did you mean 'voc2007'"),
    ):
        status, _, err = run(capsys, *argv)
        assert status == 2 and re.search(message, err), (argv, err)


def test_a_run_directory_says_who_decodes_and_resizes(tmp_path):
    config = read_config(SCENES).unlock()
    config.input.train["resize"] = "antialias"
    rundir.open_run(tmp_path / "run", config)
    said = json.loads((tmp_path / "run" / "env.json").read_text())["images"]
    resizes = "train resize 'antialias' by OpenCV, Pillow where it shrinks; eval resize 'bilinear' by Pillow"
    assert said.endswith(resizes) and said == rundir.images(config, simplejpeg=_simplejpeg() is not None)
    assert rundir.images(config, simplejpeg=False) == f"all by Pillow; {resizes}"


def test_cooccurrence_is_kept_under_the_fingerprint(monkeypatch, tmp_path):
    table = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1]], np.uint8)
    source = split("x", table, "abc")
    found = label_counts.cooccurrence(source)
    assert found.counts.tolist() == [[0, 2, 1], [2, 0, 1], [1, 1, 0]] and found.nums.tolist() == [3, 2, 1]
    np.testing.assert_allclose(found.conditional[:, 1], [2 / 3, 1, 1])
    calls = []
    compute = labels.cooccurrence
    monkeypatch.setattr(labels, "cooccurrence", lambda *a: calls.append(1) or compute(*a))
    np.testing.assert_array_equal(label_counts.cooccurrence(source).counts, found.counts)
    assert not calls
    hidden = np.ones_like(table)
    hidden[0, 1] = 0
    thinned = label_counts.cooccurrence(dataclasses.replace(source, labels=table * hidden, observed=hidden))
    assert calls and thinned.counts[0, 1] == 1
    label_counts.cooccurrence(dataclasses.replace(source, fingerprint="y"))
    assert len(calls) == 2
    for damaged in (tmp_path / "cache" / "cooccurrence").glob("*.npz"):
        damaged.write_bytes(b"")
    np.testing.assert_array_equal(label_counts.cooccurrence(source).counts, found.counts)
    assert len(calls) == 3


def test_check_finds_every_image_that_changed(tmp_path, capsys):
    def table(*names):
        rows = [f"{name}.png,cat,{'val' if name in 'de' else 'train'}\n" for name in names]
        (tmp_path / "labels.csv").write_text("image,labels,split\n" + "".join(rows))

    for i, name in enumerate("abcde"):
        Image.new("RGB", (8, 8), (40 * i, 9, 9)).save(tmp_path / f"{name}.png")
    table(*"abcd")
    flags = ("configs/baseline.py:csv", f"--config.data.file={tmp_path}/labels.csv")
    status, _, err = run(capsys, "check", *flags)
    assert status == 2 and "mljax-digests.json' is missing; write it with --write" in err
    assert run(capsys, "check", *flags, "--write")[0] == 0
    status, out, _ = run(capsys, "check", *flags)
    assert status == 0 and "all 4 images are as they were" in out
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "b.png")
    table(*"abe")
    status, _, err = run(capsys, "check", *flags)
    assert status == 2
    for says in ("1 changed, 'b.png'", "1 gone, 'c.png'", "1 new, 'e.png'", "1 gone, 'd.png'"):
        assert says in err
    (tmp_path / "mljax-digests.json").write_text("[]")
    assert "is not a file of digests" in run(capsys, "check", *flags)[2]
