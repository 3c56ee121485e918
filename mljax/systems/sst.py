"""SST: structured semantic transfer for partial labels (Chen, Pu, Wu, Xie, Lin; AAAI 2022).

SSGRL's network (semantic decoupling, gated propagation; here with its own reset gate and features of `width`
channels), and two branches that find positives among unknown labels. IST (intra-image): a head over pairs of label
features learns which labels go together in an image; what goes with the known positives becomes a pseudo label. CST
(cross-image): a memory holds features of known positives of each label; what resembles them becomes a pseudo label,
and a contrastive loss makes features of one label alike. Only the classifier predicts.

The code form is exact: HCPLab-SYSU/HCP-MLR-PL. The paper form follows its text where that differs.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mljax import losses
from mljax.layers import constant, encode, final
from mljax.losses import contrastive, weak_labels
from mljax.losses.criterion import Criterion
from mljax.systems import _semantic
from mljax.systems._pairs import PairHead, push
from mljax.types import Batch, Constant, Meta, Outputs
from mljax.weights.published import Names, Published

BRANCHES = ("both", "ist", "cst", "none")
FORMS = ("code", "paper")


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """theta of an epoch: none before `start`, then `first`, less `drop` after every epoch, not below `last`."""

    start: int
    first: float
    last: float
    drop: float

    def __call__(self, epoch: jax.Array) -> jax.Array:
        done = (epoch - self.start).astype(jnp.float32)
        return jnp.maximum(self.first - self.drop * done, self.last)


class SST(nn.Module):
    """The network; settings are explained at `sst`, which builds it.

    Label features are those before propagation (b l d). `extra`: `propagated` (b l d); `pair_logits` (b pairs) in
    the order of `weak_labels.pair_index` (IST with the image's own co-occurrence); `memory_scores` (b l), how alike
    stored features are (CST). Nothing of it is computed where only logits are taken.
    """

    backbone: nn.Module
    criterion: Criterion
    labels: int
    adjacency: Constant
    vectors: Constant | None
    cooccurrence: Constant | None
    width: int
    hidden: int
    output: int
    steps: int
    pool: int
    pooling: str
    branches: str
    form: str
    ist_weight: float
    cst_weight: float
    memory: int
    thresholds: Thresholds
    steps_per_epoch: int
    dtype: Any = jnp.float32
    axis: str | None = None

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> Outputs:
        feature_map = final(encode(self.backbone, batch, train=train))
        vectors = None if self.vectors is None else constant(self, "vectors", self.vectors)
        decoupling = _semantic.Decoupling(
            self.labels, self.width, self.hidden, self.pool, self.pooling, self.dtype, self.axis, name="decoupling"
        )
        features, attention = decoupling(feature_map, vectors, train=train)
        head = _semantic.GraphClassifier(self.output, self.steps, dtype=self.dtype, name="head")
        logits, propagated = head(features, constant(self, "adjacency", self.adjacency))
        extra = {"propagated": propagated}
        if self._pairs:
            pairs = PairHead(self.hidden, self.output, self.form, dtype=self.dtype, name="pairs")
            extra["pair_logits"] = pairs(features)
        elif self.cooccurrence is not None:
            constant(self, "cooccurrence", self.cooccurrence)
        if self._cst:
            shape = (self.labels, self.memory, features.shape[-1])
            memory = self.variable("memory", "features", jnp.zeros, shape, jnp.float32)
            extra["memory_scores"] = self._memory_scores(features, memory.value)
        return Outputs(logits, features, attention, extra)

    @property
    def _ist(self) -> bool:
        return self.branches in ("both", "ist")

    @property
    def _cst(self) -> bool:
        return self.branches in ("both", "cst")

    @property
    def _pairs(self) -> bool:
        return self._ist and self.cooccurrence is None

    def _memory_scores(self, features: jax.Array, memory: jax.Array) -> jax.Array:
        """(b l): mean cosine over all slots, empty ones count 0 (code), or over the filled ones (paper)."""
        scores = weak_labels.memory_scores(features, memory)
        if self.form == "code":
            return scores
        filled = jnp.any(memory != 0, axis=-1).sum(-1)
        return scores * (memory.shape[1] / jnp.maximum(filled, 1).astype(jnp.float32))[None]

    def _cooccurrence_scores(self, out: Outputs, batch: Batch) -> jax.Array:
        """(b l): mean over the known positives of how they go with a label (code), or the sum (paper)."""
        labels, observed = batch["labels"], batch["observed"]
        positive = labels * observed
        count = jnp.maximum(positive.sum(-1, keepdims=True), 1)
        if self._pairs:
            assert out.extra is not None
            scores = weak_labels.cooccurrence_scores(out.extra["pair_logits"], labels, observed)
        else:
            matrix: Any = self.get_variable("constants", "cooccurrence")
            scores = jnp.einsum("bm,ml->bl", positive, matrix, precision="highest") / count
        return scores if self.form == "code" else scores * count

    def _remember(self, features: jax.Array, batch: Batch) -> jax.Array:
        """Update the memory with this batch, and score the batch by it (b l)."""
        memory: Any = self.get_variable("memory", "features")
        if self.is_initializing():
            return self._memory_scores(features, memory)
        positive = batch["labels"] * batch["observed"] * batch["mask"][:, None]
        memory = push(memory, features, positive, self.axis)
        self.put_variable("memory", "features", memory)
        return self._memory_scores(features, memory)

    def pseudo_scores(self, batch: Batch) -> dict[str, jax.Array]:
        """What each branch thinks of all labels, (b l) by "ist" and "cst": unknown ones that reach theta get positive.

        In evaluation mode, with the memory as it is.
        """
        out, found = self(batch), {}
        assert out.extra is not None
        if self._ist:
            found["ist"] = self._cooccurrence_scores(out, batch)
        if self._cst:
            found["cst"] = out.extra["memory_scores"]
        return found

    def loss(self, batch: Batch, step: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """BCE on known labels, on those and IST's pseudo labels, on those and CST's, and the weighted branch losses.

        Terms: the parts, and `ist_found`, `cst_found`: pseudo labels per image.
        """
        out, step = self(batch, train=True), jnp.asarray(step, jnp.int32)
        assert out.extra is not None and out.label_features is not None
        features = out.label_features
        terms = {"bce": self.criterion(out.logits, batch, axis=self.axis)}
        ramp = jnp.minimum(step.astype(jnp.float32) / self.steps_per_epoch, 1)
        epoch = step // self.steps_per_epoch
        if self._ist:
            terms |= self._pseudo("ist", self._cooccurrence_scores(out, batch), out.logits, batch, epoch)
            if self._pairs and self.ist_weight:
                values = weak_labels.cooccurrence_loss(out.extra["pair_logits"], batch["labels"], batch["observed"])
                weights = jnp.broadcast_to(batch["mask"][:, None], values.shape)
                terms["ist"] = self.ist_weight * ramp * losses.reduce(values, weights, how="mean", axis=self.axis)
        if self._cst:
            terms |= self._pseudo("cst", self._remember(features, batch), out.logits, batch, epoch)
            if self.cst_weight:
                known, key = batch["observed"] * batch["mask"][:, None], self.make_rng("draw")
                found = contrastive.cross_image(features, batch["labels"], known, key=key, axis=self.axis)
                terms["cst"] = self.cst_weight * ramp * found
        total = sum((v for k, v in terms.items() if not k.endswith("_found")), jnp.float32(0))
        return total, terms

    def _pseudo(
        self, name: str, scores: jax.Array, logits: jax.Array, batch: Batch, epoch: jax.Array
    ) -> dict[str, jax.Array]:
        """The classification loss with a branch's pseudo labels, 0 before they start, and how many there are."""
        found = weak_labels.pseudo_positives(scores, batch["observed"], self.thresholds(epoch))
        begun = epoch >= self.thresholds.start
        found = jnp.where(begun, found, 0)
        labels, observed = batch["labels"] * batch["observed"] + found, batch["observed"] + found
        loss = self.criterion(logits, batch, labels=labels, observed=observed, axis=self.axis)
        return {f"{name}_bce": jnp.where(begun, loss, 0), f"{name}_found": found.sum(-1).mean()}


def sst(
    *,
    backbone: nn.Module,
    criterion: Criterion,
    meta: Meta,
    steps_per_epoch: int,
    width: int = 1024,
    hidden: int | None = None,
    output: int | None = None,
    steps: int = 3,
    pool: int = 2,
    pooling: str = "semantic",
    graph: str = "labels",
    branches: str = "both",
    cooccurrence: str = "image",
    form: str = "code",
    ist_weight: float = 10.0,
    cst_weight: float = 0.05,
    memory: int = 100,
    start: int = 5,
    first: float = 0.95,
    last: float = 0.75,
    drop: float = 0.025,
    dtype: Any = jnp.float32,
    axis: str | None = None,
) -> SST:
    """SST for a data set with label vectors.

    Args:
      backbone, criterion, meta: image -> endpoints, the classification loss (the authors': BCE, mean over known
        labels of the batch; the paper's text: mean per image, `partial_bce` with alpha=1, beta=0, gamma=-1), and the
        facts of the training split.
      steps_per_epoch: of training.
      width: d of label features; the map is brought to it where it has another.
      hidden: of the joint space, and of the pair head's first layer; None: half of width.
      output: of what is classified, and of the pair head; None: width.
      steps: of the propagation. pool: side of the average pooling of the map; 1: none.
      pooling: "semantic", or "activation": ADD-GCN's, the paper's ablation of decoupling (needs no vectors).
      graph: where edges come from; see `_semantic.graph`.
      branches: "both", or for the ablations "ist", "cst" or "none".
      cooccurrence: "image": learned by the pair head; "dataset": P(label | known positive) of the known training
        labels, the paper's ablation.
      form: "code", or "paper": a pair head shared by all pairs, a sum over known positives in place of a mean, and a
        mean over the filled slots of the memory alone.
      ist_weight, cst_weight: of the branches' own losses; 0: without.
      memory: features held per label.
      start: epoch from which on there are pseudo labels. first, last, drop: theta goes from `first` to `last` by
        `drop` an epoch.
    Raises:
      UserError: an unknown choice, a setting out of range, no label vectors.
    Reference: Chen et al., "Structured Semantic Transfer for Multi-Label Recognition with Partial Labels", AAAI 2022.
    Differs from the authors' code: theta=1 is compared as it is (theirs falls back to 0); padding is left out; a class
    without known positives has no edges, theirs NaN; activation pooling takes the mean over positions.
    """
    choices = {"pooling": _semantic.POOLING, "branches": BRANCHES, "cooccurrence": ("image", "dataset"), "form": FORMS}
    given = {"pooling": pooling, "branches": branches, "cooccurrence": cooccurrence, "form": form}
    for key, options in choices.items():
        _semantic.choice(key, given[key], options)
    _semantic.at_least(0, steps=steps, ist_weight=ist_weight, cst_weight=cst_weight, start=start, drop=drop)
    hidden = max(width // 2, 1) if hidden is None else hidden
    output = width if output is None else output
    _semantic.at_least(1, pool=pool, memory=memory, width=width, hidden=hidden, output=output)
    vectors = Constant(_semantic.label_vectors(meta, "SST")) if pooling == "semantic" else None
    known = None
    if cooccurrence == "dataset" and branches in ("both", "ist"):
        known = Constant(_semantic.graph(meta, "labels"))
    return SST(
        backbone, criterion, meta.num_labels, Constant(_semantic.graph(meta, graph)), vectors, known, width, hidden,
        output, steps, pool, pooling, branches, form, ist_weight, cst_weight, memory,
        Thresholds(start, first, last, drop), steps_per_epoch, dtype, axis,
    )  # fmt: skip


def _convert(names: Names, system: nn.Module) -> dict[str, Any]:
    """Without IST in the file (`intra_*`), set config.system.branches='cst'. The memory is not stored: empty."""
    assert isinstance(system, SST)
    found = _semantic.published_hcp(names)
    if system._pairs:
        first, second = names.linear("intra_fc_2"), names.linear("intra_fc_3")
        kernel, bias = names.array("intra_classifiers.weight"), names.array("intra_classifiers.bias")
        label = names.linear("intra_fc_1")
        found["params"]["pairs"] = {"label": label, "first": first, "second": second, "kernel": kernel, "bias": bias}
    if system._cst:
        shape = (system.labels, system.memory, system.width)
        found["memory"] = {"features": jnp.zeros(shape, jnp.float32)}
    return found


PUBLISHED = Published(_convert, trunk="backbone.")
NAMES = {"sst": sst}
