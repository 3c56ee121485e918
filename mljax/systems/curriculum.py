"""Curriculum labelling: train, label what is unknown by what was learnt, train on; around any system.

Durand, Mehrasa and Mori, "Learning a Deep ConvNet for Multi-label Classification with Partial Labels", CVPR 2019,
section 3.3. Their loss is `partial_bce`; any other works too.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mljax.errors import UserError, nearest
from mljax.pipeline.feature_cache import view as parse_view
from mljax.systems import _around
from mljax.types import Batch, Constant, Meta, Outputs

STRATEGIES = ("threshold", "positives", "proportion", "class_proportion", "uncertainty")


def relabel(
    logits: np.ndarray,
    known: np.ndarray,
    strategy: str,
    *,
    threshold: float = 2.0,
    proportion: float = 0.5,
    uncertainty: np.ndarray | None = None,
) -> np.ndarray:
    """Labels for entries that are not known, from scores.

    Args:
      logits: (N l).
      known: (N l) int8: 1 positive, -1 negative, 0 not known. Known labels stay.
      strategy: which unknown entries get the sign of their logit x:
        "threshold": x >= threshold, or x < -threshold;
        "positives": x >= threshold, as positives; no negative is ever made;
        "proportion": that share of all unknown entries with the largest |x|;
        "class_proportion": that share of the unknown entries of each class;
        "uncertainty": those with uncertainty <= threshold.
      threshold, proportion: see there; shares are rounded to whole entries.
      uncertainty: (N l), standard deviation of the probability over several looks at the image.
    Returns:
      (N l) int8, coded as `known`.
    """
    unknown = known == 0
    sign = np.where(logits >= 0, 1, -1).astype(np.int8)
    if strategy == "threshold":
        chosen = (logits >= threshold) | (logits < -threshold)
    elif strategy == "positives":
        chosen, sign = logits >= threshold, np.ones_like(sign)
    elif strategy == "uncertainty":
        assert uncertainty is not None
        chosen = uncertainty <= threshold
    else:
        certain = np.where(unknown, np.abs(logits), -np.inf)
        parts = [certain.reshape(-1)] if strategy == "proportion" else list(certain.T)
        columns = [_largest(part, round(proportion * int(np.isfinite(part).sum()))) for part in parts]
        chosen = columns[0].reshape(known.shape) if strategy == "proportion" else np.stack(columns, axis=1)
    return np.where(unknown, np.where(chosen, sign, 0), known).astype(np.int8)


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """(n) bool: the `count` largest; of equals those that come first."""
    chosen = np.zeros(values.shape, bool)
    chosen[np.argsort(-values, kind="stable")[:count]] = True
    return chosen


class Curriculum(nn.Module):
    """A system that trains on labels of its own making besides the known ones; settings are at `curriculum`.

    The labels of the moment are variables["memory"]["labels"], (N l) int8 as `relabel` codes them.
    """

    backbone: nn.Module
    net: Any
    known: Constant
    strategy: str
    threshold: float
    proportion: float
    every: int
    start: int
    views: tuple[str, ...]
    dtype: Any = jnp.float32
    axis: str | None = None

    def setup(self) -> None:
        self.labels = self.variable("memory", "labels", lambda: jnp.asarray(self.known.value))

    def __call__(self, batch: Batch, *, train: bool = False) -> Outputs:
        return self.net(batch, train=train)

    def loss(self, batch: Batch, step: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        found = self.labels.value[batch["index"]]
        # what the batch itself knows comes first: it is the same in training, and tests may change it
        own = batch["observed"] > 0
        labels = jnp.where(own, batch["labels"], (found > 0).astype(jnp.float32))
        observed = jnp.where(own, batch["observed"], (found != 0).astype(jnp.float32))
        loss, terms = self.net.loss({**batch, "labels": labels, "observed": observed}, step)
        made = jnp.mean(jnp.sum(observed - batch["observed"], axis=-1))
        return loss, {**terms, "labels_made": made}

    def scores(self, batch: Batch) -> jax.Array:
        return _around.scores(self.net, batch)

    def refresh(self, variables: Mapping[str, Any], score: Any, epoch: int) -> dict[str, Any]:
        """Label the whole training split anew, from what is known and from the scores of this moment."""
        variables = _around.refresh(self.net, variables, score, epoch)
        if epoch < self.start or (epoch - self.start) % self.every:
            return variables
        looks = [score("train", view)["logits"] for view in self.views or (None,)]
        probabilities = [1 / (1 + np.exp(-np.clip(x.astype(np.float64), -80, 80))) for x in looks]
        labels = relabel(
            np.mean(looks, axis=0),
            self.known.value,
            self.strategy,
            threshold=self.threshold,
            proportion=self.proportion,
            uncertainty=np.std(probabilities, axis=0),
        )
        return {**variables, "memory": {**variables["memory"], "labels": labels}}


def curriculum(
    *,
    backbone: nn.Module,
    criterion: Any,
    meta: Meta,
    net: Any = None,
    strategy: str = "threshold",
    threshold: float = 2.0,
    proportion: float = 0.5,
    every: int = 1,
    start: int = 1,
    views: Sequence[str] = (),
    dtype: Any = jnp.float32,
    axis: str | None = None,
) -> Curriculum:
    """Curriculum labelling for a data set.

    Args:
      criterion: of the inner system: {"name": "partial_bce", "reduction": "batch_mean"} as in the paper, or any other.
      net: the section of the system around which it works; None: the baseline.
      strategy, threshold, proportion: see `relabel`.
      every: epochs from one labelling to the next, each from scratch.
      start: the first epoch before which it is done; until then the known labels alone are trained on.
      views: looks at the images whose scores are averaged, e.g. ("224", "224:flip"); empty: the evaluation's.
        "uncertainty" needs two at least.
    Raises:
      UserError: an unknown strategy or view, or a value out of its range.
    Differs from the paper: its uncertainty is that of dropout at test time; here it is over the views. Its graph
      network is a system of its own (SSGRL's is alike), not part of this.
    """
    if strategy not in STRATEGIES:
        raise UserError(f"config.system.strategy is {strategy!r}{nearest(strategy, STRATEGIES)}.")
    if not 0 <= proportion <= 1:
        raise UserError(f"config.system.proportion is {proportion}; it is a share from 0 to 1.")
    if not threshold >= 0:
        raise UserError(f"config.system.threshold is {threshold}; it is at least 0.")
    if every < 1 or start < 0:
        raise UserError(f"config.system.every is {every} and start {start}; they are epochs, at least 1 and 0.")
    views = tuple(views)
    for text in views:
        parse_view(text)
    if strategy == "uncertainty" and len(views) < 2:
        raise UserError("config.system.strategy='uncertainty' needs config.system.views, two at least.")
    common = {"backbone": backbone, "meta": meta, "dtype": dtype, "axis": axis}
    system = _around.inner(net or {"name": "baseline"}, criterion=criterion, **common)
    known = _around.codes(meta)
    return Curriculum(backbone, system, known, strategy, threshold, proportion, every, start, views, dtype, axis)


NAMES = {"curriculum": curriculum}
