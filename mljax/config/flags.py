"""Command line of mljax.main: a config file with words, and overrides of its keys.

absl's config flags answer a wrong key with a traceback, look for files in the working directory only, and know no key
that a section does not write out; here a section takes every keyword of what it names.
"""

import re
from typing import Any

from mljax.errors import UserError, nearest

FLAGS = ("--config", "--workdir", "--list", "--help")
USAGE = """usage: python -m mljax.main --config=FILE[:WORD,WORD..] --workdir=FOLDER [--config.KEY=VALUE ..]

  --config=FILE[:WORDS]   an experiment, e.g. configs/cmsg.py:voc2007,smoke (words are explained in the file);
                          or RUN/config.json: again what that run was trained with, in another workdir
  --workdir=FOLDER        run directory; running again resumes, or prints the table of a finished run
  --config.KEY=VALUE      override, e.g. --config.optim.epochs=3 --config.parallel=pmap
  --list                  names of systems, backbones, data sets, losses, optimizers and schedules
  --help                  this text
"""


def parse(argv: list[str]) -> dict[str, Any]:
    """Flags -> {"config", "workdir", "overrides", "list", "help"}; what is left over is an error."""
    parsed: dict[str, Any] = {"overrides": []}
    rest = list(argv)
    while rest:
        flag = rest.pop(0)
        name, equals, value = flag.partition("=")
        name = re.sub("^--?", "--", name)
        if name in ("--help", "-h", "--h"):
            parsed["help"] = True
        elif name == "--list":
            parsed["list"] = True
        elif name in ("--config", "--workdir") or name.startswith("--config."):
            if not equals:
                if not rest:
                    raise UserError(f"The flag {name} needs a value; give {name}=VALUE.")
                value = rest.pop(0)
                if value.startswith("--"):
                    raise UserError(
                        f"The flag {name} needs a value before {value.partition('=')[0]}; give {name}=VALUE."
                    )
            if name.startswith("--config."):
                parsed["overrides"].append((name.removeprefix("--config."), value))
            elif not value:
                raise UserError(f"The flag {name} is empty; give {name}=VALUE.")
            else:
                parsed[name[2:]] = value
        elif flag.startswith("-"):
            hint = f" (did you mean --config.{name[2:]}?)" if "." in name else nearest(name, FLAGS)
            raise UserError(f"There is no flag {name}{hint}.")
        else:
            word = flag.partition("=")[0]
            close = f"--config.{word}" if "." in word else f"--{word}"
            hint = f" (did you mean {close}=..?)" if equals and ("." in word or close in FLAGS) else ""
            raise UserError(f"The argument {flag!r} is not expected here{hint}; write settings as --config.KEY=VALUE.")
    parsed["overrides"].sort(key=order)
    return parsed


def order(item: tuple[str, str]) -> tuple[bool, bool]:
    """What a stage changes comes after what all have; a name before its settings, which are those of the new name."""
    return item[0].startswith("stages["), not item[0].endswith((".name", "optim.schedule"))


def split_overrides(argv: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The other arguments, and the settings written --config.KEY=VALUE; names first, others depend on them."""
    words, rest, settings = list(argv), [], []
    while words:
        word = words.pop(0)
        match = re.fullmatch(r"--?config\.([^=]+)(?:=(.*))?", word, flags=re.S)
        if not match:
            rest.append(word)
        elif match[2] is None and (not words or words[0].startswith("--")):
            raise UserError(f"The flag {word} needs a value; give {word}=VALUE.")
        else:
            settings.append((match[1], words.pop(0) if match[2] is None else match[2]))
    return rest, sorted(settings, key=order)
