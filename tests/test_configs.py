"""Every config and every word of it: full-size shapes by eval_shape, the words that shrink it."""

import importlib.util

import jax
import numpy as np
import pytest

import toy
from mljax import experiment, train
from mljax.build import names
from mljax.config.reading import read_config
from mljax.types import Meta


def words(name):
    spec = importlib.util.spec_from_file_location(name, toy.ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return ["", *module.WORDS]


EVERY = [(name, word) for name in toy.CONFIGS for word in words(name)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "word"), EVERY)
def test_full_size_shapes_hold(name, word):
    """The system of every experiment initialises and steps in shape, without data, weights or memory."""
    if word.endswith("="):
        pytest.skip("a word that wants a value is tested where its system is")
    found = read_config(f"configs/{name}.py:{word}").unlock()
    count = {"coco": 80, "voc": 20, "scenes": 20}.get(found.data.name, 12)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (50, count)).astype(np.uint8)
    vectors = rng.normal(size=(count, 300)).astype(np.float32)
    classes = tuple(f"c{i}" for i in range(count))
    meta = Meta(name="shapes", classes=classes, labels=labels, observed=np.ones_like(labels), vectors=vectors)
    run = experiment.assemble(found, meta, toy.PLAIN)
    batch = experiment.example_batch(run, 2)

    def one_step():
        rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1), "draw": jax.random.key(2)}
        variables = run.system.init(rngs, run.prepare(batch), 0, method="loss")
        tx = train.make_optimizer(found, variables["params"], 10, run.system.backbone.frozen_parameters)
        state = train.create_state(variables, tx, ema=found.ema, seed=0)
        return train.make_step(run, tx)(state, batch)

    state, metrics = jax.eval_shape(one_step)
    assert metrics["loss"].shape == ()
    out = jax.eval_shape(lambda v, b: run.scores(v, b), {"params": state.params, **state.variables}, batch)
    assert out.shape == (2, count)


@pytest.mark.parametrize("name", toy.CONFIGS)
def test_smoke_shrinks_every_experiment(name):
    for word in words(name):
        if word and not word.endswith("="):
            found = read_config(f"configs/{name}.py:{word},smoke")
            assert found.data.name == "scenes" and found.optim.epochs <= 2 and found.weights.name is None


def test_no_config_file_is_long_and_all_keys_are_of_the_base():
    for name in toy.CONFIGS:
        assert len((toy.ROOT / "configs" / f"{name}.py").read_text().splitlines()) <= 100


def test_names_are_found_by_import():
    assert {"cmsg", "baseline"} <= set(names("systems"))
    assert {"scenes", "voc", "csv", "folders"} <= set(names("data"))
    assert {"small", "mobilenet_v1", "resnet101"} <= set(names("backbones"))
