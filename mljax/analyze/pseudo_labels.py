"""Figures of SST: which labels go together in an image, and the pseudo-labels of its two branches."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from mljax import experiment, rundir
from mljax.analyze.inputs import CELL, Inputs, filename, photo_flags
from mljax.config.command import Parser
from mljax.errors import UserError
from mljax.losses import weak_labels
from mljax.pictures import plots
from mljax.pipeline import loader
from mljax.pipeline.images import decode

BRANCHES = {"ist": "IST", "cst": "CST"}
SHOWN = 5  # pseudo-labels under a photo


# --- co-occurrence ---------------------------------------------------------------------------------------------------


def cooccurrence_flags(parser: Parser) -> None:
    photo_flags(parser)
    parser.add_argument("--labels", action="append", help="labels to show, joined by commas")
    parser.add_argument("--top", type=int, default=12, help="labels at most: the true ones, then the likeliest")


def cooccurrence(inputs: Inputs, args: argparse.Namespace) -> dict[str, Any]:
    """The co-occurrence that the pair head sees in an image, beside that of the known training labels.

    A picture for each photo: the photo, the image's matrix P (symmetric, ones on its diagonal), and P(column | row)
    of the known labels of the training split, the same for every image.
    Reference: Chen et al., AAAI 2022, whose figure compares both.
    """
    if args.count < 1 or args.top < 2:
        raise UserError("--count must be at least 1, and --top at least 2 labels.")
    system = inputs.run.experiment.system
    if getattr(system, "cooccurrence", None) == "dataset":
        raise UserError(
            "This run takes the co-occurrence of labels from the data set, the same for every image"
            " (config.system.cooccurrence='dataset'); expected a run with"
            " cooccurrence='image' instead."
        )
    if not getattr(system, "_pairs", False):
        raise UserError(
            f"The system {inputs.run.experiment.config.system.name!r} of this run learns no co-occurrence of labels in"
            " an image; expected a run of configs/sst.py with the branch IST."
        )
    chosen = [inputs.column(name) for labels in inputs.asked(args.labels) for name in labels]
    shown = inputs.photos(args.photo, [], args.count)
    classes, whole = inputs.run.classes, system.adjacency
    results, images = [], iter(shown)
    for _, scores, out in inputs.run.stream([image for _, image, _ in shown]):
        extra: Any = out.extra
        matrices = np.asarray(weak_labels.cooccurrence_matrix(extra["pair_logits"], len(classes)))
        for row, matrix in zip(scores, matrices):
            name, image, truth = next(images)
            columns = chosen or _most_likely(row, truth, args.top)
            true = columns if truth is None else [i for i in columns if truth[i]]
            names = [f"{classes[i]} *" if truth is not None and truth[i] else classes[i] for i in columns]
            pick = np.ix_(columns, columns)
            panels = {"in this image": matrix[pick], "in the training labels, P(column | row)": whole[pick]}
            target = inputs.folder / f"cooccurrence_{filename(Path(name).stem)}.png"
            plots.save(_sheet(decode(image, where=name), Path(name).stem, names, panels), target)
            print(target)
            pairs = [(float(matrix[i, j]), classes[i], classes[j]) for i in columns for j in columns if i < j]
            strongest = [{"labels": [a, b], "p": p} for p, a, b in sorted(pairs, reverse=True)[:5]]
            results.append({"image": name, "true": [classes[i] for i in true] if truth is not None else None,
                          "strongest": strongest, "picture": target.name})  # fmt: skip
    return {"cooccurrence": results}


def _most_likely(scores: np.ndarray, truth: np.ndarray | None, top: int) -> list[int]:
    """The true labels first, then the likeliest, `top` in all."""
    order = np.argsort(-(scores + (0 if truth is None else truth)), kind="stable")
    return order[:top].tolist()


def _sheet(photo: Image.Image, name: str, labels: Sequence[str], panels: dict[str, np.ndarray]) -> Any:
    """The photo and its matrices (m m) in [0, 1], side by side, with numbers where they fit."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(f"The picture of a matrix needs matplotlib; {plots.REPORT}.") from None
    figure = Figure(figsize=(6 * (len(panels) + 1) - 1, 6), layout="constrained")
    FigureCanvasAgg(figure)
    ratios = [0.8] + [1] * len(panels)
    axes = figure.subplots(1, len(panels) + 1, width_ratios=ratios)
    axes[0].imshow(np.asarray(photo.convert("RGB")))
    axes[0].set_title(f"{name}\n* true labels", fontsize=10)
    axes[0].axis("off")
    drawn: Any = None
    for place, (title, matrix) in zip(axes[1:], panels.items()):
        drawn = place.imshow(matrix, vmin=0, vmax=1, cmap="magma_r")
        place.set_title(title, fontsize=10)
        place.set_xticks(range(len(labels)), labels, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
        place.set_yticks(range(len(labels)), labels, fontsize=8)
        for (i, j), value in np.ndenumerate(matrix):
            if len(labels) <= 16:
                colour = "white" if value > 0.55 else "black"
                place.text(j, i, f"{value:.2f}".lstrip("0"), ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(drawn, ax=axes[-1], shrink=0.75)
    return figure


# --- pseudo-labels ---------------------------------------------------------------------------------------------------


def flags(parser: Parser) -> None:
    parser.add_argument("--threshold", type=float, help="theta of the picture; by default the run's last one")
    parser.add_argument("--count", type=int, default=12, help="how many photos to show")


def pseudo_labels(inputs: Inputs, args: argparse.Namespace) -> dict[str, Any]:
    """The pseudo-labels that the trained network gives to unknown training labels, judged by the hidden truth.

    For every theta of the run's schedule: how many there are, which share of them is true (precision), and of how many
    of the hidden positives they are (recall), for each branch and for both together. `chance` is the share of positives
    among the unknown labels. Then how many an image got in each epoch of the training itself, and photos with their
    known labels and their pseudo-labels.
    """
    if args.count < 1:
        raise UserError("--count must be at least 1.")
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold={args.threshold:g} is not a similarity or probability; expected 0 to 1.")
    if not hasattr(inputs.run.experiment.system, "pseudo_scores"):
        raise UserError(
            f"The system {inputs.run.experiment.config.system.name!r} of this run makes no pseudo-labels from scores;"
            " expected a run of configs/sst.py."
        )
    seen = as_observed(inputs)
    unknown = seen.observed == 0
    if not unknown.any():
        raise UserError(f"All labels of {inputs.source.name} are known; expected a run with hidden labels.")
    truth = (inputs.source.labels > 0) & (inputs.source.observed > 0)
    scores = _scores(inputs, seen)
    if not scores:
        raise UserError("This run has neither branch (config.system.branches='none'); train one with IST or CST.")
    config = inputs.run.experiment.config
    thetas = _thetas(inputs.run.experiment.system.thresholds, config.optim.epochs)
    table = by_threshold(scores, unknown, truth, thetas)
    chance = float(truth[unknown].mean())
    print(_text(table, chance, inputs.source.name))
    epochs = _by_epoch(inputs)
    theta = thetas[-1] if args.threshold is None else args.threshold
    picture = _photos(inputs, seen, scores, truth, theta, args.count)
    return {"pseudo": {"chance": chance, "known": float(1 - unknown.mean()), "at": table, "epochs": epochs,
                       "threshold": theta, "picture": picture}}  # fmt: skip


def as_observed(inputs: Inputs) -> Any:
    """The images with what training saw of their labels."""
    config = inputs.run.experiment.config
    whole = experiment.source(config, inputs.split, training=True)
    rows = {str(name): row for row, name in enumerate(whole.ids)}
    chosen = [rows[str(name)] for name in inputs.source.ids]
    return dataclasses.replace(inputs.source, labels=whole.labels[chosen], observed=whole.observed[chosen])


def _scores(inputs: Inputs, seen: Any) -> dict[str, np.ndarray]:
    """(N l) of each branch."""
    run = inputs.run.experiment

    @jax.jit
    def apply(variables: Any, batch: Any) -> Any:
        return run.system.apply(variables, run.prepare(batch), method="pseudo_scores")

    transform = (run.eval_views or (run.eval_transform(),))[0]
    size, parts = min(run.config.eval.batch_size, len(seen)), []
    for batch in loader.eval_batches(seen, transform, batch_size=size, threads=run.config.input.threads):
        kept = batch["mask"] > 0
        parts.append({name: np.asarray(x)[kept] for name, x in apply(inputs.run.variables, batch).items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _thetas(schedule: Any, epochs: int) -> list[float]:
    """Every theta that training used, the highest first; the first one where it ended before the start."""
    values = [float(schedule(np.int32(epoch))) for epoch in range(schedule.start, max(epochs, schedule.start + 1))]
    return sorted({round(value, 4) for value in values}, reverse=True)


def by_threshold(
    scores: dict[str, np.ndarray], unknown: np.ndarray, truth: np.ndarray, thetas: Sequence[float]
) -> list[dict[str, Any]]:
    """How many pseudo-labels each theta gives, and how many of them are true: by branch, and "either".

    Args:
      scores: (N l) of each branch; unknown, truth: (N l) bool, `truth` also of hidden labels.
    """
    hidden, lines = int((truth & unknown).sum()), []
    for theta in thetas:
        by = {name: (x >= theta) & unknown for name, x in scores.items()}
        by["either"] = np.any(list(by.values()), axis=0)
        line: dict[str, Any] = {"theta": float(theta)}
        for name, positive in by.items():
            count, right = int(positive.sum()), int((positive & truth).sum())
            precision = right / count if count else None
            line[name] = {"found": count, "precision": precision, "recall": right / hidden if hidden else None}
        lines.append(line)
    return lines


def _text(table: list[dict[str, Any]], chance: float, name: str) -> str:
    branches = [key for key in table[0] if key != "theta"]
    heads = [f"{BRANCHES.get(key, key)} found  precision  recall" for key in branches]
    lines = [f"{name}: {chance:.1%} of the unknown labels are positive", f"{'theta':>6}  " + "   ".join(heads)]
    for line in table:
        cells = []
        for key, head in zip(branches, heads):
            one = line[key]
            precision, recall = (f"{100 * v:.1f}" if v is not None else "-" for v in (one["precision"], one["recall"]))
            first = len(head) - len("  precision  recall")
            cells.append(f"{one['found']:>{first}}  {precision:>9}  {recall:>6}")
        lines.append(f"{line['theta']:>6.3f}  " + "   ".join(cells))
    return "\n".join(lines)


def _by_epoch(inputs: Inputs) -> list[dict[str, float]]:
    """Mean pseudo-labels of an image in each epoch of training, from metrics.jsonl; epochs without any are left out."""
    run = inputs.run.experiment
    steps = run.system.steps_per_epoch
    sums: dict[int, list[dict[str, float]]] = {}
    for line in rundir.read_metrics(inputs.run.workdir):
        if "loss" in line:
            sums.setdefault((int(line["step"]) - 1) // steps, []).append(line)
    epochs = []
    for epoch, lines in sorted(sums.items()):
        means = {f"{b}_found": [x[f"{b}_found"] for x in lines if f"{b}_found" in x] for b in BRANCHES}
        if epoch >= run.system.thresholds.start:
            theta = float(run.system.thresholds(np.int32(epoch)))
            counts = {name: float(np.mean(values)) for name, values in means.items() if values}
            epochs.append({"epoch": epoch, "theta": round(theta, 4), **counts})
    return epochs


def _photos(
    inputs: Inputs, seen: Any, scores: dict[str, np.ndarray], truth: np.ndarray, theta: float, count: int
) -> str | None:
    """Photos with a pseudo-label at theta, drawn by the seed: what was known of each, and what was added."""
    classes = inputs.run.classes
    by = {name: (x >= theta) & (seen.observed == 0) for name, x in scores.items()}
    rows = np.flatnonzero(np.any(list(by.values()), axis=0).any(axis=1))
    if not len(rows):
        print(f"no pseudo-label at theta {theta:g}, so no picture; lower --threshold to see some")
        return None
    chosen = np.sort(inputs.rng.permutation(rows)[:count])
    pictures, captions = [], []
    for i in chosen:
        positive = [classes[c] for c in np.flatnonzero(seen.labels[i] * seen.observed[i])]
        negative = int(((seen.labels[i] == 0) & (seen.observed[i] > 0)).sum())
        lines = [f"known: {', '.join(positive) or 'no positive'}; {negative} absent"]
        marks = [(scores[name][i, c], name, c) for name, x in by.items() for c in np.flatnonzero(x[i])]
        marks.sort(reverse=True)
        for score, name, c in marks[:SHOWN]:
            lines.append(f"{BRANCHES[name]} {score:.2f}  {classes[c]}{'' if truth[i, c] else ' (wrong)'}")
        if len(marks) > SHOWN:
            lines.append(f"and {len(marks) - SHOWN} more, {sum(not truth[i, c] for *_, c in marks[SHOWN:])} wrong")
        wrong = any(not truth[i, c] for *_, c in marks)
        missed = truth[i] & (seen.observed[i] == 0) & ~np.any([x[i] for x in by.values()], axis=0)
        if missed.any():
            lines.append(f"missed: {', '.join(classes[c] for c in np.flatnonzero(missed))}")
        pictures.append(plots.framed(inputs.picture(i), "miss" if wrong else "hit", CELL))
        captions.append("\n".join(lines))
    columns = min(4, len(chosen))
    starts = range(0, len(chosen), columns)
    grid = [pictures[s : s + columns] for s in starts], [captions[s : s + columns] for s in starts]
    title = f"pseudo-labels at theta {theta:g}; green: all true, orange: some are not"
    target = inputs.folder / "pseudo.png"
    plots.save(plots.rows(*grid, title, CELL), target)
    print(target)
    return target.name
