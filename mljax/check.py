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

from mljax.build import find, keywords, names, settings
from mljax.config.base import base
from mljax.data import observe
from mljax.errors import UserError, nearest
from mljax.layers import ACTIVATIONS
from mljax.losses.criterion import Criterion
from mljax.metrics import DEFINITIONS
from mljax.optim.optimizer import METRICS, optimizer
from mljax.pipeline import feature_cache, transforms
from mljax.types import Config

KINDS = {"data": "data", "backbone": "backbones", "system": "systems"}  # `loss` is checked by criterion
SMOKE = {"data": "scenes", "backbone": "small"}  # what the word `smoke` puts in the place of what other words name
OPEN = (*KINDS, "observe", "loss", "optim", "input.train", "input.eval")  # their keys: keywords of what they build

# key: the least and the largest value
RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**31 - 1),
    "devices": (1, math.inf),
    "input.size": (1, 2**13),
    "input.views": (1, math.inf),
    "input.threads": (0, math.inf),
    "input.workers": (0, math.inf),
    "cache.limit_gb": (0, math.inf),
    "optim.epochs": (1, math.inf),
    "optim.batch_size": (1, math.inf),
    "ema": (0, 1 - 1e-9),
    "eval.every": (1, math.inf),
    "eval.batch_size": (1, math.inf),
    "log_every": (1, math.inf),
}
CHOICES: dict[str, tuple[str, ...]] = {
    "parallel": ("jit", "pmap"),
    "dtype": ("float32", "bfloat16"),
    "eval.select": ("last", "best", "best_of_raw_and_ema"),
    "eval.definition": DEFINITIONS,
    "eval.scored_in": ("AP", "all"),
    "start": ("last", "best", "ema"),
}
SIZES: dict[str, tuple[int, float]] = {  # of settings that systems and backbones share: least value, and bound
    r"(^|_)layers$": (0, math.inf),
    r"(^|_)(width|heads|ffn|hidden)$": (1, math.inf),
    r"^(dropout|drop_path)$": (0, 1),
}
GIVEN = {  # keywords of constructors that come from elsewhere
    *("split", "training", "backbone", "criterion", "meta", "dtype", "axis"),
    *("params", "total_steps", "steps_per_epoch", "source"),
}
WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", tuple: "a tuple"}


def check(config: Config) -> None:
    """The config of a run or of one of its stages, against the keys that every experiment has.

    Raises:
      UserError: the first key that is missing, unknown, of another type, or out of its range.
    """
    found = config.to_dict()
    _section(found, base().to_dict(), "")
    for key, (least, most) in RANGES.items():
        value = _at(found, key)
        if value is not None and not (_fits(value, 0.0) and least <= value <= most):
            shown = (
                f"at least {least:g}" if most == math.inf else f"from {least:g} to {'below 1' if most < 1 else most}"
            )
            raise UserError(f"config.{key} is {value!r}; it must be {shown}.")
    for key, options in CHOICES.items():
        value = _at(found, key)
        if value not in options:
            raise UserError(f"config.{key} is {value!r}{nearest(value, options)}.")
    for key, kind in KINDS.items():
        name = found[key].get("name")
        if not isinstance(name, str):
            raise UserError(f"config.{key}.name is {name!r}; it must be a name{nearest('', names(kind))}.")
        why = _smoke(found["experiment"], name) if name == SMOKE.get(key) else ""
        _settings(found[key], find(kind, name), f"config.{key} ({name!r})", ("name",), why)
    _inner(found["system"], "config.system")
    name = observe.check(found["observe"])
    _settings(found["observe"], observe.NAMES[name], f"config.observe ({name!r})", ("name",))
    _settings(found["optim"], optimizer, "config.optim", ("epochs", "batch_size", "metric"))
    if (watched := found["optim"].get("metric", "mAP")) not in METRICS:
        raise UserError(f"config.optim.metric is {watched!r}{nearest(watched, METRICS)}.")
    if not isinstance(found["weights"]["name"], str | None):
        raise UserError(f"config.weights.name is {found['weights']['name']!r}; it must be a record's name or a file.")
    _pixels(found["weights"])
    Criterion.from_config(found["loss"])
    settings(transforms.train, found["input"]["train"], "config.input.train", size=found["input"]["size"])
    settings(transforms.evaluate, found["input"]["eval"], "config.input.eval", size=found["input"]["size"])
    for text in (*found["cache"]["train_views"], *found["cache"]["eval_views"]):
        feature_cache.view(str(text))


def _pixels(section: Mapping[str, Any]) -> None:
    """Mean and std that a config gives in place of its weights' own."""
    for key, least in (("mean", -math.inf), ("std", 0.0)):
        value = section[key]
        if value and (len(value) != 3 or not all(_fits(x, 0.0) and x > least for x in value)):
            raise UserError(
                f"config.weights.{key} is {value!r}; it must be three numbers{' above 0' if key == 'std' else ''}, for"
                " red, green and blue in [0, 1], or empty for those of the weights."
            )


def _inner(section: Mapping[str, Any], where: str) -> None:
    """The system in the `net` of one that works around another."""
    if "net" not in section:
        return
    net, where = section["net"], f"{where}.net"
    if not isinstance(net, Mapping) or not isinstance(net.get("name"), str):
        raise UserError(f"{where} is {net!r}; it is the section of a system, {{'name': .., and its settings}}.")
    _settings(net, find("systems", net["name"]), f"{where} ({net['name']!r})", ("name",))
    _inner(net, where)


def _smoke(words: str, name: str) -> str:
    """Why a section is not what the words of a config name, if the word `smoke` is the cause."""
    others = [word for word in words.split(",") if word != "smoke"]
    if not others or len(others) == len(words.split(",")):
        return ""
    return f"; the word 'smoke' has put {name!r} in the place of what {','.join(others)!r} names, so leave 'smoke' out"


def _settings(section: Any, constructor: Callable[..., Any], where: str, own: tuple[str, ...], why: str = "") -> None:
    """An open section: its keys are the constructor's keywords and `own`, its values of their types.

    Args:
      why: what the sentence on an unknown key ends with.
    """
    known = {k: p for k, p in keywords(constructor).items() if k not in GIVEN}
    for key, value in section.items():
        if key in own:
            continue
        if key not in known:
            raise UserError(f"{where} has no setting {key!r}{nearest(key, {*known, *own})}{why}.")
        kinds = _kinds(known[key].annotation)
        optional = known[key].default is None or str in kinds  # a file to be named: its reader says so
        if kinds and not any(_fits(value, kind(), optional) for kind in kinds):
            raise UserError(f"{where} has {key}={value!r}; it must be {' or '.join(WORDS[kind] for kind in kinds)}.")
        for pattern, (least, below) in SIZES.items():
            if re.search(pattern, key) and _fits(value, 0.0) and not least <= value < below:
                limits = f"at least {least}" if below == math.inf else f"from {least} to below {below}"
                raise UserError(f"{where} has {key}={value!r}; it must be {limits}.")
        if key == "activation" and value not in ACTIVATIONS:
            raise UserError(f"{where} has activation={value!r}{nearest(value, ACTIVATIONS)}.")


def _kinds(annotation: Any) -> tuple[type, ...]:
    """The types of WORDS that an annotation allows; none where it allows others too."""
    found = []
    for part in typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,):
        if part is type(None):
            continue
        origin = typing.get_origin(part) or part
        kind = tuple if origin in (tuple, list, Sequence) else origin
        if kind not in WORDS:
            return ()
        found.append(kind)
    return tuple(found)


def _section(section: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    """Keys and types, section by section; the keys of an open section are its constructor's."""
    for key in section:
        if key not in known and where.rstrip(".") not in OPEN:
            raise UserError(f"There is no key config.{where}{key}{nearest(key, known)}.")
    for key, expected in known.items():
        path = f"{where}{key}"
        if isinstance(expected, Mapping):
            value = section.get(key)
            if not isinstance(value, Mapping):
                raise UserError(f"config.{path} is {value!r}; it is a section, whose keys are set one by one.")
            if path not in OPEN or path == "optim":
                _section(value, expected, f"{path}.")
        elif key not in section:
            if where != "optim." or key in ("epochs", "batch_size"):
                raise UserError(f"There is no config.{path}; start a config from mljax.config.base().")
        elif not _fits(section[key], expected):
            raise UserError(
                f"config.{path} is {section[key]!r}; it must be {WORDS[type(expected)]}, like {expected!r}."
            )


def _fits(value: Any, expected: Any, optional: bool = False) -> bool:
    if value is None and optional:
        return True
    if expected is None or (isinstance(expected, tuple) and isinstance(value, list)):
        return True
    if isinstance(value, bool) or isinstance(expected, bool):
        return type(value) is type(expected)
    if isinstance(expected, float):
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, type(expected))


def _at(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value[part]
    return value
