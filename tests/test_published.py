"""A released checkpoint becomes a run directory that predicts and evaluates, and what does not fit is said."""

import numpy as np
import pytest

import mljax
import toy
from mljax import release
from mljax.commands import weights as weights_command
from mljax.errors import UserError
from mljax.trees import flatten
from mljax.weights import published
from torch_writer import bare_resnet, one_sentence, tensors, torch_zip

CLASSES = ("ant", "bee", "cow")
CONFIG = """
from mljax import config as c


def get_config(arg=None):
    config = c.base()
    config.system = dict(name="csra", heads=2, lam=0.3)
    config.backbone = dict(name="resnet18")
    config.input.size = 64
    config.optim.groups = (("backbone/.*", {"lr": 0.1}),)  # as in the papers' words
    return config
"""


def released():
    """A random ResNet-18 with CSRA's head, by the authors' names."""
    rng = np.random.default_rng(0)
    state = {name: np.asarray(v) for name, v in bare_resnet((2, 2, 2, 2), False, 64).items()}
    for name, value in state.items():
        if value.ndim == 4:  # small kernels, so that activations stay near 1
            state[name] = (0.1 * value / value[0].size ** 0.5).astype(np.float32)
        elif name.endswith("running_var"):
            state[name] = np.abs(value) + 1
    for head in range(2):
        state[f"classifier.multi_head.{head}.head.weight"] = rng.normal(0, 0.1, (3, 512, 1, 1)).astype(np.float32)
    return state


def by_hand(logit_map, temperatures, lam):
    """CSRA's logits from score maps (heads b n l), in plain numpy; temperature 99 is the maximum."""
    total = 0
    for scores, t in zip(logit_map, temperatures):
        e = np.exp(t * (scores - scores.max(1, keepdims=True)))
        attended = scores.max(1) if t >= 99 else (e / e.sum(1, keepdims=True) * scores).sum(1)
        total = total + scores.mean(1) + lam * attended
    return total


@pytest.fixture
def files(tmp_path):
    (tmp_path / "mine.py").write_text(CONFIG)
    (tmp_path / "names.txt").write_text("\n".join(CLASSES) + "\n")
    state = released()
    wrapped = {"epoch": 3, "state_dict": tensors({f"module.{name}": value for name, value in state.items()})}
    torch_zip(tmp_path / "released.pth", wrapped)
    return tmp_path, state


def command(folder, workdir, *more):
    return weights_command.main(
        ["convert", str(folder / "released.pth"), f"--config={folder}/mine.py", f"--workdir={workdir}",
         f"--classes={folder}/names.txt", *more]
    )  # fmt: skip


def test_a_released_checkpoint_predicts(files, tmp_path, capsys, monkeypatch):
    folder, state = files
    assert command(folder, tmp_path / "run") == 0
    assert f"run directory: {tmp_path / 'run'}" in capsys.readouterr().out
    run = mljax.load(tmp_path / "run")
    assert run.classes == CLASSES
    image = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    backbone = run.experiment.system.backbone.clone(parent=None, name=None)
    inner = {c: v["backbone"] for c, v in run.variables.items() if "backbone" in v}
    mean, std = np.array(run.experiment.mean), np.array(run.experiment.std)
    pixels = ((image / 255 - mean) / std).astype(np.float32)[None]
    features = np.asarray(backbone.apply(inner, pixels, train=False)["32"]).reshape(1, -1, 512)
    kernels = [state[f"classifier.multi_head.{k}.head.weight"].reshape(3, 512) for k in range(2)]
    norms = [np.linalg.norm(k, axis=1) for k in kernels]
    maps = [features @ k.T / n for k, n in zip(kernels, norms)]
    expected = by_hand(maps, (1, 99), 0.3)
    np.testing.assert_allclose(run.scores([image]), 1 / (1 + np.exp(-expected)), atol=1e-5)
    monkeypatch.setattr("mljax.run.FOLD_FROM", 3)
    many = run.scores([image] * 3)  # batch normalisation is folded for these
    assert "bn" not in " ".join(flatten(run.folded["batch_stats"]))
    np.testing.assert_allclose(many, np.repeat(1 / (1 + np.exp(-expected)), 3, axis=0), atol=1e-5)


def test_settings_of_the_command_line(files, tmp_path):
    folder, _ = files
    command(folder, tmp_path / "run", "--config.system.lam=0.7")
    assert mljax.load(tmp_path / "run").experiment.config.system.lam == 0.7
    with pytest.raises(UserError, match="name it with --config=FILE"):
        weights_command.main(["convert", "a.pth", "b.npz", "--config.system.lam=0.7"])
    with pytest.raises(UserError, match="belongs to the command convert; leave it out"):
        weights_command.main(["list", "--config.system.lam=0.7"])


def test_the_trunk_is_the_files(files, tmp_path):
    folder, state = files
    command(folder, tmp_path / "run")
    run = mljax.load(tmp_path / "run")
    tree = run.variables["params"]["backbone"]
    np.testing.assert_array_equal(tree["stem"]["conv"]["kernel"], state["conv1.weight"].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(
        run.variables["batch_stats"]["backbone"]["layer2_0"]["downsample_bn"]["var"],
        state["layer2.0.downsample.1.running_var"],
    )


def test_what_does_not_fit_is_said(files, tmp_path):
    folder, state = files
    torch_zip(folder / "released.pth", tensors({**state, "classifier.extra.weight": np.zeros((2, 2), np.float32)}))
    with pytest.raises(UserError, match=r"no place for 'classifier\.extra\.weight'"):
        command(folder, tmp_path / "a")
    torch_zip(folder / "released.pth", tensors({k: v for k, v in state.items() if not k.startswith("classifier")}))
    with pytest.raises(UserError, match=r"0 heads and the system has 2") as error:
        command(folder, tmp_path / "b")
    one_sentence(error)
    torch_zip(folder / "released.pth", tensors({k: v for k, v in state.items() if not k.startswith("layer4.1")}))
    with pytest.raises(UserError, match="layer4_1"):
        command(folder, tmp_path / "c")
    assert not any((tmp_path / name / "checkpoints").exists() for name in "abc")


def test_what_a_user_can_get_wrong(files, tmp_path):
    folder, _ = files
    with pytest.raises(UserError, match="no file .* of class names"):
        weights_command.main(["convert", "x.pth", f"--config={folder}/mine.py", "--workdir=w", "--classes=nowhere.txt"])
    with pytest.raises(UserError, match="both --config and --workdir"):
        weights_command.main(["convert", "x.pth", "--workdir=w"])
    with pytest.raises(UserError, match="takes FILE and OUT"):
        weights_command.main(["convert", "x.pth"])
    command(folder, tmp_path / "run")
    with pytest.raises(UserError, match="already holds a run"):
        command(folder, tmp_path / "run")
    with pytest.raises(UserError, match="one file, and 2 were given"):
        release.to_run(["a.pth", "b.pth"], toy.config("csra", backbone={"name": "resnet18"}), tmp_path / "x", CLASSES)


def test_systems_without_released_files_say_so():
    run, _ = toy.assembled(toy.config("cmsg"))
    with pytest.raises(UserError, match="No released checkpoints of"):
        published.of(run.system)
