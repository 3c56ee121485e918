"""Archives, arrays, tables and annotations that attack who reads them."""

import io
import json
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable

import numpy as np

Files = dict[str, Callable[[], bytes]]

# --- numpy ------------------------------------------------------------------------------------------------------------


def _npy(header: str, body: bytes = b"", version: bytes = b"\x01\0") -> bytes:
    text = header.encode() + b"\n"
    size = struct.pack("<H" if version == b"\x01\0" else "<I", len(text))
    return b"\x93NUMPY" + version + size + text + body


def _shaped(shape: str, descr: str = "'<f4'", body: bytes = bytes(16)) -> bytes:
    return _npy(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}", body)


def _zip(members: list[tuple[str, bytes]], compress: bool = False) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        for name, body in members:
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
            archive.writestr(info, body)
    return file.getvalue()


def _npz(body: bytes, name: str = "a.npy") -> bytes:
    return _zip([(name, body)])


def _patched(data: bytes, at: int, code: str, value: int) -> bytes:
    """A zip file with another number in the last entry of its list of members."""
    changed = bytearray(data)
    struct.pack_into(code, changed, changed.rfind(b"PK\1\2") + at, value)
    return bytes(changed)


def _objects() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([{"x": 1}, None], dtype=object), allow_pickle=True)
    return file.getvalue()


NPZ: Files = {
    "objects": lambda: _npz(_objects()),
    "2**40 numbers": lambda: _npz(_shaped("(1099511627776,)")),
    "a shape that overflows": lambda: _npz(_shaped("(4294967296, 4294967296, 4)")),
    "a negative shape": lambda: _npz(_shaped("(-1, -4)")),
    "1,000 dimensions": lambda: _npz(_shaped("(" + "1," * 1000 + ")")),
    "a text of 2 GB a number": lambda: _npz(_shaped("(4,)", "'<U536870911'")),
    "a header that is code": lambda: _npz(_npy("__import__('os').system('touch marker')")),
    "a header of brackets": lambda: _npz(_npy("(" * 60000)),
    "a header of 1 GB": lambda: _npz(b"\x93NUMPY\x02\0" + struct.pack("<I", 1 << 30) + b"{}"),
    "a header of 4 MB": lambda: _npz(_npy("{'descr': '<f4'," + " " * (4 << 20) + "}", version=b"\x02\0")),
    "a dtype of 20,000 fields": lambda: _npz(
        _npy(str({"descr": [(f"f{i}", "<f4") for i in range(2500)], "fortran_order": False, "shape": (1,)}))
    ),
    "an unknown version": lambda: _npz(_npy("{}", version=b"\x09\0")),
    "300 MB of zeros": lambda: _zip([("a.npy", _shaped("(78643200,)", body=bytes(300 << 20)))], compress=True),
    "declares 3 GB": lambda: _patched(_npz(_shaped("(4,)")), 24, "<I", 3 << 30),
    "declares less than it has": lambda: _patched(_zip([("a.npy", _shaped("(999999,)"))], compress=True), 24, "<I", 90),
    "members that overlap": lambda: _patched(
        _zip([("a.npy", _shaped("(4,)")), ("b.npy", _shaped("(4,)"))]), 42, "<I", 0
    ),
    "a member beyond the end": lambda: _patched(_npz(_shaped("(4,)")), 42, "<I", 2**31),
    "100,000 members": lambda: _zip([(f"{i}.npy", b"") for i in range(100_000)]),
    "two members of one name": lambda: _zip([("a.npy", _shaped("(4,)"))] * 2),
    "an encrypted member": lambda: _patched(_npz(_shaped("(4,)")), 8, "<H", 1),
    "an unknown compression": lambda: _patched(_npz(_shaped("(4,)")), 10, "<H", 99),
    "a wrong checksum": lambda: _patched(_npz(_shaped("(4,)")), 16, "<I", 1),
}

# --- safetensors ------------------------------------------------------------------------------------------------------


def _safe(header: str | bytes, body: bytes = bytes(16), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def _entry(shape: object = (4,), start: object = 0, end: object = 16, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def _arrays(**entries: object) -> bytes:
    return _safe(json.dumps(entries))


SAFETENSORS: Files = {
    "a header of 2**60 bytes": lambda: _safe("{}", length=2**60),
    "a header longer than the file": lambda: _safe("{}", length=10_000),
    "a header of 20 MB": lambda: _safe("{" + " " * (20 << 20) + "}"),
    "brackets": lambda: _safe('{"a":' + "[" * 1_000_000),
    "objects in objects": lambda: _safe('{"a":' * 100_000),
    "one name twice": lambda: _safe(f'{{"a": {json.dumps(_entry())}, "a": {json.dumps(_entry())}}}'),
    "arrays that overlap": lambda: _arrays(a=_entry(), b=_entry((2,), 8, 16)),
    "a gap": lambda: _arrays(a=_entry((1,), 0, 4), b=_entry((1,), 12, 16)),
    "an end before its start": lambda: _arrays(a=_entry((4,), 16, 0)),
    "a negative start": lambda: _arrays(a=_entry((4,), -16, 0)),
    "beyond the end": lambda: _arrays(a=_entry((400,), 0, 1600)),
    "a shape of other bytes": lambda: _arrays(a=_entry((5,))),
    "a shape of 2**62": lambda: _arrays(a=_entry((2**31, 2**31), 0, 2**64)),
    "a negative shape": lambda: _arrays(a=_entry((-2, -2))),
    "10,000 dimensions": lambda: _arrays(a=_entry((1,) * 9_999 + (4,))),
    "an unknown dtype": lambda: _arrays(a=_entry(dtype="F7")),
    "texts for numbers": lambda: _arrays(a=_entry(("4",), "0", "16")),
    "a number of a million digits": lambda: _safe('{"a": ' + "9" * 1_000_000 + "}"),
    "metadata of numbers": lambda: _safe(json.dumps({"__metadata__": {"a": 1}, "a": _entry()})),
    "a list": lambda: _safe("[1, 2]"),
    "no UTF-8": lambda: _safe(b'{"\xff\xfe": 1}'),
}

# --- archives ---------------------------------------------------------------------------------------------------------


def _tar(*members: tuple[str, bytes, dict[str, object]], form: int = tarfile.GNU_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for name, body, settings in members:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            for key, value in settings.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(body))
    return file.getvalue()


def _link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tuple[str, bytes, dict[str, object]]:
    return name, b"", {"type": kind, "linkname": target}


def _resized(data: bytes, size: int) -> bytes:
    """A tar file whose first member says that it is larger."""
    changed = bytearray(data)
    changed[124:136] = f"{size:011o}\0".encode()
    changed[148:156] = b" " * 8
    changed[148:156] = f"{sum(changed[:512]):06o}\0 ".encode()
    return bytes(changed)


TAR: Files = {
    "above": lambda: _tar(("../marker", b"x", {})),
    "far above": lambda: _tar(("a/../../../marker", b"x", {})),
    "an absolute path": lambda: _tar(("/tmp/mljax-torture-marker", b"x", {})),
    "the folder itself": lambda: _tar((".", b"x", {"type": tarfile.REGTYPE})),
    "a link and through it": lambda: _tar(_link("a", ".."), ("a/marker", b"x", {})),
    "a hard link": lambda: _tar(_link("a", "/etc/passwd", tarfile.LNKTYPE)),
    "a device": lambda: _tar(("a", b"", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5})),
    "a FIFO": lambda: _tar(("a", b"", {"type": tarfile.FIFOTYPE})),
    "a file and a folder": lambda: _tar(("a", b"x", {}), ("a/b", b"x", {})),
    "backslashes": lambda: _tar(("..\\marker", b"x", {})),
    "a drive": lambda: _tar(("C:/marker", b"x", {})),
    "a NUL": lambda: _tar(("a\0b" + "/" * 100 + "c", b"x", {}), form=tarfile.PAX_FORMAT),
    "a member of 8 GB": lambda: _resized(_tar(("a", b"x", {})), 8 << 30),
    "a long name of 1 GB": lambda: _resized(_tar(("a" * 200, b"x", {})), 1 << 30),
    "cut short": lambda: _tar(("a", bytes(100_000), {}))[:50_000],
    "headers of 40 MB": lambda: _tar(
        ("a", b"x", {"pax_headers": {"comment": "x" * (40 << 20)}}), form=tarfile.PAX_FORMAT
    ),
}


def _zip_link() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        info = zipfile.ZipInfo("a")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc")
        archive.writestr("a/marker", "x")
    return file.getvalue()


ZIP: Files = {
    "above": lambda: _zip([("../marker", b"x")]),
    "an absolute path": lambda: _zip([("/tmp/mljax-torture-marker", b"x")]),
    "the folder itself": lambda: _zip([(".", b"x")]),
    "backslashes": lambda: _zip([("..\\..\\marker", b"x")]),
    "a drive": lambda: _zip([("C:\\marker", b"x")]),
    "a link and through it": _zip_link,
    "a file and a folder": lambda: _zip([("a", b"x"), ("a/b", b"x")]),
    "1 GB of zeros": lambda: _zip([("a", bytes(1 << 30))], compress=True),
    "declares 8 GB": lambda: _patched(_zip([("a", b"x")]), 24, "<I", 2**32 - 2),
    "members that overlap": lambda: _patched(_zip([("a", b"x" * 99), ("b", b"y" * 99)]), 42, "<I", 0),
    "a name of 60,000 letters": lambda: _zip([("a" * 60_000, b"x")]),
    "an encrypted member": lambda: _patched(_zip([("a", b"x")]), 8, "<H", 1),
}

# --- tables and annotations -------------------------------------------------------------------------------------------


def _coco(**changes: object) -> bytes:
    return json.dumps({"images": [], "categories": [], "annotations": [], **changes}).encode()


JSON: Files = {
    "brackets": lambda: b"[" * 1_000_000,
    "objects in objects": lambda: b'{"images":' * 100_000,
    "a number of a million digits": lambda: b'{"images": ' + b"9" * 1_000_000 + b"}",
    "texts for lists": lambda: _coco(images="x" * 100, categories="y"),
    "ids that are lists": lambda: _coco(images=[{"id": [1], "file_name": "a"}]),
    "file names above": lambda: _coco(images=[{"id": 1, "file_name": "../../../../etc/passwd"}]),
    "a list": lambda: b"[1, 2, 3]",
    "no UTF-8": lambda: b'{"images": "\xff\xfe"}',
    "nothing": lambda: b"",
}
HEAD = b"image,labels,split\n"
CSV: Files = {
    "a field of 50 MB": lambda: HEAD + b"a" * (50 << 20) + b",cat,train\n",
    "a quote without end": lambda: HEAD + b'"a.png,cat,train\n' * 100_000,
    "a million columns": lambda: b"," * 1_000_000 + b"\n" + HEAD,
    "NULs": lambda: HEAD + b"\0" * 1_000_000 + b",cat,train\n",
    "a device for an image": lambda: HEAD + b"/dev/zero,cat,train\n/dev/random,dog,train\n",
    "images above": lambda: HEAD + b"../../../../../../etc/passwd,cat,train\n",
    "UTF-16": lambda: "image,labels,split\na.png,cat,train\n".encode("utf-16"),
    "compressed": lambda: zlib.compress(HEAD * 1000),
    "300,000 labels": lambda: HEAD + b"a.png," + b"|".join(b"%d" % i for i in range(300_000)) + b",train\n",
}
