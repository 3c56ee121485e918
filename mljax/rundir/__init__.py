"""A run directory: its files, checkpoints and logs."""

from mljax.rundir.files import (
    FREE,
    OF_A_START,
    environment,
    images,
    load_config,
    load_meta,
    load_preprocessing,
    open_run,
    opened,
    read_json,
    save_meta,
    untouched,
    write_arrays,
    write_text,
    written,
)

__all__ = [
    "FREE",
    "OF_A_START",
    "environment",
    "images",
    "load_config",
    "load_meta",
    "load_preprocessing",
    "open_run",
    "opened",
    "read_json",
    "save_meta",
    "untouched",
    "write_arrays",
    "write_text",
    "written",
]
