"""How each of the twenty kinds of `scenes` is drawn: ovals, boxes, polygons and lines in percent of its box."""

from mljax.scenes.pen import DARK, GLASS, LIGHT, Colour, Pen, shade
from mljax.scenes.table import SKINS


def person(p: Pen) -> None:
    a, b, build = p.look.a, p.look.b, p.look.build
    skin = SKINS[(build + p.look.pattern) % 4]
    spread = (2, 12, 18)[build % 3]
    p.line([(44, 56), (42 - spread, 98)], 22, b)
    p.line([(56, 56), (58 + spread, 98)], 22, shade(b, 85))
    if build == 5:  # a skirt
        p.poly([(34, 50), (66, 50), (86, 78), (14, 78)], b)
    hands = ((12, 52), (4, 30), (96, 8))[build % 3]
    p.line([(32, 24), hands], 14, skin)
    p.line([(68, 24), (90, 54 - spread)], 14, skin)
    p.poly([(26, 20), (74, 20), (68, 58), (32, 58)], a)
    p.pattern(34, 22, 66, 56, shade(a, 70))
    p.oval(34, 0, 66, 18, skin)
    if p.look.flip or build < 4:
        p.slice(33, -1, 67, 17, 180, 360, DARK if build % 2 else shade(b, 60))


def car(p: Pen) -> None:
    a, build = p.look.a, p.look.build
    if build < 4:
        roof = [(20, 40), (34, 8), (68, 8), (84, 40)] if build % 2 else [(10, 40), (16, 8), (66, 8), (82, 40)]
        p.poly(roof, a)
        p.poly([(26, 38), (36, 14), (50, 14), (50, 38)], GLASS)
        p.poly([(54, 38), (54, 14), (66, 14), (76, 38)], shade(GLASS, 85))
        p.poly([(0, 42), (8, 36), (92, 38), (100, 50), (100, 82), (0, 82)], a)
        p.rect(0, 70, 100, 82, shade(a, 70))
        p.oval(94, 48, 100, 60, LIGHT)
        for x in (12, 68):
            p.oval(x, 62, x + 20, 100, DARK)
            p.oval(x + 6, 73, x + 14, 89, (170, 170, 172))
        return
    # From the front or the back: narrower.
    p.poly([(26, 40), (34, 6), (66, 6), (74, 40)], a)
    p.poly([(31, 38), (37, 12), (63, 12), (69, 38)], GLASS)
    p.rect(18, 38, 82, 84, a)
    p.rect(20, 82, 34, 100, DARK)
    p.rect(66, 82, 80, 100, DARK)
    lamp = (250, 236, 170) if build == 4 else (190, 40, 36)
    p.oval(20, 46, 32, 62, lamp)
    p.oval(68, 46, 80, 62, lamp)
    p.rect(36, 66, 64, 76, shade(a, 55))


def bus(p: Pen) -> None:
    a, build = p.look.a, p.look.build
    p.rect(0, 4, 100, 88, a)
    p.rect(0, 58, 100, 66, p.look.b)
    p.rect(0, 80, 100, 88, shade(a, 65))
    panes = (5, 4, 6)[build % 3]
    for i in range(panes):
        p.rect(5 + 92 * i // panes, 16, 1 + 92 * (i + 1) // panes, 46, GLASS if build < 4 else DARK)
    p.rect(86, 20, 96, 78, shade(GLASS, 80))
    for x in (12, 66):
        p.oval(x, 74, x + 16, 100, DARK)
        p.oval(x + 5, 82, x + 11, 92, (160, 160, 164))


def bicycle(p: Pen) -> None:
    a, tyre = p.look.a, DARK if p.look.build < 5 else (150, 150, 152)
    p.ring(2, 42, 40, 99, 6, tyre)
    p.ring(60, 42, 98, 99, 6, tyre)
    p.line([(21, 70), (45, 72), (70, 34), (36, 36), (45, 72)], 5, a)
    p.line([(36, 36), (21, 70)], 4, a)
    p.line([(79, 70), (68, 18)], 5, a)
    p.line([(68, 18), (80, 14)] if p.look.build % 2 else [(60, 16), (76, 18), (80, 28)], 5, tyre)
    p.line([(36, 36), (33, 24)], 4, a)
    p.line([(25, 23), (42, 23)], 7, tyre)


def sign(p: Pen) -> None:
    a, build = p.look.a, p.look.build
    p.rect(45, 38, 55, 100, (128, 128, 130))
    if build < 3:
        p.oval(3, 2, 97, 40, a)
        p.oval(16, 7, 84, 35, LIGHT if build else shade(a, 115))
        p.rect(26, 18, 74, 24, DARK if build else LIGHT)
    elif build == 3:
        p.poly([(50, 0), (100, 40), (0, 40)], a)
        p.poly([(50, 10), (82, 36), (18, 36)], LIGHT)
        p.rect(46, 18, 54, 33, DARK)
    elif build == 4:
        p.poly([(50, 0), (100, 21), (50, 42), (0, 21)], a)
        p.poly([(50, 7), (82, 21), (50, 35), (18, 21)], LIGHT)
    else:
        p.rect(2, 4, 98, 38, a)
        p.poly([(18, 17), (58, 17), (58, 10), (84, 21), (58, 32), (58, 25), (18, 25)], LIGHT)


def tree(p: Pen) -> None:
    a, build = p.look.a, p.look.build
    p.poly([(42, 50), (58, 50), (61, 100), (39, 100)], (98, 70, 48))
    if build < 2:  # a fir
        for top, wide in ((28, 46), (14, 36), (0, 26)):
            p.poly([(50, top), (50 + wide, top + 40), (50 - wide, top + 40)], shade(a, 70 + top))
        return
    p.oval(4, 18, 62, 62, shade(a, 82))
    p.oval(38, 20, 96, 64, shade(a, 92))
    p.oval(18, 2, 84, 52, a)
    p.oval(28, 8, 54, 28, shade(a, 116))
    if build == 5:
        for x, y in ((20, 36), (44, 20), (66, 34), (52, 48), (76, 50)):
            p.oval(x, y, x + 8, y + 6, p.look.b)


def _legs(p: Pen, top: int, fill: Colour, places: tuple[int, ...], wide: int) -> None:
    for i, x in enumerate(places):
        p.rect(x, top, x + wide, 100, shade(fill, 80 if i % 2 else 95))


def cow(p: Pen) -> None:
    a, build = p.look.a, p.look.build
    patch = p.look.b if build < 4 else shade(a, 85)
    _legs(p, 58, a, (22, 33, 66, 77), 7)
    p.line([(87, 28), (95, 50)], 4, shade(a, 70))
    p.poly([(18, 24), (84, 22), (88, 32), (86, 62), (60, 70), (22, 64)], a)
    p.oval(34, 24, 54, 46, patch)
    p.oval(60, 34, 82, 58, patch)
    low = 20 if build % 2 else 0  # grazes or looks up
    p.poly([(22, 26), (26, 54), (12, 44 + low), (4, 30 + low)], a)
    p.poly([(2, 12 + low), (20, 12 + low), (15, 44 + low), (4, 44 + low)], shade(a, 92))
    p.rect(4, 36 + low, 15, 45 + low, (206, 160, 148))
    p.line([(1, 3 + low), (5, 13 + low), (17, 13 + low), (21, 3 + low)], 3, LIGHT)


def sheep(p: Pen) -> None:
    a, build = p.look.a, p.look.build
    face = DARK if build < 3 else shade(a, 80)
    _legs(p, 62, face, (28, 38, 66, 76), 6)
    for x0, y0, x1, y1 in ((14, 22, 50, 70), (30, 12, 70, 56), (54, 16, 92, 66), (34, 34, 80, 76)):
        p.oval(x0, y0, x1, y1, a)
    for x, y in ((30, 30), (48, 24), (64, 36), (44, 48), (74, 44)):
        p.ring(x, y, x + 12, y + 14, 2, shade(a, 84))
    low = 24 if build % 2 else 0
    p.oval(2, 16 + low, 22, 52 + low, face)
    p.oval(12, 12 + low, 26, 26 + low, a)
    p.oval(18, 22 + low, 28, 32 + low, face)


def boat(p: Pen) -> None:
    a, b, build = p.look.a, p.look.b, p.look.build
    if build < 4:
        p.line([(48, 2), (48, 70)], 4, (110, 84, 60))
        p.poly([(51, 4), (51, 60), (86, 60)], LIGHT if build % 2 else b)
        p.poly([(45, 14), (45, 60), (20, 60)], shade(LIGHT, 88) if build < 2 else shade(b, 115))
    else:
        p.rect(28, 34, 68, 68, LIGHT)
        p.rect(34, 42, 46, 54, GLASS)
        p.rect(50, 42, 62, 54, GLASS)
        p.rect(54, 12, 64, 34, b)
    p.poly([(2, 64), (98, 64), (84, 94), (16, 94)], a)
    p.poly([(5, 70), (95, 70), (92, 76), (8, 76)], shade(a, 140) if build % 2 else LIGHT)


def umbrella(p: Pen) -> None:
    a, b, build = p.look.a, p.look.b, p.look.build
    p.line([(50, 4), (50, 98)], 4, (120, 96, 72) if build % 2 else DARK)
    if build == 3:
        p.line([(50, 96), (58, 99), (62, 92)], 4, DARK)
    p.slice(4, 2, 96, 82, 180, 360, a)
    if build < 4:
        p.slice(20, 2, 80, 82, 180, 360, b)
        p.slice(38, 2, 62, 82, 180, 360, a)
    p.rect(4, 40, 96, 43, shade(a, 75))


def ball(p: Pen) -> None:
    a, b, build = p.look.a, p.look.b, p.look.build
    p.oval(3, 3, 97, 97, a)
    if build < 2:
        for start in (0, 120, 240):
            p.slice(3, 3, 97, 97, start, start + 60, b)
        p.oval(42, 42, 58, 58, LIGHT)
    elif build == 2:
        for x, y in ((38, 36), (10, 22), (66, 20), (18, 66), (62, 66)):
            p.oval(x, y, x + 24, y + 24, DARK)
    elif build == 3:
        p.rect(6, 42, 94, 58, b)
    else:
        p.ring(28, 3, 72, 97, 6, b)
        p.rect(4, 47, 96, 53, b)
    p.oval(22, 14, 42, 30, shade(a, 135))


def bird(p: Pen) -> None:
    a, build = p.look.a, p.look.build
    if build < 3:  # flies
        p.poly([(50, 50), (26, 4), (10, 16), (40, 60)], shade(a, 80))
        p.poly([(46, 52), (78, 2), (94, 20), (58, 62)], a)
        p.oval(20, 42, 74, 68, a)
        p.oval(8, 38, 30, 58, a)
        p.poly([(70, 50), (98, 54), (72, 62)], shade(a, 70))
        p.poly([(10, 44), (-2, 50), (10, 54)], (222, 150, 50))
        return
    p.line([(48, 66), (46, 98)], 5, (200, 130, 50))
    p.line([(58, 66), (60, 98)], 5, (200, 130, 50))
    p.poly([(70, 40), (100, 56), (72, 64)], shade(a, 70))
    p.oval(20, 26, 84, 72, a)
    p.oval(36, 34, 82, 62, shade(a, 75))
    p.oval(8, 6, 36, 42, a)
    p.oval(16, 14, 22, 22, DARK)
    p.poly([(10, 18), (-4, 26), (10, 30)], (222, 150, 50))


def cup(p: Pen) -> None:
    a, build = p.look.a, p.look.build
    p.ring(62, 22, 98, 68, 9, shade(a, 85))
    foot = (10, 20, 4)[build % 3]
    p.poly([(4, 8), (80, 8), (80 - foot, 98), (4 + foot, 98)], a)
    p.pattern(6 + foot, 26, 78 - foot, 84, p.look.b)
    p.oval(4, 0, 80, 18, shade(a, 120))
    p.oval(10, 4, 74, 16, (92, 62, 42) if build < 3 else shade(a, 60))


def bowl(p: Pen) -> None:
    a, build = p.look.a, p.look.build
    if build < 3:  # has something in it
        for x in (18, 40, 60):
            p.oval(x, -14 + x % 5, x + 24, 36, shade(p.look.b, 70 + x))
    p.slice(2, -56, 98, 92, 0, 180, a)
    p.rect(34, 84, 66, 99, shade(a, 75))
    p.pattern(22, 28, 78, 60, p.look.b)
    if build >= 3:
        p.oval(2, 4, 98, 34, shade(a, 120))
        p.oval(8, 9, 92, 31, shade(a, 62))
    else:
        p.rect(2, 17, 98, 25, shade(a, 118))


def kettle(p: Pen) -> None:
    a, build = p.look.a, p.look.build
    p.ring(26, 0, 74, 56, 7, DARK if build % 2 else shade(p.look.b, 80))
    p.poly([(22, 62), (2, 40), (10, 36), (30, 50)], shade(a, 85))
    if build < 4:
        p.oval(14, 26, 86, 99, a)
        p.rect(22, 84, 78, 99, shade(a, 90))
    else:
        p.poly([(30, 28), (70, 28), (86, 98), (14, 98)], a)
    p.oval(34, 22, 66, 36, shade(a, 75))
    p.oval(46, 16, 54, 26, DARK)
    p.oval(26, 46, 40, 74, shade(a, 130))


def chair(p: Pen) -> None:
    a, build = p.look.a, p.look.build
    leg = shade(a, 70)
    if build < 2:  # an office chair
        p.rect(46, 60, 54, 88, DARK)
        p.line([(18, 98), (50, 86), (82, 98)], 7, DARK)
        p.oval(16, 0, 84, 52, a)
        p.rect(10, 54, 90, 66, shade(a, 85))
        return
    for x in (10, 82):
        p.rect(x, 60, x + 8, 100, leg)
    for x in (22, 70):
        p.rect(x, 64, x + 6, 90, shade(leg, 80))
    if build < 4:  # bars
        for x in (14, 36, 58, 79):
            p.rect(x, 4, x + 7, 56, a)
        p.rect(12, 0, 88, 12, a)
    else:
        p.rect(12, 0, 88, 50, a)
        p.pattern(16, 6, 84, 46, p.look.b)
    p.poly([(12, 52), (88, 52), (98, 66), (2, 66)], shade(a, 112))


def sofa(p: Pen) -> None:
    a, build = p.look.a, p.look.build
    p.rect(8, 88, 14, 100, DARK)
    p.rect(86, 88, 92, 100, DARK)
    p.rect(12, 10, 88, 60, a)
    p.oval(10, 2, 52, 34, a)
    p.oval(48, 2, 90, 34, a)
    p.pattern(14, 14, 86, 50, shade(a, 82))
    p.rect(10, 56, 90, 90, shade(a, 88))
    p.oval(14, 48, 52, 70, shade(a, 114))
    p.oval(48, 48, 86, 70, shade(a, 110))
    for x in (0, 84):
        p.rect(x, 42, x + 16, 92, shade(a, 94))
        p.oval(x, 30, x + 16, 54, shade(a, 104))
    if build < 3:
        p.poly([(26, 26), (42, 30), (38, 56), (22, 52)], p.look.b)


def screen(p: Pen) -> None:
    a, build = p.look.a, p.look.build
    frame = DARK if build < 4 else (176, 176, 178)
    p.rect(45, 76, 55, 96, frame)
    p.rect(30, 93, 70, 99, frame)
    p.rect(1, 0, 99, 80, frame)
    glow = shade(a, 45) if build == 0 else a
    p.rect(6, 6, 94, 72, glow)
    if build == 1:
        for y in (14, 28, 42, 56):
            p.rect(12, y, 50 + y * 7 % 36, y + 6, LIGHT)
    elif build in (2, 3):
        p.rect(6, 46, 94, 72, p.look.b)
        p.oval(52, 16, 74, 44, LIGHT)
    elif build == 4:
        p.rect(12, 12, 56, 58, LIGHT)
        p.rect(62, 12, 88, 40, p.look.b)
    p.poly([(10, 8), (30, 8), (14, 40), (10, 40)], shade(glow, 125))


def clock(p: Pen) -> None:
    a, build = p.look.a, p.look.build
    p.oval(2, 2, 98, 98, a)
    face = LIGHT if build < 4 else shade(p.look.b, 60)
    mark = DARK if build < 4 else LIGHT
    p.oval(11, 11, 89, 89, face)
    for x, y in ((47, 14), (47, 80), (14, 47), (80, 47)):
        p.rect(x, y, x + 6, y + 6, mark)
    hour = ((50, 28), (70, 40), (66, 66), (34, 64), (28, 48), (38, 32))[build]
    minute = ((78, 42), (50, 18), (24, 38), (62, 78), (72, 28), (34, 76))[(build + p.look.pattern) % 6]
    p.line([(50, 50), hour], 8, mark)
    p.line([(50, 50), minute], 5, mark)


def lamp(p: Pen) -> None:
    a, build = p.look.a, p.look.build
    glow = (252, 232, 160) if build % 2 else shade(a, 120)
    if build < 4:
        p.rect(46, 36, 54, 94, shade(p.look.b, 70))
        p.oval(24, 90, 76, 101, shade(p.look.b, 60))
        p.poly([(28, 2), (72, 2), (96, 38), (4, 38)], a)
        p.pattern(26, 8, 74, 36, shade(a, 78))
        p.rect(6, 35, 94, 39, glow)
        return
    # A lantern on a post.
    p.rect(45, 30, 55, 100, DARK)
    p.poly([(20, 10), (80, 10), (66, 38), (34, 38)], glow)
    p.poly([(50, -2), (90, 12), (10, 12)], DARK)


THINGS = {
    f.__name__: f
    for f in (
        *(person, car, bus, bicycle, sign, tree, cow, sheep, boat, umbrella),
        *(ball, bird, cup, bowl, kettle, chair, sofa, screen, clock, lamp),
    )
}
