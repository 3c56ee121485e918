"""Memory that runs out: what a run says and keeps, and how the largest batch that fits is found."""

import json
import shlex

import jax
import pytest

import toy
from mljax import main, parallel, predict, scoring
from mljax.bench import command
from mljax.bench import model as bench_model
from mljax.errors import UserError

SMALL = (  # a program that is compiled often
    *("--config=configs/baseline.py:smoke", "--config.devices=1", "--size=32"),
    *("--config.backbone.widths=4,4,4,4", "--config.backbone.endpoints=4,"),
)


def tiny(**changes):
    found = toy.config("baseline", **{"devices": 1, **changes})
    found.backbone.widths, found.input.size = (4, 4, 4, 4), 32
    return found


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
    flags = [*SMALL]
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
    flags = [*SMALL, "--find-batch"]
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
