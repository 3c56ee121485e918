"""Files as torch.save writes them, made without torch, and state dicts with the names of torchvision."""

import io
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np

RNG = np.random.default_rng(0)
MAGIC = 0x1950A86A20F9469CFC6C
STORAGE = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage", "int64": "LongStorage"}


class Name:
    """Pickled as a global of that name, which need not exist here."""

    def __init__(self, module, name):
        self.module, self.name = module, name

    def __call__(self, *_):
        raise AssertionError("never called")


class Storage:
    def __init__(self, key, array):
        self.key, self.array = key, array


class Tensor:
    def __init__(self, storage, offset, shape, stride):
        self.storage, self.offset, self.shape, self.stride = storage, offset, shape, stride


class TorchPickler(pickle._Pickler):
    """Writes what torch.save writes: persistent ids for storages, torch._utils._rebuild_tensor_v2 for tensors."""

    def __init__(self, file, legacy=False):
        super().__init__(file, protocol=2)
        self.legacy, self.storages = legacy, {}

    def persistent_id(self, obj):
        if not isinstance(obj, Storage):
            return None
        self.storages[obj.key] = obj.array
        kind = Name("torch", STORAGE[obj.array.dtype.name])
        return ("storage", kind, obj.key, "cpu", obj.array.size, *([None] if self.legacy else []))

    def reducer_override(self, obj):
        if isinstance(obj, Tensor):
            arguments = (obj.storage, obj.offset, obj.shape, obj.stride, False, OrderedDict())
            return Name("torch._utils", "_rebuild_tensor_v2"), arguments
        return NotImplemented

    def save_name(self, obj):
        self.write(b"c" + f"{obj.module}\n{obj.name}\n".encode())

    dispatch = {**pickle._Pickler.dispatch, Name: save_name}  # noqa: RUF012


def tensors(arrays):
    """Arrays -> contiguous tensors, each with its storage."""
    found = OrderedDict()
    for i, (name, array) in enumerate(arrays.items()):
        stride = tuple(s // array.itemsize for s in np.ascontiguousarray(array).strides[: array.ndim])
        found[name] = Tensor(Storage(str(i), np.ravel(array)), 0, array.shape, stride)
    return found


def torch_zip(path, tree):
    body = io.BytesIO()
    pickler = TorchPickler(body)
    pickler.dump(tree)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", body.getvalue())
        archive.writestr("archive/byteorder", sys.byteorder)
        for key, array in pickler.storages.items():
            archive.writestr(f"archive/data/{key}", array.tobytes())
        archive.writestr("archive/version", "3\n")
    return path


def torch_legacy(path, tree):
    with path.open("wb") as file:
        for head in (MAGIC, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}):
            pickle.dump(head, file, protocol=2)
        pickler = TorchPickler(file, legacy=True)
        pickler.dump(tree)
        pickle.dump(sorted(pickler.storages), file, protocol=2)
        for key in sorted(pickler.storages):
            file.write(struct.pack("<q", pickler.storages[key].size) + pickler.storages[key].tobytes())
    return path


WRITERS = {"zip": torch_zip, "legacy": torch_legacy}


def bare_resnet(depths, bottleneck, width=2, prefix=""):
    """A state dict with torchvision's names and any width."""
    state = {}

    def conv(name, out, inner, size):
        state[f"{prefix}{name}.weight"] = RNG.normal(size=(out, inner, size, size)).astype(np.float32)

    def norm(name, out):
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            state[f"{prefix}{name}.{leaf}"] = RNG.uniform(0.5, 1, size=out).astype(np.float32)
        state[f"{prefix}{name}.num_batches_tracked"] = np.array(3)

    conv("conv1", width, 3, 7)
    norm("bn1", width)
    expansion, inner = (4 if bottleneck else 1), width
    for i, depth in enumerate(depths):
        middle = width * 2**i
        for j in range(depth):
            block = f"layer{i + 1}.{j}"
            shapes = [(middle, inner, 1), (middle, middle, 3), (middle * expansion, middle, 1)]
            for k, shape in enumerate(shapes if bottleneck else [(middle, inner, 3), (middle, middle, 3)]):
                conv(f"{block}.conv{k + 1}", *shape)
                norm(f"{block}.bn{k + 1}", shape[0])
            if j == 0 and (i > 0 or bottleneck):
                conv(f"{block}.downsample.0", middle * expansion, inner, 1)
                norm(f"{block}.downsample.1", middle * expansion)
            inner = middle * expansion
    state[f"{prefix}fc.weight"] = RNG.normal(size=(5, inner)).astype(np.float32)
    state[f"{prefix}fc.bias"] = np.zeros(5, np.float32)
    return state


def same(found, wanted):
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        np.testing.assert_array_equal(np.asarray(found[name]), value)


def one_sentence(error):
    text = str(error.value)
    assert "\n" not in text and text.endswith(".") and text[0] in "ABCDEFGHIJKLMNOPQRSTUVWXYZ/m", text
    return text


def leftovers(folder):
    return [path for path in Path(folder).rglob("*") if path.is_file()]
