"""Runs that differ in a setting or two, as one resumable command that prints a table of mean and spread over seeds.

python -m mljax.sweep --config=configs/cmsg.py --workdir=runs/heads --over system.sga_heads=1,2,4 --seeds=0,1,2
"""

import argparse
import ast
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from mljax.errors import UserError
from mljax.flags import override, read_config
from mljax.rundir import write_text

Variant = tuple[tuple[str, str], ...]


def variants(over: list[str], grid: bool) -> list[Variant]:
    """`["a=1,2", "b=3,4"]` -> the settings of each run: one at a time beside the config's own, or all combinations."""
    axes = []
    for text in over:
        key, equals, values = text.partition("=")
        if not equals or not values:
            raise UserError(f"--over {text!r} is not KEY=VALUE,VALUE, e.g. system.sga_heads=1,2,4.")
        axes.append([(key, value) for value in split_values(values)])
    if grid:
        return list(itertools.product(*axes))
    return [(), *((setting,) for axis in axes for setting in axis)]


def split_values(text: str) -> list[str]:
    """Values between commas; tuples in parentheses stay whole."""
    return [v for v in re.split(r",(?![^(]*\))", text) if v]


def folder_of(variant: Variant, seed: int) -> str:
    name = "_".join(f"{key.split('.')[-1]}={value}" for key, value in variant) or "config"
    return f"{re.sub(r'[^A-Za-z0-9=.]+', '_', name)}_seed{seed}"


def run(config: str, variant: Variant, seed: int, workdir: Path, extra: list[str]) -> dict[str, Any]:
    """One run in a process of its own; a finished one is only read."""
    path = workdir / folder_of(variant, seed)
    if not (path / "report.json").is_file():
        command = [sys.executable, "-m", "mljax.main", f"--config={config}", f"--workdir={path}"]
        command += [f"--config.seed={seed}", *extra, *(f"--config.{key}={value}" for key, value in variant)]
        if code := subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            raise UserError(f"The run in {path} ended with status {code}; mend it and run the same command again.")
    return json.loads((path / "report.json").read_text())


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """A markdown table: mean and sample standard deviation over seeds of mAP, CF1 and OF1."""
    lines = ["| setting | seeds | mAP | CF1 | OF1 |", "|---|---|---|---|---|"]
    for name, reports in rows.items():
        cells = [summary([r["metrics"][m] for r in reports]) for m in ("mAP", "CF1", "OF1")]
        lines.append(f"| {name} | {len(reports)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(values: list[float]) -> str:
    mean = f"{np.mean(values):.2f}"
    return f"{mean} ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else mean


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mljax.sweep", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", required=True, help="FILE[:WORDS]")
    parser.add_argument("--workdir", required=True, type=Path, help="folder of the runs")
    parser.add_argument("--over", action="append", default=[], metavar="KEY=V,V", help="a setting to vary")
    parser.add_argument("--grid", action="store_true", help="all combinations instead of one at a time")
    parser.add_argument("--seeds", default="0", help="e.g. 0,1,2")
    args, extra = parser.parse_known_args(argv)
    for flag in extra:
        if not flag.startswith("--config.") or "=" not in flag:
            raise UserError(f"The argument {flag!r} is left over; settings are written --config.KEY=VALUE.")
    chosen = variants(args.over, args.grid)
    for variant in chosen:  # a wrong key is said before hours of training
        config = read_config(args.config)
        for key, value in (*(f[9:].split("=", 1) for f in extra), *variant):
            override(config, key, value)
    seeds = [int(ast.literal_eval(s)) for s in args.seeds.split(",")]
    args.workdir.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, Any]]] = {}
    for seed, variant in itertools.product(seeds, chosen):
        name = ", ".join(f"{key}={value}" for key, value in variant) or "as configured"
        rows.setdefault(name, []).append(run(args.config, variant, seed, args.workdir, extra))
        print(f"{name}, seed {seed}: mAP {rows[name][-1]['metrics']['mAP']:.2f}", file=sys.stderr)
        write_text(args.workdir / "sweep.md", table(rows) + "\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    from mljax.main import guarded

    sys.exit(guarded(main))
