"""Torture: reliability, counted.

python -m benchmarks.torture [KIND ..] [--count=N | --share=S] [--seed=S] [--out=DIR] [--jobs=2]
python -m benchmarks.torture --report     # fills benchmarks/reliability.md from DIR
python -m benchmarks.torture --write      # makes the golden files of determinism anew

A harness that was stopped goes on where it was; DIR holds a line for every case. Exit status 1 if any case failed.
"""

import argparse
import sys
import time
from pathlib import Path

from benchmarks.torture import harness, pool, report, shim
from benchmarks.torture.kinds import determinism
from benchmarks.torture.kinds.all import KINDS


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.torture", description="Reliability, counted.")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; none: all")
    parser.add_argument("--count", type=int, help="cases of each kind; default: its full number")
    parser.add_argument("--share", type=float, default=1.0, help="of the full number, e.g. 0.02")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/torture"), help="outcomes; a run that stopped goes on")
    parser.add_argument("--jobs", type=int, default=2, help="worker processes")
    parser.add_argument("--again", action="store_true", help="run the cases again that failed")
    parser.add_argument("--keep", action="store_true", help="keep the folders of cases that passed")
    parser.add_argument("--report", action="store_true", help="only write benchmarks/reliability.md")
    parser.add_argument("--write", action="store_true", help="only write the golden files of determinism")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.kinds if name not in KINDS]:
        parser.error(f"there is no kind {unknown[0]!r}; expected of {', '.join(KINDS)}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parsed(argv)
    out = args.out.absolute()
    if args.write:
        determinism.write_golden(out)
        return 0
    names = args.kinds or list(KINDS)
    options = harness.Options(out, args.seed, 1.0 if args.count else args.share, args.jobs, args.keep)
    counts = {name: args.count or KINDS[name].count(args.share) for name in names}
    if not args.report:
        out.mkdir(parents=True, exist_ok=True)
        report.check_same(out, options)
        for name in names:
            path, kind = out / f"{name}.jsonl", KINDS[name]
            lines = harness.read_outcomes(path)
            if args.again:
                harness.write_outcomes(path, {i: line for i, line in lines.items() if line["outcome"] == "ok"})
            began = time.perf_counter()
            preload = shim.build(out) if kind.shim else None
            pool.run_kind(kind, counts[name], options, lambda text: print(text, file=sys.stderr, flush=True), preload)
            report.took(out, name, time.perf_counter() - began)
            print(report.line(report.row(out, kind, counts[name], options.share)), flush=True)
    rows = [report.row(out, KINDS[name], counts[name], options.share) for name in names]
    print("\n" + report.table(rows))
    if args.report:
        report.write(out, rows)
    return int(any(row.failures or row.run < row.planned for row in rows))


if __name__ == "__main__":
    sys.exit(main())
