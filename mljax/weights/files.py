"""Weight files in their formats <-> {"name": array}: safetensors, numpy's npz, PyTorch's pth."""

import contextlib
import errno
import json
import logging
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mljax.cache import atomic_write
from mljax.errors import UserError, nearest
from mljax.untrusted import SPARE, open_regular, open_zip, read_npz
from mljax.weights import safetensors_file
from mljax.weights.safetensors_file import METADATA
from mljax.weights.torch_file import Tensor, read_torch

log = logging.getLogger("mljax")

SUFFIXES = (".safetensors", ".npz", ".pth", ".pt", ".bin", ".tar", ".th", ".ckpt")
# Where people put the state dict in what they save; the first that is there is taken. A shadow (EMA) comes last.
WRAPPERS = (
    *("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "params", "weights"),
    *("teacher", "student", "state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema"),
)
# First bytes of what people pass by mistake.
_STARTS = (
    (b"version https://git-lfs", "a git-lfs pointer, without the weights that it points to"),
    (b"<", "a web page"),
    (b"\x89HDF", "a Keras or HDF5 file; save its arrays as .npz"),
    (b"\xff\xd8", "a JPEG image"),
    (b"\x89PNG", "a PNG image"),
    (b"\x1f\x8b", "a gzip file; unpack it"),
    (b"{", "a JSON file"),
    (b"GGUF", "a GGUF file"),
)


def kind_of(path: Path) -> str:
    """ "safetensors", "npz" or "torch", by content and not by name.

    Raises:
      UserError: the file is not there, cannot be read, is empty, or is something else.
    """
    try:
        with open_regular(path) as file:
            head, names = file.read(64), []
            if head.startswith(b"PK"):
                with open_zip(file) as archive:
                    names = archive.namelist()
    except OSError as error:
        raise UserError(f"The weight file {path} cannot be read ({error.strerror}); check the path.") from None
    except (zipfile.BadZipFile, ValueError) as error:
        raise UserError(f"{path} is not a complete .npz or .pth file ({error}); get it again.") from None
    if not head:
        raise UserError(f"{path} is empty; get it again.")
    if head.startswith(b"PK"):
        return "npz" if names and all(name.endswith(".npy") for name in names) else "torch"
    if head[8:9] == b"{" and (int.from_bytes(head[:8], "little") < 1 << 27 or path.suffix == ".safetensors"):
        return "safetensors"
    for start, what in _STARTS:
        if head.lstrip().startswith(start):
            raise UserError(f"{path} is {what}; give a .safetensors, .npz or .pth file.")
    if head[0] == 0x80 or path.suffix in (".pth", ".pt", ".bin", ".tar", ".th", ".ckpt"):
        return "torch"
    raise UserError(f"{path} is neither a safetensors, npz nor PyTorch file; give one of these.")


def read(path: str | Path, *, prefix: str = "") -> dict[str, np.ndarray]:
    """The arrays of a weight file by name; nothing that is in the file is executed.

    Args:
      path: a .safetensors, .npz, or PyTorch file (.pth, .pt, .bin; either format of torch.save).
      prefix: keep only the names that start with it, without it ("module.", "backbone.").
    Returns:
      Arrays in the file's axis order and dtype (bfloat16 and 8-bit floats as ml_dtypes). Those of safetensors and
      PyTorch files are read-only views of the file. A state dict inside a checkpoint (`state_dict`, `model`,
      `model_state`, `ema`, ..) is found; what is not an array is left out.
    Raises:
      UserError: no such file, truncated, corrupt, hostile, without arrays, or without the prefix.
    """
    return read_with_metadata(path, prefix=prefix)[0]


def read_with_metadata(path: str | Path, *, prefix: str = "") -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """As `read`, and what `write` kept beside the arrays ({} for other people's files)."""
    path = Path(path).expanduser()
    kind = kind_of(path)
    metadata: dict[str, Any] = {}
    with _sentences(path):
        if kind == "safetensors":
            state, metadata = safetensors_file.read(path)
        elif kind == "npz":
            state, metadata = _read_npz(path)
        else:
            state = _state_dict(read_torch(path), path)
    if not state:
        raise UserError(f"{path} holds no arrays; give a file with weights.")
    return with_prefix(state, prefix, path), metadata


@contextlib.contextmanager
def _sentences(path: Path) -> Iterator[None]:
    """What goes wrong with a damaged file, as one sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(f"The weight file {path} cannot be read ({error.strerror or error}).") from None
    except UserError:
        raise
    except Exception as error:  # zipfile, json and numpy fail in many ways on damaged bytes
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise UserError(f"{path} is truncated or corrupt ({reason}); get it again.") from None


def with_prefix(state: Mapping[str, np.ndarray], prefix: str, path: Path) -> dict[str, np.ndarray]:
    """The arrays whose names start with the prefix, without it."""
    if not prefix:
        return dict(state)
    found = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    found.pop("", None)
    if not found:
        parts = [name.split(".") for name in state]
        starts = {".".join(p[:i]) + "." for p in parts for i in range(1, min(len(p), 4))}
        raise UserError(f"No name in {path} starts with the prefix {prefix!r}{nearest(prefix, starts)}.")
    return found


def _state_dict(tree: Any, path: Path) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint, with the wrappers around them taken off."""
    taken: list[str] = []
    for _ in range(4):
        if not isinstance(tree, Mapping):
            break
        if any(isinstance(value, Tensor) for value in tree.values()):
            break
        inner = next((name for name in WRAPPERS if isinstance(tree.get(name), Mapping) and tree[name]), None)
        if inner is None:
            break
        taken.append(inner)
        tree = tree[inner]
    if isinstance(tree, Tensor):
        raise UserError(f"{path} holds a single tensor; give a file with the weights of a net.")
    if not isinstance(tree, Mapping):
        raise UserError(f"{path} holds no state dict but a {type(tree).__name__}; save the model's state_dict().")
    if taken and "ema" in taken[-1]:
        log.warning("%s: only averaged weights (%s) are in it; using these.", path, taken[-1])
    state = {str(name): value.array() for name, value in tree.items() if isinstance(value, Tensor)}
    total, limit = sum(value.nbytes for value in state.values()), 2 * path.stat().st_size + SPARE
    if total > limit:
        raise ValueError(f"its tensors have {total:,} bytes, at most {limit:,} are read")
    return state


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What `write` kept beside the arrays, without reading these; {} for other people's files.

    Raises:
      UserError: as `read`, for what the head of the file shows.
    """
    path = Path(path).expanduser()
    kind = kind_of(path)
    with _sentences(path):
        if kind == "safetensors":
            return json.loads(safetensors_file.read_header(path)[2].get(METADATA, "{}"))
        if kind == "npz":
            arrays = read_npz(path, names=[METADATA])
            return _kept(arrays[METADATA]) if METADATA in arrays else {}
    return {}


def _kept(array: np.ndarray) -> dict[str, Any]:
    return json.loads(str(array)) if array.dtype.kind == "U" else {}


def _read_npz(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    state = read_npz(path)
    kept = _kept(state.pop(METADATA)) if METADATA in state else {}
    for name, dtype in kept.pop("dtypes", {}).items():  # numpy's format knows no bfloat16
        state[name] = state[name].view(np.dtype(dtype))
    return state, kept


def write(path: Path, state: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    """Write arrays and metadata (JSON) to a .safetensors or .npz file, whole or not at all.

    Arrays are made contiguous one at a time, so views of a mapped file cost no memory. A .safetensors file gets a
    checksum of its arrays, which the format itself lacks.

    Raises:
      UserError: another suffix, or the disk is full or read-only; nothing is left behind.
    """
    if path.suffix not in (".safetensors", ".npz"):
        raise UserError(f"The file to write is {path}; end its name in .safetensors or .npz.")
    try:
        with atomic_write(path) as temporary:
            (_write_npz if path.suffix == ".npz" else safetensors_file.write)(temporary, state, metadata)
            temporary.chmod(0o644)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free space there" if full else "check that it can be written to"
        raise UserError(
            f"Weights cannot be written to {path.parent} ({error.strerror or error}); {advice},"
            " or set MLJAX_CACHE to another folder."
        ) from None


def _write_npz(path: Path, state: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    special = {name: value.dtype for name, value in state.items() if value.dtype.isbuiltin == 2}
    kept = {**metadata, "dtypes": {name: dtype.name for name, dtype in special.items()}}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, value in {**state, METADATA: np.array(json.dumps(kept))}.items():
            value = value.view(f"u{value.dtype.itemsize}") if name in special else value
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.ascontiguousarray(value).reshape(value.shape))
