"""MulCon: label-level embeddings under a supervised contrastive loss (Dao, Zhao, Phung, Cai; Neurocomputing 2023).

Feature map -> tokens -> (token self-attention) -> one query per label attends to the tokens -> (label self-attention)
-> label features -> one classifier per label, and a projector whose unit vectors the contrastive loss compares.

The paper has only the attention of the queries; the released code has all of it. Both are settings of `MulCon`.
"""

import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mljax import parallel
from mljax.errors import UserError, at_least, one_of
from mljax.layers import attention_maps, encode, final, layer_norm, tokens
from mljax.losses.contrastive import hard_negatives, label_contrastive, supervised_contrastive
from mljax.losses.criterion import Criterion
from mljax.losses.numeric import unit
from mljax.types import ArrayLike, Batch, Meta, Outputs
from mljax.weights.published import Names, Published


class AttentionBlock(nn.Module):
    """MulCon's attention: o = q + softmax(q k' * scale) v per head, (norm), then o + f(o W), (norm); f is ReLU or none.

    The residual is the projected query. Scores and softmax are float32.

    Attributes:
      width: of queries, keys, values and the output; `heads` divides it.
      norm, relu: as the released code; the paper has neither.
      scale: of the scores: 1 / sqrt of the full "width" (the code), of a head's width ("heads"), or "none" (the paper).
      std: of the normal initial weights; biases start at 0.
    """

    width: int
    heads: int
    norm: bool
    relu: bool
    scale: str
    std: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, query: Float[ArrayLike, "b q d"], memory: Float[ArrayLike, "b n e"]
    ) -> tuple[Float[Array, "b q {self.width}"], Float[Array, "b {self.heads} q n"]]:
        """The updated queries and the attention weights."""
        if self.width % self.heads:
            raise UserError(f"{self.heads} heads do not divide the width {self.width}; choose a divisor of it.")
        size = self.width // self.heads
        init = nn.initializers.normal(self.std)

        def dense(x: jax.Array, name: str) -> jax.Array:
            return nn.Dense(self.width, dtype=self.dtype, kernel_init=init, name=name)(x)

        def normed(x: jax.Array, name: str) -> jax.Array:
            return layer_norm(name, self.dtype)(x) if self.norm else x

        q, k, v = dense(query, "query"), dense(memory, "key"), dense(memory, "value")
        parts = [x.reshape(*x.shape[:-1], self.heads, size) for x in (q, k, v)]
        scores = jnp.einsum("bqkd,bnkd->bkqn", parts[0], parts[1]).astype(jnp.float32)
        scores = scores * {"width": self.width**-0.5, "heads": size**-0.5, "none": 1.0}[self.scale]
        weights = nn.softmax(scores, axis=-1)
        o = q + jnp.einsum("bkqn,bnkd->bqkd", weights.astype(self.dtype), parts[2]).reshape(q.shape)
        o = normed(o, "norm1")
        forward = dense(o, "out")
        return normed(o + (nn.relu(forward) if self.relu else forward), "norm2"), weights


class LabelAttention(nn.Module):
    """The authors' netA: tokens -> one feature per label."""

    labels: int
    width: int
    heads: int
    token_layers: int
    label_layers: int
    norm: bool
    relu: bool
    scale: str
    queries: str
    std: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[ArrayLike, "b n d"]
    ) -> tuple[Float[Array, "b {self.labels} {self.width}"], Float[Array, "b {self.heads} {self.labels} n"]]:
        """The features of the labels, and the attention weights over the tokens that they came from."""
        queries = self.param("queries", self._init, (self.labels, self.width)).astype(self.dtype)
        for i in range(self.token_layers):
            x, _ = self._block(x.shape[-1], f"tokens_{i}")(x, x)
        u = jnp.broadcast_to(queries[None], (x.shape[0], *queries.shape))
        u, weights = self._block(self.width, "cross")(u, x)
        for i in range(self.label_layers):
            u, _ = self._block(self.width, f"labels_{i}")(u, u)
        return u, weights

    def _block(self, width: int, name: str) -> AttentionBlock:
        return AttentionBlock(width, self.heads, self.norm, self.relu, self.scale, self.std, self.dtype, name=name)

    def _init(self, key: jax.Array, shape: tuple[int, int]) -> jax.Array:
        if self.queries == "normal":
            return jax.random.normal(key, shape)
        bound = (6 / ((shape[0] + 1) * shape[1])) ** 0.5  # torch's Xavier of the authors' shape (1 l width)
        return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


class Classifiers(nn.Module):
    """One linear classifier per label, in float32; normal weights, biases 0."""

    std: float

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "b l d"]) -> Float[Array, "b l"]:
        kernel = self.param("kernel", nn.initializers.normal(self.std), x.shape[1:])
        bias = self.param("bias", nn.initializers.zeros_init(), x.shape[1:2])
        return jnp.einsum("bld,ld->bl", x.astype(jnp.float32), kernel) + bias[None]


class Projector(nn.Module):
    """Dense, ReLU, dense, unit length, in float32."""

    embedding: int
    std: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "*b d"]) -> Float[Array, "*b {self.embedding}"]:
        init = nn.initializers.normal(self.std)
        y = nn.relu(nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=init, name="hidden")(x))
        y = nn.Dense(self.embedding, dtype=self.dtype, kernel_init=init, name="out")(y)
        return unit(y.astype(jnp.float32))


class MulCon(nn.Module):
    """MulCon for a data set; the defaults are the released code's.

    Attributes:
      level: what is embedded and contrasted: every "label" of an image, or the "image" itself: average-pooled
        features, one linear classifier and image embeddings, where images that share labels are positives, as often
        as they share one (the ablation's rows; what its authors count as positive is not known).
      width: of label features; the heads must divide it.
      heads: of every attention block; they must divide the backbone's width too, where there are token layers.
      token_layers: self-attention blocks over image tokens (code 2, paper 0).
      label_layers: self-attention blocks over label features (code 1, paper 0).
      norm, relu: LayerNorm and ReLU in the blocks (code), or not (paper).
      scale: of attention scores: by the full "width" (code), by "heads", or "none" (as the paper writes it).
      queries: initial label queries: "xavier" (code) or "normal" (paper).
      embedding_width: of the projected unit vectors.
      contrast: weight of the contrastive loss (code 0.5, paper 0.1); 0: none, no projector, and one view is enough (all
        views that a batch holds are classified).
      how: the loss takes the "mean" over anchors (code) or their "sum" (paper).
      temperature: of the contrastive softmax.
      denominator: fill up the contrasted entries to so many of the whole batch with the inactive ones of the highest
        logits (the code's option; 0: none).
      std: of the normal initial weights.

    Reference: Dao et al., "Contrastively Enforcing Distinctiveness for Multi-Label Image Classification", 2023.
    Differs from the authors' code: unobserved labels are neither anchors nor contrasted with; label embeddings of all
    devices are gathered, so that the loss is the global batch's (theirs is a device's); without the contrastive term
    no projector exists, as in their first step.
    """

    backbone: nn.Module
    criterion: Criterion
    meta: Meta
    level: str = "label"
    width: int = 1024
    heads: int = 4
    token_layers: int = 2
    label_layers: int = 1
    norm: bool = True
    relu: bool = True
    scale: str = "width"
    queries: str = "xavier"
    embedding_width: int = 128
    contrast: float = 0.5
    how: str = "mean"
    temperature: float = 0.2
    denominator: int = 0
    std: float = 0.02
    dtype: Any = jnp.float32
    axis: str | None = None

    def __post_init__(self) -> None:
        one_of("config.system.level", self.level, ("label", "image"))
        one_of("config.system.scale", self.scale, ("width", "heads", "none"))
        one_of("config.system.queries", self.queries, ("xavier", "normal"))
        one_of("config.system.how", self.how, ("mean", "sum"))
        at_least("config.system.contrast", self.contrast, 0)
        at_least("config.system.denominator", self.denominator, 0)
        if self.denominator and self.level == "image":
            raise UserError("config.system.denominator counts label embeddings and level='image' has none; leave it 0.")
        for key, value in (("temperature", self.temperature), ("std", self.std)):
            if value <= 0:
                raise UserError(f"config.system.{key} is {value}; expected a number above 0.")
        super().__post_init__()

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> Outputs:
        feature_map = final(encode(self.backbone, batch, train=train)).astype(self.dtype)
        _, height, width, _ = feature_map.shape
        project = Projector(self.embedding_width, self.std, self.dtype, name="projector") if self.contrast else None
        if self.level == "image":
            x = feature_map.astype(jnp.float32).mean((1, 2))
            logits = nn.Dense(self.meta.num_labels, kernel_init=nn.initializers.normal(self.std), name="classifier")(x)
            return Outputs(logits=logits, extra={"embeddings": project(x)} if project else {})
        x, weights = LabelAttention(
            self.meta.num_labels, self.width, self.heads, self.token_layers, self.label_layers, self.norm, self.relu,
            self.scale, self.queries, self.std, self.dtype, name="attention",
        )(tokens(feature_map))  # fmt: skip
        return Outputs(
            logits=Classifiers(self.std, name="classifier")(x),
            label_features=x,
            attention=attention_maps(weights, height, width),
            extra={"embeddings": project(x)} if project else {},
        )

    def loss(self, batch: Batch, step: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Classification of all views, plus `contrast` times the contrastive loss between them."""
        del step
        if self.contrast or "views" in batch:
            batch = every_view(batch)
        out = self(batch, train=True)
        classification = self.criterion(out.logits, batch, axis=self.axis)
        if not self.contrast:
            return classification, {}
        contrast = self.contrastive(out, batch)
        terms = {"classification": classification, "contrast": contrast}
        return classification + self.contrast * contrast, terms

    def contrastive(self, out: Outputs, batch: Batch) -> Float[Array, ""]:
        """The contrastive loss of the global batch, before its weight."""
        assert out.extra is not None
        mask: Any = batch["mask"][:, None]
        known = batch["observed"] * mask
        active = batch["labels"] * known
        options = {"temperature": self.temperature, "how": self.how}
        if self.level == "image":
            return supervised_contrastive(out.extra["embeddings"], active, mask[:, 0], axis=self.axis, **options)
        z, logits, active, known = parallel.all_gather((out.extra["embeddings"], out.logits, active, known), self.axis)
        others = hard_negatives(logits, active, known, self.denominator) if self.denominator else None
        return label_contrastive(z, active, others, **options)


def every_view(batch: Batch) -> dict[str, Any]:
    """A batch of b images in v views -> a batch of b*v images (or cached endpoints), its labels repeated.

    Raises:
      UserError: the batch holds one view.
    """
    views = batch.get("views")
    if views is None:
        raise UserError(
            "MulCon's contrastive loss compares two views of an image and the batch holds one; set"
            " config.input.views=2 (with cached features two config.cache.train_views of one size besides), or"
            " config.system.contrast=0."
        )
    count = jax.tree.leaves(views)[0].shape[1]
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), views)
    rest = {k: jnp.repeat(batch[k], count, axis=0) for k in ("labels", "observed", "index", "mask") if k in batch}
    return rest | {"endpoints" if isinstance(views, Mapping) else "image": flat}


def _block(names: Names, name: str, norm: bool) -> dict[str, Any]:
    parts = {"query": "fc_q", "key": "fc_k", "value": "fc_v", "out": "fc_o"}
    params = {ours: names.linear(f"{name}.{theirs}") for ours, theirs in parts.items()}
    return params | ({"norm1": names.norm(f"{name}.ln0"), "norm2": names.norm(f"{name}.ln1")} if norm else {})


def _convert(names: Names, system: nn.Module) -> dict[str, Any]:
    """netA, one netC per label, and netP, which only the second step has and prediction does not need."""
    assert isinstance(system, MulCon)
    if system.level != "label":
        raise UserError("Released MulCon weights have label features; set config.system.level='label'.")
    attention = {"queries": names.array("netA.I")[0], "cross": _block(names, "netA.mab", system.norm)}
    for i in range(system.token_layers):
        attention[f"tokens_{i}"] = _block(names, f"netA.sab{i + 1}.mab", system.norm)
    for i in range(system.label_layers):
        attention[f"labels_{i}"] = _block(names, f"netA.sab{system.token_layers + i + 1}.mab", system.norm)
    kernels = [names.array(f"netC_{i}.weight")[0] for i in range(system.meta.num_labels)]
    biases = [names.array(f"netC_{i}.bias")[0] for i in range(system.meta.num_labels)]
    params = {"attention": attention, "classifier": {"kernel": np.stack(kernels), "bias": np.stack(biases)}}
    if not system.contrast:
        names.ignore(r"netP\..*")
    elif "netP.0.weight" not in names:
        raise UserError("The weights have no netP, the projector of the second step; set config.system.contrast=0.")
    else:
        params["projector"] = {"hidden": names.linear("netP.0"), "out": names.linear("netP.2")}
    return {"params": params}


def _renamed(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of file ".._net_A.pth" come as "A.name"; they are called "netA.name" here."""
    return {re.sub(r"^([EAP]|C_\d+)\.", r"net\1.", name): value for name, value in state.items()}


PUBLISHED = Published(_convert, trunk="netE.", rename=_renamed, files=r"net_([EAP]|C_\d+)\.pth$")
NAMES = {"mulcon": MulCon}
