"""Annotated shapes are checked while tests run: in functions, and in what a room is made of."""

import sys

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

SOURCE = """
import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

def total(x: Float[Array, "b l"], y: Float[Array, "b"] | None = None, name: str = "") -> Float[Array, "b"]:
    return x.sum(1) if name != "wrong" else x.sum(0)

class Head(nn.Module):
    labels: int

    @nn.compact
    def __call__(self, x: Float[Array, "b d"], *, train: bool = False) -> Float[Array, "b l"]:
        return nn.Dense(self.labels)(x)

@dataclasses.dataclass
class Pair:
    first: Float[Array, "n"]
    second: Float[Array, "n"]
"""


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    folder = tmp_path_factory.mktemp("room")
    (folder / "a_room.py").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch, jaxtyping.install_import_hook("a_room", "shapes.checked"):
        patch.syspath_prepend(str(folder))
        import a_room

        yield a_room
        del sys.modules["a_room"]


def ones(*shape, dtype=np.float32):
    return jnp.ones(shape, dtype)


def test_arguments_and_results_of_functions(room):
    assert room.total(ones(2, 3), ones(2), 5).shape == (2,)  # only arrays are checked
    for arguments in [(ones(2),), (ones(2, 3), ones(3)), (ones(2, 3, dtype=int),), (ones(2, 3), None, "wrong")]:
        with pytest.raises(jaxtyping.TypeCheckError, match="total"):
            room.total(*arguments)


def test_modules_and_dataclasses(room):
    head = room.Head(4)
    variables = head.init(jax.random.key(0), ones(2, 3))
    assert jax.jit(head.apply)(variables, ones(5, 3)).shape == (5, 4)
    with pytest.raises(jaxtyping.TypeCheckError, match="__call__"):
        head.apply(variables, ones(2, 1, 3))
    room.Pair(ones(3), ones(3))
    with pytest.raises(jaxtyping.TypeCheckError):
        room.Pair(ones(3), ones(2))


def test_the_rooms_of_mljax_are_checked():
    from mljax.backbones import small
    from mljax.losses import elementwise
    from mljax.systems import cmsg

    for module in (small, elementwise, cmsg):
        assert type(module.__loader__).__module__ == "jaxtyping._import_hook", module
