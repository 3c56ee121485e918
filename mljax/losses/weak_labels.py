"""Learning from few known labels: estimated labels, pseudo-labels, curricula, all of a whole batch.

`labels` are in {0, 1}, 0 where not observed, and `observed` in {0, 1}. The repositories' -1/0/1 code is
`labels = t == 1, observed = t != 0`. `mask` is 0 for padding, and `axis` is that of pmap or None.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from mljax import parallel
from mljax.losses.elementwise import asl, bce, entries, positives
from mljax.losses.numeric import floats, unit, wide
from mljax.losses.reduction import reduce
from mljax.types import ArrayLike


def expected_positives(
    probabilities: Float[ArrayLike, "b l"],
    expected: float,
    *,
    mask: Num[ArrayLike, "b"] | None = None,
    axis: str | None = None,
) -> Float[Array, ""]:
    """((mean over b of the sum over l of p - k) / l)^2, k positives expected per image.

    The batch mean is that of all devices, since a mean of squares is not the square of the mean.
    Reference: Cole et al., "Multi-Label Learning from Single Positive Labels", CVPR 2021, normalised as in
      the authors' code.
    """
    mask = jnp.ones_like(probabilities[:, 0]) if mask is None else mask.astype(probabilities.dtype)
    total = parallel.pmean(jnp.sum(probabilities * mask[:, None]), axis)
    count = jnp.maximum(parallel.pmean(jnp.sum(mask), axis), 1e-6)
    return jnp.where(count > 1e-6, ((total / count - expected) / probabilities.shape[-1]) ** 2, 0)


def epr(
    logits: Float[ArrayLike, "b l"],
    labels: Num[ArrayLike, "b l"],
    *,
    expected: float,
    eps: float = 1e-5,
    mask: Num[ArrayLike, "b"] | None = None,
    axis: str | None = None,
) -> Float[Array, ""]:
    """Expected positive regularisation: mean of -log p on observed positives, plus `expected_positives`.

    Args:
      labels: 1 for observed positives.
      expected: positives per image k (2.9 on COCO, 1.5 on VOC 2012).
    Reference: Cole et al., CVPR 2021; the first term is divided by b*l as in their code.
    """
    x, y = floats(logits, labels)
    weights = entries("positives", y, mask)
    first = reduce(positives(x, y, eps=eps), weights, how="mean", axis=axis)
    return first + expected_positives(jax.nn.sigmoid(x), expected, mask=mask, axis=axis)


def role(
    logits: Float[ArrayLike, "b l"],
    theta: Float[ArrayLike, "b l"],
    labels: Num[ArrayLike, "b l"],
    *,
    expected: float,
    eps: float = 1e-5,
    mask: Num[ArrayLike, "b"] | None = None,
    axis: str | None = None,
) -> Float[Array, ""]:
    """Regularised online label estimation: L = (L'(p | q) + L'(q | p)) / 2, where q = sigmoid(theta) estimates labels.

    L'(p | q) = mean{ -log p on observed positives + BCE(p, target q without gradient) } + R_k(p)

    Args:
      theta: the rows of the label table that belong to this batch.
      labels: 1 for observed positives.
      expected: positives per image k.
    Reference: Cole et al., CVPR 2021.
    """
    x, y = floats(logits, labels)
    theta = wide(theta)
    weights = entries("positives", y, mask)

    def side(predicted: Array, other: Array) -> Array:
        target = jax.lax.stop_gradient(jax.nn.sigmoid(other))
        values = positives(predicted, y, eps=eps) + bce(predicted, target, eps=eps)
        first = reduce(values, weights, how="mean", axis=axis)
        return first + expected_positives(jax.nn.sigmoid(predicted), expected, mask=mask, axis=axis)

    return (side(x, theta) + side(theta, x)) / 2


def candidate_weights(
    confidence: Float[ArrayLike, "N l"],
    candidates: Num[ArrayLike, "N l"],
    *,
    alpha: float = 0.6,
    difficulty_aware: bool = False,
) -> Float[Array, "N l"]:
    """Curriculum disambiguation: which candidate labels to train on.

    Args:
      confidence: probabilities of the weakly augmented training images.
      candidates: 1 for the true and the false positives.
      alpha: a candidate counts from this confidence on.
      difficulty_aware: compare with the mean confidence of the class, shifted by the mean of all candidates.
    Returns:
      1 for non-candidates and for candidates that are confident enough, else 0.
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


def pair_index(count: int) -> Int[np.ndarray, "2 pairs"]:
    """All unordered pairs of labels: i < j, i in the outer loop; count*(count-1)/2 of them."""
    return np.stack(np.triu_indices(count, 1)).astype(np.int32)


def cooccurrence_targets(labels: Num[ArrayLike, "b l"], observed: Num[ArrayLike, "b l"]) -> Float[Array, "b pairs"]:
    """Targets of SST's pair logits, in `pair_index` order: 1 where both labels are known positives."""
    i, j = pair_index(labels.shape[-1])
    positive = (labels * observed).astype(jnp.float32)
    return positive[:, i] * positive[:, j]


def cooccurrence_loss(
    pair_logits: Float[ArrayLike, "b pairs"], labels: Num[ArrayLike, "b l"], observed: Num[ArrayLike, "b l"]
) -> Float[Array, "b pairs"]:
    """SST's intra-image co-occurrence loss, element-wise; its authors take the mean over pairs and images.

    Pairs are in `pair_index` order.
    Reference: Chen et al., "Structured Semantic Transfer for Multi-Label Recognition with Partial Labels",
      AAAI 2022, as in the authors' code: every pair that is not two known positives is a negative.
    """
    targets = cooccurrence_targets(labels, observed)
    return asl(pair_logits, targets, gamma_neg=2.0, gamma_pos=1.0, clip=0.05, detach_focal=False)


def cooccurrence_matrix(pair_logits: Float[ArrayLike, "b pairs"], count: int) -> Float[Array, "b {count} {count}"]:
    """How labels go together in each image, as SST's pair logits say it: symmetric, ones on the diagonal."""
    i, j = pair_index(count)
    probabilities = jax.nn.sigmoid(pair_logits.astype(jnp.float32))
    matrix = jnp.zeros((len(pair_logits), count, count), jnp.float32).at[:, i, j].set(probabilities)
    return matrix + matrix.swapaxes(1, 2) + jnp.eye(count, dtype=jnp.float32)[None]


def cooccurrence_scores(
    pair_logits: Float[ArrayLike, "b pairs"], labels: Num[ArrayLike, "b l"], observed: Num[ArrayLike, "b l"]
) -> Float[Array, "b l"]:
    """Mean over an image's known positives of the probability that a label goes with them; 0 without any.

    Pairs are in `pair_index` order.
    Differs from the paper (Chen et al., AAAI 2022), as its authors' code does: a mean, not a sum.
    """
    matrix = cooccurrence_matrix(pair_logits, labels.shape[-1])
    positive = (labels * observed).astype(jnp.float32)
    total = jnp.einsum("blm,bm->bl", matrix, positive, precision="highest")
    return total / jnp.maximum(positive.sum(axis=-1, keepdims=True), 1)


def memory_scores(features: Num[ArrayLike, "b l d"], memory: Num[ArrayLike, "l q d"]) -> Float[Array, "b l"]:
    """Mean cosine of an image's label feature with stored features of known positives of that label.

    Args:
      memory: zeros where nothing is stored yet: they count in the mean with cosine 0.
    Reference: SST's cross-image transfer (Chen et al., AAAI 2022), in the form of the authors' code.
    """
    stored = unit(wide(memory)).mean(axis=1)
    return jnp.einsum("bld,ld->bl", unit(wide(features)), stored, precision="highest")


def pseudo_positives(
    scores: Float[ArrayLike, "b l"], observed: Num[ArrayLike, "b l"], threshold: Float[ArrayLike, "..."] | float
) -> Float[Array, "b l"]:
    """1 for unobserved labels whose score reaches the threshold, else 0; without gradient, and never a negative.

    Train on them with labels + pseudo-labels and observed + pseudo-labels.
    """
    unknown = observed == 0
    return jax.lax.stop_gradient(((scores >= threshold) & unknown).astype(jnp.float32))
