"""What a training starts from besides pretrained weights: the stage before, or another run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mljax import optim
from mljax.data.files import some
from mljax.errors import UserError, one_of
from mljax.experiment import Experiment
from mljax.optim.groups import path_name, paths
from mljax.run import load
from mljax.rundir.checkpoint import Checkpoints


def inherit(new: Any, old: Any) -> Any:
    """The variables of a stage: leaves of the same path and shape come from the stage before, the rest stays new."""
    known = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(old)}

    def pick(path: Any, leaf: Any) -> Any:
        before = known.get(jax.tree_util.keystr(path))
        return before if before is not None and np.shape(before) == np.shape(leaf) else leaf

    return jax.tree_util.tree_map_with_path(pick, new)


def from_stage(folder: Path, start: str) -> dict[str, Any]:
    """The variables that a stage left: its last, its best, or its averaged ones, as `config.start` says."""
    one_of("config.start", start, ("last", "best", "ema"))
    with Checkpoints(folder, keep_best_of="mAP", read_only=True) as old:
        before = old.restore_params("best" if start == "best" else "last")
    if start != "ema":
        return {"params": before["params"], **before["variables"]}
    if before["ema"] is None:
        raise UserError("config.start='ema' needs an average that the stage before did not keep; set its config.ema.")
    return optim.averaged(before["params"], before["variables"], before["ema"])


def from_run(workdir: str, variables: Mapping[str, Any], experiment: Experiment) -> tuple[dict[str, Any], str]:
    """Fresh variables with those of another run where they fit, and in words which: COCO, then VOC, for example.

    Parameters and statistics of the same path and shape are taken from what that run reports. Constants and memories
    belong to a data set and stay fresh. If the classes differ, so does every array outside the backbone with an axis as
    long as the other run had classes: a classifier of other classes is not a start.

    Args:
      workdir: `config.init`, a run directory.
      variables: those of a fresh start; not changed.
      experiment: of this training.
    Raises:
      UserError: `workdir` holds no run, or nothing of it fits.
    """
    other = load(workdir)
    same_classes, count = tuple(other.classes) == tuple(experiment.meta.classes), len(other.classes)
    kept = {name: variables[name] for name in ("params", "batch_stats") if name in variables}
    known = paths({name: other.variables[name] for name in kept if name in other.variables})
    fits = {
        path: known[path]
        for path, leaf in paths(kept).items()
        if path in known
        and known[path].shape == leaf.shape
        and (same_classes or "/backbone/" in path or count not in leaf.shape)
    }
    if not any(path in fits for path in paths({"params": kept["params"]})):
        raise UserError(
            f"config.init={workdir!r}: no parameter of that run fits this network; train the same backbone and system,"
            " or leave config.init empty."
        )
    fresh = sorted(paths({"params": kept["params"]}).keys() - fits.keys())
    taken = jax.tree_util.tree_map_with_path(lambda path, leaf: fits.get(path_name(path), leaf), kept)
    words = f"{len(fits)} arrays of {workdir}, statistics among them" + (
        f"; new: {some([p.partition('/')[2] for p in fresh], 6)}" if fresh else ""
    )
    return {**variables, **taken}, words
