"""Data sets from their official places: download with resume, check, unpack; or what to put where, by hand.

An archive that lies under ROOT already (put there by hand) is used as if it had been downloaded. A download goes to
NAME.part and goes on where it stopped; it gets its name when its size and sha256 are right. What is unpacked is checked
before the first file is written: nothing may lie outside ROOT, and links are refused.
"""

import dataclasses
import hashlib
import http.client
import os
import shlex
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from mljax.data.unpack import unpack
from mljax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Archive:
    """A file to fetch and unpack.

    Attributes:
      name: of the file under ROOT.
      url: None where it cannot be had without an account or a form.
      size: bytes.
      sha256: in hexadecimal.
      into: the folder under ROOT to unpack into.
      holds: a path under ROOT that is there once it is unpacked.
    """

    name: str
    url: str | None
    size: int
    sha256: str
    into: str
    holds: str


_VOC, _COCO = "http://host.robots.ox.ac.uk/pascal/VOC", "http://images.cocodataset.org"


def _coco(kind: str, name: str, size: int, sha256: str, holds: str) -> Archive:
    return Archive(name, f"{_COCO}/{kind}/{name}", size, sha256, "coco", f"coco/{holds}")


ARCHIVES: dict[str, tuple[Archive, ...]] = {
    "voc2007": (
        Archive(
            "VOCtrainval_06-Nov-2007.tar", f"{_VOC}/voc2007/VOCtrainval_06-Nov-2007.tar", 460_032_000,
            "7d8cd951101b0957ddfd7a530bdc8a94f06121cfc1e511bb5937e973020c7508", ".",
            "VOCdevkit/VOC2007/ImageSets/Main/trainval.txt",
        ),
        Archive(
            "VOCtest_06-Nov-2007.tar", f"{_VOC}/voc2007/VOCtest_06-Nov-2007.tar", 451_020_800,
            "6836888e2e01dca84577a849d339fa4f73e1e4f135d312430c4856b5609b4892", ".",
            "VOCdevkit/VOC2007/ImageSets/Main/test.txt",
        ),
    ),
    "voc2012": (
        Archive(
            "VOCtrainval_11-May-2012.tar", f"{_VOC}/voc2012/VOCtrainval_11-May-2012.tar", 1_999_639_040,
            "e14f763270cf193d0b5f74b169f44157a4b0c6efa708f4dd0ff78ee691763bcb", ".",
            "VOCdevkit/VOC2012/ImageSets/Main/trainval.txt",
        ),
    ),
    "voc2012test": (
        Archive(
            "VOC2012test.tar", None, 1_850_626_560,
            "f08582b1935816c5eab3bbb1eb6d06201a789eaa173cdf1cf400c26f0cac2fb3", ".",
            "VOCdevkit/VOC2012/ImageSets/Main/test.txt",
        ),
    ),
    "coco2014": (
        _coco("annotations", "annotations_trainval2014.zip", 252_872_794,
              "031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009", "annotations/instances_val2014.json"),
        _coco("zips", "train2014.zip", 13_510_573_713,
              "ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775", "train2014"),
        _coco("zips", "val2014.zip", 6_645_013_297,
              "fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0", "val2014"),
    ),
    "coco2017": (
        _coco("annotations", "annotations_trainval2017.zip", 252_907_541,
              "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268", "annotations/instances_val2017.json"),
        _coco("zips", "train2017.zip", 19_336_861_798,
              "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929", "train2017"),
        _coco("zips", "val2017.zip", 815_585_330,
              "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05", "val2017"),
    ),
}  # fmt: skip

BY_HAND = {
    "nuswide": (
        "NUS-WIDE has no open download of images: ask for them at its official page, and put ImageList/,"
        " Groundtruth/TrainTestLabels/ and Flickr/ into {root}/nus_wide (or nus_wid_data.csv and its images, or SPML's"
        " formatted_*.npy and Flickr/)."
    ),
    "visual_genome": (
        "Visual Genome's images (VG_100K and VG_100K_2) come from its official page, the lists and labels from SSGRL or"
        " SST: put VG_100K/, {{train,test}}_list_500.txt and vg_category_{{200,500}}_labels_index.json into {root}/vg."
    ),
}


def advice(section: Mapping[str, Any]) -> str:
    """How the data of a config's data section can be had, as the end of a sentence; empty where nothing is known."""
    kind = str(section.get("name"))
    name = kind + str(section.get("year", {"voc": "2007", "coco": "2014"}.get(kind, "")))
    if name not in (*ARCHIVES, *BY_HAND) or (kind == "voc" and section.get("variant")):  # which is not the official one
        return ""
    root = shlex.quote(str(section.get("root") or os.environ.get("MLJAX_DATA") or "data"))
    does = "fetches it" if name in ARCHIVES else "says what to put where"
    return f"; python -m mljax.data prepare {name} --root={root} {does}"


def prepare(name: str, root: Path, *, say: Callable[[str], None] = lambda text: None) -> list[str]:
    """Fetch, check and unpack a data set.

    Args:
      name: of `ARCHIVES`; "tfds:NAME" lets TensorFlow Datasets prepare NAME; of `BY_HAND`: says what to do.
      root: the folder that becomes MLJAX_DATA.
      say: called with progress.
    Returns:
      Sentences, one for each archive, on what is there now.
    Raises:
      UserError: no such name, no network, no space, a wrong checksum, an archive that is cut short or writes elsewhere.
    """
    if name.startswith("tfds:"):
        from mljax.data.tfds import prepare as by_tfds

        return [f"{name} lies in {by_tfds(name.removeprefix('tfds:'), str(root))}."]
    if name in BY_HAND:
        raise UserError(BY_HAND[name].format(root=root))
    if name not in ARCHIVES:
        hint = nearest(name, [*ARCHIVES, *BY_HAND, "tfds:NAME"])
        raise UserError(f"{name!r} is not a data set that can be prepared{hint}.")
    done = []
    try:
        root.mkdir(parents=True, exist_ok=True)
        for archive in ARCHIVES[name]:
            if _marker(root, archive).is_file() and (root / archive.holds).exists():
                done.append(f"{archive.name} was unpacked before.")
                continue
            path = fetch(archive, root, say)
            count = unpack(path, root / archive.into, say)
            if not (root / archive.holds).exists():
                raise UserError(f"{str(path)!r} does not hold {archive.holds!r}: remove it, and run the command again.")
            _marker(root, archive).touch()
            done.append(f"{archive.name}: {count:,} files in {root / archive.into}; the archive is no longer needed.")
    except OSError as error:
        raise UserError(
            f"{str(root)!r} cannot be written ({error.strerror or error}): free space, and go on."
        ) from error
    return done


def _marker(root: Path, archive: Archive) -> Path:
    return root / f".{archive.name}.unpacked"


def fetch(archive: Archive, root: Path, say: Callable[[str], None] = lambda text: None) -> Path:
    """The archive under ROOT, downloaded if it is not there, its size and sha256 checked.

    Raises:
      UserError: it cannot be had, or is not the published file.
    """
    path, part = root / archive.name, root / f"{archive.name}.part"
    if not path.is_file():
        if archive.url is None:
            raise UserError(
                f"{archive.name} needs an account of the evaluation server: put it into {str(root)!r},"
                " and run the command again."
            )
        _download(archive, part, say)
        _verify(archive, part, say)
        part.rename(path)
    else:
        _verify(archive, path, say)
    return path


def _download(archive: Archive, part: Path, say: Callable[[str], None]) -> None:
    start = part.stat().st_size if part.is_file() else 0
    if start > archive.size:
        part.unlink()
        start = 0
    free = shutil.disk_usage(part.parent).free
    if free < 2 * archive.size - start:
        raise UserError(
            f"{str(part.parent)!r} has {free / 1e9:.1f} GB free, and {archive.name} with what is in it needs"
            f" {2 * archive.size / 1e9:.1f}: free space, or choose another --root."
        )
    assert archive.url is not None
    while start < archive.size:
        request = urllib.request.Request(archive.url, headers={"Range": f"bytes={start}-"} if start else {})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                if start and answer.status != 206:  # the server does not go on, so begin anew
                    start = 0
                with part.open("ab" if start else "wb") as file:
                    got = _copy(answer, file, archive, start, say)
        except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
            kept = part.stat().st_size if part.is_file() else 0
            reason = getattr(error, "reason", None) or error
            reason = getattr(reason, "strerror", None) or reason
            raise UserError(
                f"{archive.url} cannot be downloaded ({reason}), {kept / 1e6:.0f} of {archive.size / 1e6:.0f} MB are"
                f" there: run the command again to go on, or put {archive.name} into {str(part.parent)!r} by hand."
            ) from None
        if got == start:
            raise UserError(
                f"{archive.url} ends after {got:,} of {archive.size:,} bytes: run the command again to go on, or put"
                f" {archive.name} into {str(part.parent)!r} by hand."
            )
        start = got


def _copy(answer: IO[bytes], file: IO[bytes], archive: Archive, start: int, say: Callable[[str], None]) -> int:
    shown = -1
    while block := answer.read(1 << 20):
        file.write(block)
        start += len(block)
        if 20 * start // archive.size > shown:
            shown = 20 * start // archive.size
            say(f"{archive.name}: {start / 1e6:.0f} of {archive.size / 1e6:.0f} MB")
    return start


def _verify(archive: Archive, path: Path, say: Callable[[str], None]) -> None:
    size = path.stat().st_size
    if size != archive.size:
        raise UserError(
            f"{str(path)!r} has {size:,} of {archive.size:,} bytes, so it was cut short or is another file: remove it,"
            " and run the command again."
        )
    say(f"checking {archive.name}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != archive.sha256:
        raise UserError(
            f"{str(path)!r} is not the published file: its sha256 is {digest[:12]}.., not {archive.sha256[:12]}..;"
            " remove it, and run the command again."
        )


def stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
