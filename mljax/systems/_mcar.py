"""Where MCAR looks again: class maps -> profiles -> intervals -> boxes -> crops, all of static shapes.

The rules are those of the authors' code (gaobb/MCAR), corner cases included: what a box is, not how it is found.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32

SHARE = 0.125  # of the side: the least length of an interval, and the margin where nothing stands out
# Stretched maps are ramps, and a ramp of an even number of pixels passes through its middle: the usual threshold. Which
# side such a value is on must not be a matter of rounding, or a run on two devices is another run; it is below.
TIE = 1e-5


def axis_weights(size: int, target: int) -> Float32[np.ndarray, "{target} {size}"]:
    """Bilinear weights that stretch an axis so that its ends stay its ends (torch's align_corners)."""
    position = np.arange(target, dtype=np.float32) * np.float32((size - 1) / max(target - 1, 1))
    low = np.minimum(position.astype(np.int32), size - 1)
    share = position - low
    weights = np.zeros((target, size), np.float32)
    weights[np.arange(target), low] += 1 - share
    weights[np.arange(target), np.minimum(low + 1, size - 1)] += share
    return weights


def profiles(
    maps: Float[Array, "*batch h w"], height: int, width: int
) -> tuple[Float[Array, "*batch {width}"], Float[Array, "*batch {height}"]]:
    """The largest values of the columns and of the rows of maps that are stretched to the image.

    Both are scaled to [0, 1]; a profile that is the same everywhere becomes 1 everywhere, and so does one whose values
    differ by `TIE` of the largest: that much is rounding, which the authors' code stretches to [0, 1].
    """
    rows = jnp.asarray(axis_weights(maps.shape[-2], height))
    columns = jnp.asarray(axis_weights(maps.shape[-1], width))
    # in full float32 wherever it runs: a box's edge is where a profile crosses the threshold
    stretched = jnp.einsum("...hw,Hh,Ww->...HW", maps, rows, columns, precision=jax.lax.Precision.HIGHEST)
    return _unit(stretched.max(-2)), _unit(stretched.max(-1))


def _unit(profile: jax.Array) -> jax.Array:
    low, high = profile.min(-1, keepdims=True), profile.max(-1, keepdims=True)
    flat = high - low <= TIE * high
    return jnp.where(flat, 1.0, (profile - low) / jnp.where(flat, 1.0, high - low))


def interval(profile: Float[Array, "n"], threshold: float) -> tuple[Int32[Array, ""], Int32[Array, ""]]:
    """The part of a profile that holds its peak: begin and end, the end excluded.

    The profile is cut before every position whose right neighbour is on the other side of the threshold: a part above
    it begins with the last value below, and lacks its own last value. (A value equal to the threshold is on neither
    side.) The part that holds the largest value is taken; where several do, the longest of them, and then the one
    before the first cut, the one after the last cut, or the first of the others. Without a cut it is the middle three
    quarters. A short part is lengthened, see `_at_least`.
    """
    n = profile.shape[0]
    side = jnp.sign(profile - threshold)
    cut = jnp.concatenate([jnp.abs(side[1:] - side[:-1]) == 2, jnp.zeros((1,), bool)])
    position = jnp.arange(n)
    begin = jnp.maximum(jax.lax.cummax(jnp.where(cut, position, -1)), 0)
    cuts_after = jnp.where(cut, position, n)
    end = jnp.concatenate([jax.lax.cummin(cuts_after, reverse=True)[1:], jnp.full((1,), n, cuts_after.dtype)])
    before_all = ~(jax.lax.cummax(cut.astype(jnp.int32)) > 0)
    order = jnp.where(before_all, 0, jnp.where(end == n, 1, 2 + begin))
    rank = jnp.where(profile == profile.max(), (n - (end - begin)) * (n + 2) + order, jnp.iinfo(jnp.int32).max)
    best = rank.argmin()
    begin, end = _at_least(begin[best], end[best], n)
    nothing = ~cut.any()
    return (
        jnp.where(nothing, math.ceil(n * SHARE), begin).astype(jnp.int32),
        jnp.where(nothing, math.ceil(n * (1 - SHARE)), end).astype(jnp.int32),
    )


def _at_least(begin: jax.Array, end: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """Lengthen an interval of at most ceil(n/8), on both sides, or from the border that it is near.

    The three steps follow each other as in the authors' code: the last two look at what the first has changed, and at
    the far border the result is one shorter than at the near one.
    """
    least = math.ceil(n * SHARE)
    pad = least - (end - begin)
    half = (pad + 1) // 2
    short = pad >= 0
    both = short & (begin > half) & (n - end > pad)
    begin, end = jnp.where(both, begin - half + 1, begin), jnp.where(both, end + half, end)
    near = short & (begin < half)
    begin, end = jnp.where(near, 0, begin), jnp.where(near, least, end)
    far = short & (n - end < half)
    return jnp.where(far, n - least + 1, begin), jnp.where(far, n, end)


def boxes(maps: Float[Array, "b t h w"], height: int, width: int, threshold: float) -> Int32[Array, "b t 4"]:
    """The boxes that class maps point at: left, right, top, bottom in pixels; right and bottom excluded.

    Differs from the authors' code: a value that is within `TIE` of the threshold is below it; theirs is above, below
    or neither, as it was rounded.
    """
    columns, rows = profiles(maps, height, width)
    find = jax.vmap(jax.vmap(lambda profile: interval(profile, threshold + TIE)))
    return jnp.stack([*find(columns), *find(rows)], axis=-1)


def crops(image: Float[Array, "b h w c"], box: Int[Array, "b t 4"]) -> Float[Array, "b t h w c"]:
    """What is in the boxes, each stretched to the image's size.

    Bilinear, the corners of the box on the corners of the result.
    """
    return jax.vmap(lambda picture, some: jax.vmap(lambda one: _crop(picture, one))(some))(image, box)


def _crop(image: jax.Array, box: jax.Array) -> jax.Array:
    height, width, _ = image.shape
    left, right, top, bottom = box[0], box[1], box[2], box[3]
    return _stretch(_stretch(image, top, bottom, height, 0), left, right, width, 1)


def _stretch(image: jax.Array, begin: jax.Array, end: jax.Array, size: int, axis: int) -> jax.Array:
    """[begin, end) of an axis -> all of it."""
    step = (end - 1 - begin).astype(jnp.float32) / max(size - 1, 1)
    position = jnp.arange(size, dtype=jnp.float32) * step
    low = jnp.minimum(position.astype(jnp.int32), end - 1 - begin)
    shape = (-1, 1, 1) if axis == 0 else (1, -1, 1)
    share = (position - low.astype(jnp.float32)).reshape(shape).astype(image.dtype)
    first = jnp.take(image, begin + low, axis=axis, mode="clip")
    second = jnp.take(image, jnp.minimum(begin + low + 1, end - 1), axis=axis, mode="clip")
    return first * (1 - share) + second * share
