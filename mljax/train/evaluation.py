"""Evaluations of a stage: raw and averaged parameters on its split, and which of all states a run reports."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mljax import optim, scoring
from mljax.data.source import Source
from mljax.rundir.checkpoint import Checkpoints
from mljax.scoring import Scorer
from mljax.train.loop import Diverged
from mljax.types import Config, TrainState


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a state scores, with its raw and, where it keeps them, its averaged parameters: "raw" and "ema".

    Attributes:
      step: of the state.
      scores: (N l) float32, on the scale of logits, by kind of parameters.
      reports: as `scoring.measure` returns them, by kind of parameters.
    """

    step: int
    scores: Mapping[str, np.ndarray]
    reports: Mapping[str, Mapping[str, Any]]

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """By kind of parameters and name."""
        return {kind: dict(report["metrics"]) for kind, report in self.reports.items()}

    @property
    def best(self) -> str:
        """The kind of parameters with the higher mAP."""
        return max(self.reports, key=lambda kind: self.reports[kind]["metrics"].get("mAP") or -1.0)


@dataclasses.dataclass(frozen=True)
class Selection:
    """The parameters that a run reports.

    Attributes:
      variables: to score with.
      kind: "raw" or "ema".
      step: at which they were trained.
      how: in words, for the report.
    """

    variables: Any
    kind: str
    step: int
    how: str


def variables_of(state: TrainState, kind: str) -> Any:
    """The variables to evaluate with: "raw" ones, or those of the EMA."""
    if kind == "ema":
        return optim.averaged(state.params, state.variables, state.ema)
    return {"params": state.params, **state.variables}


def evaluate(
    state: TrainState, scorer: Scorer, source: Source, config: Config, cached: Mapping[str, Any] | None = None
) -> Evaluation:
    """Score a split with the raw and, where there are any, the averaged parameters.

    Args:
      cached: endpoints of the split by view, if there are any.
    Raises:
      Diverged: scores that are not finite.
    """
    step, scores, reports = int(state.step), {}, {}
    for kind in ("raw", "ema") if state.ema is not None else ("raw",):
        values = scorer.scores(variables_of(state, kind), source, cached, config)
        if not np.isfinite(values).all():
            raise Diverged(f"The scores of {source.name} after step {step} ({kind}) are not finite.")
        scores[kind], reports[kind] = values, scoring.measure(values, source, config)
    return Evaluation(step, scores, reports)


def plateau_metric(evaluation: Evaluation, source: Source, config: Config) -> float:
    """`config.optim.schedule.metric` of the raw parameters: mAP, .., or "loss", the mean BCE of scored entries."""
    name = config.optim.schedule.get("metric", "mAP")
    if name != "loss":
        return evaluation.reports["raw"]["metrics"][name]
    scores = evaluation.scores["raw"].astype(np.float64)
    return float(np.mean((np.logaddexp(0, scores) - scores * source.labels)[source.scored > 0]))


def select(config: Config, state: TrainState, checkpoints: Checkpoints, source: Source) -> Selection:
    """What a run reports by `config.eval.select`: its last state, or the best that was evaluated.

    Args:
      state: the last one.
      checkpoints: of the stage.
      source: that was evaluated.
    """
    how = config.eval.select
    if how == "last":
        kind = "ema" if state.ema is not None else "raw"
        return Selection(variables_of(state, kind), kind, int(state.step), f"last step ({kind})")
    best, step = checkpoints.restore(jax.eval_shape(lambda: state), "best"), checkpoints.restored
    assert step is not None, "set by restore"
    kind = checkpoints.meta(step).get("kind", "raw")
    words = f"{how.replace('_', ' ')} on {source.name}, step {step} ({kind})"
    return Selection(variables_of(best, kind), kind, step, words)
