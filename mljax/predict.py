"""A run directory -> scores, labels and attention maps for anyone's images.

    python -m mljax.predict --workdir=runs/cmsg photo.jpg holiday/ [--json] [--overlay=maps/] [--threshold=0.5] [--top=5]

    import mljax
    run = mljax.load("runs/cmsg")
    run.predict(["photo.jpg", array, pil_image])
"""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mljax import evaluate, experiment, optim, rundir
from mljax.checkpoint import Checkpoints
from mljax.data import draw, loader
from mljax.data.images import ImageError, decode
from mljax.errors import UserError
from mljax.experiment import Experiment
from mljax.types import Outputs

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")


@dataclasses.dataclass
class Run:
    """A trained run: `predict`, `scores`, `attention` on images, `evaluate` on splits.

    Attributes:
      classes: the l label names.
      selected_by: which parameters these are.
    """

    workdir: Path
    experiment: Experiment
    variables: Any
    selected_by: str
    step: int

    def __post_init__(self) -> None:
        self.classes = self.experiment.meta.classes
        self._apply = jax.jit(self._forward)

    def _forward(self, variables: Any, image: jax.Array) -> tuple[jax.Array, Outputs]:
        labels = np.zeros((image.shape[0], len(self.classes)), np.float32)
        batch = {
            "image": image,
            "labels": labels,
            "observed": labels,
            "index": np.zeros(len(labels), np.int32),
            "mask": np.ones(len(labels), np.float32),
        }
        out = self.experiment.system.apply(variables, self.experiment.prepare(batch), train=False)
        return self.experiment.scores(variables, batch), out

    def _run(self, images: Sequence[Any], batch_size: int = 32) -> Iterator[tuple[np.ndarray, Outputs]]:
        """Scores (b l) averaged over the run's views, and the outputs of the first view, batch by batch."""
        views = self.experiment.eval_views or (self.experiment.eval_transform(),)
        rng = np.random.default_rng(0)
        for first in range(0, len(images), batch_size):
            decoded = [decode(image, where=_name(image)) for image in images[first : first + batch_size]]
            size = min(batch_size, len(images))
            found = []
            for view in views:
                pixels = np.stack([view(image, rng) for image in decoded])
                padded = loader.pad({"image": pixels, "mask": np.ones(len(pixels))}, size)["image"]
                scores, out = self._apply(self.variables, padded)
                found.append((np.asarray(scores)[: len(decoded)], out))
            kept = jax.tree.map(lambda x: np.asarray(x)[: len(decoded)], found[0][1])
            yield np.mean([scores for scores, _ in found], axis=0), kept

    def scores(self, images: Sequence[Any]) -> np.ndarray:
        """(N l) probabilities.

        Args:
          images: paths, PIL images, encoded bytes, or arrays (h w 3) of uint8 or of floats in [0, 1].
        Raises:
          ImageError: an image that cannot be read, named.
        """
        images = _listed(images)
        found = [scores for scores, _ in self._run(images)]
        scores = np.concatenate(found) if found else np.zeros((0, len(self.classes)), np.float32)
        return sigmoid(scores)

    def predict(
        self, images: Sequence[Any], *, threshold: float = 0.5, top: int | None = None
    ) -> list[dict[str, float]]:
        """For every image its labels with their probabilities, the likeliest first.

        Args:
          threshold: least probability of a label.
          top: at most so many labels.
        """
        return [self.labels(row, threshold, top) for row in self.scores(images)]

    def labels(self, scores: np.ndarray, threshold: float = 0.5, top: int | None = None) -> dict[str, float]:
        """One image's probabilities (l) -> {label: probability}."""
        order = np.argsort(-scores, kind="stable")[: top if top is not None else len(scores)]
        return {self.classes[i]: round(float(scores[i]), 4) for i in order if scores[i] >= threshold}

    def attention(self, images: Sequence[Any]) -> np.ndarray:
        """(N l h w): where the system looked for each label, averaged over heads; each map sums to 1.

        Raises:
          UserError: the system has no attention.
        """
        maps = [out.attention for _, out in self._run(_listed(images))]
        if not maps or maps[0] is None:
            raise UserError(f"The system {self.experiment.config.system.name!r} has no attention to show.")
        return np.concatenate([m.mean(axis=1) for m in maps if m is not None])

    def overlay(self, image: Any, label: str) -> Any:
        """A PIL image: the picture with the attention of a label over it."""
        if label not in self.classes:
            from mljax.errors import nearest

            raise UserError(f"There is no label {label!r}{nearest(label, self.classes)}.")
        weights = self.attention([image])[0, self.classes.index(label)]
        return draw.overlay(decode(image, where=_name(image)), weights)

    def evaluate(self, split: str | None = None) -> dict[str, Any]:
        """Score a split again from its images; keeps scores and report beside the run's own, and prints the table."""
        config = self.experiment.config
        name = split or config.splits.eval
        source = experiment.source(config, name, training=False)
        if tuple(source.classes) != self.classes:
            raise UserError(f"{source.name} has other classes than this run; evaluate it on its own data set.")
        scorer = evaluate.Scorer(self.experiment, jax.devices())
        scores = scorer.scores(self.variables, source, None, config)
        suffix = "_" + re.sub(r"\W+", "_", f"{name}_{config.eval.definition}").strip("_")
        by = self.selected_by
        return evaluate.write(self.workdir, scores, source, config, by=by, step=self.step, suffix=suffix)


def load(workdir: str | Path, *, checkpoint: str = "selected", ema: bool | None = None) -> Run:
    """Load a run.

    Args:
      workdir: its run directory; the data set is not needed.
      checkpoint: "selected" (what the run reported), "last" or "best".
      ema: averaged parameters; None: as the run reported.
    Raises:
      UserError: no run there, no checkpoint yet, or a damaged one.
    """
    workdir = Path(workdir)
    config = rundir.stage_configs(rundir.load_config(workdir))[-1]
    config.parallel = "jit"
    run = experiment.assemble(config, rundir.load_meta(workdir), rundir.load_preprocessing(workdir))
    folders = sorted((workdir / "checkpoints").glob("[0-9]*"), key=lambda f: int(f.name))
    if not folders:
        raise UserError(f"{workdir} holds no checkpoint yet; train it first.")
    which = ("last" if config.eval.select == "last" else "best") if checkpoint == "selected" else checkpoint
    with Checkpoints(folders[-1], keep_best_of="mAP", read_only=True) as checkpoints:
        step = checkpoints.latest if which == "last" else checkpoints.best
        if step is None:
            raise UserError(f"{workdir} holds no {which} checkpoint yet; train it further.")
        found, meta = checkpoints.restore_params(which), checkpoints.meta(step)
    if ema is None:
        ema = found["ema"] is not None and (which == "last" or meta.get("kind") == "ema")
    params, variables = found["params"], found["variables"]
    if ema:
        if found["ema"] is None:
            raise UserError(f"{workdir} kept no averaged parameters (config.ema is 0).")
        params = optim.ema_merge(found["ema"]["params"], params)
        if "batch_stats" in variables:
            stats = optim.ema_merge(found["ema"]["batch_stats"], variables["batch_stats"])
            variables = {**variables, "batch_stats": stats}
    by = f"{which} checkpoint, step {step} ({'ema' if ema else 'raw'})"
    return Run(workdir, run, jax.device_put({"params": params, **variables}), by, step)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return (1 / (1 + np.exp(-np.clip(x, -80, 80)))).astype(np.float32)


def _listed(images: Any) -> list[Any]:
    if isinstance(images, np.ndarray) and images.ndim == 4:
        return list(images)
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _name(image: Any) -> str:
    return str(image) if isinstance(image, (str, Path)) else f"the {type(image).__name__} given"


def photos(paths: Iterable[str]) -> Iterator[Path]:
    """Files as given; folders by the images in them, sorted, with their subfolders."""
    for text in paths:
        path = Path(text)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in ENDINGS)
            if not found:
                raise UserError(f"The folder {path} holds no image ({' '.join(ENDINGS)}).")
            yield from found
        elif path.exists():
            yield path
        else:
            raise UserError(f"There is no file or folder {path}.")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mljax.predict", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("photos", nargs="+", metavar="PHOTO_OR_FOLDER")
    parser.add_argument("--workdir", required=True, help="run directory")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument("--threshold", type=float, default=0.5, help="least probability of a label")
    parser.add_argument("--top", type=int, help="at most so many labels per photo; also below the threshold")
    parser.add_argument("--overlay", help="folder for a picture of the attention per photo and label")
    args = parser.parse_args(argv)
    run, failed = load(args.workdir), 0
    chosen = list(photos(args.photos))
    readable, first = [], 0
    while first < len(chosen):
        chunk = chosen[first : first + 32]
        first += 32
        readable = []
        for path in chunk:
            try:
                decode(path, where=str(path))
                readable.append(path)
            except ImageError as error:
                failed += 1
                print(f"mljax: {error}", file=sys.stderr)
        show(run, readable, args)
    if failed:
        print(f"mljax: {failed} of {len(chosen)} photos could not be read", file=sys.stderr)
    return 1 if failed else 0


def show(run: Run, paths: list[Path], args: argparse.Namespace) -> None:
    """Print one chunk of photos, and write their overlays."""
    threshold = 0.0 if args.top is not None else args.threshold
    for path, row in zip(paths, run.scores(paths)):
        labels = run.labels(row, threshold, args.top)
        if args.json:
            print(json.dumps({"image": str(path), "labels": labels}))
        else:
            text = "  ".join(f"{name} {score:.2f}" for name, score in labels.items())
            print(f"{path}: {text or f'nothing above {threshold:g}'}")
        if args.overlay:
            folder = Path(args.overlay)
            folder.mkdir(parents=True, exist_ok=True)
            maps = run.attention([path])[0]
            for name in labels:
                picture = draw.overlay(decode(path, where=str(path)), maps[run.classes.index(name)])
                picture.save(folder / f"{path.stem}_{re.sub(r'[^A-Za-z0-9]+', '_', name)}.png")


if __name__ == "__main__":
    from mljax.main import guarded

    sys.exit(guarded(main))
