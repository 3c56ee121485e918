"""Observed labels as a file: what was drawn once, or annotated elsewhere, and for which images and classes."""

import hashlib
import json
import zipfile
import zlib
from pathlib import Path

import numpy as np

from mljax.cache import atomic_write
from mljax.data.source import Source
from mljax.errors import UserError
from mljax.untrusted import SPARE, read_npz

FORMAT = 1


def identity(source: Source) -> str:
    """What masks belong to: the images and the classes of a whole split, in their order.

    Not its labels, which a mask replaces, and not the times of its files, so that masks can be given away.
    """
    whole = source.base or source
    text = json.dumps([[str(name) for name in whole.ids], list(whole.classes)])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def write(path: str | Path, source: Source, *, noisy: bool = False) -> None:
    """Write labels and masks of an observed source, of the whole split where it is a slice of one.

    The file holds `labels` and `observed`, (N l) uint8, the fingerprint `identity` of images and classes, and for
    people the name and the classes. With `noisy`, positives may be false candidates.
    """
    whole = source.base or source
    path = Path(path)
    try:
        with atomic_write(path.with_name(path.name if path.suffix == ".npz" else f"{path.name}.npz")) as temporary:
            np.savez_compressed(
                temporary,
                format=np.array(FORMAT),
                fingerprint=np.array(identity(source)),
                name=np.array(whole.name),
                classes=np.array(whole.classes),
                labels=whole.labels * whole.observed,
                observed=whole.observed,
                noisy=np.array(noisy),
            )
    except OSError as error:
        raise UserError(
            f"The masks cannot be written to {str(path)!r} ({error.strerror}); choose another file."
        ) from None


def read(path: str | Path, source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Labels and masks (N l) uint8 for a whole split.

    Args:
      path: a file of `write`, or any .npz with arrays `labels`, `observed` and `fingerprint`. `labels` may be left out:
        then those of the data set are taken where observed.
      source: the whole split that they are laid over.
    Raises:
      UserError: no such file, another shape, another data set, values other than 0 and 1, or labels that contradict
        each other or the data set.
    """
    if not path:
        raise UserError("config.observe.name='file' needs config.observe.path, an .npz file of `mljax.data observe`.")
    path = Path(path).expanduser()
    try:
        arrays = read_npz(path, limit=16 * source.labels.size + SPARE)
    except OSError as error:
        raise UserError(f"The masks {str(path)!r} cannot be read ({error.strerror or error}).") from None
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        raise UserError(
            f"The masks {str(path)!r} are not a complete .npz file of `mljax.data observe`; write them again."
        ) from None
    for name in ("observed", "fingerprint"):
        if name not in arrays:
            raise UserError(f"The masks {str(path)!r} have no array {name!r}; write them with `mljax.data observe`.")
    observed, labels = arrays["observed"], arrays.get("labels", source.labels)
    for name, array in (("observed", observed), ("labels", labels)):
        if array.shape != source.labels.shape:
            raise UserError(
                f"The masks {str(path)!r} have {name} of shape {array.shape}, and {source.name} has"
                f" {len(source)} images of {len(source.classes)} labels."
            )
        if not np.isin(array, (0, 1)).all():
            raise UserError(f"The masks {str(path)!r} have values other than 0 and 1 in {name}.")
    if str(arrays["fingerprint"]) != identity(source):
        raise UserError(
            f"The masks {str(path)!r} are of {str(arrays.get('name', 'another data set'))!r}, whose images or classes"
            f" are not those of {source.name}; write masks for this one."
        )
    labels, observed = labels.astype(np.uint8), observed.astype(np.uint8)
    noisy = bool(arrays.get("noisy", False))
    _agree(path, source, labels if "labels" in arrays else labels * observed, observed, noisy)
    return labels, observed


def _agree(path: Path, source: Source, labels: np.ndarray, observed: np.ndarray, noisy: bool) -> None:
    """Nothing is both hidden and positive, and known labels are those that the data set knows."""
    hidden = (labels > 0) & (observed == 0)
    wrong = (labels != source.labels) & (observed > 0) & (source.observed > 0)
    if noisy:
        wrong &= labels == 0  # a false candidate is no mistake, a true label that is none is
    for where, what in ((hidden, "is positive and hidden at once"), (wrong, "contradicts the label of the data set")):
        if where.any():
            row, column = np.argwhere(where)[0]
            raise UserError(
                f"The masks {str(path)!r} contradict: {source.classes[column]!r} of {str(source.ids[row])!r} {what}"
                f" ({int(where.sum())} such entries)."
            )
