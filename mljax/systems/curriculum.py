"""Curriculum labelling: train, label what is unknown by what was learnt, train on; around any system.

Durand, Mehrasa and Mori, "Learning a Deep ConvNet for Multi-label Classification with Partial Labels", CVPR 2019,
section 3.3. Their loss is `partial_bce`; any other works too.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

from mljax.errors import UserError, one_of
from mljax.losses.criterion import Criterion
from mljax.pipeline.feature_cache import view as parse_view
from mljax.systems import _around
from mljax.types import Batch, Meta, Outputs

STRATEGIES = ("threshold", "positives", "proportion", "class_proportion", "uncertainty")


def relabel(
    logits: Float[np.ndarray, "N l"],
    known: Int8[np.ndarray, "N l"],
    strategy: str,
    *,
    threshold: float = 2.0,
    proportion: float = 0.5,
    uncertainty: Float[np.ndarray, "N l"] | None = None,
) -> Int8[np.ndarray, "N l"]:
    """Labels for entries that are not known, from scores.

    Args:
      known: 1 positive, -1 negative, 0 not known. Known labels stay.
      strategy: which unknown entries get the sign of their logit x:
        "threshold": x >= threshold, or x < -threshold;
        "positives": x >= threshold, as positives; no negative is ever made;
        "proportion": that share of all unknown entries with the largest |x|;
        "class_proportion": that share of the unknown entries of each class;
        "uncertainty": those with uncertainty <= threshold.
      threshold, proportion: see there; shares are rounded to whole entries.
      uncertainty: standard deviation of the probability over several views of the image.
    Returns:
      Labels, coded as `known`.
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
    """Curriculum labelling around a system: it trains on labels of its own making besides the known ones.

    The labels of the moment are variables["memory"]["labels"], (N l) int8 as `relabel` codes them.

    Attributes:
      criterion: of the inner system: {"name": "partial_bce", "reduction": "batch_mean"} as in the paper, or any other.
      net: the section of the system around which it works; None: the baseline.
      strategy, threshold, proportion: see `relabel`.
      every: epochs from one labelling to the next, each from scratch.
      start: the first epoch before which it is done; until then the known labels alone are trained on.
      views: of an image, whose scores are averaged, e.g. ("224", "224:flip"); empty: the evaluation's. "uncertainty"
        needs two at least.

    Differs from the paper: its uncertainty is that of dropout at test time; here it is over the views. Its graph
      network is a system of its own (SSGRL's is alike), not part of this.
    """

    backbone: nn.Module
    criterion: Criterion
    meta: Meta
    net: Any = None
    strategy: str = "threshold"
    threshold: float = 2.0
    proportion: float = 0.5
    every: int = 1
    start: int = 1
    views: tuple[str, ...] = ()
    dtype: Any = jnp.float32
    axis: str | None = None
    steps_per_epoch: int = 1

    def __post_init__(self) -> None:
        one_of("config.system.strategy", self.strategy, STRATEGIES)
        if not 0 <= self.proportion <= 1:
            raise UserError(f"config.system.proportion is {self.proportion}; expected a share from 0 to 1.")
        if not self.threshold >= 0:
            raise UserError(f"config.system.threshold is {self.threshold}; expected a number of at least 0.")
        if self.every < 1 or self.start < 0:
            raise UserError(
                f"config.system.every is {self.every} and start {self.start}; expected epochs, at least 1 and 0."
            )
        object.__setattr__(self, "views", tuple(self.views))  # a list in a config that was saved
        for text in self.views:
            parse_view(text)
        if self.strategy == "uncertainty" and len(self.views) < 2:
            raise UserError("config.system.strategy='uncertainty' needs config.system.views, two at least.")
        _around.build_net(self, self.criterion)
        super().__post_init__()

    def setup(self) -> None:
        self.labels = self.variable("memory", "labels", lambda: jnp.asarray(_around.codes(self.meta)))

    def __call__(self, batch: Batch, *, train: bool = False) -> Outputs:
        return self.net(batch, train=train)

    def loss(self, batch: Batch, step: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        made = self.labels.value[batch["index"]]
        # what the batch itself knows comes first: it is the same in training, and tests may change it
        known = batch["observed"] > 0
        labels = jnp.where(known, batch["labels"], (made > 0).astype(jnp.float32))
        observed = jnp.where(known, batch["observed"], (made != 0).astype(jnp.float32))
        loss, terms = self.net.loss({**batch, "labels": labels, "observed": observed}, step)
        return loss, {**terms, "labels_made": jnp.mean(jnp.sum(observed - batch["observed"], axis=-1))}

    def scores(self, batch: Batch) -> Float[Array, "b l"]:
        return _around.scores(self.net, batch)

    def refresh(self, variables: Mapping[str, Any], score: Any, epoch: int) -> dict[str, Any]:
        """Label the whole training split anew, from what is known and from the scores of this moment."""
        variables = _around.refresh(self.net, variables, score, epoch)
        if epoch < self.start or (epoch - self.start) % self.every:
            return variables
        logits = [score("train", view)["logits"] for view in self.views or (None,)]
        probabilities = [1 / (1 + np.exp(-np.clip(x.astype(np.float64), -80, 80))) for x in logits]
        labels = relabel(
            np.mean(logits, axis=0),
            _around.codes(self.meta),
            self.strategy,
            threshold=self.threshold,
            proportion=self.proportion,
            uncertainty=np.std(probabilities, axis=0),
        )
        return {**variables, "memory": {**variables["memory"], "labels": labels}}


NAMES = {"curriculum": Curriculum}
