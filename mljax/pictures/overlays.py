"""Pictures of attention over photos, one file per photo and label, with the label and its probability below."""

import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mljax.errors import UserError
from mljax.pictures import drawing
from mljax.pipeline.images import decode


def scale(attention: np.ndarray) -> float:
    """The value that an overlay shows at full heat; one position in twenty is hotter: a lone peak hides no other."""
    return float(np.quantile(attention, 0.95))


class Overlays:
    """A folder of pictures `PHOTO_LABEL.png`; photos of one name from different folders are told apart by a number."""

    SIDE = 1600  # pixels at most

    def __init__(self, folder: str):
        self.folder, self.owners = Path(folder), {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise UserError(
                f"The folder {folder} cannot be written ({error.strerror}); give --overlay another folder."
            ) from None

    def write(self, path: Path, labels: Mapping[str, float], maps: Mapping[str, np.ndarray]) -> None:
        """A photo with the map of each of some labels over it.

        Args:
          labels: names and probabilities.
          maps: (h w) of at least these.
        """
        picture = decode(path, where=str(path)).copy()
        picture.thumbnail((self.SIDE, self.SIDE))
        short = _cut(path.stem, 120)
        stem, number = short, 1
        while self.owners.setdefault(stem, path) != path:
            number += 1
            stem = f"{short}_{number}"
        written: dict[str, str] = {}
        for label, probability in labels.items():
            short = _cut(re.sub(r"\W+", "_", label), 100)
            name, number = short, 1
            while written.setdefault(name, label) != label:
                number += 1
                name = f"{short}_{number}"
            target, shown = self.folder / f"{stem}_{name}.png", f"{label} {probability:.2f}"
            try:
                drawing.captioned(drawing.overlay(picture, maps[label], high=scale(maps[label])), shown).save(target)
            except OSError as error:
                target.unlink(missing_ok=True)
                raise UserError(
                    f"{target} cannot be written ({error.strerror}); free space or give another --overlay."
                ) from None


def _cut(name: str, most: int) -> str:
    """The beginning of a name, of at most so many bytes: file systems take 255."""
    return name.encode(errors="surrogateescape")[:most].decode(errors="ignore")
