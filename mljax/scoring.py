"""Scores of a split -> scores.npz -> metrics -> report.json -> the table that papers print."""

import collections
import dataclasses
import importlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mljax import metrics, optim, rundir
from mljax.build import find
from mljax.data.source import Source
from mljax.errors import UserError, nearest
from mljax.experiment import Experiment
from mljax.pipeline import feature_cache, loader
from mljax.types import Config

log = logging.getLogger("mljax")


SELECTIONS = ("last", "best", "best_of_raw_and_ema")


def late(items: Iterator[Any], depth: int = 2) -> Iterator[Any]:
    """The items, each only after the `depth` behind it were asked for.

    Devices have so much work before them while the host fetches what was done, and never more of it.
    """
    waiting = collections.deque[Any]()
    for item in items:
        waiting.append(item)
        if len(waiting) > depth:
            yield waiting.popleft()
    yield from waiting


class Scorer:
    """Runs a system in evaluation mode over a split, compiled once."""

    def __init__(self, experiment: Experiment, devices: list[Any]):
        self.experiment = experiment
        mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
        self.whole, self.split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
        self.devices = len(devices)
        self._scores = jax.jit(experiment.scores)
        self._outputs = jax.jit(
            lambda variables, batch: experiment.system.apply(variables, experiment.prepare(batch), train=False)
        )

    def batches(self, source: Source, maps: Mapping[str, Any] | None, config: Config) -> Iterator[Iterator[Any]]:
        """One iterator of padded batches per view of `config.cache.eval_views`, or one of the plain transform."""
        size = -(-config.eval.batch_size // self.devices) * self.devices
        views = self.experiment.eval_views
        for look in views or (self.experiment.eval_transform(),):
            if maps is not None and isinstance(look, feature_cache.View):
                yield feature_cache.cached_eval_batches(source, maps[look.text], size)
            else:
                options = {"threads": config.input.threads, "workers": config.input.workers}
                yield loader.eval_batches(source, look, batch_size=size, **options)

    def scores(self, variables: Any, source: Source, maps: Mapping[str, Any] | None, config: Config) -> np.ndarray:
        """(N l) float32 on the scale of logits, averaged over views; every image exactly once."""
        variables = jax.device_put(variables, self.whole)
        views = []
        for batches in self.batches(source, maps, config):
            ahead = ((self._scores(variables, jax.device_put(batch, self.split)), batch["mask"]) for batch in batches)
            views.append(np.concatenate([np.asarray(scores)[mask > 0] for scores, mask in late(ahead)]))
        return np.asarray(np.mean(views, axis=0, dtype=np.float64), np.float32)

    def outputs(
        self,
        variables: Any,
        source: Source,
        look: str | None,
        config: Config,
        maps: Mapping[str, Any] | None = None,
        entries: np.ndarray | None = None,
    ) -> Any:
        """Logits and label features of a whole split as host arrays, for `refresh`, in the source's order.

        Args:
          look: a view, e.g. "224:flip"; None: the evaluation's transform, or the first of the cached views.
          maps: cached endpoints of the split by view, if there are any.
          entries: (N l) bool; label features of these entries alone, (entries d), image by image: all of COCO's
            would be 27 GB at 1024 channels.
        """
        transform = self.experiment.eval_transform() if look is None else feature_cache.view(look)
        look = next(iter(maps)) if maps and look is None else look
        variables = jax.device_put(variables, self.whole)
        size = -(-config.eval.batch_size // self.devices) * self.devices
        logits, labels = [], []
        batches = loader.eval_batches(source, transform, batch_size=size, threads=config.input.threads)
        if maps and look is not None and look in maps:
            batches = feature_cache.cached_eval_batches(source, maps[look], size)
        for out, batch in late((self._outputs(variables, jax.device_put(b, self.split)), b) for b in batches):
            keep = batch["mask"] > 0
            logits.append(np.asarray(out.logits)[keep])
            if out.label_features is not None:
                found = np.asarray(out.label_features)[keep]
                labels.append(found if entries is None else found[entries[batch["index"][keep]]])
        return {"logits": np.concatenate(logits), "label_features": np.concatenate(labels) if labels else None}


def measure(scores: np.ndarray, source: Source, config: Config) -> dict[str, Any]:
    """Metrics of a split by the config's definitions, in percent."""
    return metrics.evaluate(
        scores, source.labels, source.scored, classes=source.classes,
        definition=config.eval.definition, threshold=config.eval.threshold, scored_in=config.eval.scored_in,
    )  # fmt: skip


def without_given(experiment: Experiment, source: Source) -> Source:
    """The split that a system is scored on: what it is told in an evaluation does not count in average precision.

    A system that predicts with labels given has `given(index) -> (N l)` and the setting `eval_known`.
    """
    share = experiment.config.system.get("eval_known", 0.0)
    given: Any = getattr(experiment.system, "given", None)
    if given is None or not share:
        return source
    told = given(np.arange(len(source))) & (source.observed > 0)
    scored = np.where(told, 0, source.scored).astype(source.scored.dtype)
    return dataclasses.replace(source, name=f"{source.name}, {100 * share:g} % of the labels given", scored=scored)


def watched(stage: Any, report: Mapping[str, Any]) -> float:
    """What `config.optim.schedule.metric` names of the last evaluation: mAP, .., or the mean BCE of scored entries."""
    name = stage.config.optim.schedule.get("metric", "mAP")
    if name != "loss":
        return report["metrics"][name]
    scores = stage.scored["raw"][1].astype(np.float64)
    return float(np.mean((np.logaddexp(0, scores) - scores * stage.eval.labels)[stage.eval.scored > 0]))


def averaged(state: Any) -> Any:
    """The variables that an evaluation of the EMA runs on."""
    return optim.averaged(state.params, state.variables, state.ema)


def raw_and_ema(stage: Any, state: Any) -> dict[str, dict[str, Any]]:
    """Reports of the raw and, where there is one, the averaged parameters on the evaluation split."""
    candidates = {"raw": {"params": state.params, **state.variables}}
    if state.ema is not None:
        candidates["ema"] = averaged(state)
    reports = {}
    for kind, v in candidates.items():
        scores = stage.scorer.scores(v, stage.eval, stage.cached_eval, stage.config)
        if not np.isfinite(scores).all():
            raise stage.diverged(f"The scores of {stage.eval.name} after step {state.step} ({kind}) are not finite")
        reports[kind] = measure(scores, stage.eval, stage.config)
        stage.scored[kind] = int(state.step), scores
    return reports


def select(stage: Any, state: Any) -> tuple[Any, str, int, str]:
    """The variables that a run reports, "raw" or "ema", their step, and how they were chosen."""
    how = stage.config.eval.select
    if how not in SELECTIONS:
        raise UserError(f"config.eval.select is {how!r}{nearest(how, SELECTIONS)}.")
    if how == "last":
        kind = "ema" if state.ema is not None else "raw"
        chosen = averaged(state) if state.ema is not None else {"params": state.params, **state.variables}
        return chosen, kind, int(state.step), f"last step ({kind})"
    step = stage.checkpoints.best
    found = stage.checkpoints.restore(jax.eval_shape(lambda: state), "best")
    kind = stage.checkpoints.meta(step).get("kind", "raw")
    chosen = averaged(found) if kind == "ema" else {"params": found.params, **found.variables}
    return chosen, kind, step, f"{how.replace('_', ' ')} on {stage.eval.name}, step {step} ({kind})"


def finish(stage: Any, state: Any) -> dict[str, Any]:
    """Score the evaluation split unless the last evaluation did, write scores.npz and report.json, print the table."""
    variables, kind, step, by = select(stage, state)
    known, scores = stage.scored.get(kind, (None, None))
    if known != step:
        scores = stage.scorer.scores(variables, stage.eval, stage.cached_eval, stage.config)
    return write(stage.workdir, scores, stage.eval, stage.config, by=by, step=step)


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
) -> dict[str, Any]:
    """Keep scores and report of a split in the run directory and print the table.

    Args:
      means: AP per class -> {what: {"labels": .., "mAP": ..}}: of parts of the labels, such as those seen in training.
    """
    report = {"split": source.name, "images": len(source), **measure(scores, source, config)}
    report |= {"seed": config.seed, "step": step, "selected_by": by, "definition": config.eval.definition}
    if means is not None:
        report["mAP_of"] = means(report["per_class_AP"])
    rundir.write_arrays(
        workdir / f"scores{suffix}.npz", scores=scores, labels=source.labels, scored=source.scored,
        ids=np.array(source.ids, dtype=str), classes=np.array(source.classes),
    )  # fmt: skip
    rundir.write_text(workdir / f"report{suffix}.json", json.dumps(report, indent=2))
    if source.observed.any():
        print(table(report))
    else:
        _submit(workdir, scores, source, config)
    print(f"run directory: {workdir}")
    return report


def _submit(workdir: Path, scores: np.ndarray, source: Source, config: Config) -> None:
    """The files that a data set's evaluation server wants of a split whose labels it alone has."""
    print(f"{source.name} has no labels here, so nothing is measured; its {len(source)} images are scored.")
    reader = importlib.import_module(find("data", config.data.name).__module__)
    if hasattr(reader, "write_submission"):
        paths = reader.write_submission(workdir, source, scores)
        print(f"{len(paths)} files for the evaluation server: {paths[0].parent}")


def finished(workdir: Path) -> dict[str, Any] | None:
    """The report of a run that is complete, its table printed again; None if there is more to do."""
    if not (workdir / "report.json").is_file():
        return None
    try:
        report = rundir.read_json(workdir / "report.json")
        text = table(report)
    except (UserError, KeyError, TypeError, AttributeError):
        log.warning("%s is damaged; it is made again from the checkpoint.", workdir / "report.json")
        return None
    print(text)
    print(f"run directory: {workdir} (finished earlier; nothing was trained)")
    return report


def table(report: Mapping[str, Any]) -> str:
    """The table of CMSG's paper: AP per class and mAP, then CP CR CF1 OP OR OF1 over all labels and over the top 3.

    Behind the mAP stands the definition of average precision, `config.eval.definition`.
    """
    found, aps = report["metrics"], report["per_class_AP"]
    width = max(map(len, aps), default=5)
    columns = max(1, min(4, 80 // (width + 9)))
    rows = -(-len(aps) // columns)
    cells = [f"{name:<{width}} {'  -  ' if ap is None else f'{ap:5.1f}'}" for name, ap in aps.items()]
    lines = [f"{report['split']}: {report['images']} images, {report['selected_by']}, seed {report['seed']}"]
    lines += ["AP per class (%)", *("   ".join(cells[r::rows]).rstrip() for r in range(rows)), ""]
    names = ("CP", "CR", "CF1", "OP", "OR", "OF1")
    head = f"mAP {_cell(found['mAP'])}" + (f" ({report['definition']})" if "definition" in report else "")
    wide = max(12, len(head) + 2)
    lines.append(f"{head:<{wide}}" + "".join(f"{name:>8}" for name in names))
    for title, suffix in (("all labels", ""), ("top 3", "_3")):
        lines.append(f"{title:<{wide}}" + "".join(f"{_cell(found[name + suffix]):>8}" for name in names))
    for what, mean in report.get("mAP_of", {}).items():
        lines.append(f"mAP {_cell(mean['mAP'])}  of {mean['labels']} labels {what} in training")
    if report.get("left_out"):
        lines.append(f"without a positive, left out of mAP: {', '.join(report['left_out'])}")
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return f"{'-' if value is None else format(value, '6.2f'):>6}"
