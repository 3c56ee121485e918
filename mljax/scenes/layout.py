"""What stands where in a picture of `scenes`: drawn from (seed, split, index), without painting anything.

Only random bits of Philox and + - * / and square roots of IEEE doubles are used, so that a layout is the same on
every machine. Lengths are in 1/256 of the picture's side: what is labelled does not depend on the size painted.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple, TypeVar

import numpy as np

from mljax.scenes.pen import Colour, Look
from mljax.scenes.table import (
    CLASSES,
    FLAT,
    INDOOR_CLUTTER,
    KINDS,
    OUTDOOR_CLUTTER,
    PALETTES,
    PARTNERS,
    SCENES,
    SKY,
    WALL,
    Scene,
)

CANVAS = 256
GRID = 128  # cells a side in which visibility is counted
LEAST_VISIBLE = 25  # percent of its silhouette that makes a thing a label
LEAST_CELLS = 28  # and cells of it: a square of about 6 of 128 pixels, less its corners
MOST_KINDS = 7
SPLITS = ("train", "val", "test")
_T = TypeVar("_T")


class Thing(NamedTuple):
    """One instance of a kind, or one piece of clutter (kind -1)."""

    name: str
    kind: int
    box: tuple[int, int, int, int]
    look: Look
    depth: int  # greater is nearer
    visible: int  # cells of GRID that nothing hides
    whole: int  # cells of its silhouette


class Backdrop(NamedTuple):
    horizon: int
    back: Colour
    floor: Colour
    back_texture: str
    floor_texture: str
    dice: tuple[int, ...]  # 24 bytes that place the textures
    gain: tuple[int, int, int]  # light per channel, 256 is one
    patches: int  # how much patches of shade take away, of 255
    grain: int  # amplitude of the noise
    key: tuple[int, int]  # of the bits for patches and grain
    counter: tuple[int, int, int, int]


class Layout(NamedTuple):
    """One picture: its scene (a row of SCENES), its things from far to near, and what may be seen of them.

    `labels` and `present` are bit masks over the kinds: seen well enough to be a label, and drawn at all.
    """

    scene: int
    backdrop: Backdrop
    things: tuple[Thing, ...]
    labels: int
    present: int


class Dice:
    """Random numbers of one picture, in the order they are asked for."""

    def __init__(self, key: tuple[int, int], counter: tuple[int, int, int, int]):
        self._next = self._stream(np.random.Philox(key=np.array(key, np.uint64), counter=counter)).__next__

    @staticmethod
    def _stream(bits: np.random.Philox) -> Iterator[float]:
        while True:
            yield from ((bits.random_raw(320) >> np.uint64(11)) * 2.0**-53).tolist()

    def share(self) -> float:
        """In [0, 1)."""
        return self._next()

    def below(self, n: int) -> int:
        return int(self._next() * n)

    def between(self, low: int, high: int) -> int:
        """Both ends included."""
        return low + int(self._next() * (high - low + 1))

    def percent(self, chance: float) -> bool:
        return self._next() * 100 < chance

    def one(self, options: tuple[_T, ...]) -> _T:
        return options[int(self._next() * len(options))]


def layout(seed: int, split: str, index: int, *, clutter: float = 1.0, strangers: float = 0.25) -> Layout:
    """The layout of picture `index`; see `mljax.data.scenes.scenes` for the settings."""
    key = (seed, SPLITS.index(split))
    attempt = 0
    while True:
        dice = Dice(key, (0, attempt, index, 0))
        place = _place(dice)
        kinds = _choose(dice, SCENES[place], strangers)
        if 1 <= len(kinds) <= MOST_KINDS:
            backdrop = _backdrop(dice, SCENES[place], key, (0, attempt, index, 1))
            things = _arrange(dice, SCENES[place], backdrop.horizon, kinds, clutter)
            labels = 0
            for thing in things:
                enough = thing.visible * 100 >= LEAST_VISIBLE * thing.whole and thing.visible >= LEAST_CELLS
                if thing.kind >= 0 and enough:
                    labels |= 1 << thing.kind
            if labels:
                present = sum(1 << kind for kind in kinds)
                return Layout(place, backdrop, things, labels, present)
        attempt += 1


def _place(dice: Dice) -> int:
    draw = dice.share() * 100
    for i, scene in enumerate(SCENES):
        draw -= scene.share
        if draw < 0:
            return i
    return len(SCENES) - 1


def _choose(dice: Dice, scene: Scene, strangers: float) -> list[int]:
    """The kinds of one picture: the likely ones given their partners, and at times a stranger."""
    chosen: list[str] = []
    for name in CLASSES:
        chance = float(scene.likely.get(name, 0))
        if name in PARTNERS:
            partner, up, down = PARTNERS[name]
            if partner in scene.likely:
                chance = chance * (up if partner in chosen else down) / 100
        if dice.share() * 100 < chance:
            chosen.append(name)
    if dice.share() < strangers:
        chosen.append(dice.one(tuple(name for name in CLASSES if name not in scene.likely)))
    return [CLASSES.index(name) for name in chosen]


def _backdrop(dice: Dice, scene: Scene, key: tuple[int, int], counter: tuple[int, int, int, int]) -> Backdrop:
    # A hint, not a label: often the colours or the textures are those of another place in- or outdoors.
    alike = tuple(other for other in SCENES if other.indoor == scene.indoor)
    colours = dice.one(alike) if dice.percent(35) else scene
    behind = dice.one(alike) if dice.percent(35) else scene
    below = dice.one(alike) if dice.percent(35) else scene
    plain = "wall" if scene.indoor else "clouds"
    light = dice.between(180, 290) if dice.percent(80) else dice.between(115, 180)
    warmth = dice.between(-28, 28)
    return Backdrop(
        horizon=dice.between(112, 168) if scene.indoor else dice.between(62, 128),
        back=_vary(dice, dice.one(colours.back), 22),
        floor=_vary(dice, dice.one(colours.floor), 22),
        back_texture=plain if dice.percent(30) else behind.back_texture,
        floor_texture="plain" if dice.percent(25) else below.floor_texture,
        dice=tuple(dice.below(256) for _ in range(24)),
        gain=(light * (256 + warmth) // 256, light, light * (256 - warmth) // 256),
        patches=dice.between(0, 110),
        grain=dice.between(4, 30),
        key=key,
        counter=counter,
    )


def _vary(dice: Dice, colour: Colour, by: int) -> Colour:
    r, g, b = (min(255, max(0, c + dice.between(-by, by))) for c in colour)
    return r, g, b


def _look(dice: Dice, palette: str) -> Look:
    colours = PALETTES[palette]
    return Look(
        a=_vary(dice, dice.one(colours), 20),
        b=_vary(dice, dice.one(colours), 20),
        build=dice.below(6),
        pattern=dice.below(6),
        flip=dice.percent(50),
        lean=dice.between(-8, 8),
    )


def _arrange(dice: Dice, scene: Scene, horizon: int, kinds: list[int], clutter: float) -> tuple[Thing, ...]:
    """Put everything somewhere and count what can be seen of it."""
    placed: list[tuple[int, str, int, tuple[int, int, int, int], Look]] = []
    for kind in kinds:
        many = KINDS[kind].many
        number = 1 + dice.percent(many) + dice.percent(many)
        last = None
        for _ in range(number):
            box, depth = _stand(dice, scene, horizon, kind, last, placed)
            look = _look(dice, KINDS[kind].paint)
            if last is not None and dice.percent(60):  # a herd, a set of cups
                look = look._replace(a=last[1].a, b=last[1].b, build=last[1].build)
            placed.append((depth, CLASSES[kind], kind, box, look))
            last = box, look
    options = INDOOR_CLUTTER if scene.indoor else OUTDOOR_CLUTTER
    for _ in range(int(dice.between(2, 7) * clutter)):
        name = dice.one(options if dice.percent(85) else INDOOR_CLUTTER + OUTDOOR_CLUTTER)
        depth, box = _lie(dice, scene, horizon, name)
        placed.append((depth, name, -1, box, _look(dice, "paint")))
    placed.sort(key=lambda item: item[0])  # stable: ties stay in the order of drawing
    return _look_at(placed)


def _stand(dice: Dice, scene: Scene, horizon: int, kind: int, last, placed) -> tuple[tuple[int, int, int, int], int]:
    """A box and a depth for one thing: on the floor with perspective, on the wall, or in the sky."""
    name, _, height, aspect, *_ = KINDS[kind]
    far = dice.share()
    far = far if scene.indoor else 0.35 * far + 0.65 * far * far  # outdoors more is far away
    scale = 0.62 + 0.48 * far if scene.indoor else 0.24 + 0.86 * far
    tall = height * scale * (0.75 + 0.5 * dice.share())
    if name not in FLAT:
        aspect = aspect * dice.between(84, 120) // 100
    if dice.percent(20):  # a small one, 8 to 12 of 128 pixels
        tall = (16 + 9 * dice.share()) * 10 / math.sqrt(aspect)
    if last is not None and dice.percent(70):
        tall = (last[0][3] - last[0][1]) * (0.85 + 0.3 * dice.share())
    tall = max(14, min(int(tall), 236))
    wide = max(8, tall * aspect // 100)
    x = dice.between(-wide // 5, CANVAS - wide * 4 // 5)
    if last is not None and dice.percent(75):
        x = last[0][0] + (1 if dice.percent(50) else -1) * wide * dice.between(60, 130) // 100
    elif placed and dice.percent(25):  # by another thing, which hides it or is hidden
        x = placed[-1][3][0] + dice.between(-wide * 3 // 4, wide * 3 // 4)
    x = min(max(x, -wide // 4), CANVAS - wide * 3 // 4)
    if scene.indoor and name in WALL and dice.percent(70):
        foot = dice.between(min(tall + 4, horizon), horizon)
        return (x, foot - tall, x + wide, foot), -400 + foot
    if name in SKY and not scene.indoor and dice.percent(50):
        foot = dice.between(tall, max(tall, horizon))
        return (x, foot - tall, x + wide, foot), -300 + foot
    foot = horizon + 6 + int(far * (246 - horizon)) + dice.between(-4, 4)
    return (x, foot - tall, x + wide, foot), foot


def _lie(dice: Dice, scene: Scene, horizon: int, name: str) -> tuple[int, tuple[int, int, int, int]]:
    far = dice.share()
    scale = 0.6 + 0.5 * far if scene.indoor else 0.3 + 0.7 * far
    tall = max(8, int(scale * dice.between(22, 78)))
    wide = max(8, tall * dice.between(60, 150) // 100)
    x = dice.between(-wide // 3, CANVAS - wide * 2 // 3)
    if name in ("frame", "shelf", "plate") and scene.indoor and dice.percent(80):
        foot = dice.between(min(tall, horizon), horizon)
        return -450 + foot, (x, foot - tall, x + wide, foot)
    foot = horizon + 4 + int(far * (248 - horizon))
    return foot, (x, foot - tall, x + wide, foot)


CLUTTER_COVER = ((10, 10, 90, 96),)


def _look_at(placed) -> tuple[Thing, ...]:
    """Paint numbers instead of colours on a coarse grid, from far to near, and count what is left of each."""
    grid = np.zeros((GRID, GRID), np.uint8)
    whole = []
    for number, (_, _, kind, (x0, y0, x1, y1), look) in enumerate(placed, 1):
        cells = 0
        wide, tall = x1 - x0, y1 - y0
        for a, b, c, d in CLUTTER_COVER if kind < 0 else KINDS[kind].cover:
            if look.flip:
                a, c = 100 - c, 100 - a
            left, right = (x0 + wide * a // 100) >> 1, (x0 + wide * c // 100 + 1) >> 1
            top, bottom = (y0 + tall * b // 100) >> 1, (y0 + tall * d // 100 + 1) >> 1
            cells += (right - left) * (bottom - top)
            grid[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)] = number
        whole.append(cells)
    seen = np.bincount(grid.ravel(), minlength=len(placed) + 1).tolist()
    return tuple(
        Thing(name, kind, box, look, depth, seen[number], max(1, whole[number - 1]))
        for number, (depth, name, kind, box, look) in enumerate(placed, 1)
    )
