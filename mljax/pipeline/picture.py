"""A picture that is decoded when its pixels are asked for, and as little of it as the crop needs.

Who decodes: simplejpeg, where it is installed and the file is an ordinary JPEG (grey or YCbCr); everything else, and
everything that simplejpeg does not like, goes to Pillow. Both give the same pixels.

Who resizes, by the setting `resize`:

| resize | who | filter |
|---|---|---|
| bilinear, bicubic, lanczos, box | Pillow | antialiased: the reference |
| nearest | Pillow | |
| antialias | OpenCV where the crop grows, Pillow where it shrinks | bilinear, antialiased, in one pass |
| fast | OpenCV | bilinear, not antialiased, in one pass |

"antialias" differs from "bilinear" by rounding (1 of 255) and in the outermost pixels, where the crop's own edge is
repeated as in the papers' code, which crops first. OpenCV is an extra: pip install 'mljax[fast]'.
"""

import functools
import math
from typing import Any

import numpy as np
from PIL import Image

from mljax.errors import UserError
from mljax.pipeline.images import MAX_PIXELS, decode

Box = tuple[int, int, int, int]  # left, top, right, bottom; right and bottom excluded

RESIZE = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "nearest": Image.Resampling.NEAREST,
}
OPENCV = ("antialias", "fast")


class Picture:
    """Anything that `images.decode` takes; `size` is (width, height), upright.

    Raises:
      ImageError: when it is made, or when pixels are asked for.
    """

    def __init__(self, data: Any, where: str = ""):
        self.where = where
        self._data: bytes | None = None
        self._array: np.ndarray | None = None
        self._image: Image.Image | None = None
        header = _header(data) if isinstance(data, bytes) else None
        if header is None:
            image = decode(
                data, where=where, decoder="simplejpeg" if _simplejpeg() and isinstance(data, bytes) else "auto"
            )
            self._image, self.size = image, image.size
        else:
            self._data, self.size = data, header

    def array(self) -> np.ndarray:
        """All pixels, (h w 3) uint8; do not write into it."""
        if self._array is None and self._image is None:
            self._decode()
        if self._array is None:
            self._array = np.asarray(self._image)
        return self._array

    def image(self, right: int | None = None, bottom: int | None = None) -> Image.Image:
        """An RGB image of all pixels, or of at least those left of `right` and above `bottom`."""
        if self._image is not None:
            return self._image
        array = self.array()
        if self._image is not None:  # simplejpeg gave it to Pillow
            return self._image
        if right is not None or bottom is not None:
            return Image.fromarray(array[:bottom, :right])
        self._image = Image.fromarray(array)
        return self._image

    def at_least(self, width: float, height: float) -> np.ndarray:
        """All pixels at the smallest of the sizes 1, 1/2, 1/4, 1/8 that a JPEG can be decoded at, not below (width,
        height); anything but an ordinary JPEG has its full size."""
        if self._data is None or self._array is not None or width * 2 > self.size[0] or height * 2 > self.size[1]:
            return self.array()
        factor = 2 ** min(3, int(math.log2(min(self.size[0] / width, self.size[1] / height))))
        least = [-(-side // factor) for side in self.size]
        try:
            return _simplejpeg().decode_jpeg(self._data, min_width=least[0], min_height=least[1])
        except ValueError:
            return self.array()

    def _decode(self) -> None:
        assert self._data is not None
        try:
            self._array = _simplejpeg().decode_jpeg(self._data)
        except ValueError:  # also for what libjpeg merely warns about: Pillow decides whether the picture is usable
            self._image = decode(self._data, where=self.where)


def crop_and_resize(
    picture: Picture, box: Box, size: int, resize: str, *, pre_size: int | None = None, scaled: bool = False
) -> Image.Image | np.ndarray:
    """A part of a picture, size x size.

    Args:
      box: the part, in pixels of the picture, or of a square of side `pre_size` that it is squished to first.
      resize: see the module. Pillow squishes and then crops, in two passes; OpenCV takes the part in one.
      scaled: decode at half, a quarter or an eighth of the size where the part still has `size` pixels a side.
    Returns:
      A new image, or an array (size size 3) uint8.
    Differs from the papers' crop followed by a resize: Pillow's filter sees the pixels just outside the box, so that
    the outermost result pixels can differ.
    """
    if resize in OPENCV:
        return _opencv(picture, box, size, resize, pre_size, scaled)
    method = RESIZE[resize]
    width, height = box[2] - box[0], box[3] - box[1]
    if pre_size is not None:
        image = picture.image().resize((pre_size, pre_size), method)
    elif scaled and (width >= 2 * size and height >= 2 * size):
        array = picture.at_least(picture.size[0] * size / width, picture.size[1] * size / height)
        x, y = array.shape[1] / picture.size[0], array.shape[0] / picture.size[1]
        part = (box[0] * x, box[1] * y, box[2] * x, box[3] * y)
        return Image.fromarray(array).resize((size, size), method, box=part)
    else:  # no pixel beyond the filter's reach is copied; the left and upper ones stay, for the same rounding
        x, y = (math.ceil(3 * max(1, side / size)) + 1 for side in (width, height))
        image = picture.image(box[2] + x, box[3] + y)
    if (width, height) == (size, size):
        return image.crop(box)
    return image.resize((size, size), method, box=box)


def _opencv(
    picture: Picture, box: Box, size: int, resize: str, pre_size: int | None, scaled: bool
) -> Image.Image | np.ndarray:
    width, height = picture.size
    if pre_size is None:
        left, top, right, bottom = (float(side) for side in box)
    else:
        x, y = width / pre_size, height / pre_size
        left, top, right, bottom = box[0] * x, box[1] * y, box[2] * x, box[3] * y
    if scaled and right - left >= 2 * size and bottom - top >= 2 * size:
        array = picture.at_least(width * size / (right - left), height * size / (bottom - top))
        x, y = array.shape[1] / width, array.shape[0] / height
        left, top, right, bottom = left * x, top * y, right * x, bottom * y
    else:
        array = picture.array()
    left, top = min(round(left), array.shape[1] - 1), min(round(top), array.shape[0] - 1)
    part = array[top : max(top + 1, round(bottom)), left : max(left + 1, round(right))]
    if part.shape[:2] == (size, size):
        return part.copy()
    if resize == "antialias" and max(part.shape[:2]) > size:
        return Image.fromarray(part).resize((size, size), Image.Resampling.BILINEAR)
    return opencv(resize).resize(part, (size, size))


def mirrored(image: Image.Image | np.ndarray) -> Image.Image | np.ndarray:
    """Left and right changed over. OpenCV is there where an array is; NumPy would take longer than all the rest."""
    if isinstance(image, Image.Image):
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return opencv("fast").flip(image, 1)


@functools.cache
def opencv(resize: str) -> Any:
    """The module cv2, kept to the thread that calls it.

    Raises:
      UserError: it is not installed.
    """
    try:
        import cv2  # pyright: ignore[reportMissingImports]  (an extra)
    except ImportError:
        raise UserError(
            f"resize={resize!r} needs OpenCV: pip install 'mljax[fast]', or set resize='bilinear'."
        ) from None
    cv2.setNumThreads(0)
    return cv2


@functools.cache
def _simplejpeg() -> Any:
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def _header(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG that simplejpeg decodes as Pillow would, upright; None: leave it to `images.decode`."""
    if data[:2] != b"\xff\xd8" or _simplejpeg() is None or b"Exif" in data or b"rientation" in data:
        return None
    try:
        height, width, colours, _ = _simplejpeg().decode_jpeg_header(data)
    except ValueError:
        return None
    ordinary = colours in ("YCbCr", "Gray") and 0 < width * height <= MAX_PIXELS
    return (width, height) if ordinary else None
