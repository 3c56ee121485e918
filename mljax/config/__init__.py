"""Configs: sections and their defaults, the words of data sets, files, overrides, stages."""

from mljax.config.base import Words, base, choose, smoke
from mljax.config.data_sets import (
    DATA_SETS,
    MIRRORED,
    VIEWS,
    data_set,
    data_sets,
    own_csv,
    resnet101,
    small_sets,
    voc_resplit,
)
from mljax.config.overrides import overridden, override
from mljax.config.reading import read_config
from mljax.config.stages import stage_configs
from mljax.config.text import completed, differences, from_json, to_json

__all__ = [
    "DATA_SETS",
    "MIRRORED",
    "VIEWS",
    "Words",
    "base",
    "choose",
    "completed",
    "data_set",
    "data_sets",
    "differences",
    "from_json",
    "overridden",
    "override",
    "own_csv",
    "read_config",
    "resnet101",
    "small_sets",
    "smoke",
    "stage_configs",
    "to_json",
    "voc_resplit",
]
