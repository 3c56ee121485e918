"""The one trainer: `fit` trains all stages of a config in a run directory. Systems supply only what differs."""

from mljax.interrupt import Stop
from mljax.train.loop import Diverged
from mljax.train.step import create_state, make_optimizer, make_step
from mljax.train.trainer import fit

__all__ = ["Diverged", "Stop", "create_state", "fit", "make_optimizer", "make_step"]
