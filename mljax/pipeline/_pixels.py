"""Three of Pillow's operations in less time: RandAugment spends most of its own in them.

Pillow computes a shear as any affine map, with sixteen taps in double precision for each pixel; here it is what it is,
a shift of every row or column. Its 3 x 3 filter multiplies floats; here integers are added. What changes values one by
one is a table of 256, which Pillow itself fills.
"""

import functools
from collections.abc import Iterator

import numpy as np
from PIL import Image

BLOCK = 16384  # numbers computed at a time, which stay in the processor's cache: several times faster than all at once


def shear(image: Image.Image, slope: float, fill: tuple[int, int, int], *, vertical: bool) -> Image.Image:
    """`image.transform(image.size, AFFINE, (1, slope, 0, 0, 1, 0), BICUBIC, fillcolor=fill)` of an RGB image.

    Args:
      slope: how far right of (x, y + 0.5) its source lies, for each y; `vertical`: how far below, for each x.
    Differs from Pillow: by 1 of 255 at a few pixels in a thousand, since single precision rounds otherwise.
    """
    if not vertical:
        turned = shear(image.transpose(Image.Transpose.TRANSPOSE), slope, fill, vertical=True)
        return turned.transpose(Image.Transpose.TRANSPOSE)
    array = np.asarray(image)
    height, width, _ = array.shape
    move = slope * (np.arange(width) + 0.5)
    whole = np.floor(move)
    out = _between(_shifted(array, whole.astype(int)), move - whole)
    begin, end = (np.ceil(edge - 0.5 - move).astype(int).clip(0, height) for edge in (0, height))
    for first, last, y in _runs(begin):
        out[:y, first:last] = fill
    for first, last, y in _runs(end):
        out[y:, first:last] = fill
    return Image.fromarray(out)


def _shifted(array: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """(h w 3), (w) -> (h+3 w 3): [y, x] is pixel y + shifts[x] - 1 of column x, the last ones repeated outside."""
    height, width, _ = array.shape
    tall = np.empty((height + 3, width, 3), np.uint8)
    for first, last, shift in _runs(shifts):
        low = min(max(1 - shift, 0), height + 3)  # where y + shift - 1 is 0
        high = max(low, min(height + 1 - shift, height + 3))  # and where it is the height
        columns, out = array[:, first:last], tall[:, first:last]
        out[low:high] = columns[low + shift - 1 : high + shift - 1]
        out[:low], out[high:] = columns[:1], columns[-1:]
    return tall


def _between(tall: np.ndarray, part: np.ndarray) -> np.ndarray:
    """(h+3 w 3), (w) in [0, 1) -> (h w 3): columns between their pixels y + 1 and y + 2, by Pillow's cubic (a = -1)."""
    height, width = len(tall) - 3, 3 * tall.shape[1]
    t = np.repeat(part, 3)
    weights = np.stack([-t * (1 - t) ** 2, 1 - 2 * t**2 + t**3, t * (1 + t - t**2), -(t**2) * (1 - t)])
    weights *= 1 + 1e-6  # so that a whole number is not cut down to the one below
    step = max(1, BLOCK // width)
    taps = np.repeat(weights.astype(np.float32)[:, None], step, axis=1)
    out = np.empty((height, width), np.uint8)
    for first in range(0, height, step):
        rows = min(step, height - first)
        pixels = tall[first : first + rows + 3].reshape(rows + 3, width).astype(np.float32)
        value = taps[0, :rows] * pixels[:rows]
        for k in (1, 2, 3):
            value += taps[k, :rows] * pixels[k : k + rows]
        out[first : first + rows] = value.clip(0, 255, out=value)
    return out.reshape(height, -1, 3)


def _runs(values: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(first, last, value) of each run of equal values."""
    ends = [*(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    first = 0
    for last in ends:
        yield first, last, int(values[first])
        first = last


def smooth(image: Image.Image) -> Image.Image:
    """`image.filter(ImageFilter.SMOOTH)` of an RGB image: neighbours 1, itself 5, over 13; the frame stays."""
    array = np.asarray(image)
    height, width, _ = array.shape
    if height < 3 or width < 3:
        return image.copy()
    flat = array.reshape(height, -1)
    out = flat.copy()
    step = max(1, BLOCK // (3 * width))
    for first in range(0, height - 2, step):
        rows = min(step, height - 2 - first)
        wide = flat[first : first + rows + 2].astype(np.uint16)
        three = wide[:-2] + wide[1:-1] + wide[2:]
        total = 4 * wide[1:-1, 3:-3]
        for column in (three[:, :-6], three[:, 3:-3], three[:, 6:]):
            total += column
        total *= 2
        total += 13
        total //= 26
        out[first + 1 : first + 1 + rows, 3:-3] = total
    return Image.fromarray(out.reshape(height, width, 3))


@functools.cache
def blended(value: int, factor: float) -> tuple[int, ...]:
    """What `Image.blend(value everywhere, image, factor)` makes of 0, 1, .. 255, for `image.point`."""
    ramp = Image.frombytes("L", (256, 1), bytes(range(256)))
    return tuple(Image.blend(Image.new("L", (256, 1), value), ramp, factor).tobytes())
