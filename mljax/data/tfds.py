"""Data sets that TensorFlow Datasets prepared as array_record, read without TensorFlow.

    pip install 'mljax[tf]'; python -m mljax.data prepare tfds:voc/2007 --root=tfds   # once, needs TensorFlow
    --config.data.name=tfds --config.data.dataset=voc/2007 --config.data.root=tfds                    # of any config

The folder ROOT/voc/2007/5.0.0/ holds dataset_info.json, features.json, the class names and the shards. Labels are
collected by one pass over the records, and kept in the user's cache folder.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mljax import untrusted
from mljax.cache import atomic_write, cache_dir
from mljax.data import _example
from mljax.data._records import Records
from mljax.data.files import check_once, text_lines
from mljax.data.source import Source
from mljax.errors import UserError, nearest

TITLES = {"voc/2007": "VOC2007", "voc/2012": "VOC2012", "coco/2014": "COCO2014", "coco/2017": "COCO2017"}


def tfds(
    split: str,
    *,
    training: bool,
    dataset: str = "voc/2007",
    root: str | None = None,
    version: str = "",
    labels: str = "",
    difficult: str = "V1",
    annotated_only: bool = True,
    image: str = "image",
) -> Source:
    """One split of a prepared data set.

    Args:
      split: its name there, e.g. "train", "validation", "test"; several are joined by a plus: "train+validation".
        The devkit's "trainval" and "val" are understood, so that the papers' configs work with TFDS's VOC and COCO.
      training: whether the split is trained on; see `difficult`.
      dataset: name and config, "voc/2007", "coco/2014" or any builder with class labels for each image.
      root: TFDS's data_dir; None: the variables TFDS_DATA_DIR, MLJAX_DATA, or ~/tensorflow_datasets.
      version: "5.0.0"; empty: the newest that is there.
      labels: the feature: empty for "labels", "objects/label" or the only one with class labels.
      difficult: where there is "labels_no_difficult" (VOC), the policy of `mljax.data.voc`, V1, V2 or V4.
      annotated_only: drop images without objects where labels come from objects (COCO); VOC keeps all.
      image: the feature with the image.
    Raises:
      UserError: it is not there, was prepared in another format, or a record is not as features.json says.
    Differs from TFDS: image bytes are not decoded here but as all others are.
    """
    folder, info, leaves = _prepared(root, dataset, version)
    labels = _labels_name(labels, leaves, folder)
    if image not in leaves:
        raise UserError(f"{str(folder / 'features.json')!r} has no feature {image!r}{nearest(image, leaves)}.")
    classes = _classes(folder, labels, leaves[labels])
    split = _split(split, info)
    records = _records(folder, info, split)
    easy = "labels_no_difficult" if labels == "labels" and "labels_no_difficult" in leaves else None
    if difficult not in ("V1", "V2", "V4"):
        raise UserError(f"difficult={difficult!r} is not a policy for difficult labels: use V1, V2 or V4.")
    table = _collect(records, labels, easy, leaves, len(classes), folder)
    kept = np.flatnonzero(table.labels.any(axis=1)) if labels.startswith("objects") and annotated_only else None
    if not table.labels.any():
        if training:
            raise UserError(f"The split {split!r} of {dataset!r} has no labels, so it cannot be trained on.")
        found = observed = scored = np.zeros_like(table.labels)
        split += " (unlabelled)"
    else:
        found, scored = _policy(table, difficult if easy else "", training)
        observed = np.ones_like(found)
    everything_kept = kept is None and labels.startswith("objects")
    whole = Source(
        name=f"{TITLES.get(dataset, dataset.replace('/', ' '))} (TFDS) {split}{' (all images)' * everything_kept}",
        classes=classes,
        ids=table.ids,
        labels=found,
        observed=observed,
        scored=scored,
        read=Images(records, image),
        fingerprint=f"{table.digest}{difficult if easy else ''}{int(training) if easy else ''}",
    )
    if kept is None or len(kept) == len(whole):
        return whole
    return dataclasses.replace(whole.subset(kept, ""), base=None, indices=None, fingerprint=f"{whole.fingerprint}a")


def _policy(table: "Table", difficult: str, training: bool) -> tuple[np.ndarray, np.ndarray]:
    """Labels and scored (N l) under a policy for what only difficult objects support; empty: there are none."""
    found = table.labels if difficult in ("", "V1") and (training or not difficult) else table.easy
    hard = table.labels & ~table.easy & 1
    return found, 1 - hard if difficult in ("V1", "V4") else np.ones_like(found)


@dataclasses.dataclass(frozen=True)
class Images:
    """`read` of records that hold an image among other things."""

    records: Records
    feature: str

    def __call__(self, index: int) -> bytes:
        try:
            return _example.parse(self.records[index], (self.feature,))[self.feature][0]
        except (_example.BadExample, KeyError, IndexError) as error:
            raise OSError(f"Record {index} has no image ({type(error).__name__}: {error})") from None


def _root(root: str | None) -> Path:
    given = root or os.environ.get("TFDS_DATA_DIR") or os.environ.get("MLJAX_DATA") or "~/tensorflow_datasets"
    return Path(given).expanduser()


def _find(root: str | None, dataset: str, version: str) -> Path:
    folder = _root(root) / dataset
    versions = sorted(
        (path.parent.name for path in folder.glob("*/dataset_info.json")),
        key=lambda name: [int(part) for part in re.findall(r"\d+", name)],
    )
    if not versions or (version and version not in versions):
        raise UserError(
            f"TFDS has prepared no {'version ' + version + ' of ' if version else ''}{dataset!r} in"
            f" {str(_root(root))!r}{nearest(version, versions) if version else ''}: set 'root' to its data_dir, or run"
            f" python -m mljax.data prepare tfds:{dataset} --root={_root(root)}."
        )
    return folder / (version or versions[-1])


def _prepared(
    root: str | None, dataset: str, version: str
) -> tuple[Path, dict[str, Any], dict[str, Mapping[str, Any]]]:
    """The folder of a prepared data set, what its dataset_info.json says, and its features by flat names."""
    folder = _find(root, dataset, version)
    info, features = _json(folder / "dataset_info.json"), _json(folder / "features.json")
    if info.get("fileFormat") != "array_record":
        raise UserError(
            f"{str(folder)!r} was prepared as {info.get('fileFormat', 'tfrecord')}, which is not read by number:"
            f" prepare it again with file_format='array_record' (python -m mljax.data prepare tfds:{dataset}"
            f" --root={_root(root)})."
        )
    return folder, info, _leaves(features, "")


def _json(path: Path) -> dict[str, Any]:
    try:
        return untrusted.read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{str(path)!r} cannot be read ({error}): prepare the data set again.") from None


def _leaves(feature: Mapping[str, Any], path: str) -> dict[str, Mapping[str, Any]]:
    """Flat names of features, "objects/label", as records have them."""
    if "featuresDict" in feature:
        found: dict[str, Mapping[str, Any]] = {}
        for name, inner in feature["featuresDict"]["features"].items():
            found |= _leaves(inner, f"{path}/{name}" if path else name)
        return found
    if "sequence" in feature:
        return _leaves(feature["sequence"]["feature"], path)
    return {path: feature}


def _labels_name(labels: str, leaves: Mapping[str, Mapping[str, Any]], folder: Path) -> str:
    offered = [name for name, feature in leaves.items() if "classLabel" in feature]
    if labels:
        if labels not in offered:
            raise UserError(f"{str(folder)!r} has no class labels {labels!r}{nearest(labels, offered)}.")
        return labels
    for name in ("labels", "objects/label", *(offered if len(offered) == 1 else ())):
        if name in offered:
            return name
    raise UserError(f"{str(folder)!r} has no one feature of class labels: set 'labels'{nearest('', offered)}.")


def _classes(folder: Path, labels: str, feature: Mapping[str, Any]) -> tuple[str, ...]:
    count = int(feature["classLabel"]["numClasses"])
    path = folder / f"{labels.replace('/', '-')}.labels.txt"
    names = (
        text_lines(path, hint="prepare the data set again") if path.is_file() else [f"label {i}" for i in range(count)]
    )
    check_once(names, where=f"The list of classes {str(path)!r}")
    if len(names) != count:
        raise UserError(f"{str(path)!r} has {len(names)} names for {count} classes: prepare the data set again.")
    return tuple(names)


def _split(split: str, info: Mapping[str, Any]) -> str:
    """The papers' names of splits, "trainval" and "val", where the data set has TFDS's "train" and "validation"."""
    there = {entry["name"] for entry in info.get("splits", ())}
    same = {"trainval": "train+validation", "val": "validation"}
    return "+".join(
        same[name] if name in same and name not in there and "validation" in there else name
        for name in split.split("+")
    )


def _records(folder: Path, info: Mapping[str, Any], split: str) -> Records:
    table = {entry["name"]: entry for entry in info.get("splits", ())}
    paths: list[str] = []
    lengths: list[int] = []
    for name in split.split("+"):
        if name not in table:
            raise UserError(f"{str(folder)!r} has no split {name!r}{nearest(name, table)}.")
        shards = [int(length) for length in table[name]["shardLengths"]]
        for number, length in enumerate(shards):
            ending = f"-{name}.array_record-{number:05d}-of-{len(shards):05d}"
            path = next(iter(folder.glob(f"*{ending}")), None)
            if path is None:
                raise UserError(f"The shard '*{ending}' is not in {str(folder)!r}: prepare the data set again.")
            paths.append(os.fspath(path))
            lengths.append(length)
    return Records(paths, lengths)


@dataclasses.dataclass(frozen=True)
class Table:
    """What one pass over the records gives."""

    labels: np.ndarray
    easy: np.ndarray
    ids: list[str]
    digest: str


def _collect(
    records: Records, labels: str, easy: str | None, leaves: Mapping[str, Any], width: int, folder: Path
) -> Table:
    stats = [(os.path.basename(p), os.stat(p).st_size, os.stat(p).st_mtime_ns) for p in records.paths]
    digest = hashlib.sha256(json.dumps([stats, labels, width]).encode()).hexdigest()[:32]
    path = cache_dir() / "tfds" / f"{digest}.npz"
    try:
        with np.load(path, allow_pickle=False) as found:
            return Table(found["labels"], found["easy"], found["ids"].tolist(), digest)
    except (OSError, ValueError, KeyError, EOFError):
        pass
    name = next((n for n in ("image/filename", "image/id", "file_name", "filename", "id") if n in leaves), None)
    wanted = {labels} | ({easy} if easy else set()) | ({name} if name else set())
    table, plain, ids = np.zeros((len(records), width), np.uint8), np.zeros((len(records), width), np.uint8), []
    for row in range(len(records)):
        try:
            found = _example.parse(records[row], wanted)
            table[row, _indices(found.get(labels, []), width)] = 1
            plain[row, _indices(found.get(easy or labels, []), width)] = 1
            ids.append(_id(found.get(name, []) if name else [], row))
        except (_example.BadExample, OSError, ValueError) as error:
            raise UserError(
                f"Record {row} of {str(folder)!r} is damaged ({error}): prepare the data set again."
            ) from None
    try:
        with atomic_write(path) as temporary:
            np.savez(temporary, labels=table, easy=plain, ids=np.array(ids, dtype=np.str_))
    except OSError:
        pass  # a cache that cannot be written only costs time
    return Table(table, plain, ids, digest)


def _indices(values: Any, width: int) -> np.ndarray:
    indices = np.asarray(values, np.int64)
    if len(indices) and not (indices.min() >= 0 and indices.max() < width):
        raise ValueError(f"a label outside 0..{width - 1}")
    return indices


def _id(values: Any, row: int) -> str:
    if not len(values):
        return str(row)
    return values[0].decode("utf-8", "replace") if isinstance(values[0], bytes) else str(int(values[0]))


def prepare(dataset: str, root: str) -> Path:
    """Let TFDS download and prepare a data set as array_record; this needs TensorFlow.

    Raises:
      UserError: TensorFlow is not installed, there is no such builder, or the download fails.
    """
    try:
        import tensorflow  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("TFDS needs TensorFlow to prepare data (not to read it): pip install 'mljax[tf]'.") from None
    import tensorflow_datasets

    try:
        builder = tensorflow_datasets.builder(dataset, data_dir=root, file_format="array_record")
        builder.download_and_prepare()
    except Exception as error:  # TFDS lets every kind of exception through
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"TFDS cannot prepare {dataset!r} ({type(error).__name__}: {reason}).") from error
    return Path(str(builder.data_path))


NAMES = {"tfds": tfds}
