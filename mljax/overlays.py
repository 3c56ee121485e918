"""Pictures of attention over photos, one file per photo and label."""

import errno
import os
import re
from pathlib import Path

import numpy as np

from mljax.data import draw
from mljax.data.images import decode
from mljax.errors import UserError


def hot(attention: np.ndarray) -> float:
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

    def write(self, path: Path, maps: dict[str, np.ndarray]) -> None:
        picture = decode(path, where=str(path)).copy()
        picture.thumbnail((self.SIDE, self.SIDE))
        stem, number = path.stem, 1
        while self.owners.setdefault(stem, path) != path:
            number += 1
            stem = f"{path.stem}_{number}"
        for label, attention in maps.items():
            name = re.sub(r"\W+", "_", label)
            target = self.folder / f"{stem}_{name}.png"
            try:
                draw.overlay(picture, attention, high=hot(attention)).save(target)
            except OSError as error:
                target.unlink(missing_ok=True)
                raise UserError(
                    f"{target} cannot be written ({error.strerror}); free space or give another --overlay."
                ) from None
