"""Paths of leaves, and the strict merge."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mljax.errors import UserError
from mljax.trees import flatten, map_named, merge, nest


def trees():
    init = {"stem": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}, "head": {"w": jnp.ones((3, 4), jnp.bfloat16)}}
    loaded = {
        "stem": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.ones(3, np.float32)},
        "head": {"w": np.full((3, 4), 2, np.float32)},
    }
    return init, loaded


def test_merge_copies_into_the_structure_and_dtypes_of_the_model():
    init, loaded = trees()
    merged = merge(init, loaded)
    np.testing.assert_array_equal(merged["stem"]["kernel"], [[0, 1, 2], [3, 4, 5]])
    assert merged["head"]["w"].dtype == jnp.bfloat16 and float(merged["head"]["w"][0, 0]) == 2
    loaded["stem"]["kernel"][:] = 9  # the copy does not see it
    assert float(merged["stem"]["kernel"][0, 0]) == 0


def test_merge_lists_both_sides():
    init, loaded = trees()
    loaded["head"]["w"] = np.zeros((3, 5), np.float32)
    loaded["extra"] = {"x": np.zeros(2, np.float32)}
    del loaded["stem"]["bias"]
    with pytest.raises(UserError) as error:
        merge(init, loaded)
    assert str(error.value).splitlines()[1:] == [
        "+ extra/x (2,)",
        "- head/w (3, 4)",
        "+ head/w (3, 5)",
        "- stem/bias (3,)",
    ]
    merged = merge(init, loaded, skip=("^head/", "^extra", "bias"))
    assert float(merged["head"]["w"][0, 0]) == 1 and "extra" not in merged
    np.testing.assert_array_equal(merged["stem"]["bias"], np.zeros(3))
    np.testing.assert_array_equal(merged["stem"]["kernel"], loaded["stem"]["kernel"])


def test_merge_refuses_patterns_that_are_wrong_or_match_nothing():
    init, loaded = trees()
    with pytest.raises(UserError, match="matches no parameter"):
        merge(init, loaded, skip=("haed/w",))
    with pytest.raises(UserError, match="not a regular expression"):
        merge(init, loaded, skip=("(",))
    with pytest.raises(UserError, match="is one string"):
        merge(init, loaded, skip="head")


class Pair(NamedTuple):
    one: int
    two: list[int]


def test_leaves_have_one_form_of_path():
    """Of dicts, lists and named tuples alike, in the order of jax's leaves."""
    tree = {"b": Pair(1, [2, 3]), "a": {"x": 4, "nothing": {}}}
    assert list(flatten(tree).items()) == [("a/x", 4), ("b/one", 1), ("b/two/0", 2), ("b/two/1", 3)]
    assert list(flatten(tree).values()) == jax.tree.leaves(tree)
    named = map_named(lambda path, leaf, other: (path, leaf + other), tree, tree)
    assert named["b"].two[1] == ("b/two/1", 6) and named["a"]["x"] == ("a/x", 8)
    assert nest({"a/b/c": 1, "a/d": 2}) == {"a": {"b": {"c": 1}, "d": 2}}
