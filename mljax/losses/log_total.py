"""The log of the denominators of a contrastive loss, block by block, and its gradient."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mljax.types import ArrayLike

BLOCK = 256  # rows of a block of similarities; 256 x 256 float32 are 256 KiB


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def log_total(z: Float[ArrayLike, "n d"], takes: Float[ArrayLike, "n"], temperature: float) -> Float[Array, "n"]:
    """log of the sum over the other taken rows of exp(z_i . z_j / temperature), without the matrix of similarities.

    Taken rows are put first, and only blocks of (BLOCK BLOCK) that hold some are computed, one at a time, with a
    running maximum; once more for the gradient. Time goes with the square of the number of taken rows, memory does not.

    Args:
      takes: 1 for the rows that are taken, 0 for the others.
    Returns:
      0 where a row is not taken or is the only one.
    """
    return _log_total(z, takes, temperature)[0]


def _log_total(z: Array, takes: Array, temperature: float) -> tuple[Array, tuple[Array, Array, Array]]:
    order, count, size, blocks = _blocks(takes)
    least = jnp.finfo(z.dtype).min

    def row(i: Array, totals: Array) -> Array:
        def column(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            highest, total = carry
            similarity, pair = _similarity(z, order, count, (i, j), size, temperature)
            new = jnp.maximum(highest, jnp.max(jnp.where(pair, similarity, least), axis=1))
            terms = jnp.where(pair, jnp.exp(jnp.where(pair, similarity - new[:, None], 0)), 0)
            return new, total * jnp.exp(highest - new) + jnp.sum(terms, axis=1)

        start = jnp.full((size,), least, z.dtype), jnp.zeros((size,), z.dtype)
        highest, total = jax.lax.fori_loop(0, blocks, column, start)
        logs = jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1)) + highest, 0)
        return jax.lax.dynamic_update_slice(totals, logs, (i * size,))

    totals = jax.lax.fori_loop(0, blocks, row, jnp.zeros(order.shape, z.dtype))
    n = z.shape[0]
    return jnp.zeros((n,), z.dtype).at[order[:n]].set(totals[:n]), (z, takes, totals)


def _log_total_gradient(temperature: float, saved: tuple[Array, Array, Array], cotangent: Array) -> tuple[Array, Array]:
    """d/dz_i = sum over j of (g_i p_ij + g_j p_ji) z_j / temperature, p the softmax of a row."""
    z, takes, totals = saved
    order, count, size, blocks = _blocks(takes)
    cotangent = cotangent[order]

    def row(i: Array, gradient: Array) -> Array:
        def column(j: Array, gradients: Array) -> Array:
            similarity, pair = _similarity(z, order, count, (i, j), size, temperature)

            def share(total: Array, g: Array) -> Array:
                return jnp.where(pair, jnp.exp(jnp.where(pair, similarity - total, 0)), 0) * g

            mine = share(_part(totals, i, size)[:, None], _part(cotangent, i, size)[:, None])
            theirs = share(_part(totals, j, size)[None], _part(cotangent, j, size)[None])
            return gradients + jnp.matmul(mine + theirs, z[_part(order, j, size)], precision="highest")

        gradients = jax.lax.fori_loop(0, blocks, column, jnp.zeros((size, z.shape[1]), z.dtype)) / temperature
        return gradient.at[_part(order, i, size)].add(gradients)  # rows beyond the taken ones add zeros

    return jax.lax.fori_loop(0, blocks, row, jnp.zeros_like(z)), jnp.zeros_like(takes)


log_total.defvjp(_log_total, _log_total_gradient)


def _blocks(takes: Array) -> tuple[Array, Array, int, Array]:
    """The rows, taken ones first, in full blocks; how many are taken; the size of a block; how many blocks hold any."""
    n = takes.shape[0]
    size = min(BLOCK, n)
    order = jnp.argsort(takes <= 0, stable=True)
    order = jnp.pad(order, (0, -n % size))  # the padding repeats row 0 and is masked by its position
    count = jnp.sum(takes > 0)
    return order, count, size, (count + size - 1) // size


def _part(x: Array, i: Array, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, i * size, size)


def _similarity(
    z: Array, order: Array, count: Array, at: tuple[Array, Array], size: int, temperature: float
) -> tuple[Array, Array]:
    """(size size) similarities of two blocks, and which of them are pairs of two different taken rows."""
    rows, columns = (z[_part(order, i, size)] for i in at)
    similarity = jnp.matmul(rows, columns.T, precision="highest") / temperature
    i, j = (k * size + jnp.arange(size, dtype=jnp.int32) for k in at)
    pair = (i < count)[:, None] & (j < count)[None] & (i[:, None] != j[None])
    return similarity, pair
