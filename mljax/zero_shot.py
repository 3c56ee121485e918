"""A trained run for labels that it was not trained on, by their label vectors.

`config.unseen` names labels that training does not have (see `mljax.data.unseen`). A system that makes its classifiers
of label vectors (its module offers `with_labels`; so far ML-Decoder in its zero-shot mode) scores them afterwards:
`mljax.evaluate --labels=unseen`, `mljax.predict --labels=zebra,giraffe`.
"""

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mljax import experiment
from mljax.build import find
from mljax.config.derive import derive
from mljax.data.labels import key, spelled_twice
from mljax.data.source import Source
from mljax.data.unseen import columns, named
from mljax.data.word_vectors import UNNAMED
from mljax.errors import UserError, nearest
from mljax.experiment import Experiment
from mljax.types import Config, Meta

Variables = Mapping[str, Any]
GROUPS = ("all", "seen", "unseen")


def with_labels(
    run: Experiment, variables: Variables, labels: Sequence[str], *, vectors: Any = None, every: tuple[str, ...] = ()
) -> tuple[Experiment, Variables]:
    """The experiment and variables of a run for other labels than it was trained on.

    Args:
      run, variables: of a system that makes its classifiers of label vectors.
      labels: l names.
      vectors: (l e) in their order, or where to look for those that are new: a file or "glove"; None: where the run had
        its own from. Labels that it was trained on keep the vectors of their training.
      every: all classes of the data set that the labels are of, for files of vectors without names.
    Raises:
      UserError: the system is bound to its labels, a label is named twice, or one has no vector.
    """
    labels, config = named(labels), run.config
    module = importlib.import_module(find("systems", config.system.name).__module__)
    if not hasattr(module, "with_labels"):
        raise UserError(
            f"The system {config.system.name!r} is bound to the labels that it was trained on; for others train"
            " configs/ml_decoder.py:zero_shot."
        )
    if not labels:
        raise UserError("No label is named; give at least one.")
    if pair := (spelled_twice(labels) or next(((x, x) for x in labels if labels.count(x) > 1), None)):
        raise UserError(f"The labels {pair[0]!r} and {pair[1]!r} are one; name it once.")
    if getattr(run.system, "vectors", None) is None:
        module.with_labels(run.system, variables, run.meta)  # says that it is bound
    if vectors is None or isinstance(vectors, str):
        table = _vectors(run, labels, vectors, every)
    else:
        table = np.asarray(vectors, np.float32)
        if table.ndim != 2 or len(table) != len(labels):
            raise UserError(f"The vectors have the shape {table.shape}; {len(labels)} labels need ({len(labels)}, e).")
    nothing = np.zeros((0, len(labels)), np.uint8)
    meta = Meta(name=run.meta.name, classes=labels, labels=nothing, observed=nothing, vectors=table)
    system, changed = module.with_labels(run.system, variables, meta)
    return dataclasses.replace(run, meta=meta, system=system), jax.device_put(changed)


def _vectors(run: Experiment, labels: tuple[str, ...], vectors: str | None, every: tuple[str, ...]) -> np.ndarray:
    """(l e): of trained labels the run's own, of others by name from the source that is given, or the run's."""
    meta, config = run.meta, run.config
    trained = {} if meta.vectors is None else dict(zip(map(key, meta.classes), meta.vectors, strict=True))
    new = tuple(name for name in labels if key(name) not in trained)
    if vectors is not None:
        config = derive(config, {"vectors": vectors})
    if new and config.vectors.endswith(UNNAMED) and not every:
        raise UserError(
            f"{config.vectors!r} has vectors without names, so {new[0]!r} cannot be looked up in it; give --vectors a"
            " file with names, or 'glove'."
        )
    of_new = experiment.label_vectors(config, new, every) if new else None
    if new and of_new is None:
        raise UserError(f"There is no vector for {new[0]!r}; give --vectors a file of names and vectors, or 'glove'.")
    table = {**trained, **({} if of_new is None else dict(zip(map(key, new), of_new, strict=True)))}
    rows = [table[key(name)] for name in labels]
    if len({row.shape for row in rows}) > 1:
        raise UserError(
            f"The vectors of new labels have {len(table[key(new[0])])} numbers and those of the training"
            f" {len(next(iter(trained.values())))}; both must come from the same source."
        )
    return np.stack(rows).astype(np.float32)


def evaluation(
    run: Experiment, variables: Variables, split: str, labels: Any, vectors: str | None = None
) -> tuple[Experiment, Variables, Source]:
    """A run and a split of `config.data`, both of the labels that are asked for.

    Args:
      labels: None: those of the run, which must be the split's; "all" of the data set, those that were "seen" in
        training, those that were not ("unseen"), or names.
    """
    config, trained = run.config, run.meta.classes
    source = _source(config, split)
    if labels is None:
        unseen = named(config.unseen)
        names = [name for name in source.classes if name not in unseen]
        if tuple(names) != trained:
            raise UserError(
                f"{source.name} has other classes than this run; evaluate it on its own data set, or a zero-shot"
                " ML-Decoder with --labels=all."
            )
        return run, variables, columns(source, names) if unseen else source
    seen = {key(name) for name in trained}
    chosen = named(labels)
    if len(chosen) == 1 and chosen[0] in GROUPS:
        fits = {"all": (True, False), "seen": (True,), "unseen": (False,)}[chosen[0]]
        names = [name for name in source.classes if (key(name) in seen) in fits]
        if not names:
            kind = "none that this run was trained on" if chosen[0] == "seen" else "no label that training did not have"
            raise UserError(f"{source.name} has {kind}.")
    else:
        names = list(chosen)
        for name in names:
            if name not in source.classes:
                raise UserError(
                    f"{source.name} has no label {name!r}{nearest(name, (*source.classes, *GROUPS))}; --labels takes"
                    " names of it, or all, seen, unseen."
                )
    other, changed = with_labels(run, variables, names, vectors=vectors, every=source.every or source.classes)
    return other, changed, columns(source, names)


def _source(config: Config, split: str) -> Source:
    """A split with all of its classes."""
    return experiment.source(derive(config, {"unseen": ()}), split, training=False)


def means(trained: Sequence[str], per_class: Mapping[str, float | None]) -> dict[str, dict[str, float | int | None]]:
    """mAP of the labels that a run was trained on, and of the others, from the AP of each class."""
    seen = {key(name) for name in trained}
    groups = {}
    for name, of_training in (("seen", True), ("unseen", False)):
        of = [ap for label, ap in per_class.items() if (key(label) in seen) == of_training and ap is not None]
        if of:
            groups[name] = {"labels": len(of), "mAP": float(np.mean(of))}
    return groups
