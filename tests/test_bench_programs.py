"""Compiled programs of the benchmark: what they copy and move, folded ones, and those for a GPU that is not here."""

import contextlib
import json

import jax
import pytest

import toy
from mljax import convolution
from mljax.bench import command, hlo, target
from mljax.bench import model as bench_model
from mljax.errors import UserError

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


def test_nothing_to_fold_is_a_sentence():
    config = toy.config("baseline", devices=1, input__size=32, cache__train_views=("32",), cache__eval_views=("32",))
    config.backbone.frozen = "all"
    model = bench_model.Model(config)
    with pytest.raises(UserError, match="no batch normalisation"):
        model.folded(model.initial())
