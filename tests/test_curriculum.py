"""Curriculum labelling: its strategies against plain loops, its memory, and its refresh in a run."""

import json

import jax
import numpy as np
import pytest

import toy
from mljax import experiment, train
from mljax.errors import UserError
from mljax.losses.criterion import Criterion
from mljax.systems.curriculum import STRATEGIES, Curriculum, relabel
from test_resume import interrupted_at, last_state, same_state

N, L = 12, 5
LOSS = {"name": "partial_bce", "reduction": "batch_mean"}


def case(seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(N, L)).astype(np.float32) * 3
    known = rng.choice(np.int8([-1, 0, 1]), size=(N, L), p=[0.2, 0.6, 0.2])
    spread = rng.random((N, L)) * 0.2
    return logits, known, spread


def by_loops(logits, known, strategy, threshold, proportion, spread):
    out = known.astype(int).copy()
    unknown = [(i, c) for i in range(N) for c in range(L) if known[i, c] == 0]
    if strategy in ("proportion", "class_proportion"):
        groups = [unknown] if strategy == "proportion" else [[e for e in unknown if e[1] == c] for c in range(L)]
        for group in groups:
            best = sorted(group, key=lambda e: -abs(float(logits[e])))[: round(proportion * len(group))]
            for e in best:
                out[e] = 1 if logits[e] >= 0 else -1
        return out
    for e in unknown:
        x = logits[e]
        if strategy == "threshold" and x >= threshold:
            out[e] = 1
        elif strategy == "threshold" and x < -threshold:
            out[e] = -1
        elif strategy == "positives" and x >= threshold:
            out[e] = 1
        elif strategy == "uncertainty" and spread[e] <= threshold:
            out[e] = 1 if x >= 0 else -1
    return out


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("threshold", "proportion"), [(2.0, 0.5), (0.1, 0.0), (0.0, 1.0), (5.0, 0.33)])
def test_strategies_equal_plain_loops(strategy, threshold, proportion):
    logits, known, spread = case()
    found = relabel(logits, known, strategy, threshold=threshold, proportion=proportion, uncertainty=spread)
    np.testing.assert_array_equal(found, by_loops(logits, known, strategy, threshold, proportion, spread))
    assert (found[known != 0] == known[known != 0]).all() and found.dtype == np.int8


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_known_none_known_and_one_class(strategy):
    logits, known, spread = case()
    every = np.where(known == 0, 1, known).astype(np.int8)
    np.testing.assert_array_equal(relabel(logits, every, strategy, uncertainty=spread), every)
    none = np.zeros_like(known)
    assert set(np.unique(relabel(logits, none, strategy, uncertainty=spread))) <= {-1, 0, 1}
    assert relabel(logits[:, :1], none[:, :1], strategy, uncertainty=spread[:, :1]).shape == (N, 1)


def meta():
    _, known, _ = case()
    return toy.meta(known == 1, observed=known != 0)


def batch(rows):
    known = case()[1][rows]
    return toy.batch((len(rows), 2, 2, 6), known == 1, observed=known != 0, index=np.int32(rows), seed=1)


def built(**settings):
    return Curriculum(
        backbone=None, criterion=Criterion.from_config(settings.pop("loss", LOSS)), meta=meta(), **settings
    )


def test_loss_is_that_of_known_and_made_labels():
    module, data = built(), batch([3, 8, 5])
    variables = module.init(jax.random.key(0), data, 0, method="loss")
    np.testing.assert_array_equal(variables["memory"]["labels"], case()[1])
    made = relabel(case()[0], case()[1], "threshold", threshold=1.0)
    changed = {**variables, "memory": {"labels": made}}
    logits = np.float64(module.apply(variables, data).logits)
    for state, codes in ((variables, case()[1]), (changed, made)):
        rows, expected = codes[[3, 8, 5]], 0.0
        for i in range(3):
            known = [c for c in range(L) if rows[i, c]]
            weight = (-4.45 * max(len(known) / L, 1 / L) + 5.45) / L
            for c in known:
                p = 1 / (1 + np.exp(-logits[i, c]))
                expected -= weight * np.log(p if rows[i, c] > 0 else 1 - p)
        loss, terms = module.apply(state, data, 0, method="loss")
        np.testing.assert_allclose(loss, expected / 3, rtol=1e-5)
        np.testing.assert_allclose(
            terms["labels_made"], ((rows != 0) & (case()[1][[3, 8, 5]] == 0)).sum() / 3, rtol=1e-6
        )


def test_refresh_labels_from_scratch_in_its_epochs():
    module = built(start=2, every=3, threshold=1.0)
    variables = {"memory": {"labels": case()[1]}}
    asked = []

    def score(split, view=None):
        asked.append((split, view))
        return {"logits": case(len(asked))[0]}

    for epoch in range(9):
        variables = module.refresh(variables, score, epoch)
        if epoch in (2, 5, 8):
            expected = relabel(case(len(asked))[0], case()[1], "threshold", threshold=1.0)
            np.testing.assert_array_equal(variables["memory"]["labels"], expected)
    assert asked == [("train", None)] * 3


def test_uncertainty_is_the_spread_over_views():
    module = built(strategy="uncertainty", threshold=0.05, views=("96", "96:flip"), start=0)
    looks = {"96": case(1)[0], "96:flip": case(2)[0]}
    found = module.refresh({"memory": {"labels": case()[1]}}, lambda split, view: {"logits": looks[view]}, 0)
    p = [1 / (1 + np.exp(-x.astype(np.float64))) for x in looks.values()]
    spread = np.abs(p[0] - p[1]) / 2
    mean = (looks["96"] + looks["96:flip"]) / 2
    np.testing.assert_array_equal(found["memory"]["labels"], by_loops(mean, case()[1], "uncertainty", 0.05, 0, spread))


def small(**changes):
    found = toy.shallow(toy.config("curriculum", optim__epochs=4, eval__every=1, ema=0.9, **changes))
    found.system.update(start=1, threshold=0.05)
    found.observe.proportion = 0.4
    return found


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("curriculum") / "run"
    train.fit(small(), workdir)
    return workdir


# Epochs have 3 steps: just before a refresh, and just after.
@pytest.mark.parametrize("stop", toy.slow_but([3, 4], [3]))
def test_resume_around_a_refresh_is_exact(uninterrupted, tmp_path, monkeypatch, stop):
    with monkeypatch.context() as patch:
        interrupted_at(patch, stop)
        with pytest.raises(train.Stop, match="stopped"):
            train.fit(small(), tmp_path / "run")
    train.fit(small(), tmp_path / "run")
    whole = same_state(uninterrupted, tmp_path / "run")
    source = experiment.source(small(), "train", training=True)
    labels = whole["variables/memory/labels"]
    known = source.observed > 0
    assert (labels[known] == np.where(source.labels[known] > 0, 1, -1)).all()  # what is known is never changed
    assert (labels[~known] != 0).any()  # and some of the rest was labelled


def test_pmap_run_equals_jit_run(tmp_path):
    found = {}
    for kind in ("jit", "pmap"):
        config = small(parallel=kind)
        config.optim.update(name="sgd", schedule={"name": "constant"}, lr=0.02)
        train.fit(config, tmp_path / kind)
        found[kind] = last_state(tmp_path / kind)
    for path, value in found["jit"].items():
        if "memory" in path:  # a score at the threshold may fall on either side
            assert (found["pmap"][path] == value).mean() > 0.99
        else:
            np.testing.assert_allclose(found["pmap"][path], value, rtol=1e-2, atol=1e-3, err_msg=path)


def test_cached_features_are_what_a_refresh_scores(tmp_path):
    config = small()
    config.backbone.frozen = "all"
    config.cache.train_views, config.cache.eval_views = ("64", "64:flip"), ("64",)
    config.system.views = ("64", "64:flip")
    config.optim.epochs = 2
    report = train.fit(config, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "report.json").read_text())["metrics"] == report["metrics"]
    labels = last_state(tmp_path / "run")["variables/memory/labels"]
    source = experiment.source(config, "train", training=True)
    assert (labels[source.observed == 0] != 0).any()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"strategy": "treshold"}, "did you mean 'threshold'"),
        ({"proportion": 1.2}, "proportion is 1.2; expected a share from 0 to 1"),
        ({"threshold": -1.0}, "threshold is -1.0; expected a number of at least 0"),
        ({"every": 0}, "every is 0 and start 1; expected epochs"),
        ({"strategy": "uncertainty"}, "needs config.system.views, two at least"),
        ({"views": ("96:flop",)}, "view '96:flop' is not SIZE"),
        ({"net": "baseline"}, "config.system.net is 'baseline'; expected the section of a system"),
    ],
)
def test_wrong_settings(settings, said):
    with pytest.raises(UserError, match=said):
        built(**settings)
