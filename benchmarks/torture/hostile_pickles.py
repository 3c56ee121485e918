"""PyTorch files that attack who reads them: pickles that call functions, and that take memory or time without end."""

import io
import pickle
import struct
import zipfile
from collections.abc import Callable

MAGIC = 0x1950A86A20F9469CFC6C  # of torch.save's older format


def _call(module: str, name: str, argument: str) -> bytes:
    """GLOBAL, a tuple of one text, REDUCE."""
    return f"c{module}\n{name}\n(V{argument}\ntR.".encode()


def _stack_global(module: str, name: str, argument: str) -> bytes:
    def text(value: str) -> bytes:
        return b"\x8c" + bytes([len(value)]) + value.encode()

    return b"\x80\x04" + text(module) + text(name) + b"\x93" + text(argument) + b"\x85R."


def calls(marker: str) -> dict[str, bytes]:
    """Pickles that make the file `marker` if any of them is unpickled as Python does."""
    shell = f"touch {marker}"
    code = f"open({marker!r}, 'w')"
    return {
        "posix.system": _call("posix", "system", shell),
        "os.system": _call("os", "system", shell),
        "os.popen": _call("os", "popen", shell),
        "subprocess.getoutput": _call("subprocess", "getoutput", shell),
        "builtins.eval": _call("builtins", "eval", code),
        "builtins.exec": _call("builtins", "exec", code),
        "python 2 eval": _call("__builtin__", "eval", code),
        "STACK_GLOBAL": _stack_global("posix", "system", shell),
        "INST": f"(V{shell}\niposix\nsystem\n.".encode(),
        "OBJ": f"(cposix\nsystem\nV{shell}\no.".encode(),
        "NEWOBJ": b"\x80\x02cposix\nsystem\n(X" + struct.pack("<I", len(shell)) + shell.encode() + b"t\x81.",
        "a chain of getattr": b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(Vos\ntRVsystem\ntR(V"
        + shell.encode()
        + b"\ntR.",
        "a dotted name": _stack_global("os", "path.os.system", shell),
        "a call by BUILD": b"ccollections\nOrderedDict\n)R}(V__class__\ncposix\nsystem\nub(V"
        + shell.encode()
        + b"\ntR.",
        "a dict that calls": b"}(Vstate_dict\n" + _call("posix", "system", shell)[:-1] + b"u.",
        "a pickle in a pickle": b"cpickle\nloads\n(C"
        + bytes([len(c := _call("posix", "system", shell)[:255])])
        + c
        + b"tR.",
        "torch.load": _call("torch", "load", marker),
        "torch.hub": _call("torch.hub", "load", shell),
        "numpy.load": _call("numpy", "load", marker),
        "runpy": _call("runpy", "run_path", marker),
        "functools.partial": b"cfunctools\npartial\n(cposix\nsystem\nV" + shell.encode() + b"\ntR)R.",
        "mljax itself": _call("mljax.weights.files", "read", marker),
    }


def _long(size: int) -> bytes:
    return b"\x80\x02\x8b" + struct.pack("<I", size)


def _laughs(levels: int) -> bytes:
    """A list that holds twice a list that holds twice a list .. : 2 ** levels leaves for who walks it."""
    body = b"]q\x00(" + b"K\x01K\x01e"
    for level in range(levels):
        body += b"]r" + struct.pack("<I", level + 1) + b"(" + 2 * (b"j" + struct.pack("<I", level)) + b"e"
    return b"\x80\x02" + body.replace(b"q\x00", b"r\0\0\0\0", 1) + b"."


def _tensor(shape: str, stride: str, count: int = 4, offset: int = 0) -> bytes:
    storage = f"((Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI{count}\ntQ".encode()
    return (
        b"}(Vx\nctorch._utils\n_rebuild_tensor_v2\n(" + storage[1:] + f"I{offset}\n{shape}{stride}I00\n}}tRu.".encode()
    )


def bombs() -> dict[str, bytes]:
    """Pickles that declare or build more than they hold."""
    far = struct.pack("<I", 2**31 - 1)
    return {
        "a text of 2**62 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 2**62),
        "bytes of 2**62": b"\x80\x04\x8e" + struct.pack("<Q", 2**62),
        "a bytearray of 2**62": b"\x80\x05\x96" + struct.pack("<Q", 2**62),
        "a text of 4 GB": b"X" + struct.pack("<I", 2**32 - 1),
        "a frame of 2**62": b"\x80\x04\x95" + struct.pack("<Q", 2**62),
        "a number of 2 GB": _long(2**31 - 1),
        "a number of a million digits": b"I" + b"9" * 1_000_000 + b"\n.",
        "a far place of the memo": b"]r" + far + b".",
        "many far places": b"".join(b"]r" + struct.pack("<I", 2**26 + 2**24 * i) + b"0" for i in range(60)) + b"].",
        "a billion laughs": _laughs(60),
        "lists in lists": b"]" * 200_000 + b"a" * 199_999 + b".",
        "tuples in tuples": b")" + b"\x85" * 200_000 + b".",
        "a million marks": b"(" * 1_000_000,
        "a million pops": b"N0" * 1_000_000 + b"N.",
        "never an end": b"N" * 1_000_000,
        "a storage of 2**60": _tensor("(I4\nt", "(I1\nt", count=2**60),
        "a tensor of 2**40 from one number": _tensor("(I1099511627776\nt", "(I0\nt"),
        "a tensor outside its storage": _tensor("(I4\nt", "(I1\nt", offset=10**9),
        "a negative stride": _tensor("(I4\nt", "(I-1\nt"),
        "a tensor of 10,000 dimensions": _tensor("(" + "I1\n" * 10_000 + "t", "(" + "I1\n" * 10_000 + "t"),
        "an extension code": b"\x80\x02\x82\x01.",
        "an unknown opcode": b"\x80\x02\xff.",
        "a persistent id as text": b"Pstorage\n.",
        "nothing": b".",
    }


def zipped(body: bytes) -> bytes:
    """As torch.save writes it since 1.6."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", body)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", bytes(16))
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def legacy(body: bytes) -> bytes:
    """As torch.save wrote it before."""
    heads = (MAGIC, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}})
    tail = pickle.dumps(["0"], 2) + struct.pack("<q", 4) + bytes(16)
    return b"".join(pickle.dumps(head, 2) for head in heads) + body + tail


CONTAINERS: dict[str, Callable[[bytes], bytes]] = {"zip": zipped, "legacy": legacy}
