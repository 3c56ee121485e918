"""What a pickle of torch.save may ask for, and a reader of pickles that grants nothing else.

A name of a pickle is resolved only through the tables below: what rebuilds a tensor becomes a description of that
tensor, names of harmless containers (training arguments, numpy scalars) become an object that swallows all that is done
to it, and any other name refuses the file. The reader is Python's, not that of C, which takes gigabytes for a few bytes
that name a far place of its memo; it counts what it does.
"""

import gc
import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mljax.untrusted import MAX_DIMENSIONS

MAGIC = 0x1950A86A20F9469CFC6C
MAX_PICKLE = 32 << 20  # bytes of the pickle alone: names and shapes of the largest nets take less than one
MAX_STEPS = 1 << 19  # of a pickle: opcodes, and entries of dicts made of lists; large checkpoints take a fifth
MAX_EXPANDED = 1 << 26  # elements of a tensor that repeats its storage

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


class Refused(Exception):
    """The name that a pickle asks for and does not get."""


class Unpickler(pickle._Unpickler):  # pyright: ignore[reportAttributeAccessIssue]
    """Knows the tables above and nothing else. What it hands out is made anew for each file: a pickle can set
    attributes on the objects that it gets, and those must not outlive it."""

    def __init__(self, file: io.BytesIO, storage: Callable[..., Storage]):
        super().__init__(file, encoding="latin1")
        self._storage, self._steps = storage, 0
        self._known = _table(self.spend)
        self.dispatch = _Counted(super().dispatch, self.spend)  # pyright: ignore[reportAttributeAccessIssue]

    def load(self) -> Any:
        """The pickle's object. The garbage collector waits: in a large process it takes longer than the reading."""
        enabled = gc.isenabled()
        gc.disable()
        try:
            return super().load()
        finally:
            if enabled:
                gc.enable()

    def spend(self, steps: int) -> None:
        """Count what the pickle does.

        Raises:
          ValueError: it is more than MAX_STEPS.
        """
        self._steps += steps
        if self._steps > MAX_STEPS:
            raise ValueError(f"its pickle takes more than {MAX_STEPS:,} steps")

    def find_class(self, module: str, name: str) -> Any:
        known = self._known.get(f"{module}.{name}")
        if known is None:
            raise Refused(f"{module}.{name}")
        return known

    def persistent_load(self, pid: Any) -> Storage:
        if not isinstance(pid, tuple) or pid[0] != "storage" or pid[1] not in DTYPES:
            raise ValueError("an external object that is not a storage")
        return self._storage(np.dtype(DTYPES[pid[1]]), *pid[2:])


class _Counted(dict[int, Callable[[Any], None]]):
    """Opcode -> what does it, counted; the few that are dangerous in numbers are replaced."""

    def __init__(self, dispatch: Mapping[int, Callable[[Any], None]], spend: Callable[[int], None]):
        super().__init__(dispatch)
        self.spend = spend
        for opcode in (pickle.INT, pickle.LONG, pickle.LONG1, pickle.LONG4):
            self[opcode[0]] = _short(dispatch[opcode[0]])
        self[pickle.BYTEARRAY8[0]] = _refused  # takes memory before it reads; torch does not write it

    def __getitem__(self, opcode: int) -> Callable[[Any], None]:
        self.spend(1)
        return super().__getitem__(opcode)


def _short(load: Callable[[Any], None]) -> Callable[[Any], None]:
    """Integers of 64 bits, of which few share a hash, so that no dict of them gets slow; and the file's own number."""

    def load_short(unpickler: Any) -> None:
        load(unpickler)
        value = unpickler.stack[-1]
        if value.bit_length() > 64 and value != MAGIC:
            raise ValueError("an integer of more than 64 bits")

    return load_short


def _refused(unpickler: Any) -> None:
    raise ValueError("an array of bytes, which torch.save does not write")


def _tensor(storage: Storage, offset: int, shape: Any, stride: Any, dtype: Any) -> Tensor:
    if max(len(shape), len(stride)) > MAX_DIMENSIONS:
        raise ValueError(f"a tensor of {len(shape)} dimensions")
    return Tensor(storage, offset, tuple(shape), tuple(stride), dtype)


def _table(spend: Callable[[int], None]) -> dict[str, Any]:
    """Name in a pickle -> what stands for it here."""

    def ordered(*entries: Any) -> OrderedDict[Any, Any]:
        for one in entries:
            spend(len(one))
        return OrderedDict(*entries)

    class Ignored:
        __slots__ = ()

        def __new__(cls, *_: Any, **__: Any) -> "Ignored":
            return object.__new__(cls)

        def ignore(self, *_: Any) -> None:
            return None

        __setstate__ = __setitem__ = append = extend = add = update = ignore

    def rebuild(storage: Storage, offset: int, shape: Any, stride: Any, *_: Any) -> Tensor:
        return _tensor(storage, offset, shape, stride, storage.dtype)

    def rebuild_typed(
        storage: Storage, offset: int, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: str, *_: Any
    ) -> Tensor:
        return _tensor(storage, offset, shape, stride, np.dtype(DTYPES[dtype]))

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
        "collections.OrderedDict": ordered,
        "torch._utils._rebuild_tensor": rebuild,
        "torch._utils._rebuild_tensor_v2": rebuild,
        "torch._utils._rebuild_tensor_v3": rebuild_typed,
        "torch._utils._rebuild_parameter": parameter,
        "torch._utils._rebuild_parameter_with_state": parameter,
        "torch._tensor._rebuild_from_type_v2": with_attributes,
    }
