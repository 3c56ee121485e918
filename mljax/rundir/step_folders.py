"""The folders of a run's checkpoints: which steps are complete, which are kept, and how one goes.

A folder counts as a step only under its bare number. It gets that name by a rename when it is complete, and loses it
by a rename before anything in it is touched, so a process that is killed never leaves a torn step behind.
"""

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path

from mljax.errors import UserError, remedy

LEAST = 2  # checkpoints that are kept, so that one is left if another is damaged
UNFINISHED = "*.orbax-checkpoint-tmp"

Score = tuple[int, float]  # (stage, metric), the greater the better


def complete(folder: Path) -> list[int]:
    """The steps in a folder, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name == _number(p.name) and p.is_dir())


def _number(name: str) -> str | None:
    """The name that a step would have: "007" and "٣" are none."""
    return str(int(name)) if name.isdecimal() else None


def kept(scores: Mapping[int, Score | None], latest: int, best: int) -> set[int]:
    """Which steps stay: the newest, the best, and more of the newest until there are two.

    Args:
      scores: by step; None: no candidate for the best.
      latest, best: how many of each.
    """
    newest = sorted(scores, reverse=True)
    ranked = sorted(((score, step) for step, score in scores.items() if score is not None), reverse=True)
    stay = {*newest[:latest], *(step for _, step in ranked[:best])}
    for step in newest:
        if len(stay) < LEAST:
            stay.add(step)
    return stay


def delete(path: Path) -> None:
    """Delete a step, or what was set aside; what is left if this is interrupted is cleaned up by `recover`."""
    going = path.with_name(f"deleted-{path.name.rpartition('-')[2]}")
    shutil.rmtree(going, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.rename(going)
        shutil.rmtree(going, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Rename the folder of a damaged step, for a person to look at; returns its new path."""
    number, target = 1, path.with_name(f"damaged-{path.name}")
    while target.exists():
        number += 1
        target = path.with_name(f"damaged-{path.name}-{number}")
    return path.rename(target)


def make_room(path: Path) -> Path:
    """Rename the folder of a step that is saved again, until the new one is complete."""
    return path.rename(path.with_name(f"replaced-{path.name}"))


def recover(folder: Path) -> None:
    """Clean up after a process that was killed: half-written and half-deleted steps go, a replaced one comes back."""
    for replaced in folder.glob("replaced-*"):
        place = folder / replaced.name.removeprefix("replaced-")
        with contextlib.suppress(OSError):
            delete(replaced) if place.is_dir() else replaced.rename(place)
    for torn in (*folder.glob("deleted-*"), *folder.glob(UNFINISHED)):
        shutil.rmtree(torn, ignore_errors=True)


def check_space(path: Path, size: int) -> None:
    """Refuse to write a step of so many bytes where the disk is too full for it."""
    free = shutil.disk_usage(path.parent).free
    if free < size / 4:  # orbax compresses: zeros to nothing, trained weights by a tenth
        raise unwritten(path, f"{size / 2**20:.1f} MiB, and {free / 2**20:.1f} MiB are free")


def unwritten(path: Path, reason: str, code: int | None = None) -> UserError:
    """The error of a step that could not be written."""
    return UserError(
        f"The checkpoint of step {path.name} cannot be written to {path.parent} ({reason});"
        f" {remedy(code, 'free some space or choose another folder')} and resume; the older checkpoints are whole."
    )
