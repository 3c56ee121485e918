"""Special files, and files that declare more than they hold: refused at once, and before memory is taken."""

import io
import os
import socket
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest

from mljax import untrusted

LIMIT = 2.0  # seconds


@pytest.fixture
def bounded():
    """What a test may take: 2 s, and 256 MB."""
    tracemalloc.start()
    began = time.monotonic()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.monotonic() - began < LIMIT and peak < 256 << 20


def special(folder):
    """{kind: path} of files that are not regular ones."""
    os.mkfifo(folder / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket"))
    (folder / "folder").mkdir()
    (folder / "link").symlink_to(folder / "fifo")
    names = {"a FIFO": "fifo", "a socket": "socket", "a folder": "folder", "a FIFO, ": "link"}
    return {text: folder / name for text, name in names.items()} | {"a device": "/dev/zero"}


def test_only_regular_files_are_opened(tmp_path, bounded):
    for text, path in special(tmp_path).items():
        with pytest.raises(untrusted.NotRegular) as error:
            untrusted.open_regular(path)
        assert error.value.strerror.startswith(text) and str(path) in str(error.value)
    (tmp_path / "x").write_bytes(b"12345")
    (tmp_path / "y").symlink_to(tmp_path / "x")
    assert untrusted.read_regular(tmp_path / "y", 5) == b"12345"
    with pytest.raises(untrusted.NotRegular, match="5 bytes, at most 4 are read"):
        untrusted.read_regular(tmp_path / "x", 4)
    with pytest.raises(FileNotFoundError):
        untrusted.read_regular(tmp_path / "none")


def npy(array=None, shape=None) -> bytes:
    """A .npy file, with another shape in its header if one is given."""
    file = io.BytesIO()
    array = np.arange(6, dtype=np.float32) if array is None else array
    np.lib.format.write_array_header_1_0(
        file, {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape if shape is None else shape}
    )
    return file.getvalue() + array.tobytes()


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_arrays_as_numpy_wrote_them(tmp_path, write):
    arrays = {
        "plain": np.arange(12.0).reshape(3, 4),
        "fortran": np.asfortranarray(np.arange(12, dtype=np.int16).reshape(3, 4)),
        "text": np.array(["ä", "bcd"]),
        "scalar": np.array(3),
        "empty": np.zeros((0, 3), np.uint8),
        "big": np.random.default_rng(0).integers(0, 9, (700, 500)),
    }
    write(tmp_path / "x.npz", **arrays)
    read = untrusted.read_npz(tmp_path / "x.npz")
    assert list(read) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array)
        assert read[name].dtype == array.dtype
        np.save(tmp_path / "x.npy", array)
        np.testing.assert_array_equal(untrusted.read_npy(tmp_path / "x.npy"), array)
    assert list(untrusted.read_npz(tmp_path / "x.npz", names=["text"])) == ["text"]


@pytest.mark.parametrize("shape", [(1 << 40,), (7,), (-1, -6), (5,), (1,) * 40, (1 << 62, 0)])
def test_shapes_that_do_not_fit_the_file(tmp_path, bounded, shape):
    says = "40 dimensions" if len(shape) == 40 else "shape"
    (tmp_path / "x.npy").write_bytes(npy(shape=shape))
    with pytest.raises(ValueError, match=says):
        untrusted.read_npy(tmp_path / "x.npy")
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("a.npy", npy(shape=shape))
    with pytest.raises(ValueError, match=says):
        untrusted.read_npz(tmp_path / "x.npz")


def test_a_bomb_is_refused_from_its_list_of_members(tmp_path, bounded):
    """3 GB of zeros in 3 MB; declared sizes are refused, and so are more bytes than were declared."""
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("a.npy", npy(np.zeros(1 << 20, np.uint8), shape=(300 << 20,)))
    whole = (tmp_path / "x.npz").read_bytes()
    at = whole.rfind(b"PK\1\2")
    declared = bytearray(whole)
    struct.pack_into("<I", declared, at + 24, 3 << 30)
    (tmp_path / "x.npz").write_bytes(declared)
    with pytest.raises(ValueError, match=r"unpack to 3,221,225,472 bytes, at most"):
        untrusted.read_npz(tmp_path / "x.npz")
    struct.pack_into("<I", declared, at + 24, 200)  # less than there is
    (tmp_path / "x.npz").write_bytes(declared)
    with pytest.raises((ValueError, zipfile.BadZipFile)):
        untrusted.read_npz(tmp_path / "x.npz")


def test_a_list_of_many_members_is_not_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        for i in range(40_000):
            archive.writestr(f"{i}.npy", b"")
    began = time.process_time()
    with pytest.raises(ValueError, match="at most 2,097,152 are read"):
        untrusted.read_npz(tmp_path / "x.npz")
    assert time.process_time() - began < 0.1


def test_members_that_overlap_and_lists_of_a_million(tmp_path, bounded):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("a.npy", npy())
        archive.writestr("b.npy", npy())
    whole = bytearray((tmp_path / "x.npz").read_bytes())
    struct.pack_into("<I", whole, whole.rfind(b"PK\1\2") + 42, 0)  # the second begins where the first does
    (tmp_path / "x.npz").write_bytes(whole)
    with pytest.raises((ValueError, zipfile.BadZipFile), match="overlap"):
        untrusted.read_npz(tmp_path / "x.npz")
    struct.pack_into("<I", whole, whole.rfind(b"PK\5\6") + 12, 1 << 30)
    (tmp_path / "x.npz").write_bytes(whole)
    with pytest.raises(ValueError, match="list of members has 1,073,741,824 bytes"):
        untrusted.read_npz(tmp_path / "x.npz")


def test_objects_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.array([{}, 1], dtype=object))
    with pytest.raises(ValueError, match="objects"):
        untrusted.read_npz(tmp_path / "x.npz")
