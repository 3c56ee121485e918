"""Names and shapes of the authors' state dicts as checkpoints.md lists them, as arrays that take no memory."""

import itertools
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import toy
from mljax import experiment
from mljax.trees import check, nest
from mljax.weights import published
from mljax.weights.convert import convert
from toy import data_root

PLACEHOLDER = np.int8(0)  # integers keep their dtype in a conversion: a byte a number


def state_dict(title, trunk=""):
    """{name: array} of the section whose title begins so; `trunk`: another section's names, under this prefix."""
    root = data_root()
    path = root.parent / "checkpoints.md" if root else None
    if path is None or not path.is_file():
        pytest.skip("checkpoints.md is not on this machine")
    sections = dict(re.findall(r"^### (.*?)\n(.*?)(?=^##|\Z)", path.read_text(), flags=re.M | re.S))
    own = _names(_section(sections, title))
    if trunk:
        own |= {trunk + name: value for name, value in _names(_section(sections, "R101")).items()}
    return own


def total(title):
    """How many tensors a section's title says it has."""
    text = (data_root().parent / "checkpoints.md").read_text()
    return int(re.search(rf"^### {re.escape(title)}.*?(\d+) tensors", text, flags=re.M)[1])


def fits(config, meta, state):
    """Every array of a full-size state dict finds its place, every parameter is filled, and shapes agree."""
    run = experiment.assemble(config, meta, toy.PLAIN)
    batch = experiment.example_batch(run, 1)
    shapes = jax.eval_shape(lambda: run.system.init(jax.random.key(0), run.prepare(batch)))
    trunk, _ = published.split(state, published.of(run.system))
    flat = convert(trunk, config.backbone.name, Path("released.pth"))
    given = published.convert_head(state, run.system)
    for collection, own in shapes.items():
        backbone = nest(
            {k.removeprefix(f"{collection}/"): v for k, v in flat.items() if k.startswith(f"{collection}/")}
        )
        check(own, given.get(collection, {}) | ({"backbone": backbone} if "backbone" in own else {}))


def _section(sections, title):
    return next(text for name, text in sections.items() if name.startswith(title))


def _names(text):
    found = {}
    for pattern, shape in re.findall(r"^- `(.*?)` \((.*?)\)", text, flags=re.M):
        sizes = tuple(int(n) for n in shape.split(",") if n.strip())
        for name in _expand(pattern):
            found[name] = np.broadcast_to(PLACEHOLDER, sizes)
    return found


def _expand(pattern):
    """ "a.{0-2,5}.{x,y}" -> a.0.x, a.0.y, a.1.x, .."""
    parts = re.split(r"\{(.*?)\}", pattern)
    choices = [[part] if i % 2 == 0 else _choices(part) for i, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _choices(text):
    found = []
    for item in text.split(","):
        low, dash, high = item.strip().partition("-")
        found += [str(i) for i in range(int(low), int(high) + 1)] if dash else [low]
    return found
