"""A derived config: other values, the same types, and the one it comes from unchanged."""

import pytest

import toy
from mljax.config.derive import derive
from mljax.config.reading import read_config


def test_a_derived_config_leaves_the_other_unchanged():
    config = read_config("configs/mulcon.py:smoke")
    before = config.to_dict()
    derived = derive(
        config, {"eval.definition": "sklearn", "weights.name": "x", "system.eval_known": 0.5, "stages": ()}
    )
    assert config.to_dict() == before and "eval_known" not in config.system
    assert (derived.eval.definition, derived.weights.name, derived.system.eval_known) == ("sklearn", "x", 0.5)
    assert derived.stages == () and derived.is_locked
    derived.weights.name = "y"  # placeholders are not shared
    assert config.weights.name is None


def test_a_derived_config_keeps_types():
    config = toy.config("baseline")
    with pytest.raises(TypeError):
        derive(config, {"optim.epochs": "many"})
    assert derive(config, {}).weights.get_type("name") is str
