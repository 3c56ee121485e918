"""Paints a layout of `scenes`: a background, the things from far to near, light and grain. Integers throughout."""

import numpy as np
from PIL import Image, ImageDraw

from mljax.scenes.clutter import CLUTTER
from mljax.scenes.kinds import THINGS
from mljax.scenes.layout import CANVAS, Backdrop, Layout
from mljax.scenes.pen import Colour, Pen, shade

_SHAPES = THINGS | CLUTTER


def paint(layout: Layout, size: int) -> np.ndarray:
    """The picture of a layout: (size size 3) uint8, drawn at twice the size and averaged down."""
    side = 2 * size
    image = _ground(layout.backdrop, side)
    draw = ImageDraw.Draw(image)
    _texture(draw, layout.backdrop, side)
    for thing in layout.things:
        x0, y0, x1, y1 = (v * side // CANVAS for v in thing.box)
        _SHAPES[thing.name](Pen(draw, (x0, y0, x1, y1), thing.look))
    return _light(np.asarray(image.reduce(2)), layout.backdrop)


def _ground(backdrop: Backdrop, side: int) -> Image.Image:
    """Two bands, each a little brighter towards the horizon."""
    horizon = backdrop.horizon * side // CANVAS
    rows = np.empty((side, 1, 3), np.int32)
    ramp = np.arange(side, dtype=np.int32)[:, None]
    back, floor = (np.array(colour, np.int32)[None] for colour in (backdrop.back, backdrop.floor))
    rows[:horizon, 0] = back * (88 * horizon + 20 * ramp[:horizon]) // (100 * horizon)
    below = side - horizon
    rows[horizon:, 0] = floor * (104 * below - 24 * (ramp[horizon:] - horizon)) // (100 * below)
    rows = np.clip(rows, 0, 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(rows, (side, side, 3))))


def _texture(draw: ImageDraw.ImageDraw, backdrop: Backdrop, side: int) -> None:
    """What the wall or the sky, then what the floor has on it; `dice` of the backdrop place it."""
    horizon = backdrop.horizon * side // CANVAS
    BACK[backdrop.back_texture](draw, side, horizon, backdrop.back, backdrop.dice[:12])
    FLOOR[backdrop.floor_texture](draw, side, horizon, backdrop.floor, backdrop.dice[12:])


def _light(pixels: np.ndarray, backdrop: Backdrop) -> np.ndarray:
    """Tint, exposure and patches of shade over everything, then grain; -> uint8."""
    size = len(pixels)
    random = np.random.Philox(key=np.array(backdrop.key, np.uint64), counter=backdrop.counter)
    patches = random.random_raw(2).astype("<u8").view(np.uint8).reshape(4, 4)
    patches = Image.fromarray(128 + patches // 2).resize((size, size), Image.Resampling.BILINEAR)
    patches = np.asarray(patches).astype(np.int32)  # 128..255
    depth = backdrop.patches
    gain = (256 * 255 - depth * (255 - patches)) // 255
    gain = gain[..., None] * np.array(backdrop.gain, np.int32)[None, None]  # 256 * 256 is one
    grain = random.random_raw((3 * size * size + 7) // 8).astype("<u8").view(np.uint8)[: 3 * size * size]
    grain = (grain.reshape(size, size, 3).astype(np.int32) - 128) * backdrop.grain >> 7
    return np.clip((pixels * gain >> 16) + grain, 0, 255).astype(np.uint8)


def _tiles(draw, side: int, horizon: int, colour: Colour, dice: tuple[int, ...]) -> None:
    step = side * (8 + dice[0] % 8) // 100
    line = shade(colour, 84)
    for y in range(horizon, 0, -step):
        draw.line([(0, y), (side, y)], fill=line)
    for x in range(dice[1] * step // 256, side, step):
        draw.line([(x, 0), (x, horizon)], fill=line)


def _stripes(draw, side: int, horizon: int, colour: Colour, dice: tuple[int, ...]) -> None:
    step = side * (6 + dice[0] % 10) // 100
    for x in range(dice[1] * step // 256, side, step):
        draw.rectangle((x, 0, x + step // 3, horizon), fill=shade(colour, 93))


def _blinds(draw, side: int, horizon: int, colour: Colour, dice: tuple[int, ...]) -> None:
    x0, wide = side * dice[0] // 400, side * (25 + dice[1] % 40) // 100
    low = horizon * (45 + dice[2] % 30) // 100
    draw.rectangle((x0, 0, x0 + wide, low), fill=shade(colour, 112))
    for y in range(0, low, max(2, side // 40)):
        draw.line([(x0, y), (x0 + wide, y)], fill=shade(colour, 90))


def _houses(draw, side: int, horizon: int, colour: Colour, dice: tuple[int, ...]) -> None:
    x = 0
    for i in range(6):
        wide = side * (14 + dice[i] % 20) // 100
        top = horizon * (10 + dice[i + 3] % 60) // 100
        wall = shade(((178, 166, 154), (158, 120, 104), (140, 146, 154))[dice[i + 4] % 3], 78 + dice[i + 5] % 36)
        draw.rectangle((x, top, x + wide, horizon), fill=wall)
        pane = max(3, side // 36)
        for y in range(top + pane, horizon - pane, 2 * pane):
            for column in range(x + pane, x + wide - pane, 2 * pane):
                draw.rectangle((column, y, column + pane // 2, y + pane), fill=shade(wall, 66))
        x += wide


def _hedge(draw, side: int, horizon: int, colour: Colour, dice: tuple[int, ...]) -> None:
    for i in range(10):
        x, r = side * (i * 11 - 6) // 100, side * (6 + dice[i] % 12) // 100
        green = shade((86, 122, 70), 74 + dice[i + 1] % 34)
        draw.ellipse((x - r // 2, horizon - r, x + 2 * r, horizon + r // 3), fill=green)


def _hills(draw, side: int, horizon: int, colour: Colour, dice: tuple[int, ...]) -> None:
    for i in range(3):
        x, r = side * dice[i] // 256, side * (30 + dice[i + 3] % 40) // 100
        top = horizon - side * (4 + dice[i + 6] % 10) // 100
        hill = ((116, 140, 104), (128, 146, 150), (142, 134, 100))[dice[i + 1] % 3]
        box = (x - r, top, x + r, 2 * horizon - top)
        draw.pieslice(box, 180, 360, fill=shade(hill, 80 + dice[i + 2] % 30))


def _sea(draw, side: int, horizon: int, colour: Colour, dice: tuple[int, ...]) -> None:
    top = horizon - side * (5 + dice[0] % 12) // 100
    sea = shade(((86, 140, 176), (92, 150, 152))[dice[1] % 2], 84 + dice[2] % 28)
    draw.rectangle((0, top, side, horizon), fill=sea)
    for i in range(3, 9):
        x, y = side * dice[i] // 256, top + (horizon - top) * dice[i + 1] // 256
        draw.line([(x, y), (x + side // 9, y)], fill=shade(sea, 122), width=2)


def _clouds(draw, side: int, horizon: int, colour: Colour, dice: tuple[int, ...]) -> None:
    for i in range(4):
        x, y, r = side * dice[i] // 256, horizon * dice[i + 1] // 400, side * (4 + dice[i + 2] % 8) // 100
        draw.ellipse((x - 2 * r, y, x + 2 * r, y + r), fill=shade(colour, 112))


def _planks(draw, side: int, horizon: int, colour: Colour, dice: tuple[int, ...]) -> None:
    meet = side * dice[0] // 256
    for i in range(-10, 21):
        x = side * i // 10
        draw.line([(meet + (x - meet) // 2, horizon), (meet + (x - meet) * 2, side)], fill=shade(colour, 84), width=2)


def _speckle(draw, side: int, horizon: int, colour: Colour, dice: tuple[int, ...]) -> None:
    mix = 1 + dice[0] * 256 + dice[1]
    for i in range(60):
        mix = mix * 25173 + 13849 & 0xFFFF
        x, y = side * (mix >> 8) // 256, horizon + (side - horizon) * (mix & 255) // 256
        draw.rectangle((x, y, x + side // 80, y + side // 120), fill=shade(colour, 86 if i % 2 else 112))


def _flecks(draw, side: int, horizon: int, colour: Colour, dice: tuple[int, ...]) -> None:
    mix = 1 + dice[0] * 256 + dice[1]
    for i in range(70):
        mix = mix * 25173 + 13849 & 0xFFFF
        x, y = side * (mix >> 8) // 256, horizon + (side - horizon) * (mix & 255) // 256
        draw.line([(x, y), (x + side // 90, y - side // 40)], fill=shade(colour, 80 if i % 2 else 118), width=2)


def _road(draw, side: int, horizon: int, colour: Colour, dice: tuple[int, ...]) -> None:
    y = horizon + (side - horizon) * (35 + dice[0] % 45) // 100
    draw.rectangle((0, horizon, side, horizon + (y - horizon) // 3), fill=shade(colour, 124))
    for x in range(-side * dice[1] // 1024, side, side // 4):
        draw.rectangle((x, y, x + side // 8, y + max(2, side // 60)), fill=shade(colour, 170))


def _furrows(draw, side: int, horizon: int, colour: Colour, dice: tuple[int, ...]) -> None:
    lean = side * (dice[0] - 128) // 256
    y, step = horizon, max(3, side // 50)
    while y < side:
        draw.line([(0, y), (side, y + lean // 6)], fill=shade(colour, 88), width=max(1, step // 3))
        y, step = y + step, step + max(1, side // 90)


def _waves(draw, side: int, horizon: int, colour: Colour, dice: tuple[int, ...]) -> None:
    mix = 1 + dice[0] * 256 + dice[1]
    for i in range(34):
        mix = mix * 25173 + 13849 & 0xFFFF
        x, y = side * (mix >> 8) // 256, horizon + (side - horizon) * (mix & 255) // 256
        long = side // 20 + (y - horizon) // 6
        draw.line([(x, y), (x + long, y - 2), (x + 2 * long, y)], fill=shade(colour, 122 if i % 2 else 84), width=2)


def _plain(draw, side: int, horizon: int, colour: Colour, dice: tuple[int, ...]) -> None:
    """Nothing."""


BACK = {
    "tiles": _tiles, "stripes": _stripes, "blinds": _blinds, "houses": _houses, "hedge": _hedge,
    "hills": _hills, "sea": _sea, "clouds": _clouds, "wall": _plain,
}  # fmt: skip
FLOOR = {
    "planks": _planks, "speckle": _speckle, "road": _road, "flecks": _flecks, "furrows": _furrows,
    "waves": _waves, "plain": _plain,
}  # fmt: skip
