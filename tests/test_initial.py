"""config.init: a training that starts from another run."""

import dataclasses

import jax
import numpy as np
import pytest

import toy
from mljax import experiment, predict, rundir, train
from mljax.errors import UserError
from mljax.train import warm_start


def config_of(**settings):
    found = toy.config("baseline", "smoke")
    found.optim.update(name="sgd", schedule={"name": "constant"}, lr=0.1, epochs=1, **settings)
    return found


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A run of one epoch, with means of its own."""
    folder = tmp_path_factory.mktemp("init") / "before"
    found = config_of()
    found.weights.mean, found.weights.std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    train.fit(found, folder)
    return folder


def test_a_run_goes_on_from_another(before, tmp_path, capsys):
    """With next to no rate it scores as that run did: all parameters and the preprocessing are taken."""
    found = config_of()
    found.optim.lr, found.init = 1e-30, str(before)
    found.backbone.norm = "frozen"  # so that statistics do not move either
    train.fit(found, tmp_path / "after")
    assert f"arrays of {before}" in capsys.readouterr().err
    old, new = predict.load(before), predict.load(tmp_path / "after")
    jax.tree.map(np.testing.assert_array_equal, old.variables["params"], new.variables["params"])
    jax.tree.map(np.testing.assert_array_equal, old.variables["batch_stats"], new.variables["batch_stats"])
    np.testing.assert_allclose(new.experiment.mean, (0.4, 0.5, 0.6), rtol=1e-6)
    with np.load(before / "scores.npz") as a, np.load(tmp_path / "after" / "scores.npz") as b:
        np.testing.assert_allclose(a["scores"], b["scores"], atol=1e-5)


def fresh(before, found, classes=None):
    old = predict.load(before)
    meta = rundir.load_meta(before)
    if classes is not None:
        chosen = [meta.classes.index(name) if name in meta.classes else 0 for name in classes]
        parts = {"labels": meta.labels[:, chosen], "observed": meta.observed[:, chosen]}
        meta = dataclasses.replace(meta, classes=tuple(classes), vectors=None, **parts)
    run = experiment.assemble(found, meta, rundir.load_preprocessing(before))
    return old.variables, run, experiment.init_variables(run, 1)


@pytest.mark.parametrize("many", [True, False])
def test_other_classes_keep_a_fresh_classifier(before, many):
    """As many other classes, and fewer: the backbone is taken, kernel and bias of the classifier are not."""
    names = rundir.load_meta(before).classes
    classes = [*names[1:], "a zebra"] if many else names[:3]
    found = config_of()
    found.vectors = "none"
    old, run, own = fresh(before, found, classes)
    taken, words = warm_start.from_run(str(before), own, run)
    jax.tree.map(np.testing.assert_array_equal, taken["params"]["backbone"], old["params"]["backbone"])
    for name in ("kernel", "bias"):
        np.testing.assert_array_equal(taken["params"][name], own["params"][name])
    assert words.endswith("new: 'bias', 'kernel'")


def test_what_does_not_fit(before, tmp_path):
    found = config_of()
    found.backbone.widths = (3, 3, 3, 5)
    _, run, own = fresh(before, found, ["a zebra"])
    run = dataclasses.replace(run)
    with pytest.raises(UserError, match="no parameter of that run fits this network"):
        warm_start.from_run(str(before), {"params": {"backbone": {}, "kernel": own["params"]["kernel"]}}, run)
    found = config_of()
    found.init = str(tmp_path / "none")
    with pytest.raises(UserError, match=r"config.init='.*none' is not a run: There is no folder"):
        train.fit(found, tmp_path / "run")
    assert not (tmp_path / "run").exists()
