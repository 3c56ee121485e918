"""Fetching data sets: from a small server of the test's own, whole, in pieces, broken, and archives that misbehave."""

import functools
import hashlib
import http.client
import http.server
import io
import os
import struct
import tarfile
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from mljax.data import prepare as preparing
from mljax.data.prepare import Archive, prepare
from mljax.data.unpack import unpack
from mljax.errors import UserError

VOC = "VOCdevkit/VOC2007"
CONTENT = {f"{VOC}/ImageSets/Main/test.txt": b"000001\n", f"{VOC}/JPEGImages/000001.jpg": b"p" * 5000}


def tarred(path: Path, *members: tarfile.TarInfo) -> bytes:
    with tarfile.open(path, "w") as archive:
        for name, content in CONTENT.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info in members:
            archive.addfile(info, io.BytesIO(b"evil") if info.size == 4 else None)
    return path.read_bytes()


class Server(http.server.BaseHTTPRequestHandler):
    """Serves one content, with ranges, and notes what it was asked for."""

    content, asked, ranges, breaks = b"", [], True, 0

    def do_GET(self):
        Server.asked.append(self.headers.get("Range"))
        start = 0
        if self.ranges and (given := self.headers.get("Range")):
            start = int(given.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
        else:
            self.send_response(200)
        body = Server.content[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: Server.breaks] if Server.breaks else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A published archive on the server, as the data set "tiny"."""
    Server.content, Server.asked, Server.ranges, Server.breaks = tarred(tmp_path / "x.tar"), [], True, 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=functools.partial(server.serve_forever, 0.02))
    thread.start()
    found = Archive(
        "tiny.tar", f"http://127.0.0.1:{server.server_address[1]}/tiny.tar", len(Server.content),
        hashlib.sha256(Server.content).hexdigest(), ".", "VOCdevkit/VOC2007/ImageSets/Main/test.txt",
    )  # fmt: skip
    monkeypatch.setitem(preparing.ARCHIVES, "tiny", (found,))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


def there(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in (root / "VOCdevkit").rglob("*") if p.is_file()}


def test_download_check_unpack(archive, tmp_path):
    said = []
    done = prepare("tiny", tmp_path / "data", say=said.append)
    assert there(tmp_path / "data") == CONTENT and "2 files" in done[0]
    assert any("MB" in line for line in said) and any("checking" in line for line in said)
    assert prepare("tiny", tmp_path / "data") == ["tiny.tar was unpacked before."] and len(Server.asked) == 1


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_goes_on(archive, tmp_path, ranges):
    root = tmp_path / "data"
    root.mkdir()
    (root / "tiny.tar.part").write_bytes(Server.content[:3000])
    Server.ranges = ranges
    prepare("tiny", root)
    assert Server.asked == ["bytes=3000-"] and there(root) == CONTENT


def test_a_connection_that_breaks_is_taken_up_again(archive, tmp_path):
    Server.breaks = 4096
    prepare("tiny", tmp_path / "data")
    assert Server.asked == [None, "bytes=4096-", "bytes=8192-"] and there(tmp_path / "data") == CONTENT


def test_a_server_that_ends_early_keeps_what_came(archive, tmp_path):
    whole, Server.content = Server.content, Server.content[:4096]
    with pytest.raises(UserError, match=r"ends after 4,096 of 10,240 bytes: run the command again to go on"):
        prepare("tiny", tmp_path / "data")
    assert (tmp_path / "data" / "tiny.tar.part").read_bytes() == whole[:4096]
    Server.content = whole
    prepare("tiny", tmp_path / "data")
    assert there(tmp_path / "data") == CONTENT


def test_an_answer_that_is_no_http_is_one_sentence(archive, tmp_path, monkeypatch):
    def urlopen(*args, **kwargs):
        raise http.client.BadStatusLine("what?")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    with pytest.raises(UserError, match=r"cannot be downloaded \(what\?\), 0 of 0 MB are there: run the command again"):
        prepare("tiny", tmp_path / "data")


def test_an_archive_put_there_by_hand_is_used(archive, tmp_path):
    (tmp_path / "tiny.tar").write_bytes(Server.content)
    prepare("tiny", tmp_path)
    assert there(tmp_path) == CONTENT and not Server.asked


def test_without_a_network_it_says_what_to_put_where(tmp_path, monkeypatch):
    gone = Archive("tiny.tar", "http://127.0.0.1:9/tiny.tar", 10, "0" * 64, ".", "x")
    monkeypatch.setitem(preparing.ARCHIVES, "tiny", (gone,))
    with pytest.raises(UserError, match=r"cannot be downloaded .*or put tiny.tar into .* by hand"):
        prepare("tiny", tmp_path)
    with pytest.raises(UserError, match="account of the evaluation server: put it into"):
        prepare("voc2012test", tmp_path)
    with pytest.raises(UserError, match=r"no open download.*into .*/nus_wide"):
        prepare("nuswide", tmp_path)
    with pytest.raises(UserError, match=r"put VG_100K/, \{train,test\}_list_500.txt"):
        prepare("visual_genome", tmp_path)
    with pytest.raises(UserError, match="'voc207' is not a data set that can be prepared .did you mean 'voc2007'"):
        prepare("voc207", tmp_path)


def test_cut_short_wrong_checksum_and_other_content(archive, tmp_path, monkeypatch):
    path = tmp_path / "tiny.tar"
    path.write_bytes(Server.content[:-100])
    with pytest.raises(UserError, match=r"bytes, so it was cut short or is another file: remove it"):
        prepare("tiny", tmp_path)
    path.write_bytes(b"\1" + Server.content[1:])
    with pytest.raises(UserError, match=r"is not the published file: its sha256 is"):
        prepare("tiny", tmp_path)
    path.write_bytes(Server.content)
    other = Archive(archive.name, archive.url, archive.size, archive.sha256, ".", "VOCdevkit/VOC2012")
    monkeypatch.setitem(preparing.ARCHIVES, "tiny", (other,))
    with pytest.raises(UserError, match="does not hold 'VOCdevkit/VOC2012'"):
        prepare("tiny", tmp_path)


def test_no_space(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(preparing.shutil, "disk_usage", lambda _: SimpleNamespace(free=5))
    with pytest.raises(UserError, match="GB free, and tiny.tar with what is in it needs"):
        prepare("tiny", tmp_path)


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def plain(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = 4
    return info


EVIL = {
    "dots": (plain("VOCdevkit/../../evil"), "leads out of the folder"),
    "absolute": (plain("/tmp/evil"), "leads out of the folder"),
    "back-slashes": (plain("..\\evil"), "leads out of the folder"),
    "symlink": (link("VOCdevkit/out", "../..", tarfile.SYMTYPE), "is a link"),
    "hard link": (link("VOCdevkit/out", "/etc/passwd", tarfile.LNKTYPE), "is a link"),
    "device": (link("VOCdevkit/out", "", tarfile.CHRTYPE), "is not a plain file"),
    "fifo": (link("VOCdevkit/out", "", tarfile.FIFOTYPE), "is not a plain file"),
    "sparse": (link("VOCdevkit/out", "", tarfile.GNUTYPE_SPARSE), "is not a plain file|damaged"),
    "the folder itself": (plain("."), "leads out of the folder"),
    "the folder itself, again": (plain("./"), "leads out of the folder"),
    "empty": (plain(""), "leads out of the folder|damaged"),
    "below a file": (plain(f"{VOC}/ImageSets/Main/test.txt/x"), "a file and a folder of one name"),
    "huge": (plain("huge"), "unpacks to .* bytes or more, at most"),
    "negative": (plain("negative"), "unpacks to .* bytes or more, at most|damaged"),
}
EVIL["huge"][0].size, EVIL["negative"][0].size = 1 << 40, -1024


def zipped(path: Path, name: str, mode: int = 0) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        archive.writestr(info, b"evil")
    return path


@pytest.mark.parametrize(
    ("name", "mode", "message"),
    [
        (".", 0, "leads out"), ("./", 0o100644, ""), ("..", 0, "leads out"), ("a/../../b", 0, "leads out"),
        ("/x", 0, "leads out"), ("C:\\x", 0, "leads out"), ("x", 0o120777, "is a link"), ("x", 0o010644, "plain file"),
        ("x", 0o020644, "plain file"), ("x", 0o060644, "plain file"), ("x", 0o140644, "plain file"),
        ("x" * 300, 0, "too long"), ("é" * 125, 0, "too long"), ("a/" * 1200, 0, "too long"),
    ],
)  # fmt: skip
def test_members_of_a_zip_that_lead_out(tmp_path, name, mode, message):
    path = zipped(tmp_path / "x.zip", name, mode)
    if message:
        with pytest.raises(UserError, match=message):
            unpack(path, tmp_path / "in" / "data")
    else:
        assert unpack(path, tmp_path / "in" / "data") == 0  # a folder
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.zip"]


def test_a_zip_bomb_is_refused(tmp_path):
    path = zipped(tmp_path / "x.zip", "a")
    whole = bytearray(path.read_bytes())
    struct.pack_into("<I", whole, whole.rfind(b"PK\1\2") + 24, 3 << 30)
    path.write_bytes(whole)
    with pytest.raises(UserError, match="unpack to 3,221,225,472 bytes"):
        unpack(path, tmp_path / "data")
    os.mkfifo(tmp_path / "fifo.tar")
    with pytest.raises(OSError, match="a FIFO, not a regular file"):
        unpack(tmp_path / "fifo.tar", tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("what", EVIL)
def test_members_that_lead_out_of_the_root(tmp_path, what):
    """Refused before anything is written."""
    member, message = EVIL[what]
    tarred(tmp_path / "x.tar", member)
    with pytest.raises(UserError, match=message):
        unpack(tmp_path / "x.tar", tmp_path / "in" / "data")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.tar"]


def test_zip(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("annotations/", b"")
        archive.writestr("annotations/a.json", b"{}" * 900)
    assert unpack(path, tmp_path / "coco") == 1
    assert (tmp_path / "coco" / "annotations" / "a.json").read_bytes() == b"{}" * 900
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match="cut short or damaged"):
        unpack(path, tmp_path / "coco")
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("out")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "../..")
    with pytest.raises(UserError, match="member 'out' that is a link"):
        unpack(path, tmp_path / "coco")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../evil", b"")
    with pytest.raises(UserError, match="leads out of the folder"):
        unpack(path, tmp_path / "coco")


def test_a_link_that_was_there_before_is_not_followed_out(tmp_path):
    tarred(tmp_path / "x.tar")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "VOCdevkit").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="leads out of the folder"):
        unpack(tmp_path / "x.tar", tmp_path / "data")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_tar_cut_short(tmp_path):
    content = tarred(tmp_path / "x.tar")
    (tmp_path / "x.tar").write_bytes(content[:3000])
    with pytest.raises(UserError, match="cut short or damaged"):
        unpack(tmp_path / "x.tar", tmp_path / "data")


def test_the_table_is_whole():
    """Every archive has a length, a digest, and a place of its own; a URL is the official server's."""
    official = ("http://host.robots.ox.ac.uk/pascal/VOC/", "http://images.cocodataset.org/")
    archives = [archive for group in preparing.ARCHIVES.values() for archive in group]
    assert len({a.name for a in archives}) == len({a.sha256 for a in archives}) == len(archives) == 10
    for archive in archives:
        assert len(archive.sha256) == 64 and archive.size > 10**8
        assert archive.url is None or (archive.url.startswith(official) and archive.url.endswith(archive.name))
