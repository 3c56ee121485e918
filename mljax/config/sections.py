"""Checks of a config that import nothing heavy: keys, types and ranges that every experiment has, and its names.

`mljax.check` goes on from here, with the settings of what the names stand for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mljax.build import SECTIONS, accepted, check_keys, listed, owners, unknown
from mljax.config.base import base
from mljax.errors import UserError, nearest, one_of

if TYPE_CHECKING:
    from mljax.types import Config

SMOKE = {"data": "scenes", "backbone": "small"}  # what the word `smoke` puts in the place of what other words name
OPEN = (*SECTIONS, "input.train", "input.eval")  # sections whose keys are keywords of what they build
TRAINED = ("epochs", "batch_size")  # keys of config.optim that the trainer reads
OPTIM = (  # keys of config.optim that every optimizer shares
    *("name", "lr", "schedule", "weight_decay", "no_decay", "groups", "clip_norm", "accumulate", *TRAINED),
)
OF_DATA: dict[str, tuple[str, ...]] = {  # keys of config.data for every reader -> their values, the default first
    "digest": ("sampled", "whole", "none"),
    "changed": ("refuse", "accept"),
}
GIVEN = {  # keywords of constructors that come from elsewhere
    *("split", "training", "backbone", "criterion", "meta", "dtype", "axis", "source", "steps_per_epoch"),
    *("logits", "labels", "observed", "mask"),
}

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
    "eval.scored_in": ("AP", "all"),
    "start": ("last", "best", "ema"),
}
WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", tuple: "a tuple"}


def check_sections(config: Config) -> dict[str, Any]:
    """The config of a run or of one of its stages as a dict, checked as far as that needs no other module.

    Raises:
      UserError: the first key that is missing, unknown, of another type or out of its range, or a wrong name.
    """
    values = config.to_dict()
    _section(values, base().to_dict(), "")
    for key, (least, most) in RANGES.items():
        value = at(values, key)
        if value is not None and not (fits(value, 0.0) and least <= value <= most):
            shown = (
                f"at least {least:g}" if most == math.inf else f"from {least:g} to {'below 1' if most < 1 else most}"
            )
            raise UserError(f"config.{key} is {value!r}; it must be {shown}.")
    for key, options in CHOICES.items():
        one_of(f"config.{key}", at(values, key), options)
    for key, options in OF_DATA.items():
        if isinstance(values["data"], Mapping) and key in values["data"]:
            one_of(f"config.data.{key}", values["data"][key], options)
    for key, kind in SECTIONS.items():
        if key == "optim.schedule" and "schedule" not in values["optim"]:
            continue
        check_named(at(values, key), kind, f"config.{key}", values["experiment"])
    net, where = values["system"], "config.system"
    while isinstance(net, Mapping) and "net" in net:  # the system inside one that works around another
        net, where = net["net"], f"{where}.net"
        if not isinstance(net, Mapping) or not isinstance(net.get("name"), str):
            raise UserError(f"{where} is {net!r}; expected the section of a system, {{'name': .., and its settings}}.")
        check_named(net, "systems", where)
    return values


def check_named(section: Mapping[str, Any], kind: str, where: str, words: str = "") -> None:
    """A section names one of its kind, and sets what this one has, as far as its source tells.

    Args:
      words: of the experiment, for a hint if `smoke` changed the name.
    """
    name = section.get("name", "adam" if kind == "optim" else None)
    if not isinstance(name, str):
        raise UserError(f"{where}.name is {name!r}; it must be a name{nearest('', listed(kind))}.")
    if name not in listed(kind):
        raise unknown(kind, name)
    allowed = accepted(kind, name)
    if allowed is None:
        return
    shared = {"optim": OPTIM, "losses": ("name", "reduction"), "data": ("name", *OF_DATA)}.get(kind, ("name",))
    why = smoke_hint(words, name) if name == SMOKE.get(where.removeprefix("config.")) else ""
    for key in section:
        if key not in shared:
            more = why or _schedules_with(kind, key) or owners(kind, key)
            check_keys(f"{where} ({name!r})", [key], allowed - GIVEN, others=shared, why=more)


def _schedules_with(kind: str, key: str) -> str:
    """Where a setting of an optimizer belongs that is one of a schedule."""
    has = sorted(n for n in listed("optim.schedules") if key in (accepted("optim.schedules", n) or ()))
    if kind != "optim" or not has:
        return ""
    return f"; it is a setting of the schedule {' and '.join(map(repr, has))}: config.optim.schedule.{key}"


def smoke_hint(words: str, name: str) -> str:
    """Why a section is not what the words of a config name, if the word `smoke` is the cause."""
    others = [word for word in words.split(",") if word != "smoke"]
    if not others or len(others) == len(words.split(",")):
        return ""
    return f"; the word 'smoke' has put {name!r} in the place of what {','.join(others)!r} names, so leave 'smoke' out"


def _section(section: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    """Keys and types, section by section; the keys of an open section are its constructor's."""
    for key in section:
        if key not in known and where.rstrip(".") not in OPEN:
            raise UserError(f"There is no key config.{where}{key}{nearest(key, known)}.")
    for key, expected in known.items():
        path = f"{where}{key}"
        if isinstance(expected, Mapping):
            value = section.get(key, {} if path == "optim.schedule" else None)
            if not isinstance(value, Mapping):
                raise UserError(f"config.{path} is {value!r}; expected a section, whose keys are set one by one.")
            if path not in OPEN or path == "optim":
                _section(value, expected, f"{path}.")
        elif key not in section:
            if where != "optim." or key in TRAINED:
                raise UserError(f"There is no config.{path}; start a config from mljax.config.base().")
        elif not fits(section[key], expected):
            raise UserError(
                f"config.{path} is {section[key]!r}; it must be {WORDS[type(expected)]}, like {expected!r}."
            )


def fits(value: Any, expected: Any, optional: bool = False) -> bool:
    if value is None and optional:
        return True
    if expected is None or (isinstance(expected, tuple) and isinstance(value, list)):
        return True
    if isinstance(value, bool) or isinstance(expected, bool):
        return type(value) is type(expected)
    if isinstance(expected, float):
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, type(expected))


def at(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value[part]
    return value
