"""Numbers that are not finite, at six places: the run stops within a step, names it, and never saves them."""

import dataclasses
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.torture import processes, runs
from benchmarks.torture.harness import Case, Failed, Kind

EPOCHS = 10
AFTER = 3  # steps that may have begun by the time that the bad one is known: the host is that far ahead
SYSTEMS = ("baseline", "sst", "role")
PLACES = ("input", "label", "loss weight", "gradient", "params", "memory")


def case(case: Case) -> dict[str, Any]:
    place, _, every = case.what.partition(", log_every ")
    system = "sst" if place == "memory" and case.rng.random() < 0.5 else SYSTEMS[int(case.rng.integers(len(SYSTEMS)))]
    at = int(case.rng.integers(1, EPOCHS * runs.STEPS - 3))  # the step, from 0, that gets the first bad number
    value = (np.nan, np.inf, -np.inf)[int(case.rng.integers(3))]
    workdir, steps = case.folder / "run", case.folder / "steps"
    evaluated, stopped = (1, EPOCHS)[int(case.rng.integers(2))], bool(case.rng.random() < 0.2)
    argv = runs.argv(system, workdir, f"--config.log_every={every}", f"--config.optim.epochs={EPOCHS}")
    argv.append(f"--config.eval.every={evaluated}")
    process = processes.forked(argv, case.folder / "log", hook=lambda: _inject(place, at, value, steps, stopped))
    status, said = process.wait(runs.LIMIT), process.err.strip()
    where = f"{value} in {place} of {system} at step {at + 1}"
    if stopped and status in (130, 143):  # by SIGTERM in that very step: what was bad must still not be saved
        status, said = 2, f"mljax: step {at + 1}"
    if "Traceback" in said or status != 2:
        raise Failed(f"{where}: status {status}, {said[-300:]!r}")
    message = said.rpartition("mljax: ")[2]
    named = [int(n) for n in re.findall(r"step (\d+)", message)]
    if not named or not at <= named[0] <= at + 2:
        raise Failed(f"{where}: the message names step {named[:1]}: {message[:300]!r}")
    saved = processes.forked([], case.folder / "saved", hook=lambda: _read(workdir, case.folder / "read"))
    saved.wait(runs.LIMIT)
    _check_saved(case.folder / "read", where, at)
    dispatched = len(steps.read_text().split()) - at - 1
    if dispatched > AFTER:
        raise Failed(f"{where}: {dispatched} more steps were begun")
    return {"figures": {"steps begun after it": dispatched}}


def _inject(place: str, at: int, value: float, steps: Path, stopped: bool) -> None:
    """Change step `at`: the batch that it gets, or the state; if `stopped`, with SIGTERM in the same step."""
    from mljax import parallel

    compile_step = parallel.compile_step

    def compiled(*args: Any, **kwargs: Any) -> Any:
        step, place_state, place_batch = compile_step(*args, **kwargs)
        count = [0, 0]

        def bad_batch(batch: Any) -> Any:
            count[0] += 1
            return place_batch(_bad_batch(batch, place, value) if count[0] == at + 1 else batch)

        def bad_step(state: Any, batch: Any) -> Any:
            count[1] += 1
            with steps.open("a") as file:
                file.write(f"{count[1]}\n")
            if stopped and count[1] == at + 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(_bad_state(state, place, value) if count[1] == at + 1 else state, batch)

        return bad_step, place_state, bad_batch

    setattr(parallel, "compile_step", compiled)  # noqa: B010


def _bad_batch(batch: dict[str, Any], place: str, value: float) -> dict[str, Any]:
    names = {"input": "image", "label": "labels", "loss weight": "observed"}
    if place in names:
        array = np.array(batch[names[place]], np.float32)
        array.reshape(-1)[: max(1, array.size // 8)] = value
        batch = {**batch, names[place]: array}
    return batch


def _bad_state(state: Any, place: str, value: float) -> Any:
    import jax

    def spoil(tree: Any) -> Any:
        def one(x: Any) -> Any:
            floats = np.issubdtype(np.asarray(x).dtype, np.floating) and np.size(x)
            return jax.device_put(np.full_like(x, value), x.sharding) if floats else x

        return jax.tree.map(one, tree)

    if place == "params":
        return dataclasses.replace(state, params=spoil(state.params))
    if place == "gradient":  # a rate so large that what it makes of the parameters overflows
        huge = jax.tree.map(lambda p: p * np.float32(1e30), state.params)
        return dataclasses.replace(state, params=huge)
    if place == "memory":
        kept = {k: v if k == "constants" else spoil(v) for k, v in state.variables.items()}
        return dataclasses.replace(state, variables=kept)
    return state


def _read(workdir: Path, report: Path) -> None:
    """In a fork: the steps that were saved, and those with a number that is not finite."""
    from mljax.rundir import manifest
    from mljax.rundir.checkpoint import Checkpoints
    from mljax.trees import flatten

    bad = []
    with Checkpoints(workdir / "checkpoints" / "0", read_only=True) as checkpoints:
        steps = checkpoints.steps
        for step in steps:
            state = checkpoints.restore_params(step)
            if path := manifest.not_finite({p: np.asarray(x) for p, x in flatten(state).items() if x is not None}):
                bad.append((step, path))
    report.write_text(json.dumps({"steps": steps, "bad": bad}))
    os._exit(0)


def _check_saved(report: Path, where: str, at: int) -> None:
    if not report.is_file():
        raise Failed(f"{where}: what was saved cannot be read")
    read = json.loads(report.read_text())
    if read["bad"]:
        raise Failed(f"{where}: saved with {read['bad'][0][1]} not finite, step {read['bad'][0][0]}")
    if read["steps"] and max(read["steps"]) > at:
        raise Failed(f"{where}: step {max(read['steps'])} was saved after it")


KIND = Kind(
    name="nan",
    goal="NaN and infinities at 6 places, log_every 1 and 20: stopped within a step, named, never saved",
    plan={f"{place}, log_every {every}": 5 for place in PLACES for every in (1, 20)},
    case=case,
    limit=300.0,
)
