"""Losses that compare: labels of one image with each other (ranking), or label features across images.

Under pmap the examples of all devices are gathered first, so that every device computes the loss of the
global batch.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num, PRNGKeyArray, Shaped

from mljax import parallel
from mljax.errors import one_of
from mljax.losses.log_total import log_total
from mljax.losses.numeric import floats, unit, wide
from mljax.types import ArrayLike


def ranking(
    logits: Float[ArrayLike, "b l"],
    labels: Num[ArrayLike, "b l"],
    observed: Num[ArrayLike, "b l"] | None = None,
    *,
    margin: float = 1.0,
) -> Float[Array, "b l"]:
    """Pairwise ranking: each positive's sum over negatives of max(0, margin - p_pos + p_neg), p = sigmoid(x).

    Labels that are not observed count as negatives, and the result is 0 at negatives; the single-positive paper's code
    takes the mean over all entries.
    Reference: Cole et al., "Multi-Label Learning from Single Positive Labels", CVPR 2021.
    """
    x, y = floats(logits, labels)
    p = jax.nn.sigmoid(x)
    y = y if observed is None else y * observed.astype(y.dtype)
    hinge = jax.nn.relu(margin - p[:, :, None] + p[:, None, :])
    return y * jnp.einsum("blm,bm->bl", hinge, 1 - y, precision="highest")


def cross_image(
    features: Num[ArrayLike, "b l d"],
    labels: Num[ArrayLike, "b l"],
    observed: Num[ArrayLike, "b l"],
    *,
    key: PRNGKeyArray | None = None,
    draws: Float[ArrayLike, "pairs l"] | None = None,
    axis: str | None = None,
) -> Float[Array, ""]:
    """SST's and SARB's contrastive loss between the label features of two images, with hard negatives.

    For two images n < m and a label that both know: 1 - cos if both have it, else 1 + cos. With P pairs of
    the first kind, of the pairs of which one has the label, and again of those of which none has it, 2P
    random ones and the P of the greatest loss are kept (some twice); all if P = 0. The mean of what is kept.

    Args:
      key: of the random choice, the same on all devices.
      draws: the numbers that decide the choice (least first) in place of the key; pairs as `image_pairs`.
      axis: of pmap, or None.
    Returns:
      0 without any pair.
    Raises:
      ValueError: neither `key` nor `draws`.
    Reference: Chen et al., "Structured Semantic Transfer ..", AAAI 2022 and Pu et al., "Semantic-Aware
      Representation Blending ..", AAAI 2022, in the form of the authors' code.
    """
    features, labels, observed = parallel.all_gather((features, labels, observed), axis)
    n, m = image_pairs(features.shape[0])
    vectors = unit(wide(features))
    cosine = jnp.einsum("bld,cld->bcl", vectors, vectors, precision="highest")[n, m]
    positive, negative = labels * observed > 0, (1 - labels) * observed > 0
    both = positive[n] & positive[m]
    one = (positive[n] & negative[m]) | (negative[n] & positive[m])
    none = negative[n] & negative[m]
    if draws is None:
        if key is None:
            raise ValueError("cross_image needs a key or draws for its random choice of negatives")
        draws = jax.random.uniform(key, cosine.shape)
    count = jnp.sum(both)
    kept = _kept(one, cosine, draws, count) + _kept(none, cosine, draws, count)
    weights = jnp.where(both, 1, kept).astype(cosine.dtype)
    values = 1 + jnp.where(both, -cosine, cosine)
    return jnp.sum(weights * values) / jnp.maximum(jnp.sum(weights), 1)


def image_pairs(count: int) -> tuple[Int[np.ndarray, "pairs"], Int[np.ndarray, "pairs"]]:
    """All pairs of images n < m of a batch, n in the outer loop."""
    n, m = np.triu_indices(count, 1)
    return n, m


def _kept(group: Array, cosine: Array, draws: Array, count: Array) -> Array:
    """How often each pair of a group is kept: 2*count random and `count` hardest ones; all if count is 0."""
    random = _rank(draws, group) < 2 * count
    hard = _rank(-jax.lax.stop_gradient(cosine), group) < count
    kept = jnp.where(count > 0, random.astype(jnp.int32) + hard.astype(jnp.int32), 1)
    return jnp.where(group, kept, 0)


def _rank(x: Array, group: Array) -> Array:
    """The rank of each entry among those of the group, least first, ties in order; others come last."""
    order = jnp.argsort(jnp.where(group, x, jnp.inf).reshape(-1))
    ranks = jnp.zeros(order.shape, jnp.int32).at[order].set(jnp.arange(order.size, dtype=jnp.int32))
    return ranks.reshape(x.shape)


def supervised_contrastive(
    embeddings: Num[ArrayLike, "n d"],
    labels: Num[ArrayLike, "n l"],
    active: Shaped[ArrayLike, "n"] | None = None,
    *,
    temperature: float = 0.2,
    base_temperature: float | None = None,
    how: str = "mean",
    axis: str | None = None,
) -> Float[Array, ""]:
    """MulCon's supervised contrastive loss over (image, label) embeddings.

    Every active row with a label is an anchor. Its loss is -mean over its positives (other active rows of
    the same label) of log softmax over all other active rows; 0 if it has no positive.

    Args:
      embeddings: of unit length. n = b*l, with `active` marking the entries whose label the image has: shapes are
        static, nothing is gathered by content.
      labels: one-hot; zero rows are only contrasted with (MulCon's hard negatives).
      active: 1 for the rows that take part; all if None.
      temperature: of the softmax; base_temperature: the loss is scaled by temperature/base_temperature
        (None: 1).
      how: "mean" over anchors, those without a positive included (the code), or "sum" (the paper).
      axis: of pmap, or None.
    Raises:
      UserError: `how` is neither.
    Reference: Dao et al., "Contrastively Enforcing Distinctiveness for Multi-Label Image Classification",
      2023; Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, eq. 2.
    Differs from the authors' code: masks in place of a gather; the sum over positives is taken by class, and
      that over all others in blocks, so that no n x n matrix is built.
    """
    one_of("supervised_contrastive's how", how, ("mean", "sum"))
    z, y = floats(embeddings, labels)
    takes = jnp.ones_like(z[:, 0]) if active is None else active.astype(z.dtype)
    z, y, takes = parallel.all_gather((z, y, takes), axis)
    y = y * takes[:, None]
    # z_i . (sum of z_j of the same label, itself excluded): a sum per class, not per pair
    sums = jnp.einsum("nl,nd->ld", y, z, precision="highest")
    of_itself = y.sum(axis=-1)
    count = y @ y.sum(axis=0) - of_itself
    same = jnp.sum(jnp.matmul(y, sums, precision="highest") * z, axis=-1)
    same = (same - of_itself * jnp.sum(z * z, axis=-1)) / temperature
    per_anchor = jnp.where(count > 0, log_total(z, takes, temperature) - same / jnp.maximum(count, 1), 0)
    anchors = of_itself > 0
    total = jnp.sum(jnp.where(anchors, per_anchor, 0)) * (temperature / (base_temperature or temperature))
    return total if how == "sum" else total / jnp.maximum(jnp.sum(anchors.astype(z.dtype)), 1)


def label_contrastive(
    embeddings: Num[ArrayLike, "b l d"],
    active: Shaped[ArrayLike, "b l"],
    others: Shaped[ArrayLike, "b l"] | None = None,
    *,
    temperature: float = 0.2,
    how: str = "mean",
) -> Float[Array, ""]:
    """MulCon's loss where every label of every image has an embedding: `supervised_contrastive`, label axis kept.

    An anchor is an active entry; its positives are the other active entries of its label, and it is contrasted
    with all other active entries and with `others`.

    Args:
      embeddings: of unit length, of the whole batch: under pmap gather it first.
      active: 1 for the labels that the images have.
      others: 1 for entries that are contrasted with and are not anchors (`hard_negatives`).
      temperature: of the softmax.
      how: "mean" over anchors, those without a positive included (the code), or "sum" (the paper).
    Returns:
      0 without anchors.
    Raises:
      UserError: `how` is neither.
    Reference: Dao et al., "Contrastively Enforcing Distinctiveness for Multi-Label Image Classification", 2023.
    Differs from the authors' code: shapes are static, and no (active active) matrix is ever whole; see `log_total`.
    """
    one_of("label_contrastive's how", how, ("mean", "sum"))
    z, anchors = floats(embeddings, active > 0)
    takes = anchors if others is None else jnp.maximum(anchors, (others > 0).astype(z.dtype))
    sums = jnp.einsum("bl,bld->ld", anchors, z, precision="highest")
    positives = anchors.sum(axis=0)[None] - 1
    same = jnp.einsum("bld,ld->bl", z, sums, precision="highest") - jnp.sum(z * z, axis=-1)
    total: Array = log_total(z.reshape(-1, z.shape[-1]), takes.reshape(-1), temperature)
    per_anchor = jnp.where(
        positives > 0, total.reshape(takes.shape) - same / (temperature * jnp.maximum(positives, 1)), 0
    )
    loss = jnp.sum(jnp.where(anchors > 0, per_anchor, 0))
    return loss if how == "sum" else loss / jnp.maximum(jnp.sum(anchors), 1)


def hard_negatives(
    logits: Float[ArrayLike, "b l"], active: Shaped[ArrayLike, "b l"], allowed: Shaped[ArrayLike, "b l"], size: int
) -> Float[Array, "b l"]:
    """The inactive entries of the highest logits that fill a denominator up to `size` entries, the active counted.

    All are of the whole batch. An entry is 1 if chosen, which it can be where it is allowed and not active; ties are
    taken in order.
    """
    free = (allowed > 0) & ~(active > 0)
    rank = _rank(-jax.lax.stop_gradient(logits), free)
    return (free & (rank < size - jnp.sum(active > 0))).astype(jnp.float32)
