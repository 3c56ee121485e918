"""The command line of mljax.main: flags, settings and what is wrong with them, each one sentence, exit status 2; what
answers at once; the lazy face of the package."""

import re
import subprocess
import sys

import pytest

import toy
from mljax import main, rundir
from mljax.config.flags import parse, split_overrides
from mljax.errors import UserError

QUICK = """
import sys
from mljax import main
from mljax.config.command import guarded
status = guarded(lambda: main.main(sys.argv[1:]))
heavy = [name for name in ("jax", "flax", "optax", "numpy") if name in sys.modules]
print(status, ",".join(heavy) or "light")
"""


pytestmark = pytest.mark.usefixtures("surroundings")

SMOKE = "--config=configs/cmsg.py:smoke"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "The flag --config is missing"),
        ([SMOKE], "The flag --workdir is missing"),
        (
            ["--config=configs/cmgs.py", "--workdir=x"],
            r"no config file 'configs/cmgs.py' \(did you mean 'configs/cmsg.py'",
        ),
        (["--config=configs/cmsg.py:smke", "--workdir=x"], r"no experiment 'smke' \(did you mean 'smoke'"),
        (["--config="], "The flag --config is empty"),
        (["--config", "--workdir=x"], "The flag --config needs a value before --workdir"),
        ([SMOKE, "--workdr=x"], r"no flag --workdr \(did you mean '--workdir'"),
        ([SMOKE, "--optim.epochs=3"], r"no flag --optim.epochs \(did you mean --config.optim.epochs"),
        ([SMOKE, "optim.epochs=3"], r"'optim.epochs=3' is not expected here \(did you mean --config.optim.epochs="),
        ([SMOKE, "workdir=x"], r"'workdir=x' is not expected here \(did you mean --workdir="),
        ([SMOKE, "more"], "The argument 'more' is not expected here"),
    ],
)
def test_wrong_flags(refused, argv, sentence):
    assert re.search(sentence, refused(main, *argv))


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("optm.lr=1", "there is no key 'optm' (did you mean 'optim'?)"),
        ("eval.evry=2", "there is no key 'evry' (did you mean 'every'?)"),
        ("optim.epochs.x=2", "'optim.epochs' is a value and has no keys"),
        ("optim=adam", "'optim' is a section; set its keys one by one, e.g. --config.optim.name=adam"),
        ("optim.epochs=many", "expected a value of type int, such as 2"),
        ("devices=many", "expected a value of type int"),
        ("optim.epoch=3", "config.optim ('adamw') has no setting 'epoch' (did you mean 'epochs'?)"),
        ("optim.epochs=0", "config.optim.epochs is 0; it must be at least 1"),
        ("optim.batch_size=none", "config.optim.batch_size is None; it must be a whole number"),
        ("optim.clip_norm=x", "config.optim ('adamw') has clip_norm='x'; it must be a number"),
        ("optim.lr=-1", "config.optim.lr is -1.0"),
        ("optim.name=adamx", "There is no 'adamx' among the optimizers (did you mean 'adam'?)"),
        ("eval.every=0", "config.eval.every is 0; it must be at least 1"),
        (
            "eval.select=bst",
            "config.eval.select is 'bst'; expected one of last, best, best_of_raw_and_ema (did you mean 'best'?)",
        ),
        (
            "eval.definition=envv",
            "config.eval.definition is 'envv'; expected one of raw, env, sklearn, 11point (did you mean 'env'?)",
        ),
        ("log_every=0", "config.log_every is 0; it must be at least 1"),
        ("seed=-1", "config.seed is -1; it must be from 0 to 2147483647"),
        ("ema=2", "config.ema is 2.0; it must be from 0 to below 1"),
        ("dtype=float17", "config.dtype is 'float17'; expected one of float32, bfloat16 (did you mean 'bfloat16'?)"),
        ("parallel=pmapp", "config.parallel is 'pmapp'; expected one of jit, pmap (did you mean 'pmap'?)"),
        ("input.size=0", "config.input.size is 0"),
        ("input.train.flp=1", "config.input.train has no setting 'flp' (did you mean 'flip'?)"),
        ("input.train.flip=2", "flip must lie between 0 and 1"),
        ("cache.eval_views=9x", "The view '9x' is not SIZE"),
        ("data.name=scnes", "There is no 'scnes' among the data (did you mean 'scenes'?)"),
        ("data.train_imges=9", "has no setting 'train_imges' (did you mean 'train_images'?)"),
        ("system.name=cmgs", "There is no 'cmgs' among the systems (did you mean 'cmsg'?)"),
        ("system.sga_layer=1", "has no setting 'sga_layer' (did you mean 'sga_layers'?)"),
        ("system.width=0", "width=0; it must be at least 1"),
        ("system.activation=rel", "activation='rel' (did you mean 'relu'?)"),
        ("system.position=perhaps", "expected a value of type bool"),
        (
            "system.mode=ad",
            "config.system.mode is 'ad'; expected one of add, multiply, mask, none (did you mean 'add'?)",
        ),
        ("backbone.name=resnet5", "There is no 'resnet5' among the backbones (did you mean 'resnet50'?)"),
        ("backbone.frozen=stm", "no stage 'stm' (did you mean 'stem'?)"),
        ("loss.name=asll", "There is no 'asll' among the losses (did you mean 'asl'?)"),
        ("loss.gamma_ng=1", "has no setting 'gamma_ng' (did you mean 'gamma_neg'?)"),
        ("stages=3", "a stage is a dict of what it changes"),
        ("stages=({'optm':{}},)", "config.stages[0] has no key 'optm' (did you mean 'optim'?)"),
        ("stages=({'optim':{'epocs':3}},)", "config.optim ('adamw') has no setting 'epocs' (did you mean 'epochs'?)"),
        ("stages=({'optim':3},)", "config.stages[0].optim is 3; expected a section"),
        ("splits.train=trian", "no split 'trian' (did you mean 'train'?)"),
        ("splits.eval=test[:0]", "The split 'test[:0]' is empty"),
        ("data.train_images=4", "scenes train has 4 images, fewer than a batch of 16; lower config.optim.batch_size"),
        ("devices=3", "asks for 3 devices and this machine has 2"),
        ("optim.batch_size=15", "A batch of 15 does not divide over 2 devices"),
        ("weights.name=nowhere", "'nowhere' is not a name of published weights"),
        ("weights.name=/nowhere/x.pth", "The weight file /nowhere/x.pth is missing"),
        ("vectors=nowhere.npz", "There is no file of label vectors 'nowhere.npz'"),
        ("vectors=none", "CMSG's correlation needs label vectors"),
        ("cache.train_views=64", "config.cache.train_views needs config.backbone.frozen='all'"),
    ],
)
def test_wrong_settings(refused, tmp_path, setting, sentence):
    assert sentence in refused(main, SMOKE, f"--workdir={tmp_path / 'run'}", f"--config.{setting}")
    # what never came to train does not keep its folder from the corrected command
    rundir.open_run(tmp_path / "run", toy.config("cmsg"))


def test_other_arguments_are_left_to_the_command():
    rest, settings = split_overrides(["photo.jpg", "--config.a.b=1", "--top", "3", "--config.system.name", "csra"])
    assert rest == ["photo.jpg", "--top", "3"]
    assert settings == [("system.name", "csra"), ("a.b", "1")]  # names first
    with pytest.raises(UserError, match="--config.a needs a value"):
        split_overrides(["--config.a", "--top=3"])


def test_names_come_before_their_settings_and_stages_last():
    argv = ["--config.stages[0].optim.lr=1", "--config.optim.schedule.every=2", "--config.optim.schedule=step"]
    keys = [key for key, _ in parse(argv)["overrides"]]
    assert keys == ["optim.schedule", "optim.schedule.every", "stages[0].optim.lr"]


@pytest.mark.parametrize(
    "argv",
    [
        ("--help",),
        ("--list",),
        ("--config=configs/cmgs.py", "--workdir=x"),
        ("--config=configs/cmsg.py:smke", "--workdir=x"),
        (SMOKE, "--workdir=x", "--config.optm.lr=1"),
        (SMOKE, "--workdir=x", "--config.system.name=cmgs"),
        (SMOKE, "--workdir=x", "--config.system.sga_layer=1"),
        (SMOKE, "--workdir=x", "--config.optim.schedule=constant", "--config.optim.schedule.pct_start=0.3"),
        (SMOKE, "--workdir=x", "--config.eval.every=0"),
    ],
    ids=" ".join,
)
def test_what_answers_at_once_imports_nothing_heavy(argv):
    """An answer in a tenth of a second: neither jax nor numpy is imported for help, the list and errors of a config."""
    done = subprocess.run([sys.executable, "-c", QUICK, *argv], capture_output=True, text=True, cwd=toy.ROOT)
    assert done.stdout.splitlines()[-1] == f"{0 if argv[0] in ('--help', '--list') else 2} light", done.stderr


def test_the_list_has_every_name(capsys):
    assert main.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"systems:", "backbones:", "losses:", "optim:"} <= set(lines)
    assert {"  cmsg", "  resnet101", "  scenes", "  known", "  epr", "  asl", "  sgd", "  one_cycle"} <= set(lines)


def test_the_package_imports_its_modules_on_first_use():
    code = "import mljax, sys; assert 'numpy' not in sys.modules; print(mljax.metrics.DEFINITIONS[0])"
    code += "; assert {'metrics', 'optim', 'fit', 'load', 'read_config'} <= set(dir(mljax))"
    code += "; print(mljax.read_config('configs/cmsg.py:smoke').optim.epochs, hasattr(mljax, 'nothing'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=toy.ROOT)
    assert done.stdout.split() == ["raw", "2", "False"], done.stderr
