"""Decoding: every mode, every orientation, broken files; overlays and contact sheets."""

import io
import os
import socket
import struct
import sys
import threading
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from mljax import untrusted
from mljax.data.files import fingerprint
from mljax.data.source import Files
from mljax.errors import UserError
from mljax.pictures.drawing import contact_sheet, heat_colours, overlay
from mljax.pipeline.images import MAX_PIXELS, ImageError, decode


def picture(height=24, width=32, channels=3, seed=0):
    """Smooth and without symmetry, so that JPEG keeps it and every turn shows."""
    y, x = np.mgrid[:height, :width]
    planes = [40 + 150 * x / width + 20 * c + 10 * seed - (60 - 15 * c) * y / height for c in range(channels)]
    return np.clip(np.stack(planes, -1), 0, 255).astype(np.uint8)


def encode(image, format, **settings):
    buffer = io.BytesIO()
    image.save(buffer, format, **settings)
    return buffer.getvalue()


def png(size, mode_bits=8, colour_type=2, rest=b""):
    """A PNG header of any size, by hand."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", *size, mode_bits, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rest)) + chunk(b"IEND", b"")


def pixels(image):
    assert isinstance(image, Image.Image) and image.mode == "RGB"
    array = np.asarray(image)
    assert array.dtype == np.uint8
    return array.astype(int)


# What undoes each orientation, from the EXIF standard: where row 0 and column 0 of the stored picture lie.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],  # top, right
    3: lambda a: a[::-1, ::-1],  # bottom, right
    4: lambda a: a[::-1],  # bottom, left
    5: lambda a: a.swapaxes(0, 1),  # left, top
    6: lambda a: np.rot90(a, -1),  # right, top
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),  # right, bottom
    8: lambda a: np.rot90(a, 1),  # left, bottom
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(
    ("format", "settings", "tolerance"),
    [("PNG", {}, 0), ("TIFF", {}, 0), ("WEBP", {"lossless": True}, 0), ("JPEG", {"quality": 95, "subsampling": 0}, 4)],
)
def test_orientation(orientation, format, settings, tolerance):
    stored = picture()
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(stored), format, exif=exif, **settings)
    expected = UPRIGHT[orientation](stored)
    for decoder in ("pillow", "simplejpeg"):
        found = pixels(decode(data, decoder=decoder))
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= tolerance
    opened = Image.open(io.BytesIO(data))
    assert np.abs(pixels(decode(opened)) - expected).max() <= tolerance


@pytest.mark.parametrize("value", [0, 9, 300])
def test_unknown_orientation_is_none(value):
    exif = Image.Exif()
    exif[0x0112] = value
    data = encode(Image.fromarray(picture()), "PNG", exif=exif)
    np.testing.assert_array_equal(pixels(decode(data)), picture())


def on_white(rgb, alpha):
    alpha = alpha[..., None] / 255
    return rgb * alpha + 255 * (1 - alpha)


def palette_image(transparency):
    image = Image.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2)).convert("P")
    image.putpalette([10, 20, 30, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    image.info = {"transparency": transparency} if transparency is not None else {}
    return image


def cases():
    rgb, alpha = picture().astype(float), picture(channels=1, seed=3)[..., 0]
    grey = picture(channels=1)[..., 0]
    grey3 = np.repeat(grey[..., None], 3, 2)
    four = np.dstack([picture(), alpha])
    ink = np.dstack([picture(), picture(channels=1, seed=5)])
    wide = (np.arange(24 * 32).reshape(24, 32) * 85).astype(np.uint16)
    colours = np.array([[10, 20, 30], [200, 0, 0], [0, 200, 0], [0, 0, 200]]).reshape(2, 2, 3)
    see_through = np.array([[0, 128], [255, 255]])
    one = np.where(grey > 100, 255, 0)

    yield "RGB png", encode(Image.fromarray(picture()), "PNG"), rgb, 0
    yield "RGB bmp", encode(Image.fromarray(picture()), "BMP"), rgb, 0
    yield "RGB ppm", encode(Image.fromarray(picture()), "PPM"), rgb, 0
    yield "grey png", encode(Image.fromarray(grey), "PNG"), grey3, 0
    yield "grey jpeg", encode(Image.fromarray(grey), "JPEG", quality=95), grey3, 3
    yield "grey transparent", encode(Image.fromarray(one.astype(np.uint8)), "PNG", transparency=0), grey3 * 0 + 255, 0
    yield "1 bit", encode(Image.fromarray(one.astype(np.uint8)).convert("1"), "PNG"), np.dstack([one] * 3), 0
    yield "palette", encode(palette_image(None), "PNG"), colours, 0
    yield "palette, bytes", encode(palette_image(bytes([0, 128, 255, 255])), "PNG"), on_white(colours, see_through), 1
    yield "palette, index", encode(palette_image(2), "PNG"), on_white(colours, np.array([[255, 255], [0, 255]])), 0
    yield "palette gif", encode(palette_image(None), "GIF"), colours, 0
    yield "RGBA", encode(Image.fromarray(four), "PNG"), on_white(rgb, alpha), 1
    yield "RGBA webp", encode(Image.fromarray(four), "WEBP", lossless=True, exact=True), on_white(rgb, alpha), 1
    yield "LA", encode(Image.fromarray(np.dstack([grey, alpha])), "PNG"), on_white(grey3, alpha), 1
    key = tuple(int(v) for v in picture()[3, 4])
    keyed = np.where((picture() == key).all(-1, keepdims=True), 255, picture())
    yield "RGB with a transparent colour", encode(Image.fromarray(picture()), "PNG", transparency=key), keyed, 0
    yield "I;16 png", encode(Image.fromarray(wide), "PNG"), np.repeat(wide[..., None] / 257, 3, 2), 0.51
    yield "I;16 tiff", encode(Image.fromarray(wide), "TIFF"), np.repeat(wide[..., None] / 257, 3, 2), 0.51
    yield "I tiff", encode(Image.fromarray(wide.astype(np.int32)), "TIFF"), np.repeat(wide[..., None] / 257, 3, 2), 0.51
    real = (wide / 65535).astype(np.float32)
    yield "F tiff", encode(Image.fromarray(real), "TIFF"), np.repeat(real[..., None] * 255, 3, 2), 0.51
    paper = (255 - ink[..., :3].astype(float)) * (255 - ink[..., 3:].astype(float)) / 255
    cmyk = Image.frombytes("CMYK", (32, 24), ink.tobytes())
    yield "CMYK tiff", encode(cmyk, "TIFF"), paper, 1
    yield "CMYK jpeg", encode(cmyk, "JPEG", quality=98), paper, 6
    yield "one pixel", encode(Image.new("RGB", (1, 1), (7, 8, 9)), "PNG"), np.array([[[7, 8, 9]]]), 0
    frames = [Image.new("RGB", (5, 4), c) for c in ((250, 0, 0), (0, 250, 0))]
    first = np.full((4, 5, 3), (250, 0, 0))
    for format, settings in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True})):
        data = encode(frames[0], format, save_all=True, append_images=frames[1:], **settings)
        assert Image.open(io.BytesIO(data)).n_frames == 2
        yield f"animated {format}", data, first, 0


@pytest.mark.parametrize(("data", "expected", "tolerance"), [pytest.param(*c[1:], id=c[0]) for c in cases()])
def test_modes(data, expected, tolerance):
    found = pixels(decode(data))
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance
    np.testing.assert_array_equal(pixels(decode(data, decoder="simplejpeg")), found)


@pytest.mark.parametrize("mode", ["PA", "La", "RGBa", "RGBX", "YCbCr", "HSV", "I;16B"])
def test_modes_that_only_exist_in_memory(mode):
    start = Image.new("RGB", (3, 2), (255, 255, 255))
    if mode == "PA":
        image = start.convert("RGBA").convert("PA")
    elif mode in ("La", "RGBa"):
        image = start.convert({"La": "LA", "RGBa": "RGBA"}[mode]).convert(mode)
    elif mode == "I;16B":
        image = Image.frombytes(mode, (3, 2), b"\xff" * 12)
    else:
        image = start.convert(mode)
    assert image.mode == mode
    assert pixels(decode(image)).min() >= 254


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"subsampling": 0},
        {"subsampling": 1},
        {"progressive": True},
        {"quality": 30},
        {"keep_rgb": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(64, 48), (37, 61), (1, 1)])
def test_decoders_agree(settings, size):
    rng = np.random.default_rng(1)
    noise = Image.fromarray(rng.integers(0, 256, (9, 11, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    data = encode(noise, "JPEG", **settings)
    plain = pixels(decode(data, decoder="pillow"))
    np.testing.assert_array_equal(pixels(decode(data, decoder="simplejpeg")), plain)
    np.testing.assert_array_equal(pixels(decode(data)), plain)
    np.testing.assert_array_equal(plain, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_decoder_names(monkeypatch):
    with pytest.raises(UserError, match="did you mean 'pillow'"):
        decode(b"", decoder="pilow")
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    data = encode(Image.fromarray(picture()), "JPEG")
    with pytest.raises(UserError, match="pip install simplejpeg"):
        decode(data, decoder="simplejpeg")
    assert decode(data).size == (32, 24)


def jpeg():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    return encode(Image.fromarray(noise), "JPEG", quality=90)


def integers_beyond_16_bits():
    return encode(Image.fromarray(np.array([[0, 70000]], np.int32)), "TIFF")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b"\x00", "known format"),
        (b"<html>404</html>", "known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "known format"),
        (b"\xff\xd8", "known format"),
        (jpeg()[:-900], "truncated or damaged"),
        (jpeg()[: len(jpeg()) // 2], "truncated or damaged"),
        (jpeg()[:200], "known format|truncated or damaged"),
        (encode(Image.fromarray(picture()), "PNG")[:-40], "truncated or damaged"),
        (encode(Image.fromarray(picture()), "GIF")[:60], "known format|truncated or damaged"),
        (encode(Image.fromarray(picture()), "WEBP")[:60], "known format|truncated or damaged"),
        (encode(Image.fromarray(picture()), "TIFF")[:90], "known format|truncated or damaged"),
        (encode(Image.fromarray(picture()), "BMP")[:90], "truncated or damaged"),
        (integers_beyond_16_bits(), "outside 0..65535"),
        (png((30000, 30000)), "too large"),
        (png((9000, 9000)), "9000 x 9000"),  # below Pillow's limit, above ours
        (png((11000, 11000)), "11000 x 11000"),  # Pillow warns
        (png((0, 5)), "known format|no pixels"),
    ],
)
@pytest.mark.parametrize("decoder", ["pillow", "simplejpeg"])
def test_broken(data, reason, decoder):
    with pytest.raises(ImageError, match=reason) as caught:
        decode(data, where="000123.jpg", decoder=decoder)
    message = str(caught.value)
    assert "000123.jpg" in message and "\n" not in message and message.endswith(".") and ". " not in message
    assert isinstance(caught.value, UserError)


def test_any_truncation_decodes_or_is_an_image_error():
    files = [encode(Image.fromarray(picture(8, 8)), f) for f in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP")]
    for whole in files:
        for length in range(0, len(whole), 23):
            try:
                assert decode(whole[:length]).size == (8, 8)
            except ImageError:
                continue


def test_any_damage_decodes_or_is_an_image_error():
    rng = np.random.default_rng(2)
    for format in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"):
        whole = np.frombuffer(encode(Image.fromarray(picture(8, 8)), format), np.uint8)
        for _ in range(40):
            hurt = whole.copy()
            hurt[rng.integers(len(hurt), size=4)] = rng.integers(256, size=4)
            try:
                assert decode(hurt.tobytes()).mode == "RGB"
            except ImageError:
                continue


def test_the_limit_itself():
    assert MAX_PIXELS == 8192 * 8192
    with pytest.raises(ImageError, match="too large") as caught:
        decode(png((8193, 8192)))
    assert "8193 x 8192" in str(caught.value) and "67,108,864" in str(caught.value)
    with pytest.raises(ImageError, match="truncated"):  # not refused by size; no pixels follow
        decode(png((8192, 8192), 1, 0))
    with pytest.raises(ImageError, match="too large"):
        decode(np.broadcast_to(np.uint8(0), (8193, 8192)))


def test_no_warning_of_pillow_leaks():
    # An EXIF block whose only entry points outside of it: Pillow warns of it.
    tiff = b"MM\x00*\x00\x00\x00\x08\x00\x01\x01\x0f\x00\x02\x00\x00\x00\x40\x00\x00\x7f\x00\x00\x00\x00\x00"
    data = encode(Image.fromarray(picture()), "JPEG", exif=b"Exif\x00\x00" + tiff)
    with pytest.warns(UserWarning, match="Tag data|EXIF"):
        dict(Image.open(io.BytesIO(data)).getexif())
    palette = palette_image(bytes([0, 128, 255, 255]))
    with pytest.warns(UserWarning, match="Transparency"):
        palette.convert("RGB")

    def work():
        for _ in range(20):
            with warnings.catch_warnings():  # what other threads do meanwhile
                warnings.simplefilter("error")
                decode(data)
                decode(palette)

    failures = []

    def guarded():
        try:
            work()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(data)
        with pytest.raises(UserWarning):  # everyone else's warnings are as they were
            warnings.warn("mine", stacklevel=1)


def test_paths(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encode(Image.fromarray(picture()), "PNG"))
    for form in (path, str(path), path.read_bytes(), bytearray(path.read_bytes()), memoryview(path.read_bytes())):
        np.testing.assert_array_equal(pixels(decode(form)), picture())
    with pytest.raises(ImageError, match=r"missing\.png cannot be read \(no such file"):
        decode(tmp_path / "missing.png")
    with pytest.raises(ImageError, match="a folder, not a regular file"):
        decode(str(tmp_path))
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(ImageError, match=r"empty\.jpg is empty"):
        decode(tmp_path / "empty.jpg")
    with pytest.raises(ImageError, match=r"x\.jpg has the type int"):
        decode(3, where="x.jpg")  # pyright: ignore


def test_arrays():
    rgb, grey = picture(), picture(channels=1)
    alpha = picture(channels=1, seed=3)
    np.testing.assert_array_equal(pixels(decode(rgb)), rgb)
    np.testing.assert_array_equal(pixels(decode(rgb[:, ::-1])), rgb[:, ::-1])  # not contiguous
    np.testing.assert_array_equal(pixels(decode(grey)), np.repeat(grey, 3, 2))
    np.testing.assert_array_equal(pixels(decode(grey[..., 0])), np.repeat(grey, 3, 2))
    four = pixels(decode(np.dstack([rgb, alpha])))
    assert np.abs(four - on_white(rgb, alpha[..., 0])).max() <= 1
    for dtype in (np.float16, np.float32, np.float64):
        np.testing.assert_array_equal(pixels(decode((rgb / 255).astype(dtype))), rgb)
    np.testing.assert_array_equal(pixels(decode(np.float32([[0.5, 1.0]]))), [[[128] * 3, [255] * 3]])
    assert decode(np.zeros((1, 1), np.uint8)).size == (1, 1)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((2, 2, 2), np.uint8), "shape"),
        (np.zeros((2, 2, 5), np.uint8), "shape"),
        (np.zeros((1, 2, 2, 3), np.uint8), "shape"),
        (np.zeros(4, np.uint8), "shape"),
        (np.zeros((0, 4, 3), np.uint8), "empty"),
        (np.zeros((2, 2, 3), np.int32), "type int32"),
        (np.zeros((2, 2), bool), "type bool"),
        (np.full((2, 2, 3), 1.01), "outside"),
        (np.full((2, 2, 3), -0.01), "outside"),
        (np.full((2, 2, 3), np.nan), "outside"),
    ],
)
def test_wrong_arrays(array, reason):
    with pytest.raises(ImageError, match=reason) as caught:
        decode(array, where="view 3")
    assert "view 3" in str(caught.value)


def test_an_rgb_image_is_handed_through():
    image = Image.fromarray(picture())
    assert decode(image) is image


def test_heat_colours():
    colours = heat_colours(np.linspace(0, 1, 101)).astype(int)
    np.testing.assert_array_equal(colours[[0, 50, 100]], [[13, 8, 80], [205, 50, 90], [252, 250, 170]])
    np.testing.assert_array_equal(colours[25], [110, 20, 140])
    luminance = colours @ [0.299, 0.587, 0.114]
    assert (np.diff(luminance) > 0).all()


def test_overlay():
    image = Image.new("RGB", (66, 44), (100, 150, 200))
    attention = np.zeros((4, 6), np.float32)
    attention[1, 2] = 3.0
    drawn = pixels(overlay(image, attention, strength=0.5))
    assert drawn.shape == (44, 66, 3)
    np.testing.assert_array_equal(drawn[35, 5], (100, 150, 200))  # no heat: as it was
    hot = np.array((100, 150, 200)) / 2 + np.array((252, 250, 170)) / 2
    assert np.abs(drawn[16, 27] - hot).max() <= 1  # the middle of the hot cell: rows 11-21, columns 22-32
    changed = np.argwhere((drawn != (100, 150, 200)).any(-1))
    assert changed.min(0).tolist() >= [6, 17] and changed.max(0).tolist() <= [27, 38]  # half a cell around it
    np.testing.assert_array_equal(pixels(overlay(image, np.full((3, 3), 7.0))), np.asarray(image))
    # With fixed limits, a constant map is a constant colour: heat (7 - 5) / (9 - 5) = 0.5 covers 0.6 * 0.5.
    fixed = pixels(overlay(image, np.full((3, 3), 7.0), low=5, high=9))
    expected = 0.7 * np.array((100, 150, 200)) + 0.3 * np.array((205, 50, 90))
    assert np.abs(fixed - expected).max() <= 1
    assert overlay(image.convert("L"), attention).mode == "RGB"
    for bad in (np.zeros((2, 2, 2)), np.zeros((0, 2)), np.full((2, 2), np.nan)):
        with pytest.raises(UserError, match="attention map"):
            overlay(image, bad)


def test_contact_sheet():
    images = [Image.new("RGB", (10, 10), "red"), Image.new("RGB", (40, 20), "green"), Image.new("L", (1, 50), 0)]
    sheet = contact_sheet(images, ["cat", "dog, Überraschung 猫\nsecond line", "x" * 500], columns=2, cell=40, gap=4)
    array = pixels(sheet)
    assert array.shape[1] == 4 + 2 * 44
    text = (array.shape[0] - 4 - 2 * 44) // 2
    assert array.shape[0] == 4 + 2 * (44 + text) and text > 10
    np.testing.assert_array_equal(array[4:44, 4:44], np.full((40, 40, 3), (255, 0, 0)))
    np.testing.assert_array_equal(array[14:34, 48:88], np.full((20, 40, 3), (0, 128, 0)))
    assert (array[4:13, 48:88] == 255).all()  # its aspect kept, white around
    assert (array[44 : 44 + text, 4:44] < 128).any()  # a caption
    below = array[4 + 44 + text :]
    assert (below[40:, 46:] == 255).all()  # a long caption is cut to its cell
    assert (below[:, 4:44] == 0).any()
    assert contact_sheet(images[:1], ["one"]).width == 8 + 224 + 8
    assert contact_sheet(images[:1], [""], columns=7).width == 8 + 224 + 8
    for wrong in (([], []), (images, ["a"])):
        with pytest.raises(UserError, match="caption"):
            contact_sheet(*wrong)


def test_special_files_are_errors_at_once(tmp_path):
    """Neither a decoder nor a data set ever waits for them."""
    os.mkfifo(tmp_path / "fifo.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.jpg"))
    (tmp_path / "folder.jpg").mkdir()
    for path, kind in {"fifo": "a FIFO", "socket": "a socket", "folder": "a folder", "zero": "a device"}.items():
        path = str(tmp_path / f"{path}.jpg") if path != "zero" else "/dev/zero"
        with pytest.raises(ImageError, match=f"The image {path} cannot be read .{kind}, not a regular file"):
            decode(path)
        with pytest.raises(OSError, match=f"{kind}, not a regular file: '{path}'"):
            Files([path])(0)
        with pytest.raises(UserError, match=f"The list names images that are not files: '{path}' is {kind}; remove"):
            fingerprint(["a"], [path], np.zeros((1, 1), np.uint8), where="The list")
    with (tmp_path / "large.jpg").open("wb") as file:
        file.truncate(untrusted.MAX_IMAGE + 1)
    with pytest.raises(ImageError, match="536,870,913 bytes, at most 536,870,912 are read"):
        decode(tmp_path / "large.jpg")
