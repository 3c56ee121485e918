"""Data that changes between the start and the resume of a run: every change is noticed, and nothing else is."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.torture import processes, runs
from benchmarks.torture.harness import Case, Failed, Kind, once

COUNT, VAL = 64, 16
CLASSES = ("bird", "cat", "dog")
NOTICED = re.compile(r"has changed since|is not the one that the run|differ|classes", re.I)
ARGV = (
    *("--config=configs/baseline.py:smoke", "--config.data.name=csv", "--config.data.file=labels.csv"),
    *("--config.splits.eval=val", "--config.optim.epochs=4", "--workdir=run"),
)


def case(case: Case) -> dict[str, Any]:
    template = once(case.shared / "started", lambda folder: _start(folder))
    work = case.folder / "work"
    shutil.copytree(template / "work", work)
    before = (work / "run" / "metrics.jsonl").read_bytes()
    CHANGES[case.what](work, case.rng)
    process = processes.forked(list(ARGV), case.folder / "log", cwd=work)
    status, said = process.wait(runs.LIMIT), process.err.strip()
    if "Traceback" in said:
        raise Failed(f"a traceback: {said[-300:]!r}")
    if case.what in SAME:
        if status:
            raise Failed(f"status {status}, though nothing that counts has changed: {said[-300:]!r}")
        return {}
    if status != 2 or not NOTICED.search(said.rpartition("mljax: ")[2]):
        raise Failed(f"status {status}, not noticed: {said[-300:]!r}")
    if (work / "run" / "metrics.jsonl").read_bytes() != before:
        raise Failed("steps were trained before it was noticed")
    return {"said": said.rpartition("mljax: ")[2][:300]}


# --- the data ---------------------------------------------------------------------------------------------------------


def _start(folder: Path) -> None:
    """A run on a table of photos that was killed after an epoch."""
    work = folder / "work"
    work.mkdir(parents=True)
    rows = ["image,labels,split"]
    for i in range(COUNT):
        _photo(i).save(work / f"{i}.png")
        names = [name for j, name in enumerate(CLASSES) if (i + 1) >> j & 1]
        rows.append(f"{i}.png,{'|'.join(names)},{'val' if i >= COUNT - VAL else 'train'}")
    (work / "labels.csv").write_text("\n".join(rows) + "\n")

    def hook() -> None:
        processes.before("mljax.scoring:Scorer.scores", 3, processes.die)

    process = processes.forked(list(ARGV), folder / "log", cwd=work, hook=hook)
    if process.wait(3 * runs.LIMIT) != 137:
        raise Failed(f"the run to be resumed ended with {process.status}: {process.err[-300:]!r}")


def _photo(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    return Image.fromarray(noise).resize((40, 30))


def _rows(change: Callable[[list[str], np.random.Generator], list[str]]) -> Callable[[Path, np.random.Generator], None]:
    """A change of the table's rows."""

    def apply(work: Path, rng: np.random.Generator) -> None:
        head, *rows = (work / "labels.csv").read_text().splitlines()
        (work / "labels.csv").write_text("\n".join([head, *change(rows, rng)]) + "\n")

    return apply


def _pick(rows: list[str], rng: np.random.Generator, split: str = "train") -> int:
    """A row of a split."""
    chosen = [i for i, row in enumerate(rows) if row.endswith(split)]
    return chosen[int(rng.integers(len(chosen)))]


def _removed(rows: list[str], rng: np.random.Generator) -> list[str]:
    del rows[_pick(rows, rng)]
    return rows


def _removed_from_val(rows: list[str], rng: np.random.Generator) -> list[str]:
    del rows[_pick(rows, rng, "val")]
    return rows


def _swapped(rows: list[str], rng: np.random.Generator) -> list[str]:
    a, b = _pick(rows, rng), _pick(rows, rng)
    b = b if a != b else (a + 1) % (COUNT - VAL)
    rows[a], rows[b] = rows[b], rows[a]
    return rows


def _shuffled(rows: list[str], rng: np.random.Generator) -> list[str]:
    return [rows[i] for i in rng.permutation(len(rows))]


def _labelled(rows: list[str], rng: np.random.Generator, split: str = "train") -> list[str]:
    i = _pick(rows, rng, split)
    image, labels, split = rows[i].split(",")
    changed = "cat" if labels != "cat" else "dog"
    rows[i] = f"{image},{changed},{split}"
    return rows


def _labelled_in_val(rows: list[str], rng: np.random.Generator) -> list[str]:
    return _labelled(rows, rng, "val")


def _unlabelled(rows: list[str], rng: np.random.Generator) -> list[str]:
    i = _pick(rows, rng)
    while not rows[i].split(",")[1]:
        i = _pick(rows, rng)
    image, _, split = rows[i].split(",")
    rows[i] = f"{image},,{split}"
    return rows


def _renamed_class(rows: list[str], rng: np.random.Generator) -> list[str]:
    """The labels are the same, and their order is another."""
    return [row.replace("bird", "zebra") for row in rows]


def _new_class(rows: list[str], rng: np.random.Generator) -> list[str]:
    i = _pick(rows, rng)
    image, labels, split = rows[i].split(",")
    rows[i] = f"{image},{labels}|ant,{split}"
    return rows


def _exchanged_classes(rows: list[str], rng: np.random.Generator) -> list[str]:
    return [row.replace("bird", "?").replace("dog", "bird").replace("?", "dog") for row in rows]


def _moved(rows: list[str], rng: np.random.Generator) -> list[str]:
    i = _pick(rows, rng)
    rows[i] = rows[i].replace("train", "val")
    return rows


def _added(work: Path, rng: np.random.Generator) -> None:
    _photo(1000).save(work / "new.png")
    with (work / "labels.csv").open("a") as file:
        file.write("new.png,cat,train\n")


def _replaced(work: Path, rng: np.random.Generator) -> None:
    _photo(2000).save(work / f"{rng.integers(COUNT - VAL)}.png")


def _replaced_in_val(work: Path, rng: np.random.Generator) -> None:
    _photo(2000).save(work / f"{rng.integers(COUNT - VAL, COUNT)}.png")


def _exchanged_images(work: Path, rng: np.random.Generator) -> None:
    a, b = (int(i) for i in rng.choice(COUNT - VAL, 2, replace=False))
    one, other = (work / f"{a}.png").read_bytes(), (work / f"{b}.png").read_bytes()
    (work / f"{a}.png").write_bytes(other)
    (work / f"{b}.png").write_bytes(one)


def _one_pixel(work: Path, rng: np.random.Generator) -> None:
    path = work / f"{rng.integers(COUNT - VAL)}.png"
    array = np.array(Image.open(path))
    array[3, 3] ^= 255
    Image.fromarray(array).save(path)


def _renamed_image(work: Path, rng: np.random.Generator) -> None:
    i = int(rng.integers(COUNT - VAL))
    (work / f"{i}.png").rename(work / "other.png")
    text = (work / "labels.csv").read_text()
    (work / "labels.csv").write_text(re.sub(rf"^{i}\.png", "other.png", text, flags=re.M))


def _touched(work: Path, rng: np.random.Generator) -> None:
    for path in (*work.glob("*.png"), work / "labels.csv"):
        os.utime(path, (1, 1))


CHANGES: dict[str, Callable[[Path, np.random.Generator], None]] = {
    "row removed": _rows(_removed),
    "row of val removed": _rows(_removed_from_val),
    "row added": _added,
    "two rows swapped": _rows(_swapped),
    "rows shuffled": _rows(_shuffled),
    "label changed": _rows(_labelled),
    "label of val changed": _rows(_labelled_in_val),
    "labels removed": _rows(_unlabelled),
    "class renamed, order changed": _rows(_renamed_class),
    "class added": _rows(_new_class),
    "classes exchanged": _rows(_exchanged_classes),
    "row moved to val": _rows(_moved),
    "image replaced": _replaced,
    "image of val replaced": _replaced_in_val,
    "two images exchanged": _exchanged_images,
    "one pixel": _one_pixel,
    "image renamed": _renamed_image,
    "only touched": _touched,
    "nothing": lambda work, rng: None,
}
SAME = ("only touched", "nothing")

KIND = Kind(
    name="data",
    goal="changes between start and resume: all noticed (and two that are none: not)",
    plan={
        **{name: 2 for name in CHANGES if name not in SAME},
        "label changed": 5,
        "image replaced": 5,
        **dict.fromkeys(SAME, 1),
    },
    case=case,
    limit=300.0,
)
