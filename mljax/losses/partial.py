"""Learning from few known labels: estimated labels, pseudo labels, curricula. Losses and rules of a whole
batch.

Arrays are (b l): `labels` in {0, 1}, 0 where not observed, and `observed` in {0, 1}. The repositories'
-1/0/1 code is `labels = t == 1, observed = t != 0`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mljax import parallel
from mljax.losses.elementwise import asl, bce, entries, floats, positives, reduce, wide

Array = jax.Array


def expected_positives(
    probabilities: Array, expected: float, *, mask: Array | None = None, axis: str | None = None
) -> Array:
    """((mean over b of the sum over l of p - k) / l)^2, k positives expected per image.

    Args:
      probabilities: (b l).
      mask: (b), 0 for padding.
      axis: of pmap: the batch mean is that of all devices, since a mean of squares is not the square of the
        mean.
    Returns:
      ().
    Reference: Cole et al., "Multi-Label Learning from Single Positive Labels", CVPR 2021, normalised as in
      the authors' code.
    """
    mask = jnp.ones_like(probabilities[:, 0]) if mask is None else mask.astype(probabilities.dtype)
    total = parallel.pmean(jnp.sum(probabilities * mask[:, None]), axis)
    count = jnp.maximum(parallel.pmean(jnp.sum(mask), axis), 1e-6)
    return jnp.where(count > 1e-6, ((total / count - expected) / probabilities.shape[-1]) ** 2, 0)


def epr(
    logits: Array,
    labels: Array,
    *,
    expected: float,
    eps: float = 1e-5,
    mask: Array | None = None,
    axis: str | None = None,
) -> Array:
    """Expected positive regularisation: mean of -log p on observed positives, plus `expected_positives`.

    Args:
      logits: (b l).
      labels: (b l), 1 for observed positives.
      expected: positives per image k (2.9 on COCO, 1.5 on VOC 2012).
      mask: (b), 0 for padding.
    Returns:
      ().
    Reference: Cole et al., CVPR 2021; the first term is divided by b*l as in their code.
    """
    x, y = floats(logits, labels)
    weights = entries("positives", y, mask)
    first = reduce(positives(x, y, eps=eps), weights, how="mean", axis=axis)
    return first + expected_positives(jax.nn.sigmoid(x), expected, mask=mask, axis=axis)


def role(
    logits: Array,
    theta: Array,
    labels: Array,
    *,
    expected: float,
    eps: float = 1e-5,
    mask: Array | None = None,
    axis: str | None = None,
) -> Array:
    """Regularised online label estimation: L = (L'(p | q) + L'(q | p)) / 2, q = sigmoid(theta) the estimated
    labels.

    L'(p | q) = mean{ -log p on observed positives + BCE(p, target q without gradient) } + R_k(p)

    Args:
      logits: (b l).
      theta: (b l), the rows of the label table that belong to this batch.
      labels: (b l), 1 for observed positives.
      expected: positives per image k.
      mask: (b), 0 for padding.
    Returns:
      ().
    Reference: Cole et al., CVPR 2021.
    """
    x, y = floats(logits, labels)
    theta = wide(theta)
    weights = entries("positives", y, mask)

    def side(own: Array, other: Array) -> Array:
        target = jax.lax.stop_gradient(jax.nn.sigmoid(other))
        values = positives(own, y, eps=eps) + bce(own, target, eps=eps)
        first = reduce(values, weights, how="mean", axis=axis)
        return first + expected_positives(jax.nn.sigmoid(own), expected, mask=mask, axis=axis)

    return (side(x, theta) + side(theta, x)) / 2


def candidate_weights(
    confidence: Array, candidates: Array, *, alpha: float = 0.6, difficulty_aware: bool = False
) -> Array:
    """Curriculum disambiguation: which candidate labels to train on.

    Args:
      confidence: (N l), probabilities of the weakly augmented training images.
      candidates: (N l) in {0, 1}: the true and the false positives.
      alpha: a candidate counts from this confidence on.
      difficulty_aware: compare with the mean confidence of the class, shifted by the mean of all candidates.
    Returns:
      (N l) in {0, 1}: 1 for non-candidates and for candidates that are confident enough.
    Reference: CDCR (repository xiemk/PML-CDCR), stage 2; the weighted BCE is `bce` with these weights in
      `reduce`.
    """
    p, y = floats(confidence, candidates)
    if difficulty_aware:
        count = jnp.sum(y, axis=0, keepdims=True)
        per_class = jnp.sum(p * y, axis=0, keepdims=True) / jnp.maximum(count, 1)
        overall = jnp.sum(p * y) / jnp.maximum(jnp.sum(y), 1)
        confident = p - per_class >= alpha - overall
    else:
        confident = p >= alpha
    return jnp.where(y > 0, confident.astype(p.dtype), 1)


def pair_index(count: int) -> np.ndarray:
    """All unordered pairs of labels, (2 pairs) int32: i < j, i in the outer loop; count*(count-1)/2 of them."""
    return np.stack(np.triu_indices(count, 1)).astype(np.int32)


def cooccurrence_targets(labels: Array, observed: Array) -> Array:
    """Targets of SST's pair logits, (b pairs) in `pair_index` order: 1 where both labels are known positives."""
    i, j = pair_index(labels.shape[-1])
    positive = (labels * observed).astype(jnp.float32)
    return positive[:, i] * positive[:, j]


def cooccurrence_loss(pair_logits: Array, labels: Array, observed: Array) -> Array:
    """SST's intra-image co-occurrence loss, element-wise; its authors take the mean over pairs and images.

    Args:
      pair_logits: (b pairs), in `pair_index` order.
      labels, observed: (b l).
    Returns:
      (b pairs).
    Reference: Chen et al., "Structured Semantic Transfer for Multi-Label Recognition with Partial Labels",
      AAAI 2022, as in the authors' code: every pair that is not two known positives is a negative.
    """
    targets = cooccurrence_targets(labels, observed)
    return asl(pair_logits, targets, gamma_neg=2.0, gamma_pos=1.0, clip=0.05, detach_focal=False)


def cooccurrence_matrix(pair_logits: Array, count: int) -> Array:
    """How labels go together in each image, as SST's pair logits (b pairs) say it: (b l l), symmetric, ones on the
    diagonal."""
    i, j = pair_index(count)
    probabilities = jax.nn.sigmoid(pair_logits.astype(jnp.float32))
    matrix = jnp.zeros((len(pair_logits), count, count), jnp.float32).at[:, i, j].set(probabilities)
    return matrix + matrix.swapaxes(1, 2) + jnp.eye(count, dtype=jnp.float32)[None]


def cooccurrence_scores(pair_logits: Array, labels: Array, observed: Array) -> Array:
    """Mean over an image's known positives of the probability that a label goes with them; 0 without any.

    Args:
      pair_logits: (b pairs), in `pair_index` order.
      labels, observed: (b l).
    Returns:
      (b l).
    Differs from the paper (Chen et al., AAAI 2022), as its authors' code does: a mean, not a sum.
    """
    matrix = cooccurrence_matrix(pair_logits, labels.shape[-1])
    positive = (labels * observed).astype(jnp.float32)
    total = jnp.einsum("blm,bm->bl", matrix, positive, precision="highest")
    return total / jnp.maximum(positive.sum(axis=-1, keepdims=True), 1)


def memory_scores(features: Array, memory: Array) -> Array:
    """Mean cosine of an image's label feature with stored features of known positives of that label.

    Args:
      features: (b l d).
      memory: (l q d), zeros where nothing is stored yet: they count in the mean with cosine 0.
    Returns:
      (b l).
    Reference: SST's cross-image transfer (Chen et al., AAAI 2022), in the form of the authors' code.
    """
    stored = unit(wide(memory)).mean(axis=1)
    return jnp.einsum("bld,ld->bl", unit(wide(features)), stored, precision="highest")


def pseudo_positives(scores: Array, observed: Array, threshold: Array | float) -> Array:
    """Unobserved labels whose score reaches the threshold: (b l) in {0, 1}, without gradient; never a
    negative.

    Train on them with labels + pseudo and observed + pseudo.
    """
    unknown = observed == 0
    return jax.lax.stop_gradient(((scores >= threshold) & unknown).astype(jnp.float32))


def unit(x: Array, eps: float = 1e-8) -> Array:
    """x / max(|x|, eps) along the last axis, with a finite gradient at 0."""
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, eps * eps))
