"""The world of `scenes`: twenty kinds of things, eight places, and which things each place likes. Plain numbers."""

from typing import NamedTuple


class Kind(NamedTuple):
    """One label.

    Attributes:
      name: the word for it.
      family: kinds of one family look alike or serve alike; only the label vectors use it.
      height: of a near one, in 1/256 of the picture's side.
      aspect: width in percent of the height.
      paint: which palette colours it: "paint", "coat", "leaf".
      many: chance in percent of one more beside it, asked twice.
      cover: its silhouette as boxes (x0, y0, x1, y1) in percent of its own box, which do not overlap.
    """

    name: str
    family: str
    height: int
    aspect: int
    paint: str
    many: int
    cover: tuple[tuple[int, int, int, int], ...]


KINDS = (
    Kind("person", "human", 140, 40, "paint", 30, ((30, 0, 70, 18), (12, 18, 88, 58), (26, 58, 74, 100))),
    Kind("car", "vehicle", 72, 200, "paint", 30, ((0, 38, 100, 88), (18, 6, 80, 38))),
    Kind("bus", "vehicle", 112, 180, "paint", 8, ((0, 4, 100, 90),)),
    Kind("bicycle", "vehicle", 84, 150, "paint", 15, ((2, 48, 40, 98), (60, 48, 98, 98), (40, 20, 60, 75))),
    Kind("sign", "disc", 130, 40, "paint", 15, ((4, 2, 96, 40), (44, 40, 56, 100))),
    Kind("tree", "plant", 200, 68, "leaf", 40, ((8, 4, 92, 64), (42, 64, 58, 100))),
    Kind("cow", "animal", 90, 150, "coat", 45, ((18, 22, 84, 66), (0, 12, 18, 44), (22, 66, 80, 90))),
    Kind("sheep", "animal", 66, 140, "coat", 55, ((16, 16, 92, 70), (0, 18, 16, 50), (24, 70, 82, 90))),
    Kind("boat", "vehicle", 110, 120, "paint", 35, ((4, 66, 96, 94), (24, 14, 72, 66))),
    Kind("umbrella", "shade", 120, 95, "paint", 30, ((6, 4, 94, 42), (47, 42, 53, 100))),
    Kind("ball", "disc", 40, 100, "paint", 20, ((6, 6, 94, 94),)),
    Kind("bird", "animal", 36, 140, "coat", 50, ((20, 28, 84, 66), (0, 16, 20, 48))),
    Kind("cup", "vessel", 58, 110, "paint", 35, ((4, 4, 78, 98), (78, 24, 98, 66))),
    Kind("bowl", "vessel", 50, 175, "paint", 20, ((4, 10, 96, 60), (24, 60, 76, 98))),
    Kind("kettle", "vessel", 84, 120, "paint", 5, ((18, 30, 82, 98), (30, 2, 70, 30))),
    Kind("chair", "seat", 110, 68, "paint", 40, ((8, 0, 92, 66), (12, 66, 88, 96))),
    Kind("sofa", "seat", 96, 200, "paint", 8, ((2, 36, 98, 92), (14, 6, 86, 36))),
    Kind("screen", "panel", 78, 145, "paint", 15, ((2, 0, 98, 80), (34, 80, 66, 100))),
    Kind("clock", "disc", 54, 100, "paint", 4, ((6, 6, 94, 94),)),
    Kind("lamp", "shade", 124, 56, "paint", 20, ((8, 0, 92, 38), (44, 38, 56, 100))),
)
CLASSES = tuple(kind.name for kind in KINDS)
SKY = frozenset({"bird"})  # half of them fly, where there is a sky
WALL = frozenset({"clock", "screen", "sign"})  # hang more often than they stand, where there is a wall
FLAT = frozenset({"clock", "screen", "sign", "tree", "person", "lamp"})  # are not stretched much


class Scene(NamedTuple):
    """One place.

    Attributes:
      name: the word for it.
      share: percent of all pictures.
      indoor: a wall and little depth, else a sky and much depth.
      likely: percent of such pictures in which a kind stands, before `PARTNERS` and what hides it.
      back, floor: colours of wall or sky and of what is below; a picture takes one of each.
      back_texture, floor_texture: what is drawn on them.
    """

    name: str
    share: int
    indoor: bool
    likely: dict[str, int]
    back: tuple[tuple[int, int, int], ...]
    floor: tuple[tuple[int, int, int], ...]
    back_texture: str
    floor_texture: str


_CREAM, _WHITE, _MINT, _ROSE = (214, 200, 168), (205, 206, 204), (172, 198, 184), (206, 172, 164)
_BLUE_GREY, _SKY, _HAZE, _DUSK = (160, 176, 194), (140, 184, 226), (196, 206, 212), (206, 160, 132)
_WOOD, _DARK_WOOD, _TILE, _CARPET = (164, 120, 78), (104, 74, 52), (184, 180, 172), (128, 118, 126)
_ROAD, _GRASS, _DRY, _SAND = (118, 116, 116), (98, 148, 72), (160, 150, 84), (214, 190, 140)
_SOIL, _WATER, _GREEN_WATER = (136, 104, 72), (82, 128, 162), (86, 134, 132)

# fmt: off
SCENES = (
    Scene("kitchen", 15, True,
          {"cup": 62, "bowl": 58, "kettle": 54, "clock": 28, "chair": 34, "person": 36, "lamp": 20, "screen": 6},
          (_WHITE, _CREAM, _MINT, _ROSE), (_WOOD, _TILE, _DARK_WOOD), "tiles", "planks"),
    Scene("living room", 15, True,
          {"sofa": 68, "screen": 46, "lamp": 50, "chair": 34, "clock": 26, "cup": 28, "person": 44, "ball": 10,
           "bowl": 10},
          (_CREAM, _ROSE, _MINT, _BLUE_GREY), (_WOOD, _CARPET, _DARK_WOOD), "stripes", "planks"),
    Scene("office", 12, True,
          {"screen": 74, "chair": 66, "cup": 38, "clock": 32, "lamp": 34, "person": 50, "sofa": 8, "kettle": 8},
          (_WHITE, _BLUE_GREY, _CREAM), (_CARPET, _TILE, _WOOD), "blinds", "speckle"),
    Scene("street", 19, False,
          {"car": 68, "bus": 30, "bicycle": 36, "sign": 54, "lamp": 28, "tree": 26, "person": 56, "clock": 10,
           "umbrella": 10, "bird": 6},
          (_HAZE, _SKY, _DUSK), (_ROAD, _TILE), "houses", "road"),
    Scene("park", 14, False,
          {"tree": 74, "ball": 30, "bicycle": 30, "bird": 38, "chair": 20, "lamp": 18, "person": 56, "sign": 10,
           "umbrella": 10},
          (_SKY, _HAZE), (_GRASS, _DRY), "hedge", "flecks"),
    Scene("farm", 9, False,
          {"cow": 54, "sheep": 36, "tree": 54, "bird": 22, "person": 24, "car": 16, "bowl": 6},
          (_SKY, _HAZE, _DUSK), (_GRASS, _DRY, _SOIL), "hills", "furrows"),
    Scene("beach", 9, False,
          {"umbrella": 58, "ball": 46, "boat": 36, "bird": 34, "chair": 30, "person": 62, "sign": 6},
          (_SKY, _HAZE, _DUSK), (_SAND, _DRY), "sea", "speckle"),
    Scene("harbour", 7, False,
          {"boat": 86, "bird": 50, "person": 34, "car": 24, "sign": 20, "bicycle": 14, "bus": 8, "lamp": 14},
          (_HAZE, _SKY, _DUSK), (_WATER, _GREEN_WATER), "hills", "waves"),
)
# fmt: on

# A likely kind comes `up` percent as often where its partner, which is earlier in KINDS, was chosen, else `down`.
PARTNERS = {
    "bicycle": ("person", 125, 65),
    "sign": ("car", 115, 75),
    "sheep": ("cow", 60, 150),
    "umbrella": ("person", 125, 60),
    "ball": ("person", 125, 60),
    "bird": ("boat", 125, 90),
    "bowl": ("cup", 120, 65),
    "kettle": ("cup", 120, 65),
    "screen": ("sofa", 120, 90),
    "lamp": ("sofa", 120, 85),
}

PALETTES = {
    "paint": (
        (196, 52, 48), (216, 118, 44), (226, 190, 62), (92, 150, 66), (52, 120, 110), (58, 108, 182),
        (44, 60, 120), (118, 72, 148), (204, 116, 150), (232, 230, 224), (150, 152, 156), (52, 52, 58),
        (128, 86, 58), (200, 176, 138),
    ),
    "coat": ((232, 228, 218), (128, 84, 54), (72, 54, 46), (156, 150, 144), (190, 150, 108), (44, 42, 44)),
    "leaf": ((70, 122, 54), (96, 142, 60), (48, 92, 60), (150, 138, 54), (182, 110, 52)),
}  # fmt: skip
SKINS = ((236, 196, 166), (206, 158, 122), (150, 104, 74), (96, 66, 50))
INDOOR_CLUTTER = ("frame", "crate", "plate", "bottle", "cloth", "post", "cushion", "shelf")
OUTDOOR_CLUTTER = ("stone", "bush", "crate", "post", "flag", "fence", "board", "puddle")
