"""Throughput, memory, compile time and FLOPs of a config on synthetic data, alone or beside PyTorch.

python -m mljax.bench --config=configs/baseline.py:voc2007 --batch=8 --size=224
python -m mljax.bench --config=configs/baseline.py:voc2007 --batch=8 --size=224 --against=torch
python -m mljax.bench --config=configs/cmsg.py:voc2007 --find-batch
python -m mljax.bench --config=configs/cmsg.py:voc2007 --scale=labels --values=20,80,200,1000 --out=speed/
"""

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mljax.errors import UserError, nearest
from mljax.flags import Parser, override, parse, read_config
from mljax.types import Config

PARTS = ("train", "infer", "compile", "loop", "overhead")  # what --only chooses from
USUAL = PARTS[:4]


def split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Arguments of the config (--config=.., --config.KEY=..) and all others."""
    own, rest, words = [], [], list(argv)
    while words:
        word = words.pop(0)
        if re.match(r"--?config([.=]|$)", word):
            own.append(word)
            if "=" not in word and words:
                own.append(words.pop(0))
        else:
            rest.append(word)
    return own, rest


def arguments(argv: list[str]) -> tuple[Any, list[str]]:
    own, rest = split(argv)
    parser = Parser("bench", __doc__)
    parser.add_argument("--against", choices=("torch",), help="run the same in PyTorch, in turns, and tell ratios")
    parser.add_argument("--only", help=f"some of {','.join(PARTS)}; default {','.join(USUAL)}")
    parser.add_argument("--stage", type=int, default=1, help="of a config that has several")
    parser.add_argument("--batch", type=int, help="config.optim.batch_size")
    parser.add_argument("--size", type=int, help="config.input.size")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="config.dtype")
    parser.add_argument("--labels", type=int, help="of the synthetic data; default: as many as the data set has")
    parser.add_argument("--rounds", type=int, default=5, help="in which all sides take turns; medians are told")
    parser.add_argument("--fold", action="store_true", help="inference also with batch normalisation folded")
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device, where it is not known")
    parser.add_argument("--find-batch", action="store_true", help="the largest training batch that fits the memory")
    parser.add_argument("--memory", type=float, help="GB that --find-batch may use; default: what is there")
    parser.add_argument("--scale", help="cost against batch, resolution, labels, devices or rows: JSON and a plot")
    parser.add_argument("--values", help="of --scale, e.g. 1,2,4,8")
    parser.add_argument("--profile", metavar="FOLDER", help="a trace of some steps for TensorBoard, XProf, Perfetto")
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
    if args.profile and (args.find_batch or args.scale or not {"train", "infer"} & set(chosen)):
        other = "--find-batch" if args.find_batch else f"--scale={args.scale}" if args.scale else ""
        other = other or f"--only={','.join(chosen)}"
        raise UserError(f"--profile traces training and inference and {other} measures neither; leave one out.")
    return args, own


def configured(own: list[str], args: Any) -> Config:
    """The config of one stage, whole and checked."""
    from mljax.check import check
    from mljax.rundir import stage_configs

    flags = parse(own)
    if "config" not in flags:
        raise UserError("The flag --config is missing; see python -m mljax.bench --help.")
    config = read_config(flags["config"])
    for key, value in flags["overrides"]:
        override(config, key, value)
    stages = stage_configs(config)
    if args.stage > len(stages):
        raise UserError(f"--stage={args.stage}: {flags['config']} has {len(stages)}.")
    config = stages[args.stage - 1]
    if args.batch:
        config.optim.batch_size = config.eval.batch_size = args.batch
    if args.size:
        config.input.size = args.size
        with config.unlocked():  # cached views are of that size too
            for key in ("train_views", "eval_views"):
                views = config.cache[key]
                config.cache[key] = tuple(re.sub(r"^\d+", str(args.size), view) for view in views)
    if args.dtype:
        config.dtype = args.dtype
    check(config)
    return config


def machine() -> dict[str, Any]:
    """What the figures are of."""
    import jax

    device = jax.devices()[0]
    model = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).is_file():
        names = re.findall(r"model name\s*: (.*)", info.read_text())
        model = names[0] if names else model
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    found = {"device": device.device_kind, "platform": device.platform, "devices": jax.device_count(), "cpu": model}
    return {**found, "cores": os.cpu_count(), "load": round(load, 1), "jax": jax.__version__}


def told(result: dict[str, Any]) -> str:
    """One line of the machine."""
    m = result["machine"]
    return f"{m['devices']} {m['device']} ({m['cpu']}, {m['cores']} cores, load {m['load']:g}), jax {m['jax']}"


def throughput(model: Any, args: Any) -> dict[str, Any]:
    """Training and inference of a model, in turns with PyTorch and with folded inference where that is asked for."""
    from mljax import timing
    from mljax.bench_model import product_rate

    size = model.config.optim.batch_size
    found: dict[str, Any] = {}
    rival = None
    if args.against:
        from mljax.bench_torch import Rival

        rival = Rival(model, size)
        ours = sum(x.size for x in _trained_tree(model))
        if rival.size() != ours:
            raise UserError(
                f"The networks differ: {ours} parameters here, {rival.size()} in torch; please report this."
            )
    for part in (p for p in ("train", "infer") if p in args.only):
        made = model.training(size) if part == "train" else model.inference(size)
        with timing.Memory() as memory:
            if part == "train":
                run = model.trainer(made.call, size)
            else:
                variables = model.initial()
                run = model.scorer(made.call, variables, size)
            run(1)
        sides, theirs = {"mljax": run}, None
        if part == "infer" and args.fold:
            folded, count = model.folded(variables)
            sides["folded"] = model.scorer(model.inference(size, folded).call, folded, size)
            found["folded_norms"] = count
        if rival is not None:
            with timing.Memory() as theirs:
                sides["torch"] = rival.train if part == "train" else rival.infer
                sides["torch"](1)
        known = timing.peak_flops(model.devices[0].device_kind, model.config.dtype)
        peak = args.peak * 1e12 if args.peak else known
        if peak is None and model.devices[0].platform == "cpu":
            sides["product"] = product_rate(model.config.dtype)
        with timing.trace(args.profile and os.path.join(args.profile, part)):
            turns = timing.alternate(sides, args.rounds)
        found[part] = summary(turns, made, memory.peak, size, peak, len(model.devices))
        if rival is not None and theirs is not None:
            found[part]["torch"]["peak_bytes"] = rival.peak() or theirs.peak
    return found


def _trained_tree(model: Any) -> list[Any]:
    """Parameters that both sides have: with cached features the backbone is not one of them."""
    import jax

    params = dict(model.variables["params"])
    if model.cached:
        params.pop("backbone", None)
    return jax.tree.leaves(params)


def summary(turns: Any, made: Any, peak_bytes: int | None, size: int, peak: float | None, devices: int) -> dict:
    """Figures of one part: seconds of a step, images/s, FLOPs, share of peak, ratios.

    Args:
      peak: FLOP/s of one device, or None: then "product" of the turns, a 2048 x 2048 matrix product, says what the
        machine reached.
    """
    seconds = turns.seconds("mljax")
    found: dict[str, Any] = {"seconds": seconds, "images_per_s": size / seconds, "batch": size}
    found |= {"peak_bytes": peak_bytes, "program_bytes": made.memory}
    found |= {"flops": made.flops, "flops_per_image": made.flops * devices / size, "flops_per_s": made.flops / seconds}
    if peak is not None:
        found["share_of_peak"] = made.flops / seconds / peak
    elif "product" in turns.wall:
        found["share_of_product"] = made.flops / (2 * 2048**3) * turns.ratio("product", "mljax")
    for side in set(turns.wall) - {"mljax", "product"}:
        found[side] = {"seconds": turns.seconds(side), "images_per_s": size / turns.seconds(side)}
        found[side] |= {"time_ratio": turns.ratio("mljax", side), "cpu_ratio": turns.ratio("mljax", side, "cpu")}
    if "torch" in found and "folded" in found:
        ratios = {kind: turns.ratio("folded", "torch", kind) for kind in ("wall", "cpu")}
        found["torch"] |= {"folded_time_ratio": ratios["wall"], "folded_cpu_ratio": ratios["cpu"]}
    return found


def lines(part: str, found: dict[str, Any]) -> list[str]:
    """Figures of a part for people."""
    text = [
        f"{part:<9} {found['images_per_s']:8.1f} images/s  {1e3 * found['seconds']:9.1f} ms a step of {found['batch']}"
    ]
    gb = [
        f"{found[k] / 1e9:.2f} GB {name}"
        for k, name in (("peak_bytes", "peak"), ("program_bytes", "program"))
        if found[k]
    ]
    work = f"{found['flops_per_image'] / 1e9:.2f} GFLOP an image, {found['flops_per_s'] / 1e12:.3g} TFLOP/s"
    if "share_of_peak" in found:
        work += f", {100 * found['share_of_peak']:.1f} % of the device's peak"
    if "share_of_product" in found:
        work += f", {100 * found['share_of_product']:.0f} % of a 2048 x 2048 matrix product's rate"
    text.append(f"{'':<9} {'; '.join([*gb, work])}")
    for side in ("folded", "torch"):
        if side in found:
            s = found[side]
            memory = f", {s['peak_bytes'] / 1e9:.2f} GB peak" if s.get("peak_bytes") else ""
            text.append(
                f"{'':<9} {side}: {s['images_per_s']:.1f} images/s{memory}; mljax takes {s['time_ratio']:.2f} times its"
                f" time (CPU time {s['cpu_ratio']:.2f})"
            )
            if "folded_time_ratio" in s:
                text[-1] += f"; folded {s['folded_time_ratio']:.2f} ({s['folded_cpu_ratio']:.2f})"
    return text


def compile_times(own: list[str], rest: list[str]) -> dict[str, dict[str, float]]:
    """Seconds of making the training step in a new process, with an empty persistent cache and with a filled one."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": folder}
        command = [sys.executable, "-m", "mljax.bench_compile", *own, *rest]
        for name in ("cold", "warm"):
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            if done.returncode:
                raise UserError((done.stderr.strip().splitlines() or ["The compiling process failed."])[-1][:500])
            found[name] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measured(args: Any, own: list[str], rest: list[str]) -> dict[str, Any]:
    """Everything that --only asks for, printed as it comes."""
    from mljax.bench_model import Model

    config = configured(own, args)
    result: dict[str, Any] = {"command": ["python", "-m", "mljax.bench", *own, *rest], "machine": machine()}
    print(told(result), flush=True)
    if {"train", "infer"} & set(args.only):
        model = Model(config, labels=args.labels)
        result |= throughput(model, args)
        for part in ("train", "infer"):
            if part in result:
                print("\n".join(lines(part, result[part])), flush=True)
        del model
    if "compile" in args.only:
        given = {name: getattr(args, name) for name in ("stage", "batch", "size", "dtype", "labels")}
        found = result["compile"] = compile_times(own, [f"--{k}={v}" for k, v in given.items() if v is not None])
        cold, warm = found["cold"], found["warm"]
        print(
            f"compile   training step: {cold['compile']:.1f} s, from the cache {warm['compile']:.1f} s"
            f" ({100 * (1 - warm['compile'] / cold['compile']):.0f} % saved); tracing {warm['trace']:.1f} s either way;"
            f" whole process {cold['process']:.1f} and {warm['process']:.1f} s",
            flush=True,
        )
    if "loop" in args.only:
        from mljax.bench_loop import shares

        found = shares(config, labels=args.labels)
        result["loop"] = {"steps": found.steps, "total": found.total, **found.percent()}
        text = ", ".join(f"{name} {value:.1f} %" for name, value in found.percent().items())
        print(f"loop      {text} of {found.total:.1f} s ({found.steps} steps and an evaluation of as many images)")
    if "overhead" in args.only:
        from mljax.bench_loop import overhead

        turns = overhead(config, args.rounds, labels=args.labels)
        extra = {kind: 100 * (turns.ratio("trainer", "step", kind) - 1) for kind in ("wall", "cpu")}
        result["overhead"] = {"step": turns.seconds("step"), "percent": extra["wall"], "cpu_percent": extra["cpu"]}
        print(
            f"overhead  of the trainer above the bare step of {1e3 * turns.seconds('step'):.1f} ms:"
            f" {extra['wall']:+.1f} % (CPU time {extra['cpu']:+.1f} %)"
        )
    return result


def find_batch(config: Config, args: Any) -> int:
    """The largest training batch that fits, told in one line."""
    from mljax import bench_model, timing

    model = bench_model.Model(config, labels=args.labels)
    device, share = model.devices[0], len(model.devices)
    limit = int(args.memory * 1e9) if args.memory else timing.memory_limit(device)
    if device.platform == "cpu" and limit is None:
        raise UserError("How much memory there is is not known here; give --memory=GB.")
    # simulated devices of a CPU share its memory; XLA tells what one of them holds
    limit = limit // share if limit and device.platform == "cpu" else limit
    run = device.platform != "cpu"
    size = bench_model.largest_batch(lambda b: bench_model.fits(model, limit, b, run=run), share)
    memory = f"{limit * (share if device.platform == 'cpu' else 1) / 1e9:.1f} GB" if limit else "its memory"
    where = (
        "--config.optim.batch_size" if args.stage == 1 else f"config.stages[{args.stage - 1}]['optim']['batch_size']"
    )
    print(f"The largest training batch that fits {memory} is {size}: {where}={size}")
    return size


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args, own = arguments(argv)
    if args.scale:
        from mljax.bench_scale import scale

        result = scale(args, own)
    elif args.find_batch:
        result = {"batch": find_batch(configured(own, args), args)}
    else:
        result = measured(args, own, split(argv)[1])
    if args.json:
        try:
            Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"{args.json} cannot be written ({error.strerror}); give another --json.") from None
    return 0


if __name__ == "__main__":
    from mljax.main import guarded

    sys.exit(guarded(main))
