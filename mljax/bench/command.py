"""Throughput, memory, compile time and FLOPs of a config on synthetic data, alone or beside PyTorch.

python -m mljax.bench --config=configs/baseline.py:voc2007 --batch=8 --size=224
python -m mljax.bench --config=configs/baseline.py:voc2007 --batch=8 --size=224 --against=torch
python -m mljax.bench --config=configs/cmsg.py:voc2007 --find-batch
python -m mljax.bench --config=configs/cmsg.py:voc2007 --scale=labels --values=20,80,200,1000 --out=speed/
"""

import contextlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from mljax.config.command import Parser
from mljax.config.derive import derive
from mljax.config.flags import parse
from mljax.config.overrides import overridden
from mljax.config.reading import read_config
from mljax.errors import UserError, nearest
from mljax.types import Config

PARTS = ("train", "infer", "compile", "loop", "overhead")  # what --only chooses from
USUAL = PARTS[:4]


def split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Arguments of the config (--config=.., --config.KEY=..) and all others."""
    config, rest, words = [], [], list(argv)
    while words:
        word = words.pop(0)
        if re.match(r"--?config([.=]|$)", word):
            config.append(word)
            if "=" not in word and words:
                config.append(words.pop(0))
        else:
            rest.append(word)
    return config, rest


def arguments(argv: list[str]) -> tuple[Any, list[str]]:
    config_flags, rest = split(argv)
    parser = Parser("bench", __doc__)
    parser.add_argument("--config", metavar="FILE[:WORDS]", help="and --config.KEY=VALUE: as of mljax.main; needed")
    parser.add_argument("--against", choices=("torch",), help="run the same in PyTorch, in turns, and print ratios")
    parser.add_argument("--only", help=f"some of {','.join(PARTS)}; default {','.join(USUAL)}")
    parser.add_argument("--stage", type=int, default=1, help="of a config that has several")
    parser.add_argument("--batch", type=int, help="config.optim.batch_size")
    parser.add_argument("--size", type=int, help="config.input.size")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="config.dtype")
    parser.add_argument("--labels", type=int, help="of the synthetic data; default: as many as the data set has")
    parser.add_argument("--rounds", type=int, default=5, help="in which all sides take turns; medians are printed")
    parser.add_argument("--fold", action="store_true", help="inference also with batch normalisation folded")
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device, where it is not known")
    parser.add_argument(
        "--find-batch", action="store_true", help="the largest training batch that fits; --only=infer: evaluation batch"
    )
    parser.add_argument("--memory", type=float, help="GB that --find-batch may use; default: what is free")
    parser.add_argument("--scale", help="cost against batch, resolution, labels, devices or rows: JSON and a plot")
    parser.add_argument("--values", help="of --scale, e.g. 1,2,4,8")
    parser.add_argument("--profile", metavar="FOLDER", help="a trace of what is measured: TensorBoard, XProf, Perfetto")
    parser.add_argument("--target", help="compile for a GPU that is not here (h100, h200, a100): memory, no times")
    parser.add_argument("--hlo", metavar="FOLDER", help="keep the compiled programs as text, and count their copies")
    parser.add_argument("--json", metavar="FILE", help="all figures")
    parser.add_argument("--out", default=".", metavar="FOLDER", help="of --scale's files")
    args = parser.parse_args(rest)
    for name in ("stage", "batch", "size", "labels", "rounds"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name}={value} must be at least 1.")
    chosen = tuple(args.only.split(",")) if args.only else USUAL
    for part in chosen:
        if part not in PARTS:
            raise UserError(f"--only has no part {part!r}{nearest(part, PARTS)}.")
    args.only = chosen
    if args.target:
        _check_target(args)
    for flag, parts in (("profile", {"train", "infer", "loop"}), ("hlo", {"train", "infer"})):
        if getattr(args, flag) and (args.find_batch or args.scale or not parts & set(chosen)):
            other = "--find-batch" if args.find_batch else f"--scale={args.scale}" if args.scale else ""
            other = other or f"--only={','.join(chosen)}"
            raise UserError(f"--{flag} is of {', '.join(sorted(parts))}, and {other} measures none; leave one out.")
    return args, config_flags


def _check_target(args: Any) -> None:
    from mljax.bench.target import TARGETS

    if args.target not in TARGETS:
        raise UserError(f"--target has no GPU {args.target!r}{nearest(args.target, TARGETS)}.")
    args.only = tuple(part for part in args.only if part in ("train", "infer"))
    wrong = "--against" if args.against else "--scale" if args.scale else "--profile" if args.profile else ""
    if wrong or not args.only:
        raise UserError(f"--target compiles training and inference, and nothing runs; leave out {wrong or '--only'}.")


def configured(config_flags: list[str], args: Any) -> Config:
    """The config of one stage with what the flags change of it, checked."""
    from mljax.check import check
    from mljax.config.stages import stage_configs

    flags = parse(config_flags)
    if "config" not in flags:
        raise UserError("The flag --config is missing; see python -m mljax.bench --help.")
    config = overridden(read_config(flags["config"]), flags["overrides"])
    stages = stage_configs(config)
    if args.stage > len(stages):
        raise UserError(f"--stage={args.stage}: {flags['config']} has {len(stages)}.")
    stage, args.staged = stages[args.stage - 1], bool(config.stages)
    changes: dict[str, Any] = {}
    if args.batch:
        changes |= {"optim.batch_size": args.batch, "eval.batch_size": args.batch}
    if args.size:
        changes["input.size"] = args.size
        for key in ("train_views", "eval_views"):  # cached views are of that size too
            changes[f"cache.{key}"] = tuple(re.sub(r"^\d+", str(args.size), view) for view in stage.cache[key])
    if args.dtype:
        changes["dtype"] = args.dtype
    config = derive(stage, changes)
    check(config)
    return config


def find_batch(config: Config, args: Any) -> int:
    """The largest batch that fits, of training or with --only=infer of an evaluation, printed in one line."""
    from mljax.bench import target, timing
    from mljax.bench.model import Model, fits, largest_batch

    part, section = ("infer", "eval") if args.only == ("infer",) else ("train", "optim")
    elsewhere = target.devices(args.target, config.devices or 1) if args.target else None
    model = Model(config, labels=args.labels, devices=elsewhere)
    device, share = model.devices[0], len(model.devices)
    known = target.memory_limit(args.target) if args.target else timing.memory_limit(device)
    limit = int(args.memory * 1e9) if args.memory else known
    if limit is None and device.platform == "cpu":
        raise UserError("The size of the memory is not known here; give --memory=GB.")
    # simulated devices of a CPU share its memory; XLA says what one of them holds
    limit = limit // share if limit and device.platform == "cpu" else limit
    run = device.platform != "cpu" and elsewhere is None

    def tried(batch: int) -> bool:
        good = fits(model, limit, batch, run=run, part=part)
        print(f"a batch of {batch} {'fits' if good else 'does not fit'}", file=sys.stderr, flush=True)
        return good

    size = largest_batch(tried, share)
    memory = f"{limit * (share if device.platform == 'cpu' else 1) / 1e9:.1f} GB" if limit else "its memory"
    stage = f"stages[{args.stage - 1}]." if args.staged else ""
    name = {"train": "training", "infer": "evaluation"}[part]
    print(
        f"The largest {name} batch that fits {memory} is {size} (to 6 %): --config.{stage}{section}.batch_size={size}"
    )
    return size


def measured(config: Config, args: Any, config_flags: list[str]) -> dict[str, Any]:
    """What --only asks for, on the machine that is here or for the one that --target names."""
    if args.target:
        from mljax.bench import target

        return target.measured(config, args)
    from mljax.bench import measure
    from mljax.bench.report import machine, machine_line

    result = {"machine": machine()}
    print(machine_line(result), flush=True)
    return result | measure.measured(config, args, config_flags)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args, config_flags = arguments(argv)
    if args.against:  # both sides share the device
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    elsewhere: Any = contextlib.nullcontext()
    if args.target:
        from mljax.bench.target import elsewhere as for_target

        elsewhere = for_target()
    with elsewhere:
        if args.scale:
            from mljax.bench.scale import scale

            result = scale(args, config_flags)
        elif args.find_batch:
            result = {"batch": find_batch(configured(config_flags, args), args)}
        else:
            result = {
                "command": ["python", "-m", "mljax.bench", *argv],
                **measured(configured(config_flags, args), args, config_flags),
            }
    if args.json:
        try:
            Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"{args.json} cannot be written ({error.strerror}); give another --json.") from None
    return 0
