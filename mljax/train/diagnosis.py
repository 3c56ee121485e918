"""Why a step diverged: its images, and whether input, labels, loss, gradient or learning rate are to blame."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mljax import rundir
from mljax.data.files import some
from mljax.experiment import Experiment
from mljax.train.loop import LARGEST, Diverged

NAME, SHOWN = "diverged.json", 16
LARGE = 1e4  # magnitude of a parameter that no training in good health reaches
SLOWER = "lower config.optim.lr or set config.optim.clip_norm, in another workdir"
REPAIR = "repair them or take them out, and run the same command again"


def explain(error: Diverged, experiment: Experiment, ids: Sequence[str]) -> tuple[str, str, list[str]]:
    """What was probably the cause, what to do, and the images of the batch, those that are to blame alone if known.

    Args:
      error: of a step; of an evaluation nothing more is known.
      ids: of the training split.
    Returns:
      (cause, advice, names); a cause in words: "the labels of ..".
    """
    if error.batch is None:
        return "", SLOWER, []
    batch = dict(error.batch)
    rows = np.asarray(batch["index"]).ravel()
    names = [str(ids[row]) for row in rows]
    labels = np.asarray(batch["labels"], np.float32).reshape(len(rows), -1)
    if (bad := ~((labels >= 0) & (labels <= 1)).all(1)).any():
        return "the labels, which are not from 0 to 1", REPAIR, _where(names, bad)
    if (bad := ~_finite_rows(experiment.prepare(batch), len(rows))).any():
        return "the input, which is not finite", REPAIR, _where(names, bad)
    return *_of_numbers(error.metrics, error.before), names


def _of_numbers(metrics: Mapping[str, Any], before: Mapping[str, Any]) -> tuple[str, str]:
    """Cause and advice by what was measured of the step and of the one before."""
    loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
    params = float(before[LARGEST][0]) if LARGEST in before else 0.0
    if not np.isfinite(float(metrics.get("lr", 0.0))):
        return "the learning rate, which is not finite", "set config.optim.lr and its schedule, in another workdir"
    if params > LARGE:
        return f"the learning rate, since a parameter had grown to {params:.3g} before", SLOWER
    if not np.isfinite(loss):
        return "the loss, since input, labels and parameters were finite", SLOWER
    if not np.isfinite(norm):
        return "the gradient, since the loss itself is finite", SLOWER
    if not np.isfinite(metrics[LARGEST][0]):
        return (
            "the learning rate, since loss and gradient are finite and the parameters after the update are not",
            SLOWER,
        )
    return "a memory or statistic that the system updates itself, since loss and parameters are finite", SLOWER


def _finite_rows(batch: Mapping[str, Any], count: int) -> np.ndarray:
    """(b): whether all that the system sees of an image is finite."""
    good = np.ones(count, bool)
    for leaf in jax.tree.leaves([batch.get(key) for key in ("image", "views", "endpoints")]):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            good &= np.asarray(jnp.isfinite(leaf.reshape(count, -1)).all(1))
    return good


def _where(names: Sequence[str], bad: Any) -> list[str]:
    return [name for name, wrong in zip(names, bad) if wrong]


def sentence(error: Diverged, experiment: Experiment, ids: Sequence[str], kept: int | None, workdir: Path) -> str:
    """The whole message: step, images, cause, what is kept, what to do.

    Args:
      workdir: of the run; a list of more than `SHOWN` images goes there, into diverged.json.
    """
    try:
        cause, advice, names = explain(error, experiment, ids)
    except Exception:  # of devices that are gone, for example: what is known is said
        cause, advice, names = "", SLOWER, []
    images = f", with the images {some(names, SHOWN)}" if names else ""
    if len(names) > SHOWN and not rundir.untouched(workdir):
        rundir.write_json(workdir / NAME, {"what": str(error), "cause": cause, "images": names})
        images += f" (all in {NAME})"
    guess = f"; the cause is probably {cause}" if cause else ""
    checkpoint = f"the checkpoint of step {kept}" if kept else "no checkpoint"
    what = f"{str(error).rstrip('.')}{images}{guess}; training stopped and keeps {checkpoint}"
    return f"{what}. {advice[0].upper()}{advice[1:]}."
