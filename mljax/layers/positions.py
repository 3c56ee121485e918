"""Positions of an image's tokens."""

import numpy as np
from jaxtyping import Float

from mljax.errors import UserError


def sine_position(height: int, width: int, channels: int) -> Float[np.ndarray, "1 {height}*{width} {channels}"]:
    """2-D sine positions: y first, then x, coordinates 1..size scaled to 2 pi, temperature 1e4.

    Reference: Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020 (DETR), as Query2Label uses it.
    """
    if channels % 4:
        raise UserError(f"2-D sine positions need a width that is a multiple of 4, not {channels}; choose one.")
    half = channels // 2
    frequency = 10000.0 ** (2 * (np.arange(half) // 2) / half)

    def axis(size: int) -> np.ndarray:
        coordinate = np.arange(1, size + 1) / (size + 1e-6) * 2 * np.pi
        angle = coordinate[:, None] / frequency[None]
        return np.where(np.arange(half) % 2 == 0, np.sin(angle), np.cos(angle))

    y = np.broadcast_to(axis(height)[:, None], (height, width, half))
    x = np.broadcast_to(axis(width)[None], (height, width, half))
    return np.concatenate([y, x], axis=-1).reshape(1, height * width, channels).astype(np.float32)
