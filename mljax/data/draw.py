"""Pictures for people: an attention map over its image, and sheets of images with captions."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mljax.errors import UserError

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
    font = ImageFont.load_default()
    line = int(np.ceil(font.getbbox("Agjy")[3])) + 3
    text = line * max(len(caption.splitlines()) for caption in captions)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (gap + columns * (cell + gap), gap + rows * (cell + text + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = gap + i % columns * (cell + gap), gap + i // columns * (cell + text + gap)
        scale = cell / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        small = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        sheet.paste(small, (x + (cell - width) // 2, y + (cell - height) // 2))
        for j, words in enumerate(caption.splitlines()):
            draw.text((x, y + cell + 1 + j * line), _fit(words, font, cell), fill="black", font=font)
    return sheet


def _fit(words: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Cut words until they fit."""
    if not isinstance(font, ImageFont.FreeTypeFont):  # Pillow built without FreeType: its bitmap font is Latin-1
        words = words.encode("latin-1", "replace").decode("latin-1")
    if font.getlength(words) <= width:
        return words
    while words and font.getlength(words + "..") > width:
        words = words[:-1]
    return words + ".."
