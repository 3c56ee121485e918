"""Losses that compare: labels of one image with each other (ranking), or label features across images.

Under pmap the examples of all devices are gathered first, so that every device computes the loss of the
global batch.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mljax import parallel
from mljax.losses import floats, wide
from mljax.weak_labels import unit

Array = jax.Array


def ranking(logits: Array, labels: Array, observed: Array | None = None, *, margin: float = 1.0) -> Array:
    """Pairwise ranking: each positive's sum over negatives of max(0, margin - p_pos + p_neg), p = sigmoid(x).

    Args:
      logits, labels, observed: (b l). Labels that are not observed count as negatives.
    Returns:
      (b l), 0 at negatives; the single-positive paper's code takes the mean over all entries.
    Reference: Cole et al., "Multi-Label Learning from Single Positive Labels", CVPR 2021.
    """
    x, y = floats(logits, labels)
    p = jax.nn.sigmoid(x)
    y = y if observed is None else y * observed.astype(y.dtype)
    hinge = jax.nn.relu(margin - p[:, :, None] + p[:, None, :])
    return y * jnp.einsum("blm,bm->bl", hinge, 1 - y, precision="highest")


def cross_image(
    features: Array,
    labels: Array,
    observed: Array,
    *,
    key: Array | None = None,
    draws: Array | None = None,
    axis: str | None = None,
) -> Array:
    """SST's and SARB's contrastive loss between the label features of two images, with hard negatives.

    For two images n < m and a label that both know: 1 - cos if both have it, else 1 + cos. With P pairs of
    the first kind, of the pairs of which one has the label, and again of those of which none has it, 2P
    random ones and the P of the greatest loss are kept (some twice); all if P = 0. The mean of what is kept.

    Args:
      features: (b l d), one vector per label.
      labels, observed: (b l).
      key: PRNG key of the random choice, the same on all devices.
      draws: (pairs l), the numbers that decide the choice (least first) in place of the key; pairs as
        `image_pairs`.
      axis: of pmap, or None.
    Returns:
      (), 0 without any pair.
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


def image_pairs(count: int) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of images n < m of a batch, n in the outer loop: two (pairs) arrays."""
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
    embeddings: Array,
    labels: Array,
    active: Array | None = None,
    *,
    temperature: float = 0.2,
    base_temperature: float | None = None,
    how: str = "mean",
    axis: str | None = None,
) -> Array:
    """MulCon's supervised contrastive loss over (image, label) embeddings.

    Every active row with a label is an anchor. Its loss is -mean over its positives (other active rows of
    the same label) of log softmax over all other active rows; 0 if it has no positive.

    Args:
      embeddings: (n d), unit length. n = b*l, with `active` marking the entries whose label the image has:
        shapes are static, nothing is gathered by content.
      labels: (n l), one-hot; zero rows are only contrasted with (MulCon's hard negatives).
      active: (n) in {0, 1}, rows that take part; all if None.
      temperature: of the softmax; base_temperature: the loss is scaled by temperature/base_temperature
        (None: 1).
      how: "mean" over anchors, those without a positive included (the code), or "sum" (the paper).
      axis: of pmap, or None.
    Returns:
      ().
    Raises:
      ValueError: `how` is neither.
    Reference: Dao et al., "Contrastively Enforcing Distinctiveness for Multi-Label Image Classification",
      2023; Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, eq. 2.
    Differs from the authors' code: masks in place of a gather; the sum over positives is taken by class, so
      that the similarities are the only n x n matrix.
    """
    if how not in ("mean", "sum"):
        raise ValueError(f"supervised_contrastive sums or averages over anchors, not {how!r}")
    z, y = floats(embeddings, labels)
    takes = jnp.ones_like(z[:, 0]) if active is None else active.astype(z.dtype)
    z, y, takes = parallel.all_gather((z, y, takes), axis)
    y = y * takes[:, None]
    # z_i . (sum of z_j of the same label, itself excluded): a sum per class, not per pair
    sums = jnp.einsum("nl,nd->ld", y, z, precision="highest")
    own = y.sum(axis=-1)
    count = y @ y.sum(axis=0) - own
    same = jnp.sum(jnp.matmul(y, sums, precision="highest") * z, axis=-1)
    same = (same - own * jnp.sum(z * z, axis=-1)) / temperature
    # recomputed for the gradient, so that no other n x n array is kept beside the similarities
    log_total = jax.checkpoint(_log_total, static_argnums=2)(z, takes, temperature)
    per_anchor = jnp.where(count > 0, log_total - same / jnp.maximum(count, 1), 0)
    anchors = own > 0
    total = jnp.sum(jnp.where(anchors, per_anchor, 0)) * (temperature / (base_temperature or temperature))
    return total if how == "sum" else total / jnp.maximum(jnp.sum(anchors.astype(z.dtype)), 1)


def _log_total(z: Array, takes: Array, temperature: float) -> Array:
    """log of the sum over other active rows of exp(z_i . z_j / temperature): (n), 0 where there is none."""
    similarity = jnp.einsum("nd,md->nm", z, z, precision="highest") / temperature
    counts = (takes > 0)[None, :] & ~jnp.eye(z.shape[0], dtype=bool)
    highest = jax.lax.stop_gradient(jnp.max(jnp.where(counts, similarity, -jnp.inf), axis=-1, keepdims=True))
    highest = jnp.where(jnp.isfinite(highest), highest, 0)
    # the exponent is capped at 0 before the mask: an inactive row must not overflow into a NaN gradient
    inside = jnp.where(counts, similarity - highest, 0)
    total = jnp.sum(jnp.where(counts, jnp.exp(inside), 0), axis=-1)
    return jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1)) + highest[:, 0], 0)
