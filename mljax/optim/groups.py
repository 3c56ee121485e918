"""Regex groups of parameters: which one takes which parameter, at which rate and weight decay.

Paths of parameters are written "backbone/layer1/conv/kernel".
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mljax.build import check_keys
from mljax.errors import UserError, nearest
from mljax.trees import flatten

Groups = Sequence[tuple[str, Mapping[str, Any]]]


class Leaf(NamedTuple):
    """How one parameter is trained."""

    group: str  # the pattern that took it, "" for none
    lr: float  # factor of the schedule
    weight_decay: float
    frozen: bool


def freeze_matching(params: Any, patterns: Sequence[str], at: str = "backbone") -> Groups:
    """The group of what a backbone's `frozen_parameters()` names: patterns of paths below `at`, wherever that lies."""
    frozen = []
    for path in flatten(params):
        below = re.split(f"(?:^|/){re.escape(at)}/", path, maxsplit=1)[1:]
        if below and any(re.search(pattern, below[0]) for pattern in patterns):
            frozen.append(re.escape(path))
    return ((f"^({'|'.join(frozen)})$", {"frozen": True}),) if frozen else ()


LABEL_TABLE = "label_table"  # last name of a parameter that holds what is learnt of each training example's labels


def label_tables(params: Any, groups: Groups = ()) -> Groups:
    """The group of tables of estimated labels: ten times the rate (Cole et al., CVPR 2021), and no weight decay.

    Empty where there is none, or where a group's pattern names them itself.
    """
    learnt = any(path.rsplit("/", 1)[-1] == LABEL_TABLE for path in flatten(params))
    if not learnt or any(LABEL_TABLE in pattern for pattern, _ in groups):
        return ()
    return ((f"(^|/){LABEL_TABLE}$", {"lr": 10.0, "weight_decay": 0.0}),)


def without_label_tables(params: Any) -> Any:
    """Nested dicts of parameters but for tables of estimated labels: what a moving average is taken of."""
    if not isinstance(params, Mapping):
        return params
    return {name: without_label_tables(tree) for name, tree in params.items() if name != LABEL_TABLE}


def assign(
    params: Any, groups: Groups = (), *, weight_decay: float = 0.0, no_decay: Sequence[str] = ()
) -> dict[str, Leaf]:
    """Which group takes which parameter: the first whose pattern is found in its path.

    Args:
      params: tree of arrays, or of their shapes.
      groups: ((regex, {"lr": factor, "weight_decay": value, "frozen": bool}), ..), each key optional.
      weight_decay: of parameters whose group names none.
      no_decay: last names of paths ("bias", "scale"), or "1-D": of at most one axis. Wins over groups.
    Raises:
      UserError: a pattern that takes no parameter, a key that does not exist, nothing left to train.
    """
    shapes = flatten(params)
    taken: dict[str, tuple[str, dict[str, Any]]] = {}
    for pattern, options in map(check_group, groups):
        matches = [path for path in shapes if re.search(pattern, path)]
        fresh = [path for path in matches if path not in taken]
        if not matches:
            raise UserError(
                f"The group {pattern!r} of config.optim.groups matches no parameter{_near(pattern, shapes)}."
            )
        if not fresh:
            raise UserError(
                f"The group {pattern!r} of config.optim.groups comes too late: all its parameters belong to"
                " earlier groups; move it up."
            )
        taken |= dict.fromkeys(fresh, (pattern, options))
    spared = _spared(shapes, no_decay)
    leaves = {}
    for path in shapes:
        pattern, options = taken.get(path, ("", {}))
        decay = 0.0 if path in spared else float(options.get("weight_decay", weight_decay))
        leaf = Leaf(pattern, float(options.get("lr", 1.0)), decay, False)
        leaves[path] = Leaf(pattern, 0.0, 0.0, True) if options.get("frozen", False) else leaf
    if all(leaf.frozen for leaf in leaves.values()):
        raise UserError("The groups of config.optim.groups freeze every parameter; leave at least one to train.")
    return leaves


def all_groups(params: Any, frozen: Sequence[str], own: Groups = ()) -> Groups:
    """The groups of a training: what the backbone keeps frozen, tables of estimated labels, then the config's own."""
    return (*freeze_matching(params, frozen), *label_tables(params, own), *own)


def frozen_paths(params: Any, frozen: Sequence[str], own: Groups = ()) -> set[str]:
    """The parameters that get no updates, of the same."""
    return {path for path, leaf in assign(params, all_groups(params, frozen, own)).items() if leaf.frozen}


def check_group(group: Any) -> tuple[str, dict[str, Any]]:
    """A pattern and its settings, as they are.

    Raises:
      UserError: the group is something else.
    """
    pair = isinstance(group, tuple | list) and len(group) == 2
    if not (pair and isinstance(group[0], str) and isinstance(group[1], Mapping)):
        raise UserError(f"config.optim.groups has the entry {group!r}; expected (pattern, {{its settings}}).")
    pattern, options = group
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"The group {pattern!r} of config.optim.groups is not a regular expression: {error}.") from None
    options = dict(options)
    check_keys(f"The group {pattern!r} of config.optim.groups", options, ("lr", "weight_decay", "frozen"))
    for key, value in options.items():
        if not (isinstance(value, int | float) and value >= 0):
            raise UserError(f"The group {pattern!r} of config.optim.groups has {key}={value!r}; it must be at least 0.")
    return pattern, options


def _near(pattern: str, names: Iterable[str]) -> str:
    """A hint among all paths, their beginnings and their parts; else the top names."""
    parts = [name.split("/") for name in names]
    whole = {"/".join(p[:i]) for p in parts for i in range(1, len(p) + 1)} | {name for p in parts for name in p}
    word = re.sub(r"[\^$.*?()\\]", "", pattern).strip("/")
    close = difflib.get_close_matches(word, sorted(whole), n=1)
    return nearest(word, close if close else {p[0] for p in parts})


def _spared(shapes: Mapping[str, Any], no_decay: Sequence[str]) -> set[str]:
    spared = set()
    for name in (no_decay,) if isinstance(no_decay, str) else no_decay:
        last = {path: path.rsplit("/", 1)[-1] for path in shapes}
        matches = {p for p in shapes if (np.ndim(shapes[p]) <= 1 if name == "1-D" else last[p] == name)}
        if not matches:
            hint = nearest(name, {"1-D", *last.values()})
            raise UserError(f"config.optim.no_decay names {name!r} and no parameter ends in that{hint}.")
        spared |= matches
    return spared
