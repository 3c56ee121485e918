"""What a run has learnt, as pictures: retrieval by labels, t-SNE of label features, attention maps, pseudo-labels.

python -m mljax.analyze --workdir=runs/cmsg retrieval [--labels=person,dog] [--query=photo.jpg]
python -m mljax.analyze --workdir=runs/cmsg tsne [--labels=cat,dog] [--points=2000]
python -m mljax.analyze --workdir=runs/cmsg attention [--photo=photo.jpg] [--labels=dog]
python -m mljax.analyze --workdir=runs/sst cooccurrence [--photo=photo.jpg] [--top=12]
python -m mljax.analyze --workdir=runs/sst pseudo [--threshold=0.75]

Pictures and a JSON file of the numbers go to the folder `analysis` of the run. Every random choice
comes from --seed, so the same command makes the same pictures.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mljax import experiment, rundir
from mljax.analyze import embeddings, pseudo_labels
from mljax.analyze.inputs import CELL, Inputs, filename, photo_flags
from mljax.config.command import Parser
from mljax.errors import UserError, nearest
from mljax.pictures import drawing, plots
from mljax.pipeline.images import decode
from mljax.run import load as load_run

HEADS = 8  # columns of heads at most


def attention_flags(parser: Parser) -> None:
    photo_flags(parser)
    parser.add_argument("--labels", action="append", help="labels to show, joined by commas; by default the true ones")
    parser.add_argument("--top", type=int, default=4, help="labels of a photo at most, the likeliest first")


def attention(inputs: Inputs, args: argparse.Namespace) -> dict[str, Any]:
    """Where the run attends for a label: a picture for each photo, a row for each label, a column for each head.

    spread: the share of positions that a map covers evenly, exp(entropy) / n: 1 is everywhere alike.
    """
    if args.count < 1 or args.top < 1:
        raise UserError("--count and --top must be at least 1.")
    chosen = [inputs.column(name) for labels in inputs.asked(args.labels) for name in labels]
    shown = inputs.photos(args.photo, chosen, args.count)
    figures: list[dict[str, Any]] = []
    images = iter(shown)
    for _, scores, out in inputs.run.stream([image for _, image, _ in shown]):
        inputs.run.maps(out)  # an error where there are none
        for number, (row, maps) in enumerate(zip(scores, np.asarray(out.attention, np.float32))):
            name, image, truth = next(images)
            columns = (
                chosen or np.flatnonzero(truth if truth is not None else row >= 0.5).tolist() or [int(row.argmax())]
            )
            columns = sorted(columns, key=lambda i, row=row: -row[i])[: args.top]
            sheet = Sheet(decode(image, where=name), name, row, maps, regions(inputs, out, number))
            picture = attention_sheet(sheet, columns, inputs.run.classes)
            target = inputs.folder / f"attention_{filename(Path(name).stem)}.png"
            plots.save(picture, target)
            print(target)
            seen = [
                {"label": inputs.run.classes[i], "score": float(row[i]), "spread": [spread(m) for m in maps[:, i]]}
                for i in columns
            ]
            figures.append({"image": name, "labels": seen, "picture": target.name})
    return {"attention": figures}


@dataclasses.dataclass(frozen=True)
class Sheet:
    """What one photo shows: scores (l), maps (k l h w), and boxes of labels in shares of the photo's sides."""

    photo: Any
    name: str
    scores: np.ndarray
    maps: np.ndarray
    boxes: dict[int, list[float]]


def regions(inputs: Inputs, out: Any, number: int) -> dict[int, list[float]]:
    """Label -> left, top, right, bottom, for systems that classify regions of the image (MCAR)."""
    extra = out.extra or {}
    if "boxes" not in extra:
        return {}
    run = inputs.run.experiment
    size = run.eval_views[0].size if run.eval_views else run.config.input.size
    left, right, top, bottom = np.asarray(extra["boxes"])[number].T / size
    boxes = np.stack([left, top, right, bottom], axis=-1).tolist()
    return dict(zip(np.asarray(extra["box_labels"])[number].tolist(), boxes))


def attention_sheet(sheet: Sheet, columns: Sequence[int], classes: Sequence[str]) -> Any:
    """A row for each label: the photo, with the label's box where it has one; all heads together; each head."""
    photo = sheet.photo.copy()
    photo.thumbnail((2 * CELL, 2 * CELL))
    heads, stem = len(sheet.maps), Path(sheet.name).stem
    pictures, captions = [], []
    for i in columns:
        several = [sheet.maps[:, i].mean(0), *(sheet.maps[:HEADS, i] if heads > 1 else ())]
        overlays = [drawing.overlay(photo, m, high=float(np.quantile(m, 0.95))) for m in several]
        pictures.append([plots.boxed(photo, sheet.boxes[i]) if i in sheet.boxes else photo, *overlays])
        words = [f"head {k + 1}" for k in range(min(heads, HEADS))] if heads > 1 else []
        captions.append([stem, f"{classes[i]} {sheet.scores[i]:.2f}", *words])
    together = f"all {heads} heads, then each" if heads > 1 else "one head"
    return plots.rows(pictures, captions, f"{stem}: where it attends for a label; {together}", CELL)


def spread(attention_map: np.ndarray) -> float:
    p = attention_map.astype(np.float64).ravel()
    p = p[p > 0] / p.sum()
    return float(np.exp(-(p * np.log(p)).sum()) / attention_map.size)


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure that the command can make.

    Attributes:
      flags: adds its own flags to a parser.
      make: writes pictures, prints what was measured, and returns it for the JSON file.
      images: how many images of the split it takes, where --images does not say.
      training: takes the training split, where --split does not say.
    """

    flags: Callable[[Parser], None]
    make: Callable[[Inputs, argparse.Namespace], dict[str, Any]]
    images: int = 1000
    training: bool = False


FIGURES = {
    "retrieval": Figure(embeddings.retrieval_flags, embeddings.retrieval),
    "tsne": Figure(embeddings.tsne_flags, embeddings.tsne),
    "attention": Figure(attention_flags, attention, images=200),
    "cooccurrence": Figure(pseudo_labels.cooccurrence_flags, pseudo_labels.cooccurrence, images=200),
    "pseudo": Figure(pseudo_labels.flags, pseudo_labels.pseudo_labels, images=2000, training=True),
}


def open_inputs(args: argparse.Namespace, images: int, training: bool = False) -> Inputs:
    """The run and its images."""
    if images < 2:
        raise UserError(f"--images={images} is too few to compare; expected at least 2.")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed={args.seed} is out of range; expected 0 to 2^32 - 1.")
    run = load_run(args.workdir)
    config = run.experiment.config
    split = args.split or (config.splits.train if training else config.splits.eval)
    source = experiment.source(config, split, training=False)
    if tuple(source.classes) != run.classes:
        raise UserError(f"{source.name} has other classes than this run; choose a --split of its own data set.")
    rng = np.random.default_rng(args.seed)
    if len(source) > images:
        source = dataclasses.replace(
            source.subset(np.sort(rng.permutation(len(source))[:images]), ""), name=f"{images} images of {source.name}"
        )
    return Inputs(run, source, Path(args.out) if args.out else Path(args.workdir) / "analysis", rng, split)


def which(argv: list[str]) -> str:
    """The figure that is asked for: the first word that is neither a flag nor the value of one."""
    words = iter(argv)
    for word in words:
        if not word.startswith("-"):
            if word not in FIGURES:
                raise UserError(f"{word!r} is not a figure{nearest(word, FIGURES)}.")
            return word
        if "=" not in word and word not in ("-h", "--help"):
            next(words, None)
    return ""


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    name = which(argv)
    parser = Parser("analyze", __doc__)
    parser.add_argument("figure", choices=sorted(FIGURES), help="what to make")
    parser.add_argument("--workdir", required=True, help="run directory")
    parser.add_argument("--split", help="any split of the run's data set; by default the one that it was scored on")
    parser.add_argument("--images", type=int, help="how many images to take, drawn by the seed")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice")
    parser.add_argument("--out", help="folder for pictures and numbers; by default WORKDIR/analysis")
    if name:
        FIGURES[name].flags(parser)
    args = parser.parse_args(argv)
    figure = FIGURES[name]
    inputs = open_inputs(args, figure.images if args.images is None else args.images, figure.training)
    results = {"split": inputs.source.name, "selected_by": inputs.run.selected_by, "seed": args.seed}
    results |= figure.make(inputs, args)
    inputs.folder.mkdir(parents=True, exist_ok=True)
    rundir.write_text(inputs.folder / f"{name}.json", json.dumps(results, indent=2))
    return 0
