"""Records, their files, loading, and the command."""

import dataclasses
import errno
import http.server
import io
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import safetensors.numpy

from mljax import weights
from mljax.commands.weights import main
from mljax.errors import UserError
from mljax.weights import convert, hub
from mljax.weights.loading import Weights, load, resolve
from torch_writer import RNG, WRITERS, bare_resnet, leftovers, one_sentence, tensors, torch_zip

RESNET18 = bare_resnet((2, 2, 2, 2), False)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLJAX_DATA", raising=False)
    return tmp_path / "cache"


def test_records_start_with_the_architecture_and_are_complete():
    found = weights.records()
    assert {"mobilenet_v1", "resnet101", "tresnet_l", "cvt_w24_384", "swin_large_384"} <= {
        r.arch for r in found.values()
    }
    for name, record in found.items():
        assert name == record.name and name.startswith(record.arch), name
        assert record.licence and record.paper and record.size % 32 == 0, name
        assert len(record.mean) == len(record.std) == 3, name
        assert record.sha256 is None or (len(record.sha256) == 64 and int(record.sha256, 16) >= 0), name
        assert resolve(name, record.arch) == record
        json.dumps(dataclasses.asdict(record))


def test_resolve():
    assert resolve("resnet101", "resnet101").hub == "timm/resnet101.tv_in1k"
    assert resolve("mobilenet_v1", "mobilenet_v1").mean == (0.5, 0.5, 0.5)
    assert weights.preprocessing(resolve("tresnet_l", "tresnet_l")) == ((0, 0, 0), (1, 1, 1))
    with pytest.raises(UserError, match="did you mean 'resnet101'"):
        resolve("resnet1001", "resnet101")
    with pytest.raises(UserError, match="for the backbone resnet50, and the backbone is resnet101"):
        resolve("resnet50", "resnet101")
    with pytest.raises(UserError, match=r"nowhere.pth is missing"):
        resolve("nowhere.pth", "resnet101")
    with pytest.raises(UserError, match="is not a backbone"):
        resolve("resnet101", "resnet1001")


def test_local_file_takes_preprocessing_from_options_or_the_record(tmp_path):
    path = torch_zip(tmp_path / "mine.pth", {})
    record = resolve(str(path), "tresnet_m")
    assert (record.mean, record.std, record.path) == ((0, 0, 0), (1, 1, 1), str(path)) and "tresnet_m" in record.note
    given = resolve(str(path), "tresnet_m", mean=[0.1, 0.2, 0.3], std=(0.4, 0.5, 0.6), size=448)
    assert (given.mean, given.std, given.size) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 448)


def test_data_folder_comes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("MLJAX_DATA", str(tmp_path))
    (tmp_path / "weights").mkdir()
    record = resolve("resnet18", "resnet18")
    path = tmp_path / "weights" / "resnet18.safetensors"
    safetensors.numpy.save_file(RESNET18, path)
    assert weights.locate(record) == path
    tree = load(record, "resnet18")
    np.testing.assert_array_equal(
        tree["params"]["stem"]["conv"]["kernel"], RESNET18["conv1.weight"].transpose(2, 3, 1, 0)
    )


def test_weights_that_are_on_no_hub():
    with pytest.raises(UserError) as error:
        load("mobilenet_v1", "mobilenet_v1")
    assert "MLJAX_DATA" in one_sentence(error)


def test_real_mobilenet(real_data, monkeypatch):
    monkeypatch.setenv("MLJAX_DATA", str(real_data))
    raw = np.load(real_data / "weights" / "mobilenet_v1_imagenet_to_conv_pw_12.npz")
    tree = load("mobilenet_v1", "mobilenet_v1")
    pointwise = tree["params"]["conv_pw_12"]
    np.testing.assert_array_equal(pointwise["conv"]["kernel"], raw["conv_pw_12/kernel"])
    np.testing.assert_array_equal(tree["batch_stats"]["conv1"]["bn"]["var"], raw["conv1_bn/moving_variance"])


def test_wrong_checksum(tmp_path, own_cache):
    path = tmp_path / "r.safetensors"
    safetensors.numpy.save_file(RESNET18, path)
    record = Weights(name="resnet18", arch="resnet18", file="r.safetensors", sha256="0" * 64, path=str(path))
    with pytest.raises(UserError) as error:
        load(record, "resnet18")
    assert "sha256" in one_sentence(error) and leftovers(own_cache) == [] and path.exists()


def test_wrong_file_in_the_hub_cache_is_removed(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "x").write_bytes(b"bad")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / "x")
    with pytest.raises(UserError, match="run again to download"):
        hub.check_digest(tmp_path / "model.safetensors", "0" * 64, "resnet18")
    assert leftovers(tmp_path) == [] and not (tmp_path / "model.safetensors").is_symlink()


@pytest.fixture
def empty_hub(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_offline(empty_hub):
    with pytest.raises(UserError) as error:
        load("resnet18", "resnet18")
    assert "HF_HUB_OFFLINE" in one_sentence(error) and "resnet18.safetensors" in str(error.value)
    assert not empty_hub.exists() or leftovers(empty_hub) == []


@pytest.mark.parametrize(
    ("failure", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space; free space in"),
        (RuntimeError("what the HTTP library raises"), "RuntimeError; try again"),
    ],
)
def test_failed_download(empty_hub, monkeypatch, failure, says):
    import huggingface_hub

    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(UserError) as error:
        load("resnet18", "resnet18")
    assert says in one_sentence(error)


def test_load_equals_a_transpose_by_hand(tmp_path):
    path = torch_zip(tmp_path / "mine.pth", {"state_dict": tensors(RESNET18)})
    for _ in range(2):  # converted, then from the cache
        tree = load(str(path), "resnet18")
        kernel = tree["params"]["layer2_0"]["conv1"]["kernel"]
        np.testing.assert_array_equal(kernel, np.einsum("oihw->hwio", RESNET18["layer2.0.conv1.weight"]))
        np.testing.assert_array_equal(
            tree["batch_stats"]["layer1_1"]["bn2"]["mean"], RESNET18["layer1.1.bn2.running_mean"]
        )
        assert kernel.dtype == np.float32
    safetensors.numpy.save_file({k: v.astype(np.float16) for k, v in RESNET18.items()}, tmp_path / "h.safetensors")
    tree = load(str(tmp_path / "h.safetensors"), "resnet18")
    half = RESNET18["conv1.weight"].astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(tree["params"]["stem"]["conv"]["kernel"], half.transpose(2, 3, 1, 0))


def test_cache_is_made_again_when_damaged_or_when_the_file_changes(tmp_path, own_cache):
    path = tmp_path / "mine.safetensors"
    safetensors.numpy.save_file(RESNET18, path)
    first = np.array(load(str(path), "resnet18")["params"]["stem"]["bn"]["scale"])
    (cached,) = leftovers(own_cache)
    content = bytearray(cached.read_bytes())
    content[-100] ^= 1
    cached.write_bytes(content)
    np.testing.assert_array_equal(load(str(path), "resnet18")["params"]["stem"]["bn"]["scale"], first)
    safetensors.numpy.save_file({**RESNET18, "bn1.weight": np.full(2, 9, np.float32)}, path)
    os.utime(path, ns=(1, 1))
    np.testing.assert_array_equal(load(str(path), "resnet18")["params"]["stem"]["bn"]["scale"], [9, 9])


@pytest.mark.parametrize("prefix", ["module.", "backbone.", "encoder.", "module.backbone."])
def test_prefixes_of_others(tmp_path, prefix):
    state = {f"{prefix}{k}": v for k, v in RESNET18.items()} | {"head.weight": np.ones((2, 2), np.float32)}
    path = torch_zip(tmp_path / "theirs.pth", tensors(state))
    tree = load(str(path), "resnet18", prefix=prefix)
    np.testing.assert_array_equal(tree["params"]["stem"]["bn"]["bias"], RESNET18["bn1.bias"])
    with pytest.raises(UserError) as error:
        load(str(path), "resnet18")
    assert f"give {prefix!r} as the weights' prefix" in one_sentence(error)


@pytest.mark.parametrize(("channels", "factor"), [(1, None), (4, 3 / 4), (6, 1 / 2)])
def test_other_input_channels(tmp_path, caplog, channels, factor):
    path = tmp_path / "mine.safetensors"
    safetensors.numpy.save_file(RESNET18, path)
    kernel = load(str(path), "resnet18", in_channels=channels)["params"]["stem"]["conv"]["kernel"]
    raw = RESNET18["conv1.weight"]
    assert kernel.shape == (7, 7, channels, 2) and "input channels" in caplog.text
    for c in range(channels):
        wanted = raw.sum(1) if factor is None else raw[:, c % 3] * np.float32(factor)
        np.testing.assert_allclose(kernel[:, :, c], wanted.transpose(1, 2, 0), rtol=1e-6)


def test_other_input_channels_of_tresnet():
    """Its first kernel sees 4x4 pixels: output channel (row*4 + column)*3 + colour."""
    kernel = RNG.normal(size=(3, 3, 48, 2)).astype(np.float32)
    found = convert.other_channels({"stem": {"conv": {"kernel": kernel}}}, 4, "x")["stem"]["conv"]["kernel"]
    for pixel in range(16):
        for c in range(4):
            wanted = kernel[:, :, pixel * 3 + c % 3] * np.float32(0.75)
            np.testing.assert_allclose(found[:, :, pixel * 4 + c], wanted, rtol=1e-6)


def test_not_a_number_is_corrupt(tmp_path):
    bad = RESNET18["layer3.1.conv2.weight"].copy()
    bad[0, 0, 0, 0], bad[0, 0, 0, 1] = np.inf, -np.inf
    safetensors.numpy.save_file({**RESNET18, "layer3.1.conv2.weight": bad}, tmp_path / "x.safetensors")
    with pytest.raises(UserError) as error:
        load(str(tmp_path / "x.safetensors"), "resnet18")
    assert "values that are not finite" in one_sentence(error)


def test_other_window_is_interpolated_and_said(tmp_path, monkeypatch, caplog):
    class Fake:
        __name__ = "fake"
        NAMES = {"fake_224": None, "fake_384": None}  # noqa: RUF012

        @staticmethod
        def convert(state):
            return {"params": {"table": state["table"]}, "batch_stats": {}}

        @staticmethod
        def adapt(tree, model):
            return {**tree, "params": {"table": tree["params"]["table"] * model}}, ("table doubled",)

    monkeypatch.setattr(convert, "modules", lambda: (Fake,))
    monkeypatch.setattr("mljax.weights.loading.modules", lambda: (Fake,))
    safetensors.numpy.save_file({"table": np.ones(3, np.float32)}, tmp_path / "x.safetensors")
    tree = load(str(tmp_path / "x.safetensors"), "fake_384", model=np.float32(2))
    np.testing.assert_array_equal(tree["params"]["table"], [2, 2, 2])
    assert "table doubled" in caplog.text


def test_wrong_net_is_refused_with_what_it_seems_to_be(tmp_path, own_cache):
    safetensors.numpy.save_file(RESNET18, tmp_path / "x.safetensors")
    for arch in ("resnet34", "mobilenet_v1", "swin_base_384", "cvt_13_224", "tresnet_m"):
        with pytest.raises(UserError) as error:
            load(str(tmp_path / "x.safetensors"), arch)
        assert f"does not fit the backbone {arch}: it seems to be a ResNet-18" in one_sentence(error)
    safetensors.numpy.save_file({"visual.conv1.weight": np.zeros(2)}, tmp_path / "y.safetensors")
    with pytest.raises(UserError, match="it seems to be a CLIP"):
        load(str(tmp_path / "y.safetensors"), "resnet18")
    assert leftovers(own_cache) == []


class Full(io.FileIO):
    def write(self, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_while_converting(tmp_path, monkeypatch, own_cache):
    path = tmp_path / "resnet18.safetensors"
    safetensors.numpy.save_file(RESNET18, path)
    monkeypatch.setattr(io, "FileIO", Full)
    with pytest.raises(UserError) as error:
        load(str(path), "resnet18")
    assert "No space left on device" in one_sentence(error) and "MLJAX_CACHE" in str(error.value)
    assert leftovers(own_cache) == []


def test_commands(tmp_path, capsys):
    assert main(["list", "resnet101"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["resnet101", "resnet101_v2", "resnet101_a1"]
    assert main(["show", "resnet101"]) == 0
    assert "licence  BSD-3-Clause" in capsys.readouterr().out
    with pytest.raises(UserError, match="did you mean 'resnet101'"):
        main(["show", "resnet_101"])
    path = torch_zip(tmp_path / "theirs.pth", tensors({f"module.{k}": v for k, v in RESNET18.items()}))
    assert main(["convert", str(path), str(tmp_path / "mine.safetensors"), "--prefix", "module."]) == 0
    assert "for the backbone resnet18" in capsys.readouterr().out
    record = resolve(str(tmp_path / "mine.safetensors"), "resnet18")
    assert record.mean == weights.IMAGENET_MEAN and record.path == str(tmp_path / "mine.safetensors")
    np.testing.assert_array_equal(load(record, "resnet18")["params"]["stem"]["bn"]["bias"], RESNET18["bn1.bias"])
    with pytest.raises(UserError, match="for the backbone resnet18, and the backbone is resnet34"):
        resolve(str(tmp_path / "mine.safetensors"), "resnet34")
    with pytest.raises(UserError, match=r"layer1_0/conv1/kernel \(3, 3, 64, 64\)"):  # it has two channels
        main(["verify", "resnet18", str(path), "--prefix", "module."])


def test_verify_a_whole_net(tmp_path, capsys):
    safetensors.numpy.save_file(bare_resnet((2, 2, 2, 2), False, 64), tmp_path / "x.safetensors")
    assert main(["verify", "resnet18", str(tmp_path / "x.safetensors")]) == 0
    assert "names and shapes fit resnet18" in capsys.readouterr().out


MEASURE = """
import sys, time
from mljax import weights
from mljax.trees import merge
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
import numpy, jax.numpy as jnp
jnp.zeros(1).block_until_ready()
weights.records()
base, start = peak(), time.perf_counter()
tree = weights.load(sys.argv[1], "resnet101")
merged = {k: merge(v, v) for k, v in tree.items()} if len(sys.argv) > 2 else None
print(time.perf_counter() - start, peak() - base)
"""


SERVE = """
import sys
from mljax import weights
from mljax.errors import UserError
try:
    print(weights.load("resnet18", "resnet18")["params"]["stem"]["bn"]["bias"].tolist())
except UserError as error:
    print("UserError", error)
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as a download needs; `cut` of the content is sent."""

    content, cut, served = b"", 0, 0

    def do_HEAD(self, body=False):
        if not self.path.startswith("/timm/resnet18.tv_in1k/resolve/main/model.safetensors"):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("ETag", '"abc"')
        self.send_header("X-Repo-Commit", "1" * 40)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        if body:
            type(self).served += 1
            self.wfile.write(self.content[: len(self.content) - self.cut])
            self.close_connection = True

    def do_GET(self):
        self.do_HEAD(body=True)

    def log_message(self, *_):
        pass


@pytest.fixture
def local_hub():
    kind = type("LocalHub", (Hub,), {})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield kind, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_downloaded_once_then_offline(tmp_path, local_hub):
    kind, address = local_hub
    kind.content = safetensors.numpy.save(RESNET18)
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_HUB_OFFLINE", None)

    def run(**more):
        command = [sys.executable, "-c", SERVE]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment | more)
        return done.stdout.strip(), done.stderr

    kind.cut = 100
    said, _ = run()
    assert said.startswith("UserError model.safetensors of timm/resnet18.tv_in1k") and "\n" not in said
    assert not [path for path in leftovers(tmp_path) if path.suffix in (".incomplete", ".safetensors")]
    kind.cut, kind.served = 0, 0
    wanted = str(RESNET18["bn1.bias"].tolist())
    said, progress = run()
    assert said == wanted and kind.served == 1 and "Downloading" in progress
    assert run(HF_HUB_OFFLINE="1")[0] == wanted  # from the converted file
    assert run(HF_HUB_OFFLINE="1", MLJAX_CACHE=str(tmp_path / "new"))[0] == wanted  # from the hub's cache
    assert kind.served == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_resnet101_of_170_mb_is_fast_and_small(tmp_path, kind):
    state = bare_resnet((3, 4, 23, 3), True, 64)
    path = tmp_path / "resnet101.bin"
    if kind == "safetensors":
        safetensors.numpy.save_file(state, path)
    else:
        WRITERS[kind](path, tensors(state))
    size = path.stat().st_size
    assert 165e6 < size < 185e6
    del state

    def measure():
        command = [sys.executable, "-c", MEASURE, str(path), "merge"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return [float(x) for x in done.stdout.split()]

    first, second = measure(), measure()
    print(f"{kind}: {size / 1e6:.0f} MB, first {first[0]:.2f} s, then {second[0]:.2f} s, peak", first[1], second[1])
    assert second[0] < 3
    assert max(first[1], second[1]) < 3 * size
