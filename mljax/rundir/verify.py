"""Reading the folder of a step: what comes back is what was saved, or an error says how it is damaged."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mljax.errors import UserError
from mljax.rundir import manifest, orbax, step_folders


class Damaged(UserError):
    """A checkpoint that is not what was saved.

    Attributes:
      step: its number.
      why: what is wrong with it.
    """

    def __init__(self, path: Path, why: str, others: Sequence[int] | None = None):
        self.step, self.why = int(path.name), why
        if others is None:
            others = [step for step in step_folders.complete(path.parent) if step != self.step]
        advice = (
            f"restore step {' or '.join(map(str, others))} instead, or delete {path}"
            if others
            else f"no other checkpoint there is sound; restore one from a backup, or delete {path.parent} to start anew"
        )
        super().__init__(f"The checkpoint of step {self.step} in {path.parent} is damaged ({why}); {advice}.")


def record(path: Path) -> dict[str, Any]:
    """The sealed record of a step.

    Raises:
      Damaged: it is not what was saved, or the folder has the number of another step.
      UserError: the machine cannot read it now.
    """
    with _reading(path, "its record cannot be read"):
        return manifest.read(path)


def arrays(path: Path, entries: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of a step by the entries of its record, {path: (dtype, shape, digest)}; raises as `record`."""
    shapes = {p: jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype)) for p, (dtype, shape, _) in entries.items()}
    with _reading(path, "its arrays cannot be read"):
        stored = orbax.read(path, shapes)
    leaves = {}
    for name, saved in shapes.items():
        leaf = stored.get(name) if saved.size else np.zeros(saved.shape, saved.dtype)
        if fault := manifest.fault(name, entries[name], leaf):
            raise Damaged(path, fault)
        leaves[name] = leaf
    return leaves


@contextlib.contextmanager
def _reading(path: Path, why: str) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except manifest.BadRecord as error:
        raise Damaged(path, str(error)) from error
    except Exception as error:
        code = orbax.error_code(error)
        if code in orbax.PASSING:
            raise UserError(f"The checkpoint {path} cannot be read ({os.strerror(code)}); it may be sound.") from error
        raise Damaged(path, why) from error
