"""Files and names that attack: nothing of them is run, nothing is written outside, and they are refused in bounds.

Every file is read in a fork whose memory is measured. A file that is read without an error is well too, if it took
neither time nor memory and did nothing: what must be refused is what does harm.
"""

import contextlib
import os
import sys
import time
import traceback
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.torture import hostile_files, hostile_pickles
from benchmarks.torture.harness import Case, Failed, Kind

SECONDS, SPARE = 2.0, 256 << 20
OUTSIDE = Path("/tmp/mljax-torture-marker")

# --- files ------------------------------------------------------------------------------------------------------------


def _pickles(marker: str) -> dict[str, bytes]:
    bodies = {**hostile_pickles.calls(marker), **hostile_pickles.bombs()}
    return {f"{name}, {how}": wrap(b) for name, b in bodies.items() for how, wrap in hostile_pickles.CONTAINERS.items()}


KINDS: dict[str, tuple[str, list[str]]] = {
    "pth": ("x.pth", [*_pickles("x")]),
    "npz": ("x.npz", [*hostile_files.NPZ]),
    "safetensors": ("x.safetensors", [*hostile_files.SAFETENSORS]),
    "tar": ("x.tar", [*hostile_files.TAR]),
    "zip": ("x.zip", [*hostile_files.ZIP]),
    "json": ("instances_train2014.json", [*hostile_files.JSON]),
    "csv": ("x.csv", [*hostile_files.CSV]),
}
TABLES: Mapping[str, hostile_files.Files] = {
    "npz": hostile_files.NPZ,
    "safetensors": hostile_files.SAFETENSORS,
    "tar": hostile_files.TAR,
    "zip": hostile_files.ZIP,
    "json": hostile_files.JSON,
    "csv": hostile_files.CSV,
}


def _read(kind: str, path: Path) -> Any:
    """Read a file as a user of mljax would."""
    from mljax.data import coco, splits, unpack
    from mljax.weights import files

    if kind in ("pth", "npz", "safetensors"):
        return files.read(path)
    if kind in ("tar", "zip"):
        return unpack.unpack(path, path.parent / "unpacked" / "here")
    if kind == "json":
        return coco.coco("train", root=str(path.parents[1]))
    source = splits.load({"name": "csv", "file": str(path)}, "train")
    return [source.read(i) for i in range(min(4, len(source)))]


def _file(case: Case) -> dict[str, Any]:
    kind, _, name = case.what.removeprefix("file: ").partition(": ")
    inside = case.folder / "inside" / "annotations"
    inside.mkdir(parents=True)
    path, marker = inside / KINDS[kind][0], case.folder / "marker"
    path.write_bytes(_pickles(str(marker))[name] if kind == "pth" else TABLES[kind][name]())
    size = path.stat().st_size
    seconds, memory = _in_fork(case, lambda: _read(kind, path))
    outside = [p for p in case.folder.rglob("*") if p.is_file() and not p.name.startswith("log") and p != path]
    outside = [p for p in outside if inside / "unpacked" / "here" not in p.parents]
    if outside or OUTSIDE.exists() or (Path.cwd() / "marker").exists():
        raise Failed(f"written outside, or code was run: {outside[:2]}")
    if seconds > SECONDS:
        raise Failed(f"{seconds:.1f} s for {size:,} bytes")
    if memory > 2 * size + SPARE:
        raise Failed(f"{memory / 2**20:.0f} MiB for a file of {size / 2**20:.1f} MiB")
    return {
        "figures": {"seconds of a file": round(seconds, 2), "MiB above twice the file": max(0, memory - 2 * size) >> 20}
    }


def _in_fork(case: Case, read: Callable[[], Any]) -> tuple[float, int]:
    """Call in a fork -> seconds, and bytes of memory at most; what it raises is one sentence of a UserError."""
    _imported()
    log = case.folder / "log"
    pid = os.fork()
    if not pid:
        status = 70
        try:
            file = os.open(log, os.O_WRONLY | os.O_CREAT, 0o644)
            for number in (1, 2):
                os.dup2(file, number)
            sys.stdout = sys.stderr = os.fdopen(os.dup(file), "w", buffering=1)
            status = _measured(read, case.folder / "log.usage")
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    end = time.monotonic() + 5 * SECONDS
    while not (done := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            raise Failed(f"hung: more than {5 * SECONDS:.0f} s")
        time.sleep(0.01)
    if done[1]:
        raise Failed(f"status {os.waitstatus_to_exitcode(done[1])}: {log.read_text(errors='replace').strip()[-400:]!r}")
    seconds, memory = (case.folder / "log.usage").read_text().split()
    return float(seconds), int(memory)


def _measured(read: Callable[[], Any], report: Path) -> int:
    from mljax.errors import UserError

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before, began = _memory("VmRSS"), time.perf_counter()
    try:
        read()
    except UserError as error:
        text = str(error)
        if "\n" in text or _odd(text) or len(text) > 3000:
            print(f"not one clear line: {text[:500]!r}")
            return 3
    report.write_text(f"{time.perf_counter() - began} {_memory('VmHWM') - before}")
    return 0


def _memory(name: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) << 10


def _imported() -> None:
    import mljax.data.coco
    import mljax.data.splits
    import mljax.data.table
    import mljax.data.unpack
    import mljax.scoring
    import mljax.weights.files  # noqa: F401


# --- names ------------------------------------------------------------------------------------------------------------

PARTS = (
    *("\x1b[31mred", "\x1b]0;title\x07", "\x1b[2J", "a\rb", "a\nb", "a\tb", "\x08\x08", "\x7f", "\x9b31m", "a\u2028b"),
    *("\u202eevil", "\u200bzero", "\ufeffbom", "e\u0301", "\U0001f600", "Ａ", "名前", "\ue000", "\u0000e"),
    *("../up", "..", ".", "/etc", "~", "~root", "-rf", "--help", "-", " lead", "trail ", "a  b", "CON", "a:b", "a\\b"),
    *("$(touch marker)", "`touch marker`", "; touch marker", "| touch marker", "&& touch marker", "> marker", "'", '"'),
    *("=1+1", "@SUM(1)", "%s%n%x", "{0.__class__}", "{config}", "<script>", "*", "?", "[a-z]", "!", "#", "a,b", "a;b"),
    *("x" * 255, "é" * 127, "None", "nan", "0", "-1", "True", "\udcff", "stage", "digest", "[bold]x[/bold]", "[/]"),
)


def _odd(text: str) -> list[str]:
    """Characters that a terminal acts on."""
    return [c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Cs") and c != "\n"]


def _name(rng: np.random.Generator) -> str:
    count = int(rng.integers(1, 3))
    return "".join(PARTS[int(rng.integers(len(PARTS)))] for _ in range(count))


def _named(case: Case) -> dict[str, Any]:
    name, kind = _name(case.rng), case.what.removeprefix("name of ")
    inside = case.folder / "inside"
    inside.mkdir()
    before = _outside(case.folder)
    seconds, memory = _in_fork(case, lambda: _use(kind, name, inside, case.folder))
    said = (case.folder / "log").read_text(errors="surrogateescape")
    if odd := _odd(said):
        raise Failed(f"{kind} {name!r}: {odd[:3]} reach the terminal: {said[:300]!r}")
    if _outside(case.folder) != before or (Path.cwd() / "marker").exists():
        raise Failed(f"{kind} {name!r}: something outside was written")
    if seconds > SECONDS or memory > SPARE:
        raise Failed(f"{kind} {name!r}: {seconds:.1f} s, {memory / 2**20:.0f} MiB")
    return {"figures": {"seconds of a name": round(seconds, 2)}}


def _outside(folder: Path) -> list[str]:
    around = [p.name for p in folder.iterdir() if not p.name.startswith(("log", "inside"))]
    return sorted([*around, *(p.name for p in folder.parent.glob("*marker*"))])


def _use(kind: str, name: str, inside: Path, folder: Path) -> None:
    """Use a name as a user would, and print what a user would see."""
    from mljax.errors import UserError

    os.chdir(inside)
    try:
        {"class": _use_class, "image": _use_image, "workdir": _use_workdir}[kind](name, inside)
    except UserError as error:
        print(f"mljax: {error}", file=sys.stderr)
    except (OSError, ValueError) as error:
        if not kind == "image" or "made by" not in str(error):
            raise


def _table(inside: Path, image: str, label: str) -> Any:
    import csv

    from mljax.data import splits

    with (inside / "labels.csv").open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerows([["image", "labels", "split"], [image, label, "train"], ["b.png", "dog", "train"]])
    return splits.load({"name": "csv", "file": str(inside / "labels.csv")}, "train")


def _use_class(name: str, inside: Path) -> None:
    """The table of a run whose labels have the name, and the sentence on labels without an image."""
    from PIL import Image

    from mljax import scoring
    from mljax.errors import nearest
    from mljax.rundir.progress import Writer

    for image in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(inside / image)
    source = _table(inside, "a.png", name)
    metrics = dict.fromkeys(
        ("mAP", *(f"{m}{s}" for m in ("CP", "CR", "CF1", "OP", "OR", "OF1") for s in ("", "_3"))), 1.0
    )
    report = {
        **{"split": source.name, "images": 2, "selected_by": "last", "seed": 0, "metrics": metrics},
        **{"per_class_AP": dict.fromkeys(source.classes, 50.0), "left_out": list(source.classes)},
    }
    print(scoring.table(report))
    Writer(inside).line(f"{source.name} has no image with {', '.join(source.classes)}")
    print(nearest(name, source.classes).encode("unicode_escape").decode())


def _use_image(name: str, inside: Path) -> None:
    """A table that names an image which is there or not, and is none."""
    from mljax.pipeline.images import decode

    with contextlib.suppress(OSError, ValueError):  # where no file can have the name, a table still can
        if "/" not in name:
            (inside / name).write_bytes(b"not an image")
    source = _table(inside, name, "cat")
    decode(source.read(0), where=str(source.ids[0]))


def _use_workdir(name: str, inside: Path) -> None:
    """A run that starts in a folder of the name, and fails for its data."""
    from mljax import rundir
    from mljax.config.reading import read_config
    from mljax.errors import UserError, printable

    workdir = inside / name.replace("/", "").replace("..", "")
    config = read_config("configs/baseline.py:smoke")
    with rundir.opened(workdir, config):
        print(f"run directory: {printable(str(workdir))}")
        raise UserError(f"{workdir} is not trained in.")


def case(case: Case) -> dict[str, Any]:
    return _file(case) if case.what.startswith("file") else _named(case)


FILES = {f"file: {kind}: {name}": 1 for kind, (_, names) in KINDS.items() for name in names}
KIND = Kind(
    name="hostile",
    goal="hostile files and names: no code, nothing outside, refused within 2 s and 2 x file + 256 MB",
    plan={**FILES, "name of class": 80, "name of image": 70, "name of workdir": 50},
    case=case,
    limit=60.0,
)
