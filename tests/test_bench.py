"""The benchmark's arithmetic: ratios of given timings, FLOPs counted by hand, folding, batches that fit, sentences."""

import contextlib
import gzip
import json
import shlex
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toy
from mljax import convolution, fold, main, parallel, predict, scoring, train
from mljax.backbones import cvt, mobilenet, resnet, small, tresnet
from mljax.bench import command, hlo, loop, report, scale, target, timing
from mljax.bench import model as bench_model
from mljax.convolution import conv
from mljax.errors import UserError
from mljax.train.loop import IN_FLIGHT

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


# --- folding ---------------------------------------------------------------------------------------------------------

NETS = {
    "resnet": resnet.ResNet(depths=(1, 1, 1, 1), width=8),
    "basic": resnet.ResNet(depths=(1, 1, 1, 1), width=8, bottleneck=False),
    "resnext": resnet.ResNet(depths=(1, 1, 1, 1), width=32, groups=8, base_width=4),
    "tresnet": tresnet.TResNet(depths=(1, 1, 1, 1), width=8, bottlenecks=(False, False, True, True)),
    "small": small.Small(widths=(4, 8, 8, 8), endpoints=("8",)),
    "mobilenet": mobilenet.MobileNetV1(),
    "cvt": cvt.CvT(widths=(8, 16, 16), depths=(1, 1, 1), heads=(1, 2, 2)),
}


@pytest.mark.parametrize("name", NETS)
def test_folded_values(name):
    """Random statistics, gains and biases: equal to 1e-5 of the largest value, and nothing left to normalise."""

    class System(nn.Module):
        backbone: nn.Module

        @nn.compact
        def __call__(self, batch, *, train):
            return self.backbone(batch["image"], train=train)

    system, rng = System(NETS[name]), np.random.default_rng(0)
    batch = {"image": jnp.asarray(rng.normal(size=(2, 64, 64, 3)), jnp.float32)}
    variables = jax.jit(lambda k: system.init(k, batch, train=False))(jax.random.key(0))

    def drawn(path, x):
        leaf = path[-1].key
        if leaf in ("scale", "bias", "mean", "var"):
            x = jnp.asarray(rng.uniform(0.5, 1.5, x.shape), jnp.float32) if leaf in ("scale", "var") else 0.3 + x
        return x

    variables = jax.tree_util.tree_map_with_path(drawn, variables)
    folded, count = fold.fold(system, variables, batch)
    assert count == sum(p[-1].key == "mean" for p, _ in jax.tree.leaves_with_path(variables["batch_stats"]))
    assert not jax.tree.leaves(folded["batch_stats"])
    wanted, found = (jax.jit(lambda v: system.apply(v, batch, train=False))(v) for v in (variables, folded))
    for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        assert float(jnp.abs(a - b).max()) < 1e-5 * float(jnp.abs(a).max())


def test_nothing_to_fold_is_a_sentence():
    config = tiny(cache__train_views=("32",), cache__eval_views=("32",))
    config.backbone.frozen = "all"
    model = bench_model.Model(config)
    with pytest.raises(UserError, match="no batch normalisation"):
        model.folded(model.initial())


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest, step", [(1, 1), (7, 1), (100, 1), (96, 2), (1000, 8)])
def test_largest_batch(largest, step):
    tried = []

    def fits(size):
        tried.append(size)
        return size <= largest

    found = bench_model.largest_batch(fits, step)
    assert found <= largest and found % step == 0 and found >= 0.93 * largest - step
    assert len(tried) <= 16


def test_no_batch_fits():
    with pytest.raises(UserError, match="Not even 2 images fit"):
        bench_model.largest_batch(lambda size: False, 2)


def test_a_step_that_is_exhausted_does_not_fit(monkeypatch):
    model = bench_model.Model(tiny())
    need = model.training(4).memory
    assert bench_model.fits(model, need, 4, run=True) and not bench_model.fits(model, need - 1, 4, run=False)

    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")

    monkeypatch.setattr(model, "training", full)
    assert not bench_model.fits(model, None, 4, run=False)
    monkeypatch.setattr(model, "training", lambda *_: (_ for _ in ()).throw(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        bench_model.fits(model, None, 4, run=False)


def test_find_batch_command(capsys):
    """Half of what a batch of 64 holds fits less than 64, and what is found does fit."""
    flags = ["--config=configs/baseline.py:smoke", "--config.devices=1", "--size=32"]
    model = bench_model.Model(command.configured(*reversed(command.arguments(flags))))
    need = {size: model.training(size).memory for size in (32, 64)}
    limit = (need[32] + need[64]) / 2
    assert command.main([*flags, "--find-batch", f"--memory={limit / 1e9}"]) == 0
    found = int(capsys.readouterr().out.split("batch_size=")[1])
    assert 32 <= found < 64 and model.training(found).memory <= limit


FULL = (
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 99 GiB.\n#1 ..\n",
    "INTERNAL: Failed to allocate 123 bytes for new constant",
    "CUDA_ERROR_OUT_OF_MEMORY: no more",
    "Out of memory allocating 5 bytes",
)


def advised(err):
    """The last line on stderr, and the words of the command that it tells."""
    line = err.strip().splitlines()[-1]
    told, _, words = line.partition("found by: python -m mljax.bench ")
    return told, shlex.split(words)


@pytest.mark.parametrize("text", FULL)
def test_a_full_memory_ends_training_in_one_sentence(text, monkeypatch, capsys, tmp_path):
    """Raised from the first step of a run; the command that is told is one that the benchmark understands."""

    def full(*_):
        raise jax.errors.JaxRuntimeError(text)

    place = parallel.compile_step
    monkeypatch.setattr(parallel, "compile_step", lambda *given: (full, *place(*given)[1:]))
    monkeypatch.setattr("mljax.config.command.setup_jax", lambda: None)
    argv = ["--config=configs/baseline.py:smoke", "--config.optim.batch_size=24", "--config.devices=1"]
    argv += ["--config.backbone.widths=(4, 4, 4, 4)", "--config.input.size=32"]
    assert main.guarded(lambda: main.main([*argv, f"--workdir={tmp_path / 'run'}"])) == 2
    told, words = advised(capsys.readouterr().err)
    assert "batch of 24 at 32 pixels does not fit" in told
    assert words == [w for w in argv if "batch_size" not in w] + ["--labels=20", "--find-batch"]
    found = command.configured(*reversed(command.arguments(words)))
    assert found.backbone.widths == (4, 4, 4, 4) and found.optim.batch_size == 16


@pytest.mark.parametrize("select", ["last", "best"])
def test_a_full_evaluation_keeps_what_was_trained(monkeypatch, capsys, tmp_path, select):
    """The sentence names the evaluation's batch, and the run goes on with a smaller one where it was."""
    scores, sizes = scoring.Scorer.scores, []

    def limited(self, variables, source, maps, config):
        sizes.append(config.eval.batch_size)
        if config.eval.batch_size > 8:
            raise jax.errors.JaxRuntimeError(FULL[0])
        return scores(self, variables, source, maps, config)

    monkeypatch.setattr(scoring.Scorer, "scores", limited)
    monkeypatch.setattr("mljax.config.command.setup_jax", lambda: None)
    argv = ["--config=configs/baseline.py:smoke", "--config.devices=1", "--config.eval.batch_size=32"]
    argv += [f"--config.eval.select={select}", "--config.optim.epochs=2", "--config.eval.every=2"]  # one evaluation
    argv += ["--config.backbone.widths=(4, 4, 4, 4)", "--config.input.size=32", f"--workdir={tmp_path / 'run'}"]
    assert main.guarded(lambda: main.main(argv)) == 2
    told, words = advised(capsys.readouterr().err)
    assert "An evaluation batch of 32 at 32 pixels does not fit" in told
    assert words[-2:] == ["--find-batch", "--only=infer"] and not any("eval.batch_size" in w for w in words)
    kept = max(int(path.name) for path in (tmp_path / "run" / "checkpoints" / "0").glob("[0-9]*"))
    assert main.guarded(lambda: main.main([*argv, "--config.eval.batch_size=8"])) == 0
    assert f"resumed at step {kept} of" in capsys.readouterr().err and sizes[:2] == [32, 8]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["step"] == kept
    assert predict.load(tmp_path / "run", checkpoint="best").step == kept  # it counts as evaluated


def test_find_batch_of_an_evaluation(capsys):
    """It holds no gradients and no optimiser, so more fits than of training."""
    flags = ["--config=configs/baseline.py:smoke", "--config.devices=1", "--size=32", "--find-batch"]
    model = bench_model.Model(command.configured(*reversed(command.arguments(flags))))
    limit = model.training(32).memory
    assert command.main([*flags, "--only=infer", f"--memory={limit / 1e9}"]) == 0
    text, _, found = capsys.readouterr().out.strip().rpartition("eval.batch_size=")
    assert text.startswith("The largest evaluation batch") and int(found) > 32
    assert model.inference(int(found)).memory <= limit


def test_find_batch_of_a_stage(monkeypatch, capsys):
    """What is printed is a flag that the run takes."""
    monkeypatch.setattr(bench_model, "fits", lambda model, limit, size, **_: size <= 40)
    flags = ["--config=configs/mulcon.py:smoke", "--config.devices=1", "--stage=2", "--find-batch", "--memory=0.5"]
    assert command.main(flags) == 0
    flag = capsys.readouterr().out.split(": ")[-1].strip()
    assert flag.startswith("--config.stages[1].optim.batch_size=")
    own = [flags[0], flag]
    sizes = [command.configured(own, command.arguments([f"--stage={n}"])[0]).optim.batch_size for n in (1, 2)]
    assert sizes[1] == int(flag.partition("=")[2]) != sizes[0]


def test_a_full_memory_names_the_stage(monkeypatch, capsys, tmp_path):
    def run(spec, writer):
        if spec.index:
            raise MemoryError
        return {}

    monkeypatch.setattr("mljax.train.trainer.run_stage", run)
    monkeypatch.setattr("mljax.config.command.setup_jax", lambda: None)
    argv = ["--config=configs/mulcon.py:coco2014,smoke", f"--workdir={tmp_path / 'run'}"]
    assert main.guarded(lambda: main.main(argv)) == 2
    told, words = advised(capsys.readouterr().err)
    assert "batch of 16 at 64 pixels of stage 2 does not fit" in told and "--stage=2" in words
    whole = "--config=configs/mulcon.py:coco2014"
    for stage, (batch, name) in enumerate(((32, "adamw"), (24, "sgd")), 1):
        found = command.configured([whole], command.arguments([f"--stage={stage}"])[0])
        assert (found.optim.batch_size, found.optim.name) == (batch, name)
    with pytest.raises(UserError, match="--stage=3: configs/mulcon.py:coco2014 has 2"):
        command.main([whole, "--stage=3"])


@pytest.mark.parametrize("kind, devices", [("jit", 1), ("jit", 2), ("pmap", 2)])
def test_the_step_writes_its_state_over_the_old_one(kind, devices):
    """Donated: results lie where the arguments did, so that the state is held once.

    All of its arrays; of its numbers the learning rate is only written, so that it is no argument of the program.
    """
    model = bench_model.Model(tiny(devices=devices, parallel=kind, ema=0.9))
    state = jax.eval_shape(model.state_of, model.variables)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state) if x.ndim)
    stats = model.training(4).call.memory_analysis()
    assert stats.alias_size_in_bytes >= size > 4 * sum(x.size for x in jax.tree.leaves(state.params))


def test_an_evaluation_compiles_once():
    """Splits of any size are batches of one shape: the second and the third compile nothing."""
    config = tiny()
    model = bench_model.Model(config)
    scorer, variables = scoring.Scorer(model.run, model.devices), model.initial()
    for rows in (5, 17, 64):
        scores = scorer.scores(variables, loop.source(model.run.meta, rows, "split"), None, config)
        assert scores.shape == (rows, model.run.meta.num_labels)
        assert scorer._scores._cache_size() == 1


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


def test_the_host_never_waits_for_the_last_step(monkeypatch, tmp_path):
    """Metrics are fetched when two later steps are dispatched, and no more than those are ever in flight."""
    dispatched, done, fetched = [], [], []
    place, wait, get = parallel.compile_step, jax.block_until_ready, jax.device_get

    def counted(*given):
        step, *rest = place(*given)

        def kept(state, batch):
            state, metrics = step(state, batch)
            dispatched.append(metrics["loss"])
            return state, metrics

        return kept, *rest

    def waited(x):
        done.extend((len(dispatched), i) for i, loss in enumerate(dispatched, 1) if loss is x)
        return wait(x)

    def got(x):
        if isinstance(x, list) and x and isinstance(x[0], tuple):
            fetched.append((x[-1][0] + 1, len(dispatched)))
        return get(x)

    monkeypatch.setattr(parallel, "compile_step", counted)
    config = tiny(log_every=4)
    config.optim.epochs, config.optim.batch_size, config.eval.every = 2, 4, 1
    monkeypatch.setattr(jax, "block_until_ready", waited)
    monkeypatch.setattr(jax, "device_get", got)
    train.fit(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    written = [line["step"] for line in lines if "loss" in line]
    total = len(dispatched)
    epoch = total // 2
    assert written == sorted({*range(4, total + 1, 4), epoch, total})
    for until, seen in fetched:
        assert seen in (until + IN_FLIGHT, *((until,) if until in (epoch, total) else ()))
    assert len(done) == total - 2 * IN_FLIGHT  # at every step but the first two of an epoch,
    assert {now - waited_for for now, waited_for in done} == {IN_FLIGHT}  # for the one that is two steps back


def test_late_items():
    """Two more are asked for before the first is handed over, none is lost."""
    asked = []
    items = scoring.delayed(asked.append(i) or i for i in range(5))
    assert next(items) == 0 and asked == [0, 1, 2]
    assert list(items) == [1, 2, 3, 4]
    assert list(scoring.delayed(iter([7]))) == [7]


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


# --- compiled programs -----------------------------------------------------------------------------------------------

PROGRAM = """HloModule jit_step, entry_computation_layout={(f32[4,8]{1,0})->f32[8,4]{1,0}}

%fused_move (p0: f32[4,8]) -> bf16[8,4] {
  %p0 = f32[4,8]{1,0} parameter(0)
  %t.1 = f32[8,4]{1,0} transpose(%p0), dimensions={1,0}
  ROOT %c = bf16[8,4]{1,0} convert(%t.1)
}

%fused_work (p1: f32[4,8]) -> f32[8,4] {
  %p1 = f32[4,8]{1,0} parameter(0)
  %t.2 = f32[8,4]{1,0} transpose(%p1), dimensions={1,0}
  ROOT %m = f32[8,4]{1,0} multiply(%t.2, %t.2)
}

%fused_free (p2: f32[4,8]) -> f32[32] {
  %p2 = f32[4,8]{1,0} parameter(0)
  %b = f32[32]{0} bitcast(%p2)
  ROOT %n = f32[32]{0} negate(%b)
}

ENTRY %main (x: f32[4,8]) -> f32[8,4] {
  %x = f32[4,8]{1,0} parameter(0)
  %copy.3 = f32[4,8]{0,1} copy(%x), metadata={op_name="jit(step)/conv1"}
  %moved = bf16[8,4]{1,0} fusion(%x), kind=kLoop, calls=%fused_move
  %free = f32[32]{0} fusion(%x), kind=kLoop, calls=%fused_free
  ROOT %worked = f32[8,4]{1,0} fusion(%copy.3), kind=kLoop, calls=%fused_work, metadata={op_name="jit(step)/square"}
}
"""


def test_copies_of_a_program():
    found = {m.name: (m.size, m.fused, m.source) for m in hlo.moves(PROGRAM)}
    assert found == {
        "copy.3": (128, False, "jit(step)/conv1"),
        "moved": (64, False, ""),
        "worked": (128, True, "jit(step)/square"),
    }


LOOP = """HloModule loop

%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %v = f32[8]{0} get-tuple-element(%s), index=1
  %twice = f32[8]{0} add(%v, %v)
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %twice)
}

%condition (c: (s32[], f32[8])) -> pred[] {
  %c = (s32[], f32[8]{0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (x: (s32[], f32[8])) -> (s32[], f32[8]) {
  %x = (s32[], f32[8]{0}) parameter(0)
  ROOT %w = (s32[], f32[8]{0}) while(%x), condition=%condition, body=%body, config={"known_trip_count":{"n":"10"}}
}
"""


def test_traffic_of_a_program():
    """Operands and results of what runs, a loop as often as it does; a fusion's inside is free."""
    assert hlo.traffic(PROGRAM) == (128 + 128) + (64 + 128) + (128 + 128) + (128 + 128)
    assert hlo.traffic(LOOP) == 10 * 3 * 32


def test_programs_for_a_gpu_that_is_not_here(monkeypatch, capsys, tmp_path):
    """What is told of them; this machine's own compiler stands for the GPU's, which only reads what it is told."""
    told = target.description("h200")
    assert "core_count: 132" in told and told.count("{") == told.count("}") and '"NVIDIA H200"' in told
    monkeypatch.setattr(target, "elsewhere", contextlib.nullcontext)
    monkeypatch.setattr(target, "devices", lambda name, count: jax.devices()[:count])
    flags = ["--config=configs/baseline.py:smoke", "--config.devices=1", "--size=32", "--target=h100"]
    assert command.main([*flags, "--batch=8", "--fold", f"--json={tmp_path / 'found.json'}"]) == 0
    out = capsys.readouterr().out
    assert "NVIDIA H100 80GB HBM3, which is not here" in out
    assert [line.split()[0] for line in out.splitlines()[1::2]] == ["train", "infer", "folded"]
    found = json.loads((tmp_path / "found.json").read_text())
    for part in ("train", "infer", "folded"):
        assert found[part]["moved_bytes"] > found[part]["program_bytes"] > 0
        assert found[part]["images_per_s_bound"] == pytest.approx(8 * 3.35232e12 / found[part]["moved_bytes"])
    assert found["infer"]["moved_bytes"] < found["train"]["moved_bytes"]
    monkeypatch.setattr(bench_model, "fits", lambda model, limit, size, **_: size * 1e9 <= limit)
    assert command.main([*flags, "--find-batch"]) == 0
    assert "fits 63.7 GB is 62" in capsys.readouterr().out  # 75 % of 84.9


@pytest.mark.parametrize("flags, sentence", [
    (("--target=h10",), "no GPU 'h10' .did you mean 'h100'"),
    (("--target=h100", "--only=loop"), "nothing runs; leave out --only"),
    (("--target=h100", "--against=torch"), "nothing runs; leave out --against"),
    (("--target=h100", "--scale=batch"), "nothing runs; leave out --scale"),
])  # fmt: skip
def test_wrong_targets(flags, sentence):
    with pytest.raises(UserError, match=sentence):
        command.main(["--config=configs/baseline.py:smoke", *flags])


def test_a_target_needs_the_compiler_for_it(monkeypatch):
    def none(*_, **__):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", none)
    with pytest.raises(UserError, match=r"pip install 'jax\[cuda13\]'"):
        target.devices("h100", 1)


def test_a_target_takes_the_forms_for_a_gpu(monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "XLA_FLAGS", "TF_CPP_MIN_LOG_LEVEL"):
        monkeypatch.setenv(name, "")
    assert convolution.on_cpu()
    with target.elsewhere():
        assert not convolution.on_cpu()
    assert convolution.on_cpu()


@pytest.mark.parametrize("shape, size", [
    ("bf16[2,3]{1,0}", 12), ("f32[]", 4), ("(s32[5]{0}, u8[1])", 20), ("pred[7]{0}", 7), ("f8e4m3fn[6]{0}", 6),
    ("token[]", 0),
])  # fmt: skip
def test_bytes_of_a_shape(shape, size):
    assert hlo.size_of(shape) == size


def test_programs_are_kept_and_their_copies_told(capsys, tmp_path):
    flags = ["--config=configs/baseline.py:smoke", "--config.devices=1", "--batch=4", "--size=32", "--rounds=1"]
    assert command.main([*flags, "--only=train,infer", f"--hlo={tmp_path}"]) == 0
    out = capsys.readouterr().out
    for part in ("train", "infer"):
        assert (tmp_path / f"{part}.txt").read_text().startswith("HloModule")
        rows = (tmp_path / f"{part}_moves.txt").read_text().splitlines()[1:]
        alone = sum(row.split()[1] == "alone" for row in rows)
        assert f"{alone} copies and transposes of" in out


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
    (("--config=configs/baseline.py:smoke", "--scale=batch", "--values=1,x"), "no list of whole numbers"),
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
