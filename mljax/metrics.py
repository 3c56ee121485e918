"""Multi-label metrics in numpy and float64: average precision in four definitions, CP CR CF1 OP OR OF1, top-k.

`scores` grow with confidence (logits, or probabilities with a threshold to match), `labels` are in {0, 1}, and `scored`
is 0 for entries that a protocol leaves out (VOC's difficult objects, labels that the system gets as input, labels that
nobody annotated). Functions return fractions; only `evaluate` returns percent.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64, Real, Shaped

from mljax.errors import UserError, one_of

DEFINITIONS = ("raw", "env", "sklearn", "11point")


def average_precision(
    scores: Real[np.ndarray, "N l"],
    labels: Shaped[np.ndarray, "N l"],
    *,
    definition: str = "raw",
    scored: Shaped[np.ndarray, "N l"] | None = None,
    absent: float = math.nan,
) -> Float64[np.ndarray, "l"]:
    """Average precision per class.

    Args:
      definition:
        "raw": the mean, over positives, of the precision at their rank (ML-GCN, ASL, MulCon and most others);
        "env": the area under the precision that is made non-increasing from the right (VOC 2010; SSGRL,
        Query2Label); "sklearn": as raw, with equal scores merged into one threshold (scikit-learn; C-Tran,
        single-positive papers); "11point": the mean of that envelope at recalls 0, .1, .. 1 (VOC 2007).
      absent: the value for a class without a positive (0 in the single-positive papers and MCAR).
    Ties: "raw", "env" and "11point" rank equal scores by index, first image first (a stable descending
      sort); "sklearn" does not depend on the order. The authors' sorts are not stable, so with ties their
      values vary by run.
    Raises:
      UserError: shapes differ, a score is NaN, or the definition is unknown.
    """
    one_of("The definition of average precision", definition, DEFINITIONS)
    scores, labels, scored = _checked(scores, labels, scored)
    columns = np.ascontiguousarray(scores.T)
    truths = np.ascontiguousarray(labels.T)
    kept = None if scored is None else np.ascontiguousarray(scored.T)
    result = np.full(len(columns), absent, np.float64)
    for c, (column, truth) in enumerate(zip(columns, truths, strict=True)):
        if kept is not None:
            column, truth = column[kept[c]], truth[kept[c]]
        if truth.any():
            result[c] = _one_class(column, truth, definition)
    return result


def _one_class(scores: np.ndarray, truth: np.ndarray, definition: str) -> float:
    """Average precision of one class with a positive: scores (N), truth (N) bool."""
    descending = -scores
    order = np.argsort(descending, kind="stable")
    ranks = np.flatnonzero(truth[order])
    total = len(ranks)
    hits = np.arange(1, total + 1, dtype=np.float64)
    if definition == "sklearn":
        # a positive counts with the precision at the end of its group of equal scores
        ranked = descending[order]
        ends = np.searchsorted(ranked, ranked[ranks], side="right")
        return float(np.mean(np.searchsorted(ranks, ends) / ends))
    precision = hits / (ranks + 1)
    if definition == "raw":
        return float(precision.mean())
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    if definition == "env":
        return float(envelope.mean())
    # the first positive at which recall reaches k/10, in integers: .3 is not 3 * .1
    first = [max(-(-k * total // 10), 1) - 1 for k in range(11)]
    return float(envelope[first].mean())


def precision_recall_f1(
    scores: Real[np.ndarray, "N l"],
    labels: Shaped[np.ndarray, "N l"],
    *,
    threshold: float = 0.0,
    topk: int | None = None,
    strict: bool = False,
    scored: Shaped[np.ndarray, "N l"] | None = None,
    undefined_precision: str = "zero",
    undefined_recall: str = "skip",
    pad_predicted: bool = False,
    per_class_f1: bool = False,
) -> dict[str, float]:
    """Per-class and overall precision, recall and F1 at a threshold.

    Args:
      scored: an entry that is not scored is neither predicted nor true.
      threshold: on the scale of the scores: 0 for logits means a probability of one half.
      topk: predict only the k labels of highest score of each image (equal scores: the first), and these only if they
        pass the threshold: an image may have fewer than k. The choice is made among all labels, scored or not.
      strict: predict above the threshold only, not at it.
      undefined_precision: "zero" or "skip": a class never predicted counts as 0 in CP, or is left out of its mean.
      undefined_recall: "zero" or "skip": the same for a class without a positive in CR.
      pad_predicted: a class never predicted adds one to the predictions that OP counts (the ML-GCN family's code, which
        replaces 0 by 1 before the sum).
      per_class_f1: CF1 is the mean of the F1 of the classes (ASL, ML-Decoder), not the harmonic mean of CP and CR. A
        class whose F1 is 0/0 counts as 0, or is left out if its recall is.
    Returns:
      CP, CR, CF1, OP, OR, OF1 in [0, 1]; 0 where nothing is left to average.
    Raises:
      UserError: shapes differ, or a score is NaN.
    """
    scores, labels, scored = _checked(scores, labels, scored)
    predicted = scores > threshold if strict else scores >= threshold
    if topk is not None:
        predicted &= _top(scores, topk)
    if scored is not None:
        predicted &= scored
        labels = labels & scored
    correct = np.count_nonzero(predicted & labels, axis=0).astype(np.float64)
    positive = np.count_nonzero(predicted, axis=0).astype(np.float64)
    true = np.count_nonzero(labels, axis=0).astype(np.float64)

    precision = _ratio(correct, positive, undefined_precision)
    recall = _ratio(correct, true, undefined_recall)
    cp, cr = _mean(precision), _mean(recall)
    predictions = np.maximum(positive, 1) if pad_predicted else positive
    op, or_ = (float(correct.sum() / max(total.sum(), 1)) for total in (predictions, true))
    cf1 = _harmonic(cp, cr)
    if per_class_f1:
        f1 = 2 * correct / np.maximum(positive + true, 1)
        cf1 = _mean(np.where(np.isnan(recall), np.nan, f1))
    return {"CP": cp, "CR": cr, "CF1": cf1, "OP": op, "OR": or_, "OF1": _harmonic(op, or_)}


def evaluate(
    scores: Real[np.ndarray, "N l"],
    labels: Shaped[np.ndarray, "N l"],
    scored: Shaped[np.ndarray, "N l"] | None = None,
    *,
    classes: Sequence[str],
    definition: str = "raw",
    threshold: float = 0.0,
    topk: int = 3,
    strict: bool = False,
    scored_in: str = "all",
    absent: str = "leave_out",
    undefined_precision: str = "zero",
    undefined_recall: str = "skip",
    pad_predicted: bool = False,
    per_class_f1: bool = False,
) -> dict[str, Any]:
    """All metrics of a split, in percent, as report.json holds them.

    Args:
      classes: the names of the labels.
      scored_in: where `scored` is obeyed: "all", or "AP": in P/R/F1 entries that are not scored then count
        with their label (ML-GCN counts difficult objects as negatives there, C-Tran counts its input labels).
      absent: "leave_out" or "zero": what a class without a positive does to mAP.
      others: see `average_precision` and `precision_recall_f1`; `PROTOCOLS` has each repository's.
    Returns:
      {"metrics": {"mAP", "CP", "CR", "CF1", "OP", "OR", "OF1", and the last six with "_3" for the top 3},
      "per_class_AP": {class: percent, or None if left out}, "left_out": [classes without a positive, left
      out of mAP]}. Never NaN.
    Raises:
      UserError: shapes differ, a score is NaN, or a setting is unknown.
    """
    one_of("scored_in", scored_in, ("all", "AP"))
    one_of("absent", absent, ("leave_out", "zero"))
    scores, labels, scored = _checked(scores, labels, scored)
    if len(classes) != scores.shape[1]:
        raise UserError(
            f"There are {len(classes)} class names for {scores.shape[1]} columns of scores; give one for each."
        )
    ap = 100 * average_precision(
        scores, labels, definition=definition, scored=scored, absent=0.0 if absent == "zero" else math.nan
    )
    settings: dict[str, Any] = {
        "threshold": threshold,
        "strict": strict,
        "scored": scored if scored_in == "all" else None,
        "undefined_precision": undefined_precision,
        "undefined_recall": undefined_recall,
        "pad_predicted": pad_predicted,
        "per_class_f1": per_class_f1,
    }
    metrics = {"mAP": _mean(ap)}
    metrics |= {k: 100 * v for k, v in precision_recall_f1(scores, labels, **settings).items()}
    top = precision_recall_f1(scores, labels, topk=topk, **settings)
    metrics |= {f"{k}_{topk}": 100 * v for k, v in top.items()}
    missing = np.isnan(ap)
    return {
        "metrics": metrics,
        "per_class_AP": {name: None if gone else float(v) for name, v, gone in zip(classes, ap, missing)},
        "left_out": [name for name, gone in zip(classes, missing) if gone],
    }


def logit(probability: float) -> float:
    """The threshold on logits that a threshold on probabilities means: log(p / (1-p))."""
    return math.log(probability / (1 - probability))


_FAMILY = {"pad_predicted": True}
_V1 = {"scored_in": "AP"}
_ENV = {"definition": "env"}

# How each repository computes its own numbers: keywords for `evaluate`, thresholds on logits. Which entries are
# scored is the policy of the data set, not of the protocol.
PROTOCOLS: dict[str, dict[str, Any]] = {
    "mlgcn": _FAMILY | _V1,
    "addgcn": _FAMILY | _V1,
    "tdrg": _FAMILY | _V1,
    "gatn": _FAMILY | _V1,
    "mulcon": _FAMILY | _V1,
    "hcp": _FAMILY | _V1,
    "hcp_voc2012": _FAMILY | _V1 | _ENV,
    "mcar": _FAMILY | _V1 | {"threshold": logit(0.6), "absent": "zero"},
    "csra": _FAMILY,
    "csra_voc07": _FAMILY,
    "ssgrl": _ENV,
    "q2l": _ENV,
    "asl": {"threshold": logit(0.8), "strict": True, "per_class_f1": True},
    "ml_decoder": {"threshold": logit(0.75), "strict": True, "per_class_f1": True},
    "ctran": {"definition": "sklearn", "scored_in": "AP", "undefined_recall": "zero"},
    "spml": {"definition": "sklearn", "absent": "zero"},
    "mlc_pat": _ENV | {"strict": True, "undefined_precision": "skip"},
}


def protocol(name: str, *, probabilities: bool = False) -> dict[str, Any]:
    """The settings of `evaluate` that reproduce a repository's numbers.

    Args:
      name: a key of `PROTOCOLS`.
      probabilities: the scores are probabilities; the threshold is turned into one.
    Raises:
      UserError: no such protocol.
    """
    one_of("The evaluation protocol", name, PROTOCOLS)
    settings = dict(PROTOCOLS[name])
    if probabilities:
        settings["threshold"] = 1 / (1 + math.exp(-settings.get("threshold", 0.0)))
    return settings


def _checked(
    scores: np.ndarray, labels: np.ndarray, scored: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Scores as float32 or float64, the others as bool, all of one shape (N l)."""
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.dtype not in (np.float32, np.float64):
        wide = np.float64 if scores.dtype.kind in "iub" else np.float32
        scores = scores.astype(wide)
    others = [labels] if scored is None else [labels, np.asarray(scored)]
    for name, other in zip(("labels", "scored"), others):
        if other.shape != scores.shape or scores.ndim != 2:
            raise UserError(
                f"Scores {scores.shape} and {name} {other.shape} differ in shape; give both as (images, labels)."
            )
    if np.isnan(scores).any():
        row, column = np.argwhere(np.isnan(scores))[0]
        raise UserError(f"The score of image {row} for label {column} is NaN; evaluate an earlier checkpoint.")
    bools = [other if other.dtype == bool else other > 0 for other in others]
    return scores, bools[0], bools[1] if scored is not None else None


def _top(scores: np.ndarray, k: int) -> np.ndarray:
    """(N l) bool: the k highest scores of each row, the first of equal ones."""
    rest = scores.copy()
    top = np.zeros(scores.shape, bool)
    rows = np.arange(len(scores))
    for _ in range(min(k, scores.shape[1])):
        best = rest.argmax(axis=1)
        top[rows, best] = True
        rest[rows, best] = -np.inf
    return top


def _ratio(part: np.ndarray, whole: np.ndarray, undefined: str) -> np.ndarray:
    """part / whole; where whole is 0: 0 for "zero", NaN (to be left out) for "skip"."""
    one_of("undefined_precision or undefined_recall", undefined, ("zero", "skip"))
    ratio = part / np.maximum(whole, 1)
    return ratio if undefined == "zero" else np.where(whole > 0, ratio, np.nan)


def _mean(values: np.ndarray) -> float:
    """The mean of what is not NaN; 0 if nothing is."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else 0.0


def _harmonic(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b > 0 else 0.0
