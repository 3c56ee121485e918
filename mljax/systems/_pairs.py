"""SST's head over pairs of labels, chunk by chunk, and its memory of label features."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mljax import parallel
from mljax.layers import Affine, torch_linear_init
from mljax.losses.weak_labels import pair_index
from mljax.systems._semantic import TORCH, linear
from mljax.types import ArrayLike

CHUNK = 128  # pairs at a time: 16 MiB of (b chunk output) at batch 32 and output 1024


class PairHead(nn.Module):
    """Label features -> a logit for every unordered pair of labels, in float32 and the order of `pair_index`.

    "code": u = W_a F, v = [u_i; u_j], logit = c_p . (W_2 relu(W_1 v + b_1) + b_2) + c_0p, c_p of each pair its own.
    "paper": logit = w . relu(W_2 relu(W_1 [F_i; F_j] + b_1) + b_2) + b, the same for all pairs: how the paper's
    1024 -> 512 -> 1024 -> 1 is read here.

    Reference: Chen et al., "Structured Semantic Transfer for Multi-Label Recognition with Partial Labels", AAAI 2022.
    Differs from the authors' code in how it is computed, not in what: W_1 [x; y] = W_11 x + W_12 y needs no pair, and
    W_2 is multiplied with the c_p first, since nothing stands between them (all stay parameters: training is the same).
    What is left per pair goes in chunks, computed again for the gradient. At batch 32, 80 labels (3,160 pairs), width
    1024, hidden 512, output 1024, float32, a loss and its gradient need 124 MiB of temporaries ("paper": 86) and 3 s
    on 2 CPU cores; written as the authors' code is, 2,775 MiB and 62 s, of which (b pairs 2 hidden) is 395 MiB.
    `JAX_PLATFORMS=cpu python -m mljax.systems._pairs` measures it by compile().memory_analysis().

    Attributes:
      hidden: of u, or of the paper's first layer.
      output: of the layers over pairs.
      form: "code" or "paper".
      chunk: pairs at a time.
    """

    hidden: int
    output: int
    form: str = "code"
    chunk: int = CHUNK
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "b l d"]) -> Float[Array, "b pairs"]:
        count, code = pair_index(x.shape[1]).shape[1], self.form == "code"
        if code:
            x = linear(self.hidden, x.shape[-1], "label", self.dtype)(x)
        inputs, middle = 2 * x.shape[-1], self.output if code else self.hidden
        first = Affine(middle, TORCH, torch_linear_init(inputs), name="first")(inputs)
        second = Affine(self.output, TORCH, torch_linear_init(middle), name="second")(middle)
        init = torch_linear_init(self.output)
        size = (count,) if code else ()
        kernel = self.param("kernel", init, (*size, self.output))
        bias = self.param("bias", init, size)
        left, right = jnp.split(first[0].astype(self.dtype), 2)
        left, right = x @ left + first[1].astype(self.dtype)[None, None], x @ right
        if code:
            weights = jnp.matmul(kernel, second[0].T).astype(self.dtype)
            return _in_chunks(_weighted, left, right, weights, self.chunk) + (kernel @ second[1] + bias)[None]
        layer = (second[0].astype(self.dtype), second[1].astype(self.dtype)), kernel.astype(self.dtype)
        return _in_chunks(lambda hidden, _: _classified(hidden, *layer), left, right, None, self.chunk) + bias


def _weighted(hidden: Float[ArrayLike, "b p d"], weights: Float[ArrayLike, "p d"]) -> Float[Array, "b p"]:
    return jnp.einsum("bpd,pd->bp", hidden, weights, preferred_element_type=jnp.float32)


def _classified(
    hidden: Float[ArrayLike, "b p d"],
    second: tuple[Float[ArrayLike, "d o"], Float[ArrayLike, " o"]],
    kernel: Float[ArrayLike, " o"],
) -> Float[Array, "b p"]:
    hidden = nn.relu(hidden @ second[0] + second[1][None, None])
    return jnp.einsum("bpd,d->bp", hidden, kernel, preferred_element_type=jnp.float32)


def _in_chunks(
    of_pairs: Any,
    left: Float[ArrayLike, "b l d"],
    right: Float[ArrayLike, "b l d"],
    weights: Float[ArrayLike, "pairs d"] | None,
    chunk: int,
) -> Float[Array, "b pairs"]:
    """of_pairs(relu(left_i + right_j), weights of these pairs) for all pairs i < j, `chunk` at a time."""
    index = pair_index(left.shape[1])
    count = index.shape[1]
    if not count:  # one label
        return jnp.zeros((left.shape[0], 0), jnp.float32)
    chunk = min(chunk, count)
    extra = -count % chunk  # filled up with the first pair, cut off below
    i, j = np.pad(index, ((0, 0), (0, extra))).reshape(2, -1, chunk)
    if weights is not None:
        weights = jnp.pad(weights, ((0, extra), (0, 0))).reshape(-1, chunk, weights.shape[-1])

    @jax.checkpoint
    def some(at: Any) -> jax.Array:
        i, j, weights = at
        return of_pairs(nn.relu(left[:, i] + right[:, j]), weights)

    chunks = jax.lax.map(some, (jnp.asarray(i), jnp.asarray(j), weights))
    return chunks.transpose(1, 0, 2).reshape(left.shape[0], -1)[:, :count]


def push(
    memory: Float[ArrayLike, "l slots d"],
    features: Float[ArrayLike, "b l d"],
    positive: Float[ArrayLike, "b l"],
    axis: str | None = None,
) -> Float[Array, "l slots d"]:
    """Put the features of known positives in front of each label's memory; the oldest fall out.

    Args:
      memory: newest first.
      features: where `positive` (in {0, 1}); those of all devices go in, in the order of the global batch.
      axis: of pmap, or None.
    Returns:
      The memory, without gradient.
    """
    features, positive = jax.lax.stop_gradient((features.astype(memory.dtype), positive))
    features, positive = parallel.all_gather((features, positive), axis)
    held = memory.shape[:2]
    candidates = jnp.concatenate([features.transpose(1, 0, 2), memory], axis=1)
    absent = jnp.concatenate([positive.T <= 0, jnp.zeros(held, bool)], axis=1)
    chosen = jnp.argsort(absent, axis=1, stable=True)[:, : held[1]]  # there are always enough: the memory itself
    return jnp.take_along_axis(candidates, chosen[:, :, None], axis=1)


def measure(batch: int = 32, labels: int = 80, width: int = 1024, hidden: int = 512, output: int = 1024) -> str:
    """What a loss over all pairs and its gradient need beside inputs and results, by XLA's own account."""
    lines = []
    for form in ("code", "paper"):
        head = PairHead(hidden, output, form)
        x = jax.ShapeDtypeStruct((batch, labels, width), jnp.float32)
        params = jax.eval_shape(head.init, jax.random.key(0), x)

        def loss(params: Any, x: jax.Array, head: PairHead = head) -> jax.Array:
            out: Any = head.apply(params, x)
            return jnp.mean(jnp.square(out))

        memory: Any = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x).compile().memory_analysis()
        lines.append(f"{form}: {memory.temp_size_in_bytes / 2**20:.0f} MiB of temporaries")
    return "\n".join(lines)


if __name__ == "__main__":
    print(measure())
