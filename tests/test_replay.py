"""`--config=RUN/config.json` is what that run was trained with, and runs no code."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import toy
from mljax import main, rundir, train
from mljax.check import check
from mljax.config.overrides import overridden
from mljax.config.reading import read_config
from mljax.config.stages import stage_configs
from mljax.config.text import to_json
from mljax.errors import UserError
from mljax.rundir.checkpoint import Checkpoints


def written(folder, config):
    rundir.write_json(folder / "config.json", json.loads(to_json(config)))
    return str(folder / "config.json")


@pytest.mark.parametrize("name", toy.CONFIGS)
def test_every_config_is_the_same_from_its_run_directory(tmp_path, name):
    config = read_config(f"configs/{name}.py:smoke")
    again = read_config(written(tmp_path, config))
    assert again.to_dict() == config.to_dict() and again.is_locked
    for stage, other in zip(stage_configs(again), stage_configs(config)):
        assert stage.to_dict() == other.to_dict()


def test_overrides_mean_what_they_mean_of_the_original(tmp_path):
    config = read_config("configs/cmsg.py:smoke")
    again = read_config(written(tmp_path, config))
    pairs = [
        ("devices", "2"), ("weights.name", "123"), ("optim.lr", "1"), ("optim.groups", "(('a', {'lr': 0.5}),)"),
        ("input.size", "96"), ("optim.schedule", "constant"), ("data.digest", "whole"), ("weights.mean", "0.5,0.5,0.5"),
    ]  # fmt: skip
    for pair in pairs:
        assert overridden(again, [pair]).to_dict() == overridden(config, [pair]).to_dict()
    assert isinstance(overridden(again, pairs).optim.lr, float)
    for wrong in (("devices", "many"), ("inputs.size", "3"), ("ema", "yes")):
        messages = []
        for one in (again, config):
            with pytest.raises(UserError) as error:
                overridden(one, [wrong])
            messages.append(str(error.value))
        assert messages[0] == messages[1]


def test_a_run_is_replayed_to_the_bit(finished_run, tmp_path, shell, refused):
    flag = f"--config={finished_run / 'config.json'}"
    assert "--workdir is missing" in refused(main, flag)
    assert shell(main, flag, f"--workdir={tmp_path / 'again'}")[0] == 0
    states = []
    for workdir in (finished_run, tmp_path / "again"):
        with Checkpoints(workdir / "checkpoints" / "0", read_only=True) as checkpoints:
            states.append(toy.flat(checkpoints.restore_params("last")))
    for path, value in states[0].items():
        np.testing.assert_array_equal(states[1][path], value, err_msg=path)
    copy = tmp_path / "copy"
    shutil.copytree(finished_run, copy)
    assert shell(main, f"--config={copy / 'config.json'}", f"--workdir={copy}")[0] == 0  # its own: it goes on
    message = refused(main, f"--config={copy / 'config.json'}", f"--workdir={copy}", "--config.seed=7")
    assert "it differs in seed: 0 -> 7" in message and "Choose another --workdir" in message
    shell(main, flag, f"--workdir={tmp_path / 'short'}", "--config.optim.epochs=1", "--config.ema=0.5")
    config = rundir.load_config(tmp_path / "short")
    assert (config.optim.epochs, config.ema) == (1, 0.5)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", "null", '{"optim": 3}', '{"optim": {"name": "adam"}, "stages": 5}', "\x00", "[" * 100_000,
     '{"optim": {"schedule": "nothing"}}', '{"optim": {}, "weights": 3}'],
)  # fmt: skip
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(UserError):
        check(stage_configs(read_config(str(path)))[0])


def test_a_flipped_digit_is_noticed(tmp_path):
    path = written(tmp_path, read_config("configs/cmsg.py:smoke"))
    text = Path(path).read_text()
    Path(path).write_text(text.replace('"lr": 0.003', '"lr": 0.007'))
    with pytest.raises(UserError, match=r"config.json of a run \(its content is not what was saved\)"):
        read_config(path)
    with pytest.raises(UserError, match="takes no words"):
        read_config(f"{path}:smoke")
    with pytest.raises(UserError, match="There is no config file"):
        read_config(str(tmp_path / "none.json"))


def test_no_code_of_it_runs(tmp_path, monkeypatch):
    config = toy.config("baseline")
    config.system.name = "__import__('os').system('touch hacked')"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="There is no"):
        train.fit(read_config(written(tmp_path, config)), tmp_path / "run")
    assert not (tmp_path / "hacked").exists()
