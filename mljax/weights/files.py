"""Weight files in their formats <-> {"name": array}: safetensors, numpy's npz, PyTorch's pth."""

import contextlib
import errno
import io
import json
import logging
import math
import mmap
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mljax.cache import atomic_write
from mljax.errors import UserError, nearest
from mljax.weights.torch_file import Tensor, read_torch

log = logging.getLogger("mljax")

SUFFIXES = (".safetensors", ".npz", ".pth", ".pt", ".bin", ".tar", ".th", ".ckpt")
# Where people put the state dict in what they save; the first that is there is taken. A shadow (EMA) comes last.
WRAPPERS = (
    *("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "params", "weights"),
    *("teacher", "student", "state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema"),
)
METADATA = "mljax"  # the entry of a file's metadata in which `write` keeps what it was given
_SAFETENSORS = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "C64": np.complex64,
    "U8": np.uint8,
    "U16": np.uint16,
    "U32": np.uint32,
    "U64": np.uint64,
    "I8": np.int8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
    "BOOL": np.bool_,
}
_CODES = {np.dtype(dtype): code for code, dtype in _SAFETENSORS.items()}
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
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise UserError(f"The weight file {path} cannot be read ({error.strerror}); check the path.") from None
    if not size:
        raise UserError(f"{path} is empty; get it again.")
    if head.startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise UserError(f"{path} is not a complete .npz or .pth file ({error}); get it again.") from None
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
            state, metadata = _read_safetensors(path)
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
    return {str(name): value.array() for name, value in tree.items() if isinstance(value, Tensor)}


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What `write` kept beside the arrays, without reading these; {} for other people's files.

    Raises:
      UserError: as `read`, for what the head of the file shows.
    """
    path = Path(path).expanduser()
    kind = kind_of(path)
    with _sentences(path):
        if kind == "safetensors":
            return json.loads(_header(path)[2].get(METADATA, "{}"))
        if kind == "npz":
            with np.load(path, allow_pickle=False) as file:
                return _kept(file[METADATA]) if METADATA in file.files else {}
    return {}


def _kept(array: np.ndarray) -> dict[str, Any]:
    return json.loads(str(array)) if array.dtype.kind == "U" else {}


def _read_npz(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with np.load(path, allow_pickle=False) as file:
        state = {name: file[name] for name in file.files}
    kept = _kept(state.pop(METADATA)) if METADATA in state else {}
    for name, dtype in kept.pop("dtypes", {}).items():  # numpy's format knows no bfloat16
        state[name] = state[name].view(np.dtype(dtype))
    return state, kept


def _header(path: Path) -> tuple[memoryview, dict[str, Any], dict[str, str]]:
    """Of a safetensors file: its arrays' bytes (mapped), the entry of each array, and the metadata.

    The format: length of the header (8 bytes), header in JSON, arrays one after the other.
    """
    with path.open("rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    start = 8 + int.from_bytes(data[:8], "little")
    if start > len(data):
        raise ValueError("the header is cut")
    header = json.loads(bytes(data[8:start]))
    metadata = header.pop("__metadata__", None) or {}
    return data[start:], header, metadata


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    data, header, metadata = _header(path)
    end, state = 0, {}
    for name, entry in header.items():
        dtype, shape = np.dtype(_SAFETENSORS[entry["dtype"]]), tuple(entry["shape"])
        begin, stop = entry["data_offsets"]
        if not 0 <= begin <= stop or stop - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"the place of {name!r} is wrong")
        if stop > len(data):
            raise ValueError(f"{name!r} ends after the end of the file")
        state[name] = np.frombuffer(data[begin:stop], dtype).reshape(shape)
        end = max(end, stop)
    if end != len(data):
        raise ValueError(f"{len(data):,} bytes of arrays, and {end:,} are announced")
    if "crc32" in metadata and metadata["crc32"] != f"{zlib.crc32(data):08x}":
        raise ValueError("the checksum is wrong")
    return state, json.loads(metadata.get(METADATA, "{}"))


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
            (_write_npz if path.suffix == ".npz" else _write_safetensors)(temporary, state, metadata)
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


def _write_safetensors(path: Path, state: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    # Wider types first: every array then starts at a multiple of its element size.
    names = sorted(state, key=lambda name: (-state[name].dtype.itemsize, name))
    extra = {METADATA: json.dumps(dict(metadata)), "crc32": "0" * 8}
    header: dict[str, Any] = {"__metadata__": extra}
    at = 0
    for name in names:
        code, value = _CODES.get(state[name].dtype), state[name]
        if code is None:
            raise UserError(f"The array {name!r} is {value.dtype}, which .safetensors cannot hold; write an .npz file.")
        header[name] = {"dtype": code, "shape": list(value.shape), "data_offsets": [at, at + value.nbytes]}
        at += value.nbytes

    def encoded() -> bytes:
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    crc = 0
    with io.FileIO(path, "w") as raw, io.BufferedWriter(raw) as file:
        file.write(encoded())
        for name in names:
            content = np.ascontiguousarray(state[name]).reshape(-1).view(np.uint8).data
            crc = zlib.crc32(content, crc)
            file.write(content)
        extra["crc32"] = f"{crc:08x}"
        file.seek(0)
        file.write(encoded())
