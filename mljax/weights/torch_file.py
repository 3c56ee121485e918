"""PyTorch checkpoint files without PyTorch, and without running anything that is in them.

A `.pth` file is a pickle, and a pickle is a program: unpickled plainly it may call any function of any module. The
reader here resolves a name of a pickle only through the tables below. What rebuilds a tensor becomes a description of
that tensor; names of harmless containers (training arguments, numpy scalars) become an object that swallows all that
is done to it; any other name refuses the file. Storages are mapped from the file, not copied.

Reads the zip format (torch >= 1.6), whose checksums are verified, and the older one. Not sparse or quantised tensors,
TorchScript, tar files of torch < 0.2, or a whole pickled `nn.Module`.
"""

import io
import math
import mmap
import pickle
import sys
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from mljax.errors import UserError

MAGIC = 0x1950A86A20F9469CFC6C
MAX_PICKLE = 256 << 20  # bytes of the pickle alone: names and shapes of the largest nets take less than one
MAX_EXPANDED = 1 << 27  # elements of a tensor that repeats its storage

DTYPES: dict[str, Any] = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "complex64": np.complex64,
    "complex128": np.complex128,
    "uint8": np.uint8,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "int8": np.int8,
    "int16": np.int16,
    "int32": np.int32,
    "int64": np.int64,
    "bool": np.bool_,
}
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}
# Found beside the weights in published checkpoints. Nothing of them is kept.
IGNORED = frozenset(
    f"{module}.{name}"
    for modules, names in (
        ("argparse", "Namespace"),
        ("yacs.config", "CfgNode"),
        ("builtins __builtin__", "list dict set frozenset tuple int float bool str bytes complex object slice"),
        ("collections", "defaultdict Counter"),
        ("copyreg copy_reg", "_reconstructor"),
        ("_codecs", "encode"),
        ("numpy", "dtype ndarray"),
        ("numpy.core.multiarray numpy._core.multiarray", "scalar _reconstruct"),
        ("pathlib", "Path PosixPath WindowsPath PurePosixPath"),
        ("datetime", "datetime date timedelta"),
        ("torch", "device Size Tensor Generator strided contiguous_format"),
        ("torch.nn.parameter", "Parameter Buffer"),
    )
    for module in modules.split()
    for name in names.split()
)


class Storage(NamedTuple):
    """Elements in the file; `buffer` gives its bytes."""

    dtype: np.dtype
    count: int
    buffer: Callable[[], Any]
    start: int = 0


class Tensor(NamedTuple):
    """A tensor as the file describes it; `array` reads it."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: np.dtype

    def array(self) -> np.ndarray:
        """A read-only view of the file, in torch's axis order and the file's dtype.

        Raises:
          ValueError: the tensor reaches outside its storage, or the storage is damaged.
        """
        whole = np.frombuffer(self.storage.buffer(), np.uint8)
        whole = whole[self.storage.start * self.storage.dtype.itemsize :]
        whole = whole[: self.storage.count * self.storage.dtype.itemsize]
        count = len(whole) // self.dtype.itemsize
        if len(self.shape) != len(self.stride) or min((*self.shape, *self.stride, self.offset), default=0) < 0:
            raise ValueError(f"a tensor has shape {self.shape} and stride {self.stride}")
        size = math.prod(self.shape)
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.stride))
        if size and last >= count:
            raise ValueError(f"a tensor of shape {self.shape} reaches outside its storage")
        if size > max(count, MAX_EXPANDED):
            raise ValueError(f"a tensor of shape {self.shape} repeats a storage of {count} elements")
        if not size:
            return np.zeros(self.shape, self.dtype)
        steps = tuple(step * self.dtype.itemsize for step in self.stride)
        # numpy's as_strided does not know 8-bit floats; the constructor does, and checks the bounds once more
        return np.ndarray(self.shape, self.dtype, whole.data, self.offset * self.dtype.itemsize, steps)


class _Unpickler(pickle.Unpickler):
    """Knows the tables above and nothing else. What it hands out is made anew for each file: a pickle can set
    attributes on the objects that it gets, and those must not outlive it."""

    def __init__(self, file: BinaryIO, storage: Callable[..., Storage]):
        super().__init__(file, encoding="latin1")
        self._storage = storage
        self._known = _table()

    def find_class(self, module: str, name: str) -> Any:
        found = self._known.get(f"{module}.{name}")
        if found is None:
            raise _Refused(f"{module}.{name}")
        return found

    def persistent_load(self, pid: Any) -> Storage:
        if not isinstance(pid, tuple) or pid[0] != "storage" or pid[1] not in DTYPES:
            raise ValueError("an external object that is not a storage")
        return self._storage(np.dtype(DTYPES[pid[1]]), *pid[2:])


class _Refused(Exception):
    """The name that a pickle asks for and does not get."""


def _table() -> dict[str, Any]:
    """Name in a pickle -> what stands for it here."""

    class Ignored:
        __slots__ = ()

        def __new__(cls, *_: Any, **__: Any) -> "Ignored":
            return object.__new__(cls)

        def ignore(self, *_: Any) -> None:
            return None

        __setstate__ = __setitem__ = append = extend = add = update = ignore

    def rebuild(storage: Storage, offset: int, shape: Any, stride: Any, *_: Any) -> Tensor:
        return Tensor(storage, offset, tuple(shape), tuple(stride), storage.dtype)

    def rebuild_typed(
        storage: Storage, offset: int, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: str, *_: Any
    ) -> Tensor:
        return Tensor(storage, offset, tuple(shape), tuple(stride), np.dtype(DTYPES[dtype]))

    def parameter(data: Tensor, *_: Any) -> Tensor:
        return data

    def with_attributes(function: Any, kind: Any, arguments: tuple[Any, ...], *_: Any) -> Tensor:
        if function not in (rebuild, rebuild_typed, parameter):
            raise ValueError("a tensor of an unknown kind")
        return function(*arguments)

    known: dict[str, Any] = dict.fromkeys(IGNORED, Ignored)
    # Types are plain strings here: nothing that a pickle could change.
    known |= {f"torch.{name}": name for name in DTYPES}
    for module in ("torch", "torch.cuda", "torch.storage"):
        known |= {f"{module}.{name}": dtype for name, dtype in STORAGES.items()}
    return known | {
        "collections.OrderedDict": OrderedDict,
        "torch._utils._rebuild_tensor": rebuild,
        "torch._utils._rebuild_tensor_v2": rebuild,
        "torch._utils._rebuild_tensor_v3": rebuild_typed,
        "torch._utils._rebuild_parameter": parameter,
        "torch._utils._rebuild_parameter_with_state": parameter,
        "torch._tensor._rebuild_from_type_v2": with_attributes,
    }


def read_torch(path: Path) -> Any:
    """What `torch.save` wrote: nested dicts, lists and numbers as they were, and a `Tensor` for each tensor.

    Raises:
      UserError: the file is damaged, asks for code, or is of a kind that is not read.
      OSError: the file cannot be opened.
    """
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"PK"
            file.seek(0)
            return _read_zip(file) if zipped else _read_legacy(file)
    except _Refused as refused:
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
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        found = [name for name in members if name.split("/")[1:] == ["data.pkl"]]
        if not found:
            raise ValueError("a zip file without data.pkl")
        root = found[0].removesuffix("data.pkl")
        if f"{root}constants.pkl" in members:
            raise ValueError("a TorchScript archive, which is code: save its state_dict()")
        if members[found[0]].file_size > MAX_PICKLE:
            raise ValueError("its pickle is too large")
        order = archive.read(f"{root}byteorder").decode() if f"{root}byteorder" in members else "little"
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
            if members[name].file_size < count * dtype.itemsize:
                raise ValueError(f"the storage {key!r} is too short")
            return Storage(dtype, count, lambda: buffer(name))

        return _Unpickler(io.BytesIO(archive.read(found[0])), storage).load()


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
    def load(storage: Callable[..., Storage]) -> Any:
        return _Unpickler(file, storage).load()

    def none(*_: Any) -> Storage:
        raise ValueError("a storage where none should be")

    if load(none) != MAGIC:
        raise ValueError("a plain pickle, not written by torch.save")
    version, system = load(none), load(none)
    if version != 1001 or not isinstance(system, dict) or not system.get("little_endian", True):
        raise ValueError("of an unknown version")
    itemsize: dict[str, int] = {}
    place: dict[str, int] = {}
    data = memoryview(_map(file))

    def storage(dtype: np.dtype, key: Any, device: Any, count: int, view: Any = None, *_: Any) -> Storage:
        itemsize[str(key)] = dtype.itemsize
        start, count = (int(view[1]), int(view[2])) if view else (0, count)
        if start < 0 or count < 0:
            raise ValueError("a storage of negative size")
        return Storage(dtype, count, lambda: data[place[str(key)] :], start)

    tree = load(storage)
    keys = [str(key) for key in load(none)]
    at = file.tell()
    for key in keys:
        count = int.from_bytes(data[at : at + 8], "little")
        place[key], at = at + 8, at + 8 + count * itemsize[key]
    if at != len(data):
        raise ValueError(f"{len(data):,} bytes, and {at:,} are announced")
    return tree
