"""Runs that differ in config, setting or seed, as one resumable command that prints a table of mean and spread.

python -m mljax.sweep --config=configs/cmsg.py --workdir=runs/heads --over system.sga_heads=1,2,4 --seeds=0,1,2
python -m mljax.sweep --config=configs/csra.py:voc_resplit --config=configs/cmsg.py:voc_resplit@0,1,2 --workdir=runs/all
python -m mljax.sweep --config=configs/sst.py:voc2007 --columns=known=0.1,known=0.5,known=0.9 --workdir=runs/partial
"""

import itertools
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mljax.errors import UserError
from mljax.flags import Parser, override, read_config
from mljax.rundir import write_text

Variant = tuple[tuple[str, str], ...]


class Job(NamedTuple):
    """One run, and where its number stands in the table."""

    config: str
    variant: Variant
    seed: int
    row: str
    column: str
    folder: str


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


def slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9=.]+", "_", text).strip("_")


def folder_of(variant: Variant, seed: int) -> str:
    name = "_".join(f"{key.split('.')[-1]}={value}" for key, value in variant) or "config"
    return f"{slug(name)}_seed{seed}"


def seeds_of(text: str) -> list[int]:
    """ "0,1,2" -> [0, 1, 2]."""
    try:
        return [int(s) for s in text.split(",")]
    except ValueError:
        raise UserError(f"The seeds {text!r} are no whole numbers between commas, e.g. 0,1,2.") from None


def jobs_of(configs: list[str], columns: list[str], chosen: list[Variant], seeds: str) -> list[Job]:
    """All runs, the first seed of every row before the second of any."""
    jobs = []
    for text, variant in itertools.product(configs, chosen):
        config, _, own = text.partition("@")
        settings = ", ".join(f"{key}={value}" for key, value in variant)
        for column in columns or [""]:
            whole = config + ("," if ":" in config else ":") * bool(column) + column
            lone = len(configs) == 1 and not columns
            parts = [] if lone else [slug(whole.removeprefix("configs/"))]
            row = settings or "as configured" if len(configs) == 1 else ", ".join(filter(None, (config, settings)))
            for order, seed in enumerate(seeds_of(own or seeds)):
                folder = "_".join([*parts, folder_of(variant, seed)])
                jobs.append((order, Job(whole, variant, seed, row, column, folder)))
    return [job for _, job in sorted(jobs, key=lambda pair: pair[0])]


def run(job: Job, workdir: Path, extra: list[tuple[str, str]]) -> dict[str, Any]:
    """One run in a process of its own; a finished one is only read."""
    path = workdir / job.folder
    if not (path / "report.json").is_file():
        command = [sys.executable, "-m", "mljax.main", f"--config={job.config}", f"--workdir={path}"]
        settings = [("seed", job.seed), *extra, *job.variant]
        command += [f"--config.{key}={value}" for key, value in settings]
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


def wide_table(found: dict[tuple[str, str], list[dict[str, Any]]], columns: list[str]) -> str:
    """A markdown table as the partial-label papers print it: mAP for each column, and their average."""
    lines = [f"| mAP | {' | '.join(columns)} | average |", "|---" * (len(columns) + 2) + "|"]
    for name in dict.fromkeys(row for row, _ in found):
        values = [[r["metrics"]["mAP"] for r in found.get((name, column), [])] for column in columns]
        cells = [summary(v) if v else "-" for v in values]
        average = f"{np.mean([np.mean(v) for v in values]):.2f}" if all(values) else "-"
        lines.append(f"| {name} | {' | '.join(cells)} | {average} |")
    return "\n".join(lines)


def summary(values: list[float]) -> str:
    mean = f"{np.mean(values):.2f}"
    return f"{mean} ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else mean


def shown(found: dict[tuple[str, str], list[dict[str, Any]]], columns: list[str]) -> str:
    return wide_table(found, columns) if columns else table({row: reports for (row, _), reports in found.items()})


def parse(argv: list[str] | None) -> tuple[Any, list[tuple[str, str]]]:
    parser = Parser("sweep", __doc__)
    parser.add_argument(
        "--config", required=True, action="append", help="FILE[:WORDS][@SEEDS]; several make a row each"
    )
    parser.add_argument("--workdir", required=True, type=Path, help="folder of the runs")
    parser.add_argument("--over", action="append", default=[], metavar="KEY=V,V", help="a setting to vary")
    parser.add_argument("--grid", action="store_true", help="all combinations instead of one at a time")
    parser.add_argument("--columns", default="", metavar="WORD,WORD", help="words of the configs, a column each")
    parser.add_argument("--seeds", default="0", help="e.g. 0,1,2")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    args, extra = parser.parse_overrides(argv)
    if args.jobs < 1:
        raise UserError(f"--jobs is {args.jobs}; at least one run goes on at a time.")
    return args, extra


def main(argv: list[str] | None = None) -> int:
    args, extra = parse(argv)
    columns = [word for word in args.columns.split(",") if word]
    jobs = jobs_of(args.config, columns, variants(args.over, args.grid), args.seeds)
    for job in jobs:  # a wrong key is said before hours of training
        config = read_config(job.config)
        for key, value in (*extra, *job.variant):
            override(config, key, value)
    args.workdir.mkdir(parents=True, exist_ok=True)
    found: dict[tuple[str, str], list[dict[str, Any]]] = {(job.row, job.column): [] for job in jobs}
    with ThreadPoolExecutor(args.jobs) as pool:
        tasks = [pool.submit(run, job, args.workdir, extra) for job in jobs]
        try:
            for job, task in zip(jobs, tasks):
                found[job.row, job.column].append(task.result())
                where = ", ".join(filter(None, (job.row, job.column)))
                print(f"{where}, seed {job.seed}: mAP {task.result()['metrics']['mAP']:.2f}", file=sys.stderr)
                done = {place: reports for place, reports in found.items() if reports}
                write_text(args.workdir / "sweep.md", shown(done, columns) + "\n")
        finally:
            for task in tasks:
                task.cancel()
    print(shown(found, columns))
    return 0


if __name__ == "__main__":
    from mljax.main import guarded

    sys.exit(guarded(main))
