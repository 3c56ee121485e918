"""Configs: words, overrides, stages, the form of older runs, and a run directory of version 0.1 that still works."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import pytest

import toy
from mljax import build, check, predict
from mljax.config.base import base
from mljax.config.flags import parse
from mljax.config.overrides import overridden, override
from mljax.config.reading import read_config
from mljax.config.sections import OPTIM, TRAINED, check_sections
from mljax.config.stages import stage_configs
from mljax.config.text import FLAT, completed, from_json, to_json
from mljax.errors import UserError
from mljax.optim.optimizer import optimizer
from mljax.rundir import load_config

GOLDEN = toy.TESTS / "golden"

SMOKE = "configs/cmsg.py:smoke"


# --- words and files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "one", "other"),
    [("cmsg", "star", "voc2007"), ("csra", "heads=6", "coco2014"), ("query2label", "swin_l", "coco2014")],
)
def test_words_may_stand_in_any_order(config, one, other):
    first, second = toy.config(config, f"{one},{other}"), toy.config(config, f"{other},{one}")
    assert first == second and first != toy.config(config, other)


@pytest.mark.parametrize("word", ["threshold=", "known"])
def test_a_word_without_its_value(word):
    with pytest.raises(UserError, match=f"The word '{word.rstrip('=')}' needs a value: {word.rstrip('=')}=VALUE"):
        read_config(f"configs/sst.py:{word}")


def test_wrong_config_files_words_keys_and_values():
    with pytest.raises(UserError, match=r"no config file 'configs/cmgs.py' \(did you mean 'configs/cmsg.py'"):
        read_config("configs/cmgs.py")
    with pytest.raises(UserError, match=r"no experiment 'voc207' \(did you mean 'voc2007'"):
        read_config("configs/cmsg.py:voc207")
    found = read_config(SMOKE)
    with pytest.raises(UserError, match=r"no key 'optm' \(did you mean 'optim'"):
        override(found, "optm.lr", "1")
    with pytest.raises(UserError, match=r"no key 'sed' \(did you mean 'seed'"):
        override(found, "sed", "1")
    with pytest.raises(UserError, match="expected a value of type int"):
        override(found, "optim.epochs", "many")
    override(found, "system.sga_layer", "3")
    with pytest.raises(UserError, match=r"no setting 'sga_layer' \(did you mean 'sga_layers'"):
        toy.assembled(found)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("def get_config(arg):\n  return (", "fails in line 2 with SyntaxError"),
        ("def get_config(arg):\n  return arg.x\n", "fails in line 2 with AttributeError: 'NoneType'"),
        ("x = 1\n", "has no function get_config"),
        ("def get_config(arg):\n  return {}\n", "returns dict"),
    ],
)
def test_broken_config_file(tmp_path, text, sentence):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=sentence):
        read_config(str(tmp_path / "mine.py"))


# --- overrides --------------------------------------------------------------------------------------------------------


def test_overrides_keep_types():
    found = read_config(SMOKE)
    override(found, "optim.epochs", "3")
    override(found, "optim.lr", "1")
    override(found, "optim.clip_norm", "10.0")  # not written out in the config, a setting of the optimizer
    override(found, "parallel", "pmap")
    override(found, "cache.train_views", "320,320:flip")
    override(found, "backbone.widths", "(8,8,8,8)")
    override(found, "backbone.endpoints", "8,16")  # names, though they look like numbers
    override(found, "system.position", "true")
    assert found.optim.epochs == 3 and found.optim.lr == 1.0 and isinstance(found.optim.lr, float)
    assert found.backbone.widths == (8, 8, 8, 8) and found.backbone.endpoints == ("8", "16")
    assert found.cache.train_views == ("320", "320:flip") and found.system.position is True


def test_a_locked_config_is_copied():
    found = read_config(SMOKE)
    changed = overridden(found, [("optim.epochs", "3"), ("weights.name", "x.pth")])
    assert changed.optim.epochs == 3 and found.optim.epochs == 2 and changed.is_locked and found.is_locked
    assert changed.weights.name == "x.pth" and found.weights.name is None
    with pytest.raises(UserError, match="expected a value of type int"):  # types of what is not set yet are kept
        overridden(found, [("devices", "many")])


def test_what_is_none_in_words():
    found = toy.config("cmsg").lock()
    override(found, "system.mode", "none")  # the ablation
    override(found, "weights.name", "none")
    override(found, "data.classes", "cat,dog")
    assert found.system.mode == "none" and found.weights.name is None
    found = toy.config("cmsg", "csv").lock()
    override(found, "data.classes", "cat,dog")  # not written out in the config, a tuple in the reader
    override(found, "data.file", "2007")
    assert found.data.classes == ("cat", "dog") and found.data.file == "2007"


def test_another_name_leaves_the_settings_of_the_old_one():
    argv = ["--config.data.root=photos", "--config.data.name=folders", "--config.loss.name=asl"]
    found = overridden(toy.config("baseline", "csv"), parse([*argv, "--config.loss.clip=0.1"])["overrides"])
    assert dict(found.data) == {"name": "folders", "root": "photos"}
    assert dict(found.loss) == {"name": "asl", "reduction": "mean", "clip": 0.1}
    pairs = parse(["--config.data.file=x", "--config.data.name=folders"])["overrides"]
    with pytest.raises(UserError, match=r"config.data \('folders'\) has no setting 'file'"):
        check.check(overridden(read_config(SMOKE), pairs))


def test_a_schedule_by_its_name_alone():
    """`--config.optim.schedule=constant` is short for its name; old settings go with the old name."""
    argv = ["--config.optim.schedule.every=3", "--config.optim.schedule=step"]
    found = overridden(toy.config("c_tran", "voc2007"), parse(argv)["overrides"])
    assert dict(found.optim.schedule) == {"name": "step", "factor": 0.1, "every": 3}  # plateau has a factor too
    found = overridden(found, [("optim.schedule", "constant")])
    assert dict(found.optim.schedule) == {"name": "constant"}
    staged = overridden(toy.config("mulcon"), [("stages[1].optim.schedule", "constant")])
    assert [s.optim.schedule.name for s in stage_configs(staged)] == ["one_cycle", "constant"]


def test_another_optimizer_leaves_the_settings_of_the_old_one():
    found = overridden(toy.config("query2label", "coco2014"), [("optim.name", "sgd")])  # has Adam's eps
    assert "eps" not in found.optim and (found.optim.name, found.optim.lr) == ("sgd", 1e-4)
    check.check(overridden(found, [("optim.momentum", "0.5"), ("weights.name", "None")]))


@pytest.mark.parametrize(
    ("pairs", "sentence"),
    [
        (
            {"optim.schedule": "constant", "optim.schedule.pct_start": "0.3"},
            r"config.optim.schedule \('constant'\) has no setting 'pct_start'; 'one_cycle' has it.",
        ),
        (
            {"optim.schedule.pct_strt": "0.3"},
            r"config.optim.schedule \('one_cycle'\) has no setting 'pct_strt' \(did you mean 'pct_start'",
        ),
        (
            {"optim.pct_start": "0.3"},
            r"config.optim \('adamw'\) has no setting 'pct_start'; it is a setting of the schedule 'one_cycle':"
            " config.optim.schedule.pct_start.",
        ),
        ({"optim.momentum": "0.3"}, r"config.optim \('adamw'\) has no setting 'momentum'; 'sgd' has it."),
        ({"optim.name": "sgd", "optim.eps": "1.0"}, r"\('sgd'\) has no setting 'eps'; 'adam' and 'adamw' have it."),
        ({"optim.schedule": "onecycle"}, r"no 'onecycle' among the schedules \(did you mean 'one_cycle'"),
        ({"optim.schedule": "plateau", "optim.schedule.patience": "x"}, r"has patience='x'; it must be a whole number"),
        ({"optim.schedule.pct_start": "3"}, r"config.optim.schedule.pct_start is 3; it is a share"),
        ({"optim.schedule.epochs": "1"}, r"config.optim.schedule.epochs is 1, less than the epochs of the run"),
        ({"optim.schedule": "step"}, r"needs either config.optim.schedule.every or config.optim.schedule.boundaries"),
        ({"optim.betas": "(0.9,1.0)"}, r"config.optim.betas is \(0.9, 1.0\); expected two numbers from 0 to below 1"),
        ({"observe.name": "known", "observe.rate": "1"}, r"config.observe \('known'\) has no setting 'rate'"),
        ({"system.sga_layer": "1"}, r"config.system \('cmsg'\) has no setting 'sga_layer' \(did you mean 'sga_layers'"),
        ({"loss.gamma_ng": "1"}, r"config.loss \('asl'\) has no setting 'gamma_ng' \(did you mean 'gamma_neg'"),
    ],
)
def test_settings_that_nothing_uses(pairs, sentence):
    found = overridden(read_config(SMOKE), pairs.items())
    with pytest.raises(UserError, match=sentence):
        check.check(found)


def test_a_whole_config_passes():
    for stage in stage_configs(toy.config("cmsg")):
        check.check(stage)


def test_what_the_source_tells_is_what_the_import_tells():
    """Names and settings are read from source files, so that a wrong one is found without an import."""
    for kind in build.SECTIONS.values():
        whole = {"epr", "pr"} if kind == "losses" else set()
        assert build.listed(kind) == {*build.names(kind)} | whole
        for name in build.names(kind):
            keywords = build.accepted(kind, name)
            linen = set(build.OF_LINEN)
            assert keywords is None or keywords | linen == set(build.keywords(build.find(kind, name))) | linen, name
    given = {"params", "total_steps", "steps_per_epoch", "settings"}
    assert {*OPTIM} == {*build.keywords(optimizer), *TRAINED} - given


# --- stages -----------------------------------------------------------------------------------------------------------


def test_a_stage_lays_what_it_changes_over_the_base():
    found = base()
    found.optim.schedule = {"name": "one_cycle", "pct_start": 0.3}
    found.system = {"name": "role", "net": {"name": "baseline", "pooling": "max"}}
    found.stages = (
        {"optim": {"epochs": 3, "schedule": {"epochs": 80}}, "system": {"net": {"pooling": "average"}}},
        {"optim": {"schedule": {"name": "constant"}}, "system": {"net": {"name": "csra"}}},
        {"optim": {"name": "sgd", "lr": 0.1, "epochs": 1, "batch_size": 2}},
    )
    one, two, three = stage_configs(found)
    assert dict(one.optim.schedule) == {"name": "one_cycle", "pct_start": 0.3, "epochs": 80} and one.optim.epochs == 3
    assert dict(one.system.net) == {"name": "baseline", "pooling": "average"}
    assert dict(two.optim.schedule) == {"name": "constant"} and two.optim.name == "adamw"
    assert dict(two.system.net) == {"name": "csra"}  # another name has settings of its own
    assert dict(three.optim) == {"name": "sgd", "lr": 0.1, "epochs": 1, "batch_size": 2}
    assert dict(found.optim.schedule) == {"name": "one_cycle", "pct_start": 0.3}


# --- runs of version 0.1 ----------------------------------------------------------------------------------------------


def test_flat_settings_of_a_schedule_become_a_section():
    flat = {"name": "sgd", "lr": 0.1, "schedule": "step", "every": 20, "momentum": 0.9, "pct_start": 0.3, "eps": 1e-8}
    stages = [
        {"optim": {"epochs": 5, "factor": 0.5}, "start": "ema"},
        {"optim": {"schedule": "plateau", "metric": "loss"}},
        {"optim": {"name": "adamw", "lr": 1e-3, "schedule_epochs": 80, "betas": [0.9, 0.99]}},
        {"ema": 0.9},
    ]
    found = completed({"optim": flat, "stages": stages})
    assert found["optim"] == {"name": "sgd", "lr": 0.1, "momentum": 0.9, "schedule": {"name": "step", "every": 20}}
    assert found["stages"] == [
        {"optim": {"epochs": 5, "schedule": {"factor": 0.5}}, "start": "ema"},
        {"optim": {"schedule": {"name": "plateau", "metric": "loss"}}},
        {
            "optim": {
                **{"name": "adamw", "lr": 1e-3, "betas": [0.9, 0.99]},
                "schedule": {"name": "one_cycle", "epochs": 80},
            }
        },
        {"ema": 0.9},
    ]
    assert completed(json.loads(json.dumps(found))) == found  # what has its sections stays as it is
    assert set(FLAT) == build.listed("optim.schedules")
    new = json.loads(to_json(toy.config("mulcon", "coco2014")))
    assert completed(json.loads(json.dumps(new))) == new


COMPILED_AS_THE_RUN = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(toy.ROOT)}


@pytest.fixture
def old_run(tmp_path):
    return shutil.copytree(GOLDEN / "run_0_1", tmp_path / "run")


SCORED = """
import sys
import numpy as np
from mljax import evaluate, predict
run, folder = sys.argv[1:]
photos = np.load(f"{folder}/photos.npz")
np.save(f"{folder}/scores.npy", predict.load(run).scores([photos[f"arr_{i}"] for i in range(len(photos))]))
assert evaluate.main([f"--workdir={run}"]) == 0
"""


def photos():
    return [np.random.default_rng(i).integers(0, 256, (48 + 8 * i, 64, 3)).astype(np.uint8) for i in range(4)]


def same(ours, theirs):
    """Equal bit for bit under the jaxlib that made the golden file; another one may sum in another order."""
    if version("jaxlib") == str(np.load(GOLDEN / "run_0_1.npz")["jaxlib"]):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_a_run_of_version_0_1_loads_predicts_and_evaluates(old_run):
    config = load_config(old_run)
    assert dict(config.optim.schedule) == {"name": "step", "boundaries": (1, 2), "factor": 0.5, "warmup_epochs": 0.5}
    assert "boundaries" not in config.optim and config.optim.momentum == 0.8
    check.check(stage_configs(from_json(to_json(config)))[0])
    run = predict.load(old_run)
    before = json.loads((old_run / "report.json").read_text())
    assert run.evaluate()["metrics"] == pytest.approx(before["metrics"], abs=1e-4)
    np.savez(old_run.parent / "photos.npz", *photos())
    command = [sys.executable, "-c", SCORED, str(old_run), str(old_run.parent)]
    subprocess.run(command, env=COMPILED_AS_THE_RUN, cwd=toy.ROOT, check=True)
    golden = np.load(GOLDEN / "run_0_1.npz")
    same(np.load(old_run.parent / "scores.npy"), golden["scores"])
    same(np.load(old_run / "scores_test_raw.npz")["scores"], golden["evaluated"])


def test_a_run_of_version_0_1_resumes(old_run):
    """From its checkpoint of step 3 the run reaches the scores that it had after step 9."""
    scores = np.load(old_run / "scores.npz")["scores"]
    for name in ("report.json", "scores.npz"):
        (old_run / name).unlink()
    shutil.rmtree(old_run / "checkpoints" / "0" / "9")
    pairs = {
        **{"optim.name": "sgd", "optim.schedule": "step", "devices": "1", "backbone.widths": "4,4,4,4"},
        **{"optim.schedule.boundaries": "(1,2)", "optim.schedule.factor": "0.5", "optim.momentum": "0.8"},
        **{"optim.schedule.warmup_epochs": "0.5", "optim.lr": "0.05", "optim.epochs": "3", "input.threads": "0"},
    }
    command = [sys.executable, "-m", "mljax.main", "--config=configs/baseline.py:smoke", f"--workdir={old_run}"]
    command += [f"--config.{key}={value}" for key, value in pairs.items()]
    subprocess.run(command, env=COMPILED_AS_THE_RUN, cwd=toy.ROOT, check=True)
    same(np.load(old_run / "scores.npz")["scores"], scores)


def test_quick_checks_of_a_stage():
    check_sections(stage_configs(toy.config("cdcr", "coco2014"))[1])
