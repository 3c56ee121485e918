"""A state saved on one number of devices and restored on another: the same parameters, the same next loss."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.torture.harness import QUICK, Case, Failed, Kind

DEVICES, MODES = (1, 2, 4, 8), ("jit", "pmap")
TOLERANCE = 1e-6
STEPS = 2
WORDS = ("--config=configs/baseline.py:smoke", "--config.system.dropout=0.5", "--config.ema=0.9")


class Trained:
    """A tiny system with dropout on so many devices, and its state after two steps and the loss of the third."""

    def __init__(self, devices: int, mode: str, folder: Path):
        import jax

        from mljax import experiment, parallel, train
        from mljax.config.flags import parse
        from mljax.main import configured
        from mljax.pipeline import loader

        config = configured(parse([*WORDS, f"--config.parallel={mode}", "--workdir=x"]))
        source = experiment.source(config, config.splits.train, training=True)
        plain = {"mean": [0.5] * 3, "std": [0.25] * 3, "weights": None}
        run = experiment.assemble(config, experiment.make_meta(config, source), plain)
        variables = experiment.init_variables(run, config.seed)
        tx = train.make_optimizer(config, variables["params"], 10, run.system.backbone.frozen_parameters)
        state = train.create_state(variables, tx, ema=config.ema, seed=0)
        chosen = jax.devices()[:devices]
        self.step, self.place_state, self.place = parallel.compile_step(train.make_step(run, tx), mode, chosen)
        stream = loader.train_batches(
            source, run.train_transform(), batch_size=config.optim.batch_size, seed=0, start=0, steps=STEPS + 1
        )
        with contextlib.closing(stream) as stream:  # pyright: ignore[reportArgumentType]
            self.batches = list(stream)
        self.shapes = jax.eval_shape(lambda: state)
        placed = self.place_state(state)
        for batch in self.batches[:STEPS]:
            placed, _ = self.step(placed, self.place(batch))
        self.saved, self.folder = jax.device_get(placed), folder
        self._save(placed)
        self.loss = self.next_loss(placed)

    def _save(self, state: Any) -> None:
        from mljax.rundir.checkpoint import Checkpoints

        with Checkpoints(self.folder) as checkpoints:
            checkpoints.save(STEPS, state)

    def restored(self, folder: Path) -> Any:
        from mljax.rundir.checkpoint import Checkpoints

        with Checkpoints(folder, read_only=True) as checkpoints:
            return checkpoints.restore(self.shapes, place=self.place_state)

    def next_loss(self, state: Any) -> float:
        return float(self.step(state, self.place(self.batches[STEPS]))[1]["loss"])


_trained: dict[tuple[int, str], Trained] = {}


def _get(case: Case, devices: int, mode: str) -> Trained:
    import os

    if (devices, mode) not in _trained:
        folder = case.shared / f"{os.getpid()}" / f"{mode}{devices}"
        _trained[devices, mode] = Trained(devices, mode, folder)
    return _trained[devices, mode]


def case(case: Case) -> dict[str, Any]:
    import jax

    from mljax.trees import flatten

    mode, before, _, after = case.what.split()
    a, b = _get(case, int(before), mode), _get(case, int(after), mode)
    state = b.restored(a.folder)
    for path, x in flatten(jax.device_get(state)).items():
        if np.asarray(x).tobytes() != np.asarray(flatten(a.saved)[path]).tobytes():
            raise Failed(f"{path} is not what was saved")
    loss = b.next_loss(state)
    apart = abs(loss - a.loss) / abs(a.loss)
    if not apart <= TOLERANCE:
        raise Failed(f"the next loss is {loss!r}, not {a.loss!r}: {apart:.1e} apart")
    return {"figures": {"relative difference of the loss": apart}}


KIND = Kind(
    name="topology",
    goal="{1,2,4,8} x {1,2,4,8} devices, jit and pmap, with dropout: params bit-equal, next loss within 1e-6",
    plan={f"{mode} {a} to {b}": 1 for mode in MODES for a in DEVICES for b in DEVICES},
    case=case,
    limit=400.0,
    env={"XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {QUICK}"},
)  # fmt: skip
