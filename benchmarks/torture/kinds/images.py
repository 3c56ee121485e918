"""Mutants of JPEG and PNG files, and special files: no crash, none over 2 s, the exact count and list of bad ones."""

import contextlib
import io
import logging
import os
import re
import socket
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.torture.harness import Case, Failed, Kind

GROUP, LIMIT = 100, 2.0


def case(case: Case) -> dict[str, Any]:
    logging.getLogger("mljax").setLevel(logging.ERROR)  # a line for each bad image
    names = _mutants(case) if case.what == "mutants" else [_special(case)]
    slowest, bad = 0.0, {}
    for name in names:
        began = time.perf_counter()
        if why := _decoded(case.folder / name):
            bad[name] = why
        slowest = max(slowest, time.perf_counter() - began)
        if slowest > LIMIT:
            raise Failed(f"{name} took {slowest:.1f} s")
    _check_list(case, names, bad)
    return {"figures": {"slowest image, s": round(slowest, 3)}, "unreadable": len(bad)}


def _decoded(path: Path) -> str:
    """Why an image cannot be read; empty if it can."""
    from mljax.pipeline.images import ImageError, decode

    try:
        image = decode(path)
    except ImageError as error:
        text = str(error)
        if "\n" in text or str(path.parent) not in text:
            raise Failed(f"{path.name}: not a line that names it: {text[:200]!r}") from None
        return text
    if image.mode != "RGB" or not image.width * image.height:
        raise Failed(f"{path.name} is read as {image.mode} of {image.size}")
    return ""


def _check_list(case: Case, names: list[str], bad: dict[str, str]) -> None:
    """The loader masks the bad ones, and its list names them and no other."""
    from mljax.data.source import Files, Source
    from mljax.pipeline import feature_cache, loader
    from mljax.pipeline.failures import Failures

    paths = [str(case.folder / name) for name in names]
    labels = np.ones((len(paths), 1), np.uint8)
    source = Source(
        name="mutants", classes=("x",), ids=names, labels=labels, observed=labels, scored=labels, read=Files(paths),
        fingerprint="",
    )  # fmt: skip
    failures, size = Failures(len(paths), allowed=1.0), min(20, len(paths))
    began = time.perf_counter()
    stream = loader.train_batches(
        source, feature_cache.view("32"), batch_size=size, seed=0, start=0, steps=len(paths) // size, threads=2,
        failures=failures,
    )  # fmt: skip
    mask = {int(i): float(m) for batch in stream for i, m in zip(batch["index"], batch["mask"])}
    if time.perf_counter() - began > LIMIT * len(names):
        raise Failed(f"the loader took {time.perf_counter() - began:.1f} s for {len(names)}")
    failures.write(case.folder / "list.tsv")
    listed = (case.folder / "list.tsv").read_text().splitlines()[1:] if bad else []
    masked = sorted(names[i] for i, m in mask.items() if not m)
    named = sorted(line.split("\t")[1] for line in listed)
    if not (masked == named == sorted(bad)) or len(mask) != len(names):
        raise Failed(f"{len(bad)} cannot be read, {len(masked)} are masked, {len(named)} listed, of {len(mask)}")


# --- mutants ----------------------------------------------------------------------------------------------------------


def _originals() -> list[tuple[str, bytes]]:
    """Pictures as cameras, phones and tools write them."""
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (12, 16, 3)).astype(np.uint8)).resize((120, 90))
    exif = Image.Exif()
    exif[0x0112] = 6
    made = [
        *((photo, "jpg", {"quality": q, "subsampling": s}) for q in (30, 75, 95) for s in (0, 2)),
        (photo, "jpg", {"progressive": True}),
        (photo, "jpg", {"restart_marker_blocks": 4}),
        (photo, "jpg", {"exif": exif}),
        (photo.convert("L"), "jpg", {}),
        (photo.convert("CMYK"), "jpg", {}),
        (photo, "png", {}),
        (photo, "png", {"compress_level": 0}),
        (photo.convert("RGBA"), "png", {}),
        (photo.convert("LA"), "png", {}),
        (photo.convert("P"), "png", {"transparency": 3}),
        (photo.convert("1"), "png", {}),
        (Image.fromarray(rng.integers(0, 65536, (40, 50)).astype(np.uint16)), "png", {}),
    ]
    originals = []
    for image, suffix, options in made:
        file = io.BytesIO()
        image.save(file, {"jpg": "JPEG", "png": "PNG"}[suffix], **options)
        originals.append((suffix, file.getvalue()))
    return originals


def _mutants(case: Case) -> list[str]:
    originals, names = _originals(), []
    for number in range(GROUP):
        suffix, data = originals[int(case.rng.integers(len(originals)))]
        names.append(f"{number}.{suffix}")
        (case.folder / names[-1]).write_bytes(_mutant(data, suffix, case.rng))
    return names


def _mutant(data: bytes, suffix: str, rng: np.random.Generator) -> bytes:
    changed, kind = bytearray(data), int(rng.integers(7))
    at = int(rng.integers(len(data)))
    if kind == 0:  # flipped bits, anywhere
        for _ in range(int(2 ** rng.integers(7))):
            changed[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del changed[at:]
    elif kind == 2:  # bytes of the header
        for _ in range(int(rng.integers(1, 9))):
            changed[int(rng.integers(min(64, len(data))))] = int(rng.integers(256))
    elif kind == 3:
        del changed[at : at + int(rng.integers(1, 200))]
    elif kind == 4:
        changed[at:at] = rng.bytes(int(rng.integers(1, 200)))
    elif kind == 5:  # one part of the file in the place of another
        start = int(rng.integers(len(data)))
        changed[at : at + 64] = data[start : start + 64]
    else:
        _resize(changed, suffix, rng)
    return bytes(changed)


def _resize(data: bytearray, suffix: str, rng: np.random.Generator) -> None:
    """Other dimensions in the header; of a PNG with the right checksum."""
    sizes = (0, 1, 2**15, 65535, 2**31 - 1, 2**32 - 1, int(rng.integers(300)))
    width, height = (sizes[int(rng.integers(len(sizes)))] for _ in range(2))
    if suffix == "png":
        struct.pack_into(">II", data, 16, width, height)
        struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
    elif match := re.search(rb"\xff[\xc0\xc2]...", data, flags=re.S):
        struct.pack_into(">HH", data, match.end(), height & 0xFFFF, width & 0xFFFF)


# --- special files ----------------------------------------------------------------------------------------------------


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png(width: int, height: int, *chunks: bytes, pixels: bytes = b"") -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    tail = _chunk(b"IDAT", zlib.compress(pixels, 9)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + b"".join(chunks) + tail


def _jpeg(width: int, height: int, scans: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, "JPEG", progressive=bool(scans))
    data = bytearray(file.getvalue())
    match = re.search(rb"\xff[\xc0\xc2]...", data, flags=re.S)
    assert match is not None
    struct.pack_into(">HH", data, match.end(), height, width)
    if scans:
        start, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
        data[end:end] = data[start:end] * scans
    return bytes(data)


def _tiff_circle() -> bytes:
    """A directory whose next directory is itself."""
    return b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 256, 4, 1, 10) + struct.pack("<I", 8)


def _frames() -> bytes:
    file = io.BytesIO()
    frames = [Image.new("P", (20, 20), i % 200) for i in range(800)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # its name may have 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2 << 30)


def _bytes(make: Callable[[], bytes]) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(make())


SPECIAL: dict[str, Callable[[Path], Any]] = {
    "fifo": os.mkfifo,
    "socket": _socket,
    "folder": Path.mkdir,
    "link to itself": lambda path: path.symlink_to(path),
    "link to nothing": lambda path: path.symlink_to("nowhere.png"),
    "link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "link to /dev/random": lambda path: path.symlink_to("/dev/random"),
    "link to memory": lambda path: path.symlink_to("/proc/self/mem"),
    "empty": _bytes(lambda: b""),
    "one byte": _bytes(lambda: b"\xff"),
    "two gigabytes of nothing": _sparse,
    "PNG of 60,000 by 60,000": _bytes(lambda: _png(60_000, 60_000)),
    "PNG of zeros": _bytes(lambda: _png(30_000, 30_000, pixels=bytes(10**8))),
    "PNG without pixels": _bytes(lambda: _png(0, 0)),
    "PNG with a text of 200 MB": _bytes(
        lambda: _png(8, 8, _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200 << 20), 9)), pixels=bytes(8 * 25))
    ),
    "JPEG of 65,500 by 65,500": _bytes(lambda: _jpeg(65_500, 65_500)),
    "JPEG of 2,000 scans": _bytes(lambda: _jpeg(8_000, 8_000, scans=2_000)),
    "TIFF in a circle": _bytes(_tiff_circle),
    "GIF of 800 frames": _bytes(_frames),
    "PPM of 30,000 by 30,000": _bytes(lambda: b"P4\n30000 30000\n"),
}


def _special(case: Case) -> str:
    name = "photo.tif" if "TIFF" in case.what else "photo.png"
    with contextlib.suppress(FileExistsError):
        SPECIAL[case.what](case.folder / name)
    return name


KIND = Kind(
    name="images",
    goal="mutants of JPEG and PNG, special files: no crash, none over 2 s, exact count and list",
    plan={"mutants": 120, **dict.fromkeys(SPECIAL, 1)},
    units={"mutants": GROUP},
    case=case,
    limit=60.0,
)
