"""Names and shapes of whole released checkpoints, at full size, of systems whose own tests have small ones only."""

import dataclasses
import re
from collections.abc import Callable

import numpy as np
import pytest

import mljax
import released_names
from mljax import release
from mljax.config.overrides import override
from mljax.config.reading import read_config
from mljax.errors import UserError
from mljax.systems.baseline import Baseline
from mljax.systems.role import Role
from mljax.types import Meta
from mljax.weights import published
from torch_writer import bare_resnet, tensors, torch_zip

NUMBERS = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}


def meta(images=80, labels=80):
    """COCO's 80 labels, with vectors, each in an image with its neighbour."""
    found = np.eye(labels, dtype=np.uint8) | np.roll(np.eye(labels, dtype=np.uint8), 1, 0)
    found = np.resize(found, (images, labels))
    vectors = np.ones((labels, 300), np.float32)
    classes = tuple(f"c{i}" for i in range(labels))
    return Meta(name="toy", classes=classes, labels=found, observed=np.ones_like(found), vectors=vectors)


def numbered(state, prefix):
    """The trunk as a Sequential numbers it."""
    pattern = re.compile(rf"{re.escape(prefix)}({'|'.join(NUMBERS)})\.(.*)")
    renamed = {}
    for name, value in state.items():
        match = pattern.fullmatch(name)
        renamed[f"{prefix}{NUMBERS[match[1]]}.{match[2]}" if match else name] = value
    return renamed


def trunk(prefix=""):
    return {f"{prefix}{name}": value for name, value in released_names.state_dict("R101").items()}


def resnet50(prefix):
    """R101 without the blocks 6 to 22 of layer3, as checkpoints.md says."""
    kept = {k: v for k, v in trunk().items() if not re.match(r"layer3\.([6-9]|1\d|2\d)\.", k)}
    return {f"{prefix}{name}": value for name, value in kept.items()}


def mulcon():
    """The files' names as `published.read_files` joins them: one letter, or C and its label, for each network."""
    state = numbered(trunk("E."), "E.")
    parts = {"A": "netA", "P": "netP", **{f"C_{i}": "netC" for i in range(80)}}
    for part, title in parts.items():
        state |= {f"{part}.{k}": v for k, v in released_names.state_dict(f"MulCon {title}").items()}
    return state


def spml(start=""):
    """The single-positive code's file f; `start` is what `read_files` puts before its names."""
    state = numbered(resnet50("feature_extractor."), "feature_extractor.")
    return {start + k: v for k, v in (state | released_names.state_dict("SPML f, end-to-end")).items()}


@dataclasses.dataclass(frozen=True)
class File:
    """A released file or files: the config that reads it, its sections of checkpoints.md, and the names."""

    config: str
    titles: tuple[str, ...]
    state: Callable
    changes: tuple[tuple[str, str], ...] = ()
    images: int = 80
    labels: int = 80


def listed(config, title, *changes, **more):
    """A file of which every name is in its section."""
    return File(config, (title,), lambda: released_names.state_dict(title), changes, **more)


AT_224 = (("input.size", "224"), ("backbone.size", "224"))
FILES = {
    "ssgrl": File("ssgrl.py:coco2014", ("SSGRL",), lambda: released_names.state_dict("SSGRL", "resnet_101.")),
    "mcar": File(
        "mcar.py:coco2014",
        ("MCAR",),
        lambda: numbered(released_names.state_dict("MCAR", "features."), "features."),
    ),
    "csra": File(
        "csra.py:coco2014,heads=1",
        ("CSRA ResNet-101",),
        lambda: released_names.state_dict("CSRA ResNet-101") | trunk(),
    ),
    "csra vit_base": listed("csra.py:coco2014,vit_base", "CSRA ViT-B"),
    "csra vit_large": listed("csra.py:coco2014,vit_large", "CSRA ViT-L", *AT_224),
    "sst": File(
        "sst.py:coco2014,known=0.1",
        ("HCP-MLR-PL SST",),
        lambda: released_names.state_dict("HCP-MLR-PL SST", "backbone."),
    ),
    "sarb": File(
        "sarb.py:coco2014,known=0.1",
        ("HCP-MLR-PL SARB",),
        lambda: released_names.state_dict("HCP-MLR-PL SARB", "backbone."),
    ),
    "mulcon": File("mulcon.py:coco2014", tuple(f"MulCon net{part}" for part in "EACP"), mulcon),
    "asl tresnet_m": listed("baseline.py:coco2014,asl", "ASL TResNet-M", ("backbone.name", "tresnet_m")),
    "asl tresnet_l": listed("baseline.py:coco2014,asl", "ASL TResNet-L —", ("backbone.name", "tresnet_l")),
    "asl tresnet_xl": listed("baseline.py:coco2014,asl", "ASL TResNet-XL", ("backbone.name", "tresnet_xl")),
    "asl open images": listed(
        "baseline.py:coco2014,asl", "ASL TResNet-L Open Images", ("backbone.name", "tresnet_l"), labels=9605
    ),
    "spml": File("single_positive.py:coco2014", ("SPML f, end-to-end",), spml),
    "role": File(
        "role.py:coco2014",
        ("SPML f, end-to-end", "SPML g"),
        lambda: spml("f.") | {f"g.{k}": v for k, v in released_names.state_dict("SPML g").items()},
        images=65665,
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_full_size_names_and_shapes_are_those_of_the_released_files(name):
    file = FILES[name]
    state = file.state()
    # counted, not listed; in-place ABN of ASL's TResNets has no counter
    counters = 0 if name.startswith("asl") else sum(key.endswith("running_mean") for key in state)
    parts = {title: released_names.total(title) for title in file.titles}
    assert len(state) + counters == sum(n * (80 if "netC" in title else 1) for title, n in parts.items())
    config = read_config(f"configs/{file.config}").unlock()
    for key, value in file.changes:
        override(config, key, value)
    released_names.fits(config, meta(file.images, file.labels), state)


# --- the classifiers of ASL's and the single-positive code's files: values --------------------------------------------

POOLED = np.random.default_rng(0).normal(size=(2, 1, 1, 6)).astype(np.float32)


def random_state(**shapes):
    rng = np.random.default_rng(1)
    return {k.replace("__", "."): rng.normal(size=shape).astype(np.float32) for k, shape in shapes.items()}


def logits(system, variables):
    return system.apply(variables, {"endpoints": {"32": POOLED}}).logits


@pytest.mark.parametrize("start", ["head.fc", "linear_classifier", "module.head.fc"])
def test_baseline_reads_a_linear_classifier(start):
    state = {f"{start}.{k.partition('.')[2]}": v for k, v in random_state(x__weight=(3, 6), x__bias=(3,)).items()}
    system = Baseline(backbone=None, criterion=None, meta=meta(2, 3))
    found = logits(system, published.convert_head(state, system))
    expected = POOLED[:, 0, 0] @ state[f"{start}.weight"].T + state[f"{start}.bias"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_baseline_multiplies_the_two_linear_layers_of_asl_for_open_images():
    first, last = "head.fc.embedding_generator.0", "head.fc.FC"
    shapes = {"weight": ((4, 6), (3, 4)), "bias": ((4,), (3,))}
    rng = np.random.default_rng(2)
    state = {
        f"{name}.{leaf}": rng.normal(size=shapes[leaf][i]).astype(np.float32)
        for i, name in enumerate((first, last))
        for leaf in shapes
    }
    system = Baseline(backbone=None, criterion=None, meta=meta(2, 3))
    found = logits(system, published.convert_head(state, system))
    embedded = POOLED[:, 0, 0] @ state[f"{first}.weight"].T + state[f"{first}.bias"]
    expected = embedded @ state[f"{last}.weight"].T + state[f"{last}.bias"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def released_role(images=5):
    system = Role(backbone=None, meta=meta(images, 3), expected=1.5)
    f = random_state(f__linear_classifier__weight=(3, 6), f__linear_classifier__bias=(3,))
    return system, f, random_state(g__logits=(5, 3))


def test_role_reads_classifier_and_table():
    system, f, g = released_role()
    found = published.convert_head(f | g, system)
    np.testing.assert_array_equal(found["params"]["label_table"], g["g.logits"])
    expected = POOLED[:, 0, 0] @ f["f.linear_classifier.weight"].T + f["f.linear_classifier.bias"]
    np.testing.assert_allclose(logits(system, found), expected, rtol=1e-5, atol=1e-5)


def test_role_says_what_does_not_fit():
    system, f, g = released_role()
    with pytest.raises(UserError, match=r"two files, best_model_state_f\.pt and best_model_state_g\.pt; give both"):
        published.convert_head(f, system)
    with pytest.raises(UserError, match=r"has the shape \(5, 3\) and the training split \(7, 3\)"):
        published.convert_head(f | g, released_role(7)[0])


def test_the_two_files_of_role_are_found_by_their_names(tmp_path):
    system, f, g = released_role()
    for part, state in (("f", f), ("g", g)):
        bare = tensors({name.removeprefix(f"{part}."): value for name, value in state.items()})
        torch_zip(tmp_path / f"best_model_state_{part}.pt", bare)
    read = published.read_files([tmp_path], published.of(system))
    assert read.keys() == (f | g).keys()
    np.testing.assert_array_equal(read["g.logits"], g["g.logits"])
    with pytest.raises(UserError, match="not named like the files of this system's checkpoints"):
        published.read_files([tmp_path / "model.pt"], published.of(system))


def test_role_becomes_a_run_directory(tmp_path):
    config = read_config("configs/role.py:smoke").unlock()
    config.backbone, config.data.train_images = {"name": "resnet18"}, 6
    names = bare_resnet((2, 2, 2, 2), False, 64)
    f = {k: np.full(v.shape, 0.5, np.float32) for k, v in names.items() if not k.startswith("fc.")}
    f = numbered({f"feature_extractor.{k}": v for k, v in f.items()}, "feature_extractor.")
    f |= random_state(linear_classifier__weight=(20, 512), linear_classifier__bias=(20,))
    table = np.random.default_rng(0).normal(size=(6, 20)).astype(np.float32)
    torch_zip(tmp_path / "best_model_state_f.pt", tensors(f))
    torch_zip(tmp_path / "best_model_state_g.pt", tensors({"logits": table}))
    release.to_run([tmp_path], config, tmp_path / "run")
    params = mljax.load(tmp_path / "run").variables["params"]
    np.testing.assert_array_equal(params["label_table"], table)
    np.testing.assert_array_equal(params["net"]["kernel"], f["linear_classifier.weight"].T)
    assert params["backbone"]["stem"]["conv"]["kernel"].shape == (7, 7, 3, 64)
