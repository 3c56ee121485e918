"""A released checkpoint of a whole system -> a run directory that evaluates and predicts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mljax import experiment, rundir
from mljax.config.derive import derive
from mljax.config.overrides import overridden
from mljax.config.reading import read_config
from mljax.data import unseen
from mljax.errors import UserError
from mljax.rundir.checkpoint import Checkpoints
from mljax.train import create_state
from mljax.types import Meta
from mljax.weights.published import convert, of, read_files


def to_run(paths: Sequence[str], config: Any, workdir: Path, classes: Sequence[str] | None = None) -> Path:
    """Write the run directory of a released checkpoint.

    Args:
      paths: its file or files, or the folder of these.
      config: the system's, with the data set whose labels it predicts.
      workdir: must not hold a run yet.
      classes: the label names in the checkpoint's order; None: those of the config's data set, which must be here.
    Returns:
      The run directory; `mljax.evaluate` and `mljax.predict` read it.
    """
    files = [Path(p).expanduser() for p in paths]
    if (workdir / "config.json").exists():
        raise UserError(f"{workdir} already holds a run; name another --workdir.")
    meta, values = _meta(config, classes), experiment.preprocessing(config)  # mean and std of the usual weights
    config = derive(config, {"weights.name": None, "ema": 0.0, "stages": (), "eval.select": "last"})
    run = experiment.assemble(config, meta, values)
    state = read_files(files, of(run.system))
    variables = jax.device_get(experiment.init_variables(run, 0))
    variables = convert(state, run.system, config.backbone.name, variables, files[0])
    tx = optax.set_to_zero()  # nothing is trained, so no state of an optimizer is kept
    folder = workdir / "checkpoints" / "0"
    with rundir.opened(workdir, config), Checkpoints(folder, keep_best_of="mAP") as checkpoints:
        rundir.save_meta(workdir, meta, values)
        state = create_state(jax.tree.map(jnp.asarray, variables), tx, ema=0.0, seed=config.seed)
        checkpoints.save(0, state, meta={"stage": 0, "step": 0, "kind": "raw", "source": [f.name for f in files]})
    return workdir


def _meta(config: Any, classes: Sequence[str] | None) -> Any:
    if classes is None:
        return experiment.make_meta(config, experiment.source(config, config.splits.train, training=True))
    nothing = np.zeros((0, len(classes)), np.uint8)
    others = config.vectors == "auto" and not unseen.brings(config.data.name, classes)
    vectors = None if others else experiment.label_vectors(config, tuple(classes))
    return Meta(name="released", classes=tuple(classes), labels=nothing, observed=nothing, vectors=vectors)


def command(
    files: Sequence[str],
    config: str,
    workdir: Path,
    classes: str | None,
    overrides: Sequence[tuple[str, str]] = (),
) -> int:
    """`python -m mljax.weights convert FILES --config=.. [--config.KEY=..] --workdir=.. [--classes=FILE]`."""
    names = None
    if classes is not None:
        path = Path(classes).expanduser()
        if not path.is_file():
            raise UserError(f"There is no file {path} of class names; give a text file with one name a line.")
        names = tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
    to_run(files, overridden(read_config(config), overrides), workdir, names)
    print(f"run directory: {workdir}")
    return 0
