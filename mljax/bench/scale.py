"""How the cost of a config grows with batch, resolution, labels, devices or rows: JSON and a plot."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mljax.errors import UserError, nearest

AXES: dict[str, tuple[int, ...]] = {
    "batch": (1, 2, 4, 8, 16, 32, 64, 128, 256),
    "resolution": (224, 288, 384, 448, 576, 640),
    "labels": (20, 80, 200, 1000),
    "devices": (1, 2),
    "rows": (1_000, 10_000, 100_000, 1_000_000),
}
FLAGS = {"batch": "--batch", "resolution": "--size", "labels": "--labels"}


def values_of(axis: str, text: str | None) -> tuple[int, ...]:
    """What --values says of an axis, or what the axis usually is measured at."""
    if axis not in AXES:
        raise UserError(f"--scale has no axis {axis!r}{nearest(axis, AXES)}.")
    if text is None:
        return AXES[axis]
    try:
        values = tuple(int(v) for v in text.split(","))
    except ValueError:
        raise UserError(f"--values={text} is not a list of whole numbers; write --values=1,2,4.") from None
    if min(values) < 1:
        raise UserError(f"--values={text} has a number below 1; write --values=1,2,4.")
    return values


def scale(args: Any, config_flags: list[str]) -> dict[str, Any]:
    """Measure every value in a process of its own, so that no peak memory and no compiled program is left over."""
    from mljax.bench.report import machine

    axis, values = args.scale, values_of(args.scale, args.values)
    if axis != "rows" and not {"train", "infer"} & set(args.only):
        raise UserError(f"--scale={axis} measures training and inference; leave out --only={','.join(args.only)}.")
    folder = Path(args.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be made ({error.strerror}); give another --out.") from None
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {"axis": axis, "config": config_flags, "machine": machine(), "rows": rows}

    def keep() -> None:
        (folder / f"{axis}.json").write_text(json.dumps(result, indent=2) + "\n")

    for value in values:
        figures = rows_seconds(value, args.labels or 80) if axis == "rows" else one(axis, value, args, config_flags)
        rows.append({axis: value, **figures})
        print(
            "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()), flush=True
        )
        keep()
    good = [row for row in rows if "error" not in row]
    if not good:
        raise UserError(f"No value of --scale={axis} could be measured; at {rows[0][axis]}: {rows[0]['error']}")
    slope = exponent([row[axis] for row in good], [row["seconds"] for row in good])
    if slope is not None:
        result["exponent"] = slope
        print(f"the time grows as {axis}^{slope:.2f} over the upper half of these")
        keep()
    plot({**result, "rows": good}, folder / f"{axis}.png")
    print(f"written: {folder / axis}.json, {folder / axis}.png")
    return result


def one(axis: str, value: int, args: Any, config_flags: list[str]) -> dict[str, Any]:
    """Training and inference at one value, or {"error": sentence}, such as of a batch that does not fit."""
    flags = {"--batch": args.batch, "--size": args.size, "--labels": args.labels, "--dtype": args.dtype}
    flags["--stage"] = args.stage
    config, env = list(config_flags), dict(os.environ)
    if axis == "devices":
        config.append(f"--config.devices={value}")
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={value}"
    else:
        flags[FLAGS[axis]] = value
    given = [f"{name}={v}" for name, v in flags.items() if v is not None]
    parts = [p for p in ("train", "infer") if p in args.only]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        command = [sys.executable, "-m", "mljax.bench", *config, *given, f"--only={','.join(parts)}"]
        done = subprocess.run(
            [*command, f"--rounds={args.rounds}", f"--json={file}"], env=env, capture_output=True, text=True
        )
        if done.returncode:
            sentence = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1].removeprefix("mljax: ")
            return {"error": sentence}
        figures = json.loads(file.read_text())
    first = figures[parts[0]]
    row = {"seconds": first["seconds"], "peak_bytes": first["peak_bytes"], "program_bytes": first["program_bytes"]}
    return row | {f"{part}_images_per_s": figures[part]["images_per_s"] for part in parts}


def rows_seconds(rows: int, labels: int) -> dict[str, Any]:
    """All metrics of so many rows of scores."""
    from mljax.bench.loop import metrics_seconds

    seconds = metrics_seconds(rows, labels)
    return {"seconds": seconds, "metrics_rows_per_s": rows / seconds}


def exponent(values: Sequence[float], seconds: Sequence[float]) -> float | None:
    """p of seconds = a values^p by least squares in logarithms over the upper half of the values; None: too few."""
    import numpy as np

    pairs = sorted(zip(values, seconds))[len(values) // 2 if len(values) > 3 else 0 :]
    if len(pairs) < 2:
        return None
    x, y = np.log(np.array(pairs, float)).T
    return float(np.polyfit(x, y, 1)[0])


def plot(result: dict[str, Any], path: Path) -> None:
    """Throughput against the axis, and seconds beside it."""
    from mljax.pictures.plots import REPORT, save

    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
    except ImportError:
        raise UserError(f"The plot of --scale needs matplotlib; {REPORT}.") from None
    axis, rows = result["axis"], result["rows"]
    x = [row[axis] for row in rows]
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    rates = [key for key in rows[0] if key.endswith("_per_s")]
    for key, colour in zip(rates, ("#1e5ac8", "#e17800")):
        name = key.removesuffix("_per_s").replace("_", ", ", 1)
        left.plot(x, [row[key] for row in rows], "o-", color=colour, label=name)
    left.set_ylabel("per second")
    left.legend(frameon=False)
    right.plot(x, [row["seconds"] for row in rows], "o-", color="#1e5ac8", label="measured")
    power, what = (2, "pixels") if axis == "resolution" else (1, axis)
    even = [rows[-1]["seconds"] * (value / x[-1]) ** power for value in x]
    right.plot(x, even, "--", color="0.6", label=f"in proportion to the {what}")
    right.set_ylabel("seconds, a step" if axis != "rows" else "seconds, all metrics")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xticks(x, [f"{value:,}" for value in x])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(axis)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.25)
    config = " ".join(word.removeprefix("--config=") for word in result["config"])
    figure.suptitle(f"{config}, {result['machine']['device']} ({result['machine']['cpu']})", fontsize=10)
    save(figure, path)
