"""Evaluations: scores of a split, which parameters a run reports, its report and its table."""

import contextlib
import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import average_precision_score

import toy
from mljax import scoring
from mljax.bench import loop
from mljax.bench import model as bench_model
from mljax.data.source import Source
from mljax.rundir.checkpoint import Checkpoints
from mljax.train import evaluation
from mljax.train.evaluation import Evaluation
from mljax.train.loop import Diverged
from mljax.train.trainer import Trainer
from mljax.types import TrainState


def tiny(**changes):
    found = toy.config("baseline", **{"devices": 1, **changes})
    found.backbone.widths, found.input.size = (4, 4, 4, 4), 32
    return found


# --- scores of a split -----------------------------------------------------------------------------------------------


def test_items_are_delayed():
    """Two more are asked for before the first is handed over, none is lost."""
    asked = []
    items = scoring.delayed(asked.append(i) or i for i in range(5))
    assert next(items) == 0 and asked == [0, 1, 2]
    assert list(items) == [1, 2, 3, 4]
    assert list(scoring.delayed(iter([7]))) == [7]


def test_an_evaluation_compiles_once():
    """Splits of any size are batches of one shape: the second and the third compile nothing."""
    config = tiny()
    model = bench_model.Model(config)
    scorer, variables = scoring.Scorer(model.run, model.devices), model.initial()
    for rows in (5, 17, 64):
        scores = scorer.scores(variables, loop.source(model.run.meta, rows, "split"), None, config)
        assert scores.shape == (rows, model.run.meta.num_labels)
        assert scorer._scores._cache_size() == 1


def split(labels, scored=None, name="own test"):
    labels = np.asarray(labels, np.uint8)
    scored = np.ones_like(labels) if scored is None else np.asarray(scored, np.uint8)
    return Source(
        name=name, classes=tuple("abcdef"[: labels.shape[1]]), ids=[str(i) for i in range(len(labels))], labels=labels,
        observed=np.ones_like(labels), scored=scored, read=lambda index: b"", fingerprint=name,
    )  # fmt: skip


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_labels_that_a_system_is_given_are_not_scored(share):
    """Only where an evaluation gives any, only those that are known at all; the split says so in its name."""
    source = split([[1, 0], [0, 1], [1, 1]], scored=[[1, 1], [1, 1], [1, 0]])
    source.observed[0, 0] = 0
    given = np.array([[1, 0], [0, 1], [0, 0]], bool)
    config = SimpleNamespace(system={"eval_known": share})
    experiment = SimpleNamespace(config=config, system=SimpleNamespace(known_labels=lambda index: given[index]))
    found = scoring.scored_split(experiment, source)
    expected = [[1, 1], [1, 0], [1, 0]] if share else [[1, 1], [1, 1], [1, 0]]
    np.testing.assert_array_equal(found.scored, expected)
    assert ("50 % of the labels given" in found.name) == bool(share)
    without = SimpleNamespace(config=config, system=object())
    assert scoring.scored_split(without, source) is source


# --- evaluations -----------------------------------------------------------------------------------------------------


def state_of(step, ema=True):
    """A state whose one parameter is its step, and whose average is half of that."""
    average = {"params": {"w": jnp.float32(step / 2)}, "batch_stats": {}}
    params = {"w": jnp.float32(step)}
    return TrainState(jnp.int32(step), params, {}, {}, average if ema else None, jnp.zeros(2, jnp.uint32))


class Scorer:
    """Scores that are a given table times the parameter."""

    def __init__(self, table):
        self.table, self.calls = np.asarray(table, np.float32), []

    def scores(self, variables, source, maps, config):
        self.calls.append(float(variables["params"]["w"]))
        return self.table * np.float32(variables["params"]["w"])


@pytest.mark.parametrize("ema", [True, False])
def test_an_evaluation_scores_both_kinds_of_parameters(ema):
    labels, table = [[1, 0], [0, 1], [1, 1], [0, 0]], [[2, -1], [3, 1], [1, -2], [-1, 0]]
    config, source, scorer = toy.config("baseline", eval__definition="sklearn"), split(labels), Scorer(table)
    done = evaluation.evaluate(state_of(4, ema), scorer, source, config)
    assert scorer.calls == ([4.0, 2.0] if ema else [4.0]) and done.step == 4
    expected = 100 * np.mean([average_precision_score(np.array(labels)[:, i], np.array(table)[:, i]) for i in (0, 1)])
    for kind in ("raw", "ema") if ema else ("raw",):
        assert done.metrics[kind]["mAP"] == pytest.approx(expected, abs=1e-4)
    np.testing.assert_array_equal(done.scores["raw"], 4 * np.array(table))


def test_scores_that_are_not_finite_are_named():
    table = [[1, 2], [3, np.inf]]
    with pytest.raises(Diverged, match=r"scores of own test after step 3 \(raw\) are not finite"):
        evaluation.evaluate(state_of(3), Scorer(table), split([[1, 0], [0, 1]]), toy.config("baseline"))


@pytest.mark.parametrize(
    "raw, ema, best", [(1.0, 2.0, "ema"), (2.0, 1.0, "raw"), (2.0, 2.0, "raw"), (None, 0.5, "ema")]
)
def test_the_better_kind_of_parameters(raw, ema, best):
    reports = {"raw": {"metrics": {"mAP": raw}}, "ema": {"metrics": {"mAP": ema}}}
    assert Evaluation(1, {}, reports).best == best


def test_the_metric_of_a_plateau():
    """ "loss" is the mean binary cross-entropy over the scored entries, of the raw parameters."""
    source = split([[1, 0], [0, 1]], scored=[[1, 1], [0, 1]])
    scores = {"raw": np.array([[0.5, -2.0], [3.0, 1.0]], np.float32)}
    done = Evaluation(1, scores, {"raw": {"metrics": {"CF1": 3.0}}})
    p = 1 / (1 + np.exp(-np.array([0.5, 2.0, 1.0])))  # of the true value of the three entries that are scored
    config = toy.config("c_tran", optim__schedule={"name": "plateau", "metric": "loss"})
    assert evaluation.plateau_metric(done, source, config) == pytest.approx(-np.log(p).mean(), rel=1e-6)
    config.optim.schedule.metric = "CF1"
    assert evaluation.plateau_metric(done, source, config) == 3.0


# --- what a run reports ----------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoints(tmp_path):
    """Step 2 is the best, by its averaged parameters; step 6 is the last."""
    with Checkpoints(tmp_path / "checkpoints", keep_best_of="mAP") as opened:
        for step, value, kind in ((2, 70.0, "ema"), (4, 60.0, "raw"), (6, 65.0, "raw")):
            opened.save(step, state_of(step), metrics={"mAP": value}, meta={"stage": 0, "step": step, "kind": kind})
        yield opened


@pytest.mark.parametrize("select, ema, kind, step, value", [
    ("last", True, "ema", 6, 3.0), ("last", False, "raw", 6, 6.0), ("best_of_raw_and_ema", True, "ema", 2, 1.0),
])  # fmt: skip
def test_what_is_reported(checkpoints, select, ema, kind, step, value):
    config = toy.config("baseline", eval__select=select)
    chosen = evaluation.select(config, state_of(6, ema), checkpoints, split([[1], [0]]))
    assert (chosen.kind, chosen.step, float(chosen.variables["params"]["w"])) == (kind, step, value)
    assert f"({kind})" in chosen.how and ("last step" in chosen.how) == (select == "last")


@pytest.mark.parametrize("select, calls", [("last", []), ("best_of_raw_and_ema", [1.0])])
def test_a_report_scores_again_only_what_was_not_scored_last(checkpoints, tmp_path, capsys, select, calls):
    labels, table = np.array([[1, 0], [0, 1], [1, 1]]), np.array([[3, -1], [1, 1], [-1, 4]], np.float32)
    stage = SimpleNamespace(
        config=toy.config("baseline", eval__select=select), splits=SimpleNamespace(eval=split(labels)),
        checkpoints=checkpoints, scorer=Scorer(table), cached_eval=None, spec=SimpleNamespace(workdir=tmp_path),
        fitting=lambda section: contextlib.nullcontext(),
    )  # fmt: skip
    trainer = Trainer(stage)
    trainer.last = Evaluation(6, {"raw": 6 * table, "ema": 3 * table}, {})
    report = trainer.report(state_of(6))
    assert stage.scorer.calls == calls and report["step"] == (2 if calls else 6)
    expected = [100 * average_precision_score(labels[:, i], table[:, i]) for i in (0, 1)]
    assert list(report["per_class_AP"].values()) == pytest.approx(expected, abs=1e-4)
    with np.load(tmp_path / "scores.npz") as file:
        np.testing.assert_array_equal(file["scores"], table * (1 if calls else 3))
        np.testing.assert_array_equal(file["labels"], labels)
    assert json.loads((tmp_path / "report.json").read_text())["metrics"] == report["metrics"]


# --- the table -------------------------------------------------------------------------------------------------------

OTHERS = ("CP", "CR", "CF1", "OP", "OR", "OF1")
REPORT = {
    **{"split": "own val", "images": 2, "selected_by": "last step (raw)", "seed": 0},
    "metrics": {"mAP": 81.372} | {f"{name}{suffix}": 50.0 for name in OTHERS for suffix in ("", "_3")},
    "per_class_AP": {"cat": 81.372, "dog": None},
}


@pytest.mark.parametrize("definition", ["raw", "env", "sklearn", "11point"])
def test_the_table_names_the_definition_of_average_precision(definition):
    lines = scoring.table(REPORT | {"definition": definition}).splitlines()[3:]
    assert lines[1].split() == ["mAP", "81.37", f"({definition})", *OTHERS]
    assert lines[2].split() == ["all", "labels", *["50.00"] * 6] and lines[3].split() == ["top", "3", *["50.00"] * 6]
    ends = [[i for i in range(len(line)) if line[i] != " " and line[i + 1 : i + 2] in ("", " ")] for line in lines[1:4]]
    assert ends[0][-6:] == ends[1][-6:] == ends[2][-6:]  # numbers stand below their names


def test_a_report_of_an_older_run_has_a_table_too():
    assert scoring.table(REPORT).splitlines()[4].split()[:3] == ["mAP", "81.37", "CP"]
