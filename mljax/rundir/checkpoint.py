"""Checkpoints of a run, each with a digest of every array; the older one takes over where the newest is damaged.

A state is saved from host copies, as one device holds it, so any number of devices can restore it. A step is a folder
that appears under its name only when it is complete: killing the process leaves the older ones as they were. Which
steps are kept is decided by their sealed records alone.
"""

import contextlib
import logging
import math
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from mljax import seal
from mljax.errors import UserError, nearest
from mljax.rundir import manifest, orbax, step_folders, verify
from mljax.rundir.verify import Damaged
from mljax.trees import flatten, nest

log = logging.getLogger("mljax")
T = TypeVar("T")


class NotFinite(UserError):
    """A state that is never saved. `path` is that of the array with a NaN or an infinity, "params/head/kernel"."""

    def __init__(self, step: int, path: str):
        self.path = path
        super().__init__(f"The state of step {step} is not saved: {path} is not finite; lower config.optim.lr.")


class Checkpoints:
    """The checkpoints in a folder: the latest, the best by one metric, and never fewer than two.

    Use it as a context manager: saving goes on in the background, and leaving waits for it. So does the exit of Python.

    Args:
      folder: made if it does not exist.
      keep_best_of: the name in `metrics` by which the best is kept.
      mode: "max" or "min": which metric is better.
      latest, best: how many of each to keep.
      read_only: never write or clean up; required for reading beside a training run.
    Attributes:
      restored: the step that was restored last; -1 before any was.
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
        self.restored = -1
        self._saver: Any = None
        self._saving: int | None = None
        self._recovered = read_only
        self._damaged: dict[int, Damaged] = {}  # steps that are passed over, and why
        self._reported: set[int] = set()  # those of them that a warning was given of

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        with contextlib.suppress(Exception) if error is not None else contextlib.nullcontext():
            self.close()

    # Which steps there are

    @property
    def steps(self) -> list[int]:
        """All complete steps that are not known to be damaged, ascending."""
        self.wait()
        try:
            if not self._recovered:
                self.folder.mkdir(parents=True, exist_ok=True)
                if jax.process_index() == 0:
                    step_folders.recover(self.folder)
                self._recovered = True
            return [step for step in step_folders.complete(self.folder) if step not in self._damaged]
        except OSError as error:
            raise UserError(f"The folder {self.folder} cannot be used for checkpoints ({error.strerror}).") from error

    @property
    def latest(self) -> int | None:
        return max(self.steps, default=None)

    @property
    def best(self) -> int | None:
        """The step with the best metric within the latest stage that has any; the later one of equals."""
        scores = {step: self._score(record) for step, record in self._records().items()}
        return max(((score, step) for step, score in scores.items() if score is not None), default=(None, None))[1]

    def meta(self, step: int | str | None = None) -> dict[str, Any]:
        """What was given as `meta` to the save of that step."""
        return verify.record(self._path(self._resolve(step)))["meta"]

    def metrics(self, step: int | str | None = None) -> dict[str, float | None]:
        """What was given as `metrics`; None in place of a number that is not finite."""
        return verify.record(self._path(self._resolve(step)))["metrics"]

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
          meta: anything that JSON holds. Its "stage", an int, is the stage of the run: "best" is of the latest one.
          replace: take the place of the last step's, which was saved before it could be evaluated; one of the two is
            complete at any moment.
        Returns:
          False if this step is saved already with the very same content, so that there was nothing to do.
        Raises:
          NotFinite: parameters, variables (but constants) or their average hold a NaN or an infinity.
          UserError: an older step, the same step with another content, a full disk (also of the save before this).
        """
        step = int(step)
        # a copy: on a CPU, what device_get returns is the memory that the next step is given to overwrite
        leaves = {path: np.array(leaf) for path, leaf in jax.device_get(flatten(state)).items()}
        if path := manifest.not_finite(leaves):
            raise NotFinite(step, path)
        record = manifest.record(step, leaves, metrics or {}, meta or {})
        self._check_metric(record)
        replace = replace and step == self.latest
        if not replace and not self._is_new(step, record):
            return False
        step_folders.check_space(self._path(step), sum(leaf.nbytes for leaf in leaves.values()))
        with self._writing(step):
            replaced = step_folders.make_room(self._path(step)) if replace else None
            if self._saver is None:
                self._saver = orbax.new_saver()
                orbax.close_at_exit(weakref.ref(self))
            orbax.save(self._saver, self._path(step), record, leaves)
            self._saving = step
        if replaced is not None:
            self.wait()
            step_folders.delete(replaced)
        return True

    def wait(self) -> None:
        """Wait until nothing is being saved, then delete what is not kept; raises what went wrong while saving."""
        if self._saver is None or self._saving is None:
            return
        with self._writing(self._saving), orbax.quiet():
            self._saver.wait_until_finished()
        self._saving = None
        self._delete_old()

    def close(self) -> None:
        """Wait, and let go of the folder. May be called twice; a later use opens it again."""
        try:
            self.wait()
        finally:
            saver, self._saver = self._saver, None
            if saver is not None:
                with orbax.quiet():
                    saver.close()

    def _delete_old(self) -> None:
        """Delete the steps that are not kept."""
        records = self._records()
        self._report_damaged("")
        keep = step_folders.kept({step: self._score(record) for step, record in records.items()}, *self._keep)
        for step in records.keys() - keep:
            step_folders.delete(self._path(step))

    def _is_new(self, step: int, record: dict[str, Any]) -> bool:
        there = self._records()
        self._report_damaged("")
        if step > max(there, default=-1):
            return True
        if step in there and seal.digest(there[step]) == record[seal.KEY]:
            return False
        what = "another state of that step" if step in there else f"step {max(there)}"
        raise UserError(
            f"The checkpoint of step {step} cannot be saved to {self.folder}, which holds {what} already;"
            " resume from there or use an empty folder."
        )

    def _check_metric(self, record: dict[str, Any]) -> None:
        if record["metrics"] and self.keep_best_of not in record["metrics"]:
            hint = nearest(self.keep_best_of, record["metrics"])
            raise UserError(f"The best checkpoint is kept by {self.keep_best_of!r}, and no metric has that name{hint}.")

    def _score(self, record: Mapping[str, Any]) -> step_folders.Score | None:
        """How good a step is; None if it is no candidate for the best."""
        value = record["metrics"].get(self.keep_best_of)
        if not isinstance(value, int | float) or not math.isfinite(value):
            return None
        return int(record["meta"].get("stage", 0)), value if self._mode == "max" else -value

    @contextlib.contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        """A failed write as one sentence. The half-written step is cleaned up when the folder is next used."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            saver, self._saver, self._saving, self._recovered = self._saver, None, None, False
            with contextlib.suppress(Exception):
                saver.close()
            code = orbax.error_code(error)
            if code is None:
                raise
            raise step_folders.unwritten(self._path(step), os.strerror(code), code) from error

    # Restoring

    def restore(self, template: Any, step: int | str | None = None, *, place: Any = None) -> Any:
        """The state of a step, in the structure of a template, verified.

        Args:
          template: the state as it is now, or its shapes from jax.eval_shape; no value of it is read.
          step: a number, "last" (or None) or "best". Where one of the latter is damaged, the next one that is sound
            is restored and a warning says so; a writer sets the damaged one aside. `restored` is then its number.
          place: a sharding, a device, or a function such as the `place_state` of parallel.compile_step; None leaves
            numpy arrays on the host.
        Raises:
          UserError: no such step; an array that is missing, left over, or of another shape or dtype; nothing sound.
        """
        expected = {path: manifest.dtype_and_shape(leaf) for path, leaf in flatten(template).items()}

        def read(step: int) -> dict[str, np.ndarray]:
            entries = verify.record(self._path(step))["leaves"]
            manifest.compare(entries, expected, where=f"The checkpoint of step {step} in {self.folder}")
            return verify.arrays(self._path(step), entries)

        leaves = self._sound(step, read)
        state = jax.tree.unflatten(jax.tree.structure(template), [leaves[path] for path in expected])
        if place is None:
            return state
        return place(state) if callable(place) else jax.device_put(state, place)

    def restore_params(self, step: int | str | None = None) -> dict[str, Any]:
        """What prediction needs, without a template and without reading the optimiser's memory; else as `restore`.

        Returns:
          {"params": .., "variables": .., "ema": .. or None} as nested dicts of numpy arrays; "ema" holds "params" and
          "batch_stats" where the run kept an average.
        """

        def read(step: int) -> dict[str, np.ndarray]:
            entries = verify.record(self._path(step))["leaves"]
            return verify.arrays(
                self._path(step), {p: entry for p, entry in entries.items() if p.split("/")[0] in manifest.WEIGHTS}
            )

        tree = nest(self._sound(step, read))
        return {"params": tree.get("params", {}), "variables": tree.get("variables", {}), "ema": tree.get("ema")}

    def _sound(self, which: int | str | None, read: Callable[[int], T]) -> T:
        """What `read` makes of a step; of "last" and "best" the next sound one takes the place of a damaged one."""
        while True:
            step = self._next(which)
            try:
                result = read(step)
                break
            except Damaged as error:
                if which not in (None, "last", "best"):
                    raise
                if self._path(step).is_dir():  # else the run that writes here has deleted it meanwhile
                    self._damaged[step] = error
        self._report_damaged(f"step {step} is used instead")
        self.restored = step
        return result

    def _next(self, which: int | str | None) -> int:
        try:
            return self._resolve(which)
        except UserError:
            new = sorted(self._damaged.keys() - self._reported)
            errors = [self._damaged.pop(step) for step in new]  # the next call finds them again
            if not errors:
                raise
            others = [step for step in self.steps if step not in new]
            raise Damaged(self._path(new[-1]), errors[-1].why, others) from None

    def _report_damaged(self, instead: str) -> None:
        """Say once of each damaged step that it is; a writer also sets it aside."""
        for step in sorted(self._damaged.keys() - self._reported):
            self._reported.add(step)
            done, why = [instead] if instead else [], self._damaged[step].why
            if not self._read_only:
                with contextlib.suppress(OSError):
                    done.insert(0, f"it is set aside as {step_folders.set_aside(self._path(step)).name}")
                    self._reported.discard(step)  # there may be a step of that number again
                    del self._damaged[step]
            text = f"The checkpoint of step {step} in {self.folder} is damaged ({why})"
            log.warning("%s.", "; ".join([text, ", and ".join(done)]) if done else text)

    def _resolve(self, step: int | str | None) -> int:
        present = self.steps
        if not present:
            raise UserError(f"There is no checkpoint in {self.folder}; train first, or name another folder.")
        if step in (None, "last"):
            return present[-1]
        if step == "best":
            best = self.best
            if best is None:
                raise UserError(f"No checkpoint in {self.folder} has a value of {self.keep_best_of!r}; use 'last'.")
            return best
        if step not in present:
            raise UserError(
                f"There is no checkpoint of step {step!r} in {self.folder}{nearest(str(step), map(str, present))}."
            )
        return int(step)

    def _path(self, step: int) -> Path:
        return self.folder / str(step)

    def _records(self) -> dict[int, dict[str, Any]]:
        """The records of all steps but those whose record is damaged."""
        records = {}
        for step in self.steps:
            try:
                records[step] = verify.record(self._path(step))
            except Damaged as error:
                if self._path(step).is_dir():
                    self._damaged[step] = error
        return records
