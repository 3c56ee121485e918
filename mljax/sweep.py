"""Runs that differ in config, setting or seed, as one resumable command that prints a table of mean and spread.

python -m mljax.sweep --config=configs/cmsg.py --workdir=runs/heads --over system.sga_heads=1,2,4 --seeds=0,1,2
python -m mljax.sweep --config=configs/csra.py:voc_resplit --config=configs/cmsg.py:voc_resplit@0,1,2 --workdir=runs/all
python -m mljax.sweep --config=configs/sst.py:voc2007 --columns=known=0.1..0.9 --workdir=runs/partial
python -m mljax.sweep --config=configs/single_positive.py:an --columns=voc2012,coco2014 --workdir=runs/spml \
    --over optim.lr=1e-2,1e-3 --over optim.batch_size=8,16 --grid --best --split=val

With --columns a table has a row for each config and a column for each word, as the papers on few labels print theirs.
With --best a cell shows one of the settings alone, the best by the run's own split; --split scores another split then.
"""

import itertools
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mljax import interrupt
from mljax.check import check
from mljax.config import flags
from mljax.config.command import Parser, guarded
from mljax.config.overrides import overridden
from mljax.config.reading import read_config
from mljax.config.stages import stage_configs
from mljax.errors import UserError
from mljax.rundir import check_same, read_json, untouched, write_text
from mljax.types import Config

Variant = tuple[tuple[str, str], ...]


class Job(NamedTuple):
    """One run, and where its number stands in the table."""

    config: str
    variant: Variant
    seed: int
    name: str
    row: str
    column: str
    folder: str


def variants(over: list[str], grid: bool) -> list[Variant]:
    """`["a=1,2", "b=3,4"]` -> the settings of each run: one at a time beside the config's own, or all combinations."""
    axes = []
    for text in over:
        key, equals, values = text.partition("=")
        if not equals or not values:
            raise UserError(f"--over {text!r} is not KEY=VALUE,VALUE, such as system.sga_heads=1,2,4.")
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
    name = "_".join(f"{key}={value}" for key, value in variant) or "config"
    return f"{slug(name)}_seed{seed}"


def seeds_of(text: str) -> list[int]:
    """ "0,1,2" -> [0, 1, 2]."""
    try:
        return [int(s) for s in text.split(",")]
    except ValueError:
        raise UserError(f"The seeds {text!r} are not whole numbers with commas between them, such as 0,1,2.") from None


def columns_of(text: str) -> list[str]:
    """ "known=0.1..0.3,known=0.9" -> ["known=0.1", "known=0.2", "known=0.3", "known=0.9"]: steps of the last digit."""
    columns = []
    for word in filter(None, text.split(",")):
        span = re.fullmatch(r"(\w+=)(\d+(?:\.(\d+))?)\.\.(\d+(?:\.\d+)?)", word)
        if not span:
            columns.append(word)
            continue
        digits = len(span[3] or "")
        first, last = round(float(span[2]) * 10**digits), round(float(span[4]) * 10**digits)
        if last < first:
            raise UserError(f"--columns has {word!r}, which ends before it begins; give the smaller share first.")
        columns += [f"{span[1]}{value / 10**digits:.{digits}f}" for value in range(first, last + 1)]
    return columns


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
            short = re.sub(r"^configs/|\.py(?=$|:)", "", config)
            row = settings or "as configured" if lone else ", ".join(filter(None, (short, settings)))
            for order, seed in enumerate(seeds_of(own or seeds)):
                folder = "_".join([*parts, folder_of(variant, seed)])
                jobs.append((order, Job(whole, variant, seed, short, row, column, folder)))
    return [job for _, job in sorted(jobs, key=lambda pair: pair[0])]


def settings_of(job: Job, extra: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """What a run sets beside its config: names first, since others depend on them."""
    return sorted([("seed", str(job.seed)), *extra, *job.variant], key=flags.order)


def config_of(job: Job, extra: list[tuple[str, str]]) -> Config:
    """The config of a run, as `mljax.main` will have it.

    Raises:
      UserError: something in it, or in one of its stages, is wrong.
    """
    config = overridden(read_config(job.config), settings_of(job, extra))
    for stage in stage_configs(config):
        check(stage)
    return config


def run(job: Job, workdir: Path, extra: list[tuple[str, str]], split: str = "") -> tuple[Any, Any]:
    """One run in a process of its own; a finished one is only read.

    Returns:
      Its report, and that of `split`, or its own again.
    """
    path = workdir / job.folder
    if not (path / "report.json").is_file():
        settings = [f"--config.{key}={value}" for key, value in settings_of(job, extra)]
        _call("main", path, f"--config={job.config}", *settings)
    own = read_json(path / "report.json")
    if not split:
        return own, own
    name = re.sub(r"\W+", "_", f"report_{split}_{own['definition']}").strip("_")
    if not any(path.glob(f"{name}*.json")):
        _call("evaluate", path, f"--split={split}")
    return own, read_json(next(path.glob(f"{name}*.json")))


def _call(module: str, path: Path, *flags: str) -> None:
    command = [sys.executable, "-m", f"mljax.{module}", f"--workdir={path}", *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def stop() -> None:  # it saves first
        process.terminate()
        process.wait()

    with interrupt.cleaning(stop):
        code = process.wait()
    if code:
        raise UserError(
            f"The run in {path} ended with status {code}; correct the error above and run the same command again."
        )


class Result(NamedTuple):
    """A job, the mAP by which settings are compared, and the report that the table shows."""

    job: Job
    own: float
    report: dict[str, Any]


def best(results: list[Result]) -> tuple[list[Result], list[str]]:
    """Of each config and column the setting with the best mean mAP over seeds, and a line that says which.

    Ties go to the first. As the single-positive code chooses learning rate and batch size on its validation split.
    """
    cells: dict[tuple[str, str], dict[Variant, list[Result]]] = {}
    for result in results:
        cells.setdefault((result.job.name, result.job.column), {}).setdefault(result.job.variant, []).append(result)
    kept, lines = [], []
    for (row, column), found in cells.items():
        chosen = max(found, key=lambda variant, found=found: np.mean([r.own for r in found[variant]]))
        kept += [r._replace(job=r.job._replace(row=row)) for r in found[chosen]]
        settings = ", ".join(f"{key}={value}" for key, value in chosen) or "as configured"
        own = np.mean([r.own for r in found[chosen]])
        lines.append(f"{', '.join(filter(None, (row, column)))}: {settings} (mAP {own:.2f} of {len(found)} settings)")
    return kept, lines


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """A markdown table: mean and sample standard deviation over seeds of mAP, CF1 and OF1."""
    lines = ["| setting | seeds | mAP | CF1 | OF1 |", "|---|---|---|---|---|"]
    for name, reports in rows.items():
        cells = [summary([r["metrics"][m] for r in reports]) for m in ("mAP", "CF1", "OF1")]
        lines.append(f"| {name} | {len(reports)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def wide_table(found: dict[tuple[str, str], list[dict[str, Any]]], columns: list[str]) -> str:
    """A markdown table as the papers on few labels print it: mAP for each column; for shares known, their average."""
    shares = all(word.startswith("known=") for word in columns)
    heads = [f"{100 * float(word.removeprefix('known=')):g} %" for word in columns] if shares else columns
    average = ["average"] if shares else []
    lines = [f"| mAP | {' | '.join([*heads, *average])} |", "|---" * (len(columns) + 1 + shares) + "|"]
    for name in dict.fromkeys(row for row, _ in found):
        values = [[r["metrics"]["mAP"] for r in found.get((name, column), [])] for column in columns]
        cells = [summary(v) if v else "-" for v in values]
        if shares:
            cells.append(f"{np.mean([np.mean(v) for v in values]):.2f}" if all(values) else "-")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(values: list[float]) -> str:
    mean = f"{np.mean(values):.2f}"
    return f"{mean} ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else mean


def shown(results: list[Result], columns: list[str], choose: bool) -> str:
    """The table of what is done so far, and with `choose` which settings it shows."""
    results, lines = best(results) if choose else (results, [])
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        found.setdefault((result.job.row, result.job.column), []).append(result.report)
    text = wide_table(found, columns) if columns else table({row: reports for (row, _), reports in found.items()})
    return "\n".join([text, *([""] * bool(lines)), *lines])


def parse(argv: list[str] | None) -> tuple[Any, list[tuple[str, str]]]:
    parser = Parser("sweep", __doc__)
    parser.add_argument(
        "--config", required=True, action="append", help="FILE[:WORDS][@SEEDS]; several make a row each"
    )
    parser.add_argument("--workdir", required=True, type=Path, help="folder of the runs")
    parser.add_argument("--over", action="append", default=[], metavar="KEY=V,V", help="a setting to vary")
    parser.add_argument("--grid", action="store_true", help="all combinations instead of one at a time")
    parser.add_argument("--columns", default="", metavar="WORD,WORD", help="words of the configs; known=0.1..0.9")
    parser.add_argument("--best", action="store_true", help="of the settings show the best by the run's own split")
    parser.add_argument("--split", default="", help="show the figures of this split, e.g. val, not of the run's own")
    parser.add_argument("--seeds", default="0", help="e.g. 0,1,2")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    args, extra = parser.parse_overrides(argv)
    if args.jobs < 1:
        raise UserError(f"--jobs is {args.jobs}; it must be at least 1.")
    return args, extra


def main(argv: list[str] | None = None) -> int:
    args, extra = parse(argv)
    columns = columns_of(args.columns)
    jobs = jobs_of(args.config, columns, variants(args.over, args.grid), args.seeds)
    for job in jobs:  # what is wrong is said before hours of training
        config = config_of(job, extra)
        if not untouched(args.workdir / job.folder):  # a run of other settings is not this one
            check_same(args.workdir / job.folder, config)
    args.workdir.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    with ThreadPoolExecutor(args.jobs) as pool:
        tasks = [pool.submit(run, job, args.workdir, extra, args.split) for job in jobs]
        try:
            for job, task in zip(jobs, tasks):
                own, report = task.result()
                results.append(Result(job, own["metrics"]["mAP"], report))
                where = ", ".join(filter(None, (job.row, job.column)))
                print(f"{where}, seed {job.seed}: mAP {report['metrics']['mAP']:.2f}", file=sys.stderr)
                write_text(args.workdir / "sweep.md", shown(results, columns, args.best) + "\n")
        finally:
            for task in tasks:
                task.cancel()
    print(shown(results, columns, args.best))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
