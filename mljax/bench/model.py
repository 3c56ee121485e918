"""A config's system with synthetic data: its compiled training and inference, their FLOPs and memory."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mljax import experiment, fold, parallel
from mljax.config.derive import derive
from mljax.errors import UserError, exhausted
from mljax.train import create_state, make_optimizer, make_step
from mljax.types import Config, Meta

LABELS = {"voc": 20, "coco": 80, "nuswide": 81, "visual_genome": 500}  # of a data set that need not be here
PLAIN = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "weights": None}


@dataclasses.dataclass
class Program:
    """A compiled program.

    Attributes:
      call: the program.
      flops: of one call, as XLA counts them (a multiplication and an addition are two; rematerialised ones included).
      memory: bytes that the program holds at most: arguments, results and what lies between; None: not told.
      trace_seconds, compile_seconds: of making it; the latter is short where the persistent cache has it.
    """

    call: Callable[..., Any]
    flops: float
    memory: int | None
    trace_seconds: float
    compile_seconds: float


def program(jitted: Any, *arguments: Any) -> Program:
    """Compile a jitted function for arguments, which may be shapes."""
    began = time.perf_counter()
    lowered = jitted.lower(*arguments)
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    work = flops(compiled) or flops(lowered)  # as it was before XLA put library calls in
    return Program(compiled, work, memory(compiled), traced - began, done - traced)


def flops(compiled: Any) -> float:
    """FLOPs of a compiled program; those of all devices together where XLA counts one device's are the caller's."""
    cost = compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    return float((cost or {}).get("flops", 0.0))


def memory(compiled: Any) -> int | None:
    """Bytes of a compiled program at most; donated arguments count once."""
    stats = compiled.memory_analysis()
    if stats is None:
        return None
    used = stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes
    return int(used - stats.alias_size_in_bytes)


def synthetic_meta(config: Config, labels: int | None = None, rows: int | None = None) -> Meta:
    """Metadata of a training split that does not exist: two or three random labels an image, and random vectors."""
    count = labels or LABELS.get(config.data.get("name", ""), 20)
    rows = rows or max(1000, 4 * count)
    rng = np.random.default_rng(0)
    truth = np.zeros((rows, count), np.uint8)
    for _ in range(min(3, count)):
        truth[np.arange(rows), rng.integers(count, size=rows)] = 1
    truth[np.arange(count) % rows, np.arange(count)] = 1  # no label without an image
    vectors = None if config.vectors == "none" else rng.normal(size=(count, 300)).astype(np.float32)
    return Meta(
        name="synthetic", classes=tuple(f"label {i}" for i in range(count)), labels=truth,
        observed=np.ones_like(truth), vectors=vectors,
    )  # fmt: skip


class Model:
    """What is measured: a config's system, its training step and its inference, on arrays that are already there.

    Attributes:
      config: with random weights; its `optim.batch_size` is the batch of both.
      run: the experiment.
      devices: that it runs on.
      cached: whether batches hold endpoints in place of images, as config.cache says.
    """

    def __init__(
        self, config: Config, *, labels: int | None = None, rows: int | None = None, devices: list[Any] | None = None
    ):
        config = derive(config, {"weights.name": None})
        self.config, self.devices = config, devices or parallel.devices_for(config.devices)
        parallel.check_batch(config.optim.batch_size, len(self.devices))
        self.run = experiment.assemble(config, synthetic_meta(config, labels, rows), PLAIN)
        self.cached = bool(config.cache.train_views)
        self.variables = jax.eval_shape(lambda: experiment.init_variables(self.run, config.seed))
        frozen = self.run.system.backbone.frozen_parameters
        self.tx = make_optimizer(config, self.variables["params"], 100, frozen)
        self.step, self.place_state, self.place = parallel.compile_step(
            make_step(self.run, self.tx), config.parallel, self.devices
        )
        on = parallel.shardings(self.devices)
        self.whole, self.split = on.whole, on.split
        self.scores = jax.jit(self.run.scores, in_shardings=(on.whole, on.split))

    def shapes(self, batch_size: int) -> dict[str, Any]:
        """A batch as shapes."""
        shape = None
        if self.cached:
            size = self.config.input.size
            image = jax.ShapeDtypeStruct((1, size, size, 3), np.uint8)
            endpoints = jax.eval_shape(lambda v, x: self.run.encode(v)(x), self.variables, image)
            shape = {name: x.shape[1:] for name, x in endpoints.items()}
        batch = experiment.example_batch(self.run, 1, shape)
        if self.cached and "views" in batch:
            views = self.config.input.views
            batch["views"] = {k: np.zeros((1, views, *s), np.float16) for k, s in (shape or {}).items()}
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype), batch)

    def batch(self, batch_size: int) -> dict[str, Any]:
        """A random batch on the host."""
        rng, meta = np.random.default_rng(1), self.run.meta

        def fill(x: Any) -> np.ndarray:
            if x.dtype == np.uint8:
                return rng.integers(256, size=x.shape, dtype=np.uint8)
            return rng.uniform(0, 1, x.shape).astype(x.dtype)

        rows = np.arange(batch_size) % len(meta.labels)
        known = {"labels": meta.labels[rows].astype(np.float32), "observed": meta.observed[rows].astype(np.float32)}
        known |= {"index": rows.astype(np.int32), "mask": np.ones(batch_size, np.float32)}
        return {**jax.tree.map(fill, self.shapes(batch_size)), **known}

    def state_of(self, variables: Any) -> Any:
        return create_state(variables, self.tx, ema=self.config.ema, seed=self.config.seed)

    def training(self, batch_size: int) -> Program:
        batch = self.shapes(batch_size)
        batch = jax.eval_shape(self.place, batch) if self.config.parallel == "pmap" else batch
        return program(self.step, jax.eval_shape(self.state_of, self.variables), batch)

    def inference(self, batch_size: int, variables: Any = None) -> Program:
        return program(self.scores, variables or self.variables, self.shapes(batch_size))

    def initial(self) -> dict[str, Any]:
        return experiment.init_variables(self.run, self.config.seed)

    def trainer(self, call: Callable[..., Any], batch_size: int) -> Callable[[int], None]:
        """`run(steps)` of a compiled training step, which returns when the device is done."""
        batch, state = self.place(self.batch(batch_size)), self.place_state(jax.jit(self.state_of)(self.initial()))

        def run(steps: int) -> None:
            nonlocal state
            for _ in range(steps):
                state, metrics = call(state, batch)
            jax.block_until_ready((state, metrics))

        return run

    def scorer(self, call: Callable[..., Any], variables: Any, batch_size: int) -> Callable[[int], None]:
        """`run(steps)` of compiled inference."""
        batch = jax.device_put(self.batch(batch_size), self.split)
        variables = jax.device_put(variables, self.whole)

        def run(steps: int) -> None:
            for _ in range(steps):
                out = call(variables, batch)
            out.block_until_ready()

        return run

    def folded(self, variables: Any) -> tuple[Mapping[str, Any], int]:
        """`variables` with batch normalisation folded, and how many were; it is a UserError if none was."""
        shapes = jax.eval_shape(self.run.prepare, self.shapes(1))
        folded, count = fold.fold(self.run.system, variables, shapes)
        if not count:
            raise UserError("There is no batch normalisation after a convolution here to fold; leave out --fold.")
        return folded, count

    def folded_shapes(self) -> Any:
        """The shapes of `folded`: every normalisation of random variables folds alike."""
        ones = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), self.variables)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.folded(ones)[0])


def largest_batch(fits: Callable[[int], bool], step: int = 1, start: int = 8, most: int = 65536) -> int:
    """The largest multiple of `step` that fits: doubled until it does not, then halved in.

    Args:
      fits: whether a batch of a size fits; larger ones never fit better.
      step: devices that share a batch.
      start: the first that is tried, rounded up to a multiple.
      most: an end to the search.
    Raises:
      UserError: not even one image per device fits.
    """
    good, bad = 0, max(1, -(-start // step))
    while bad * step <= most and fits(bad * step):
        good, bad = bad, bad * 2
    while bad - good > max(1, good // 16):  # to 6 %: every try compiles
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle * step) else (good, middle)
    if not good:
        raise UserError(
            f"Not even {step} {'image fits' if step == 1 else 'images fit'} the memory; lower config.input.size, set"
            " config.backbone.remat=True, or choose a smaller backbone."
        )
    return good * step


def fits(model: Model, limit: int | None, batch_size: int, *, run: bool, part: str = "train") -> bool:
    """Whether a step of this batch fits: by what the compiled program holds, and by running it once.

    Args:
      limit: bytes; None: not known.
      run: also run a step; on a CPU a step that is too large would end the process, so it is not run there.
      part: "train" or "infer".
    """
    try:
        made = model.training(batch_size) if part == "train" else model.inference(batch_size)
        if limit is not None and made.memory is not None and made.memory > limit:
            return False
        if run and part == "train":
            model.trainer(made.call, batch_size)(1)
        elif run:
            model.scorer(made.call, model.initial(), batch_size)(1)
    except (MemoryError, RuntimeError) as error:
        if not exhausted(error):
            raise
        return False
    return True


def product_rate(dtype: str, size: int = 2048) -> Callable[[int], None]:
    """`run(steps)` of a square matrix product, 2 size^3 FLOPs: what the machine reaches at most in practice."""
    kind = jnp.bfloat16 if dtype == "bfloat16" else jnp.float32
    x = jnp.asarray(np.random.default_rng(0).normal(size=(size, size)), kind)
    product = jax.jit(lambda x: jax.lax.dot(x, x, preferred_element_type=jnp.float32))

    def run(steps: int) -> None:
        for _ in range(steps):
            out = product(x)
        out.block_until_ready()

    return run
