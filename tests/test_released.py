"""Names and shapes of whole released checkpoints, at full size, of systems whose own tests have small ones only."""

import re

import numpy as np
import pytest

import released_names
from mljax.flags import read_config
from mljax.types import Meta

NUMBERS = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}


def meta():
    """COCO's 80 labels, with vectors, each in an image with its neighbour."""
    labels = np.eye(80, dtype=np.uint8) | np.roll(np.eye(80, dtype=np.uint8), 1, 0)
    vectors = np.ones((80, 300), np.float32)
    classes = tuple(f"c{i}" for i in range(80))
    return Meta(name="toy", classes=classes, labels=labels, observed=np.ones_like(labels), vectors=vectors)


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


def mulcon():
    """The files' names as `published.read_files` joins them: one letter, or C and its label, for each network."""
    state = numbered(trunk("E."), "E.")
    parts = {"A": "netA", "P": "netP", **{f"C_{i}": "netC" for i in range(80)}}
    for part, title in parts.items():
        state |= {f"{part}.{k}": v for k, v in released_names.state_dict(f"MulCon {title}").items()}
    return state


# words of the config, and the state dict
FILES = {
    "ssgrl": ("coco2014", lambda: released_names.state_dict("SSGRL", "resnet_101.")),
    "mcar": ("coco2014", lambda: numbered(released_names.state_dict("MCAR", "features."), "features.")),
    "csra": ("coco2014", lambda: released_names.state_dict("CSRA ResNet-101") | trunk()),
    "sst": ("coco2014,known=0.1", lambda: released_names.state_dict("HCP-MLR-PL SST", "backbone.")),
    "sarb": ("coco2014,known=0.1", lambda: released_names.state_dict("HCP-MLR-PL SARB", "backbone.")),
    "mulcon": ("coco2014", mulcon),
}
TITLES = {
    "ssgrl": ["SSGRL"],
    "mcar": ["MCAR"],
    "csra": ["CSRA ResNet-101"],
    "sst": ["HCP-MLR-PL SST"],
    "sarb": ["HCP-MLR-PL SARB"],
    "mulcon": [f"MulCon net{part}" for part in "EACP"],
}


@pytest.mark.parametrize("name", FILES)
def test_full_size_names_and_shapes_are_those_of_the_released_files(name):
    words, made = FILES[name]
    state = made()
    counters = sum(key.endswith("running_mean") for key in state)  # counted, not listed
    parts = {title: released_names.total(title) for title in TITLES[name]}
    assert len(state) + counters == sum(n * (80 if "netC" in title else 1) for title, n in parts.items())
    config = read_config(f"configs/{name}.py:{words}").unlock()
    if name == "csra":
        config.system.heads = 1  # of the file that is listed
    released_names.fits(config, meta(), state)
