"""What a training starts from besides pretrained weights: the stage before, or another run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mljax import optim
from mljax.data.files import some
from mljax.errors import UserError, nearest
from mljax.experiment import Experiment
from mljax.run import load
from mljax.rundir.checkpoint import Checkpoints
from mljax.trees import flatten, map_named

STARTS = ("last", "best", "ema")


def take_over(new: Any, old: Any) -> Any:
    """What a stage inherits: leaves of the same path and shape come from the stage before, the rest stays new."""
    known = flatten(old)

    def pick(path: str, leaf: Any) -> Any:
        return known[path] if path in known and np.shape(known[path]) == np.shape(leaf) else leaf

    return map_named(pick, new)


def of_stage(folder: Path, start: str) -> dict[str, Any]:
    """The variables that a stage left: its last, its best, or its averaged ones, as `config.start` says."""
    if start not in STARTS:
        raise UserError(f"config.start is {start!r}{nearest(start, STARTS)}.")
    with Checkpoints(folder, keep_best_of="mAP", read_only=True) as old:
        found = old.restore_params("best" if start == "best" else "last")
    if start != "ema":
        return {"params": found["params"], **found["variables"]}
    if found["ema"] is None:
        raise UserError("config.start='ema' and the stage before kept no average; set its config.ema.")
    return optim.averaged(found["params"], found["variables"], found["ema"])


def of_run(workdir: str, variables: Mapping[str, Any], run: Experiment) -> tuple[dict[str, Any], str]:
    """Fresh variables with what fits of another run's, and that in words: COCO, then VOC; a released file, then yours.

    Parameters and statistics of the same path and shape are taken from what that run reports. Constants and memories
    are of a data set and stay new. So does, where there are as many classes and they are others, what has an axis as
    long as there are classes, outside the backbone: a classifier of other classes is no start.

    Args:
      workdir: `config.init`, a run directory.
      variables: those of a fresh start; not changed.
      run: of this training.
    Raises:
      UserError: no run there, or nothing of it fits.
    """
    other = load(workdir)
    same_classes, count = tuple(other.classes) == tuple(run.meta.classes), len(other.classes)
    kept = {name: variables[name] for name in ("params", "batch_stats") if name in variables}
    known = flatten({name: other.variables[name] for name in kept if name in other.variables})
    fits = {
        path: known[path]
        for path, leaf in flatten(kept).items()
        if path in known
        and known[path].shape == leaf.shape
        and (same_classes or "/backbone/" in path or count not in leaf.shape)
    }
    if not any(path in fits for path in flatten({"params": kept["params"]})):
        raise UserError(f"config.init={workdir!r}: nothing of that run fits this network; is it another one?")
    fresh = sorted(flatten({"params": kept["params"]}).keys() - fits.keys())
    taken = map_named(lambda path, leaf: fits.get(path, leaf), kept)
    told = f"{len(fits)} arrays of {workdir}, statistics among them" + (
        f"; new: {some([p.partition('/')[2] for p in fresh], 6)}" if fresh else ""
    )
    return {**variables, **taken}, told
