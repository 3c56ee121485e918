"""Pictures for people: an attention map over its image, and sheets of images with captions."""

import contextlib
import functools
import importlib.util
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mljax.errors import UserError

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
# Pillow's own font has ASCII alone; these are looked for on the machine when a text has other letters.
FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "arial.ttf", "Arial.ttf"),
    *("NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "msyh.ttc", "PingFang.ttc", "malgun.ttf"),
    *("NotoSansDevanagari-Regular.ttf", "NotoSansThai-Regular.ttf", "Nirmala.ttf"),
)

# Heat from 0 to 1: dark blue, violet, red, orange, pale yellow; lighter at every step, so it also reads in grey.
_COLOURS = np.array([[13, 8, 80], [110, 20, 140], [205, 50, 90], [250, 145, 40], [252, 250, 170]], np.float32)


def heat_colours(heat: np.ndarray) -> np.ndarray:
    """(..) in [0, 1] -> (.. 3) uint8, linear between five colours."""
    steps = np.linspace(0, 1, len(_COLOURS))
    return np.stack([np.interp(heat, steps, _COLOURS[:, c]) for c in range(3)], axis=-1).round().astype(np.uint8)


def overlay(
    image: Image.Image,
    attention: np.ndarray,
    *,
    strength: float = 0.6,
    low: float | None = None,
    high: float | None = None,
) -> Image.Image:
    """Lay an attention map over its image.

    Where the heat is 0 the image stays as it is; where it is 1 the colour covers it by `strength`.

    Args:
      image: RGB, of any size.
      attention: (h w) float, of any size: stretched over the image, bilinear.
      strength: of the colour, in [0, 1].
      low, high: values that become heat 0 and 1; by default the map's own least and largest. Set them to
        compare maps. A constant map has heat 0 everywhere.
    Returns:
      An RGB image of the size of `image`.
    Raises:
      UserError: the map is not (h w), or not finite.
    """
    attention = np.asarray(attention, np.float32)
    if attention.ndim != 2 or not attention.size or not np.isfinite(attention).all():
        raise UserError(f"An attention map must be (h w) and finite, but this one has the shape {attention.shape}.")
    low = float(attention.min()) if low is None else low
    high = float(attention.max()) if high is None else high
    heat = (attention - low) / (high - low) if high > low else np.zeros_like(attention)
    stretched = Image.fromarray(heat.astype(np.float32)).resize(image.size, Image.Resampling.BILINEAR)
    heat = np.clip(np.asarray(stretched), 0, 1)
    cover = (strength * heat)[:, :, None]
    mixed = (1 - cover) * np.asarray(image.convert("RGB"), np.float32) + cover * heat_colours(heat)
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


def contact_sheet(
    images: Sequence[Image.Image],
    captions: Sequence[str],
    *,
    columns: int | None = None,
    cell: int = 224,
    gap: int = 8,
) -> Image.Image:
    """Images in rows on white, each scaled into a square cell, its aspect kept, with its caption below.

    Args:
      images: at least one, any modes and sizes.
      captions: one for each; may have several lines, each cut to the width of the cell.
      columns: how many in a row; by default as many as make the sheet about square.
      cell, gap: pixels of a cell's side and between cells.
    Raises:
      UserError: no images, or another number of captions.
    """
    if not len(images) or len(images) != len(captions):
        raise UserError(f"A contact sheet needs one caption for each image: {len(images)} and {len(captions)} given.")
    columns = min(len(images), columns or int(np.ceil(np.sqrt(len(images)))))
    below = [[lettering(words, 10) for words in caption.splitlines()] for caption in captions]
    line = max((int(np.ceil(font.getbbox("Agjy")[3])) + 3 for lines in below for font, _ in lines), default=0)
    text = line * max(map(len, below))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (gap + columns * (cell + gap), gap + rows * (cell + text + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, lines) in enumerate(zip(images, below, strict=True)):
        x, y = gap + i % columns * (cell + gap), gap + i // columns * (cell + text + gap)
        scale = cell / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        small = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        sheet.paste(small, (x + (cell - width) // 2, y + (cell - height) // 2))
        for j, (font, words) in enumerate(lines):
            draw.text((x, y + cell + 1 + j * line), _fit(words, font, cell), fill="black", font=font)
    return sheet


def captioned(image: Image.Image, text: str) -> Image.Image:
    """A picture with a text below it, black on white, so that it can be read whatever the picture shows.

    The letters grow with the picture. A text that is wider than the picture is broken into lines; a picture that is
    too narrow for any text gets white margins.

    Args:
      image: RGB, of any size.
      text: one line.
    """
    size = min(max(14, max(image.size) // 26), 48)
    font, text = lettering(text, size)
    width, gap = max(image.width, 12 * size), size // 3
    lines = _wrapped(text, font, width - 2 * gap)
    line = int(np.ceil(font.getbbox("Agjy")[3])) + max(2, size // 6)
    page = Image.new("RGB", (width, image.height + 2 * gap + line * len(lines)), "white")
    page.paste(image, ((width - image.width) // 2, 0))
    draw = ImageDraw.Draw(page)
    for i, words in enumerate(lines):
        draw.text((gap, image.height + gap + i * line), words, fill="black", font=font)
    return page


def _wrapped(text: str, font: Font, width: int) -> list[str]:
    """Lines of at most `width` pixels, broken between words, and inside a word that is longer than a line."""
    lines = [""]
    for word in text.split():
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def lettering(text: str, size: int) -> tuple[Font, str]:
    """A font of this machine that has the letters of a text, and the text as the font can write it.

    A letter that no font here has loses its accent, or is written as its number as in Python.
    """
    own = _own(size)
    if all(_has(own, letter) for letter in text):
        return own, text
    fonts = (own, *_others(size))
    best = min(fonts, key=lambda font: sum(not _has(font, letter) for letter in text))  # the first of equals
    return best, "".join(letter if _has(best, letter) else _plain(best, letter) for letter in text)


def _plain(font: Font, letter: str) -> str:
    base = "".join(c for c in unicodedata.normalize("NFKD", letter) if not unicodedata.combining(c))
    return base if base and base != letter and all(_has(font, c) for c in base) else f"\\u{ord(letter):04x}"


@functools.lru_cache(maxsize=4096)
def _has(font: Font, letter: str) -> bool:
    """Whether a font has a letter: it does not draw what it draws for U+FFFF, which no font has."""
    if letter.isascii() or not isinstance(font, ImageFont.FreeTypeFont):
        return letter.isascii() and letter.isprintable()
    drawn: Any = font.getmask(letter)
    absent: Any = font.getmask("\uffff")
    return drawn.size != absent.size or bytes(drawn) != bytes(absent)


@functools.cache
def _own(size: int) -> Font:
    """Pillow's font; if it was built without FreeType, its bitmap font of one size."""
    try:
        return ImageFont.load_default(size)
    except ImportError:
        return ImageFont.load_default()


@functools.cache
def _others(size: int) -> list[Font]:
    """Those of `FONTS` that are here; matplotlib brings the first of them along."""
    brought = importlib.util.find_spec("matplotlib")
    folder = Path(brought.origin).parent / "mpl-data" / "fonts" / "ttf" if brought and brought.origin else Path()
    found: list[Font] = []
    for name in FONTS:
        for path in (name, folder / name):
            with contextlib.suppress(OSError, ImportError):
                found.append(ImageFont.truetype(path, size))
                break
    return found


def _fit(words: str, font: Font, width: int) -> str:
    """Cut words until they fit."""
    if font.getlength(words) <= width:
        return words
    while words and font.getlength(words + "..") > width:
        words = words[:-1]
    return words + ".."
