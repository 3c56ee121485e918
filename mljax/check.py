"""A config is checked whole before a run touches its folder: whatever is wrong with it is one sentence.

Here are the keys that every experiment has, their types and their ranges, and the keys of a section that names what it
builds; the values of those are checked where they are used.
"""

import math
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mljax.build import SECTIONS, check_keys, find, keywords, settings
from mljax.config.sections import GIVEN, OF_DATA, SMOKE, TRAINED, WORDS, check_sections, fits, smoke_hint
from mljax.data import observe
from mljax.errors import UserError, nearest, one_of
from mljax.layers import ACTIVATIONS
from mljax.losses.criterion import BATCH_LOSSES, Criterion
from mljax.metrics import DEFINITIONS
from mljax.optim import schedules
from mljax.optim.groups import check_group
from mljax.optim.optimizer import check_ranges, optimizer, rule
from mljax.pipeline import feature_cache, transforms
from mljax.types import Config

SIZES: dict[str, tuple[int, float]] = {  # of settings that systems and backbones share: least value, and bound
    r"(^|_)layers$": (0, 1000),
    r"(^|_)(width|heads|ffn|hidden)$": (1, math.inf),
    r"^(dropout|drop_path)$": (0, 1),
}


def check(config: Config) -> None:
    """The config of a run or of one of its stages, against the keys that every experiment has.

    Raises:
      UserError: the first key that is missing, unknown, of another type, or out of its range.
    """
    values = check_sections(config)
    one_of("config.eval.definition", values["eval"]["definition"], DEFINITIONS)
    for key in ("data", "backbone", "system"):
        name = values[key]["name"]
        why = smoke_hint(values["experiment"], name) if name == SMOKE.get(key) else ""
        section = {k: v for k, v in values[key].items() if key != "data" or k not in OF_DATA}
        _settings(section, find(SECTIONS[key], name), f"config.{key} ({name!r})", why)
    _inner(values["system"], "config.system")
    name = observe.check(values["observe"])
    _settings(values["observe"], observe.NAMES[name], f"config.observe ({name!r})")
    _optim(values["optim"])
    if not isinstance(values["weights"]["name"], str | None):
        raise UserError(f"config.weights.name is {values['weights']['name']!r}; it must be a record's name or a file.")
    _pixels(values["weights"])
    Criterion.from_config(values["loss"])
    _loss(values["loss"])
    settings(transforms.train, values["input"]["train"], "config.input.train", size=values["input"]["size"])
    settings(transforms.evaluate, values["input"]["eval"], "config.input.eval", size=values["input"]["size"])
    for text in (*values["cache"]["train_views"], *values["cache"]["eval_views"]):
        feature_cache.view(str(text))


def _optim(section: Mapping[str, Any]) -> None:
    """The optimizer and its schedule: settings that each has, of their types and in range."""
    constructor, own = rule(section)
    known = {**keywords(optimizer), **keywords(constructor)}
    where = f"config.optim ({section.get('name', 'adam')!r})"
    _values({k: v for k, v in section.items() if k not in (*TRAINED, "name", "schedule")}, known, where)
    check_ranges(section)
    for group in section.get("groups", ()):
        check_group(group)
    constructor(None, **own)
    schedule = section.get("schedule", schedules.DEFAULT)
    constructor, own = schedules.chosen(schedule)
    _values(own, keywords(constructor), f"{schedules.WHERE} ({schedule['name']!r})")
    epoch = 1000 * section.get("accumulate", 1)  # batches: any number shows whether the schedule is long enough
    constructor(schedules.Steps(section.get("lr", 1.0), epoch * section["epochs"], epoch), **own)


def _loss(section: Mapping[str, Any]) -> None:
    known = keywords(BATCH_LOSSES.get(section["name"]) or find("losses", section["name"]))
    _values({k: v for k, v in section.items() if k in known}, known, f"config.loss ({section['name']!r})")


def _pixels(section: Mapping[str, Any]) -> None:
    """Mean and std that a config gives in place of its weights' own."""
    for key, least in (("mean", -math.inf), ("std", 0.0)):
        value = section[key]
        if value and (len(value) != 3 or not all(fits(x, 0.0) and x > least for x in value)):
            raise UserError(
                f"config.weights.{key} is {value!r}; it must be three numbers{' above 0' if key == 'std' else ''}, for"
                " red, green and blue in [0, 1], or empty for those of the weights."
            )


def _inner(section: Mapping[str, Any], where: str) -> None:
    """The system in the `net` of one that works around another."""
    if "net" not in section:
        return
    net, where = section["net"], f"{where}.net"
    _settings(net, find("systems", net["name"]), f"{where} ({net['name']!r})")
    _inner(net, where)


def _settings(section: Mapping[str, Any], constructor: Callable[..., Any], where: str, why: str = "") -> None:
    """An open section: `name`, and keywords of the constructor with values of their types.

    Args:
      why: what the sentence on an unknown key ends with.
    """
    known = {k: p for k, p in keywords(constructor).items() if k not in GIVEN}
    chosen = {k: v for k, v in section.items() if k != "name"}
    check_keys(where, chosen, known, others=("name",), why=why)
    _values(chosen, known, where)


def _values(section: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    """Values of the types that the parameters of their names have, and in the ranges that such names share."""
    for key, value in section.items():
        kinds = _kinds(known[key].annotation)
        optional = known[key].default is None or str in kinds  # a file to be named: its reader says so
        if kinds and not any(fits(value, kind(), optional) for kind in kinds):
            raise UserError(f"{where} has {key}={value!r}; it must be {' or '.join(WORDS[kind] for kind in kinds)}.")
        for pattern, (least, below) in SIZES.items():
            if re.search(pattern, key) and fits(value, 0.0) and not least <= value < below:
                limits = f"at least {least}" if below == math.inf else f"from {least} to below {below}"
                raise UserError(f"{where} has {key}={value!r}; it must be {limits}.")
        if key == "activation" and value not in ACTIVATIONS:
            raise UserError(f"{where} has activation={value!r}{nearest(value, ACTIVATIONS)}.")


def _kinds(annotation: Any) -> tuple[type, ...]:
    """The types of WORDS that an annotation allows; none where it allows others too."""
    kinds = []
    for part in typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,):
        if part is type(None):
            continue
        origin = typing.get_origin(part) or part
        kind = tuple if origin in (tuple, list, Sequence) else origin
        if kind not in WORDS:
            return ()
        kinds.append(kind)
    return tuple(kinds)
