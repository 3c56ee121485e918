"""SARB: semantic-aware representation blending for partial labels (Pu, Chen, Wu, Lin; AAAI 2022).

SST's network without its branches. Label features are blended to make positives where labels are unknown: with those of
another image that has the label (instance level), and with cluster centres of the label's features over the training
split (prototype level, `refresh`). Both blends are classified beside the image's own features; the target of a
blended entry is the share of what was put in. SST's contrastive loss makes features of one label alike.

Exact: HCPLab-SYSU/HCP-MLR-PL, with the two options below.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from mljax.errors import one_of
from mljax.layers import constant, encode, final
from mljax.losses import contrastive
from mljax.losses.criterion import Criterion
from mljax.systems import _semantic
from mljax.systems._prototypes import prototypes
from mljax.types import ArrayLike, Batch, Meta, Outputs
from mljax.weights.published import Names, Published


class Blend(NamedTuple):
    """Blended label features and what to train them on: labels in [0, 1], and which of them are known."""

    features: Float[Array, "b l d"]
    labels: Float[Array, "b l"]
    observed: Float[Array, "b l"]


class SARB(nn.Module):
    """SARB for a data set with label vectors.

    The classification loss must take soft labels; the authors' is BCE, mean over known labels. Label features are those
    before propagation (b l d). `extra`: `propagated` (b l d).

    Attributes:
      width, hidden, output, steps, pool, graph: as in SST.
      blends: "both", or for the ablations "instance", "prototype" or "none".
      contrast: weight of the contrastive loss, which grows from 0 over the first epoch.
      count: prototypes per label.
      start: epoch from which on there are blends.
      every: epochs from one computation of prototypes to the next.
      target_gradient: whether alpha and beta learn through their targets too, as in the authors' code, where raising
        them lowers the target; else through the features alone.
      blend_known: whether an image without any unknown label has its first label blended, as in the authors' code.

    Reference: Pu et al., "Semantic-Aware Representation Blending for Multi-Label Image Recognition with Partial
    Labels", AAAI 2022.
    Differs from the authors' code, besides the two options: prototypes come from images as the evaluation sees them,
    not from augmented ones, and from one start of k-means; a label without known positives has none and is not
    blended (theirs fails); alpha and beta are cut in the forward pass, not in place; padding is left out.
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
    graph: str = "labels"
    blends: str = "both"
    contrast: float = 0.05
    count: int = 10
    start: int = 5
    every: int = 5
    target_gradient: bool = False
    blend_known: bool = False
    dtype: Any = jnp.float32
    axis: str | None = None

    def __post_init__(self) -> None:
        one_of("config.system.blends", self.blends, ("both", "instance", "prototype", "none"))
        _semantic.not_negative(steps=self.steps, contrast=self.contrast, start=self.start)
        _semantic.at_least_one(
            pool=self.pool, count=self.count, every=self.every, width=self.width, hidden=self.hidden, output=self.output
        )
        _semantic.label_vectors(self.meta, "SARB")
        _semantic.graph(self.meta, self.graph)  # says early what is wrong with it
        super().__post_init__()

    @property
    def blends_instances(self) -> bool:
        return self.blends in ("both", "instance")

    @property
    def blends_prototypes(self) -> bool:
        return self.blends in ("both", "prototype")

    @property
    def positives(self) -> UInt8[np.ndarray, "N l"]:
        """1 for the known positives of the training split."""
        return self.meta.labels * self.meta.observed

    def setup(self) -> None:
        self.decoupling = _semantic.Decoupling(
            self.meta.num_labels, self.width, _semantic.half(self.width, self.hidden), self.pool, "semantic",
            self.dtype, self.axis,
        )  # fmt: skip
        output = self.width if self.output is None else self.output
        self.head = _semantic.GraphClassifier(output, self.steps, dtype=self.dtype)
        self.edges = constant(self, "adjacency", partial(_semantic.graph, self.meta, self.graph))
        self.words = constant(self, "vectors", partial(_semantic.label_vectors, self.meta, "SARB"))
        if self.blends_instances:
            self.alpha = self.param("alpha", nn.initializers.constant(0.5), ())
        if self.blends_prototypes:
            self.beta = self.param("beta", nn.initializers.constant(0.5), ())
            shape = (self.meta.num_labels, self.count, self.width)
            self.prototypes = self.variable("memory", "prototypes", jnp.zeros, shape, jnp.float32)

    def __call__(self, batch: Batch, *, train: bool = False) -> Outputs:
        feature_map = final(encode(self.backbone, batch, train=train))
        features, attention = self.decoupling(feature_map, self.words, train=train)
        logits, propagated = self.head(features, self.edges)
        return Outputs(logits, features, attention, {"propagated": propagated})

    def classify(self, features: Float[ArrayLike, "b l d"]) -> Float[Array, "b l"]:
        """Logits of label features, blended or not."""
        return self.head(features, self.edges)[0]

    def instance_blend(
        self, features: Float[ArrayLike, "b l d"], labels: Float[ArrayLike, "b l"], observed: Float[ArrayLike, "b l"]
    ) -> Blend:
        """Unknown labels that the partner has: F' = a F + (1-a) F_partner, target 1-a (eq. 1, 2).

        The partner is the image at the same place of the batch reversed, over all devices.
        """
        theirs, present = _reversed((features, labels * observed), self.axis)
        chosen = (observed == 0) & (present > 0)
        return self._blend(features, theirs, labels, observed, chosen, self.alpha)

    def prototype_blend(
        self,
        features: Float[ArrayLike, "b l d"],
        labels: Float[ArrayLike, "b l"],
        observed: Float[ArrayLike, "b l"],
        index: Int[ArrayLike, ""],
        uniform: Float[ArrayLike, "b l"],
    ) -> Blend:
        """One unknown label of each image: F' = b F + (1-b) P, target 1-b, P the label's prototype `index`.

        Args:
          index: of the prototype of every label.
          uniform: in [0, 1): the unknown label of the highest number is chosen, of those with prototypes.
        """
        stored = self.prototypes.value
        usable = (observed == 0) & jnp.any(stored != 0, axis=(1, 2))[None]
        chosen = nn.one_hot(jnp.argmax(jnp.where(usable, uniform, 0), axis=1), self.meta.num_labels) > 0
        if not self.blend_known:
            chosen = chosen & usable
        theirs = jnp.broadcast_to(stored[:, index].astype(features.dtype)[None], features.shape)
        return self._blend(features, theirs, labels, observed, chosen, self.beta)

    def _blend(
        self,
        features: Float[ArrayLike, "b l d"],
        other: Float[ArrayLike, "b l d"],
        labels: Float[ArrayLike, "b l"],
        observed: Float[ArrayLike, "b l"],
        chosen: Bool[ArrayLike, "b l"],
        share: Float[ArrayLike, ""],
    ) -> Blend:
        """share * features + (1 - share) * other where chosen, with the target 1 - share; `share` is kept in [0, 1]."""
        # the gradient passes the bounds, as it does in the authors' code, which cuts the parameter itself
        share = share + jax.lax.stop_gradient(jnp.clip(share, 0, 1) - share)
        target = 1 - (share if self.target_gradient else jax.lax.stop_gradient(share))
        weight = jnp.where(chosen, share, 1)[..., None].astype(features.dtype)
        known = jnp.where(chosen, (target > 0).astype(observed.dtype), observed)  # a target of 0 is an unknown one
        return Blend(weight * features + (1 - weight) * other, jnp.where(chosen, target, labels), known)

    def loss(self, batch: Batch, step: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """BCE of the image, of its instance blend and of its prototype blend, plus the weighted contrastive loss."""
        out, step = self(batch, train=True), jnp.asarray(step, jnp.int32)
        features: Any = out.label_features
        labels, observed = batch["labels"] * batch["observed"], batch["observed"]
        known, key = observed * batch["mask"][:, None], self.make_rng("draw")
        terms = {"bce": self.criterion(out.logits, batch, axis=self.axis)}
        if self.contrast:
            ramp = jnp.minimum(step.astype(jnp.float32) / self.steps_per_epoch, 1)
            contrast = contrastive.cross_image(features, labels, known, key=key, axis=self.axis)
            terms["contrast"] = self.contrast * ramp * contrast
        started = step // self.steps_per_epoch >= self.start
        if self.blends_instances:
            # padding has nothing to give
            blend = self.instance_blend(features, labels * batch["mask"][:, None], observed)
            terms["instance"] = self._blend_loss(blend, batch, started)
        if self.blends_prototypes:
            index = jax.random.randint(jax.random.fold_in(key, 0), (), 0, self.count)
            draw = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i + 1), (self.meta.num_labels,)))
            blend = self.prototype_blend(features, labels, observed, index, draw(batch["index"]))
            terms["prototype"] = self._blend_loss(blend, batch, started)
        return sum(terms.values(), jnp.float32(0)), terms

    def _blend_loss(self, blend: Blend, batch: Batch, started: Bool[Array, ""]) -> Float[Array, ""]:
        logits = self.classify(blend.features)
        loss = self.criterion(logits, batch, labels=blend.labels, observed=blend.observed, axis=self.axis)
        return jnp.where(started, loss, 0)

    def refresh(self, variables: Mapping[str, Any], score: Any, epoch: int) -> dict[str, Any]:
        """New prototypes before epochs start, start + every, ..: K centres of a label's known positives."""
        if not self.blends_prototypes or epoch < self.start or (epoch - self.start) % self.every:
            return dict(variables)
        positive = self.positives > 0
        features = score("train", entries=positive)["label_features"].astype(np.float32)
        centres = prototypes(features, np.nonzero(positive)[1], classes=self.meta.num_labels, count=self.count)
        return {**variables, "memory": {**variables["memory"], "prototypes": centres}}


def _reversed(tree: Any, axis: str | None) -> Any:
    """The batch of all devices in reversed order: each device gets the mirrored one's part."""

    def one(x: jax.Array) -> jax.Array:
        if axis is None:
            return x[::-1]
        devices = jax.lax.axis_size(axis)
        return jax.lax.ppermute(x[::-1], axis, [(i, devices - 1 - i) for i in range(devices)])

    return jax.tree.map(one, tree)


def _convert(names: Names, system: nn.Module) -> dict[str, Any]:
    """The prototypes are not stored and start empty."""
    assert isinstance(system, SARB)
    variables = _semantic.published_hcp(names)
    for share, used in (("alpha", system.blends_instances), ("beta", system.blends_prototypes)):
        value = names.array(share)
        if used:
            variables["params"][share] = value
    if system.blends_prototypes:
        shape = (system.meta.num_labels, system.count, system.width)
        variables["memory"] = {"prototypes": np.zeros(shape, np.float32)}
    return variables


PUBLISHED = Published(_convert, trunk="backbone.")
NAMES = {"sarb": SARB}
