"""CDCR: which candidates count, in its memory, its loss and a run of two stages."""

import jax
import numpy as np
import pytest

import toy
from mljax import experiment
from mljax.errors import UserError
from mljax.losses.criterion import Criterion
from mljax.systems.cdcr import CDCR
from test_resume import same_state, trained_twice

N, L = 10, 4


def meta():
    return toy.meta(np.random.default_rng(0).random((N, L)) < 0.5)


def built(**settings):
    loss = Criterion.from_config({"name": "bce", "reduction": "sum"})
    return CDCR(backbone=None, criterion=loss, meta=meta(), **settings)


def batch(rows):
    return toy.batch((len(rows), 2, 2, 6), meta().labels[rows], index=np.int32(rows), seed=1)


@pytest.mark.parametrize("aware", [False, True])
def test_refresh_equals_plain_loops(aware):
    logits = np.random.default_rng(2).normal(size=(N, L)).astype(np.float32) * 2
    module, candidates = built(alpha=0.6, difficulty_aware=aware), meta().labels
    variables = {"memory": {"weights": np.ones((N, L), np.uint8)}, "batch_stats": {"x": 1}}
    found = module.refresh(variables, lambda split, view: {"logits": logits}, 0)
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    overall = p[candidates == 1].mean()
    for i in range(N):
        for c in range(L):
            bar = 0.6 if not aware else 0.6 - overall + p[candidates[:, c] == 1, c].mean()
            expected = 1 if candidates[i, c] == 0 else int(p[i, c] >= bar)
            assert found["memory"]["weights"][i, c] == expected
    assert found["batch_stats"] == {"x": 1} and found["memory"]["weights"].dtype == np.uint8


def test_a_candidate_that_is_not_believed_has_no_loss():
    module, data = built(), batch([4, 0, 7])
    variables = module.init(jax.random.key(0), data, 0, method="loss")
    assert np.asarray(variables["memory"]["weights"]).all()
    weights = (np.random.default_rng(3).random((N, L)) < 0.5).astype(np.uint8)
    logits = np.float64(module.apply(variables, data).logits)
    for state, kept in ((variables, np.ones((N, L))), ({**variables, "memory": {"weights": weights}}, weights)):
        expected = 0.0
        for i, row in enumerate([4, 0, 7]):
            for c in range(L):
                p, y = 1 / (1 + np.exp(-logits[i, c])), meta().labels[row, c]
                expected -= kept[row, c] * np.log(p if y else 1 - p)
        loss, terms = module.apply(state, data, 0, method="loss")
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        np.testing.assert_allclose(terms["left_out"], (1 - kept[[4, 0, 7]]).sum() / 3, rtol=1e-6)


def test_difficulty_on_the_papers_data_ends_after_twenty_epochs():
    """systems.md 9.2; the plain form after forty."""
    epochs = {
        words: [stage["optim"]["epochs"] for stage in toy.config("cdcr", words).stages]
        for words in ("coco2014", "coco2014,difficulty", "difficulty,voc2007", "voc_resplit,difficulty")
    }
    assert epochs == {
        "coco2014": [15, 25],
        "coco2014,difficulty": [15, 5],
        "difficulty,voc2007": [15, 5],
        "voc_resplit,difficulty": [20, 10],
    }
    stages = toy.config("cdcr", "coco2014,difficulty").stages
    assert [stage["optim"]["schedule"]["epochs"] for stage in stages] == [80, 80]


def test_no_scoring_before_its_start():
    module = built(start=3, view="96:flip")
    asked = []

    def score(split, view):
        asked.append(view)
        return {"logits": np.zeros((N, L), np.float32)}

    variables = {"memory": {"weights": np.ones((N, L), np.uint8)}}
    for epoch in range(5):
        variables = module.refresh(variables, score, epoch)
    assert asked == ["96:flip", "96:flip"]
    assert (variables["memory"]["weights"] == 1 - meta().labels).all()  # one half is below alpha


@pytest.mark.slow
def test_two_stages_resume_exactly(tmp_path, monkeypatch):
    found = toy.shallow(toy.config("cdcr"))
    folders = trained_twice(found, tmp_path, monkeypatch, 10)  # inside the second stage, between its refreshes
    first, second = (same_state(*folders, stage) for stage in ("0", "1"))
    key = "variables/memory/weights"
    candidates = experiment.source(found, "train", training=True).labels
    assert first[key].all()  # the first stage believes all
    weights = second[key]
    assert weights[candidates == 0].all() and not weights[candidates == 1].all()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"alpha": 1.5}, "alpha is 1.5; expected a probability"),
        ({"start": -1}, "start is -1; expected an epoch"),
        ({"view": "flip"}, "view 'flip' is not SIZE"),
        ({"net": 3}, "config.system.net is 3; expected the section of a system"),
    ],
)
def test_wrong_settings(settings, said):
    with pytest.raises(UserError, match=said):
        built(**settings)
