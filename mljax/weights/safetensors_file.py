"""The safetensors format: arrays mapped from the file, of which nothing is believed before it is checked."""

import io
import json
import math
import mmap
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mljax.errors import UserError
from mljax.untrusted import MAX_DIMENSIONS, open_regular, parse_json

METADATA = "mljax"  # the entry of a file's metadata in which `write` keeps what it was given
MAX_HEADER = 8 << 20  # bytes; names and shapes of the largest nets take less than one
DTYPES = {
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
_CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}


def read_header(path: Path) -> tuple[memoryview, dict[str, Any], dict[str, str]]:
    """The arrays' bytes (mapped), the entry of each array, and the metadata.

    The format: length of the header (8 bytes), header in JSON, arrays one after the other.

    Raises:
      ValueError: the header is damaged, or too long.
    """
    with open_regular(path) as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    length = int.from_bytes(data[:8], "little")
    if 8 + length > len(data):
        raise ValueError("the header is cut")
    if length > MAX_HEADER:
        raise ValueError(f"the header has {length:,} bytes, at most {MAX_HEADER:,} are read")
    header = parse_json(bytes(data[8 : 8 + length]), object_pairs_hook=_once)
    metadata = header.pop("__metadata__", None) or {}
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("the metadata are not text")
    return data[8 + length :], header, metadata


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("the header has a name twice")
    return table


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays by name, as read-only views of the file, and what `write` kept beside them.

    Raises:
      ValueError: damaged: an array is not as long as its shape says, overlaps another, or leaves a gap, or a checksum
        is wrong.
    """
    data, header, metadata = read_header(path)
    places = {name: _place(name, entry) for name, entry in header.items()}
    end = 0
    for name, (_, _, begin, stop) in sorted(places.items(), key=lambda item: item[1][2:]):
        if begin != end:
            raise ValueError(f"{name!r} begins at {begin:,}, where {end:,} is the end of the array before")
        end = stop
    if end != len(data):
        raise ValueError(f"{len(data):,} bytes of arrays, and {end:,} are announced")
    if "crc32" in metadata and metadata["crc32"] != f"{zlib.crc32(data):08x}":
        raise ValueError("the checksum is wrong")
    state = {
        name: np.frombuffer(data[begin:stop], dtype).reshape(shape)
        for name, (dtype, shape, begin, stop) in places.items()
    }
    return state, json.loads(metadata.get(METADATA, "{}"))


def _place(name: str, entry: Mapping[str, Any]) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """dtype, shape, and from where to where, of an entry whose numbers agree."""
    dtype, shape, (begin, stop) = np.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"]), entry["data_offsets"]
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{name!r} has {len(shape):,} dimensions")
    if any(type(number) is not int or number < 0 for number in (*shape, begin, stop)):
        raise ValueError(f"{name!r} has shape {shape} and lies from {begin!r} to {stop!r}")
    if stop - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"the place of {name!r} is wrong")
    return dtype, shape, begin, stop


def write(path: Path, state: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
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
