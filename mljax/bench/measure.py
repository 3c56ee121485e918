"""What `--only` chooses from: throughput, compile time, shares of the loop, overhead; printed as it is measured."""

import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from mljax.bench import hlo, loop, timing
from mljax.bench.model import Model, product_rate
from mljax.bench.report import lines, summary
from mljax.errors import UserError
from mljax.types import Config


def throughput(model: Model, args: Any) -> dict[str, Any]:
    """Training and inference of a model, in turns with PyTorch and with folded inference where that is asked for."""
    rival, figures = _rival(model) if args.against else None, {}
    if rival is not None:
        figures["torch"] = rival.version
    for part in (p for p in ("infer", "train") if p in args.only):  # a GPU tells its peak since the process started
        figures |= _part(part, model, rival, args)
    return figures


def _rival(model: Model) -> Any:
    from mljax.bench.torch_reference import Rival

    rival = Rival(model, model.config.optim.batch_size)
    ours = sum(x.size for x in _trained_tree(model))
    if rival.size() != ours:
        raise UserError(f"The networks differ: {ours} parameters here, {rival.size()} in torch; please report this.")
    return rival


def _trained_tree(model: Any) -> list[Any]:
    """Parameters that both sides have: with cached features the backbone is not one of them."""
    import jax

    params = dict(model.variables["params"])
    if model.cached:
        params.pop("backbone", None)
    return jax.tree.leaves(params)


def _part(part: str, model: Model, rival: Any, args: Any) -> dict[str, Any]:
    """Figures of "train" or "infer"."""
    size = model.config.optim.batch_size
    variables = model.initial() if part == "infer" else None  # a trainer makes its own
    made = model.training(size) if part == "train" else model.inference(size)
    with timing.Memory() as memory:
        run = model.trainer(made.call, size) if part == "train" else model.scorer(made.call, variables, size)
        run(1)
    figures, sides, theirs = {}, {"mljax": run}, None
    if part == "infer" and args.fold:
        folded, figures["folded_norms"] = model.folded(variables)
        sides["folded"] = model.scorer(model.inference(size, folded).call, folded, size)
    if rival is not None:
        rival.forget_peak()
        with timing.Memory() as theirs:
            sides["torch"] = rival.train if part == "train" else rival.infer
            sides["torch"](1)
    device = model.devices[0]
    peak = args.peak * 1e12 if args.peak else timing.peak_flops(device.device_kind, model.config.dtype)
    if peak is None and device.platform == "cpu":
        sides["product"] = product_rate(model.config.dtype)
    with timing.trace(args.profile and os.path.join(args.profile, part)):
        turns = timing.alternate(sides, args.rounds)
    figures[part] = summary(turns, made, memory.peak, size, peak, len(model.devices))
    if args.hlo:
        text = made.call.as_text()
        table = hlo.moves(text)
        hlo.keep(text, table, args.hlo, part)
        figures[part] |= {"copies": hlo.counts(table), "moved_bytes": hlo.traffic(text)}
    if rival is not None and theirs is not None:
        figures[part]["torch"]["peak_bytes"] = rival.peak() or theirs.peak
    print("\n".join(lines(part, figures[part])), flush=True)
    return figures


def compile_times(config_flags: list[str], rest: list[str]) -> dict[str, dict[str, float]]:
    """Seconds of making the training step in a new process, with an empty persistent cache and with a filled one."""
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": folder}
        command = [sys.executable, "-m", "mljax.bench.compiling", *config_flags, *rest]
        for name in ("cold", "warm"):
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            if done.returncode:
                raise UserError((done.stderr.strip().splitlines() or ["The compiling process failed."])[-1][:500])
            seconds[name] = json.loads(done.stdout.strip().splitlines()[-1])
    return seconds


def compiling(args: Any, config_flags: list[str]) -> dict[str, Any]:
    given = {name: getattr(args, name) for name in ("stage", "batch", "size", "dtype", "labels")}
    seconds = compile_times(config_flags, [f"--{k}={v}" for k, v in given.items() if v is not None])
    cold, warm = seconds["cold"], seconds["warm"]
    print(
        f"compile   training step: {cold['compile']:.1f} s, from the cache {warm['compile']:.1f} s"
        f" ({100 * (1 - warm['compile'] / cold['compile']):.0f} % saved); tracing {warm['trace']:.1f} s either way;"
        f" whole process {cold['process']:.1f} and {warm['process']:.1f} s",
        flush=True,
    )
    return seconds


def shares(config: Config, args: Any) -> dict[str, Any]:
    parts = loop.shares(config, labels=args.labels, profile=args.profile and os.path.join(args.profile, "loop"))
    text = ", ".join(f"{name} {value:.1f} %" for name, value in parts.percent().items())
    rate = parts.steps * config.optim.batch_size / (parts.total - parts.evaluation)
    print(
        f"loop      {text} of {parts.total:.1f} s ({parts.steps} steps and an evaluation of as many images);"
        f" {rate:.1f} images/s while it trains, from JPEG files in memory"
    )
    return {"steps": parts.steps, "total": parts.total, "images_per_s": rate, **parts.percent()}


def overhead(config: Config, args: Any) -> dict[str, float]:
    turns = loop.overhead(config, args.rounds, labels=args.labels)
    extra = {kind: 100 * (turns.ratio("trainer", "step", kind) - 1) for kind in ("wall", "cpu")}
    print(
        f"overhead  of the trainer above the bare step of {1e3 * turns.seconds('step'):.1f} ms:"
        f" {extra['wall']:+.1f} % (CPU time {extra['cpu']:+.1f} %)"
    )
    return {"step": turns.seconds("step"), "percent": extra["wall"], "cpu_percent": extra["cpu"]}


def measured(config: Config, args: Any, config_flags: list[str]) -> dict[str, Any]:
    """Everything that --only asks for, printed as it comes."""
    figures: dict[str, Any] = {}
    if {"train", "infer"} & set(args.only):
        figures |= throughput(Model(config, labels=args.labels), args)
    if "compile" in args.only:
        figures["compile"] = compiling(args, config_flags)
    if "loop" in args.only:
        figures["loop"] = shares(config, args)
    if "overhead" in args.only:
        figures["overhead"] = overhead(config, args)
    return figures
