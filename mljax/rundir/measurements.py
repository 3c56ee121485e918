"""The lines of metrics.jsonl: each is sealed, so that one that was damaged is noticed and the others are kept."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mljax import seal
from mljax.untrusted import parse_json

NAME, DAMAGED = "metrics.jsonl", "metrics.damaged.jsonl"
log = logging.getLogger("mljax")


def line(values: Mapping[str, Any]) -> str:
    """A measurement as a line of the file."""
    return json.dumps({**values, seal.KEY: seal.digest(values)}) + "\n"


def parse(text: str) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    """The lines of a file with what they say, and those that are damaged.

    A last line without an end is neither: the process was killed while it wrote it.
    """
    good, damaged = [], []
    for text_line in text.splitlines(keepends=True):
        if not text_line.endswith("\n"):
            continue
        try:
            entry = seal.unsealed(parse_json(text_line))
            good.append((text_line, entry | {"stage": int(entry["stage"]), "step": int(entry["step"])}))
        except (ValueError, TypeError, KeyError):
            damaged.append(text_line)
    return good, damaged


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """What a run measured, in order; a warning says how many lines are damaged and left out."""
    path = workdir / NAME
    good, damaged = parse(path.read_text(errors="replace")) if path.is_file() else ([], [])
    if damaged:
        log.warning("%s has %s; left out.", path, count(damaged))
    return [entry for _, entry in good]


def count(damaged: list[str]) -> str:
    """How many lines are damaged, in words."""
    return f"{len(damaged)} damaged line{'s' if len(damaged) > 1 else ''}"
