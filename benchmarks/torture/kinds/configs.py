"""Fuzzed overrides of every config: accepted, or refused in one clear line; never a traceback."""

import time
import unicodedata
from typing import Any

import numpy as np

from benchmarks.torture.harness import ROOT, Case, Failed, Kind

LIMIT, LONGEST = 2.0, 1500
VALUES = (
    *("0", "1", "-1", "2", "3.5", "-0.0", "1e308", "1e999", "nan", "inf", "-inf", "9" * 400, "0x10", "1_000", "007"),
    *("None", "True", "false", "", " ", "''", "()", "[]", "{}", "(1,)", "[1, 2", "(1,2),(3", "{'a': 1}", "{1: 2}"),
    *("sgd", "adamw", "bce", "cmsg", "small", "resnet101", "scenes", "csv", "one_cycle", "last", "best", "jit", "x"),
    *("__class__", "{0}", "%s%n", "$(id)", "../../etc/passwd", "/dev/zero", "a" * 5000, "\x1b[31m", "é", "\U0001f600"),
    *("\x00", "a\nb", "'\\ud800'", "b'x'", "1j", "lambda: 0", "__import__('os')", "(" * 300, "[" * 50 + "]" * 50),
    *("((8, 16), 16)", "('a', 1)", "(0.5, 0.5, 0.5)", "(1, 2, 3, 4)", "{'name': 'cmsg'}", "[{'name': 'x'}]", "1,2,x"),
)
NAMES = (
    *("__init__", "__class__", "name", "lr", "", ".", "..", "a b", "é", "0", "stages", "self", "kwargs", "\x1b[2J"),
    *(
        "epochs",
        "width",
        "dropout",
        "net",
        "net.name",
        "schedule",
        "schedule.name",
        "groups",
        "x" * 300,
        "items",
        "get",
    ),
)


def case(case: Case) -> dict[str, Any]:
    from mljax.check import check
    from mljax.config.flags import parse
    from mljax.config.stages import stage_configs
    from mljax.errors import UserError
    from mljax.main import configured

    argv, began = _argv(case.rng), time.perf_counter()
    try:
        config = configured(parse([*argv, "--workdir=x"]))
        for stage in stage_configs(config):
            check(stage)
        said = ""
    except UserError as error:
        said = str(error)
        _check_sentence(said, argv)
    except Exception as error:
        raise Failed(f"{argv}: {type(error).__name__}: {str(error)[:300]}") from error
    seconds = time.perf_counter() - began
    if seconds > LIMIT and case.index > 20:  # the first ones import systems
        raise Failed(f"{argv}: {seconds:.1f} s")
    return {"refused": bool(said)}


def _check_sentence(text: str, argv: list[str]) -> None:
    odd = [c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs")]
    if not text.strip() or odd or len(text) > LONGEST:
        raise Failed(f"{[a[:200] for a in argv]}: not one clear line ({len(text)} characters): {text[:300]!r}")


def _argv(rng: np.random.Generator) -> list[str]:
    """A config and one to three overrides of its keys, some of which do not exist."""
    names = sorted(p.stem for p in (ROOT / "configs").glob("[!_]*.py"))
    file = f"configs/{names[int(rng.integers(len(names)))]}.py"
    words = ":smoke" if rng.random() < 0.3 else ""
    keys = _keys(file + words)
    argv = [f"--config={file}{words}"]
    for _ in range(int(rng.integers(1, 4))):
        key = keys[int(rng.integers(len(keys)))]
        if rng.random() < 0.3:
            key = _mutated(key, rng)
        value = VALUES[int(rng.integers(len(VALUES)))]
        if rng.random() < 0.2:
            value += VALUES[int(rng.integers(len(VALUES)))]
        argv.append(f"--config.{key}={value}")
    return argv


def _mutated(key: str, rng: np.random.Generator) -> str:
    name, kind = NAMES[int(rng.integers(len(NAMES)))], int(rng.integers(4))
    parts = key.split(".")
    if kind == 0:
        parts[int(rng.integers(len(parts)))] = name
    elif kind == 1:
        parts.append(name)
    elif kind == 2:
        return f"stages[{rng.integers(-1, 3)}].{key}"
    else:
        at = int(rng.integers(len(key)))
        return key[:at] + chr(int(rng.integers(32, 127))) + key[at + 1 :]
    return ".".join(parts)


_known: dict[str, list[str]] = {}


def _keys(argument: str) -> list[str]:
    """Every key of a config, sections too."""
    if argument not in _known:
        from ml_collections import ConfigDict

        from mljax.config.reading import read_config

        def below(section: ConfigDict, start: str) -> list[str]:
            keys = []
            for key in section:
                keys.append(start + key)
                value = section.get(key)
                if isinstance(value, ConfigDict):
                    keys += below(value, f"{start}{key}.")
            return keys

        _known[argument] = below(read_config(argument), "")
    return _known[argument]


KIND = Kind(
    name="configs",
    goal="fuzzed overrides: accepted, or one clear line each",
    plan={"overrides": 5000},
    case=case,
    limit=60.0,
)
