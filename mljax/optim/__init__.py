"""config.optim -> an optax transformation: optimizers, schedules, parameter groups, EMA."""

from mljax.optim.optimizer import (
    METRICS,
    NAMES,
    PLATEAU,
    PlateauState,
    averaged,
    ema_merge,
    ema_update,
    learning_rate,
    optimizer,
    plateau_update,
    scale_by_plateau,
)
from mljax.optim.update_rules import accumulate

__all__ = [
    "METRICS",
    "NAMES",
    "PLATEAU",
    "PlateauState",
    "accumulate",
    "averaged",
    "ema_merge",
    "ema_update",
    "learning_rate",
    "optimizer",
    "plateau_update",
    "scale_by_plateau",
]
