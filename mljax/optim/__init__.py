"""config.optim -> an optax transformation: optimizers, schedules, parameter groups, EMA."""

from mljax.optim.optimizer import (
    PlateauState,
    averaged,
    ema_merge,
    ema_update,
    learning_rate,
    optimizer,
    plateau_update,
    scale_by_plateau,
)
from mljax.optim.schedules import METRICS
from mljax.optim.update_rules import NAMES, accumulate

__all__ = [
    "METRICS",
    "NAMES",
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
