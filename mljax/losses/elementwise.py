"""Element-wise losses, pure and unreduced.

Every loss in `NAMES` is called the same way, `loss(logits, labels, observed=None, **settings)`: logits before the
sigmoid, labels in [0, 1] and, where some labels are unknown, `observed` in {0, 1}; all are (b l), and so is the result.
An unobserved entry is 0 in it, unless the loss says that it assumes it to be negative. `entries` says which entries
count in the mean, and `mljax.losses.reduction.reduce` takes it. Losses of a whole batch are in
`mljax.losses.weak_labels` (estimated labels, pseudo-labels) and `mljax.losses.contrastive` (pairs of labels or of
images).

All is computed in float32 at least, in log space, and is finite, with its gradient, for logits of +-1e4.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from mljax import build
from mljax.errors import UserError
from mljax.losses.numeric import at_least, floats, log_complement, negative_log_sigmoid, safe_power
from mljax.types import ArrayLike


def bce(
    logits: Float[ArrayLike, "b l"],
    labels: Num[ArrayLike, "b l"],
    observed: Num[ArrayLike, "b l"] | None = None,
    *,
    eps: float = 0.0,
) -> Float[Array, "b l"]:
    """Binary cross-entropy: -y log p - (1-y) log(1-p), p = sigmoid(x).

    Args:
      labels: may be soft.
      eps: added inside the logarithms; 1e-5 in the single-positive papers.
    Returns:
      0 where not observed. The mean over known entries is the loss of SST and, with soft labels, of SARB; the sum over
      the entries that the network does not get as input (`observed` = 1 - known) is that of C-Tran.
    """
    x, y = floats(logits, labels)
    return _known(y * negative_log_sigmoid(x, eps) + (1 - y) * negative_log_sigmoid(-x, eps), observed)


def bce_ls(
    logits: Float[ArrayLike, "b l"],
    labels: Num[ArrayLike, "b l"],
    observed: Num[ArrayLike, "b l"] | None = None,
    *,
    smoothing: float = 0.1,
    eps: float = 0.0,
) -> Float[Array, "b l"]:
    """Binary cross-entropy with labels smoothed: 1 becomes 1-smoothing, 0 becomes smoothing (not half of it).

    Reference: Cole et al., "Multi-Label Learning from Single Positive Labels", CVPR 2021; their eps is 1e-5.
    """
    _, y = floats(logits, labels)
    return bce(logits, y * (1 - smoothing) + (1 - y) * smoothing, observed, eps=eps)


def asl(
    logits: Float[ArrayLike, "b l"],
    labels: Num[ArrayLike, "b l"],
    observed: Num[ArrayLike, "b l"] | None = None,
    *,
    gamma_neg: float = 4.0,
    gamma_pos: float = 1.0,
    clip: float = 0.05,
    eps: float = 1e-8,
    detach_focal: bool = True,
) -> Float[Array, "b l"]:
    """Asymmetric loss.

    L = -y (1-p)^gamma_pos log p - (1-y) p_m^gamma_neg log(1-p_m),   p_m = max(p - clip, 0)

    Args:
      gamma_neg, gamma_pos: how strongly easy negatives and positives are played down.
      clip: probability shift of the negatives; a negative with p <= clip has no loss and no gradient.
      eps: lower bound of what logarithms are taken of; beyond it the gradient of the logarithm is 0.
      detach_focal: no gradient through the focal weights, as in the authors' training script.
    Returns:
      The paper sums over l and averages over b; the authors' code sums over both.
    Raises:
      UserError: clip is not in [0, 1).
    Reference: Ridnik et al., "Asymmetric Loss For Multi-Label Classification", ICCV 2021, eq. 7. Its authors
      train with gamma_pos=0. Query2Label's "simplified" form is gamma_neg=2, gamma_pos=0, clip=0, eps=1e-5,
      mean * 1000.
    Differs from the authors' code: in log space, same values and gradients to 1e-5; soft labels weigh the
      two terms as written above, where the code would mix the exponents.
    """
    if not 0 <= clip < 1:
        raise UserError(f"The loss 'asl' has clip={clip}; it is a probability: use a value from 0 to below 1.")
    x, y = floats(logits, labels)
    p, not_p = jax.nn.sigmoid(x), jax.nn.sigmoid(-x)
    shifted = jax.nn.relu(p - clip) if clip else p
    log_not = log_complement(p, not_p, clip) if clip else jax.nn.log_sigmoid(-x)
    weight_pos, weight_neg = safe_power(not_p, gamma_pos), safe_power(shifted, gamma_neg)
    if detach_focal:
        weight_pos, weight_neg = jax.lax.stop_gradient((weight_pos, weight_neg))
    positive = weight_pos * at_least(jax.nn.log_sigmoid(x), eps)
    negative = weight_neg * at_least(log_not, eps)
    return _known(-y * positive - (1 - y) * negative, observed)


def focal(
    logits: Float[ArrayLike, "b l"],
    labels: Num[ArrayLike, "b l"],
    observed: Num[ArrayLike, "b l"] | None = None,
    *,
    gamma: float = 2.0,
    alpha: float | None = None,
    detach_focal: bool = False,
) -> Float[Array, "b l"]:
    """Focal loss: -a_t (1-p_t)^gamma log p_t, p_t = p for positives and 1-p for negatives.

    Args:
      alpha: weight of positives, 1-alpha that of negatives; None weighs both 1.
    Reference: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, eq. 4 and 5.
    """
    settings = {"gamma_neg": gamma, "gamma_pos": gamma, "clip": 0.0, "eps": 0.0, "detach_focal": detach_focal}
    values = asl(logits, labels, observed, **settings)
    if alpha is None:
        return values
    _, y = floats(logits, labels)
    return values * (alpha * y + (1 - alpha) * (1 - y))


def partial_bce(
    logits: Float[ArrayLike, "b l"],
    labels: Num[ArrayLike, "b l"],
    observed: Num[ArrayLike, "b l"] | None = None,
    *,
    alpha: float = -4.45,
    beta: float = 5.45,
    gamma: float = 1.0,
) -> Float[Array, "b l"]:
    """Partial BCE: g(r)/l * BCE on known entries, g(r) = alpha r^gamma + beta, r the share known of an image.

    Args:
      alpha, beta, gamma: the defaults give g(.1) = 5 and g(1) = 1; (1, 0, -1) gives the mean over known labels.
    Returns:
      The division by l is already done: reduce it with how="batch_mean".
    Reference: Durand, Mehrasa and Mori, "Learning a Deep ConvNet for Multi-label Classification with Partial
      Labels", CVPR 2019; alpha and beta are those of third-party code, since theirs is not public.
    """
    x, _ = floats(logits, labels)
    known = jnp.ones_like(x) if observed is None else observed.astype(x.dtype)
    # an image without known labels has no term: any share keeps r^-1 finite there
    share = jnp.maximum(known.mean(axis=-1, keepdims=True), 1 / x.shape[-1])
    return bce(logits, labels, observed) * (alpha * share**gamma + beta) / x.shape[-1]


def an(
    logits: Float[ArrayLike, "b l"],
    labels: Num[ArrayLike, "b l"],
    observed: Num[ArrayLike, "b l"] | None = None,
    *,
    eps: float = 1e-5,
) -> Float[Array, "b l"]:
    """Assume negative: BCE where every label that is not observed counts as 0.

    No entry is left out; the paper takes the mean over all.
    Reference: Cole et al., CVPR 2021.
    """
    return bce(logits, _assumed(logits, labels, observed), eps=eps)


def an_ls(
    logits: Float[ArrayLike, "b l"],
    labels: Num[ArrayLike, "b l"],
    observed: Num[ArrayLike, "b l"] | None = None,
    *,
    smoothing: float = 0.1,
    eps: float = 1e-5,
) -> Float[Array, "b l"]:
    """Assume negative with label smoothing: `an` and `bce_ls` together.

    Reference: Cole et al., CVPR 2021, in the form of the authors' code: the other side weighs smoothing, not half.
    """
    return bce_ls(logits, _assumed(logits, labels, observed), smoothing=smoothing, eps=eps)


def wan(
    logits: Float[ArrayLike, "b l"],
    labels: Num[ArrayLike, "b l"],
    observed: Num[ArrayLike, "b l"] | None = None,
    *,
    negative_weight: float | None = None,
    eps: float = 1e-5,
) -> Float[Array, "b l"]:
    """Weak assume negative: `an` with assumed negatives weighed by `negative_weight`, 1/(l-1) if None.

    Reference: Cole et al., CVPR 2021.
    """
    y = _assumed(logits, labels, observed)
    weight = 1 / max(y.shape[-1] - 1, 1) if negative_weight is None else negative_weight
    return bce(logits, y, eps=eps) * (y + (1 - y) * weight)


def iu(
    logits: Float[ArrayLike, "b l"],
    labels: Num[ArrayLike, "b l"],
    observed: Num[ArrayLike, "b l"] | None = None,
    *,
    eps: float = 1e-5,
) -> Float[Array, "b l"]:
    """Ignore unobserved: BCE on known entries, averaged over all entries.

    With true negatives marked as observed (an oracle) it is the paper's IUN.
    Reference: Cole et al., CVPR 2021.
    """
    return bce(logits, labels, observed, eps=eps)


def positives(
    logits: Float[ArrayLike, "b l"],
    labels: Num[ArrayLike, "b l"],
    observed: Num[ArrayLike, "b l"] | None = None,
    *,
    eps: float = 1e-5,
) -> Float[Array, "b l"]:
    """-log(p + eps) on observed positives, 0 elsewhere: the first term of EPR and ROLE."""
    x, _ = floats(logits, labels)
    return _assumed(logits, labels, observed) * negative_log_sigmoid(x, eps)


# how every system can name its classification loss in a config: {"name": "asl", "gamma_neg": 4}
NAMES: dict[str, Callable[..., Array]] = {
    "bce": bce,
    "soft_margin": bce,  # the multi-label soft margin loss of the ML-GCN family is the mean of BCE
    "bce_ls": bce_ls,
    "asl": asl,
    "focal": focal,
    "partial_bce": partial_bce,
    "an": an,
    "an_ls": an_ls,
    "wan": wan,
    "iu": iu,
    "positives": positives,
}

# their mean is over all entries, unobserved ones included
MEAN_OVER_ALL = frozenset({"an", "an_ls", "wan", "iu", "positives"})


def make(section: Mapping[str, Any]) -> Callable[..., Array]:
    """The loss of a config section, its settings filled in: `loss(logits, labels, observed=None) -> (b l)`.

    Raises:
      UserError: no such loss, or a key that is not a setting of it; the nearest name is in the sentence.
    """
    loss, settings = build.checked("losses", section, given=("logits", "labels", "observed"))
    return functools.partial(loss, **settings)


def entries(
    name: str, observed: Num[ArrayLike, "b l"], mask: Num[ArrayLike, "b"] | None = None
) -> Num[ArrayLike, "b l"]:
    """The weights that `reduce` wants for a loss: which entries of a batch count, 0 or 1.

    Args:
      name: of the loss: some count entries that are not observed (`MEAN_OVER_ALL`).
      mask: 0 for padding.
    """
    weights = jnp.ones_like(observed) if name in MEAN_OVER_ALL else observed
    return weights if mask is None else weights * mask[:, None].astype(weights.dtype)


def asl_single_label(
    logits: Float[ArrayLike, "b l"],
    classes: Int[ArrayLike, "b"],
    *,
    gamma_neg: float = 4.0,
    gamma_pos: float = 0.0,
    smoothing: float = 0.1,
) -> Float[Array, "b"]:
    """Asymmetric loss for one label per image, on the softmax; the authors take its mean.

    Args:
      classes: the label of each image.
      smoothing: label smoothing: 1 - smoothing on the label, smoothing/l added to all.
    Reference: Ridnik et al., ICCV 2021, in the form of the authors' code: focal weights on log-probabilities.
    """
    x, y = floats(logits, jax.nn.one_hot(classes, logits.shape[-1]))
    log_p = jax.nn.log_softmax(x)
    p = jnp.exp(log_p)
    weights = y * safe_power(1 - p, gamma_pos) + (1 - y) * safe_power(p, gamma_neg)
    return -jnp.sum((y * (1 - smoothing) + smoothing / x.shape[-1]) * weights * log_p, axis=-1)


def _known(values: Array, observed: Array | None) -> Array:
    return values if observed is None else values * observed.astype(values.dtype)


def _assumed(logits: Array, labels: Array, observed: Array | None) -> Array:
    """Labels where every unobserved one is 0."""
    _, y = floats(logits, labels)
    return _known(y, observed)
