"""ROLE: regularised online label estimation, around any system (Cole et al., CVPR 2021).

From one positive label per image a classifier and an estimate of all labels are learnt together: the estimate is a
table with a free logit for every training image and label.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mljax.errors import UserError
from mljax.losses import weak_labels
from mljax.systems import _around
from mljax.systems.baseline import PUBLISHED as CLASSIFIER
from mljax.systems.baseline import Baseline
from mljax.types import Batch, Meta, Outputs
from mljax.weights.published import Names, Published

CERTAIN = float(np.log(0.995 / 0.005))  # 5.293, of an observed positive; -5.293 of an observed negative
SPREAD = float(np.log(0.6 / 0.4))  # 0.405, all others start uniformly within +-SPREAD


@dataclasses.dataclass(frozen=True)
class RoleCriterion:
    """Takes the place of the classification loss of the inner system; `theta` (b l) travels in the batch.

    Attributes:
      expected: positives per image k.
      eps: inside the logarithms.
    """

    expected: float
    eps: float = 1e-5

    def __call__(
        self,
        logits: Float[Array, "b l"],
        batch: Batch,
        *,
        labels: Float[Array, "b l"] | None = None,
        observed: Float[Array, "b l"] | None = None,
        axis: str | None = None,
    ) -> Float[Array, ""]:
        """`weak_labels.role` of the observed positives; `labels`, `observed` take the place of the batch's own."""
        truth: Any = batch["labels"] if labels is None else labels
        known: Any = batch["observed"] if observed is None else observed
        logits, theta = logits.astype(jnp.float32), batch["theta"]
        return weak_labels.role(
            logits, theta, truth * known, expected=self.expected, eps=self.eps, mask=batch["mask"], axis=axis
        )


class Role(nn.Module):
    """ROLE around a system.

    L = (L'(p | q) + L'(q | p)) / 2, q = sigmoid(theta) the estimated labels, theta the rows of the table that belong to
    the batch; see `mljax.losses.weak_labels.role`, which takes the place of `config.loss` in the inner system.
    The table starts uniformly within +-logit(0.6), observed positives at logit(0.995), observed negatives at
    logit(0.005). It is trained at ten times the rate, without weight decay, and not averaged
    (`mljax.optim.groups.label_tables`); a group of config.optim.groups that names "label_table" overrides that.

    Attributes:
      net: the section of the system around which it works; None: the baseline. What else its own loss has stays.
      expected: positives per image k: 1.5 on VOC 2012, 2.9 on COCO, 1.9 on NUS-WIDE, 31.4 on CUB.
      eps: inside the logarithms.

    Reference: Cole et al., "Multi-Label Learning from Single Positive Labels", CVPR 2021.
    Differs from the authors' code: a later stage takes the table as it is, where theirs takes the logit of its
      probabilities clipped by 1e-5.
    """

    backbone: nn.Module
    meta: Meta
    net: Any = None
    expected: float = 2.9
    eps: float = 1e-5
    dtype: Any = jnp.float32
    axis: str | None = None
    steps_per_epoch: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.expected <= self.meta.num_labels:
            raise UserError(
                f"config.system.expected is {self.expected}; expected positives per image, from 0 to the"
                f" {self.meta.num_labels} labels of {self.meta.name}."
            )
        _around.build_net(self, RoleCriterion(float(self.expected), self.eps))
        super().__post_init__()

    def setup(self) -> None:
        self.label_table = self.param("label_table", self._start)

    def _start(self, key: jax.Array) -> jax.Array:
        known = jnp.asarray(_around.codes(self.meta))
        free = jax.random.uniform(key, known.shape, jnp.float32, -SPREAD, SPREAD)
        return jnp.where(known == 0, free, known.astype(jnp.float32) * CERTAIN)

    def __call__(self, batch: Batch, *, train: bool = False) -> Outputs:
        return self.net(batch, train=train)

    def loss(self, batch: Batch, step: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return self.net.loss({**batch, "theta": self.label_table[batch["index"]]}, step)

    def scores(self, batch: Batch) -> Float[Array, "b l"]:
        return _around.scores(self.net, batch)

    def refresh(self, variables: Mapping[str, Any], score: Any, epoch: int) -> dict[str, Any]:
        return _around.refresh(self.net, variables, score, epoch)


# --- released checkpoints ---------------------------------------------------------------------------------------------


def _convert(names: Names, system: nn.Module) -> dict[str, Any]:
    """The classifier of file f and the table of file g, whose rows are the training images in the code's order."""
    assert isinstance(system, Role)
    if not isinstance(system.net, Baseline):
        raise UserError("ROLE's released files have a linear classifier; set config.system.net={'name': 'baseline'}.")
    if "g.logits" not in names:
        raise UserError(
            "ROLE's checkpoint is two files, best_model_state_f.pt and best_model_state_g.pt; give both, or f alone to"
            " configs/single_positive.py."
        )
    table, shape = names.array("g.logits"), system.meta.labels.shape
    if table.shape != shape:
        raise UserError(
            f"ROLE's table of labels has the shape {table.shape} and the training split {shape}, images by labels; take"
            " the data set and the split that it was trained on, without --classes."
        )
    return {"params": {"net": CLASSIFIER.convert(names, system.net)["params"], "label_table": table}}


def _rename(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The names of file f as the baseline's; those of g keep their prefix."""
    state = {name.removeprefix("f."): value for name, value in state.items()}
    return state if CLASSIFIER.rename is None else CLASSIFIER.rename(state)


PUBLISHED = Published(_convert, own=r"classifier\..*|g\..*", rename=_rename, files=r"best_model_state_(f|g)\.pt$")
NAMES = {"role": Role}
