"""The strict merge of loaded arrays into a model's own: nothing is left out in silence."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mljax.errors import UserError, nearest

MAX_LINES = 40  # of a difference that is shown


def flatten(tree: Mapping[str, Any], start: str = "") -> dict[str, Any]:
    """{"a": {"b": x}} -> {"a/b": x}."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{start}{key}/") if isinstance(value, Mapping) else {f"{start}{key}": value}
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": x} -> {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        at = tree
        for parent in parents:
            at = at.setdefault(parent, {})
        at[leaf] = value
    return tree


def merge(init: Mapping[str, Any], loaded: Mapping[str, Any], *, skip: Sequence[str] = ()) -> dict[str, Any]:
    """Loaded arrays in the place of the initial ones; structure and shapes must be equal.

    Args:
      init: nested dict of arrays, as `model.init` gives.
      loaded: nested dict of arrays.
      skip: regular expressions, searched in the paths "layer1_0/conv1/kernel". What they match stays as it is in
        `init`, and is left out of `loaded`.
    Returns:
      A nested dict with the structure and dtypes of `init`. Loaded arrays are copied.
    Raises:
      UserError: several lines: "-" the model wants, "+" the weights have. Or a pattern of `skip` is wrong or matches
        nothing.
    """
    skipped = check(init, loaded, skip=skip)
    wanted, given = flatten(init), flatten(loaded)
    return nest({path: own if path in skipped else _like(given[path], own) for path, own in wanted.items()})


def check(init: Mapping[str, Any], loaded: Mapping[str, Any], *, skip: Sequence[str] = ()) -> set[str]:
    """The paths that are skipped; raises as `merge` does, and copies nothing. `init` may hold shapes alone."""
    wanted, given = flatten(init), flatten(loaded)
    skipped = _matches(skip, {*wanted, *given})
    wanted_shapes = {path: tuple(value.shape) for path, value in wanted.items() if path not in skipped}
    given_shapes = {path: tuple(value.shape) for path, value in given.items() if path not in skipped}
    if wanted_shapes != given_shapes:
        raise UserError(_difference(wanted_shapes, given_shapes))
    return skipped


def _matches(patterns: Sequence[str], paths: set[str]) -> set[str]:
    """The paths that any of the patterns is found in."""
    if isinstance(patterns, str):
        raise UserError(f"What to skip is a list of patterns, and {patterns!r} is one string; write ({patterns!r},).")
    found: set[str] = set()
    for pattern in patterns:
        try:
            mine = {path for path in paths if re.search(pattern, path)}
        except re.error as error:
            raise UserError(f"The pattern {pattern!r} of what to skip is no regular expression ({error}).") from None
        if not mine:
            raise UserError(f"The pattern {pattern!r} of what to skip matches no parameter{nearest(pattern, paths)}.")
        found |= mine
    return found


def _difference(wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]) -> str:
    lines = []
    for path in sorted({*wanted, *given}):
        if wanted.get(path) != given.get(path):
            lines += [f"- {path} {wanted[path]}"] if path in wanted else []
            lines += [f"+ {path} {given[path]}"] if path in given else []
    shown = lines[:MAX_LINES] + ([f"... and {len(lines) - MAX_LINES} more"] if len(lines) > MAX_LINES else [])
    head = "The weights do not fit the model (- it wants, + they have; name what may differ as skipped):"
    return "\n".join([head, *shown])


def _like(value: Any, own: Any) -> Any:
    """The value as an array of the same kind and dtype; a copy, since the value may be a view of a file."""
    if isinstance(own, np.ndarray):
        return np.array(value, own.dtype)
    return jnp.array(np.asarray(value).astype(own.dtype, copy=False), copy=True)
