"""Overrides drawn at random from odd keys and values: one clear line each, and never a traceback."""

import logging
import os
import random
import stat

import pytest

from mljax import check, main, scoring
from mljax.config import flags
from mljax.config.command import Printable
from mljax.config.overrides import overridden
from mljax.config.reading import read_config
from mljax.config.stages import stage_configs
from mljax.errors import UserError, printable_lines

KEYS = (
    *("__init__", "__class__", "__dict__", "_fields", "", ".", "..", "a b", "é", "\x1b[31m", "name.name", "0", "[0]"),
    *(  # of a ConfigDict, and of stages
        "keys",
        "items",
        "get",
        "lock",
        "to_dict",
        "x" * 300,
        "stages[0].seed",
        "stages[99].a",
        "stages[x]",
        "\0",
        "None",
    ),
)
VALUES = (
    *("3", "-1", "0", "1e400", "nan", "-inf", "1e-300", "[1]", "[]", "{}", "{'a':1}", "()", "(1,)", "(None,)", "'x'"),
    *("None", "none", "True", "", "\x1b[2J", "\0", "é", "../..", "/etc/passwd", "x" * 5000, "[[[[[", "(" * 300),
    *("1" * 5000, "0x10", "b'x'", "{1,2}", "...", "lambda: 1", "__import__('os')", "1j", "['a','b']", "{'name':3}"),
    *("{'name':'adam'}", "{'name':['x']}", "-0.0", "9" * 20, "1.5", "resnet101", "adam", "\ud800", "a\nb"),
)


def names(section, before=""):
    for name, value in section.items():
        yield before + name
        if hasattr(value, "items"):
            yield from names(value, f"{before}{name}.")


def drawn(rng, known):
    """The key and the value of an override."""
    key, kind = rng.choice(known), rng.random()
    if kind < 0.25:
        key = f"{key}.{rng.choice(KEYS)}"
    elif kind < 0.35:
        key = rng.choice(KEYS)
    elif kind < 0.45:
        key = f"stages[0].{key}"
    return key, rng.choice(VALUES)


def configured(config, pairs):
    for stage in stage_configs(overridden(config, sorted(pairs, key=flags.order))):
        check.check(stage)


@pytest.mark.parametrize("name", ["cmsg", "baseline", "curriculum", "sst", "ml_decoder"])
def test_random_overrides(name):
    config, rng, refused = read_config(f"configs/{name}.py:smoke"), random.Random(name), 0
    known = list(names(config))
    for _ in range(150):
        pairs = [drawn(rng, known) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
        try:
            configured(config, pairs)
        except UserError as error:
            text, refused = str(error), refused + 1
            assert text.isprintable() and len(text) < 1000 and text.endswith("."), (pairs, text)
        except Exception as error:
            raise AssertionError(pairs) from error
    assert refused > 75


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("optim.__init__", "x", r"--config.optim.__init__: there is no key '__init__'"),
        ("loss.__class__", "3", "there is no key '__class__'"),
        ("system", "3", "'system' is a section; set its keys one by one, e.g. --config.system.name=3"),
        ("backbone", "[1]", "'backbone' is a section"),
        ("system", "{1: 2}", r"--config.system=\{1: 2\}: the keys of a section are names."),
        ("optim.groups", "(('a', {2: 3}),)", "the keys of a section are names"),
        ("backbone.name", "3", "There is no '3' among the backbones"),
        ("optim.groups", "({'a':1},)", r"config.optim.groups has the entry \{'a': 1\}; expected \(pattern"),
        ("optim.groups", "(('a',{'lr':'x'}),)", "has lr='x'; it must be at least 0"),
        ("loss.clip", "none", "config.loss .'asl'. has clip=None; it must be a number"),
        ("cache.eval_views", "1" * 5000, "The view '1+..1+' is not SIZE"),
        ("system.decoder_layers", "9" * 20, "must be from 0 to below 1000"),
    ],
)
def test_what_is_wrong_is_said(key, value, says):
    with pytest.raises(UserError, match=says):
        configured(read_config("configs/query2label.py:smoke"), [(key, value)])


def test_paths_that_no_system_takes(refused, tmp_path):
    run = ("--config=configs/baseline.py:smoke", f"--workdir={tmp_path / 'run'}")
    assert "is too long for a path" in refused(main, run[0], f"--workdir={tmp_path}/{'x' * 5000}")
    assert "contains a NUL character" in refused(main, run[0], "--workdir=a\0b")
    assert "There is no file of label vectors" in refused(main, *run, f"--config.vectors={'x' * 5000}")
    errors = {"x..x": OSError(36, "File name too long", "x" * 900), "ulimit": OSError(24, "Too many open files")}
    for says, error in errors.items():

        def failing(_, error=error):
            raise error

        class Command:
            main = staticmethod(failing)

        assert says in refused(Command)
    assert "NUL" in refused(type("Command", (), {"main": staticmethod(lambda _: os.stat("a\0b"))}))


HOSTILE = "\x1b[31mdog\x07 \u202e[/red] $x$"


def test_names_do_not_reach_a_terminal_raw(shell, capsys):
    shown = r"\x1b[31mdog\x07 \u202e[/red] $x$"

    class Command:
        @staticmethod
        def main(_):
            print(f"{HOSTILE}\n\tmore")
            logging.getLogger("mljax").warning("an image %s", f"{HOSTILE}\r\n")
            return 0

    capsys.readouterr()
    assert main.guarded(lambda: Command.main([])) == 0
    out, err = capsys.readouterr()
    assert out == f"{shown}\n\tmore\n" and err == f"an image {shown}\\r\\n\n"
    assert printable_lines("a\tb\nKäse") == "a\tb\nKäse" and isinstance(Printable(None), object)
    values = dict.fromkeys(("mAP", *(f"{a}{b}{c}" for a in "CO" for b in ("P", "R", "F1") for c in ("", "_3"))), 1.0)
    report = {"metrics": values, "per_class_AP": {HOSTILE: 50.0}, "split": "s", "images": 1, "selected_by": "x"}
    table = scoring.table(report | {"seed": 0, "left_out": [HOSTILE]})
    assert f"{shown}  50.0" in table and f"left out of mAP: {shown}" in table and HOSTILE not in table


def test_nothing_that_a_command_makes_is_writable_by_everybody(surroundings, tmp_path):
    before = os.umask(0)
    try:
        assert main.guarded(lambda: (tmp_path / "made").mkdir() or (tmp_path / "file").touch() or 0) == 0
        assert os.umask(0) == 0
    finally:
        os.umask(before)
    for name in ("made", "file"):
        assert not (tmp_path / name).stat().st_mode & stat.S_IWOTH


@pytest.mark.parametrize("key", ["optim.lr", "loss.gamma_pos", "system.width", "eval.threshold"])
def test_a_number_of_400_digits(key):
    with pytest.raises(UserError, match=f"config.{key}.*number is too large"):
        overridden(read_config("configs/cmsg.py"), [(key, "9" * 400)])
