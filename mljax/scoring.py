"""Scores of a split -> scores.npz -> metrics -> report.json -> the table that papers print."""

import collections
import dataclasses
import importlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mljax import interrupt, metrics, parallel, rundir
from mljax.build import find
from mljax.data.source import Source
from mljax.errors import printable
from mljax.experiment import Experiment
from mljax.pipeline import feature_cache, loader
from mljax.types import Config

log = logging.getLogger("mljax")


def delayed(items: Iterator[Any], depth: int = 2) -> Iterator[Any]:
    """The items, each once `depth` more were asked for: devices have them queued while the host fetches results.

    Raises:
      Stop: a signal came, and the trainer can save what it has.
    """
    waiting = collections.deque[Any]()
    for item in items:
        interrupt.check()
        waiting.append(item)
        if len(waiting) > depth:
            yield waiting.popleft()
    yield from waiting


class Scorer:
    """Runs a system in evaluation mode over a split, compiled once."""

    def __init__(self, experiment: Experiment, devices: list[Any]):
        self.experiment = experiment
        self.shardings, self.devices = parallel.shardings(devices), len(devices)
        self._scores = jax.jit(experiment.scores)
        self._outputs = jax.jit(
            lambda variables, batch: experiment.system.apply(variables, experiment.prepare(batch), train=False)
        )

    def _put(self, batch: Any) -> Any:
        return jax.device_put(batch, self.shardings.split)

    def batches(self, source: Source, maps: Mapping[str, Any] | None, config: Config) -> Iterator[Iterator[Any]]:
        """One iterator of padded batches per view of `config.cache.eval_views`, or one of the plain transform."""
        size = -(-config.eval.batch_size // self.devices) * self.devices
        views = self.experiment.eval_views
        for view in views or (self.experiment.eval_transform(),):
            if maps is not None and isinstance(view, feature_cache.View):
                yield feature_cache.cached_eval_batches(source, maps[view.text], size)
            else:
                options = {"threads": config.input.threads, "workers": config.input.workers}
                yield loader.eval_batches(source, view, batch_size=size, **options)

    def scores(self, variables: Any, source: Source, maps: Mapping[str, Any] | None, config: Config) -> np.ndarray:
        """(N l) float32 on the scale of logits, averaged over views; every image exactly once."""
        variables = jax.device_put(variables, self.shardings.whole)
        views = []
        for batches in self.batches(source, maps, config):
            queued = ((self._scores(variables, self._put(batch)), batch["mask"]) for batch in batches)
            views.append(np.concatenate([np.asarray(scores)[mask > 0] for scores, mask in delayed(queued)]))
        return np.asarray(np.mean(views, axis=0, dtype=np.float64), np.float32)

    def outputs(
        self,
        variables: Any,
        source: Source,
        view: str | None,
        config: Config,
        maps: Mapping[str, Any] | None = None,
        entries: np.ndarray | None = None,
    ) -> Any:
        """Logits and label features of a whole split as host arrays, for `refresh`, in the source's order.

        Args:
          view: e.g. "224:flip"; None: the evaluation's transform, or the first of the cached views.
          maps: cached endpoints of the split by view, if there are any.
          entries: (N l) bool; label features of these entries alone, (entries d), image by image: all of COCO's
            would be 27 GB at 1024 channels.
        """
        transform = self.experiment.eval_transform() if view is None else feature_cache.view(view)
        view = next(iter(maps)) if maps and view is None else view
        variables = jax.device_put(variables, self.shardings.whole)
        size = -(-config.eval.batch_size // self.devices) * self.devices
        logits, labels = [], []
        batches = loader.eval_batches(source, transform, batch_size=size, threads=config.input.threads)
        if maps and view is not None and view in maps:
            batches = feature_cache.cached_eval_batches(source, maps[view], size)
        for out, batch in delayed((self._outputs(variables, self._put(batch)), batch) for batch in batches):
            keep = batch["mask"] > 0
            logits.append(np.asarray(out.logits)[keep])
            if out.label_features is not None:
                features = np.asarray(out.label_features)[keep]
                labels.append(features if entries is None else features[entries[batch["index"][keep]]])
        return {"logits": np.concatenate(logits), "label_features": np.concatenate(labels) if labels else None}


def measure(scores: np.ndarray, source: Source, config: Config) -> dict[str, Any]:
    """Metrics of a split by the config's definitions, in percent."""
    return metrics.evaluate(
        scores, source.labels, source.scored, classes=source.classes,
        definition=config.eval.definition, threshold=config.eval.threshold, scored_in=config.eval.scored_in,
    )  # fmt: skip


def scored_split(experiment: Experiment, source: Source) -> Source:
    """The split that a system is scored on: labels that an evaluation lets it know do not count in average precision.

    A system that predicts with known labels has the hook `known_labels(index) -> (N l)` and the setting `eval_known`.
    """
    share = experiment.config.system.get("eval_known", 0.0)
    known_labels: Any = getattr(experiment.system, "known_labels", None)
    if known_labels is None or not share:
        return source
    known = known_labels(np.arange(len(source))) & (source.observed > 0)
    scored = np.where(known, 0, source.scored).astype(source.scored.dtype)
    return dataclasses.replace(source, name=f"{source.name}, {100 * share:g} % of the labels given", scored=scored)


def write(
    workdir: Path,
    scores: np.ndarray,
    source: Source,
    config: Config,
    *,
    by: str,
    step: int,
    suffix: str = "",
    means: Callable[[Mapping[str, float | None]], dict[str, Any]] | None = None,
    changed: str = "",
) -> dict[str, Any]:
    """Keep scores and report of a split in the run directory and print the table.

    Args:
      means: AP per class -> {what: {"labels": .., "mAP": ..}}: of parts of the labels, such as those seen in training.
      changed: how the split differs from the one that the run was trained with, if that was accepted.
    """
    report = {"split": source.name, "images": len(source), **measure(scores, source, config)}
    report |= {"seed": config.seed, "step": step, "selected_by": by, "definition": config.eval.definition}
    if changed:
        report["data_changed"] = changed
    if means is not None:
        report["mAP_of"] = means(report["per_class_AP"])
    rundir.write_arrays(
        workdir / f"scores{suffix}.npz", scores=scores, labels=source.labels, scored=source.scored,
        ids=np.array(source.ids, dtype=str), classes=np.array(source.classes),
    )  # fmt: skip
    rundir.write_json(workdir / f"report{suffix}.json", report)
    if source.observed.any():
        print(table(report))
    else:
        _submit(workdir, scores, source, config)
    print(f"run directory: {workdir}")
    return report


def _submit(workdir: Path, scores: np.ndarray, source: Source, config: Config) -> None:
    """Files for the evaluation server of a data set that keeps the labels of this split to itself."""
    print(f"{source.name} has no labels here, so nothing is measured; its {len(source)} images are scored.")
    reader = importlib.import_module(find("data", config.data.name).__module__)
    if hasattr(reader, "write_submission"):
        paths = reader.write_submission(workdir, source, scores)
        print(f"{len(paths)} files for the evaluation server: {paths[0].parent}")


def finished(workdir: Path) -> dict[str, Any] | None:
    """The report of a run that is complete, its table printed again; None if there is more to do."""
    if not (workdir / "report.json").is_file():
        return None
    names = rundir.unsound(workdir)
    try:
        report = {} if names else rundir.read_json(workdir / "report.json")
        text = "" if names else table(report)
    except (KeyError, TypeError, AttributeError):
        names = ["report.json"]
    if names:
        log.warning("%s in %s is damaged or missing; made again from the checkpoint.", ", ".join(names), workdir)
        return None
    print(text)
    print(f"run directory: {workdir} (finished earlier; nothing was trained)")
    return report


def table(report: Mapping[str, Any]) -> str:
    """The table of CMSG's paper: AP per class and mAP, then CP CR CF1 OP OR OF1 over all labels and over the top 3.

    Behind the mAP stands the definition of average precision, `config.eval.definition`.
    """
    values, aps = report["metrics"], {printable(name): ap for name, ap in report["per_class_AP"].items()}
    width = max(map(len, aps), default=5)
    columns = max(1, min(4, 80 // (width + 9)))
    rows = -(-len(aps) // columns)
    cells = [f"{name:<{width}} {'  -  ' if ap is None else f'{ap:5.1f}'}" for name, ap in aps.items()]
    lines = [f"{report['split']}: {report['images']} images, {report['selected_by']}, seed {report['seed']}"]
    lines += ["AP per class (%)", *("   ".join(cells[r::rows]).rstrip() for r in range(rows)), ""]
    names = ("CP", "CR", "CF1", "OP", "OR", "OF1")
    head = f"mAP {_cell(values['mAP'])}" + (f" ({report['definition']})" if "definition" in report else "")
    wide = max(12, len(head) + 2)
    lines.append(f"{head:<{wide}}" + "".join(f"{name:>8}" for name in names))
    for title, suffix in (("all labels", ""), ("top 3", "_3")):
        lines.append(f"{title:<{wide}}" + "".join(f"{_cell(values[name + suffix]):>8}" for name in names))
    for what, mean in report.get("mAP_of", {}).items():
        lines.append(f"mAP {_cell(mean['mAP'])}  of {mean['labels']} labels {what} in training")
    if report.get("left_out"):
        lines.append(printable(f"without a positive, left out of mAP: {', '.join(report['left_out'])}"))
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return f"{'-' if value is None else format(value, '6.2f'):>6}"
