"""Data that changed between a start and a resume: every change is noticed, and nothing else is."""

import contextlib
import csv
import re
import shutil
import time

import numpy as np
import pytest

import toy
from mljax import check, evaluate, rundir, train
from mljax import run as runs
from mljax.config.overrides import overridden
from mljax.config.stages import stage_configs
from mljax.data import fingerprint
from mljax.data.source import Files, Source
from mljax.errors import UserError
from mljax.rundir.progress import Writer
from mljax.train.spec import StageSpec
from mljax.train.stage import load_splits
from own_data import photo

pytestmark = pytest.mark.usefixtures("surroundings")
NAMES = ("cat", "dog", "owl")
HEADER = ("image", "labels", "split")


def write(folder, rows):
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([HEADER, *rows])


def read(folder):
    with (folder / "labels.csv").open(newline="") as file:
        return [row for row in csv.reader(file)][1:]


def config_of(**changes):
    config = toy.small(**changes)
    config.data = {"name": "csv", "file": "labels.csv", "classes": "classes.txt"}
    config.splits.eval, config.vectors = "val", "none"
    config.optim.epochs = 1
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of data and the directory of a run on it; not to be changed."""
    place = tmp_path_factory.mktemp("trained")
    folder = place / "data"
    folder.mkdir()
    rng, rows = np.random.default_rng(0), []
    for i in range(40):
        photo(i).save(folder / f"{i}.png")
        known = [name for name in NAMES if rng.random() < 0.5]
        rows.append((f"{i}.png", "|".join(known + (["?owl"] if i % 5 == 0 and "owl" not in known else [])),
                     "train" if i < 30 else "val"))  # fmt: skip
    write(folder, rows)
    (folder / "classes.txt").write_text("\n".join(NAMES))
    with contextlib.chdir(folder):  # the config names the data by a relative path, so that a copy is read from there
        train.fit(config_of(), place / "run")
    return place


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place" / "data")
    return tmp_path / "place"


class Quiet(Writer):
    """A writer that takes notes."""

    def __init__(self, workdir):
        super().__init__(workdir)
        self.lines = []

    def line(self, text):
        self.lines.append(text)


def loaded(place, **changes):
    """What a resume does with the data before anything else: the lines that it says."""
    config = config_of()
    for key, value in changes.items():
        config.data[key] = value
    check.check(config)
    writer = Quiet(place / "run")
    with writer:
        splits = load_splits(StageSpec(config, place / "run"), writer)
    assert splits.checked is not None
    return splits.checked, writer.lines


def edited(which, edit):
    """A change of the rows of one split."""

    def change(folder):
        rows = read(folder)
        mine = [list(row) for row in rows if row[2] == which]
        others = [row for row in rows if row[2] != which]
        write(folder, [*(edit(mine) or mine), *others])

    return change


def swap(rows, i, j):
    rows[i], rows[j] = rows[j], rows[i]


def flip(rows, i, name="cat"):
    labels = set(filter(None, rows[i][1].split("|")))
    rows[i][1] = "|".join(sorted((labels ^ {name}) - {f"?{name}"}))


def unknown(rows, i):
    labels = {name for name in rows[i][1].split("|") if name and name.strip("?") != "dog"}
    rows[i][1] = "|".join(sorted(labels | {"?dog"}))


def exchange(rows, i, j):
    rows[i][0], rows[j][0] = rows[j][0], rows[i][0]


def replaced(*rows):
    def change(folder):
        for row in rows:
            photo(100 + row).save(folder / f"{row}.png")

    return change


def touched_up(row):
    """One bit of a file, at its end."""

    def change(folder):
        path = folder / f"{row}.png"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    return change


def classes(*names, rename=None):
    def change(folder):
        (folder / "classes.txt").write_text("\n".join(names))
        if rename:
            rows = read(folder)
            write(folder, [(image, labels.replace(*rename), split) for image, labels, split in rows])

    return change


def added(split, count):
    def change(folder):
        for i in range(50, 50 + count):
            photo(i).save(folder / f"{i}.png")
        write(folder, [*read(folder), *((f"{i}.png", "cat", split) for i in range(50, 50 + count))])

    return change


def renamed(folder):
    shutil.copy(folder / "3.png", folder / "other.png")
    write(folder, [("other.png" if row[0] == "3.png" else row[0], *row[1:]) for row in read(folder)])


def moved(image, split):
    def change(folder):
        write(folder, [(*row[:2], split if row[0] == image else row[2]) for row in read(folder)])

    return change


CHANGES = {
    **{f"{n} train rows removed": (edited("train", lambda r, n=n: r[n:]), f"{n} images? removed") for n in (1, 7)},
    "the last train row removed": (edited("train", lambda r: r[:-1]), "1 image removed, 29 images instead of 30"),
    "a train row in the middle removed": (edited("train", lambda r: r[:9] + r[10:]), "1 image removed"),
    "an eval row removed": (edited("val", lambda r: r[1:]), "eval split.* 1 image removed, 9 images instead of 10"),
    "half of the eval rows removed": (edited("val", lambda r: r[5:]), "eval split.* 5 images removed"),
    **{f"{n} train rows added": (added("train", n), f"train split.* {n} images? added") for n in (1, 5)},
    "an eval row added": (added("val", 1), "eval split.* 1 image added, 11 images instead of 10"),
    "two train rows swapped": (edited("train", lambda r: swap(r, 0, 1)), "train split.*: another order"),
    "first and last train row swapped": (edited("train", lambda r: swap(r, 0, -1)), "another order"),
    "train rows reversed": (edited("train", lambda r: r[::-1]), "another order"),
    "train rows rotated": (edited("train", lambda r: r[1:] + r[:1]), "another order"),
    "train rows sorted": (edited("train", lambda r: sorted(r)), "another order"),
    "eval rows swapped": (edited("val", lambda r: swap(r, 3, 4)), "eval split.*: another order"),
    "eval rows reversed": (edited("val", lambda r: r[::-1]), "eval split.*: another order"),
    **{f"a label of train row {i}": (edited("train", lambda r, i=i: flip(r, i)), "1 image with other labels")
       for i in (0, 13, 29)},
    "labels of five train rows": (edited("train", lambda r: [flip(r, i) for i in range(5)] and None),
                                  "5 images with other labels"),
    "all labels of a class": (edited("train", lambda r: [flip(r, i, "dog") for i in range(30)] and None),
                              "30 images with other labels"),
    "an eval label": (edited("val", lambda r: flip(r, 2)), "eval split.* 1 image with other labels"),
    "labels of two train rows exchanged": (edited("train", lambda r: exchange(r, 1, 2)), "another order|other labels"),
    "a label no longer known": (edited("train", lambda r: unknown(r, 4)), "1 image.* with other"),
    "an eval label no longer known": (edited("val", lambda r: unknown(r, 4)), "eval split.* 1 image.* with other"),
    "an unknown label now known": (edited("train", lambda r: flip(r, 0, "owl")), "1 image.* with other"),
    "a train image replaced": (replaced(3), r"other bytes in 1 of the 30 images that were compared \('3.png'\)"),
    "the first train image replaced": (replaced(0), r"other bytes in 1 of the 30"),
    "four train images replaced": (replaced(4, 5, 6, 29), r"in 4 of the 30 .*'4.png', '5.png', '6.png', \.\."),
    "an eval image replaced": (replaced(33), r"eval split.* other bytes in 1 of the 10 .*'33.png'"),
    "all eval images replaced": (replaced(*range(30, 40)), "other bytes in 10 of the 10"),
    "one bit of an image": (touched_up(8), "other bytes in 1 of the 30"),
    "two images exchanged": (lambda f: [replaced(2)(f), shutil.copy(f / "1.png", f / "2.png")], "other bytes in 1 of"),
    "an image renamed": (renamed, "1 image added, 1 image removed"),
    "a train row to eval": (moved("5.png", "val"), "train split.* 1 image removed"),
    "an eval row to train": (moved("35.png", "train"), "train split.* 1 image added"),
    "rows and labels": (lambda f: [edited("train", lambda r: r[1:])(f), edited("train", lambda r: flip(r, 3))(f)],
                        "1 image removed, 1 image with other labels"),
}  # fmt: skip
CLASSES = {
    "two classes swapped": (classes("dog", "cat", "owl"), r"3 classes are in another order \(class 1 was 'cat'"),
    "the last two swapped": (classes("cat", "owl", "dog"), r"another order \(class 2 was 'dog' and is 'owl'\)"),
    "classes rotated": (classes("owl", "cat", "dog"), "3 classes are in another order"),
    "a class renamed": (
        classes("kitten", "dog", "owl", rename=("cat", "kitten")),
        "new are 'kitten', missing are 'cat'",
    ),
    "a class added": (classes("cat", "dog", "owl", "fox"), "it has 4 classes instead of 3, new are 'fox'"),
    "a class added in front": (classes("ape", "cat", "dog", "owl"), "it has 4 classes instead of 3, new are 'ape'"),
}
HARMLESS = {
    "nothing": lambda folder: None,
    "the file written again": lambda folder: write(folder, read(folder)),
    "eval rows first in the file": lambda folder: write(folder, sorted(read(folder), key=lambda r: r[2], reverse=True)),
    "images copied, with other times": lambda folder: [p.touch() for p in folder.glob("*.png")],
    "order of an image's labels": lambda folder: write(
        folder, [(i, "|".join(reversed(labels.split("|"))), s) for i, labels, s in read(folder)]
    ),
}  # fmt: skip


def kept(place):
    return [(place / "run" / name).read_bytes() for name in ("data.json", "data.npz")]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_refused_or_accepted_and_recorded(place, change):
    make, words = CHANGES[change]
    make(place / "data")
    before = kept(place)
    for _ in range(2):
        with pytest.raises(UserError, match=words) as error:
            loaded(place)
        assert "--config.data.changed=accept" in str(error.value) and str(place / "run") in str(error.value)
    assert kept(place) == before
    checked, lines = loaded(place, changed="accept")
    assert any("has changed since the run started, which was accepted: " in line for line in lines)
    checked.save()
    checked, lines = loaded(place)
    assert not any("has changed" in line for line in lines)
    listed = [
        entry for part in rundir.read_json(place / "run" / "data.json").values() for entry in part.get("accepted", ())
    ]
    assert listed and all(entry["time"].startswith("20") for entry in listed)
    assert any(re.search(words.rpartition("split.*")[2].lstrip(" :"), entry["what"]) for entry in listed)


@pytest.mark.parametrize("change", CLASSES)
def test_other_classes_are_never_accepted(place, change):
    make, words = CLASSES[change]
    make(place / "data")
    for more in ({}, {"changed": "accept"}):
        with pytest.raises(UserError, match=words):
            loaded(place, **more)


@pytest.mark.parametrize("change", HARMLESS)
def test_data_that_did_not_change_are_taken(place, change):
    HARMLESS[change](place / "data")
    before = kept(place)
    checked, lines = loaded(place)
    checked.save()
    assert kept(place) == before and not any("changed" in line for line in lines)


def test_a_run_without_a_record_gets_one_when_it_goes_on(place):
    for name in ("data.json", "data.npz"):
        (place / "run" / name).unlink()
    edited("train", lambda r: r[::-1])(place / "data")
    checked, _ = loaded(place)
    checked.save()
    edited("train", lambda r: r[::-1])(place / "data")
    with pytest.raises(UserError, match="another order"):
        loaded(place)


def test_whole_digests_find_what_a_sample_misses(place, monkeypatch):
    """A run that was sampled and goes on with digest="whole" keeps all of them from then on."""
    monkeypatch.setattr(fingerprint, "SAMPLE", 4)
    for name in ("data.json", "data.npz"):
        (place / "run" / name).unlink()
    loaded(place)[0].save()
    rows = set(fingerprint.chosen(30, "sampled").tolist())
    missed = next(row for row in range(30) if row not in rows)
    original = (place / "data" / f"{missed}.png").read_bytes()
    replaced(missed)(place / "data")
    loaded(place)
    (place / "data" / f"{missed}.png").write_bytes(original)
    loaded(place, digest="whole")[0].save()
    replaced(missed)(place / "data")
    with pytest.raises(UserError, match=f"other bytes in 1 of the 30 .*'{missed}.png'"):
        loaded(place, digest="whole")
    loaded(place, digest="none")
    for key, value in (("digest", "all"), ("changed", "yes")):
        with pytest.raises(UserError, match=f"config.data.{key} is '{value}'; expected one of"):
            check.check(overridden(config_of(), [(f"data.{key}", value)]))


@pytest.mark.parametrize("lost", ["removed", "damaged"])
def test_without_its_rows_a_change_is_noticed_though_not_counted(place, lost, caplog):
    path = place / "run" / "data.npz"
    path.unlink() if lost == "removed" else path.write_bytes(b"x")
    before = kept(place) if lost == "damaged" else []
    checked, _ = loaded(place)
    assert f"{path} is damaged or missing" in caplog.text
    edited("train", lambda r: flip(r, 3))(place / "data")
    with pytest.raises(UserError, match="train split.*: other labels;"):
        loaded(place)
    edited("train", lambda r: r[1:])(place / "data")
    with pytest.raises(UserError, match="other images or another order, other labels, .*29 images instead of 30"):
        loaded(place)
    checked.save()
    assert path.stat().st_size > 100 and kept(place) != before
    caplog.clear()
    with pytest.raises(UserError, match="1 image removed"):
        loaded(place)
    assert not caplog.records


def test_a_damaged_record_is_refused(place):
    path = place / "run" / "data.json"
    path.write_text(path.read_text().replace('"count": 30', '"count": 31'))
    with pytest.raises(UserError, match="data.json is damaged .*; restore it, or remove it: then the data as they are"):
        loaded(place)


def test_a_resume_and_an_evaluation_notice(place, shell, refused):
    """From end to end: training goes on only with consent; an evaluation of the run's own split too; others go."""
    config, flags = config_of(), (f"--workdir={place / 'run'}", "--split=val")
    assert shell(evaluate, *flags)[0] == 0
    edited("val", lambda r: flip(r, 2))(place / "data")
    message = refused(evaluate, *flags)
    assert "eval split is not the one" in message and "1 image with other labels" in message
    assert shell(evaluate, *flags, "--config.data.changed=accept")[0] == 0
    (report,) = (place / "run").glob("report_val*.json")
    assert rundir.read_json(report)["data_changed"] == "1 image with other labels"
    assert shell(evaluate, flags[0], "--split=train")[0] == 0  # not the split of the record
    copy = place / "copy"
    shutil.copytree(place / "data", copy)
    assert shell(evaluate, *flags, f"--config.data.file={copy / 'labels.csv'}")[0] == 0  # another data set, on purpose
    classes("dog", "cat", "owl")(copy)
    message = refused(evaluate, *flags, f"--config.data.file={copy / 'labels.csv'}",
                      "--config.data.changed=accept")  # fmt: skip
    assert "other classes than this run" in message
    (place / "run" / "report.json").unlink()
    with pytest.raises(UserError, match="eval split.* 1 image with other labels"):
        train.fit(config, place / "run")
    accepted = config_of()
    accepted.data.changed = "accept"
    train.fit(accepted, place / "run")
    (place / "run" / "report.json").unlink()
    train.fit(config, place / "run")
    assert runs.load(place / "run").evaluate()["images"] == 10


def test_later_stages_have_records_of_their_own(place):
    config = config_of(stages=({}, {"observe": {"name": "known", "proportion": 0.5}}))
    second = stage_configs(config)[1]
    spec = StageSpec(second, place / "run", 1, 2)
    with Writer(place / "run") as writer:
        writer.console.quiet = True
        checked = load_splits(spec, writer).checked
        assert checked is not None
        checked.save()
        assert set(rundir.read_json(place / "run" / "data.json")) == {"train", "eval", "stage1.train", "stage1.eval"}
        load_splits(spec, writer)
        with second.unlocked():
            second.observe.proportion = 0.4
        with pytest.raises(UserError, match="train split.* images with other"):
            load_splits(spec, writer)


def test_a_table_of_rows_does_not_go_on_with_others(place):
    edited("train", lambda r: swap(r, 0, 1))(place / "data")
    checked, _ = loaded(place, changed="accept")
    for state in ({"params": {"label_table": np.zeros((30, 3))}}, {"labels": {"made": np.zeros((30, 3), np.uint8)}}):
        with pytest.raises(UserError, match="another order.*holds what was learnt of each of its rows"):
            checked.check_tables(state, "own")
    checked.check_tables({"params": {"kernel": np.zeros((30, 4))}}, "own")
    edited("train", lambda r: swap(r, 0, 1))(place / "data")
    edited("train", lambda r: flip(r, 1))(place / "data")
    loaded(place, changed="accept")[0].check_tables({"params": {"label_table": np.zeros((30, 3))}}, "own")


def test_train_photos_in_the_evaluation_split_are_said(place):
    assert not any("by name" in line for line in loaded(place)[1])
    for name in ("data.json", "data.npz"):
        (place / "run" / name).unlink()
    shutil.copy(place / "data" / "7.png", place / "data" / "33.png")
    (line,) = [line for line in loaded(place)[1] if "by name" in line]
    assert line.startswith("1 images of data/labels.csv val are in data/labels.csv train too, so that scores")


def test_a_hundred_thousand_rows_cost_little(tmp_path):
    paths = [str(tmp_path / f"{i}.jpg") for i in range(100)]
    for i in range(100):
        (tmp_path / f"{i}.jpg").write_bytes(np.random.default_rng(i).bytes(1000 + i))
    count, rng = 100_000, np.random.default_rng(0)
    labels = rng.integers(0, 2, (count, 80)).astype(np.uint8)
    ones = np.ones_like(labels)
    source = Source(
        name="big", classes=tuple(map(str, range(80))), ids=[f"{i}.jpg" for i in range(count)], labels=labels,
        observed=ones, scored=ones, read=Files([paths[i % 100] for i in range(count)]), fingerprint="x",
    )  # fmt: skip
    evaluation = source.subset(np.arange(1000), "")
    began = time.process_time()
    record = fingerprint.record(source)
    assert fingerprint.overlap(source, evaluation, record, fingerprint.record(evaluation)) == (1000, 0)
    rundir.save_data_record(tmp_path, "train", record)
    assert rundir.check_data_record(tmp_path, "train", record).what == ""
    seconds = time.process_time() - began
    print(f"{seconds:.2f} CPU s")
    assert seconds < 3
