"""Checkpoints of a run: orbax, thin, with a digest of every array.

What orbax alone would let pass and this file does not: the latest step is deleted when only the best are kept; a
metric that is not a number becomes the best; a save at an existing step is dropped in silence; a flipped byte loads as
another number; a leaf that is not on disk comes back as a bare shape; a dtype changes without a word.

A state is saved from host copies, as one device holds it, so any number of devices can restore it. A step is a folder
that appears under its name only when it is complete: killing the process leaves the older ones as they were.
"""

import contextlib
import math
import os
import shutil
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mljax.errors import UserError, nearest
from mljax.rundir import manifest
from mljax.rundir.orbax import close_at_exit, error_code, orbax, quiet
from mljax.trees import flatten, nest


class Checkpoints:
    """The checkpoints in a folder: the latest, and the best by one metric.

    Use it as a context manager: saving goes on in the background, and leaving waits for it. So does the exit of Python.

    Args:
      folder: made if it does not exist.
      keep_best_of: the name in `metrics` by which the best is kept.
      mode: "max" or "min": which metric is better.
      latest, best: how many of each to keep.
      read_only: never write or clean up; what reads beside a training that runs must set it.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep_best_of: str = "mAP",
        mode: str = "max",
        latest: int = 1,
        best: int = 1,
        read_only: bool = False,
    ):
        if mode not in ("max", "min") or latest < 1 or best < 0:
            raise UserError(f"Checkpoints keep latest >= 1 and best >= 0 by mode 'max' or 'min', not {mode!r}.")
        self.folder = Path(folder).absolute()
        self.keep_best_of, self._mode, self._keep, self._read_only = keep_best_of, mode, (latest, best), read_only
        self._open_manager: Any = None
        self._saving: int | None = None
        if not read_only:
            self._put_back()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        with contextlib.suppress(Exception) if error is not None else contextlib.nullcontext():
            self.close()

    # Which steps there are

    @property
    def steps(self) -> list[int]:
        """All complete steps, ascending."""
        if self._read_only and not self.folder.is_dir():
            return []
        self.wait()
        if self._read_only:
            with self._opening(), quiet():
                self._manager.reload()
        return sorted(self._manager.all_steps())

    @property
    def latest(self) -> int | None:
        return max(self.steps, default=None)

    @property
    def best(self) -> int | None:
        """The step with the best metric within the latest stage that has any; the later one of equals."""
        found = {step: self._record(step) for step in self.steps}
        scores = {step: self._score(one["metrics"], one["meta"].get("stage", 0)) for step, one in found.items()}
        return max(((score, step) for step, score in scores.items() if score is not None), default=(None, None))[1]

    def meta(self, step: int | str | None = None) -> dict[str, Any]:
        """What was given as `meta` to the save of that step."""
        return self._record(self._resolve(step))["meta"]

    def metrics(self, step: int | str | None = None) -> dict[str, float | None]:
        """What was given as `metrics`; None in place of a number that is not finite."""
        return self._record(self._resolve(step))["metrics"]

    # Saving

    def save(
        self,
        step: int,
        state: Any,
        *,
        metrics: Mapping[str, Any] | None = None,
        meta: Mapping[str, Any] | None = None,
        replace: bool = False,
    ) -> bool:
        """Save a state; returns when it is copied to the host, and writes in the background.

        Args:
          step: of the whole run, so ascending over stages (state.step may start again in each).
          state: a TrainState, on devices or on the host.
          metrics: numbers of an evaluation of this state; must name `keep_best_of`. A NaN never makes it the best.
          meta: anything that JSON holds. Its "stage", an int, is the stage of the run: "best" looks at the latest one.
          replace: take the place of the last step's, which was saved before it could be evaluated; one of them is
            whole at any moment.
        Returns:
          False if this step is saved already with the very same content, so that nothing was to be done.
        Raises:
          UserError: an older step, the same step with another content, a full disk (also of the save before this).
        """
        step = int(step)
        # a copy: on a CPU, what device_get returns is the memory that the next step is given to overwrite
        leaves = {path: np.array(leaf) for path, leaf in jax.device_get(flatten(state)).items()}
        record = manifest.sealed(step, leaves, dict(metrics or {}), dict(meta or {}))
        score = self._checked_score(record)
        aside = self.folder / f"replaced-{step}"
        if replace and step == self.latest:
            (self.folder / str(step)).rename(aside)
            self._manager.reload()
        if not self._is_new(step, record):
            return False
        ocp = orbax()
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in manifest.items(leaves).items()}
        self._check_space(step, sum(leaf.nbytes for leaf in leaves.values()))
        with self._writing(step), quiet():
            done = self._manager.save(
                step, args=ocp.args.Composite(record=ocp.args.JsonSave(record), **items), metrics=score
            )
            if not done:
                raise RuntimeError(f"orbax refused to save step {step} to {self.folder}")
            self._saving = step
        if aside.is_dir():
            self.wait()
            shutil.rmtree(aside, ignore_errors=True)
        return True

    def _put_back(self) -> None:
        """What was to be replaced when the process ended: back in its place if nothing has come there."""
        for aside in self.folder.glob("replaced-*"):
            place = self.folder / aside.name.removeprefix("replaced-")
            with contextlib.suppress(OSError):
                shutil.rmtree(aside) if place.is_dir() else aside.rename(place)

    def wait(self) -> None:
        """Until nothing is being saved; raises what went wrong while saving."""
        if self._open_manager is not None and self._saving is not None:
            with self._writing(self._saving), quiet():
                self._open_manager.wait_until_finished()
            self._saving = None

    def close(self) -> None:
        """Wait, and let go of the folder. May be called twice; a later use opens it again."""
        try:
            self.wait()
        finally:
            manager, self._open_manager = self._open_manager, None
            if manager is not None:
                with quiet():
                    manager.close()

    def _is_new(self, step: int, record: dict[str, Any]) -> bool:
        steps = self.steps
        if not steps or step > steps[-1]:
            return True
        if step in steps and self._record(step)["digest"] == record["digest"]:
            return False
        there = "another state of that step" if step in steps else f"step {steps[-1]}"
        raise UserError(
            f"The checkpoint of step {step} cannot be saved to {self.folder}, which holds {there} already;"
            " resume from there or use an empty folder."
        )

    def _checked_score(self, record: dict[str, Any]) -> dict[str, float] | None:
        """What orbax keeps beside the arrays to find the best, None if this state is no candidate."""
        metrics = record["metrics"]
        if not metrics:
            return None
        if self.keep_best_of not in metrics:
            hint = nearest(self.keep_best_of, metrics)
            raise UserError(f"The best checkpoint is kept by {self.keep_best_of!r}, and no metric has that name{hint}.")
        value = metrics[self.keep_best_of]
        return None if value is None else {self.keep_best_of: value, "stage": int(record["meta"].get("stage", 0))}

    def _score(self, metrics: Mapping[str, Any] | None, stage: Any = 0) -> tuple[int, float] | None:
        value = (metrics or {}).get(self.keep_best_of)
        if not isinstance(value, int | float) or not math.isfinite(value):
            return None
        return int(stage), value if self._mode == "max" else -value

    def _check_space(self, step: int, size: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < size / 4:  # orbax compresses: zeros to nothing, trained weights by a tenth
            raise UserError(self._unwritten(step, f"{size / 2**20:.1f} MiB, and {free / 2**20:.1f} MiB are free"))

    def _unwritten(self, step: int, reason: str) -> str:
        return (
            f"The checkpoint of step {step} cannot be written to {self.folder} ({reason}); free some space or choose"
            " another folder and resume, the older checkpoints are whole."
        )

    @contextlib.contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        """A failed write as one sentence. The half-written step is cleaned up when the folder is next used."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            manager, self._open_manager, self._saving = self._open_manager, None, None
            with contextlib.suppress(Exception):
                manager.close()
            code = error_code(error)
            if code is None:
                raise
            raise UserError(self._unwritten(step, os.strerror(code))) from error

    # Restoring

    def restore(self, template: Any, step: int | str | None = None, *, place: Any = None) -> Any:
        """The state of a step, in the structure of a template, verified.

        Args:
          template: the state as it is now, or its shapes from jax.eval_shape; no value of it is read.
          step: a number, "last" (or None) or "best".
          place: a sharding, a device, or a function such as the `place_state` of parallel.compile_step; None leaves
            numpy arrays on the host.
        Raises:
          UserError: no such step; a leaf that is missing, left over, or of another shape or dtype; a damaged file.
        """
        step = self._resolve(step)
        record = self._record(step)
        wanted = {path: manifest.kind(leaf) for path, leaf in flatten(template).items()}
        manifest.compare(record["leaves"], wanted, where=f"The checkpoint of step {step} in {self.folder}")
        leaves = self._read(step, record["leaves"])
        state = jax.tree.unflatten(jax.tree.structure(template), [leaves[path] for path in wanted])
        if place is None:
            return state
        return place(state) if callable(place) else jax.device_put(state, place)

    def restore_params(self, step: int | str | None = None) -> dict[str, Any]:
        """What prediction needs, without a template and without reading the optimiser's memory.

        Returns:
          {"params": .., "variables": .., "ema": .. or None} as nested dicts of numpy arrays; "ema" holds "params" and
          "batch_stats" where the run kept an average.
        """
        step = self._resolve(step)
        wanted = {p: entry for p, entry in self._record(step)["leaves"].items() if p.split("/")[0] in manifest.WEIGHTS}
        tree = nest(self._read(step, wanted))
        return {"params": tree.get("params", {}), "variables": tree.get("variables", {}), "ema": tree.get("ema")}

    def _resolve(self, step: int | str | None) -> int:
        steps = self.steps
        if not steps:
            raise UserError(f"There is no checkpoint in {self.folder}; train first, or name another folder.")
        if step in (None, "last"):
            return steps[-1]
        if step == "best":
            best = self.best
            if best is None:
                raise UserError(f"No checkpoint in {self.folder} has a value of {self.keep_best_of!r}; use 'last'.")
            return best
        if step not in steps:
            raise UserError(
                f"There is no checkpoint of step {step!r} in {self.folder}{nearest(str(step), map(str, steps))}."
            )
        return int(step)

    def _record(self, step: int) -> dict[str, Any]:
        ocp = orbax()
        try:
            with quiet():
                record = self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore())).record
            intact = record["digest"] == manifest.digest({k: v for k, v in record.items() if k != "digest"})
        except Exception as error:
            raise UserError(self._damaged(step, "its record cannot be read")) from error
        if not intact:
            raise UserError(self._damaged(step, "its record is not what was saved"))
        return record

    def _read(self, step: int, entries: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Arrays by path, every one compared with its digest."""
        ocp = orbax()
        shapes = {p: jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype)) for p, (dtype, shape, _) in entries.items()}
        args = {}
        for name, tree in manifest.items(shapes).items():
            restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            args[name] = ocp.args.PyTreeRestore(item=tree, restore_args=restore_args)
        try:
            with quiet():
                restored = self._manager.restore(step, args=ocp.args.Composite(**args)) if args else {}
            found = {path: leaf for name in args for path, leaf in flatten(restored[name]).items()}
        except Exception as error:
            raise UserError(self._damaged(step, "its arrays cannot be read")) from error
        leaves = {}
        for path, saved in shapes.items():
            leaf = found.get(path) if saved.size else np.zeros(saved.shape, saved.dtype)
            if fault := manifest.fault(path, entries[path], leaf):
                raise UserError(self._damaged(step, fault))
            leaves[path] = leaf
        return leaves

    def _damaged(self, step: int, what: str) -> str:
        others = [str(other) for other in self.steps if other != step]
        advice = (
            f"restore step {' or '.join(others)} instead, or delete {self.folder / str(step)}"
            if others
            else "no other checkpoint is there, so start the run again"
        )
        return f"The checkpoint of step {step} in {self.folder} is damaged ({what}); {advice}."

    @property
    def _manager(self) -> Any:
        if self._open_manager is None:
            if self._read_only and not self.folder.is_dir():
                raise UserError(f"There is no folder {self.folder}; train first, or name another folder.")
            with self._opening(), quiet():
                self._open_manager = self._make_manager()
            close_at_exit(weakref.ref(self))
        return self._open_manager

    @contextlib.contextmanager
    def _opening(self) -> Iterator[None]:
        """What opening a folder can meet: it cannot be made, or one of the small files that orbax reads is damaged."""
        try:
            yield
        except OSError as error:
            raise UserError(f"The folder {self.folder} cannot be used for checkpoints ({error.strerror}).") from error
        except ValueError as error:
            broken = [path.parts[-3] for path in self.folder.glob("*/metrics/metrics") if not manifest.is_json(path)]
            which = self.folder / broken[0] if broken else f"a step in {self.folder}"
            raise UserError(f"The checkpoint {which} is damaged (its metrics cannot be read); delete it.") from error

    def _make_manager(self) -> Any:
        ocp = orbax()
        from orbax.checkpoint import checkpoint_managers as policies

        if not self._read_only:
            self.folder.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:  # orbax's own clean-up fails where a failed save still closes its files
                for unfinished in self.folder.glob("*.orbax-checkpoint-tmp"):
                    shutil.rmtree(unfinished, ignore_errors=True)
        rank: Any = lambda metrics: self._score(metrics, metrics.get("stage", 0)) or (-1, -math.inf)  # noqa: E731
        kept = policies.BestN(get_metric_fn=rank, n=self._keep[1], keep_checkpoints_without_metrics=False)
        return ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(self._keep[0]), kept]),
                best_fn=lambda metrics: metrics.get(self.keep_best_of, 0.0),  # only so that orbax stores metrics at all
                create=not self._read_only,
                read_only=self._read_only,
            ),
        )
