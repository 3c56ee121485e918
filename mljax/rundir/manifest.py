"""What stands beside the arrays of a checkpoint: dtype, shape and digest of each, metrics, and what the trainer adds.

Trees are handled as {"a/b/c": array}, and nested dicts are all that is written, so that no container type of optax
matters to a file.
"""

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mljax.errors import UserError, nearest
from mljax.trees import nest

WEIGHTS = ("params", "variables", "ema")  # fields of TrainState that prediction needs; the others are read to train on


def items(leaves: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Two trees on disk: what prediction needs and the rest. Empty arrays are left out, which orbax refuses."""
    split: dict[str, dict[str, Any]] = {"weights": {}, "training": {}}
    for path, leaf in leaves.items():
        if math.prod(leaf.shape):
            split["weights" if path.split("/")[0] in WEIGHTS else "training"][path] = leaf
    return {name: nest(part) for name, part in split.items() if part}


def kind(leaf: Any) -> tuple[str, tuple[int, ...]]:
    """(name of the dtype, shape) of an array, of a shape or of a number."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    return str(dtype), tuple(np.shape(leaf))


def crc(leaf: np.ndarray) -> str:
    """CRC-32 of the bytes: finds every flipped bit and every burst up to 32 bits, at more than a GB/s."""
    return f"{zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data):08x}" if leaf.size else "00000000"


def sealed(
    step: int, leaves: Mapping[str, np.ndarray], metrics: dict[str, Any], meta: dict[str, Any]
) -> dict[str, Any]:
    """What stands beside the arrays, with a digest of itself."""
    finite = {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}
    entries = {path: [*kind(leaf), crc(leaf)] for path, leaf in leaves.items()}
    record = json.loads(json.dumps({"step": step, "metrics": finite, "meta": meta, "leaves": entries}))
    return {**record, "digest": digest(record)}


def digest(record: Mapping[str, Any]) -> str:
    """CRC-32 of a record without its own digest."""
    return f"{zlib.crc32(json.dumps(record, sort_keys=True).encode()):08x}"


def compare(saved: Mapping[str, Any], wanted: Mapping[str, tuple[str, tuple[int, ...]]], *, where: str) -> None:
    """The leaves of a record beside those of a template, {path: (dtype, shape)}.

    Args:
      where: what a sentence about them begins with.
    Raises:
      UserError: a leaf that is missing, left over, or of another shape or dtype.
    """
    advice = "restore it with the config that it was trained with"
    for path in wanted:
        if path not in saved:
            raise UserError(f"{where} has no {path}{nearest(path, saved)}; {advice}.")
    for path, (dtype, shape, _) in saved.items():
        if path not in wanted:
            raise UserError(f"{where} has {path}, which this model or optimiser has not; {advice}.")
        if tuple(shape) != wanted[path][1]:
            raise UserError(f"{where} has {path} with shape {tuple(shape)}, not {wanted[path][1]}; {advice}.")
        if dtype != wanted[path][0]:
            raise UserError(f"{where} has {path} as {dtype}, not {wanted[path][0]}; {advice}.")


def fault(path: str, entry: tuple[str, tuple[int, ...], str], leaf: Any) -> str:
    """What is wrong with an array that was read, by its entry in the record; empty if it is what was saved."""
    if not isinstance(leaf, np.ndarray):
        return f"it holds no {path}"
    dtype, shape, digest = entry
    if [*kind(leaf), crc(leaf)] != [dtype, tuple(shape), digest]:
        return f"the bytes of {path} are not those that were saved"
    return ""


def is_json(path: Path) -> bool:
    """Whether a file can be read as JSON."""
    try:
        json.loads(path.read_text())
    except ValueError:
        return False
    return True
