"""Trees of arrays: leaves by their paths "a/b/c", and the strict merge of loaded arrays into a model's."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mljax.errors import UserError, nearest

MAX_LINES = 40  # of a difference that is shown


def flatten(tree: Any) -> dict[str, Any]:
    """{"a": {"b": x}} -> {"a/b": x}, in the order of jax's leaves; for any pytree, empty parts left out."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def map_named(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`jax.tree.map` of function("a/b", leaf, ..)."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(path_name(path), *leaves), tree, *rest)


def path_name(path: Any) -> str:
    """A path of jax.tree_util as "a/b/c", the one form in which mljax names leaves."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


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
    """Loaded arrays in place of a model's; structure and shapes must be equal.

    Args:
      init: nested dict of arrays, as `model.init` gives.
      loaded: nested dict of arrays.
      skip: regular expressions, searched in the paths "layer1_0/conv1/kernel". What they match stays as it is in
        `init`, and is left out of `loaded`.
    Returns:
      A nested dict with the structure and dtypes of `init`. Loaded arrays are copied.
    Raises:
      UserError: several lines: "-" of the model alone, "+" of the weights alone. Or a pattern of `skip` is not a
        regular expression, or matches nothing.
    """
    skipped = check(init, loaded, skip=skip)
    arrays = flatten(loaded)
    return map_named(lambda path, leaf: leaf if path in skipped else _like(arrays[path], leaf), dict(init))


def check(init: Mapping[str, Any], loaded: Mapping[str, Any], *, skip: Sequence[str] = ()) -> set[str]:
    """The paths that are skipped; raises as `merge` does, and copies nothing. `init` may hold shapes alone."""
    shapes = [{path: tuple(leaf.shape) for path, leaf in flatten(tree).items()} for tree in (init, loaded)]
    skipped = _matches(skip, {*shapes[0], *shapes[1]})
    model, weights = ({path: shape for path, shape in tree.items() if path not in skipped} for tree in shapes)
    if model != weights:
        raise UserError(
            "The weights do not fit the model (- in the model only, + in the weights only; skip what may differ):",
            _difference(model, weights),
        )
    return skipped


def _matches(patterns: Sequence[str], paths: set[str]) -> set[str]:
    """The paths that any of the patterns is found in."""
    if isinstance(patterns, str):
        raise UserError(f"The list of patterns to skip is one string, {patterns!r}; write ({patterns!r},).")
    matches: set[str] = set()
    for pattern in patterns:
        try:
            new = {path for path in paths if re.search(pattern, path)}
        except re.error as error:
            raise UserError(
                f"The pattern {pattern!r} to skip is not a regular expression ({error}); correct it."
            ) from None
        if not new:
            raise UserError(f"The pattern {pattern!r} to skip matches no parameter{nearest(pattern, paths)}.")
        matches |= new
    return matches


def _difference(model: Mapping[str, tuple[int, ...]], weights: Mapping[str, tuple[int, ...]]) -> list[str]:
    lines = []
    for path in sorted({*model, *weights}):
        if model.get(path) != weights.get(path):
            lines += [f"- {path} {model[path]}"] if path in model else []
            lines += [f"+ {path} {weights[path]}"] if path in weights else []
    return lines[:MAX_LINES] + ([f"... and {len(lines) - MAX_LINES} more"] if len(lines) > MAX_LINES else [])


def _like(value: Any, leaf: Any) -> Any:
    """The value as an array of the kind and dtype of `leaf`; a copy, since the value may be a view of a file."""
    if isinstance(leaf, np.ndarray):
        return np.array(value, leaf.dtype)
    return jnp.array(np.asarray(value).astype(leaf.dtype, copy=False), copy=True)
