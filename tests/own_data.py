"""Photos, tables and short runs of a user, and what a run directory holds afterwards."""

import json

import numpy as np
from PIL import Image

import toy
from mljax.data import source
from mljax.rundir.checkpoint import Checkpoints


def photo(seed, size=(40, 30)):
    noise = np.random.default_rng(seed).integers(0, 255, (size[1] // 10, size[0] // 10, 3)).astype(np.uint8)
    return Image.fromarray(noise).resize(size)


def table(folder, rows, header="image,labels,split", count=8):
    folder.mkdir(exist_ok=True)
    for i in range(count):
        photo(i).save(folder / f"{i}.png")
    (folder / "labels.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder / "labels.csv"


ROWS = [f"{i}.png,{'cat' if i % 2 else 'cat|dog'},{'val' if i > 5 else 'train'}" for i in range(8)]


def own(folder, **changes):
    found = toy.small(**changes)
    found.data = {"name": "csv", "file": str(folder / "labels.csv")}
    found.splits.eval = "val"
    found.vectors = "none"
    found.optim.batch_size = found.eval.batch_size = 16
    return found


def damage(path):
    path.write_bytes(path.read_bytes()[:45])


def pictures(folder, count, bad=()):
    """A source of PNG files, some of them cut off."""
    folder.mkdir()
    paths = []
    for i in range(count):
        paths.append(folder / f"{i}.png")
        Image.new("RGB", (8, 8), (i, i, i)).save(paths[-1])
    for i in bad:
        damage(paths[i])
    labels = np.arange(count, dtype=np.uint8)[:, None] % 2
    ones = np.ones_like(labels)
    return source.Source(
        name="own train", classes=("odd",), ids=[p.name for p in paths], labels=labels, observed=ones, scored=ones,
        read=source.Files([str(p) for p in paths]), fingerprint=str(folder),
    )  # fmt: skip


def saved(workdir):
    with Checkpoints(workdir / "checkpoints" / "0", keep_best_of="mAP", read_only=True) as checkpoints:
        return checkpoints.steps


def steps_logged(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["stage"], line["step"]) for line in lines if "loss" in line]


def report(workdir):
    return json.loads((workdir / "report.json").read_text())["metrics"]
