"""Losses: element-wise, contrastive, from weak labels; and the criterion of a run, which a config names."""

from mljax.losses.criterion import BATCH_LOSSES, Criterion
from mljax.losses.elementwise import (
    NAMES,
    an,
    an_ls,
    asl,
    asl_single_label,
    bce,
    bce_ls,
    entries,
    focal,
    iu,
    make,
    partial_bce,
    positives,
    wan,
)
from mljax.losses.reduction import REDUCTIONS, reduce

__all__ = [
    "BATCH_LOSSES",
    "NAMES",
    "REDUCTIONS",
    "Criterion",
    "an",
    "an_ls",
    "asl",
    "asl_single_label",
    "bce",
    "bce_ls",
    "entries",
    "focal",
    "iu",
    "make",
    "partial_bce",
    "positives",
    "reduce",
    "wan",
]
