"""Clutter of `scenes`: things that hide and resemble the twenty kinds, and are no label."""

from mljax.scenes.pen import DARK, LIGHT, Pen, shade


def frame(p: Pen) -> None:
    p.rect(2, 6, 98, 94, p.look.a)
    p.rect(12, 18, 88, 82, LIGHT if p.look.build % 2 else p.look.b)
    if p.look.build < 4:
        p.oval(30, 30, 60, 66, shade(p.look.a, 80))
        p.rect(12, 62, 88, 82, shade(p.look.b, 75))


def crate(p: Pen) -> None:
    p.rect(4, 8, 96, 99, p.look.a)
    p.pattern(8, 14, 92, 94, shade(p.look.a, 78))
    p.rect(4, 8, 96, 20, shade(p.look.a, 116))


def plate(p: Pen) -> None:
    p.oval(2, 4, 98, 96, p.look.a)
    p.oval(18, 20, 82, 80, shade(p.look.a, 88))
    p.ring(8, 10, 92, 90, 3, p.look.b)


def bottle(p: Pen) -> None:
    p.rect(30, 34, 70, 99, p.look.a)
    p.poly([(30, 36), (43, 20), (43, 2), (57, 2), (57, 20), (70, 36)], p.look.a)
    p.rect(30, 54, 70, 78, p.look.b)


def cloth(p: Pen) -> None:
    p.poly([(10, 30), (86, 22), (98, 90), (2, 98)], p.look.a)
    p.pattern(16, 36, 84, 88, p.look.b)


def post(p: Pen) -> None:
    p.rect(42, 0, 58, 100, shade(p.look.a, 80))
    if p.look.build < 2:
        p.rect(10, 12, 90, 20, shade(p.look.a, 70))


def cushion(p: Pen) -> None:
    p.oval(2, 26, 98, 98, p.look.a)
    p.pattern(22, 40, 78, 84, shade(p.look.a, 80))


def shelf(p: Pen) -> None:
    p.rect(2, 2, 98, 98, shade(p.look.a, 70))
    for y in (8, 54):
        p.rect(8, y, 92, y + 38, shade(p.look.a, 45))
        for i, x in enumerate((10, 24, 34, 50, 66)):
            p.rect(x, y + 8 + 6 * (i * p.look.build % 3), x + 10, y + 38, shade(p.look.b, 60 + 25 * (i % 3)))


def stone(p: Pen) -> None:
    p.poly([(6, 98), (2, 60), (26, 18), (64, 10), (94, 48), (98, 98)], (142, 138, 132))
    p.poly([(26, 18), (64, 10), (58, 44), (24, 50)], (166, 162, 154))


def bush(p: Pen) -> None:
    green = shade((84, 124, 58), 70 + 10 * p.look.build)
    p.oval(0, 34, 52, 104, green)
    p.oval(40, 28, 100, 104, shade(green, 88))
    p.oval(20, 8, 76, 90, shade(green, 108))


def flag(p: Pen) -> None:
    p.rect(10, 0, 16, 100, (120, 118, 116))
    p.poly([(16, 4), (96, 22), (16, 44)] if p.look.build % 2 else [(16, 4), (94, 8), (90, 44), (16, 40)], p.look.a)


def fence(p: Pen) -> None:
    wood = shade(p.look.a, 85)
    for x in range(2, 92, 19):
        p.rect(x, 6, x + 9, 99, wood)
    p.rect(0, 28, 100, 40, shade(wood, 88))
    p.rect(0, 66, 100, 78, shade(wood, 88))


def board(p: Pen) -> None:
    p.rect(10, 40, 18, 100, DARK)
    p.rect(82, 40, 90, 100, DARK)
    p.rect(0, 4, 100, 62, p.look.a)
    p.pattern(8, 12, 92, 54, p.look.b)


def puddle(p: Pen) -> None:
    p.oval(0, 74, 80, 100, (120, 136, 146))
    p.oval(34, 68, 100, 92, (132, 148, 158))


CLUTTER = {
    f.__name__: f
    for f in (frame, crate, plate, bottle, cloth, post, cushion, shelf, stone, bush, flag, fence, board, puddle)
}
