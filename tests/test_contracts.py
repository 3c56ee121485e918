"""What files in systems/ and backbones/ have to offer, and what a user reads of one that does not."""

import functools
import re

import pytest

import toy
from mljax import backbones, build, experiment, systems, train
from mljax.check import check
from mljax.config.overrides import overridden
from mljax.config.reading import read_config
from mljax.errors import UserError
from mljax.types import Backbone, missing_members

NET = """
import functools
import flax.linen as nn


class Net(nn.Module):
    depth: int = 1
    {member}

    def __call__(self, image, *, train):
        return {{"32": image}}


NAMES = {{"plain_net": Net, "deep_net": functools.partial(Net, depth=9)}}
"""


def test_a_file_that_does_not_import_is_named_and_breaks_nothing_else(add_file):
    add_file(systems, "half_written", "import a_package_that_nobody_has\nNAMES = {'half_written': None}\n")
    with pytest.raises(UserError, match=r"mljax/systems/half_written\.py .*a_package_that_nobody_has") as error:
        build.find("systems", "half_written")
    assert "\n" not in str(error.value)
    assert build.find("systems", "baseline").__name__ == "Baseline"
    assert "half_written" not in build.names("systems") and "cmsg" in build.names("systems")
    with pytest.raises(UserError, match=r"'cmgs'.*did you mean 'cmsg'.*mljax/systems/half_written\.py"):
        build.find("systems", "cmgs")


def test_a_file_with_an_error_in_its_syntax(add_file):
    add_file(systems, "half_written", "def loss(:\n")
    with pytest.raises(UserError, match=r"mljax/systems/half_written\.py .*SyntaxError"):
        build.find("systems", "half_written")
    assert build.find("systems", "baseline").__name__ == "Baseline"


def test_a_system_that_lacks_members(add_file):
    text = "import flax.linen as nn\nclass Half(nn.Module):\n    width: int = 1\nNAMES = {'half': Half}\n"
    add_file(systems, "half", text)
    with pytest.raises(UserError, match=r"Half in mljax/systems/half\.py .*no backbone.* loss") as error:
        build.find("systems", "half")
    assert "\n" not in str(error.value)
    assert build.find("systems", "baseline").__name__ == "Baseline"


@pytest.mark.parametrize("name", ["plain_net", "deep_net"])
def test_a_backbone_that_lacks_a_member_and_its_variant(add_file, name):
    add_file(backbones, "net", NET.format(member=""))
    with pytest.raises(UserError, match=r"Net in mljax/backbones/net\.py .*no frozen_parameters"):
        build.find("backbones", name)
    assert build.find("backbones", "small").__name__ == "Small"


def test_a_variant_is_its_class_with_other_defaults(add_file):
    add_file(backbones, "net", NET.format(member="frozen_parameters = ()"))
    net = build.build("backbones", {"name": "deep_net"})
    assert net.depth == 9 and isinstance(net, Backbone)
    assert build.build("backbones", {"name": "deep_net", "depth": 2}).depth == 2
    for key in ("parent", "name_", "dept"):
        with pytest.raises(UserError, match=re.escape(f"has no setting {key!r}")):
            build.build("backbones", {"name": "deep_net", key: None})


@pytest.mark.parametrize("kind", ["backbones", "systems"])
def test_every_file_fulfils_its_contract(kind):
    for name, constructor in build.names(kind).items():
        target = constructor.func if isinstance(constructor, functools.partial) else constructor
        if isinstance(target, type):
            assert missing_members(kind, target) == [], name
        assert not {"parent", "name"} & set(build.keywords(constructor)), name


@pytest.mark.parametrize("name", sorted(build.names("backbones")))
def test_backbones_are_classes_and_their_variants(name):
    constructor = build.find("backbones", name)
    variant = isinstance(constructor, functools.partial)
    assert isinstance(constructor.func if variant else constructor, type)
    assert not variant or not constructor.args
    net = build.build("backbones", {"name": name, "frozen": "all", "norm": "frozen"})
    assert isinstance(net, Backbone)
    for pattern in net.frozen_parameters:
        re.compile(pattern)
    assert net.frozen_parameters and all(isinstance(pattern, str) for pattern in net.frozen_parameters)


def blocks():
    """The Python of CONTRIBUTING: a system, its config, its test."""
    return re.findall(r"```python\n(.*?)```", (toy.ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)


def test_the_example_of_contributing(add_file, tmp_path):
    system, config, test = blocks()
    add_file(systems, "yours", system)
    (tmp_path / "config.py").write_text(config)
    for words in ("smoke", "voc2007,sigmoid", "coco2014,smoke"):
        found = read_config(f"{tmp_path}/config.py:{words}")
        check(found)
        assert found.system.get("pooling", "softmax") == ("sigmoid" if "sigmoid" in words else "softmax")
    short = overridden(read_config(f"{tmp_path}/config.py:smoke"), [("optim.epochs", "1")])
    report = train.fit(short, tmp_path / "run")
    assert 0 <= report["metrics"]["mAP"] <= 100
    names = {}
    exec(test, names)
    names["test_forward"]()


def test_a_loss_that_returns_no_terms(add_file):
    system, _, _ = blocks()
    add_file(systems, "yours", system.replace("axis=self.axis), {}", "axis=self.axis)"))
    found = toy.small()
    found.system = {"name": "yours"}
    run, _ = toy.assembled(found)
    with pytest.raises(UserError, match=r"`loss` of the system 'yours' returns a .*expected \(loss, \{name: value\}\)"):
        experiment.init_variables(run, 0)


def test_a_config_that_does_not_heed_its_words(tmp_path):
    (tmp_path / "x.py").write_text("from mljax import config as c\ndef get_config(words=None):\n    return c.base()\n")
    with pytest.raises(UserError, match="does not heed the words 'smoke'; end its get_config"):
        read_config(f"{tmp_path}/x.py:smoke")
    assert read_config(f"{tmp_path}/x.py").system.name
