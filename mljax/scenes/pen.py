"""A pen that draws in percent of a box, and what one thing looks like: for the pictures of `scenes`."""

from typing import NamedTuple

from PIL.ImageDraw import ImageDraw

Colour = tuple[int, int, int]
DARK, LIGHT, GLASS = (38, 36, 40), (238, 236, 228), (150, 182, 200)


class Look(NamedTuple):
    """What distinguishes one thing from the next of its kind: two colours, a build, a pattern, a pose."""

    a: Colour
    b: Colour
    build: int  # 0..5
    pattern: int  # 0..5, from 3 on plain
    flip: bool
    lean: int  # shift of the top against the foot, percent of the width


def shade(colour: Colour, percent: int) -> Colour:
    """The colour, darker (< 100) or lighter (> 100)."""
    return tuple(min(255, c * percent // 100) for c in colour)  # type: ignore[return-value]


class Pen:
    """Draws in percent of a box, mirrored and leaning as `look` says; all coordinates end as integers."""

    def __init__(self, draw: ImageDraw, box: tuple[int, int, int, int], look: Look):
        self.draw, self.look = draw, look
        self.x, self.y = box[0], box[1]
        self.w, self.h = box[2] - box[0], box[3] - box[1]
        self.unit = min(self.w, self.h)

    def at(self, x: int, y: int) -> tuple[int, int]:
        x += self.look.lean * (100 - y) // 100
        if self.look.flip:
            x = 100 - x
        return self.x + self.w * x // 100, self.y + self.h * y // 100

    def _box(self, x0: int, y0: int, x1: int, y1: int) -> tuple[int, int, int, int]:
        # A leaning oval or box moves as a whole, by what its middle moves.
        shift = self.look.lean * (200 - y0 - y1) // 200
        x0, x1 = x0 + shift, x1 + shift
        if self.look.flip:
            x0, x1 = 100 - x1, 100 - x0
        x, y, w, h = self.x, self.y, self.w, self.h
        left, top = x + w * x0 // 100, y + h * y0 // 100
        return left, top, max(left, x + w * x1 // 100), max(top, y + h * y1 // 100)

    def oval(self, x0: int, y0: int, x1: int, y1: int, fill: Colour) -> None:
        self.draw.ellipse(self._box(x0, y0, x1, y1), fill=fill)

    def rect(self, x0: int, y0: int, x1: int, y1: int, fill: Colour) -> None:
        self.draw.rectangle(self._box(x0, y0, x1, y1), fill=fill)

    def slice(self, x0: int, y0: int, x1: int, y1: int, start: int, end: int, fill: Colour) -> None:
        """Part of an oval, between two angles in degrees that are the same in a mirror (0 and 180, or around)."""
        self.draw.pieslice(self._box(x0, y0, x1, y1), start, end, fill=fill)

    def poly(self, points: list[tuple[int, int]], fill: Colour) -> None:
        self.draw.polygon([self.at(x, y) for x, y in points], fill=fill)

    def line(self, points: list[tuple[int, int]], width: int, fill: Colour) -> None:
        """Width in percent of the short side, at least one dot."""
        self.draw.line([self.at(x, y) for x, y in points], fill=fill, width=max(1, self.unit * width // 100))

    def ring(self, x0: int, y0: int, x1: int, y1: int, width: int, fill: Colour) -> None:
        self.draw.ellipse(self._box(x0, y0, x1, y1), outline=fill, width=max(1, self.unit * width // 100))

    def pattern(self, x0: int, y0: int, x1: int, y1: int, fill: Colour) -> None:
        """Stripes or spots in the box, or nothing, as the look has it."""
        kind, w, h = self.look.pattern, x1 - x0, y1 - y0
        if kind == 0:
            for i in (1, 3, 5):
                self.rect(x0 + w * i // 7, y0, x0 + w * (i + 1) // 7, y1, fill)
        elif kind == 1:
            for i in (1, 3):
                self.rect(x0, y0 + h * i // 5, x1, y0 + h * (i + 1) // 5, fill)
        elif kind == 2:
            for i, j in ((1, 2), (4, 1), (6, 4), (3, 5)):
                self.oval(x0 + w * i // 9, y0 + h * j // 8, x0 + w * (i + 2) // 9, y0 + h * (j + 2) // 8, fill)
