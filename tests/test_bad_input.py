"""What a user gets wrong in flags and configs: one sentence that says what, where and what to do."""

import re

import pytest

import toy
from mljax import main, rundir
from mljax.check import check
from mljax.config.flags import parse
from mljax.config.overrides import override
from mljax.config.stages import stage_configs

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
        ([SMOKE, "optim.epochs=3"], r"'optim.epochs=3' is left over \(did you mean --config.optim.epochs="),
        ([SMOKE, "workdir=x"], r"'workdir=x' is left over \(did you mean --workdir="),
        ([SMOKE, "more"], "The argument 'more' is left over"),
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
        ("optim.epochs=many", "a value of type int is wanted, like 2"),
        ("devices=many", "a value of type int is wanted"),
        ("optim.epoch=3", "config.optim has no setting 'epoch' (did you mean 'epochs'?)"),
        ("optim.epochs=0", "config.optim.epochs is 0; it must be at least 1"),
        ("optim.batch_size=none", "config.optim.batch_size is None; it must be a whole number"),
        ("optim.clip_norm=x", "config.optim has clip_norm='x'; it must be a number"),
        ("optim.lr=-1", "config.optim.lr is -1.0"),
        ("optim.name=adamx", "'adamx', which is no optimiser (did you mean 'adam'?)"),
        ("eval.every=0", "config.eval.every is 0; it must be at least 1"),
        ("eval.select=bst", "config.eval.select is 'bst' (did you mean 'best'?)"),
        ("eval.definition=envv", "config.eval.definition is 'envv' (did you mean 'env'?)"),
        ("log_every=0", "config.log_every is 0; it must be at least 1"),
        ("seed=-1", "config.seed is -1; it must be from 0 to 2147483647"),
        ("ema=2", "config.ema is 2.0; it must be from 0 to below 1"),
        ("dtype=float17", "config.dtype is 'float17' (did you mean 'bfloat16'?)"),
        ("parallel=pmapp", "config.parallel is 'pmapp' (did you mean 'pmap'?)"),
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
        ("system.position=perhaps", "a value of type bool is wanted"),
        ("system.mode=ad", "config.system.mode is 'ad' (did you mean 'add'?)"),
        ("backbone.name=resnet5", "There is no 'resnet5' among the backbones (did you mean 'resnet50'?)"),
        ("backbone.frozen=stm", "no stage 'stm' (did you mean 'stem'?)"),
        ("loss.name=asll", "There is no 'asll' among the losses (did you mean 'asl'?)"),
        ("loss.gamma_ng=1", "has no setting 'gamma_ng' (did you mean 'gamma_neg'?)"),
        ("stages=3", "a stage is a dict of what it changes"),
        ("stages=({'optm':{}},)", "config.stages[0] has no key 'optm' (did you mean 'optim'?)"),
        ("stages=({'optim':{'epocs':3}},)", "config.optim has no setting 'epocs' (did you mean 'epochs'?)"),
        ("stages=({'optim':3},)", "config.stages[0].optim is 3; it is a section"),
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


def test_another_name_leaves_the_settings_of_the_old_one(tmp_path, refused):
    argv = [
        "--config.data.root=photos",
        "--config.data.name=folders",
        "--config.loss.name=asl",
        "--config.loss.clip=0.1",
    ]
    found = toy.config("baseline", "csv").lock()
    for key, value in parse(argv)["overrides"]:
        override(found, key, value)
    assert dict(found.data) == {"name": "folders", "root": "photos"}
    assert dict(found.loss) == {"name": "asl", "reduction": "mean", "clip": 0.1}
    said = refused(main, SMOKE, f"--workdir={tmp_path / 'run'}", "--config.data.file=x", "--config.data.name=folders")
    assert "config.data ('folders') has no setting 'file'" in said


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("def get_config(arg):\n  return (", "fails in line 2 with SyntaxError"),
        ("def get_config(arg):\n  return arg.x\n", "fails in line 2 with AttributeError: 'NoneType'"),
        ("x = 1\n", "has no function get_config"),
        ("def get_config(arg):\n  return {}\n", "returns dict"),
    ],
)
def test_broken_config_file(refused, tmp_path, text, sentence):
    (tmp_path / "mine.py").write_text(text)
    assert sentence in refused(main, f"--config={tmp_path / 'mine.py'}", f"--workdir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


def test_a_whole_config_passes():
    for stage in stage_configs(toy.config("cmsg")):
        check(stage)
