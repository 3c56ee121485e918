"""Pictures decoded when asked for: the pixels of Pillow, and resizers that are what they say."""

import io

import numpy as np
import pytest
from PIL import Image

from mljax.data.source import Files, Source
from mljax.errors import UserError
from mljax.pipeline import loader, picture, transforms
from mljax.pipeline.images import ImageError, decode
from mljax.pipeline.picture import Picture, crop_and_resize


def smooth(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


EXIF = Image.Exif()
EXIF[0x0112] = 6
KINDS = {
    "jpeg": (encoded(smooth(61, 43)), True),
    "444": (encoded(smooth(61, 43), subsampling=0), True),
    "progressive": (encoded(smooth(61, 43), progressive=True), True),
    "grey": (encoded(smooth(61, 43).convert("L")), True),
    "cmyk": (encoded(smooth(61, 43).convert("CMYK")), False),
    "turned": (encoded(smooth(61, 43), exif=EXIF), False),
    "png": (encoded(smooth(61, 43), "PNG"), False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_and_size_are_those_of_pillow(kind):
    data, lazy = KINDS[kind]
    found = Picture(data)
    expected = decode(data, decoder="pillow")
    assert found.size == expected.size and (found._data is not None) == lazy
    np.testing.assert_array_equal(found.array(), np.asarray(expected))
    np.testing.assert_array_equal(np.asarray(Picture(data).image()), np.asarray(expected))


def test_real_photos_decode_as_in_pillow(real_data):
    paths = sorted((real_data / "coco_photos" / "images").rglob("*.jpg"))[:60]
    for path in paths:
        data = path.read_bytes()
        np.testing.assert_array_equal(Picture(data).array(), np.asarray(decode(data, decoder="pillow")))


def test_without_simplejpeg_pillow_decodes(monkeypatch):
    data = KINDS["jpeg"][0]
    expected = Picture(data).array()
    monkeypatch.setattr(picture, "_simplejpeg", lambda: None)
    np.testing.assert_array_equal(Picture(data).array(), expected)


@pytest.mark.parametrize("cut", [1, 100, 400])
def test_truncated_files_are_told(cut):
    data = KINDS["jpeg"][0]
    with pytest.raises(ImageError, match="image 7 is"):
        Picture(data[:-cut], "7").array()
    with pytest.raises(ImageError, match="image 8 is not a picture"):
        Picture(b"no picture", "8")


BOX = (7, 5, 50, 41)


@pytest.mark.parametrize("size", [16, 36, 90])
@pytest.mark.parametrize("resize", ["bilinear", "bicubic", "lanczos", "box", "nearest"])
def test_reference_is_pillow_on_the_whole_image(size, resize):
    """Only the pixels that the filter reaches are copied: the same result to the last bit."""
    image = decode(KINDS["jpeg"][0])
    expected = image.resize((size, size), picture.RESIZE[resize], box=BOX)
    found = crop_and_resize(Picture(KINDS["jpeg"][0]), BOX, size, resize)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    square = image.resize((50, 50), picture.RESIZE[resize])
    expected = square.resize((size, size), picture.RESIZE[resize], box=(0, 5, 43, 41))
    found = crop_and_resize(Picture(KINDS["jpeg"][0]), (0, 5, 43, 41), size, resize, pre_size=50)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def linear(part: np.ndarray, size: int) -> np.ndarray:
    """Bilinear interpolation at pixel centres, edges repeated, by the definition."""
    out = part.astype(np.float64)
    for axis in (0, 1):
        place = np.clip((np.arange(size) + 0.5) * part.shape[axis] / size - 0.5, 0, part.shape[axis] - 1)
        low = np.minimum(np.floor(place).astype(int), part.shape[axis] - 2)
        weight = (place - low).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        out = np.take(out, low, axis) * (1 - weight) + np.take(out, low + 1, axis) * weight
    return out


@pytest.mark.parametrize("size", [24, 64, 90])
def test_fast_is_bilinear_interpolation(size):
    found = crop_and_resize(Picture(KINDS["jpeg"][0]), BOX, size, "fast")
    part = np.asarray(decode(KINDS["jpeg"][0]))[5:41, 7:50]
    assert np.abs(np.asarray(found) - linear(part, size)).max() <= 1.01


@pytest.mark.parametrize("size", [16, 40, 64, 90])
def test_antialias_is_the_reference_up_to_rounding(size):
    """Of the crop alone, as the papers' code resizes it."""
    part = decode(KINDS["jpeg"][0]).crop(BOX)
    expected = np.asarray(part.resize((size, size), Image.Resampling.BILINEAR)).astype(int)
    found = np.asarray(crop_and_resize(Picture(KINDS["jpeg"][0]), BOX, size, "antialias"))
    assert np.abs(found - expected).max() <= 1


def test_same_size_is_a_copy():
    for resize in ("bilinear", "fast", "antialias"):
        found = crop_and_resize(Picture(KINDS["jpeg"][0]), (3, 2, 33, 32), 30, resize)
        np.testing.assert_array_equal(np.asarray(found), np.asarray(decode(KINDS["jpeg"][0]))[2:32, 3:33])


def test_squish_and_crop_in_one_pass():
    """The part of the square is the same part of the picture."""
    whole = smooth(80, 60)
    found = crop_and_resize(Picture(whole), (20, 10, 30, 30), 32, "fast", pre_size=40)
    expected = crop_and_resize(Picture(whole), (40, 15, 60, 45), 32, "fast")
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize("resize", ["bilinear", "fast"])
def test_scaled_decoding(resize, monkeypatch):
    """At a half where the crop allows it, close to the whole; not where it does not."""
    data = encoded(smooth(640, 480), quality=95)
    box = (0, 0, 640, 480)
    scaled = np.asarray(crop_and_resize(Picture(data), box, 100, resize, scaled=True)).astype(int)
    whole = np.asarray(crop_and_resize(Picture(data), box, 100, "bilinear")).astype(int)
    assert np.abs(scaled - whole).mean() < 2 and np.abs(scaled - whole).max() < 40
    assert Picture(data).at_least(320, 240).shape == (240, 320, 3)
    assert Picture(data).at_least(321, 240).shape == (480, 640, 3)
    assert Picture(data).at_least(10, 10).shape == (60, 80, 3)
    assert Picture(KINDS["png"][0]).at_least(2, 2).shape == (43, 61, 3)
    monkeypatch.setattr(Picture, "at_least", None)  # would fail if it were asked
    crop_and_resize(Picture(data), box, 300, resize, scaled=True)


def test_opencv_is_an_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    picture.opencv.cache_clear()
    try:
        with pytest.raises(UserError, match=r"resize='fast' needs OpenCV: pip install 'mljax\[fast\]'"):
            transforms.train(32, resize="fast")
        assert transforms.train(32).resize == "bilinear"
    finally:
        picture.opencv.cache_clear()


@pytest.mark.parametrize("resize", ["bilinear", "antialias", "fast"])
@pytest.mark.parametrize("recipe", [{}, {"crop": "ssgrl"}, {"randaugment": "package", "cutout": 0.5}], ids=str)
def test_a_picture_and_an_image_give_the_same(resize, recipe):
    transform = transforms.train(32, resize=resize, **recipe)
    data = KINDS["jpeg"][0]
    for seed in range(6):
        found = transform(Picture(data), np.random.default_rng(seed))
        expected = transform(decode(data), np.random.default_rng(seed))
        assert found.shape == (32, 32, 3) and found.dtype == np.uint8
        np.testing.assert_array_equal(found, expected)
    assert transforms.evaluate(32, resize=resize, flip=True)(Picture(data)).shape == (32, 32, 3)


def test_flip_is_the_mirror_image():
    always = {"flip": 1.0}, {"flip": 0.0}
    for resize in ("bilinear", "fast"):
        one, other = (
            transforms.train(32, resize=resize, **flip)(smooth(50, 40), np.random.default_rng(0)) for flip in always
        )
        np.testing.assert_array_equal(one, other[:, ::-1])


@pytest.fixture
def source(tmp_path) -> Source:
    paths = []
    for i in range(20):
        paths.append(str(tmp_path / f"{i}.jpg"))
        smooth(40 + i, 50, i).save(paths[-1])
    labels = np.eye(20, 5, dtype=np.uint8)
    ones = np.ones_like(labels)
    return Source(
        name="tiny", classes=tuple("abcde"), ids=paths, labels=labels, observed=ones, scored=ones, read=Files(paths),
        fingerprint="",
    )  # fmt: skip


@pytest.mark.parametrize("resize", ["bilinear", "fast"])
def test_batches_depend_on_seed_and_step_alone(source, resize):
    """Threads, and a resume, give the same batches."""
    transform = transforms.train(24, crop="random_resized", resize=resize)

    def batches(start, threads):
        found = loader.train_batches(
            source, transform, batch_size=6, seed=3, start=start, steps=7, threads=threads, views=2
        )
        return list(found)

    whole = batches(0, 0)
    assert len(whole) == 7
    for start, threads in ((0, 3), (4, 2), (6, 0)):
        for one, other in zip(batches(start, threads), whole[start:], strict=True):
            for key in other:
                np.testing.assert_array_equal(one[key], other[key])
    assert (whole[0]["views"][:, 0] == whole[0]["image"]).all() and (whole[0]["image"] != whole[1]["image"]).any()


def test_a_photo_cut_short_is_masked_in_training_and_an_error_in_evaluation(source, caplog):
    path = source.read.paths[4]
    with open(path, "r+b") as file:
        file.truncate(300)
    transform = transforms.train(24)
    batches = loader.train_batches(source, transform, batch_size=10, seed=0, start=0, steps=4, threads=0)
    assert all(((batch["index"] != 4) == batch["mask"]).all() for batch in batches)
    assert "unreadable image 1, left out" in caplog.text
    with pytest.raises(UserError, match="is evaluated, and must be complete"):
        list(loader.eval_batches(source, transforms.evaluate(24), batch_size=10, threads=0))
