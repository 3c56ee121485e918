"""Metrics against the authors' golden numbers, scikit-learn, plain loops and cases done by hand."""

import subprocess
import sys
import time

import jaxtyping
import numpy as np
import pytest
from sklearn.metrics import average_precision_score, precision_recall_fscore_support

import toy
from mljax import metrics
from mljax.errors import UserError

CLASSES = [f"class {c}" for c in range(20)]
ORDER = ("OP", "OR", "OF1", "CP", "CR", "CF1")


@pytest.fixture(scope="module")
def golden():
    return toy.golden("metrics")


def labels_of(golden, kind):
    """(labels, scored) of a golden case: "labels01", or "ternary" with difficult objects ignored or not."""
    if kind.startswith("labels01"):
        return golden["in/labels01"], None
    t = golden["in/labels_ternary"]
    return t == 1, (t != 0 if kind == "ternary_difficultTrue" else None)


def percent(report, suffix=""):
    return [report["metrics"][name + suffix] for name in ORDER]


def assert_six(golden, prefix, report):
    np.testing.assert_allclose(percent(report), 100 * golden[f"{prefix}/OP_OR_OF1_CP_CR_CF1"], atol=1e-6)
    np.testing.assert_allclose(percent(report, "_3"), 100 * golden[f"{prefix}/top3_OP_OR_OF1_CP_CR_CF1"], atol=1e-6)


@pytest.mark.parametrize("name", ["mlgcn", "hcp", "mulcon"])
@pytest.mark.parametrize("kind", ["labels01_difficultFalse", "ternary_difficultFalse", "ternary_difficultTrue"])
def test_ml_gcn_family_golden(golden, name, kind):
    probabilities = str(golden[f"out/{name}/input_kind"]) == "probabilities"
    scores = golden["in/probabilities" if probabilities else "in/scores"]
    settings = metrics.protocol(name, probabilities=probabilities)
    report = metrics.evaluate(scores, *labels_of(golden, kind), classes=CLASSES, **settings)
    ap = list(report["per_class_AP"].values())
    # theirs is float32, in [0, 1]
    np.testing.assert_allclose(np.divide(ap, 100), golden[f"out/{name}/{kind}/ap"], atol=1e-6)
    assert_six(golden, f"out/{name}/{kind}", report)


@pytest.mark.parametrize("case, name", [("coco", "csra"), ("voc07", "csra_voc07")])
def test_csra_golden(golden, case, name):
    labels, scored = labels_of(golden, "labels01" if case == "coco" else "ternary_difficultTrue")
    report = metrics.evaluate(golden["in/scores"], labels, scored, classes=CLASSES, **metrics.protocol(name))
    ap = list(report["per_class_AP"].values())
    np.testing.assert_allclose(ap, 100 * golden[f"out/csra/{case}/ap"], atol=1e-6)
    assert_six(golden, f"out/csra/{case}", report)


def test_interpolated_golden(golden):
    scores, labels = golden["in/scores"], golden["in/labels01"]
    for name, ap, mean_ap, scale in (
        ("hcp_voc2012", "hcp/ap_voc2012", "hcp/mAP_voc2012", 100),
        ("q2l", "q2l/ap", "q2l/mAP", 1),
        ("q2l", "q2l/ap", "q2l/mAP_from_probabilities", 1),
        ("ssgrl", None, "ssgrl/mAP", 100),
    ):
        report = metrics.evaluate(scores, labels, classes=CLASSES, **metrics.protocol(name))
        np.testing.assert_allclose(report["metrics"]["mAP"], scale * golden[f"out/{mean_ap}"], atol=1e-6)
        if ap:
            found = np.array(list(report["per_class_AP"].values()))
            wanted = golden[f"out/{ap}"]
            np.testing.assert_allclose(found / (100 if wanted.max() <= 1 else 1), wanted, atol=1e-6)


def test_asl_golden(golden):
    labels = golden["in/labels01"]
    for scores, key in ((golden["in/probabilities"], "ap"), (golden["in/scores"], "ap_from_logits")):
        found = metrics.average_precision(scores, labels)
        wanted = golden[f"out/asl/{key}"]
        np.testing.assert_allclose(found, wanted / (100 if wanted.max() > 1 else 1), atol=1e-6)
    np.testing.assert_allclose(found.mean(), golden["out/asl/mAP"] / 100, atol=1e-6)
    np.testing.assert_allclose(found.mean(), golden["out/mulcon_util/mean_ap"], atol=1e-6)
    for threshold in (0.5, 0.75, 0.8):
        settings = metrics.PROTOCOLS["asl"] | {"threshold": metrics.logit(threshold)}
        report = metrics.evaluate(golden["in/scores"], labels, classes=CLASSES, **settings)["metrics"]
        wanted = golden[f"out/asl/PC_RC_FC_PO_RO_FO_thr{threshold}"]
        # theirs adds 1e-8 to denominators and sums in float32
        found = [report[name] / 100 for name in ("CP", "CR", "CF1", "OP", "OR", "OF1")]
        np.testing.assert_allclose(found, wanted / 100, atol=1e-6)


def test_every_golden_metric_is_tested(golden):
    """A case added to the file must not go unnoticed."""
    families = {key.split("/")[1] for key in golden if key.startswith("out/")}
    assert families == {"asl", "mlgcn", "hcp", "mulcon", "q2l", "ssgrl", "mulcon_util", "csra"}


def test_facts_fixtures():
    """Average precision of four images, done by hand."""
    scores = np.tile(np.array([[0.9], [0.8], [0.7], [0.6]]), 3)
    labels = np.array([[1, 0, 1, 0], [0, 1, 0, 1], [0, 1, 1, 0]]).T
    raw = metrics.average_precision(scores, labels)
    np.testing.assert_allclose(raw, [(1 + 2 / 3) / 2, 0.5, (1 / 2 + 2 / 3) / 2], rtol=1e-12)
    env = metrics.average_precision(scores, labels, definition="env")
    np.testing.assert_allclose(env, [(1 + 2 / 3) / 2, 0.5, 2 / 3], rtol=1e-12)
    # recall .5 covers 0 to .5 (six points), recall 1 the other five
    points = metrics.average_precision(scores, labels, definition="11point")
    np.testing.assert_allclose(points, [(6 + 5 * 2 / 3) / 11, 0.5, 2 / 3], rtol=1e-12)


def loop_average_precision(scores, labels, definition):
    """One class: ranks by (score descending, index), precision at every rank, no vector tricks."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    total, hits, points = sum(labels), 0, []
    for rank, i in enumerate(order, start=1):
        hits += int(labels[i])
        points.append((hits, hits / rank, labels[i]))
    if definition == "raw":
        return sum(precision for _, precision, positive in points if positive) / total
    best = [max(precision for hits, precision, _ in points if hits >= k) for k in range(total + 1)]
    if definition == "env":
        return sum(best[1:]) / total
    return sum(max(precision for hits, precision, _ in points if 10 * hits >= k * total) for k in range(11)) / 11


@pytest.mark.parametrize("definition", ["raw", "env", "11point"])
@pytest.mark.parametrize("levels", [3, 1000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_average_precision_loop(definition, levels, dtype):
    rng = np.random.default_rng(0)
    scores = (rng.integers(0, levels, (37, 6)) / levels).astype(dtype)
    labels = rng.random((37, 6)) < [0.02, 0.1, 0.3, 0.5, 0.9, 1.0]
    labels[5] = True
    wanted = [loop_average_precision(scores[:, c], labels[:, c], definition) for c in range(6)]
    np.testing.assert_allclose(metrics.average_precision(scores, labels, definition=definition), wanted, rtol=1e-12)


@pytest.mark.parametrize("levels", [2, 5, 10**6])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64])
def test_scikit_learn_average_precision(levels, dtype):
    rng = np.random.default_rng(1)
    levels = min(levels, 2000) if dtype is np.float16 else levels
    scores = rng.integers(-levels, levels, (200, 9)).astype(dtype)
    labels = rng.random((200, 9)) < [0.01, 0.02, 0.05, 0.1, 0.3, 0.5, 0.8, 0.99, 1.0]
    labels[7] = True
    wanted = [average_precision_score(labels[:, c], scores[:, c]) for c in range(9)]
    found = metrics.average_precision(scores, labels, definition="sklearn")
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_scored_entries_only():
    rng = np.random.default_rng(2)
    scores, labels, scored = rng.normal(size=(50, 4)), rng.random((50, 4)) < 0.4, rng.random((50, 4)) < 0.7
    found = metrics.average_precision(scores, labels, definition="sklearn", scored=scored)
    six = metrics.precision_recall_f1(scores, labels, scored=scored)
    precisions = []
    for c in range(4):
        keep = scored[:, c]
        np.testing.assert_allclose(found[c], average_precision_score(labels[keep, c], scores[keep, c]), rtol=1e-12)
        predicted = scores[keep, c] >= 0
        precisions.append((predicted & labels[keep, c]).sum() / predicted.sum())
    np.testing.assert_allclose(six["CP"], np.mean(precisions), rtol=1e-12)


def test_ties_are_ranked_by_index():
    scores = np.zeros((4, 2), np.float32)
    labels = np.array([[1, 0, 0, 0], [0, 0, 0, 1]]).T
    np.testing.assert_array_equal(metrics.average_precision(scores, labels), [1, 0.25])
    np.testing.assert_array_equal(metrics.average_precision(scores, labels, definition="sklearn"), [0.25, 0.25])


def test_zero_of_both_signs_ties():
    scores = np.array([[-0.0], [0.0]])
    np.testing.assert_array_equal(metrics.average_precision(scores, np.array([[1], [0]])), [1])


def assert_sklearn_six(scores, labels, **settings):
    """CP CR OP OR OF1 against scikit-learn's macro and micro averages; CF1 from CP and CR."""
    predicted = scores >= 0
    macro = precision_recall_fscore_support(labels, predicted, average="macro", zero_division=0)
    micro = precision_recall_fscore_support(labels, predicted, average="micro", zero_division=0)
    found = metrics.precision_recall_f1(scores, labels, undefined_recall="zero", **settings)
    wanted = dict(zip(("CP", "CR", "OP", "OR", "OF1"), (*macro[:2], *micro[:3])))
    cp, cr = macro[:2]
    wanted["CF1"] = 2 * cp * cr / (cp + cr) if cp + cr else 0
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-12, atol=1e-15, err_msg=name)
    means = metrics.precision_recall_f1(scores, labels, undefined_recall="zero", per_class_f1=True, **settings)
    np.testing.assert_allclose(means["CF1"], macro[2], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("case", ["random", "tied", "no positives", "all positives", "never", "always", "one image"])
def test_scikit_learn_precision_recall(case):
    rng = np.random.default_rng(3)
    scores, labels = rng.normal(size=(60, 5)), np.int64(rng.random((60, 5)) < 0.3)
    if case == "tied":
        scores = np.round(scores)
    labels = {"no positives": labels * 0, "all positives": labels * 0 + 1}.get(case, labels)
    scores = {"never": scores * 0 - 1, "always": scores * 0}.get(case, scores)
    if case == "random":
        scores[:, 2], labels[:, 3] = -1, 0
    if case == "one image":
        scores, labels = scores[:1], labels[:1]
    assert_sklearn_six(scores, labels)


def test_six_by_hand():
    """Three images, four classes: c1 never predicted, c2 absent but predicted once, c3 perfect."""
    scores = np.array([[1, -1, 2, 3], [1, -1, -1, 4], [-1, -1, -1, -1]], float)
    labels = np.array([[1, 1, 0, 1], [0, 0, 0, 1], [1, 0, 0, 0]])
    six = metrics.precision_recall_f1(scores, labels)
    # per class: correct 1 0 0 2, predicted 2 0 1 2, true 2 1 0 2
    cp, cr, op, or_ = (0.5 + 0 + 0 + 1) / 4, (0.5 + 0 + 1) / 3, 3 / 5, 3 / 5
    wanted = {"CP": cp, "CR": cr, "CF1": 2 * cp * cr / (cp + cr), "OP": op, "OR": or_, "OF1": 0.6}
    assert six == pytest.approx(wanted, rel=1e-12)
    zero = metrics.precision_recall_f1(scores, labels, undefined_recall="zero")
    assert zero["CR"] == pytest.approx(1.5 / 4)
    skip = metrics.precision_recall_f1(scores, labels, undefined_precision="skip")
    assert skip["CP"] == pytest.approx(1.5 / 3)
    assert metrics.precision_recall_f1(scores, labels, pad_predicted=True)["OP"] == pytest.approx(3 / 6)
    # F1 per class: .5, 0, left out, 1
    assert metrics.precision_recall_f1(scores, labels, per_class_f1=True)["CF1"] == pytest.approx(0.5)
    # only the best label of each image: c3, c3 and none, since it must pass the threshold
    top = metrics.precision_recall_f1(scores, labels, topk=1)
    assert (top["OP"], top["OR"], top["CP"]) == pytest.approx((1, 2 / 5, 1 / 4))
    # on logits a threshold at a score: at it or above it
    assert metrics.precision_recall_f1(scores, labels, threshold=1.0)["OP"] == pytest.approx(3 / 5)
    assert metrics.precision_recall_f1(scores, labels, threshold=1.0, strict=True)["OP"] == pytest.approx(2 / 3)


def test_top_k_ties_and_few_labels():
    scores = np.array([[2.0, 2.0, 2.0, 2.0], [0.0, 3.0, -np.inf, 3.0]])
    labels = np.ones((2, 4), int)
    top = metrics.precision_recall_f1(scores, labels, topk=2, undefined_recall="zero")
    # image 0 predicts classes 0 and 1, image 1 classes 1 and 3
    assert (top["OR"], top["CR"]) == (0.5, pytest.approx((1 / 2 + 1 + 0 + 1 / 2) / 4))
    every = metrics.precision_recall_f1(scores, labels, topk=9)
    assert every == metrics.precision_recall_f1(scores, labels)


def test_absent_classes():
    scores = np.array([[1.0, -1.0], [-1.0, 2.0]])
    labels = np.array([[1, 0], [0, 0]])
    assert np.isnan(metrics.average_precision(scores, labels)[1])
    assert metrics.average_precision(scores, labels, absent=0.0)[1] == 0
    report = metrics.evaluate(scores, labels, classes=["cat", "dog"])
    assert report["metrics"]["mAP"] == 100
    assert report["per_class_AP"] == {"cat": 100, "dog": None}
    assert report["left_out"] == ["dog"]
    zero = metrics.evaluate(scores, labels, classes=["cat", "dog"], **metrics.protocol("mcar"))
    assert (zero["metrics"]["mAP"], zero["per_class_AP"]["dog"], zero["left_out"]) == (50, 0, [])
    # a class whose only positive is not scored is absent, too
    hidden = metrics.evaluate(scores, labels, np.array([[0, 1], [1, 1]]), classes=["cat", "dog"])
    assert hidden["left_out"] == ["cat", "dog"]


@pytest.mark.parametrize("name", metrics.PROTOCOLS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (5, 1), (6, 4), (0, 3)])
@pytest.mark.parametrize("fill", [0, 1])
def test_never_nan(name, shape, fill):
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=shape), np.full(shape, fill)
    for scored in (None, np.ones(shape), np.zeros(shape)):
        report = metrics.evaluate(
            scores, labels, scored, classes=[str(c) for c in range(shape[1])], **metrics.protocol(name)
        )
        values = [*report["metrics"].values(), *(v for v in report["per_class_AP"].values() if v is not None)]
        assert all(np.isfinite(v) and type(v) is float for v in values)
    assert len(report["metrics"]) == 13


def test_protocols_of_single_differences(golden):
    """MCAR's threshold of .6, C-Tran's known labels, MLC-PAT's nan-mean: each against its rule, written out."""
    probabilities, labels = golden["in/probabilities"].astype(np.float64), golden["in/labels01"]
    predicted = probabilities >= 0.6
    correct = (predicted & (labels == 1)).sum(axis=0)
    mcar = metrics.evaluate(golden["in/scores"], labels, classes=CLASSES, **metrics.protocol("mcar"))["metrics"]
    np.testing.assert_allclose(mcar["CP"] / 100, np.mean(correct / np.maximum(predicted.sum(axis=0), 1)), rtol=1e-12)
    np.testing.assert_allclose(mcar["CR"] / 100, np.mean(correct / labels.sum(axis=0)), rtol=1e-12)

    scored = np.random.default_rng(0).random(labels.shape) < 0.5
    ctran = metrics.evaluate(
        probabilities, labels, scored, classes=CLASSES, **metrics.protocol("ctran", probabilities=True)
    )
    ap = [average_precision_score(labels[scored[:, c], c], probabilities[scored[:, c], c]) for c in range(20)]
    np.testing.assert_allclose(ctran["metrics"]["mAP"], 100 * np.mean(ap), rtol=1e-12)
    micro = precision_recall_fscore_support(labels, probabilities >= 0.5, average="micro")
    np.testing.assert_allclose(ctran["metrics"]["OF1"], 100 * micro[2], rtol=1e-12)

    pat = metrics.evaluate(golden["in/scores"], labels, classes=CLASSES, **metrics.protocol("mlc_pat"))["metrics"]
    predicted = golden["in/scores"] > 0
    ever = predicted.any(axis=0)
    assert not ever[3]
    precision = (predicted & (labels == 1)).sum(axis=0)[ever] / predicted.sum(axis=0)[ever]
    np.testing.assert_allclose(pat["CP"], 100 * precision.mean(), rtol=1e-12)


def test_errors(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the annotations would say it first
    good = np.zeros((2, 3))
    with pytest.raises(UserError, match=r"labels \(3, 2\) differ"):
        metrics.average_precision(good, np.zeros((3, 2)))
    with pytest.raises(UserError, match="scored"):
        metrics.precision_recall_f1(good, good, scored=np.zeros((2, 2)))
    with pytest.raises(UserError, match="image 1 for label 2 is NaN"):
        metrics.average_precision(np.array([[0, 0, 0], [0, 0, np.nan]]), good)
    with pytest.raises(UserError, match="did you mean 'sklearn'"):
        metrics.average_precision(good, good, definition="sklern")
    with pytest.raises(UserError, match="2 class names for 3 columns"):
        metrics.evaluate(good, good, classes=["a", "b"])
    with pytest.raises(UserError, match="did you mean 'mlgcn'"):
        metrics.protocol("ml_gcn")
    with pytest.raises(UserError, match="scored_in"):
        metrics.evaluate(good, good, classes="abc", scored_in="ap ")
    with pytest.raises(UserError, match="'skp'"):
        metrics.precision_recall_f1(good, good, undefined_recall="skp")


def test_inputs_are_left_alone():
    scores, labels = (
        np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32),
        np.eye(9, 4, dtype=np.int8) * 2 - 1,
    )
    copies = scores.copy(), labels.copy()
    metrics.evaluate(scores, labels, np.ones_like(labels), classes="abcd")
    np.testing.assert_array_equal(scores, copies[0])
    np.testing.assert_array_equal(labels, copies[1])


def test_no_jax():
    """Metrics can be computed from scores.npz where jax is not installed."""
    code = "import sys; import mljax.metrics; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_full_coco_in_a_second(real_data):
    """40,137 x 80 on real labels: all metrics in under a second of one core, and right."""
    with np.load(real_data / "labels" / "coco2014_val_labels.npz") as file:
        labels, classes = np.unpackbits(file["labels"], axis=1)[:, :80], [str(name) for name in file["classes"]]
    assert labels.shape == (40137, 80)
    rng = np.random.default_rng(0)
    scores = rng.normal(size=labels.shape).astype(np.float32) + 2 * labels.astype(np.float32) - 2
    spent = []
    for _ in range(3):
        start = time.process_time()
        report = metrics.evaluate(scores, labels, classes=classes)
        spent.append(time.process_time() - start)
    assert min(spent) < 1
    assert report["left_out"] == []
    for c in (0, 37, 79):
        wanted = 100 * average_precision_score(labels[:, c], scores[:, c])
        np.testing.assert_allclose(report["per_class_AP"][classes[c]], wanted, rtol=1e-3)
        merged = metrics.average_precision(scores[:, [c]], labels[:, [c]], definition="sklearn")
        np.testing.assert_allclose(100 * merged[0], wanted, rtol=1e-12)
    micro = precision_recall_fscore_support(labels, scores >= 0, average="micro")
    np.testing.assert_allclose(report["metrics"]["OF1"], 100 * micro[2], rtol=1e-12)
