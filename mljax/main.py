"""Train and evaluate: flags -> config -> fit.

python -m mljax.main --config=configs/cmsg.py --workdir=runs/cmsg
python -m mljax.main --config=configs/cmsg.py:voc2007,smoke --workdir=/tmp/x --config.optim.epochs=3
python -m mljax.main --list
"""

import shlex
import sys
from pathlib import Path

from mljax.config.command import guarded
from mljax.config.flags import USAGE, parse
from mljax.config.overrides import override
from mljax.config.reading import read_config
from mljax.errors import OutOfMemory, UserError


def main(argv: list[str] | None = None) -> int:
    flags = parse(sys.argv[1:] if argv is None else argv)
    if flags.get("help"):
        print(USAGE, end="")
        return 0
    if flags.get("list"):
        from mljax.experiment import listing

        print(listing())
        return 0
    for name in ("config", "workdir"):
        if name not in flags:
            raise UserError(f"The flag --{name} is missing; see --help.")
    config = read_config(flags["config"])
    for key, value in flags["overrides"]:
        override(config, key, value)
    from mljax.train import Stop, fit

    try:
        fit(config, Path(flags["workdir"]))
    except Stop as stop:
        print(f"mljax: {stop}", file=sys.stderr)
        return 130
    except OutOfMemory as full:
        words = [f"--config={flags['config']}"]
        words += [f"--config.{key}={value}" for key, value in flags["overrides"] if key != f"{full.section}.batch_size"]
        words += [f"--stage={full.stage}"] if len(config.stages) > 1 else []
        words += [f"--labels={full.labels}"] if full.labels else []
        words += ["--find-batch", *(["--only=infer"] if full.section == "eval" else [])]
        command = f"python -m mljax.bench {shlex.join(words)}"
        raise UserError(f"{full.what}; the largest that does is found by: {command}") from None
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
