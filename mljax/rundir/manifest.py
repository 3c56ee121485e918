"""The record of a checkpoint: dtype, shape and digest of every array, metrics, and what the trainer adds.

Trees are handled as {"a/b/c": array}, and only nested dicts are written, so that no container type of optax
matters to a file.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mljax import seal, untrusted
from mljax.errors import UserError, nearest
from mljax.trees import nest

WEIGHTS = ("params", "variables", "ema")  # fields of TrainState that prediction needs; the others are read to train on
CONSTANTS = "variables/constants/"  # of the data set and the config: a mask there may hold infinities


class BadRecord(ValueError):
    """A record that is not what was saved; the message says how."""


def items(leaves: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Two trees on disk: what prediction needs, and the rest. Empty arrays are left out, since orbax refuses them."""
    split: dict[str, dict[str, Any]] = {"weights": {}, "training": {}}
    for path, leaf in leaves.items():
        if math.prod(leaf.shape):
            split["weights" if path.split("/")[0] in WEIGHTS else "training"][path] = leaf
    return {name: nest(part) for name, part in split.items() if part}


def dtype_and_shape(leaf: Any) -> tuple[str, tuple[int, ...]]:
    """(name of the dtype, shape) of an array, a jax.ShapeDtypeStruct or a number."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    return str(dtype), tuple(np.shape(leaf))


def record(
    step: int, leaves: Mapping[str, np.ndarray], metrics: Mapping[str, Any], meta: Mapping[str, Any]
) -> dict[str, Any]:
    """The sealed record of a state; a metric that is not finite is None in it."""
    finite = {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}
    entries = {path: [*dtype_and_shape(leaf), seal.crc(leaf)] for path, leaf in leaves.items()}
    return seal.sealed({"step": step, "metrics": finite, "meta": dict(meta), "leaves": entries})


def read(folder: Path) -> dict[str, Any]:
    """The record in the folder of a step, verified: its digest, and that its step is the folder's name.

    Raises:
      BadRecord: it is damaged.
      OSError: it cannot be read.
    """
    try:
        content = untrusted.read_json(folder / "record" / "metadata")
    except ValueError:
        raise BadRecord("its record cannot be read") from None
    try:
        content = seal.unsealed(content, required=True)
    except (AttributeError, ValueError):
        raise BadRecord("its record is not what was saved") from None
    if str(content.get("step")) != folder.name:
        raise BadRecord(f"it holds step {content.get('step')}")
    return content


def not_finite(leaves: Mapping[str, np.ndarray]) -> str | None:
    """The path of the first array that prediction needs and that holds a NaN or an infinity."""
    for path, leaf in leaves.items():
        if path.split("/")[0] in WEIGHTS and not path.startswith(CONSTANTS) and not _finite(leaf):
            return path
    return None


def _finite(leaf: np.ndarray) -> bool:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return True
    with np.errstate(all="ignore"):  # the sum is finite only if every term is: one cheap pass for almost all arrays
        return bool(np.isfinite(leaf.sum()) or np.isfinite(leaf).all())


def compare(saved: Mapping[str, Any], template: Mapping[str, tuple[str, tuple[int, ...]]], *, where: str) -> None:
    """Compare the arrays of a record with those of a template, {path: (dtype, shape)}.

    Args:
      where: the beginning of the message.
    Raises:
      UserError: an array is missing, left over, or of another shape or dtype.
    """
    advice = "restore it with the config that it was trained with"
    for path in template:
        if path not in saved:
            raise UserError(f"{where} has no {path}{nearest(path, saved)}; {advice}.")
    for path, (dtype, shape, _) in saved.items():
        if path not in template:
            raise UserError(f"{where} has {path}, which this model or optimiser does not have; {advice}.")
        expected_dtype, expected_shape = template[path]
        if tuple(shape) != expected_shape:
            raise UserError(f"{where} has {path} with shape {tuple(shape)}, not {expected_shape}; {advice}.")
        if dtype != expected_dtype:
            raise UserError(f"{where} has {path} as {dtype}, not {expected_dtype}; {advice}.")


def fault(path: str, entry: tuple[str, tuple[int, ...], str], leaf: Any) -> str:
    """What is wrong with an array that was read, by its entry in the record; empty if it is what was saved."""
    if not isinstance(leaf, np.ndarray):
        return f"it holds no {path}"
    dtype, shape, digest = entry
    if [*dtype_and_shape(leaf), seal.crc(leaf)] != [dtype, tuple(shape), digest]:
        return f"the bytes of {path} are not those that were saved"
    return ""
