"""What the figures of `mljax.analyze` are made of: a run, some images, and where pictures go."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mljax.config.command import Parser
from mljax.data.source import Source
from mljax.errors import UserError, nearest
from mljax.pipeline import loader
from mljax.pipeline.images import decode
from mljax.run import Run

CELL = 200  # pixels of a photo in a picture


@dataclasses.dataclass
class Inputs:
    """A run, some images, and where the pictures go.

    Attributes:
      run: the loaded run.
      source: images of a split, drawn by the seed where there are more than asked for.
      folder: where pictures go.
      rng: numpy generator of the seed.
      split: the name by which the data set knows the images, or what they are drawn from.
    """

    run: Run
    source: Source
    folder: Path
    rng: np.random.Generator
    split: str = ""

    def picture(self, index: int) -> Any:
        return decode(self.source.read(index), where=str(self.source.ids[index]))

    def names(self, index: int) -> str:
        """The true labels of an image."""
        return ", ".join(self.run.classes[i] for i in np.flatnonzero(self.source.labels[index])) or "no label"

    def column(self, label: str) -> int:
        if label not in self.run.classes:
            raise UserError(f"{label!r} is not a label of this run{nearest(label, self.run.classes)}.")
        return self.run.classes.index(label)

    def asked(self, texts: Sequence[str] | None) -> list[list[str]]:
        """The labels of each `--labels`: names joined by commas, or one name that has a comma itself."""
        return [self._split(text) for text in texts or ()]

    def _split(self, text: str) -> list[str]:
        labels = [text] if text in self.run.classes else [part.strip() for part in text.split(",") if part.strip()]
        for label in labels:
            self.column(label)
        if not labels:
            raise UserError("--labels is empty; expected labels joined by commas, such as --labels=person,dog.")
        return list(dict.fromkeys(labels))

    def photos(
        self, files: Sequence[str] | None, columns: Sequence[int], count: int
    ) -> list[tuple[str, Any, np.ndarray | None]]:
        """(name, image, true labels (l)): the user's files, whose labels are unknown, or some images of the split.

        Those of the split have all labels of `columns`, or several labels where it is empty; drawn by the seed.
        """
        if files:
            return [(path, path, None) for path in files]
        labels = self.source.labels
        matching = np.flatnonzero(
            labels[:, columns].all(1) if columns else labels.sum(1) >= min(2, labels.sum(1).max())
        )
        if not len(matching):
            names = " + ".join(self.run.classes[i] for i in columns)
            raise UserError(f"No image of {self.source.name} has {names}; raise --images, or give a --photo.")
        chosen = np.sort(self.rng.permutation(matching)[:count])
        return [(str(self.source.ids[i]), self.source.read(i), labels[i]) for i in chosen]

    def outputs(self, pick: Callable[[Any], Any]) -> Any:
        """`pick(outputs)` of every image, on the first of the run's evaluation views; arrays of leading axis N.

        Args:
          pick: Outputs of a batch (b ..) -> arrays (b ..), on the device: what is not picked is not kept.
        """
        run = self.run.experiment

        @jax.jit
        def apply(variables: Any, batch: Any) -> Any:
            return pick(run.system.apply(variables, run.prepare(batch), train=False))

        transform = (run.eval_views or (run.eval_transform(),))[0]
        size = min(run.config.eval.batch_size, len(self.source))
        parts = []
        for batch in loader.eval_batches(self.source, transform, batch_size=size, threads=run.config.input.threads):
            kept = batch["mask"] > 0
            parts.append(jax.tree.map(lambda x, kept=kept: np.asarray(x)[kept], apply(self.run.variables, batch)))
        return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)

    def features(self, columns: Sequence[int] | np.ndarray) -> np.ndarray:
        """(N m d) float32 label features of m labels, each of length 1."""
        return self.outputs(lambda out: self.unit(out, columns))

    def unit(self, out: Any, columns: Sequence[int] | np.ndarray) -> Any:
        """(b l d) -> the label features of some labels (b m d), each of length 1."""
        if out.label_features is None:
            name = self.run.experiment.config.system.name
            raise UserError(
                f"The system {name!r} has no label features; expected a run of a system that has them, such as 'cmsg'."
            )
        x = jnp.asarray(out.label_features)[:, np.asarray(columns)].astype(jnp.float32)
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def photo_flags(parser: Parser) -> None:
    """Of figures that take what `Inputs.photos` gives."""
    parser.add_argument("--photo", action="append", help="a photo of your own; by default images of the split")
    parser.add_argument("--count", type=int, default=4, help="how many images of the split")


def filename(text: str) -> str:
    """A text as part of a file name."""
    return re.sub(r"\W+", "_", text).strip("_") or "image"
