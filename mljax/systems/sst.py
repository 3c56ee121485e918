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
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mljax import losses
from mljax.errors import one_of
from mljax.layers import constant, encode, final
from mljax.losses import contrastive, weak_labels
from mljax.losses.criterion import Criterion
from mljax.systems import _semantic
from mljax.systems._pairs import PairHead, push
from mljax.types import ArrayLike, Batch, Meta, Outputs
from mljax.weights.published import Names, Published


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thresholds:
    """theta of an epoch: none before `start`, then `first`, less `drop` after every epoch, not below `last`."""

    start: int
    first: float
    last: float
    drop: float

    def __call__(self, epoch: Int[ArrayLike, ""]) -> Float[Array, ""]:
        done = (epoch - self.start).astype(jnp.float32)
        return jnp.maximum(self.first - self.drop * done, self.last)


class SST(nn.Module):
    """SST for a data set with label vectors.

    The authors' classification loss is BCE, mean over the known labels of the batch; the paper's text: mean per image,
    `partial_bce` with alpha=1, beta=0, gamma=-1. Label features are those before propagation (b l d).

    `extra`: `propagated` (b l d); `pair_logits` (b pairs) in the order of `partial.pair_index` (IST with the image's
    own co-occurrence); `memory_scores` (b l), how alike stored features are (CST). Nothing of it is computed where only
    logits are taken.

    Attributes:
      width: d of label features; the map is brought to it where it has another.
      hidden: of the joint space, and of the pair head's first layer; None: half of width.
      output: of what is classified, and of the pair head; None: width.
      steps: of the propagation.
      pool: side of the average pooling of the map; 1: none.
      pooling: "semantic", or "activation": ADD-GCN's, the paper's ablation of decoupling (needs no vectors).
      graph: where edges come from; see `_semantic.graph`.
      branches: "both", or for the ablations "ist", "cst" or "none".
      cooccurrence: "image": learned by the pair head; "dataset": P(label | known positive) of the known training
        labels, the paper's ablation.
      form: "code", or "paper": a pair head shared by all pairs, a sum over known positives in place of a mean, and a
        mean over the filled slots of the memory alone.
      ist_weight, cst_weight: of the branches' own losses; 0: without.
      memory: features held per label.
      start: epoch from which on there are pseudo labels.
      first, last, drop: theta goes from `first` to `last` by `drop` an epoch.

    Reference: Chen et al., "Structured Semantic Transfer for Multi-Label Recognition with Partial Labels", AAAI 2022.
    Differs from the authors' code: theta=1 is compared as it is (theirs falls back to 0); padding is left out; a class
    without known positives has no edges, theirs NaN; activation pooling takes the mean over positions.
    """

    backbone: nn.Module
    criterion: Criterion
    meta: Meta
    steps_per_epoch: int
    width: int = 1024
    hidden: int | None = None
    output: int | None = None
    steps: int = 3
    pool: int = 2
    pooling: str = "semantic"
    graph: str = "labels"
    branches: str = "both"
    cooccurrence: str = "image"
    form: str = "code"
    ist_weight: float = 10.0
    cst_weight: float = 0.05
    memory: int = 100
    start: int = 5
    first: float = 0.95
    last: float = 0.75
    drop: float = 0.025
    dtype: Any = jnp.float32
    axis: str | None = None

    def __post_init__(self) -> None:
        one_of("config.system.pooling", self.pooling, _semantic.POOLING)
        one_of("config.system.branches", self.branches, ("both", "ist", "cst", "none"))
        one_of("config.system.cooccurrence", self.cooccurrence, ("image", "dataset"))
        one_of("config.system.form", self.form, ("code", "paper"))
        weights = {"ist_weight": self.ist_weight, "cst_weight": self.cst_weight}
        _semantic.not_negative(steps=self.steps, **weights, start=self.start, drop=self.drop)
        sizes = {"width": self.width, "hidden": self.hidden, "output": self.output}
        _semantic.at_least_one(pool=self.pool, memory=self.memory, **sizes)
        if self.pooling == "semantic":
            _semantic.label_vectors(self.meta, "SST")
        for source in (self.graph, *(("labels",) if self._dataset else ())):
            _semantic.graph(self.meta, source)  # says early what is wrong with it
        super().__post_init__()

    @property
    def adjacency(self) -> Float[np.ndarray, "l l"]:
        """The label graph; see `_semantic.graph`."""
        return _semantic.graph(self.meta, self.graph)

    @property
    def thresholds(self) -> Thresholds:
        return Thresholds(start=self.start, first=self.first, last=self.last, drop=self.drop)

    @property
    def _ist(self) -> bool:
        return self.branches in ("both", "ist")

    @property
    def _cst(self) -> bool:
        return self.branches in ("both", "cst")

    @property
    def _pairs(self) -> bool:
        return self._ist and self.cooccurrence == "image"

    @property
    def _dataset(self) -> bool:
        return self._ist and self.cooccurrence == "dataset"

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> Outputs:
        feature_map = final(encode(self.backbone, batch, train=train))
        labels, hidden = self.meta.num_labels, _semantic.half(self.width, self.hidden)
        output = self.width if self.output is None else self.output
        vectors = None
        if self.pooling == "semantic":
            vectors = constant(self, "vectors", lambda: _semantic.label_vectors(self.meta, "SST"))
        decoupling = _semantic.Decoupling(
            labels, self.width, hidden, self.pool, self.pooling, self.dtype, self.axis, name="decoupling"
        )
        features, attention = decoupling(feature_map, vectors, train=train)
        head = _semantic.GraphClassifier(output, self.steps, dtype=self.dtype, name="head")
        logits, propagated = head(features, constant(self, "adjacency", lambda: self.adjacency))
        extra = {"propagated": propagated}
        if self._pairs:
            extra["pair_logits"] = PairHead(hidden, output, self.form, dtype=self.dtype, name="pairs")(features)
        elif self._dataset:
            constant(self, "cooccurrence", lambda: _semantic.graph(self.meta))
        if self._cst:
            memory = self.variable(
                "memory", "features", jnp.zeros, (labels, self.memory, features.shape[-1]), jnp.float32
            )
            extra["memory_scores"] = self._memory_scores(features, memory.value)
        return Outputs(logits, features, attention, extra)

    def _memory_scores(
        self, features: Float[ArrayLike, "b l d"], memory: Float[ArrayLike, "l slots d"]
    ) -> Float[Array, "b l"]:
        """Mean cosine over all slots, empty ones count 0 (code), or over the filled ones (paper)."""
        scores = weak_labels.memory_scores(features, memory)
        if self.form == "code":
            return scores
        filled = jnp.any(memory != 0, axis=-1).sum(-1)
        return scores * (memory.shape[1] / jnp.maximum(filled, 1).astype(jnp.float32))[None]

    def _cooccurrence_scores(self, out: Outputs, batch: Batch) -> Float[Array, "b l"]:
        """Mean over the known positives of how they go with a label (code), or the sum (paper)."""
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

    def _remember(self, features: Float[ArrayLike, "b l d"], batch: Batch) -> Float[Array, "b l"]:
        """Update the memory with this batch, and score the batch by it."""
        memory: Any = self.get_variable("memory", "features")
        if self.is_initializing():
            return self._memory_scores(features, memory)
        positive = batch["labels"] * batch["observed"] * batch["mask"][:, None]
        memory = push(memory, features, positive, self.axis)
        self.put_variable("memory", "features", memory)
        return self._memory_scores(features, memory)

    def pseudo_scores(self, batch: Batch) -> dict[str, Float[Array, "b l"]]:
        """The scores of all labels by branch, "ist" and "cst": unknown labels that reach theta become pseudo labels.

        In evaluation mode, with the memory as it is.
        """
        out, scores = self(batch), {}
        assert out.extra is not None
        if self._ist:
            scores["ist"] = self._cooccurrence_scores(out, batch)
        if self._cst:
            scores["cst"] = out.extra["memory_scores"]
        return scores

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
                contrast = contrastive.cross_image(features, batch["labels"], known, key=key, axis=self.axis)
                terms["cst"] = self.cst_weight * ramp * contrast
        total = sum((v for k, v in terms.items() if not k.endswith("_found")), jnp.float32(0))
        return total, terms

    def _pseudo(
        self,
        branch: str,
        scores: Float[ArrayLike, "b l"],
        logits: Float[ArrayLike, "b l"],
        batch: Batch,
        epoch: Int[ArrayLike, ""],
    ) -> dict[str, Float[Array, ""]]:
        """The classification loss with a branch's pseudo labels, 0 before they start, and how many there are."""
        added = weak_labels.pseudo_positives(scores, batch["observed"], self.thresholds(epoch))
        started: Bool[Array, ""] = epoch >= self.start
        added = jnp.where(started, added, 0)
        labels, observed = batch["labels"] * batch["observed"] + added, batch["observed"] + added
        loss = self.criterion(logits, batch, labels=labels, observed=observed, axis=self.axis)
        return {f"{branch}_bce": jnp.where(started, loss, 0), f"{branch}_found": added.sum(-1).mean()}


def _convert(names: Names, system: nn.Module) -> dict[str, Any]:
    """Without IST in the file (`intra_*`), set config.system.branches='cst'. The memory is not stored: empty."""
    assert isinstance(system, SST)
    variables = _semantic.published_hcp(names)
    if system._pairs:
        first, second = names.linear("intra_fc_2"), names.linear("intra_fc_3")
        kernel, bias = names.array("intra_classifiers.weight"), names.array("intra_classifiers.bias")
        label = names.linear("intra_fc_1")
        pairs = {"label": label, "first": first, "second": second, "kernel": kernel, "bias": bias}
        variables["params"]["pairs"] = pairs
    if system._cst:
        shape = (system.meta.num_labels, system.memory, system.width)
        variables["memory"] = {"features": jnp.zeros(shape, jnp.float32)}
    return variables


PUBLISHED = Published(_convert, trunk="backbone.")
NAMES = {"sst": SST}
