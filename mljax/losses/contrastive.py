"""Losses that compare: labels of one image with each other (ranking), or label features across images.

Under pmap the examples of all devices are gathered first, so that every device computes the loss of the
global batch.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mljax import parallel
from mljax.losses.elementwise import floats, wide
from mljax.losses.partial import unit

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
    Differs from the authors' code: masks in place of a gather; the sum over positives is taken by class, and
      that over all others in blocks, so that no n x n matrix is built.
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
    per_anchor = jnp.where(count > 0, log_total(z, takes, temperature) - same / jnp.maximum(count, 1), 0)
    anchors = own > 0
    total = jnp.sum(jnp.where(anchors, per_anchor, 0)) * (temperature / (base_temperature or temperature))
    return total if how == "sum" else total / jnp.maximum(jnp.sum(anchors.astype(z.dtype)), 1)


def label_contrastive(
    embeddings: Array,
    active: Array,
    others: Array | None = None,
    *,
    temperature: float = 0.2,
    how: str = "mean",
) -> Array:
    """MulCon's loss where every label of every image has an embedding: `supervised_contrastive`, label axis kept.

    An anchor is an active entry; its positives are the other active entries of its label, and it is contrasted
    with all other active entries and with `others`.

    Args:
      embeddings: (b l d), unit length, of the whole batch: under pmap gather it first.
      active: (b l) in {0, 1}, the labels that the images have.
      others: (b l) in {0, 1}, entries that are contrasted with and are no anchors (`hard_negatives`), or None.
      temperature: of the softmax.
      how: "mean" over anchors, those without a positive included (the code), or "sum" (the paper).
    Returns:
      (), 0 without anchors.
    Raises:
      ValueError: `how` is neither.
    Reference: Dao et al., "Contrastively Enforcing Distinctiveness for Multi-Label Image Classification", 2023.
    Differs from the authors' code: shapes are static, and no (active active) matrix is ever whole; see `log_total`.
    """
    if how not in ("mean", "sum"):
        raise ValueError(f"label_contrastive sums or averages over anchors, not {how!r}")
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


def hard_negatives(logits: Array, active: Array, allowed: Array, size: int) -> Array:
    """The inactive entries of the highest logits that fill a denominator up to `size` entries, the active counted.

    Args:
      logits, active, allowed: (b l) of the whole batch; an entry is chosen where it is allowed and not active.
    Returns:
      (b l) in {0, 1}; ties are taken in order.
    """
    free = (allowed > 0) & ~(active > 0)
    rank = _rank(-jax.lax.stop_gradient(logits), free)
    return (free & (rank < size - jnp.sum(active > 0))).astype(jnp.float32)


BLOCK = 256  # rows of a block of similarities; 256 x 256 float32 are 256 KiB


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def log_total(z: Array, takes: Array, temperature: float) -> Array:
    """log of the sum over the other taken rows of exp(z_i . z_j / temperature), without the matrix of similarities.

    Taken rows are put first, and only blocks of (BLOCK BLOCK) that hold some are computed, one at a time, with a
    running maximum; once more for the gradient. Time goes with the square of the number of taken rows, memory does not.

    Args:
      z: (n d).
      takes: (n) in {0, 1}, floating.
    Returns:
      (n), 0 where a row is not taken or has no other.
    """
    return _log_total(z, takes, temperature)[0]


def _log_total(z: Array, takes: Array, temperature: float) -> tuple[Array, tuple[Array, Array, Array]]:
    order, count, size, blocks = _blocks(takes)
    least = jnp.finfo(z.dtype).min

    def row(i: Array, totals: Array) -> Array:
        def column(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            highest, total = carry
            similarity, pair = _similarity(z, order, count, (i, j), size, temperature)
            new = jnp.maximum(highest, jnp.max(jnp.where(pair, similarity, least), axis=1))
            terms = jnp.where(pair, jnp.exp(jnp.where(pair, similarity - new[:, None], 0)), 0)
            return new, total * jnp.exp(highest - new) + jnp.sum(terms, axis=1)

        start = jnp.full((size,), least, z.dtype), jnp.zeros((size,), z.dtype)
        highest, total = jax.lax.fori_loop(0, blocks, column, start)
        found = jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1)) + highest, 0)
        return jax.lax.dynamic_update_slice(totals, found, (i * size,))

    totals = jax.lax.fori_loop(0, blocks, row, jnp.zeros(order.shape, z.dtype))
    n = z.shape[0]
    return jnp.zeros((n,), z.dtype).at[order[:n]].set(totals[:n]), (z, takes, totals)


def _log_total_gradient(temperature: float, kept: tuple[Array, Array, Array], given: Array) -> tuple[Array, Array]:
    """d/dz_i = sum over j of (g_i p_ij + g_j p_ji) z_j / temperature, p the softmax of a row."""
    z, takes, totals = kept
    order, count, size, blocks = _blocks(takes)
    given = given[order]

    def row(i: Array, gradient: Array) -> Array:
        def column(j: Array, found: Array) -> Array:
            similarity, pair = _similarity(z, order, count, (i, j), size, temperature)

            def share(total: Array, g: Array) -> Array:
                return jnp.where(pair, jnp.exp(jnp.where(pair, similarity - total, 0)), 0) * g

            own = share(_part(totals, i, size)[:, None], _part(given, i, size)[:, None])
            theirs = share(_part(totals, j, size)[None], _part(given, j, size)[None])
            return found + jnp.matmul(own + theirs, z[_part(order, j, size)], precision="highest")

        found = jax.lax.fori_loop(0, blocks, column, jnp.zeros((size, z.shape[1]), z.dtype)) / temperature
        return gradient.at[_part(order, i, size)].add(found)  # rows beyond the taken ones add zeros

    return jax.lax.fori_loop(0, blocks, row, jnp.zeros_like(z)), jnp.zeros_like(takes)


log_total.defvjp(_log_total, _log_total_gradient)


def _blocks(takes: Array) -> tuple[Array, Array, int, Array]:
    """The rows, taken ones first, in whole blocks; how many are taken; a block's size; how many blocks hold any."""
    n = takes.shape[0]
    size = min(BLOCK, n)
    order = jnp.argsort(takes <= 0, stable=True)
    order = jnp.pad(order, (0, -n % size))  # with a row that is there: it is masked by its place
    count = jnp.sum(takes > 0)
    return order, count, size, (count + size - 1) // size


def _part(x: Array, i: Array, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, i * size, size)


def _similarity(
    z: Array, order: Array, count: Array, at: tuple[Array, Array], size: int, temperature: float
) -> tuple[Array, Array]:
    """(size size) similarities of two blocks, and which of them are pairs of two different taken rows."""
    rows, columns = (z[_part(order, i, size)] for i in at)
    similarity = jnp.matmul(rows, columns.T, precision="highest") / temperature
    i, j = (k * size + jnp.arange(size, dtype=jnp.int32) for k in at)
    pair = (i < count)[:, None] & (j < count)[None] & (i[:, None] != j[None])
    return similarity, pair
