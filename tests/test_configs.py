"""Every config and every word of it: full-size shapes by eval_shape, a shrunk step for real, overrides, errors."""

import importlib.util

import jax
import numpy as np
import pytest

import toy
from mljax import experiment, train
from mljax.build import names
from mljax.config.flags import parse
from mljax.config.overrides import override
from mljax.config.reading import read_config
from mljax.errors import UserError
from mljax.types import Meta


def words(name):
    spec = importlib.util.spec_from_file_location(name, toy.ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return ["", *module.WORDS]


EVERY = [(name, word) for name in toy.CONFIGS for word in words(name)]


@pytest.mark.parametrize(
    ("config", "one", "other"),
    [("cmsg", "star", "voc2007"), ("csra", "heads=6", "coco2014"), ("query2label", "swin_l", "coco2014")],
)
def test_words_may_stand_in_any_order(config, one, other):
    first, second = toy.config(config, f"{one},{other}"), toy.config(config, f"{other},{one}")
    assert first == second and first != toy.config(config, other)


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


def test_overrides_keep_types():
    found = read_config("configs/cmsg.py:smoke")
    override(found, "optim.epochs", "3")
    override(found, "optim.lr", "1")
    override(found, "optim.clip_norm", "10.0")  # not written out in the config, a setting of the optimiser
    override(found, "parallel", "pmap")
    override(found, "cache.train_views", "320,320:flip")
    override(found, "backbone.widths", "(8,8,8,8)")
    override(found, "system.position", "true")
    assert found.optim.epochs == 3 and found.optim.lr == 1.0 and isinstance(found.optim.lr, float)
    assert found.cache.train_views == ("320", "320:flip") and found.system.position is True


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--confg=x"], "There is no flag --confg .did you mean '--config'"),
        (["--config=configs/cmsg.py", "extra"], "'extra' is left over"),
        (["--config"], "needs a value"),
    ],
)
def test_wrong_flags(argv, said):
    with pytest.raises(UserError, match=said):
        parse(argv)


def test_wrong_config_files_words_keys_and_values():
    with pytest.raises(UserError, match=r"no config file 'configs/cmgs.py' \(did you mean 'configs/cmsg.py'"):
        read_config("configs/cmgs.py")
    with pytest.raises(UserError, match=r"no experiment 'voc207' \(did you mean 'voc2007'"):
        read_config("configs/cmsg.py:voc207")
    found = read_config("configs/cmsg.py:smoke")
    with pytest.raises(UserError, match=r"no key 'optm' \(did you mean 'optim'"):
        override(found, "optm.lr", "1")
    with pytest.raises(UserError, match=r"no key 'sed' \(did you mean 'seed'"):
        override(found, "sed", "1")
    with pytest.raises(UserError, match="a value of type int is wanted"):
        override(found, "optim.epochs", "many")
    override(found, "system.sga_layer", "3")
    with pytest.raises(UserError, match=r"no setting 'sga_layer' \(did you mean 'sga_layers'"):
        toy.assembled(found)


@pytest.mark.parametrize("word", ["threshold=", "known"])
def test_a_word_without_its_value(word):
    with pytest.raises(UserError, match=f"The word '{word.rstrip('=')}' wants a value: {word.rstrip('=')}=VALUE"):
        read_config(f"configs/sst.py:{word}")


def test_names_are_found_by_import():
    assert {"cmsg", "baseline"} <= set(names("systems"))
    assert {"scenes", "voc", "csv", "folders"} <= set(names("data"))
    assert {"small", "mobilenet_v1", "resnet101"} <= set(names("backbones"))
