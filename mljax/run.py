"""A trained run: predictions, scores and attention on images, evaluation on splits."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mljax import experiment, fold, optim, rundir, scoring, zero_shot
from mljax.build import find, keywords
from mljax.config.derive import derive
from mljax.config.stages import stage_configs
from mljax.data import fingerprint
from mljax.data.source import Source
from mljax.errors import UserError, nearest
from mljax.experiment import Experiment
from mljax.known_labels import Known, to_array
from mljax.pictures import drawing
from mljax.pictures.overlays import scale
from mljax.pipeline import loader
from mljax.pipeline.images import ImageError, decode
from mljax.rundir.checkpoint import Checkpoints
from mljax.types import Config, Outputs

FOLD_FROM = 100  # images for which folding, about a second for a ResNet-101, is worth it on a CPU


@dataclasses.dataclass
class Run:
    """A trained run: `predict`, `scores`, `attention` on images, `evaluate` on splits.

    Attributes:
      classes: the l label names.
      selected_by: which parameters these are.
      stage: that they were trained in, from 0.
    """

    workdir: Path
    experiment: Experiment
    variables: Any
    selected_by: str
    step: int
    stage: int = 0

    def __post_init__(self) -> None:
        self.classes = self.experiment.meta.classes
        self._apply = jax.jit(self._forward)

    @functools.cached_property
    def folded(self) -> Any:
        """`variables` for inference: batch normalisation folded into convolutions; scores agree to 1e-5."""
        example = jax.eval_shape(lambda: self.experiment.prepare(experiment.example_batch(self.experiment, 1)))
        return jax.device_put(fold.fold(self.experiment.system, self.variables, example)[0])

    def _forward(self, variables: Any, image: jax.Array, known: jax.Array) -> tuple[jax.Array, Outputs]:
        batch = {
            "image": image,
            "labels": known[:, 1],
            "observed": known[:, 0],
            "known": known[:, 0],
            "index": np.zeros(len(image), np.int32),
            "mask": np.ones(len(image), np.float32),
        }
        out: Any = self.experiment.system.apply(variables, self.experiment.prepare(batch), train=False)
        return self.experiment.scores(variables, batch), out

    def stream(
        self,
        images: Sequence[Any],
        skip: Callable[[Any, ImageError], None] | None = None,
        batch_size: int = 32,
        known: Known | None = None,
    ) -> Iterator[tuple[list[Any], np.ndarray, Outputs]]:
        """Batch by batch: the images (b), probabilities (b l) over the run's views, and the outputs of the first view.

        Args:
          images: as `scores` takes them.
          skip: called with every image that cannot be read, which is then left out; None: it is an error.
          known: as `scores` takes it.
        """
        given = to_array(known, len(images), self.experiment)
        variables = self.folded if len(images) >= FOLD_FROM else self.variables
        views = self.experiment.eval_views or (self.experiment.eval_transform(),)
        rng = np.random.default_rng(0)
        size = min(batch_size, 1 << max(len(images) - 1, 0).bit_length())  # few sizes, since each is compiled
        kept: list[Any] = []
        pixels: list[list[np.ndarray]] = []
        rows: list[int] = []
        for number, image in enumerate(images, 1):
            try:
                picture = decode(image, where=_name(image))
                pixels.append([view(picture, rng) for view in views])
                kept.append(image)
                rows.append(number - 1)
            except ImageError as error:
                if skip is None:
                    raise
                skip(image, error)
            if kept and (len(kept) == size or number == len(images)):
                yield kept, *self._batch(variables, pixels, size, given[rows])
                kept, pixels, rows = [], [], []

    def _batch(
        self, variables: Any, pixels: list[list[np.ndarray]], size: int, known: np.ndarray
    ) -> tuple[np.ndarray, Outputs]:
        """(b) lists of views -> probabilities (b l) and outputs; padded, so that one program serves all batches."""
        results = []
        for view in zip(*pixels):
            batch = {"image": np.stack(view), "known": known, "mask": np.ones(len(view), np.float32)}
            batch = loader.pad(batch, size)
            scores, out = self._apply(variables, batch["image"], batch["known"])
            results.append((np.asarray(scores)[: len(pixels)], out))
        outputs = jax.tree.map(lambda x: np.asarray(x)[: len(pixels)], results[0][1])
        probabilities = sigmoid(np.mean([scores for scores, _ in results], axis=0))
        return np.where(known[:, 0] > 0, known[:, 1], probabilities), outputs

    def scores(self, images: Sequence[Any], *, known: Known | None = None) -> np.ndarray:
        """(N l) probabilities.

        Args:
          images: paths, PIL images, encoded bytes, or arrays (h w 3) of uint8 or of floats in [0, 1].
          known: for systems that predict with some labels known (C-Tran), a dict for each image: {"dog": 1, "cat": 0}.
            Their probabilities are the values given.
        Raises:
          ImageError: an image that cannot be read, named.
          UserError: `known` names no label of this run, or the system does not take known labels.
        """
        batches = [scores for _, scores, _ in self.stream(_listed(images), known=known)]
        return np.concatenate(batches) if batches else np.zeros((0, len(self.classes)), np.float32)

    def predict(
        self, images: Sequence[Any], *, threshold: float = 0.5, top: int | None = None, known: Known | None = None
    ) -> list[dict[str, float]]:
        """For every image its labels with their probabilities, the likeliest first.

        Args:
          threshold: least probability of a label.
          top: at most so many labels.
          known: as `scores` takes it.
        """
        return [self.labels(row, threshold, top) for row in self.scores(images, known=known)]

    def labels(self, scores: np.ndarray, threshold: float = 0.5, top: int | None = None) -> dict[str, float]:
        """One image's probabilities (l) -> {label: probability}."""
        order = np.argsort(-scores, kind="stable")[: top if top is not None else len(scores)]
        return {self.classes[i]: round(float(scores[i]), 4) for i in order if scores[i] >= threshold}

    def attention(self, images: Sequence[Any]) -> np.ndarray:
        """(N l h w): where the system looked for each label, averaged over heads; each map sums to 1.

        Raises:
          UserError: the system has no attention.
        """
        return np.concatenate([self.maps(out) for _, _, out in self.stream(_listed(images))])

    def maps(self, out: Outputs) -> np.ndarray:
        """(b l h w) of a batch's outputs, averaged over heads."""
        if out.attention is None:
            raise UserError(f"The system {self.experiment.config.system.name!r} has no attention to show.")
        return np.asarray(out.attention, np.float32).mean(axis=1)

    def overlay(self, image: Any, label: str) -> Any:
        """A PIL image: the picture with the attention of a label over it."""
        if label not in self.classes:
            raise UserError(f"There is no label {label!r}{nearest(label, self.classes)}.")
        weights = self.attention([image])[0, self.classes.index(label)]
        return drawing.overlay(decode(image, where=_name(image)), weights, high=scale(weights))

    def with_labels(self, labels: Sequence[str], vectors: Any = None) -> "Run":
        """This run for labels that it was not trained on, of a zero-shot ML-Decoder; see `zero_shot.with_labels`."""
        run, variables = zero_shot.with_labels(self.experiment, self.variables, labels, vectors=vectors)
        return dataclasses.replace(self, experiment=run, variables=variables)

    def with_config(self, config: Config) -> "Run":
        """This run under another config, such as another split or another definition of average precision."""
        return dataclasses.replace(self, experiment=dataclasses.replace(self.experiment, config=config))

    def evaluate(
        self, split: str | None = None, *, labels: Sequence[str] | str | None = None, vectors: str | None = None
    ) -> dict[str, Any]:
        """Score a split again from its images; keeps scores and report beside the run's own, and prints the table.

        Args:
          labels: for a zero-shot ML-Decoder: "all" of the data set, those that were "seen" in training, the "unseen"
            ones, or names; None: those of the run.
          vectors: where vectors of labels come from that were not trained; None: as the run's config says.
        Raises:
          UserError: the classes are others, or the run's own evaluation split has changed since it was trained.
        """
        config = self.experiment.config
        name = split or config.splits.eval
        run, variables, source = zero_shot.evaluation(self.experiment, self.variables, name, labels, vectors)
        changed = self.check_data(source, name) if labels is None else ""
        other = dataclasses.replace(self, experiment=run, variables=variables)
        source = scoring.scored_split(run, source)
        scores = scoring.Scorer(run, jax.devices()).scores(other.folded, source, None, config)
        share = config.system.get("eval_known", 0.0)
        suffix = f"{name}_{config.eval.definition}" + (f"_known_{share:g}" if share else "")
        suffix += "" if labels is None else f"_{labels if labels in zero_shot.GROUPS else 'labels'}"
        suffix = "_" + re.sub(r"\W+", "_", suffix).strip("_")
        means = None if labels is None else lambda aps: zero_shot.means(self.classes, aps)
        return scoring.write(
            self.workdir, scores, source, config, by=self.selected_by, step=self.step, suffix=suffix, means=means,
            changed=changed,
        )  # fmt: skip

    def check_data(self, source: Source, split: str) -> str:
        """Compare the run's own evaluation split with the record that the run has of it; others are not compared.

        Returns:
          What changed, where `config.data.changed` is "accept".
        Raises:
          UserError: it has changed.
        """
        config, before = self.experiment.config, stage_configs(rundir.load_config(self.workdir))[self.stage]
        section, trained = (
            {k: v for k, v in c.data.items() if f"data.{k}" not in rundir.FREE} for c in (config, before)
        )
        if split != before.splits.eval or section != trained:
            return ""
        record = fingerprint.record(source, config.data.get("digest", "sampled"))
        part = rundir.part_of("eval", self.stage)
        return rundir.check_data_record(self.workdir, part, record, accept=config.data.get("changed") == "accept").what


def load(
    workdir: str | Path, *, checkpoint: str = "selected", ema: bool | None = None, known: float | None = None
) -> Run:
    """Load a run.

    Args:
      workdir: its run directory; the data set is not needed.
      checkpoint: "selected" (what the run reported), "last" or "best".
      ema: averaged parameters; None: as the run reported.
      known: share of labels that `evaluate` gives to a system that predicts with known labels; None: as the config has.
    Raises:
      UserError: there is no run, no checkpoint yet, or a damaged one.
    """
    workdir = Path(workdir)
    stages = stage_configs(rundir.load_config(workdir))
    folders = [f for i in range(len(stages)) if any((f := workdir / "checkpoints" / f"{i}").glob("[0-9]*"))]
    if not folders:
        raise UserError(f"{workdir} holds no checkpoint yet; train it first: run the training command again.")
    config = stages[int(folders[-1].name)]
    changes: dict[str, Any] = {"parallel": "jit"}
    if known is not None:
        if "eval_known" not in keywords(find("systems", config.system.name)):
            raise UserError(f"The system {config.system.name!r} does not take known labels; leave out --known.")
        changes["system.eval_known"] = float(known)
    config = derive(config, changes)
    meta, values = rundir.load_meta(workdir), rundir.load_preprocessing(workdir)
    run = experiment.assemble(config, meta, values, training=False)
    which = ("last" if config.eval.select == "last" else "best") if checkpoint == "selected" else checkpoint
    with Checkpoints(folders[-1], keep_best_of="mAP", read_only=True) as checkpoints:
        if (checkpoints.latest if which == "last" else checkpoints.best) is None:
            raise UserError(f"{workdir} holds no {which} checkpoint yet; train it further.")
        state, step = checkpoints.restore_params(which), checkpoints.restored
        record = checkpoints.meta(step)
    if ema is None:
        ema = state["ema"] is not None and (which == "last" or record.get("kind") == "ema")
    chosen = {"params": state["params"], **state["variables"]}
    if ema:
        if state["ema"] is None:
            raise UserError(f"{workdir} kept no averaged parameters (config.ema is 0).")
        chosen = optim.averaged(state["params"], state["variables"], state["ema"])
    by = f"{which} checkpoint, step {step} ({'ema' if ema else 'raw'})"
    return Run(workdir, run, jax.device_put(chosen), by, step, int(folders[-1].name))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return (1 / (1 + np.exp(-np.clip(x, -80, 80)))).astype(np.float32)


def _listed(images: Any) -> list[Any]:
    if isinstance(images, np.ndarray) and images.ndim == 4:
        return list(images)
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _name(image: Any) -> str:
    return str(image) if isinstance(image, (str, Path)) else f"the {type(image).__name__} given"
