"""A run directory: its files, checkpoints and logs."""

from mljax.rundir.data_record import Change, DataRecord, check_data_record, part_of, save_data_record
from mljax.rundir.directory import (
    BAD_IMAGES,
    FREE,
    START_FILES,
    check_same,
    load_config,
    load_meta,
    load_preprocessing,
    open_run,
    opened,
    save_meta,
    unsound,
    untouched,
)
from mljax.rundir.environment import environment, images
from mljax.rundir.files import read_arrays, read_json, replacing, write_arrays, write_json, write_text
from mljax.rundir.lock import locked
from mljax.rundir.measurements import read_metrics

__all__ = [
    "BAD_IMAGES",
    "FREE",
    "START_FILES",
    "Change",
    "DataRecord",
    "check_data_record",
    "check_same",
    "environment",
    "images",
    "load_config",
    "load_meta",
    "load_preprocessing",
    "locked",
    "open_run",
    "opened",
    "part_of",
    "read_arrays",
    "read_json",
    "read_metrics",
    "replacing",
    "save_data_record",
    "save_meta",
    "unsound",
    "untouched",
    "write_arrays",
    "write_json",
    "write_text",
]
