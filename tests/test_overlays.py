"""Overlays of `predict`: label and probability can be read on any photo, and every file has a name of its own."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from mljax.errors import UserError
from mljax.pictures import drawing, overlays

MAP = np.arange(12, dtype=np.float32).reshape(3, 4)


def photo(path, size=(64, 48), colour=(10, 200, 30)):
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (128, 128, 128), (250, 145, 40)])
@pytest.mark.parametrize("size", [(1, 1), (40, 30), (500, 375), (1600, 200), (3000, 2000)])
def test_label_and_probability_stand_below_the_picture(tmp_path, size, colour):
    path = photo(tmp_path / "in" / "a.png", size, colour)
    folder = overlays.Overlays(str(tmp_path / "out"))
    folder.write(path, {"dog": 0.973}, {"dog": MAP, "cat": MAP})
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a_dog.png"]
    found = pixels(tmp_path / "out" / "a_dog.png")
    image = Image.new("RGB", size, colour)
    image.thumbnail((1600, 1600))
    width, height = image.size
    left = (found.shape[1] - width) // 2
    plain = np.asarray(drawing.overlay(image, MAP, high=overlays.scale(MAP)))
    np.testing.assert_array_equal(found[:height, left : left + width], plain)  # nothing is written on it
    strip = found[height:]
    assert (strip == 255).all(-1).mean() > 0.5 and (strip < 60).all(-1).any()  # black on white
    rows = np.flatnonzero((strip < 128).all(-1).any(1))
    assert rows[-1] - rows[0] >= 9  # letters of at least ten pixels


def test_the_text_is_the_label_with_its_probability(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(drawing, "captioned", lambda image, text: said.append(text) or image)
    folder = overlays.Overlays(str(tmp_path / "out"))
    folder.write(
        photo(tmp_path / "a.png"),
        {"dining table": 0.5, "Überraschung": 1.0},
        dict.fromkeys(("dining table", "Überraschung"), MAP),
    )
    assert said == ["dining table 0.50", "Überraschung 1.00"]


LONG = "a label that goes on and on, with_one_word_that_is_longer_than_any_line_of_a_small_picture_could_ever_be"


@pytest.mark.parametrize("size", [(32, 32), (300, 200), (1600, 1000)])
def test_a_long_label_is_broken_into_lines(size):
    image = Image.new("RGB", size, "red")
    one, many = drawing.captioned(image, "x 0.50"), drawing.captioned(image, f"{LONG} 0.50")
    assert one.width == many.width and (many.height > one.height or size[0] == 1600)
    array = np.asarray(many).astype(int)
    dark = np.argwhere((array[size[1] :] < 128).all(-1))
    assert dark[:, 1].max() < many.width - 1 and dark[:, 0].max() < len(array) - size[1] - 1  # nothing is cut off
    font, _ = drawing.lettering("x", 14)
    lines = drawing._wrapped(LONG, font, 150)
    assert "".join(lines).replace(" ", "") == LONG.replace(" ", "") and all(font.getlength(l) <= 150 for l in lines)


def test_letters_that_no_font_has_are_written_plainly(monkeypatch):
    """Pillow's own font has ASCII alone; where the machine has no other, accents fall, and the rest are numbers."""
    monkeypatch.setattr(drawing, "_others", lambda size: [])
    assert drawing.lettering("dog 0.97", 20)[1] == "dog 0.97"
    assert drawing.lettering("café Łódź 猫\t", 20)[1] == "cafe \\u0141odz \\u732b\\u0009"
    assert drawing.lettering("Überraschung", 20)[1] == "Uberraschung"


def test_a_font_that_has_the_letters_is_found(monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    path = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    monkeypatch.setattr(drawing, "_others", lambda size: [ImageFont.truetype(path, size)])
    font, text = drawing.lettering("собака café Ω", 20)
    assert text == "собака café Ω" and font.getname()[0] == "DejaVu Sans"
    assert drawing.lettering("猫 собака", 20)[1] == "\\u732b собака"
    assert drawing.lettering("dog", 20)[0].getname()[0] == "Aileron"


def test_every_label_and_photo_has_a_file_of_its_own(tmp_path):
    folder = overlays.Overlays(str(tmp_path / "out"))
    long = ["猫" * 100, "猫" * 100 + "!", "wine glass", "wine-glass"]
    paths = [photo(tmp_path / part / f"{'x' * 200}.png") for part in ("a", "b")]
    for path in paths:
        folder.write(path, dict.fromkeys(long, 0.5), dict.fromkeys(long, MAP))
    names = [p.name for p in (tmp_path / "out").iterdir()]
    assert len(names) == 8 and all(len(name.encode()) <= 255 for name in names)


def test_a_folder_that_goes_away_is_one_sentence(tmp_path):
    folder = overlays.Overlays(str(tmp_path / "out"))
    (tmp_path / "out").rmdir()
    with pytest.raises(UserError, match=r"a_dog.png cannot be written \(No such file"):
        folder.write(photo(tmp_path / "a.png"), {"dog": 0.5}, {"dog": MAP})
