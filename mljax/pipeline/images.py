"""Any picture -> an RGB Pillow image of 8 bits, upright; whatever cannot become one is an `ImageError`."""

import io
import os
import re
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from mljax.errors import UserError, nearest
from mljax.untrusted import MAX_IMAGE, read_regular
from mljax.waiting import bounded

# Pixels of the largest picture that is decoded: 8192 x 8192, 256 MB in memory. A larger one, harmless or a
# decompression bomb, is refused from its header. Below Pillow's own limit, so that this one is what decides.
MAX_PIXELS = 2**26
# What is opened; in particular not EPS, for which Pillow starts another program.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "ICO")
DECODERS = ("auto", "pillow", "simplejpeg")

_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PILLOW_WARNINGS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


class ImageError(UserError):
    """A picture that cannot be used; the sentence names it."""


def decode(
    data: bytes | str | os.PathLike[str] | Image.Image | np.ndarray, *, where: str = "", decoder: str = "auto"
) -> Image.Image:
    """Decode a picture.

    EXIF orientation is applied. Transparent pictures (RGBA, LA, palettes or colours declared transparent) are laid on
    white. 16-bit grey is divided by 257. Of an animation the first frame counts. Colour profiles are not applied,
    as in the papers' code. Warnings that Pillow issues (from modules of PIL, for the whole process) are silenced.

    Args:
      data: encoded bytes, a path, a Pillow image, or an array (h w), (h w 1), (h w 3), (h w 4), either uint8 or
        float in [0, 1].
      where: the file or id that an error names; by default the path.
      decoder: who decodes ordinary JPEG: "pillow"; "simplejpeg" if it is installed (the same pixels; everything that it
        refuses goes to Pillow); "auto" takes Pillow, which was the faster of the two where a Pillow image is
        wanted (0.44 against 0.46 ms on a VOC photo, because an array must be copied into the image).
    Returns:
      An image of mode "RGB". It may be `data` itself: do not write into it.
    Raises:
      ImageError: empty, truncated, not an image, of a format that is not read, more than MAX_PIXELS, or an
        array of another shape, type or range.
      UserError: `decoder` is not one of DECODERS.
    """
    if decoder not in DECODERS:
        raise UserError(f"{decoder!r} is not an image decoder{nearest(decoder, DECODERS)}.")
    if isinstance(data, np.ndarray):
        return _from_array(data, where or "given as an array")
    if isinstance(data, str | os.PathLike):
        where = where or str(data)
        data = _read(Path(data), where)
    where = where or "given"
    _silence_pillow()
    try:
        if isinstance(data, Image.Image):
            return _rgb(_load(data, where), where)
        if not isinstance(data, bytes | bytearray | memoryview):
            raise ImageError(
                f"The image {where} has the type {type(data).__name__}: give bytes, a path, an image or an array."
            )
        return _from_bytes(bytes(data), where, decoder)
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise _too_large("far more", where) from None
    except UnidentifiedImageError:
        raise ImageError(
            f"The image {where} is not a picture of a known format ({', '.join(_formats())}): replace or remove it."
        ) from None
    except Exception as error:  # broken files make Pillow's plugins raise nearly every kind of exception
        reason = str(error) or type(error).__name__
        raise ImageError(
            f"The image {where} is truncated or damaged ({reason.rstrip('.')}): replace or remove it."
        ) from None


def _read(path: Path, where: str) -> bytes:
    try:
        return bounded(lambda: read_regular(path, MAX_IMAGE), where)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        reason = reason[0].lower() + reason[1:]
        raise ImageError(f"The image {where} cannot be read ({reason}): check the path.") from None


def _from_bytes(data: bytes, where: str, decoder: str) -> Image.Image:
    if not data:
        raise ImageError(f"The image {where} is empty (0 bytes): replace or remove it.")
    image = Image.open(io.BytesIO(data), formats=_formats())
    if decoder == "simplejpeg" and image.format == "JPEG" and image.mode in ("L", "RGB"):
        image = _simplejpeg(data, image, where)
    return _rgb(_load(image, where), where)


def _simplejpeg(data: bytes, image: Image.Image, where: str) -> Image.Image:
    """Decode as an upright RGB image, or return `image` to leave it to Pillow."""
    try:
        import simplejpeg  # pyright: ignore[reportMissingImports]  (optional)
    except ImportError:
        raise UserError("decoder='simplejpeg' needs a package: pip install simplejpeg, or take 'auto'.") from None
    _check_size(image, where)
    try:
        array = simplejpeg.decode_jpeg(data, colorspace="RGB")
    except ValueError:  # also for what libjpeg merely warns about: Pillow decides whether the picture is usable
        return image
    return _upright(Image.fromarray(array), image.getexif().get(_ORIENTATION, 1))


def _load(image: Image.Image, where: str) -> Image.Image:
    """Check the size, decode the pixels, apply the orientation."""
    _check_size(image, where)
    image.load()
    # Read after `load`: PNG keeps EXIF behind its pixels, and TIFF has been turned and untagged by then.
    return _upright(image, image.getexif().get(_ORIENTATION, 1))


def _upright(image: Image.Image, orientation: Any) -> Image.Image:
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def _check_size(image: Image.Image, where: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _too_large(f"{width} x {height}", where)
    if not width * height:
        raise ImageError(f"The image {where} has no pixels ({width} x {height}): replace or remove it.")


def _too_large(size: str, where: str) -> ImageError:
    return ImageError(
        f"The image {where} is too large to decode ({size} pixels, at most {MAX_PIXELS:,} in all): make it smaller."
    )


def _rgb(image: Image.Image, where: str) -> Image.Image:
    """Any mode of Pillow -> RGB."""
    mode = image.mode
    if mode == "F" or mode.startswith("I"):  # must come first: Pillow would clip these at 255
        return _from_deep(np.asarray(image), where)
    if image.has_transparency_data:
        rgba = (image.convert("LA") if mode == "La" else image).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba).convert("RGB")
    return image if mode == "RGB" else image.convert("RGB")


def _from_deep(array: np.ndarray, where: str) -> Image.Image:
    """Grey of 16 bits (also where the file spends 32), or float in [0, 1]."""
    if array.dtype.kind == "f":
        return _from_array(array, where)
    if array.min() < 0 or array.max() > 65535:
        raise ImageError(f"The image {where} has grey values outside 0..65535: convert it to 8 bits.")
    array = ((array.astype(np.int64) + 128) // 257).astype(np.uint8)
    return Image.fromarray(array).convert("RGB")


def _from_array(array: np.ndarray, where: str) -> Image.Image:
    """(h w), (h w 1 | 3 | 4), uint8 or float in [0, 1] -> RGB."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))) or not array.size:
        raise ImageError(
            f"The image {where} has the shape {array.shape}: give (h w), (h w 1), (h w 3) or (h w 4), not empty."
        )
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise _too_large(f"{array.shape[1]} x {array.shape[0]}", where)
    if array.dtype.kind == "f":
        if not (array.min() >= 0 and array.max() <= 1):  # so written, NaN is refused too
            raise ImageError(f"The image {where} has float values outside [0, 1]: divide them by their maximum.")
        array = np.rint(array.astype(np.float32) * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ImageError(f"The image {where} has the type {array.dtype}: give uint8, or float in [0, 1].")
    return _rgb(Image.fromarray(np.ascontiguousarray(array)), where)


@cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this build of Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _silence_pillow() -> None:
    """Ignore Pillow's warnings: broken metadata does not matter here, and MAX_PIXELS limits sizes.

    `warnings.catch_warnings` would be tidier but is not safe in threads: one thread's exit undoes, or makes permanent,
    the filters of another. So our filter is put in front whenever it is not there.
    """
    if warnings.filters[:1] != [_PILLOW_WARNINGS]:
        warnings.filterwarnings("ignore", module=r"PIL\.")
