"""Weight files, good, damaged and hostile: written by hand, by numpy and by safetensors; nothing here needs torch."""

import json
import os
import pickle
import resource
import struct
import time
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from mljax.errors import UserError
from mljax.weights import files
from mljax.weights.files import read
from torch_writer import (
    RNG,
    WRITERS,
    Name,
    Storage,
    Tensor,
    leftovers,
    one_sentence,
    same,
    tensors,
    torch_legacy,
    torch_zip,
)

SMALL = {
    "a.weight": RNG.normal(size=(3, 4)).astype(np.float32),
    "a.half": RNG.normal(size=(5,)).astype(np.float16),
    "a.brain": RNG.normal(size=(2, 3)).astype(ml_dtypes.bfloat16),
    "a.count": np.array(7),
}


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Name("posix", "system"), (f"touch {self.path}",)


@pytest.mark.parametrize("writer", WRITERS)
def test_torch_file_without_torch(tmp_path, writer):
    path = WRITERS[writer](tmp_path / "x.pth", tensors(SMALL))
    same(read(path), SMALL)


@pytest.mark.parametrize("writer", WRITERS)
def test_views_and_shared_storage(tmp_path, writer):
    base = np.arange(24, dtype=np.float32)
    storage = Storage("0", base)
    tree = {
        "whole": Tensor(storage, 0, (4, 6), (6, 1)),
        "transposed": Tensor(storage, 0, (6, 4), (1, 6)),
        "part": Tensor(storage, 7, (2, 3), (6, 1)),
        "repeated": Tensor(storage, 5, (3,), (0,)),
        "empty": Tensor(storage, 0, (0, 3), (3, 1)),
    }
    found = read(WRITERS[writer](tmp_path / "x.pt", tree))
    grid = base.reshape(4, 6)
    wanted = {"whole": grid, "transposed": grid.T, "part": grid[1:3, 1:4], "repeated": np.full(3, 5, np.float32)}
    same(found, {**wanted, "empty": np.zeros((0, 3), np.float32)})
    with pytest.raises(ValueError, match="read-only"):
        found["part"][0, 0] = 1


@pytest.mark.parametrize(
    "tensor", [((5, 5), (5, 1), 0), ((2, 2), (2, 1), 21), ((2,), (-1,), 3), ((-1,), (1,), 0), ((1 << 40,), (0,), 0)]
)
def test_tensor_outside_its_storage_is_refused(tmp_path, tensor):
    shape, stride, offset = tensor
    tree = {"x": Tensor(Storage("0", np.zeros(24, np.float32)), offset, shape, stride)}
    with pytest.raises(UserError) as error:
        read(torch_zip(tmp_path / "x.pth", tree))
    assert "corrupt" in one_sentence(error)


@pytest.mark.parametrize("wrap", [("state_dict",), ("model",), ("model_state",), ("checkpoint", "x"), ("ema",)])
def test_wrappers_are_taken_off(tmp_path, wrap):
    tree = tensors(SMALL)
    for name in reversed(wrap):
        tree = {"epoch": 3, name: tree, "optimizer": {"state": {}}}
    path = torch_zip(tmp_path / "x.pth", tree)
    if wrap[0] == "checkpoint":  # not a name that anyone uses
        with pytest.raises(UserError, match="no arrays"):
            read(path)
    else:
        same(read(path), SMALL)


def test_plain_weights_before_averaged_ones(tmp_path):
    tree = {"state_dict_ema": tensors({"a": np.ones(2)[:0].astype(np.float32)}), "model": tensors(SMALL)}
    same(read(torch_zip(tmp_path / "x.pth", tree)), SMALL)


def test_training_arguments_beside_the_weights_are_ignored(tmp_path):
    class Arguments:
        def __reduce__(self):
            return Name("argparse", "Namespace"), (), {"lr": 0.1}

    class Score:
        def __reduce__(self):
            return Name("numpy.core.multiarray", "scalar"), (Name("numpy", "dtype"), b"12345678")

    tree = {"args": Arguments(), "best_mAP": Score(), "state_dict": tensors(SMALL)}
    for name, writer in WRITERS.items():
        same(read(writer(tmp_path / f"{name}.pth", tree)), SMALL)


def test_safetensors_of_others(tmp_path):
    state = {k: np.ascontiguousarray(v) for k, v in SMALL.items() if v.dtype != ml_dtypes.bfloat16}
    safetensors.numpy.save_file(state, tmp_path / "x.safetensors", metadata={"format": "pt"})
    same(read(tmp_path / "x.safetensors"), state)


def test_safetensors_bfloat16_by_hand(tmp_path):
    header = json.dumps({"x": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\x80\x3f\x00\xc0")
    found = read(tmp_path / "x.safetensors")["x"]
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found.astype(np.float32), [1.0, -2.0])


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_what_we_write_others_read(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    state = {**SMALL, "a.tiny": RNG.normal(size=(4,)).astype(ml_dtypes.float8_e5m2)}
    files.write(path, state, {"note": "ü"})
    found, kept = files.read_with_metadata(path)
    same(found, state)
    assert kept == {"note": "ü"} == {k: v for k, v in files.read_metadata(path).items() if k != "dtypes"}
    if suffix == ".npz":
        np.testing.assert_array_equal(np.load(path)["a.weight"], SMALL["a.weight"])
    else:
        with safetensors.safe_open(path, framework="np") as file:
            assert set(file.keys()) == set(state)
            np.testing.assert_array_equal(file.get_tensor("a.weight"), SMALL["a.weight"])


def test_kind_is_seen_by_content(tmp_path):
    with (tmp_path / "x.pth").open("wb") as file:
        np.savez(file, a=np.ones(2))
    assert list(read(tmp_path / "x.pth")) == ["a"]


def test_prefix(tmp_path):
    state = {f"module.backbone.{k}": v for k, v in SMALL.items()} | {"module.head.w": np.ones(2, np.float32)}
    path = torch_zip(tmp_path / "x.pth", tensors(state))
    same(read(path, prefix="module.backbone."), SMALL)
    with pytest.raises(UserError, match=r"did you mean 'module.backbone.'"):
        read(path, prefix="module.backbon.")


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("inside", [lambda x: {"state_dict": x}, lambda x: [x], lambda x: x])
def test_hostile_pickle_is_refused_and_not_run(tmp_path, writer, inside):
    path = WRITERS[writer](tmp_path / "x.pth", inside(Hostile(tmp_path / "ran")))
    with pytest.raises(UserError) as error:
        read(path)
    assert "'posix.system'" in one_sentence(error) and "refused" in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_hostile_pickle_would_run(tmp_path):
    """The file of the test above is a real attack: a plain unpickler runs it."""
    torch_zip(tmp_path / "x.pth", Hostile(tmp_path / "ran"))
    with zipfile.ZipFile(tmp_path / "x.pth") as archive:
        pickle.loads(archive.read("archive/data.pkl"))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n(S'true'\ntR.",  # a plain pickle of protocol 0
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.",
        b"\x80\x02cbuiltins\ngetattr\n.",
        b"\x80\x04\x8c\x0bcollections\x8c\x20OrderedDict.__init__.__globals__\x93.",
    ],
)
def test_other_ways_to_run_code_are_refused(tmp_path, program):
    (tmp_path / "x.bin").write_bytes(program)
    with pytest.raises(UserError, match="refused"):
        read(tmp_path / "x.bin")


def test_a_pickle_cannot_change_the_reader(tmp_path):
    """BUILD with a slot state sets attributes: of nothing that the next file sees."""
    program = b"\x80\x02cargparse\nNamespace\nN}X\x08\x00\x00\x00__call__cargparse\nNamespace\ns\x86b."
    (tmp_path / "x.bin").write_bytes(program)
    with pytest.raises(UserError):
        read(tmp_path / "x.bin")
    same(read(torch_zip(tmp_path / "x.pth", tensors(SMALL))), SMALL)


def test_whole_pickled_model_and_torchscript_are_refused(tmp_path):
    class Model:
        def __reduce__(self):
            return Name("torchvision.models.resnet", "ResNet"), ()

    with pytest.raises(UserError, match=r"torchvision.models.resnet.ResNet.*state_dict"):
        read(torch_zip(tmp_path / "x.pth", Model()))
    torch_zip(tmp_path / "y.pt", {})
    with zipfile.ZipFile(tmp_path / "y.pt", "a") as archive:
        archive.writestr("archive/constants.pkl", b"")
    with pytest.raises(UserError, match="TorchScript"):
        read(tmp_path / "y.pt")


def every_format(folder):
    state = {k: v for k, v in SMALL.items() if v.dtype != ml_dtypes.bfloat16}
    state["b"] = RNG.normal(size=(40, 50)).astype(np.float32)
    safetensors.numpy.save_file(state, folder / "x.safetensors")
    files.write(folder / "ours.safetensors", state, {})
    np.savez(folder / "x.npz", **state)
    torch_zip(folder / "zip.pth", tensors(state))
    torch_legacy(folder / "legacy.pth", tensors(state))
    return sorted(path for path in folder.iterdir() if path.is_file())


def test_truncated_files(tmp_path):
    for path in every_format(tmp_path):
        whole = path.read_bytes()
        read(path)
        for share in (0.0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.999):
            path.write_bytes(whole[: int(len(whole) * share)])
            with pytest.raises(UserError) as error:
                read(path)
            assert str(path) in one_sentence(error)


def test_flipped_byte_is_found_where_the_format_has_a_checksum(tmp_path):
    for path in every_format(tmp_path):
        if path.name in ("x.safetensors", "legacy.pth"):
            continue
        whole = bytearray(path.read_bytes())
        whole[len(whole) // 2] ^= 4  # inside the largest array
        path.write_bytes(whole)
        with pytest.raises(UserError) as error:
            read(path)
        assert "corrupt" in one_sentence(error) and str(path) in str(error.value)


def test_random_damage_never_shows_a_traceback(tmp_path):
    for path in every_format(tmp_path):
        whole = path.read_bytes()
        for seed in range(40):
            rng, damaged = np.random.default_rng(seed), bytearray(whole)
            for at in rng.integers(0, min(len(whole), 900), size=3):
                damaged[at] = rng.integers(256)
            path.write_bytes(damaged)
            try:
                read(path)
            except UserError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-lfs pointer"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\x89HDF\r\n\x1a\n0000000000", "Keras or HDF5"),
        (b"\xff\xd8\xff\xe0 a photo", "JPEG"),
        (b"hello, world, this is text", "neither"),
    ],
)
def test_other_kinds_of_file(tmp_path, content, says):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read(path)
    assert says in one_sentence(error)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            read(path)


def test_objects_in_npz_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.array([{}, 1], dtype=object))
    with pytest.raises(UserError, match="corrupt"):
        read(tmp_path / "x.npz")


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_file_limit_of_the_system_leaves_nothing(tmp_path, suffix):
    """A real refusal by the kernel, not a simulated one."""
    state = {"x": np.zeros((300, 300), np.float32)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(UserError) as error:
            files.write(tmp_path / f"x{suffix}", state, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written" in one_sentence(error) and leftovers(tmp_path) == []


def test_write_needs_a_known_suffix(tmp_path):
    with pytest.raises(UserError, match=r"safetensors or \.npz"):
        files.write(tmp_path / "x.pth", SMALL, {})


# --- bombs -----------------------------------------------------------------------------------------------------------

COPIES = b"\x80\x02}q\x00(" + b"".join(b"K" + bytes([i]) + b"K\x00" for i in range(256)) + b"u0"
BOMBS = {
    "memo": b"\x80\x02]r\xff\xff\xff\x0f.",  # entry 2^28 - 1 of the memo: 4 GB where the memo is an array
    "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 3 << 30) + b"x.",
    "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 3 << 30) + b"x.",
    "text": b"\x80\x04\x8d" + struct.pack("<Q", 3 << 30) + b"x.",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 3 << 30) + b"x.",
    "long": b"\x80\x02\x8b" + struct.pack("<i", 1 << 30) + b"x.",
    "lists": b"\x80\x02" + b"]" * (1 << 20) + b".",
    "dicts": b"\x80\x02" + b"}" * (1 << 20) + b".",
    "doubled": b"\x80\x02](" + b"K\x01" * 9 + b"e" + b"2" * (1 << 20) + b".",
    "copies": COPIES + b"ccollections\nOrderedDict\nh\x00\x85R" * 40_000 + b".",
    "hashes": b"\x80\x02}(" + b"".join(
        b"\x8a\x0c" + (i * (2**61 - 1)).to_bytes(12, "little") + b"K\x00" for i in range(20, 50_000)
    ) + b"u.",
    "dimensions": b"\x80\x02ctorch._utils\n_rebuild_tensor\n(K\x00K\x00(" + b"K\x01" * 500 + b"tq\x00h\x00tR.",
}  # fmt: skip


@pytest.fixture
def bounded():
    """What a refusal may take: 2 s for each of two files, and 256 MB."""
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - began < 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10  # KB


@pytest.mark.parametrize("name", BOMBS)
def test_pickles_that_ask_for_much(tmp_path, bounded, name):
    (tmp_path / "x.bin").write_bytes(BOMBS[name])
    with zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", BOMBS[name])
    for path in (tmp_path / "x.bin", tmp_path / "x.pth"):
        with pytest.raises(UserError) as error:
            read(path)
        assert str(path) in one_sentence(error)


def test_arrays_of_a_thousand_dimensions_are_told_in_a_short_sentence(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [1] * 1000, "data_offsets": [0, 4]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    words = repr({"descr": "<f4", "fortran_order": False, "shape": (1,) * 1000}).encode()
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("a.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(words)) + words + bytes(4))
    for name in ("x.safetensors", "x.npz"):
        with pytest.raises(UserError, match="has 1,000 dimensions") as error:
            read(tmp_path / name)
        assert len(one_sentence(error)) < 300


def test_tensors_that_repeat_their_storage(tmp_path, bounded):
    """Each is below the limit of one tensor; together they are not."""
    storage = Storage("0", np.zeros(8, np.float32))
    tree = {f"x{i}": Tensor(storage, 0, (1 << 24,), (0,)) for i in range(6)}
    with pytest.raises(UserError, match="tensors have 402,653,184 bytes, at most"):
        read(torch_zip(tmp_path / "x.pth", tree))


def test_a_zip_bomb_of_weights(tmp_path, bounded):
    for name in ("x.npz", "x.pth"):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            archive.writestr("a.npy" if name == "x.npz" else "archive/data/0", bytes(1 << 20))
        whole = bytearray((tmp_path / name).read_bytes())
        struct.pack_into("<I", whole, whole.rfind(b"PK\1\2") + 24, 3 << 30)
        (tmp_path / name).write_bytes(whole)
        with pytest.raises(UserError, match="unpack to 3,221,225,472 bytes"):
            read(tmp_path / name)


def safetensors_by_hand(path, header, count=16, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(count))
    return path


def entry(begin, stop, shape=None, dtype="F32"):
    return {"dtype": dtype, "shape": [(stop - begin) // 4] if shape is None else shape, "data_offsets": [begin, stop]}


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({"a": entry(0, 8), "b": entry(4, 16)}, "'b' begins at 4, where 8 is the end"),
        ({"a": entry(0, 16), "b": entry(0, 16)}, "begins at 0, where 16 is the end"),
        ({"a": entry(0, 4), "b": entry(8, 16)}, "'b' begins at 8, where 4 is the end"),
        ({"a": entry(4, 16)}, "'a' begins at 4, where 0 is the end"),
        ({"a": entry(0, 12)}, "16 bytes of arrays, and 12 are announced"),
        ({"a": entry(0, 16, [-2, -2])}, "shape"),
        ({"a": entry(0, 16, [4.0])}, "shape"),
        ({"a": entry(0, 16, [True] * 2 + [4])}, "shape"),
        ({"a": entry(0, 16, [1] * 200 + [4])}, "201 dimensions"),
        ({"a": entry(0, 1 << 40, [1 << 38])}, "is the end of|announced"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}',
         "a name twice"),
        (b'{"a":' + b"[" * 100_000, "corrupt"),
        (b'{"a":[' + b"[]," * (4 << 20) + b"[]]}", "the header has .* bytes, at most"),
    ],
)  # fmt: skip
def test_safetensors_whose_places_do_not_agree(tmp_path, bounded, header, says):
    path = safetensors_by_hand(tmp_path / "x.safetensors", header)
    with pytest.raises(UserError, match=says) as error:
        read(path)
    assert str(path) in one_sentence(error)


def test_special_files_are_refused_at_once(tmp_path, bounded):
    os.mkfifo(tmp_path / "fifo.pth")
    for path, kind in ((tmp_path / "fifo.pth", "a FIFO"), ("/dev/zero", "a device"), (tmp_path, "a folder")):
        with pytest.raises(UserError, match=f"cannot be read .{kind}, not a regular file"):
            read(path)
