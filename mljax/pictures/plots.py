"""Pictures of an analysis: photos in rows with coloured frames, and points in a plane with their groups' names."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from mljax.errors import UserError, printable, printable_lines
from mljax.pictures import drawing

FRAMES = {"query": (30, 90, 200), "hit": (20, 150, 70), "miss": (225, 120, 0)}
REPORT = "install them with: pip install 'mljax[report]'"


def framed(image: Image.Image, kind: str, cell: int = 224) -> Image.Image:
    """A picture that fits into a cell, in a frame whose colour says what it is: "query", "hit" or "miss"."""
    border = 5
    small = ImageOps.contain(image.convert("RGB"), (cell - 2 * border, cell - 2 * border), Image.Resampling.BICUBIC)
    return ImageOps.expand(small, border, FRAMES[kind])


def boxed(image: Image.Image, box: Sequence[float]) -> Image.Image:
    """A picture with a box drawn on it: left, top, right, bottom in shares of its sides."""
    drawn = image.convert("RGB")
    drawn = drawn.copy() if drawn is image else drawn
    corners = np.array(box) * (*image.size, *image.size)
    line = max(2, max(image.size) // 80)
    ImageDraw.Draw(drawn).rectangle([*corners[:2], *(corners[2:] - 1)], outline=(255, 220, 0), width=line)
    return drawn


def save(picture: Any, path: Path) -> None:
    """Write a PIL image or a matplotlib figure; a full disk or a folder that may not be written is one sentence."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(picture, Image.Image):
            picture.save(path)
        else:
            picture.savefig(path, dpi=150, bbox_inches="tight")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}); give another --out.") from None


def rows(
    pictures: Sequence[Sequence[Image.Image]], captions: Sequence[Sequence[str]], title: str, cell: int = 224
) -> Image.Image:
    """Rows of pictures with captions under a title; short rows are filled up with white."""
    columns = max(map(len, pictures))
    white = Image.new("RGB", (cell, cell), "white")
    filled = [picture for row in pictures for picture in (*row, *[white] * (columns - len(row)))]
    words = [text for row in captions for text in (*row, *[""] * (columns - len(row)))]
    sheet = drawing.contact_sheet(filled, words, columns=columns, cell=cell)
    whole = Image.new("RGB", (sheet.width, sheet.height + 28), "white")
    whole.paste(sheet, (0, 28))
    ImageDraw.Draw(whole).text((8, 6), title, fill="black", font=ImageFont.load_default(16))
    return whole


def scatter(points: np.ndarray, groups: np.ndarray, names: Sequence[str], title: str) -> Any:
    """Points (n 2) in the colours and marks of their groups (n) int, each group's name on its middle point.

    Returns:
      A matplotlib figure.
    Raises:
      UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patheffects import withStroke
    except ImportError:
        raise UserError(f"The picture of points needs matplotlib; {REPORT}.") from None
    figure = Figure(figsize=(9, 8))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = _palette(20)
    halo = [withStroke(linewidth=3, foreground="white")]
    for i in range(len(names)):
        own = points[groups == i]
        colour, mark = colours[i % 20], "o^sDv"[i % 5]
        axes.scatter(own[:, 0], own[:, 1], s=18, color=colour, marker=mark, linewidths=0, alpha=0.75)
    for i, name in enumerate(names):
        own = points[groups == i]
        x, y = own[np.square(own - np.median(own, axis=0)).sum(1).argmin()]
        dark = tuple(0.6 * value for value in colours[i % 20])
        style = {"fontsize": 9, "weight": "bold", "color": dark, "path_effects": halo, "parse_math": False}
        axes.text(x, y, printable(name), ha="center", va="center", **style)
    axes.set_title(printable_lines(title), fontsize=11, parse_math=False)
    axes.set_xticks([])
    axes.set_yticks([])
    return figure


def _palette(count: int) -> list[tuple[float, float, float]]:
    """Colours of different hue and lightness; those that follow each other are far apart."""
    import colorsys

    return [colorsys.hls_to_rgb(i * 7 % count / count, (0.35, 0.6)[i % 2], 0.75) for i in range(count)]
