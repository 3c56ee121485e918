"""Pretrained weights with their provenance and preprocessing, and the strict merge into a model.

python -m mljax.weights list [ARCH]
python -m mljax.weights show NAME
python -m mljax.weights convert FILE OUT [--arch ARCH] [--prefix PREFIX]
python -m mljax.weights verify NAME FILE [--prefix PREFIX]

Records stand beside their backbone (`RECORDS` in mljax/backbones/*.py), as does what turns a state dict into its
parameters (`convert`). A file is converted once; the result, as safetensors in the user's cache folder, is mapped
into memory from then on.
"""

import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mljax.cache import cache_dir
from mljax.errors import UserError, nearest
from mljax.trees import merge, nest
from mljax.weights import hub
from mljax.weights.convert import convert, module_of, modules, other_channels
from mljax.weights.files import SUFFIXES, read, read_metadata, read_with_metadata, write

__all__ = ["Weights", "load", "locate", "merge", "preprocessing", "read", "records", "resolve"]

log = logging.getLogger("mljax")

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FORMAT = 1  # of the converted files: a new number makes every file be converted again


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """Where weights come from, what they may be used for, and what images they expect.

    Attributes:
      name: of the record; it starts with the architecture. For a local file: the file's name.
      arch: the backbone, as in `config.backbone.name`.
      hub: repository on the Hugging Face hub, or None.
      file: in that repository.
      sha256: of the file, where known.
      licence, paper, note: in words.
      size: height and width in pixels that the weights were trained or fine-tuned with.
      mean, std: (3,) RGB, for values in [0, 1].
      path: of a local file that stands in place of the hub's.
    """

    name: str
    arch: str
    file: str
    hub: str | None = None
    sha256: str | None = None
    licence: str = "unknown"
    paper: str = ""
    size: int = 224
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    note: str = ""
    path: str | None = None


def preprocessing(weights: Weights) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std), each (3,) RGB for values in [0, 1]: images enter the backbone as (image / 255 - mean) / std."""
    return weights.mean, weights.std


def records() -> dict[str, Weights]:
    """Every published checkpoint that we know, by name."""
    table = {}
    for module in modules():
        for name, fields in getattr(module, "RECORDS", {}).items():
            mean, std = tuple(fields["mean"]), tuple(fields["std"])
            table[name] = Weights(name=name, **{**fields, "mean": mean, "std": std})
    return table


def _family(arch: str) -> str:
    """Without the image size: what "swin_base_224" and "swin_base_384" share."""
    return re.sub(r"_\d{3}$", "", arch)


def resolve(
    name: str,
    arch: str,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: int | None = None,
) -> Weights:
    """The record of a name, or one for a local file. Nothing is downloaded.

    Args:
      name: a record, an architecture (its first record), or the path of a weight file.
      arch: the backbone that the weights are for.
      mean, std, size: in place of what the record says. Without them a local file has those that were kept when it
        was converted, else those of the architecture's first record, else ImageNet's.
    Raises:
      UserError: no such record or file, or one of another architecture.
    """
    module_of(arch)
    table = records()
    record = table.get(name) or next((r for r in table.values() if r.arch == name), None)
    if record is None:
        path = Path(name).expanduser()
        if not path.is_file():
            if path.suffix in SUFFIXES or "/" in name:
                raise UserError(f"The weight file {name} is missing; check the path, or give a published name.")
            raise UserError(f"{name!r} is not a name of published weights{nearest(name, table)}.")
        record = _local(path, arch, table)
    if _family(record.arch) != _family(arch):
        raise UserError(
            f"The weights {name!r} are for the backbone {record.arch}, and the backbone is {arch}; change one of them."
        )
    changes = {"mean": mean and tuple(mean), "std": std and tuple(std), "size": size}
    return dataclasses.replace(record, **{key: value for key, value in changes.items() if value is not None})


def _local(path: Path, arch: str, table: Mapping[str, Weights]) -> Weights:
    kept = read_metadata(path).get("record")
    if kept is not None:
        fields = {field.name for field in dataclasses.fields(Weights)}
        kept = {k: tuple(v) if isinstance(v, list) else v for k, v in kept.items() if k in fields}
        return Weights(**{**kept, "path": str(path), "sha256": None})
    first = next((r for r in table.values() if r.arch == arch), None)
    known = {"size": first.size, "mean": first.mean, "std": first.std} if first else {}
    note = f"size, mean and std of {first.name}" if first else "size, mean and std assumed to be ImageNet's"
    return Weights(name=path.name, arch=arch, file=path.name, path=str(path), note=note, **known)


def locate(weights: Weights) -> Path:
    """The file: the path given, $MLJAX_DATA/weights, the hub's cache, or a download, in this order.

    Raises:
      UserError: it cannot be had.
    """
    if weights.path is not None:
        return Path(weights.path)
    return hub.fetch(weights.name, weights.hub, weights.file)


def load(
    weights: Weights | str, arch: str, *, prefix: str = "", in_channels: int = 3, model: Any = None
) -> dict[str, Any]:
    """Weights in the layout of a backbone.

    Args:
      weights: a record, or what `resolve` takes.
      arch: the backbone.
      prefix: take only the names that start with it, and read what follows ("module.", "backbone.", "encoder.").
      in_channels: of the images. One channel: the first convolution's kernel is summed over colours; n: its colours
        are repeated in turn and scaled by 3/n (both as timm does). A note is logged.
      model: the backbone module; position and bias tables are interpolated to its size, and a note is logged.
    Returns:
      {"params": nested dict, "batch_stats": nested dict} of read-only float32 arrays.
    Raises:
      UserError: the file cannot be had, is damaged, has another sha256 than the record, or is of another net (what it
        seems to be is said); the cache is full.
    """
    record = resolve(weights, arch) if isinstance(weights, str) else weights
    if _family(record.arch) != _family(arch):
        raise UserError(f"The weights {record.name!r} are for the backbone {record.arch}, and the backbone is {arch}.")
    tree = nest(_converted(record, arch, prefix))
    for collection in ("params", "batch_stats"):
        tree.setdefault(collection, {})
    if in_channels != 3:
        tree["params"] = other_channels(tree["params"], in_channels, record.name)
    adapt = getattr(module_of(arch), "adapt", None)
    if model is not None and adapt is not None:
        tree, notes = adapt(tree, model)
        for note in notes:
            log.warning("Weights %s: %s", record.name, note)
    return tree


def _converted(record: Weights, arch: str, prefix: str) -> dict[str, np.ndarray]:
    """Flat parameters "params/a/b/c", from the cache of converted files if they are there."""
    source = locate(record)
    try:
        status = source.stat()
        folder = cache_dir() / "weights"
    except OSError as error:
        raise UserError(f"{error.filename} cannot be used ({error.strerror}); check it, or set MLJAX_CACHE.") from None
    key = [FORMAT, str(source.resolve()), status.st_size, status.st_mtime_ns, arch, prefix, record.sha256]
    cached = folder / f"{arch}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]}.safetensors"
    if cached.is_file():
        try:
            return read(cached)
        except UserError:
            log.warning("The converted weights %s are damaged; converting again.", cached)
    hub.check_digest(source, record.sha256, record.name)
    state, metadata = read_with_metadata(source, prefix=prefix)
    if "record" in metadata:
        return state
    write(cached, convert(state, arch, source), {"source": source.name})
    return read(cached)
