"""Configs: sections and their defaults, the words of data sets, files, overrides, stages."""

from mljax.config.base import Words, base, choose, smoke
from mljax.config.data_sets import (
    MIRRORED,
    VIEWS,
    coco2014,
    data_sets,
    nuswide,
    own_csv,
    resnet101,
    small_sets,
    visual_genome,
    voc,
    voc_resplit,
)
from mljax.config.overrides import override
from mljax.config.reading import read_config
from mljax.config.stages import stage_configs
from mljax.config.text import completed, differences, from_json, to_json

__all__ = [
    "MIRRORED",
    "VIEWS",
    "Words",
    "base",
    "choose",
    "coco2014",
    "completed",
    "data_sets",
    "differences",
    "from_json",
    "nuswide",
    "override",
    "own_csv",
    "read_config",
    "resnet101",
    "small_sets",
    "smoke",
    "stage_configs",
    "to_json",
    "visual_genome",
    "voc",
    "voc_resplit",
]
