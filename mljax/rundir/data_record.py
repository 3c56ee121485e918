"""What a run was trained on: classes, ids, labels and images by their digests, to notice data that changed since."""

import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mljax.errors import UserError
from mljax.rundir import seal
from mljax.rundir.files import read_arrays, read_json, write_arrays, write_json

DIGESTS = ("ids", "labels", "images")


def row_digests(ids: Sequence[str], labels: np.ndarray) -> np.ndarray:
    """(N 2) uint32: CRC-32 of each image's id, and of its labels."""
    rows = np.ascontiguousarray(labels)
    pairs = [(zlib.crc32(str(id).encode()), zlib.crc32(row.tobytes())) for id, row in zip(ids, rows)]
    return np.array(pairs, np.uint32).reshape(-1, 2)


def save_data_record(workdir: Path, record: Mapping[str, Any], *, part: str = "train") -> None:
    """Keep the record of a split in data.json and data.npz.

    Args:
      record: {"classes": [..], "count": N, "ids": digest, "labels": digest, "images": digest of a sample}, and
        "rows", those of `row_digests`, if a difference is to be counted.
      part: which split of the run it is of, "train" or "eval".
    """
    _save(workdir, record, part, _accepted(_records(workdir).get(part, {})))


def check_data_record(workdir: Path, record: Mapping[str, Any], accept: bool = False, *, part: str = "train") -> str:
    """Compare a split with the record that the run keeps of it.

    Args:
      record, part: as of `save_data_record`.
      accept: take other images, labels or rows, and keep the new record together with what was accepted.
    Returns:
      What changed and was accepted; empty if nothing changed, or the run has no record of this split.
    Raises:
      UserError: the classes differ; anything else does, and `accept` is false. It says what.
    """
    records = _records(workdir)
    if part not in records:
        return ""
    old = records[part]
    if what := _classes_differ(old["classes"], [str(name) for name in record["classes"]]):
        raise UserError(
            f"The {part} split is not the one that the run in {workdir} was trained on: {what}; restore the classes,"
            " or choose another --workdir."
        )
    if what := _differs(workdir, old, record, part):
        if not accept:
            raise UserError(
                f"The {part} split has changed since the run in {workdir} started: {what}; restore it, choose another"
                " --workdir, or accept the change with --config.data.changed=accept."
            )
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        _save(workdir, record, part, [*_accepted(old), {"time": now, "what": what}])
    return what


def _records(workdir: Path) -> dict[str, Any]:
    path = workdir / "data.json"
    return read_json(path) if path.is_file() else {}


def _accepted(record: Mapping[str, Any]) -> list[Any]:
    return list(record.get("accepted", ()))


def _save(workdir: Path, record: Mapping[str, Any], part: str, accepted: list[Any]) -> None:
    """The rows first: data.json says which rows it means, so that others, left by a kill, are not taken for them."""
    kept: dict[str, Any] = {
        "classes": [str(name) for name in record["classes"]],
        "count": int(record["count"]),
        **{name: str(record[name]) for name in DIGESTS if name in record},
    }
    if "rows" in record:
        rows = np.asarray(record["rows"], np.uint32)
        write_arrays(workdir / "data.npz", **{**_rows(workdir), part: rows})
        kept["rows"] = seal.crc(rows)
    if accepted:
        kept["accepted"] = accepted
    write_json(workdir / "data.json", {**_records(workdir), part: kept})


def _rows(workdir: Path) -> dict[str, np.ndarray]:
    """The rows of every split; none if they are missing or damaged, since they only count what differs."""
    try:
        return read_arrays(workdir / "data.npz")
    except UserError:
        return {}


def _classes_differ(old: Sequence[str], new: Sequence[str]) -> str:
    if list(old) == list(new):
        return ""
    added, removed = [n for n in new if n not in old], [n for n in old if n not in new]
    if not added and not removed and len(old) == len(new):
        at = next(i for i, (a, b) in enumerate(zip(old, new)) if a != b)
        return f"its {len(old)} classes are in another order (class {at + 1} was {old[at]!r} and is {new[at]!r})"
    changes = [f"{len(old)} classes, not {len(new)}"] if len(old) != len(new) else []
    for word, names in (("without", added), ("with", removed)):
        if names:
            changes.append(f"{word} {', '.join(map(repr, names[:3]))}{', ..' if len(names) > 3 else ''}")
    return f"that one has {', '.join(changes)}"


def _differs(workdir: Path, old: Mapping[str, Any], new: Mapping[str, Any], part: str) -> str:
    """What differs but the classes, in words; empty if nothing does."""
    changed = [name for name in DIGESTS if name in old and name in new and old[name] != str(new[name])]
    if not changed and old["count"] == int(new["count"]):
        return ""
    rows = _rows(workdir).get(part)
    if rows is not None and "rows" in new and seal.crc(rows) == old.get("rows"):
        counts = _count(rows, np.asarray(new["rows"], np.uint32))
    else:
        words = {"ids": "other images or another order", "labels": "other labels"}
        counts = [words[name] for name in changed if name in words]
    if old["count"] != int(new["count"]):
        counts.append(f"{new['count']} images instead of {old['count']}")
    if "images" in changed and ("ids" not in changed or not counts):
        counts.append("other bytes in the images that are sampled")
    return ", ".join(counts)


def _count(old: np.ndarray, new: np.ndarray) -> list[str]:
    """Rows added, removed, and of other labels, as far as digests can tell; else that their order changed."""
    before, after = dict(old.tolist()), dict(new.tolist())
    counts = {
        "added": len(after.keys() - before.keys()),
        "removed": len(before.keys() - after.keys()),
        "with other labels": sum(before[id] != labels for id, labels in after.items() if id in before),
    }
    words = [f"{count} image{'s' if count > 1 else ''} {what}" for what, count in counts.items() if count]
    kept = [id for id in after if id in before]
    if kept != [id for id in before if id in after]:
        words.append("another order")
    return words
