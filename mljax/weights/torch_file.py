"""PyTorch checkpoint files without PyTorch, and without running anything that is in them.

A `.pth` file is a pickle, and a pickle is a program: unpickled plainly it may call any function of any module. The
reader in `_torch_pickle` grants no function. Storages are mapped from the file, not copied; sizes that it declares are
checked against its own before memory is taken.

Reads the zip format (torch >= 1.6), whose checksums are verified, and the older one. Not sparse or quantised tensors,
TorchScript, tar files of torch < 0.2, or a whole pickled `nn.Module`.
"""

import io
import mmap
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mljax.errors import UserError
from mljax.untrusted import open_regular, open_zip
from mljax.weights._torch_pickle import MAGIC, MAX_PICKLE, Refused, Storage, Tensor, Unpickler

__all__ = ["Tensor", "read_torch"]


def read_torch(path: Path) -> Any:
    """What `torch.save` wrote: nested dicts, lists and numbers as they were, and a `Tensor` for each tensor.

    Raises:
      UserError: the file is damaged, asks for code, or is of a kind that is not read.
      OSError: the file cannot be opened.
    """
    try:
        with open_regular(path) as file:
            zipped = file.read(2) == b"PK"
            file.seek(0)
            return _read_zip(file) if zipped else _read_legacy(file)
    except Refused as refused:
        raise UserError(
            f"{path} asks for {str(refused)!r}, which could run code, so it is refused and nothing of it was run;"
            " save the state_dict() of the model alone."
        ) from None
    except (UserError, OSError):
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        reason = str(error).strip().rstrip(".") or type(error).__name__
        raise UserError(f"{path} is not a complete PyTorch file ({reason}); get it again.") from None


def _map(file: BinaryIO) -> mmap.mmap:
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _read_zip(file: BinaryIO) -> Any:
    data = _map(file)
    with open_zip(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        found = [name for name in members if name.split("/")[1:] == ["data.pkl"]]
        if not found:
            raise ValueError("a zip file without data.pkl")
        root = found[0].removesuffix("data.pkl")
        if f"{root}constants.pkl" in members:
            raise ValueError("a TorchScript archive, which is code: save its state_dict()")
        if members[found[0]].file_size > MAX_PICKLE:
            raise ValueError("its pickle is too large")
        order = members.get(f"{root}byteorder")
        order = "little" if order is None else archive.open(order).read(16).decode()
        if order != sys.byteorder:
            raise ValueError(f"its numbers are {order}-endian")
        loaded: dict[str, Any] = {}

        def buffer(name: str) -> Any:
            if name not in loaded:
                loaded[name] = _member(data, members[name])
            return loaded[name]

        def storage(dtype: np.dtype, key: Any, device: Any, count: int, *_: Any) -> Storage:
            name = f"{root}data/{key}"
            if name not in members:
                raise ValueError(f"the storage {key!r} is missing")
            if not 0 <= count * dtype.itemsize <= members[name].file_size:
                raise ValueError(f"the storage {key!r} is too short")
            return Storage(dtype, count, lambda: buffer(name))

        unpickler = Unpickler(io.BytesIO(archive.read(found[0])), storage)
        try:
            return unpickler.load()
        finally:
            vars(unpickler).clear()  # it refers to itself, and would keep the mapped file until the next collection


def _member(data: mmap.mmap, info: zipfile.ZipInfo) -> Any:
    """The bytes of a member, checked against its checksum; mapped unless it is compressed."""
    head = data[info.header_offset : info.header_offset + 30]
    start = info.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
    content = memoryview(data)[start : start + info.compress_size]
    if info.compress_type == zipfile.ZIP_DEFLATED:
        content = memoryview(zlib.decompressobj(-15).decompress(content, max(info.file_size, 1)))
    elif info.compress_type != zipfile.ZIP_STORED:
        raise ValueError("it is compressed in an unusual way")
    if len(content) != info.file_size or zlib.crc32(content) != info.CRC:
        raise ValueError(f"the checksum of {info.filename} is wrong")
    return content


def _read_legacy(file: BinaryIO) -> Any:
    data = memoryview(_map(file))
    pickles = io.BytesIO(data[:MAX_PICKLE])

    def load(storage: Callable[..., Storage]) -> Any:
        return Unpickler(pickles, storage).load()

    def none(*_: Any) -> Storage:
        raise ValueError("a storage where none should be")

    if load(none) != MAGIC:
        raise ValueError("a plain pickle, not written by torch.save")
    version, system = load(none), load(none)
    if version != 1001 or not isinstance(system, dict) or not system.get("little_endian", True):
        raise ValueError("of an unknown version")
    itemsize: dict[str, int] = {}
    place: dict[str, int] = {}

    def storage(dtype: np.dtype, key: Any, device: Any, count: int, view: Any = None, *_: Any) -> Storage:
        itemsize[str(key)] = dtype.itemsize
        start, count = (int(view[1]), int(view[2])) if view else (0, count)
        if start < 0 or count < 0:
            raise ValueError("a storage of negative size")
        return Storage(dtype, count, lambda: data[place[str(key)] :], start)

    tree = load(storage)
    keys = [str(key) for key in load(none)]
    at = pickles.tell()
    for key in keys:
        count = int.from_bytes(data[at : at + 8], "little")
        place[key], at = at + 8, at + 8 + count * itemsize[key]
    if at != len(data):
        raise ValueError(f"{len(data):,} bytes, and {at:,} are announced")
    return tree
