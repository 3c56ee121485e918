"""The benchmark's arithmetic: ratios of given timings, FLOPs counted by hand, folding, batches that fit, sentences."""

import gzip
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toy
from mljax import parallel, train
from mljax.bench import command, loop, report, scale, timing
from mljax.bench import model as bench_model
from mljax.convolution import conv
from mljax.errors import UserError

# --- ratios and figures ----------------------------------------------------------------------------------------------


def test_ratios_are_medians_of_the_rounds_ratios():
    turns = timing.Turns({"a": [2.0, 9.0, 3.0], "b": [1.0, 3.0, 2.0]}, {"a": [4.0, 4.0, 4.0], "b": [1.0, 2.0, 4.0]})
    assert turns.seconds("a") == 3.0
    assert turns.ratio("a", "b") == 2.0  # of 2, 3, 1.5: not 3 / 2, the ratio of the medians
    assert turns.ratio("a", "b", "cpu") == 2.0


def test_sides_take_turns_and_rounds_go_back_and_forth(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def side(name, seconds):
        def run(steps):
            calls.append((name, steps))
            clock[0] += steps * seconds

        return run

    turns = timing.alternate({"fast": side("fast", 0.125), "slow": side("slow", 2.0)}, rounds=3, turn=0.5)
    assert calls[:2] == [("fast", 1), ("slow", 1)]
    assert calls[2:] == [("fast", 4), ("slow", 1), ("slow", 1), ("fast", 4), ("fast", 4), ("slow", 1)]
    assert turns.wall == {"fast": [0.125] * 3, "slow": [2.0] * 3}


def test_figures_of_given_timings():
    turns = timing.Turns({"mljax": [0.5], "torch": [0.4]}, {"mljax": [1.0], "torch": [0.5]})
    made = bench_model.Program(lambda: None, flops=4e9, memory=7, trace_seconds=0, compile_seconds=0)
    found = report.summary(turns, made, 5, size=8, peak=16e9, devices=2)
    assert found["images_per_s"] == 16 and found["flops_per_s"] == 8e9 and found["share_of_peak"] == 0.5
    assert found["flops_per_image"] == 1e9  # 4e9 on each of two devices, 8 images
    assert found["torch"] == {"seconds": 0.4, "images_per_s": 20, "time_ratio": 1.25, "cpu_ratio": 2.0}
    text = "\n".join(report.lines("train", found))
    assert "16.0 images/s" in text and "1.25 times" in text and "50.0 % of the device's peak" in text


def test_share_of_a_matrix_product():
    """A program of as many FLOPs as the product, in twice its time, runs at half its rate."""
    turns = timing.Turns({"mljax": [2.0], "product": [1.0]}, {"mljax": [2.0], "product": [1.0]})
    made = bench_model.Program(lambda: None, flops=2.0 * 2048**3, memory=None, trace_seconds=0, compile_seconds=0)
    assert report.summary(turns, made, None, 8, None, 1)["share_of_product"] == 0.5


def test_known_peaks():
    assert timing.peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert timing.peak_flops("NVIDIA A100-SXM4-80GB", "float32") == 156e12
    assert timing.peak_flops("cpu", "float32") is None


@pytest.mark.parametrize("size, stride", [(1, 1), (3, 1), (3, 2)])
def test_flops_of_a_convolution_by_hand(size, stride):
    """2 x outputs x kernel positions x channels in x channels out, whatever form the convolution takes."""
    x, kernel = jnp.ones((2, 17, 17, 32)), jnp.ones((size, size, 32, 64))
    made = bench_model.program(jax.jit(lambda x, k: conv(x, k, stride=stride)), x, kernel)
    side = (17 - size) // stride + 1
    assert made.flops == 2 * 2 * side**2 * size**2 * 32 * 64
    assert made.memory >= x.nbytes + kernel.nbytes + 2 * side**2 * 64 * 4


def test_shares_add_up():
    found = loop.Shares(steps=4, total=8.0, input=2.0, evaluation=1.0).percent()
    assert found == {"step": 62.5, "input": 25.0, "evaluation": 12.5}


def test_exponent_of_a_power():
    values = [10, 20, 40, 80]
    assert scale.exponent(values, [3.0 * v**2 for v in values]) == pytest.approx(2.0)
    assert scale.exponent([5], [1.0]) is None


# --- a model ---------------------------------------------------------------------------------------------------------


def tiny(**changes):
    found = toy.config("baseline", **{"devices": 1, **changes})
    found.backbone.widths, found.input.size = (4, 4, 4, 4), 32
    return found


def test_model_trains_and_scores_as_the_library_does():
    """The benchmark's programs are the trainer's step and the experiment's scores, not a likeness of them."""
    model = bench_model.Model(tiny(), labels=7)
    batch, variables = model.batch(4), model.initial()
    scores = model.inference(4).call(jax.device_put(variables, model.whole), jax.device_put(batch, model.split))
    np.testing.assert_allclose(scores, model.run.scores(variables, batch), rtol=1e-5, atol=1e-6)
    assert scores.shape == (4, 7) and batch["labels"].sum(1).min() >= 1
    step = jax.jit(train.make_step(model.run, model.tx))
    wanted, metrics = step(model.state_of(variables), batch)
    state, found = model.training(4).call(model.place_state(model.state_of(variables)), model.place(batch))
    assert float(found["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-5)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(wanted.params)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_cached_endpoints_leave_the_backbone_out():
    config = tiny(cache__train_views=("32",), cache__eval_views=("32",))
    config.backbone.frozen = "all"
    whole, cached = bench_model.Model(tiny()), bench_model.Model(config)
    assert "image" not in cached.shapes(4) and cached.shapes(4)["endpoints"]
    assert cached.training(4).flops < whole.training(4).flops / 2


# --- the loop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True])
def test_shares_of_the_trainers_loop(cached):
    config = tiny()
    if cached:
        config.cache.train_views, config.backbone.frozen = ("32",), "all"
    found = loop.shares(config, steps=3)
    assert found.steps == 3 and 0 < found.input + found.evaluation < found.total
    assert sum(found.percent().values()) == pytest.approx(100)


def test_a_trace_of_the_loop(tmp_path):
    """The steps are marked as such: what TensorBoard's overview of step times reads."""
    flags = ["--config=configs/baseline.py:smoke", "--config.devices=1", "--batch=4", "--size=32"]
    assert command.main([*flags, "--only=loop", f"--profile={tmp_path}"]) == 0
    (trace,) = tmp_path.glob("loop/**/perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = {e["args"]["step_num"] for e in events if e.get("name") == "train" and "step_num" in e.get("args", {})}
    assert len(steps) == 12


def test_overhead_counts_the_trainers_own_steps(monkeypatch):
    """A trainer that sleeps 20 ms in every step costs 20 ms more than the bare step."""
    place = parallel.compile_step

    def slow(*arguments):
        step, place_state, placed = place(*arguments)
        return step, place_state, lambda batch: (time.sleep(0.02), placed(batch))[1]

    monkeypatch.setattr(parallel, "compile_step", slow)
    turns = loop.overhead(tiny(), rounds=2, steps=4)
    assert len(turns.wall["step"]) == 2
    assert min(turns.wall["trainer"]) - min(turns.wall["step"]) > 0.012


# --- command ---------------------------------------------------------------------------------------------------------


def test_command_tells_and_keeps_figures(capsys, tmp_path):
    file, profile = tmp_path / "found.json", tmp_path / "profile"
    flags = ["--config=configs/baseline.py:smoke", "--config.devices=1", "--batch=4", "--size=32", "--rounds=1"]
    assert command.main([*flags, "--only=train,infer", f"--json={file}", f"--profile={profile}"]) == 0
    out, found = capsys.readouterr().out, json.loads(file.read_text())
    for part in ("train", "infer"):
        assert f"{found[part]['images_per_s']:.1f} images/s" in out
        assert found[part]["images_per_s"] == pytest.approx(4 / found[part]["seconds"])
        assert list(profile.glob(f"{part}/**/*.xplane.pb")) and list(profile.glob(f"{part}/**/*.trace.json.gz"))
    assert found["train"]["flops"] > 2 * found["infer"]["flops"]


def test_scale_writes_json_and_plot(capsys, tmp_path):
    assert command.main(["--config=x", "--scale=rows", "--values=100,200", "--labels=5", f"--out={tmp_path}"]) == 0
    found = json.loads((tmp_path / "rows.json").read_text())
    assert [row["rows"] for row in found["rows"]] == [100, 200]
    assert all(row["metrics_rows_per_s"] == pytest.approx(row["rows"] / row["seconds"]) for row in found["rows"])
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


def test_a_value_that_cannot_be_measured_is_a_row(monkeypatch, capsys, tmp_path):
    """The table is written after each value; the plot and the exponent are of the others."""
    file, seen = tmp_path / "batch.json", []

    def run(command, **_):
        batch = int(next(w for w in command if w.startswith("--batch=")).removeprefix("--batch="))
        seen.append(len(json.loads(file.read_text())["rows"]) if file.exists() else 0)
        if batch == 4:
            return SimpleNamespace(returncode=2, stderr="Traceback\nmljax: The memory is full; lower it.\n")
        figures = {"seconds": 2.0 * batch, "peak_bytes": 1, "program_bytes": 1, "images_per_s": 0.5}
        found = next(w for w in command if w.startswith("--json=")).removeprefix("--json=")
        Path(found).write_text(json.dumps({"train": figures, "infer": figures}))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(scale.subprocess, "run", run)
    flags = ["--config=configs/baseline.py:smoke", "--scale=batch", f"--out={tmp_path}"]
    assert command.main([*flags, "--values=1,2,4"]) == 0
    found = json.loads(file.read_text())
    assert found["rows"][2] == {"batch": 4, "error": "The memory is full; lower it."}
    assert seen == [0, 1, 2] and found["exponent"] == pytest.approx(1.0)
    assert "error The memory is full" in capsys.readouterr().out and (tmp_path / "batch.png").exists()
    with pytest.raises(UserError, match="No value of --scale=batch could be measured; at 4: The memory is full"):
        command.main([*flags, "--values=4"])


@pytest.mark.parametrize("flags, sentence", [
    ((), "--config is missing"),
    (("--config=configs/baseline.py:smoke", "--bach=3"), "did you mean '--batch'"),
    (("--config=configs/baseline.py:smoke", "--batch=0"), "--batch=0 must be at least 1"),
    (("--config=configs/baseline.py:smoke", "--only=trian"), "did you mean 'train'"),
    (("--config=configs/baseline.py:smoke", "--scale=label"), "did you mean 'labels'"),
    (("--config=configs/baseline.py:smoke", "--scale=batch", "--values=1,x"), "not a list of whole numbers"),
    (("--config=configs/baseline.py:smoke", "--against=jax"), "invalid choice"),
    (("--config=x", "--profile=p", "--find-batch"), "and --find-batch measures none"),
    (("--config=x", "--profile=p", "--scale=labels"), "and --scale=labels measures none"),
    (("--config=x", "--profile=p", "--only=overhead,compile"), "and --only=overhead,compile measures none"),
    (("--config=x", "--hlo=p", "--only=loop"), "--hlo is of infer, train, and --only=loop measures none"),
])  # fmt: skip
def test_wrong_flags(flags, sentence):
    with pytest.raises(UserError, match=sentence):
        command.main(list(flags))


def test_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "mljax.bench.torch_reference", raising=False)
    with pytest.raises(UserError, match="needs PyTorch, which is not installed"):
        command.main(["--config=configs/baseline.py:smoke", "--against=torch"])
