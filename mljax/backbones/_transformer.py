"""What the transformer backbones share: norm, stochastic depth, MLP, legal sizes, reading torch's weights."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from mljax.backbones import _common
from mljax.errors import UserError

# timm's trunc_normal_(std=0.02) cuts at +-2, a hundred deviations out: a plain normal.
SMALL_NORMAL = nn.initializers.normal(0.02)
# What torch's Conv2d starts from: uniform in +-1/sqrt(fan in).
TORCH_CONV = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class LayerNorm(nn.Module):
    """Over the last axis, computed in float32 whatever the dtype of the result."""

    dtype: Any = jnp.float32
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        norm = nn.LayerNorm(self.eps, dtype=jnp.float32, use_fast_variance=False)
        # Its parameters are this module's: one level less in every path.
        nn.share_scope(self, norm)
        return norm(x.astype(jnp.float32)).astype(self.dtype)


class Mlp(nn.Module):
    """A linear layer to 4d, the activation, a linear layer back to d."""

    activation: Callable[[jax.Array], jax.Array]
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        d = x.shape[-1]
        dense = partial(nn.Dense, dtype=self.dtype, kernel_init=SMALL_NORMAL)
        return dense(d, name="fc2")(self.activation(dense(4 * d, name="fc1")(x)))


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x Phi(x), exact."""
    return jax.nn.gelu(x, approximate=False)


def quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x sigmoid(1.702 x): Microsoft's CvT."""
    return x * jax.nn.sigmoid(1.702 * x)


def rates(highest: float, count: int) -> tuple[float, ...]:
    """Drop path of every block: from 0 at the first to `highest` at the last.

    Raises:
      UserError: not in [0, 1).
    """
    if not 0.0 <= highest < 1.0:
        raise UserError(f"config.backbone.drop_path is {highest}; expected a share of images, in [0, 1).")
    return tuple(np.linspace(0.0, highest, count).tolist())


def check_image(image: _common.Image, multiple: int, name: str) -> None:
    """UserError unless the image is (b h w 3) with sides that are multiples of `multiple`."""
    _common.check_image(image, 3, name)
    h, w = image.shape[1:3]
    if h % multiple or w % multiple or not h or not w:
        near = [max(multiple, round(side / multiple) * multiple) for side in (h, w)]
        raise UserError(
            f"The backbone {name} takes images whose height and width are multiples of {multiple}, and got {h}x{w};"
            f" set the image size to {near[0]}x{near[1]}."
        )


def backbone_part(state: Mapping[str, Any], heads: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The backbone's tensors of a torch file, without the prefixes that savers put before the names.

    `module.` goes; where there are names under `backbone.0.` (Query2Label), only those stay; each of `heads` goes.
    """
    plain = {name.removeprefix("module."): np.asarray(value) for name, value in state.items()}
    if any(name.startswith("backbone.0.") for name in plain):
        plain = {
            name.removeprefix("backbone.0."): value for name, value in plain.items() if name.startswith("backbone.0.")
        }
    for head in heads:
        plain = {name.removeprefix(head): value for name, value in plain.items()}
    return plain


def rename(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    """Apply every (regular expression, replacement) in turn."""
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


def official_names(
    state: Mapping[str, Any], head: str, rules: tuple[tuple[str, str], ...], left_out: re.Pattern[str], family: str
) -> dict[str, np.ndarray]:
    """The backbone's tensors under the authors' names, without what is left out, queries, keys and values in one."""
    renamed = {rename(name, rules): value for name, value in backbone_part(state, (head,)).items()}
    return fuse_qkv({name: value for name, value in renamed.items() if not left_out.search(name)}, family)


def fuse_qkv(official: Mapping[str, np.ndarray], family: str) -> dict[str, np.ndarray]:
    """Separate queries, keys and values -> one: `.attn.query.weight` (or `.attn.q.weight`), .. -> `.attn.qkv.weight`.

    Raises:
      UserError: one of the three without the others.
    """
    fused = {}
    for name, value in official.items():
        if found := re.fullmatch(r"(.*\.attn\.)(q|k|v|query|key|value)\.(weight|bias)", name):
            stem, part, leaf = found.groups()
            names = ("q", "k", "v") if len(part) == 1 else ("query", "key", "value")
            for other in names:
                if f"{stem}{other}.{leaf}" not in official:
                    raise UserError(
                        f"The {family} weights have {name!r} without {stem}{other}.{leaf}; the file is cut."
                    )
            fused[f"{stem}qkv.{leaf}"] = np.concatenate([official[f"{stem}{p}.{leaf}"] for p in names])
        else:
            fused[name] = value
    return fused


def torch_leaf(leaf: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    """Name and array in linen's layout: weight -> scale (1-D), kernel (out in -> in out; out in h w -> h w in out)."""
    if leaf != "weight":
        return leaf, value
    if value.ndim == 1:
        return "scale", value
    return "kernel", value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def window_of(table: Float[np.ndarray, "offsets k"]) -> int:
    """Side of the window that a bias table of (2*window-1)^2 rows is for.

    Raises:
      UserError: another number of rows.
    """
    side = round(len(table) ** 0.5)
    if side * side != len(table) or side % 2 == 0:
        raise UserError(
            f"A relative position bias table has {len(table)} rows, which is not (2*window-1)^2; give weights of Swin"
            " version 1 with square windows."
        )
    return (side + 1) // 2


def resize_bias_table(table: Float[np.ndarray, "_ k"], window: int) -> Float[np.ndarray, "(2*{window}-1)**2 k"]:
    """The table for another window: bicubic over the offsets, every head on its own."""
    old, new = 2 * window_of(table) - 1, 2 * window - 1
    return resize_map(np.asarray(table).reshape(old, old, -1), new, new).reshape(new * new, -1)


def resize_map(image: Float[jax.Array | np.ndarray, "_ _ d"], h: int, w: int) -> Any:
    """(h w d): bicubic as torch's interpolate(mode="bicubic"), not antialiased."""
    rows, columns = _bicubic(image.shape[0], h), _bicubic(image.shape[1], w)
    if isinstance(image, jax.Array):
        rows, columns = (jnp.asarray(matrix, image.dtype) for matrix in (rows, columns))
        return jnp.einsum("ih,jw,hwd->ijd", rows, columns, image)
    return np.einsum("ih,jw,hwd->ijd", rows, columns, image.astype(np.float64), optimize=True).astype(image.dtype)


def _bicubic(old: int, new: int) -> np.ndarray:
    """(new old) matrix of cubic convolution (Keys 1981, a = -0.75) along one axis; borders repeat."""

    def kernel(t: np.ndarray) -> np.ndarray:
        t, a = np.abs(t), -0.75
        near = (a + 2) * t**3 - (a + 3) * t**2 + 1
        far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
        return np.where(t <= 1, near, np.where(t < 2, far, 0.0))

    matrix = np.zeros((new, old))
    at = (np.arange(new) + 0.5) * old / new - 0.5
    for tap in range(-1, 3):
        place = np.floor(at).astype(int) + tap
        np.add.at(matrix, (np.arange(new), np.clip(place, 0, old - 1)), kernel(at - place))
    return matrix
