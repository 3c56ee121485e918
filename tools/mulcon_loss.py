"""Memory and time of MulCon's contrastive loss and its gradient: python tools/mulcon_loss.py

Prints the table of benchmarks/mulcon_loss.md for the device that JAX finds. The yardstick, timed in turn with the loss,
is one plain matmul of the active embeddings with themselves.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mljax.losses.contrastive import label_contrastive

LABELS, WIDTH, TEMPERATURE = 80, 128, 0.2
CASES = ((64, 2.9), (128, 2.9), (64, 20.0), (64, 80.0))  # images of the batch, active labels an image


def masked(z: jax.Array, active: jax.Array) -> jax.Array:
    """The same loss by one masked matrix of all entries: what static shapes cost without blocks."""
    flat, takes = z.reshape(-1, z.shape[-1]), active.reshape(-1) > 0
    label = jnp.tile(jnp.arange(z.shape[1]), z.shape[0])
    s = flat @ flat.T / TEMPERATURE
    pair = takes[:, None] & takes[None] & ~jnp.eye(len(takes), dtype=bool)
    same = pair & (label[:, None] == label[None])
    logs = s - jax.nn.logsumexp(jnp.where(pair, s, -1e9), axis=1, keepdims=True)
    mean = jnp.where(same, logs, 0).sum(1) / jnp.maximum(same.sum(1), 1)
    return -mean.sum() / jnp.maximum(takes.sum(), 1)


def seconds(pairs: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]], rounds: int = 15) -> dict[str, float]:
    """The least time of each over rounds in which they take turns."""
    found: dict[str, list[float]] = {name: [] for name in pairs}
    for _ in range(rounds):
        for name, (function, arguments) in pairs.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            found[name].append(time.perf_counter() - start)
    return {name: min(times[1:]) for name, times in found.items()}


def main() -> None:
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, {LABELS} labels, {WIDTH}-d, float32\n")
    print(
        "| images | active | active x active | temporary memory | of one masked matrix | loss and gradient | matmul |"
    )
    print("|---|---|---|---|---|---|---|")
    for images, share in CASES:
        rng = np.random.default_rng(0)
        z = rng.normal(size=(images, LABELS, WIDTH)).astype(np.float32)
        active = np.float32(rng.random((images, LABELS)) < share / LABELS)
        z, active = jnp.asarray(z / np.linalg.norm(z, axis=-1, keepdims=True)), jnp.asarray(active)
        step = jax.jit(jax.value_and_grad(label_contrastive)).lower(z, active).compile()
        dense = jax.jit(jax.value_and_grad(masked)).lower(z, active).compile()
        mib = [x.memory_analysis().temp_size_in_bytes / 2**20 for x in (step, dense)]  # type: ignore[union-attr]
        rows = z[active > 0]
        matmul = jax.jit(lambda x: jnp.matmul(x, x.T, precision="highest"))
        times = seconds({"loss": (step, (z, active)), "matmul": (matmul, (rows,))})
        square = len(rows) ** 2 * 4 / 2**20
        milliseconds = f"{1e3 * times['loss']:.2f} ms | {1e3 * times['matmul']:.2f} ms"
        print(f"| {images} | {len(rows)} | {square:.2f} MiB | {mib[0]:.2f} MiB | {mib[1]:.0f} MiB | {milliseconds} |")


if __name__ == "__main__":
    main()
