"""Images that cannot be read or are unusual: each is named, and what can go on goes on."""

import errno
import json
import os

import numpy as np
import pytest
from PIL import Image

from mljax import experiment, predict, train
from mljax.commands import data as commands
from mljax.errors import UserError
from mljax.pipeline import feature_cache, loader
from mljax.pipeline.failures import Failures
from mljax.pipeline.images import decode
from own_data import damage, own, photo, pictures, saved, table

pytestmark = pytest.mark.usefixtures("surroundings")


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A folder of photos as people have them: eight of ten kinds can be read."""
    folder = tmp_path_factory.mktemp("odd")
    picture = photo(0)
    picture.save(folder / "good.jpg")
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    picture.convert("P").save(folder / "palette.png")
    picture.convert("L").save(folder / "grey.jpg")
    picture.convert("RGBA").save(folder / "rgba.png")
    Image.fromarray(np.linspace(0, 65535, 1200).reshape(30, 40).astype(np.uint16)).save(folder / "deep.png")
    picture.save(folder / "animated.gif", save_all=True, append_images=[photo(1), photo(2)])
    Image.new("RGB", (1, 1), "red").save(folder / "pixel.png")
    whole = (folder / "good.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    header = b"P4\n30000 30000\n"  # 900 million pixels, none of them there: refused before they are asked for
    (folder / "huge.png").write_bytes(header)
    (folder / "._good.jpg").write_bytes(b"of another system")
    return folder


def test_predict_reports_each_photo_and_goes_on(finished_run, odd, tmp_path, capsys):
    argv = [str(odd), f"--workdir={finished_run}", "--top=2", "--json", f"--overlay={tmp_path / 'maps'}"]
    assert predict.main(argv) == 1
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    read = {os.path.basename(line["image"]) for line in lines if len(line.get("labels", ())) == 2}
    good = {"good.jpg", "cmyk.jpg", "palette.png", "grey.jpg", "rgba.png", "deep.png", "animated.gif", "pixel.png"}
    assert read == good
    bad = {os.path.basename(line["image"]): line["error"] for line in lines if "error" in line}
    assert bad.keys() == {"truncated.jpg", "empty.jpg", "huge.png"}
    assert "is empty (0 bytes)" in bad["empty.jpg"] and "too large" in bad["huge.png"]
    assert "truncated" in bad["truncated.jpg"] and "3 of 11 photos could not be read" in err
    assert len(list((tmp_path / "maps").iterdir())) == 2 * len(good)


def test_photos_of_one_name_keep_their_overlays(finished_run, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        photo(3).save(tmp_path / folder / "x.jpg")
    assert predict.main([str(tmp_path / "a"), str(tmp_path / "b"), f"--workdir={finished_run}", "--top=1",
                         f"--overlay={tmp_path / 'maps'}"]) == 0  # fmt: skip
    assert len(list((tmp_path / "maps").iterdir())) == 2


def test_one_class_and_images_that_cannot_be_read(tmp_path, capsys, caplog):
    """One to train on is skipped and named once; one to evaluate stops the run, which goes on when it is mended."""
    rows = [f"{i}.png,{'cat' if i % 2 else ''},{'val' if i > 99 else 'train'}" for i in range(108)]
    table(tmp_path / "own", rows, count=108)
    whole = (tmp_path / "own" / "105.png").read_bytes()
    damage(tmp_path / "own" / "7.png")
    damage(tmp_path / "own" / "105.png")
    with pytest.raises(UserError, match=r"image 105.png is truncated.*own/labels.csv val is evaluated"):
        train.fit(own(tmp_path / "own"), tmp_path / "run")
    assert [r.getMessage()[:45] for r in caplog.records] == ["unreadable image 1, left out: The image 7.png"]
    assert saved(tmp_path / "run") == [6]  # the epoch before it is kept
    (tmp_path / "own" / "105.png").write_bytes(whole)
    report = train.fit(own(tmp_path / "own"), tmp_path / "run")
    assert "resumed at step 6 of 18" in capsys.readouterr().err
    assert set(report["per_class_AP"]) == {"cat"} and report["step"] == 18


def read_all(found, steps, **options):
    look = feature_cache.view("8")
    return list(loader.train_batches(found, look, batch_size=4, seed=0, start=0, steps=steps, **options))


def test_more_than_one_percent_unreadable_stops(tmp_path, caplog):
    batches = read_all(pictures(tmp_path / "few", 200, bad=[3, 150]), 50)
    assert len(batches) == 50 and len(caplog.records) == 2  # 1 %: skipped, each named
    seen = [(int(i), float(mask)) for batch in batches for i, mask in zip(batch["index"], batch["mask"])]
    assert sorted(seen) == [(i, float(i not in (3, 150))) for i in range(200)]  # no other image in their place
    bad = [batch["labels"] + batch["observed"] + batch["image"].max((1, 2)) for batch in batches]
    assert all((one[batch["mask"] == 0] == 0).all() for one, batch in zip(bad, batches))
    with pytest.raises(UserError, match=r"3 of 200 training images cannot be read, more than 1%; the first: .*png"):
        read_all(pictures(tmp_path / "many", 200, bad=[3, 90, 150]), 50)


def test_cached_features_skip_what_training_skips(tmp_path, monkeypatch, caplog):
    """Rows of unreadable images are never in a batch; what is cached says so again; an evaluation refuses."""
    found = pictures(tmp_path / "own", 100, bad=[99])
    calls = []

    def encode(image):
        calls.append(len(image))
        return {"32": image[:, :1, :1, :1].astype(np.float32)}

    def endpoints(which, failures):
        looks = (feature_cache.view("8"),)
        return feature_cache.endpoints(which, looks, encode, key="k", batch_size=32, failures=failures)

    for _ in range(2):  # computed, then read
        failures = Failures(100)
        maps = endpoints(found, failures)
        assert list(failures.bad) == [99] and failures.bad[99][0] == "99.png" and maps["8"]["32"][99] == 0
    assert len(calls) == 4 and len(caplog.records) == 2
    batches = feature_cache.CachedBatches(found, maps, 50, 0, unreadable=failures.bad)
    for step in (batches[0], batches[1]):
        readable = step["index"] != 99  # which has mask 0 and no labels; no other stands in for it
        np.testing.assert_array_equal(step["mask"], readable)
        np.testing.assert_array_equal(step["endpoints"]["32"].ravel(), step["index"] * readable)
        np.testing.assert_array_equal(step["labels"].ravel(), step["index"] % 2 * readable)
    assert sorted(np.concatenate([batches[step]["index"] for step in range(2)])) == [*range(100)]
    with pytest.raises(UserError, match=r"99.png is truncated.*must be complete"):
        endpoints(found, None)
    endpoints(found.subset(np.arange(50), "[:50]"), None)  # which does not hold it
    cache = feature_cache.cache_dir() / "features"
    (entry,) = [f for f in cache.iterdir() if (f / "32.npy").is_file()]
    (entry / "32.npy").write_bytes(b"damaged")
    endpoints(found, Failures(100))
    assert len(calls) == 8  # computed anew

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"feature cache in .* cannot be written \(No space left"):
        endpoints(pictures(tmp_path / "other", 8), None)
    assert not list(cache.glob("*.partial"))


def test_bad_images_are_counted_over_resumes_and_listed(tmp_path, capsys, caplog, monkeypatch):
    """Each once, whichever start met it; the list is there in whatever way the run ended, and its total is said."""
    rows = [f"{i}.png,{'cat' if i % 2 else ''},{'val' if i > 399 else 'train'}" for i in range(408)]
    table(tmp_path / "own", rows, count=408)
    whole = (tmp_path / "own" / "405.png").read_bytes()
    for bad in (7, 100, 405):
        damage(tmp_path / "own" / f"{bad}.png")
    config, listed = own(tmp_path / "own"), tmp_path / "run" / "bad_images.txt"
    with pytest.raises(UserError, match="405.png is truncated"):
        train.fit(config, tmp_path / "run")

    def names():
        return [line.split("\t")[1] for line in listed.read_text().splitlines()[1:]]

    assert names() == ["7.png", "100.png"] and len(caplog.records) == 2
    (tmp_path / "own" / "405.png").write_bytes(whole)
    photo(7).save(tmp_path / "own" / "7.png")  # repaired: it stays on the list, and does not count
    for bad in (200, 201, 202):
        damage(tmp_path / "own" / f"{bad}.png")
    config.data.changed = "accept"  # photo 7 may be among the sampled ones
    train.fit(config, tmp_path / "run")
    assert names() == ["7.png", "100.png", "200.png", "201.png", "202.png"]
    assert f"5 training images could not be read and were left out; see {listed}" in capsys.readouterr().err
    assert len(caplog.records) == 5
    (tmp_path / "run" / "report.json").unlink()
    for bad in (300, 301):
        damage(tmp_path / "own" / f"{bad}.png")
    train.fit(config, tmp_path / "run")  # finished: nothing is read
    assert len(names()) == 5


def test_the_list_stays_where_too_many_images_end_the_first_start(tmp_path):
    rows = [f"{i}.png,cat,{'val' if i > 39 else 'train'}" for i in range(44)]
    table(tmp_path / "own", rows, count=44)
    for bad in range(20, 40):
        damage(tmp_path / "own" / f"{bad}.png")
    config, listed = own(tmp_path / "own"), tmp_path / "run" / "bad_images.txt"
    for _ in range(2):  # a list alone is not a run
        with pytest.raises(UserError, match=r"of 40 training images cannot be read.*bad_images.txt lists all"):
            train.fit(config, tmp_path / "run")
        assert len(listed.read_text().splitlines()) >= 3
    for repaired in range(20, 40):
        photo(repaired).save(tmp_path / "own" / f"{repaired}.png")
    train.fit(config, tmp_path / "run")
    assert not listed.exists()


def test_training_says_so_when_an_image_is_not_that_of_its_digest(tmp_path, caplog, capsys):
    rows = [f"{i}.png,cat,{'val' if i > 39 else 'train'}" for i in range(44)]
    table(tmp_path / "own", rows, count=44)
    flags = ("configs/baseline.py:csv", f"--config.data.file={tmp_path}/own/labels.csv")
    assert commands.main(["check", *flags, "--write"]) == 0
    source = experiment.source(own(tmp_path / "own"), "train", training=True)
    assert decode(source.read(3)).size == (40, 30)
    photo(99).save(tmp_path / "own" / "3.png")
    with pytest.raises(OSError, match=r"3.png is not the one that .*mljax-digests.json has the digest of; restore it"):
        source.read(3)
    train.fit(own(tmp_path / "own"), tmp_path / "run")
    (record,) = caplog.records
    assert "unreadable image 1, left out: The image 3.png is not the one that" in record.getMessage()
    assert "3.png" in (tmp_path / "run" / "bad_images.txt").read_text()
    part = source.subset(np.arange(2, 5), "[2:5]")  # and so of a subset, and of what its cached features are made of
    assert part.base is not None
    for rows, index in ((part, 1), (part.base, 3)):
        with pytest.raises(OSError, match="3.png is not the one"):
            rows.read(index)
    photo(98).save(tmp_path / "own" / "41.png")
    with pytest.raises(UserError, match="41.png is not the one .*val is evaluated, and must be complete"):
        train.fit(own(tmp_path / "own"), tmp_path / "other")
    assert commands.main(["check", *flags, "--write"]) == 0
    assert decode(experiment.source(own(tmp_path / "own"), "train", training=True).read(3)).size == (40, 30)
