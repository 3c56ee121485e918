"""Element-wise losses, pure and unreduced, and the one home of reduction.

Every loss in `NAMES` is called the same way, `loss(logits, labels, observed=None, **settings) -> (b l)`: logits before
the sigmoid, labels in [0, 1] and, where some labels are unknown, `observed` in {0, 1}. An unobserved entry is 0 in the
result, unless the loss says that it assumes it to be negative. `reduce` makes the scalar; `entries` says which entries
count in it. Losses of a whole batch are in `mljax.losses.partial` (label estimation, pseudo labels) and
`mljax.losses.contrastive` (pairs of labels or of examples).

All is computed in float32 at least, in log space, and is finite, with its gradient, for logits of +-1e4.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mljax import build, parallel
from mljax.errors import UserError, nearest

Array = jax.Array


def bce(logits: Array, labels: Array, observed: Array | None = None, *, eps: float = 0.0) -> Array:
    """Binary cross-entropy: -y log p - (1-y) log(1-p), p = sigmoid(x).

    Args:
      logits, labels, observed: (b l). Labels may be soft.
      eps: added inside the logarithms; 1e-5 in the single-positive papers.
    Returns:
      (b l), 0 where not observed. Its mean over known entries is the loss of SST and, with soft labels, of
      SARB; its sum over the entries that a system was not told (`observed` = 1 - known) that of C-Tran.
    """
    x, y = floats(logits, labels)
    return _known(y * _nll(x, eps) + (1 - y) * _nll(-x, eps), observed)


def bce_ls(
    logits: Array, labels: Array, observed: Array | None = None, *, smoothing: float = 0.1, eps: float = 0.0
) -> Array:
    """Binary cross-entropy with labels smoothed: 1 becomes 1-smoothing, 0 becomes smoothing (not half of it).

    Args:
      logits, labels, observed: (b l).
    Reference: Cole et al., "Multi-Label Learning from Single Positive Labels", CVPR 2021; their eps is 1e-5.
    """
    _, y = floats(logits, labels)
    return bce(logits, y * (1 - smoothing) + (1 - y) * smoothing, observed, eps=eps)


def asl(
    logits: Array,
    labels: Array,
    observed: Array | None = None,
    *,
    gamma_neg: float = 4.0,
    gamma_pos: float = 1.0,
    clip: float = 0.05,
    eps: float = 1e-8,
    detach_focal: bool = True,
) -> Array:
    """Asymmetric loss.

    L = -y (1-p)^gamma_pos log p - (1-y) p_m^gamma_neg log(1-p_m),   p_m = max(p - clip, 0)

    Args:
      logits, labels, observed: (b l).
      gamma_neg, gamma_pos: how strongly easy negatives and positives are played down.
      clip: probability shift of the negatives; a negative with p <= clip has no loss and no gradient.
      eps: lower bound of what logarithms are taken of; beyond it the gradient of the logarithm is 0.
      detach_focal: no gradient through the focal weights, as in the authors' training script.
    Returns:
      (b l). The paper sums over l and averages over b; the authors' code sums over both.
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
    log_not = _log_not(p, not_p, clip) if clip else jax.nn.log_sigmoid(-x)
    weight_pos, weight_neg = _power(not_p, gamma_pos), _power(shifted, gamma_neg)
    if detach_focal:
        weight_pos, weight_neg = jax.lax.stop_gradient((weight_pos, weight_neg))
    positive = weight_pos * _at_least(jax.nn.log_sigmoid(x), eps)
    negative = weight_neg * _at_least(log_not, eps)
    return _known(-y * positive - (1 - y) * negative, observed)


def focal(
    logits: Array,
    labels: Array,
    observed: Array | None = None,
    *,
    gamma: float = 2.0,
    alpha: float | None = None,
    detach_focal: bool = False,
) -> Array:
    """Focal loss: -a_t (1-p_t)^gamma log p_t, p_t = p for positives and 1-p for negatives.

    Args:
      logits, labels, observed: (b l).
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
    logits: Array,
    labels: Array,
    observed: Array | None = None,
    *,
    alpha: float = -4.45,
    beta: float = 5.45,
    gamma: float = 1.0,
) -> Array:
    """Partial BCE: g(r)/l * BCE on known entries, g(r) = alpha r^gamma + beta, r the share known of an image.

    Args:
      logits, labels, observed: (b l).
      alpha, beta, gamma: the defaults give g(.1) = 5 and g(1) = 1; (1, 0, -1) gives the mean over known labels.
    Returns:
      (b l), with the division by l already done: reduce it with how="batch_mean".
    Reference: Durand, Mehrasa and Mori, "Learning a Deep ConvNet for Multi-label Classification with Partial
      Labels", CVPR 2019; alpha and beta are those of third-party code, since theirs is not public.
    """
    x, _ = floats(logits, labels)
    known = jnp.ones_like(x) if observed is None else observed.astype(x.dtype)
    # an image without known labels has no term: any share keeps r^-1 finite there
    share = jnp.maximum(known.mean(axis=-1, keepdims=True), 1 / x.shape[-1])
    return bce(logits, labels, observed) * (alpha * share**gamma + beta) / x.shape[-1]


def an(logits: Array, labels: Array, observed: Array | None = None, *, eps: float = 1e-5) -> Array:
    """Assume negative: BCE where every label that is not observed counts as 0.

    Args:
      logits, labels, observed: (b l).
    Returns:
      (b l), no entry left out; the paper takes the mean over all.
    Reference: Cole et al., CVPR 2021.
    """
    return bce(logits, _assumed(logits, labels, observed), eps=eps)


def an_ls(
    logits: Array, labels: Array, observed: Array | None = None, *, smoothing: float = 0.1, eps: float = 1e-5
) -> Array:
    """Assume negative with label smoothing: `an` and `bce_ls` together. Arrays (b l).

    Reference: Cole et al., CVPR 2021, in the form of the authors' code: the other side weighs smoothing, not half.
    """
    return bce_ls(logits, _assumed(logits, labels, observed), smoothing=smoothing, eps=eps)


def wan(
    logits: Array,
    labels: Array,
    observed: Array | None = None,
    *,
    negative_weight: float | None = None,
    eps: float = 1e-5,
) -> Array:
    """Weak assume negative: `an` with assumed negatives weighed by `negative_weight`, 1/(l-1) if None.

    Args:
      logits, labels, observed: (b l).
    Reference: Cole et al., CVPR 2021.
    """
    y = _assumed(logits, labels, observed)
    weight = 1 / max(y.shape[-1] - 1, 1) if negative_weight is None else negative_weight
    return bce(logits, y, eps=eps) * (y + (1 - y) * weight)


def iu(logits: Array, labels: Array, observed: Array | None = None, *, eps: float = 1e-5) -> Array:
    """Ignore unobserved: BCE on known entries, averaged over all entries. Arrays (b l).

    With true negatives marked as observed (an oracle) it is the paper's IUN.
    Reference: Cole et al., CVPR 2021.
    """
    return bce(logits, labels, observed, eps=eps)


def positives(logits: Array, labels: Array, observed: Array | None = None, *, eps: float = 1e-5) -> Array:
    """-log(p + eps) on observed positives, 0 elsewhere: the first term of EPR and ROLE. Arrays (b l)."""
    x, _ = floats(logits, labels)
    return _assumed(logits, labels, observed) * _nll(x, eps)


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
COUNT_UNOBSERVED = frozenset({"an", "an_ls", "wan", "iu", "positives"})


def make(section: Mapping[str, Any]) -> Callable[..., Array]:
    """The loss of a config section, its settings filled in: `loss(logits, labels, observed=None) -> (b l)`.

    Raises:
      UserError: no such loss, or a key that is not a setting of it; the nearest name is in the sentence.
    """
    loss, settings = build.checked("losses", section, given=("logits", "labels", "observed"))
    return functools.partial(loss, **settings)


def entries(name: str, observed: Array, mask: Array | None = None) -> Array:
    """The weights that `reduce` wants for a loss: which entries of a batch count.

    Args:
      name: of the loss: some count entries that are not observed (`COUNT_UNOBSERVED`).
      observed: (b l) in {0, 1}.
      mask: (b), 0 for padding.
    Returns:
      (b l).
    """
    weights = jnp.ones_like(observed) if name in COUNT_UNOBSERVED else observed
    return weights if mask is None else weights * mask[:, None].astype(weights.dtype)


def reduce(values: Array, weights: Array, *, how: str, mask: Array | None = None, axis: str | None = None) -> Array:
    """One number from a loss per entry, such that its mean over devices is the loss of the global batch.

    Args:
      values: (b l).
      weights: (b l), observed * mask (see `entries`); an entry of weight 0 is left out whatever its value.
      how: "mean" over the known entries of the batch; "batch_mean": sum over l, mean over images; "sum".
      mask: (b), the images that "batch_mean" counts; without it, those with an entry of positive weight.
      axis: of pmap, or None under jit. Counts are those of all devices.
    Returns:
      (), 0 with gradient 0 where nothing counts.
    Raises:
      UserError: `how` is none of the three.
    """
    values, weights = floats(values, weights)
    total = jnp.sum(jnp.where(weights > 0, values, 0) * weights)
    if how == "sum":
        return total * parallel.psum(1.0, axis)
    if how == "mean":
        count = jnp.sum(weights)
    elif how == "batch_mean":
        images = jnp.any(weights > 0, axis=-1) if mask is None else mask
        count = jnp.sum(images.astype(values.dtype))
    else:
        raise UserError(f"A loss is reduced by {how!r}{nearest(how, ('mean', 'batch_mean', 'sum'))}; use one of these.")
    count = parallel.pmean(count, axis)
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1), 0)


def asl_single_label(
    logits: Array,
    classes: Array,
    *,
    gamma_neg: float = 4.0,
    gamma_pos: float = 0.0,
    smoothing: float = 0.1,
) -> Array:
    """Asymmetric loss for one label per image, on the softmax.

    Args:
      logits: (b l).
      classes: (b) int, the label of each image.
      smoothing: label smoothing: 1 - smoothing on the label, smoothing/l added to all.
    Returns:
      (b): the authors take the mean.
    Reference: Ridnik et al., ICCV 2021, in the form of the authors' code: focal weights on log-probabilities.
    """
    x, y = floats(logits, jax.nn.one_hot(classes, logits.shape[-1]))
    log_p = jax.nn.log_softmax(x)
    p = jnp.exp(log_p)
    weights = y * _power(1 - p, gamma_pos) + (1 - y) * _power(p, gamma_neg)
    return -jnp.sum((y * (1 - smoothing) + smoothing / x.shape[-1]) * weights * log_p, axis=-1)


def wide(x: Array) -> Array:
    """float64 as it is, all else as float32: half precision saturates the logarithms."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def floats(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Both in one dtype, float32 at least."""
    x = wide(logits)
    return x, labels.astype(x.dtype)


def _known(values: Array, observed: Array | None) -> Array:
    return values if observed is None else values * observed.astype(values.dtype)


def _assumed(logits: Array, labels: Array, observed: Array | None) -> Array:
    """Labels where every unobserved one is 0."""
    _, y = floats(logits, labels)
    return _known(y, observed)


def _nll(x: Array, eps: float) -> Array:
    """-log(sigmoid(x) + eps)."""
    return -jnp.log(jax.nn.sigmoid(x) + eps) if eps else -jax.nn.log_sigmoid(x)


def _log_not(p: Array, not_p: Array, clip: float) -> Array:
    """log min(1 - p + clip, 1), from the side on which it is exact; both sides have a finite gradient."""
    low = p < 0.5
    near_one = jnp.log1p(-jax.nn.relu(jnp.where(low, p, 0) - clip))
    return jnp.where(low, near_one, jnp.log(jnp.minimum(jnp.where(low, 1, not_p) + clip, 1)))


def _at_least(log_p: Array, eps: float) -> Array:
    """log(max(p, eps)) from log p, with gradient 0 below eps."""
    return jnp.where(log_p > math.log(eps), log_p, math.log(eps)) if eps else log_p


def _power(base: Array, exponent: float) -> Array:
    """base**exponent for a base in [0, 1], with 0**0 = 1 and a finite gradient at 0."""
    if exponent == 0:
        return jnp.ones_like(base)
    inside = base > 0
    return jnp.where(inside, jnp.where(inside, base, 1) ** exponent, 0)
