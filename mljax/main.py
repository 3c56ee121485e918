"""Train and evaluate: flags -> config -> fit.

python -m mljax.main --config=configs/cmsg.py --workdir=runs/cmsg
python -m mljax.main --config=configs/cmsg.py:voc2007,smoke --workdir=/tmp/x --config.optim.epochs=3
python -m mljax.main --list
"""

import shlex
import sys
from pathlib import Path
from typing import Any

from mljax.config.command import guarded
from mljax.config.flags import USAGE, parse
from mljax.errors import OutOfMemory, UserError


def main(argv: list[str] | None = None) -> int:
    flags = parse(sys.argv[1:] if argv is None else argv)
    if flags.get("help"):
        print(USAGE, end="")
        return 0
    if flags.get("list"):
        print(listing())
        return 0
    for name in ("config", "workdir"):
        if name not in flags:
            raise UserError(f"The flag --{name} is missing; see --help.")
    config = configured(flags)
    from mljax.train import fit  # imports jax, which takes longer than to find most mistakes

    try:
        fit(config, Path(flags["workdir"]))
    except OutOfMemory as full:
        raise UserError(f"{full.what}; the largest that does is found by: {_search(flags, config, full)}") from None
    return 0


def configured(flags: dict[str, Any]) -> Any:
    """The config of the flags, its keys and names checked as far as that is quick."""
    from mljax.config.overrides import overridden
    from mljax.config.reading import read_config
    from mljax.config.sections import check_sections
    from mljax.config.stages import stage_configs

    config = overridden(read_config(flags["config"]), flags["overrides"])
    for stage in stage_configs(config):
        check_sections(stage)
    return config


def listing() -> str:
    """Names of systems, backbones, data sets, losses, optimizers and schedules, for `--list`."""
    from mljax.build import SECTIONS, listed

    lines = []
    for kind in SECTIONS.values():
        lines += [f"{kind}:", *(f"  {name}" for name in sorted(listed(kind)))]
    return "\n".join(lines)


def _search(flags: dict[str, Any], config: Any, full: OutOfMemory) -> str:
    """The command that finds the largest batch of a run whose memory was full."""
    words = [f"--config={flags['config']}"]
    words += [f"--config.{key}={value}" for key, value in flags["overrides"] if key != f"{full.section}.batch_size"]
    words += [f"--stage={full.stage}"] if len(config.stages) > 1 else []
    words += [f"--labels={full.labels}"] if full.labels else []
    words += ["--find-batch", *(["--only=infer"] if full.section == "eval" else [])]
    return f"python -m mljax.bench {shlex.join(words)}"


if __name__ == "__main__":
    sys.exit(guarded(main))
