"""Figures of a benchmark: the machine they are of, their arithmetic, and their lines."""

import os
import platform
import re
from pathlib import Path
from typing import Any

from mljax.bench import hlo


def machine() -> dict[str, Any]:
    """The machine that the figures are of."""
    import jax

    device = jax.devices()[0]
    model = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).is_file():
        names = re.findall(r"model name\s*: (.*)", info.read_text())
        model = names[0] if names else model
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    shown = {"device": device.device_kind, "platform": device.platform, "devices": jax.device_count(), "cpu": model}
    return {**shown, "cores": os.cpu_count(), "load": round(load, 1), "jax": jax.__version__}


def machine_line(result: dict[str, Any]) -> str:
    """The machine in one line."""
    m = result["machine"]
    return f"{m['devices']} {m['device']} ({m['cpu']}, {m['cores']} cores, load {m['load']:g}), jax {m['jax']}"


def summary(turns: Any, made: Any, peak_bytes: int | None, size: int, peak: float | None, devices: int) -> dict:
    """Figures of one part: seconds of a step, images/s, FLOPs, share of peak, ratios.

    Args:
      peak: FLOP/s of one device, or None: then "product" of the turns, a 2048 x 2048 matrix product, says what the
        machine reached.
    """
    seconds = turns.seconds("mljax")
    figures: dict[str, Any] = {"seconds": seconds, "images_per_s": size / seconds, "batch": size}
    figures |= {"peak_bytes": peak_bytes, "program_bytes": made.memory}
    figures |= {
        "flops": made.flops,
        "flops_per_image": made.flops * devices / size,
        "flops_per_s": made.flops / seconds,
    }
    if peak is not None:
        figures["share_of_peak"] = made.flops / seconds / peak
    elif "product" in turns.wall:
        figures["share_of_product"] = made.flops / (2 * 2048**3) * turns.ratio("product", "mljax")
    for side in set(turns.wall) - {"mljax", "product"}:
        figures[side] = {"seconds": turns.seconds(side), "images_per_s": size / turns.seconds(side)}
        figures[side] |= {"time_ratio": turns.ratio("mljax", side), "cpu_ratio": turns.ratio("mljax", side, "cpu")}
    if "torch" in figures and "folded" in figures:
        ratios = {kind: turns.ratio("folded", "torch", kind) for kind in ("wall", "cpu")}
        figures["torch"] |= {"folded_time_ratio": ratios["wall"], "folded_cpu_ratio": ratios["cpu"]}
    return figures


def lines(part: str, figures: dict[str, Any]) -> list[str]:
    """Figures of a part as lines of text."""
    text = [
        f"{part:<9} {figures['images_per_s']:8.1f} images/s  {1e3 * figures['seconds']:9.1f} ms"
        f" a step of {figures['batch']}"
    ]
    gb = [
        f"{figures[k] / 1e9:.2f} GB {name}"
        for k, name in (("peak_bytes", "peak"), ("program_bytes", "program"))
        if figures[k]
    ]
    work = (
        f"{figures['flops_per_image'] / 1e9:.2f} GFLOP an image, {figures['flops_per_s'] / 1e12:.3g} TFLOP/s a device"
    )
    if "share_of_peak" in figures:
        work += f", {100 * figures['share_of_peak']:.1f} % of the device's peak"
    if "share_of_product" in figures:
        work += f", {100 * figures['share_of_product']:.0f} % of a 2048 x 2048 matrix product's rate"
    text.append(f"{'':<9} {'; '.join([*gb, work])}")
    if "copies" in figures:
        text.append(f"{'':<9} {figures['moved_bytes'] / 1e9:.2f} GB moved a step; {hlo.summary(figures['copies'])}")
    for side in ("folded", "torch"):
        if side in figures:
            s = figures[side]
            memory = f", {s['peak_bytes'] / 1e9:.2f} GB peak" if s.get("peak_bytes") else ""
            text.append(
                f"{'':<9} {side}: {s['images_per_s']:.1f} images/s{memory}; mljax takes {s['time_ratio']:.2f} times its"
                f" time (CPU time {s['cpu_ratio']:.2f})"
            )
            if "folded_time_ratio" in s:
                text[-1] += f"; folded {s['folded_time_ratio']:.2f} ({s['folded_cpu_ratio']:.2f})"
    return text
