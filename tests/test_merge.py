"""The strict merge."""

import jax.numpy as jnp
import numpy as np
import pytest

from mljax.errors import UserError
from mljax.trees import merge


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
    with pytest.raises(UserError, match="no regular expression"):
        merge(init, loaded, skip=("(",))
    with pytest.raises(UserError, match="is one string"):
        merge(init, loaded, skip="head")
