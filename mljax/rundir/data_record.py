"""What a run was trained and evaluated on: classes, rows and images by their digests, to notice data that changed."""

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mljax import seal
from mljax.errors import UserError
from mljax.rundir.files import read_arrays, read_json, write_arrays, write_json

log = logging.getLogger("mljax")
NAME, ARRAYS = "data.json", "data.npz"
IMAGES = ("image_rows", "image_sums")
WORDS = {  # of a column that differs, where nobody can count the rows
    "ids": "other images or another order",
    "labels": "other labels",
    "known": "others of the labels known or scored",
}


@dataclasses.dataclass(frozen=True, eq=False)
class DataRecord:
    """What a split is.

    Attributes:
      classes: in label order.
      ids, labels, known: (N) uint32: a CRC-32 of each row's id, of its labels, and of which are observed and scored.
      images: row -> CRC-32 of its image's bytes, of some or of all rows.
      names: N ids, by which an error names rows; not kept.
    """

    classes: Sequence[str]
    ids: np.ndarray
    labels: np.ndarray
    known: np.ndarray
    images: Mapping[int, int] = dataclasses.field(default_factory=dict)
    names: Sequence[str] = ()

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """As they are kept."""
        rows = np.array(sorted(self.images), np.int64)
        sums = np.array([self.images[row] for row in rows.tolist()], np.uint32)
        columns = {name: np.asarray(getattr(self, name), np.uint32) for name in WORDS}
        return {**columns, "image_rows": rows, "image_sums": sums}


@dataclasses.dataclass(frozen=True)
class Change:
    """How a split differs from the record of it.

    Attributes:
      what: in words, with counts; empty: not at all.
      rows: whether row i is another image than it was.
      unsaved: whether the record that the run keeps is not up to date.
    """

    what: str = ""
    rows: bool = False
    unsaved: bool = False


def part_of(kind: str, stage: int) -> str:
    """What a run calls the record of the "train" or "eval" split of one of its stages, which count from 0."""
    return f"stage{stage}.{kind}" if stage else kind


def check_data_record(workdir: Path, part: str, record: DataRecord, *, accept: bool = False) -> Change:
    """Compare a split with the record that the run keeps of it; writes nothing.

    Args:
      part: which split of the run, as `part_of` calls it.
      accept: return what changed of rows, labels and images, instead of refusing it.
    Raises:
      UserError: the classes differ; anything else does, and `accept` is false. It says what.
    """
    old = _records(workdir).get(part)
    if old is None:
        return Change(unsaved=True)  # of a version that kept none
    start = f"The {part.rpartition('.')[2]} split is not the one that the run in {workdir} was trained with"
    if what := _classes_differ(old["classes"], [str(name) for name in record.classes]):
        raise UserError(f"{start}: {what}; restore the classes, or choose another --workdir.")
    kept = _arrays(workdir, part, old)
    if kept is None:
        log.warning("%s is damaged or missing; made again if the data are what they were.", workdir / ARRAYS)
    change = _compared(old, record) if kept is None else _counted(kept, record)
    if change.what and not accept:
        raise UserError(
            f"{start}: {change.what}; restore the data, choose another --workdir, or accept the change with"
            " --config.data.changed=accept."
        )
    return change


def save_data_record(workdir: Path, part: str, record: DataRecord, change: Change | None = None) -> None:
    """Keep the record of a split in data.json and data.npz, in place of an older one.

    Args:
      change: from the older one, which was accepted; it is listed under "accepted", with the time.
    """
    records = _records(workdir)
    accepted = list(records.get(part, {}).get("accepted", ()))
    if change is not None and change.what:
        accepted.append({"time": time.strftime("%Y-%m-%d %H:%M:%S"), "what": change.what})
    arrays = record.arrays
    entry: dict[str, Any] = {"classes": [str(name) for name in record.classes], "count": len(record.ids)}
    entry |= {name: seal.crc(array) for name, array in arrays.items()}
    if accepted:
        entry["accepted"] = accepted
    others = {key: array for key, array in _all_arrays(workdir).items() if not key.startswith(f"{part}/")}
    # The arrays first: data.json says which it means, so that newer ones, left by a kill, are not taken for them.
    write_arrays(workdir / ARRAYS, **others, **{f"{part}/{name}": array for name, array in arrays.items()})
    write_json(workdir / NAME, {**records, part: entry})


def _records(workdir: Path) -> dict[str, Any]:
    path = workdir / NAME
    try:
        return read_json(path) if path.is_file() else {}
    except UserError as error:
        what = str(error).partition(";")[0]
        raise UserError(f"{what}; restore it, or remove it: then the data as they are now are recorded.") from None


def _all_arrays(workdir: Path) -> dict[str, np.ndarray]:
    """The rows of every split; none if they are missing or damaged, since they only count what differs."""
    try:
        return read_arrays(workdir / ARRAYS)
    except UserError:
        return {}


def _arrays(workdir: Path, part: str, entry: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
    """Those of a split, if they are the ones that its entry means."""
    arrays = _all_arrays(workdir)
    kept = {name: arrays[f"{part}/{name}"] for name in (*WORDS, *IMAGES) if f"{part}/{name}" in arrays}
    same = len(kept) == len(WORDS) + len(IMAGES) and all(seal.crc(array) == entry[name] for name, array in kept.items())
    return kept if same else None


def _classes_differ(old: Sequence[str], new: Sequence[str]) -> str:
    if list(old) == list(new):
        return ""
    added, removed = [n for n in new if n not in old], [n for n in old if n not in new]
    if not added and not removed and len(old) == len(new):
        at = next(i for i, (a, b) in enumerate(zip(old, new)) if a != b)
        return f"its {len(old)} classes are in another order (class {at + 1} was {old[at]!r} and is {new[at]!r})"
    changes = [f"it has {len(new)} classes instead of {len(old)}"] if len(old) != len(new) else []
    for word, names in (("new are", added), ("missing are", removed)):
        if names:
            changes.append(f"{word} {', '.join(map(repr, names[:3]))}{', ..' if len(names) > 3 else ''}")
    return ", ".join(changes)


def _compared(old: Mapping[str, Any], new: DataRecord) -> Change:
    """Without the rows, what differs by the digests of all."""
    digests = {name: seal.crc(array) for name, array in new.arrays.items()}
    words = [text for name, text in WORDS.items() if digests[name] != old[name]]
    if old["count"] != len(new.ids):
        words.append(f"{len(new.ids)} images instead of {old['count']}")
    elif digests["image_rows"] == old["image_rows"] and digests["image_sums"] != old["image_sums"]:
        words.append("other bytes in the images")
    return Change(", ".join(words), digests["ids"] != old["ids"], True)


def _counted(old: Mapping[str, np.ndarray], new: DataRecord) -> Change:
    """What differs, with counts."""
    rows = not np.array_equal(old["ids"], new.ids)
    words = _rows_differ(old, new) if rows else _columns_differ(old, new)
    if len(old["ids"]) != len(new.ids):
        words.append(f"{len(new.ids)} images instead of {len(old['ids'])}")
    before = dict(zip(old["image_rows"].tolist(), old["image_sums"].tolist()))
    same = [r for r in new.images if r in before and r < len(old["ids"]) and old["ids"][r] == new.ids[r]]
    if other := [row for row in same if before[row] != new.images[row]]:
        names = ", ".join(repr(str(new.names[row])) for row in other[:3]) if len(new.names) else ""
        more = f" ({names}{', ..' if len(other) > 3 else ''})" if names else ""
        words.append(f"other bytes in {len(other)} of the {len(same)} images that were compared{more}")
    return Change(", ".join(words), rows, bool(words) or not new.images.keys() <= before.keys())


def _columns_differ(old: Mapping[str, np.ndarray], new: DataRecord) -> list[str]:
    """Rows of the same images whose labels, or what is known of them, are others."""
    labels, known = (int((old[name] != getattr(new, name)).sum()) for name in ("labels", "known"))
    return _counts({"with other labels": labels, "with others of the labels known or scored": known})


def _rows_differ(old: Mapping[str, np.ndarray], new: DataRecord) -> list[str]:
    """Rows added, removed, and of other labels, as far as digests can tell; else that their order changed."""
    before, after = Counter(old["ids"].tolist()), Counter(new.ids.tolist())
    counts = {"added": sum((after - before).values()), "removed": sum((before - after).values())}
    for name, words in (("labels", "with other labels"), ("known", "with others of the labels known or scored")):
        was, now = (
            dict(zip(x.tolist(), y.tolist())) for x, y in ((old["ids"], old[name]), (new.ids, getattr(new, name)))
        )
        counts[words] = sum(was[id] != value for id, value in now.items() if id in was)
    words = _counts(counts)
    kept = [[id for id in ids.tolist() if id in before and id in after] for ids in (old["ids"], new.ids)]
    if kept[0] != kept[1] and (not counts["added"] or list(dict.fromkeys(kept[0])) != list(dict.fromkeys(kept[1]))):
        words.append("another order")
    return words or ["other images or another order"]


def _counts(counts: Mapping[str, int]) -> list[str]:
    return [f"{count} image{'s' if count > 1 else ''} {what}" for what, count in counts.items() if count]
