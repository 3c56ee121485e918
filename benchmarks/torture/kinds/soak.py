"""50,000 steps with saves and evaluations: memory and open descriptors stay as they are; a released run still loads."""

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.torture import processes, runs
from benchmarks.torture.harness import ROOT, Case, Failed, Kind
from benchmarks.torture.kinds.determinism import GOLDEN

STEPS, EVALUATIONS = 50_000, 200  # memory settles over the first fifty saves: freed blocks that fit later ones
WARM, WINDOW = 0.3, 0.1  # shares of the steps
PAGE = os.sysconf("SC_PAGE_SIZE")
GROWTH = 0.02
# A step of few operations, evaluated and saved two hundred times.
TINY = (
    *("--config.backbone.widths=(4,4,4,4)", "--config.input.size=16", "--config.data.size=48"),
    *("--config.data.train_images=64", "--config.data.test_images=8", "--config.input.threads=2"),
    *("--config.optim.batch_size=2", "--config.eval.batch_size=8", "--config.log_every=100"),
)


def case(case: Case) -> dict[str, Any] | None:
    return _golden(case) if case.what == "released run" else _soak(case)


def _soak(case: Case) -> dict[str, Any]:
    epochs = max(20, round(STEPS * case.share / 32))
    argv = runs.argv("baseline", case.folder / "run", *TINY, f"--config.optim.epochs={epochs}")
    argv.append(f"--config.eval.every={max(1, epochs // EVALUATIONS)}")
    process, points = processes.forked(argv, case.folder / "log"), []
    with processes.ending(process):
        while process.poll() is None:
            points.append((_step(case.folder / "run"), *_usage(process.pid)))
            time.sleep(0.25)
        if process.status:
            raise Failed(f"status {process.status}: {process.err.strip()[-300:]!r}")
    return _judge(points, 32 * epochs)


def _step(workdir: Path) -> int:
    try:
        with (workdir / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
            return json.loads(file.read().splitlines()[-1])["step"]
    except (OSError, ValueError, IndexError, KeyError):
        return 0


def _usage(pid: int) -> tuple[int, int]:
    """Resident bytes and open descriptors."""
    try:
        resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
        return resident, len(os.listdir(f"/proc/{pid}/fd"))
    except (OSError, IndexError):
        return 0, 0


def _judge(points: list[tuple[int, int, int]], steps: int) -> dict[str, Any]:
    """Compare the tenth of the steps after the warm-up with the last tenth.

    Args:
      points: (step, resident bytes, descriptors) over time.
    """
    seen = np.array([p for p in points if p[0] and p[1]])
    early = seen[(seen[:, 0] > WARM * steps) & (seen[:, 0] <= (WARM + WINDOW) * steps)]
    late = seen[seen[:, 0] > (1 - WINDOW) * steps][:-1]
    if not len(early) or not len(late):
        raise Failed(f"too few measurements: {len(early)} after the warm-up, {len(late)} at the end")
    growth = float(np.median(late[:, 1]) / np.median(early[:, 1]) - 1)
    opened = int(late[:, 2].min() - early[:, 2].min())  # a save that is under way has some more for a moment
    if growth >= GROWTH:
        raise Failed(f"memory grew by {growth:.2%}, from {np.median(early[:, 1]) / 2**20:.0f} MiB, in {steps} steps")
    if opened:
        raise Failed(f"{opened:+d} open descriptors after {steps} steps")
    return {"figures": {"growth in %": round(100 * growth, 3), "descriptors more": opened}, "steps": steps}


def _golden(case: Case) -> None:
    """The run directory of the first release: every array has the digest that was kept of it."""
    folder = ROOT / "tests" / "golden" / "run_0_1"
    report, expected = case.folder / "report", json.loads(GOLDEN.read_text())["released"]
    process = processes.forked([], case.folder / "log", hook=lambda: _read(folder, report))
    process.wait(60)
    if not report.is_file():
        raise Failed(f"it cannot be loaded: {process.err.strip()[-300:]!r}")
    runs.same(json.loads(report.read_text()), expected)


def _read(folder: Path, report: Path) -> None:
    """In a fork: what is on the disk."""
    report.write_text(json.dumps(runs.digest(folder)))
    os._exit(0)


KIND = Kind(
    name="soak",
    goal="50,000 steps: memory grows < 2 % after warm-up, descriptors constant; a released run loads bit-equal",
    plan={"steps": 1, "released run": 1},
    units={"steps": STEPS},
    case=case,
    limit=3600.0,
    scales=True,
)
