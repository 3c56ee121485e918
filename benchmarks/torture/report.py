"""The table of outcomes, and the page benchmarks/reliability.md that it fills."""

import dataclasses
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.torture.harness import ROOT, Kind, Options, read_outcomes

PAGE = ROOT / "benchmarks" / "reliability.md"
BEGIN, END = "<!-- counts: written by python -m benchmarks.torture --report -->", "<!-- end of counts -->"


@dataclasses.dataclass(frozen=True)
class Row:
    """A kind in the table; numbers count units.

    Attributes:
      full, planned, run, failures: of the full plan; of this run; with an outcome; not as they have to be.
      worst: seconds of the longest case.
      minutes: of the kind, over all its runs.
      figures: name -> the largest value that cases kept under it.
    """

    name: str
    goal: str
    full: int
    planned: int
    run: int
    failures: int
    worst: float
    minutes: float
    figures: dict[str, float]
    why: tuple[str, ...] = ()


def row(out: Path, kind: Kind, count: int, share: float = 1.0) -> Row:
    """The outcomes of a kind, of its first `count` cases."""
    lines = [line for i, line in read_outcomes(out / f"{kind.name}.jsonl").items() if i < count]
    bad = [line for line in lines if line["outcome"] != "ok"]
    figures: dict[str, float] = {}
    for line in lines:
        for name, value in line.get("figures", {}).items():
            figures[name] = max(value, figures.get(name, value))
    return Row(
        name=kind.name,
        goal=kind.goal,
        full=kind.planned(kind.total),
        planned=kind.planned(count, share),
        run=sum(line["units"] for line in lines),
        failures=sum(line.get("bad", line["units"] if line["outcome"] != "ok" else 0) for line in lines),
        worst=max((line["seconds"] for line in lines), default=0.0),
        minutes=_read(out / "times.json").get(kind.name, 0.0) / 60,
        figures=figures,
        why=tuple(f"{line['case']} ({line['what']}): {line['why']}" for line in bad),
    )


def line(row: Row) -> str:
    figures = "; ".join(f"{name} {value:.3g}" for name, value in row.figures.items())
    return (
        f"| {row.name} | {row.full:,} | {row.planned:,} | {row.run:,} | {row.failures:,} | {row.worst:.1f} |"
        f" {row.minutes:.1f} | {figures} |"
    )


def table(rows: list[Row]) -> str:
    head = ["| kind | full | planned | run | failures | worst case, s | minutes | worst figures |", "|" + "---|" * 8]
    return "\n".join([*head, *map(line, rows)])


def write(out: Path, rows: list[Row]) -> None:
    """Put the table, the machine and the failures into the page."""
    info = _read(out / "run.json")
    text = [
        f"Commit {info.get('commit', '?')}, seed {info.get('seed', '?')}, {info.get('machine', '?')};"
        f" {sum(row.minutes for row in rows):.0f} minutes in all.",
        "",
        table(rows),
    ]
    if failures := [f"- {row.name} {why}" for row in rows for why in row.why[:20]]:
        text += ["", "Failures:", "", *failures]
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n" + "\n".join(text) + f"\n\n{END}{after}")


def took(out: Path, name: str, seconds: float) -> None:
    """Add to the time of a kind."""
    times = _read(out / "times.json")
    times[name] = round(times.get(name, 0.0) + seconds, 1)
    (out / "times.json").write_text(json.dumps(times))


def check_same(out: Path, options: Options) -> None:
    """Outcomes of another commit or seed are not mixed with these."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "mljax"], capture_output=True, text=True).stdout
    info = {"commit": commit + (" with changes" if changed else ""), "seed": options.seed}
    before = _read(out / "run.json")
    if before and any(before.get(key) != value for key, value in info.items()):
        print(f"{out} holds outcomes of commit {before['commit']}, seed {before['seed']}; they are kept and added to.")
        if info["commit"] not in before["commit"].split(", then "):
            info["commit"] = f"{before['commit']}, then {info['commit']}"
        else:
            info["commit"] = before["commit"]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    (out / "run.json").write_text(json.dumps({**info, "machine": machine}))


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
