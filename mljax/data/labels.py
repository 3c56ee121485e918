"""What is known of labels apart from images: when two names are one label, and how labels go together.

Vectors for their names are in word_vectors.py.
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, Integer, Num


def key(name: str) -> str:
    """A name without case, spaces, hyphens and underscores: what "TV monitor" and "tvmonitor" share."""
    return "".join(c for c in name.casefold() if c not in "_-" and not c.isspace())


def spelled_twice(names: Iterable[str]) -> tuple[str, str] | None:
    """The first two different names that are the same but for case, spaces, hyphens and underscores, or None."""
    seen: dict[str, str] = {}
    for name in sorted(set(names)):
        other = seen.setdefault(key(name), name)
        if other != name:
            return other, name
    return None


def cosine(vectors: Num[np.ndarray, "l e"]) -> Float[np.ndarray, "l l"]:
    """float32 cosine similarity; the diagonal is exactly 1, a zero vector is similar to nothing."""
    vectors = np.asarray(vectors, np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, 1.0)
    return similarity.astype(np.float32)


def mlgcn_correlation(
    similarity: Float[np.ndarray, "l l"], threshold: float, p: float = 0.2
) -> Float[np.ndarray, "l l"]:
    """Binarised and re-weighted similarity; rows sum to 1.

    A_ij = 1[sim_ij >= threshold];  S_ij = p A_ij / sum_{k != i} A_ik for i != j,  S_ii = 1 - p.

    A label without neighbours keeps everything: S_ii = 1.

    Args:
      similarity: cosines or P(j | i) at [i, j]; the diagonal does not matter.
      threshold: tau; CMSG takes cosines at about 0.2 to 0.4.
      p: share that goes to the neighbours, in [0, 1].
    Reference: Chen et al., "Multi-Label Image Recognition with Graph Convolutional Networks", CVPR 2019, eq.
    7 and 8.
    Differs from the authors' code: theirs divides by column sums and adds the identity: see
    `mlgcn_adjacency`.
    """
    edges = _edges(similarity, threshold)
    degree = edges.sum(1, keepdims=True)
    weights = np.divide(p * edges, degree, out=np.zeros_like(edges), where=degree > 0)
    np.fill_diagonal(weights, np.where(degree[:, 0] > 0, 1.0 - p, 1.0))
    return weights.astype(np.float32)


def gatn_correlation(
    similarity: Float[np.ndarray, "l l"],
    low: float,
    high: float = 1.0,
    *,
    weight: float = 0.25,
    epsilon: float = 1e-6,
) -> Float[np.ndarray, "l l"]:
    """Band of similarity, binarised and divided by column sums; no self-loops.

    A_ij = 1[low <= sim_ij < high], A_ii = 0;  S_ij = weight A_ij / (sum_k A_kj + epsilon).

    Args:
      similarity: cosines.
      low, high: the band; the authors' are 0.2 (COCO) or 0.4 (VOC) to 1.0.
      weight: what a column sums to.
    Reference: Yuan et al., "Graph Attention Transformer Network for Multi-Label Image Classification", TOMM
    2023.
    Differs from the authors' code: the diagonal is removed as such, not by cosines being >= 1.0, which
    rounding breaks; and so two labels with one and the same vector (cosine 1) are still cut where high is
    1.0.
    """
    edges = _edges(similarity, low) * (np.asarray(similarity) < high)
    return (weight * edges / (edges.sum(0, keepdims=True) + epsilon)).astype(np.float32)


def cooccurrence(
    labels: Num[np.ndarray, "N l"], observed: Num[np.ndarray, "N l"]
) -> tuple[Integer[np.ndarray, "l l"], Integer[np.ndarray, " l"]]:
    """How often two labels are positive in one image.

    Args:
      labels: in {0, 1}.
      observed: in {0, 1}; what is not observed counts nowhere.
    Returns:
      counts, symmetric, the diagonal zero; nums, images per class; int64.
    """
    positive = (np.asarray(labels) > 0) & (np.asarray(observed) > 0)
    counts = _products(positive, positive)
    nums = np.diag(counts).copy()
    np.fill_diagonal(counts, 0)
    return counts, nums


def conditional(labels: Num[np.ndarray, "N l"], observed: Num[np.ndarray, "N l"]) -> Float[np.ndarray, "l l"]:
    """P(j | i) at [i, j], among the images where both labels are observed.

    Args:
      labels, observed: in {0, 1}.
    Returns:
      float32; 0 where i is never positive with j observed; the diagonal is 1 for classes with a
      positive.
    """
    known = np.asarray(observed) > 0
    positive = (np.asarray(labels) > 0) & known
    both, given = _products(positive, positive), _products(positive, known)
    return np.divide(both, given, out=np.zeros(both.shape), where=given > 0).astype(np.float32)


def mlgcn_adjacency(
    counts: Num[np.ndarray, "l l"],
    nums: Num[np.ndarray, " l"],
    threshold: float = 0.4,
    p: float = 0.2,
    *,
    epsilon: float = 1e-6,
) -> Float[np.ndarray, "l l"]:
    """ML-GCN's label graph, before normalisation.

    P_ij = counts_ij / nums_i;  B_ij = 1[P_ij >= threshold];  A = p/(1-p) B_ij / (sum_k B_kj + epsilon) + I.

    Args:
      counts: co-occurrences; the diagonal does not matter.
      nums: images per class; a class without images has no edges of its own.
      threshold: of the conditional probability.
      p: the paper's weight of the neighbours; 0.2 makes the factor 0.25.
    Reference: Chen et al., CVPR 2019, eq. 6 to 8; column sums and the added identity as in the authors' code.
    """
    nums = np.asarray(nums, np.float64)[:, None]
    probability = np.divide(counts, nums, out=np.zeros(np.shape(counts)), where=nums > 0)
    edges = _edges(probability, threshold)
    adjacency = p / (1 - p) * edges / (edges.sum(0, keepdims=True) + epsilon) + np.eye(len(edges))
    return adjacency.astype(np.float32)


def normalise_adjacency(adjacency: Num[np.ndarray, "l l"]) -> Float[np.ndarray, "l l"]:
    """float32 D A^T D with D = diag(row sums)^(-1/2); the transposition is in ML-GCN's code.

    Differs from the authors' code: a row whose sum is not positive gets zero, not NaN.
    """
    adjacency = np.asarray(adjacency, np.float64)
    rows = adjacency.sum(1)
    scale = np.where(rows > 0, 1 / np.sqrt(np.where(rows > 0, rows, 1.0)), 0.0)
    return (scale[:, None] * adjacency.T * scale[None, :]).astype(np.float32)


def _edges(similarity: np.ndarray, threshold: float) -> np.ndarray:
    edges = (np.asarray(similarity) >= threshold).astype(np.float64)
    np.fill_diagonal(edges, 0.0)
    return edges


def _products(left: np.ndarray, right: np.ndarray, rows: int = 16384) -> np.ndarray:
    """left^T right of boolean (N l) arrays as int64; exact: a block's sums are below 2^24."""
    total = np.zeros((left.shape[1], right.shape[1]), np.int64)
    for start in range(0, len(left), rows):
        block = slice(start, start + rows)
        total += (left[block].astype(np.float32).T @ right[block].astype(np.float32)).astype(np.int64)
    return total
