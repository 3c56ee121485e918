"""What a run is made with: versions, devices, command and commit."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mljax.types import Config

PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "mljax"),
    *("pillow", "simplejpeg", "opencv-python-headless"),  # what decodes and resizes images
)


def environment(config: Config) -> dict[str, Any]:
    """Versions, devices, command and commit, and what decodes and resizes the images."""
    import jax

    info: dict[str, Any] = {"python": sys.version.split()[0], "platform": platform.platform(), "command": sys.argv}
    for package in PACKAGES:
        try:
            info[package] = version(package)
        except PackageNotFoundError:
            info[package] = None
    info["images"] = images(config, simplejpeg=info["simplejpeg"] is not None)
    info["devices"] = [str(d) for d in jax.devices()]
    info["device_kind"] = jax.devices()[0].device_kind
    info["xla_flags"] = os.environ.get("XLA_FLAGS", "")
    try:
        here = Path(__file__).parent
        answer = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5)
        info["commit"] = answer.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        info["commit"] = None
    return info


def images(config: Config, *, simplejpeg: bool) -> str:
    """What decodes and what resizes, in words; see docs/data.md."""
    resizers = {"antialias": "OpenCV, Pillow where it shrinks", "fast": "OpenCV", "nearest": "Pillow"}
    parts = ["JPEG by simplejpeg, all else by Pillow" if simplejpeg else "all by Pillow"]
    for kind in ("train", "eval"):
        resize = config.input[kind].get("resize", "bilinear")
        parts.append(f"{kind} resize {resize!r} by {resizers.get(resize, 'Pillow')}")
    return "; ".join(parts)
