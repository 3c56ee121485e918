"""CSRA: class-specific residual attention (Zhu, Wu; "Residual Attention", ICCV 2021).

One unit vector per label scores every position. The logit is the mean score plus lambda times the mean weighted by a
softmax of the scores, or plus lambda times the largest score. Several heads, each with its own vectors and temperature,
are added up.

Exact: the numbers are those of the authors' code, Kevinz-code/CSRA. With a ViT the map is that of its patch tokens
after the last norm; the class token is left out, as in their code.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mljax.errors import UserError
from mljax.layers import encode, final, largest, tokens, torch_linear_init
from mljax.losses.criterion import Criterion
from mljax.types import Batch, Meta, Outputs
from mljax.weights.published import Names, Published

LARGEST = 99.0  # from this temperature on the authors' code takes the largest score
TEMPERATURES = {heads: (*map(float, range(1, heads)), LARGEST) for heads in (2, 6, 8)}
TEMPERATURES |= {1: (1.0,), 4: (1.0, 2.0, 4.0, LARGEST)}


class CSRA(nn.Module):
    """CSRA for a data set.

    Label features are the class-specific residual features f = g + lambda a of the paper's eq. 5, averaged over heads,
    (b l d): a head's logit is its unit vector times its own f. Attention is the softmax over positions, one map per
    head, a single 1 where the largest score is taken. `extra`: `head_logits` (b k l), whose sum over k are the logits.

    Attributes:
      heads: k, 1, 2, 4, 6 or 8; their temperatures are the authors': {1}, {1, max}, {1, 2, 4, max}, {1..5, max},
        {1..7, max}.
      lam: the paper's lambda, weight of the attention beside the mean; 0 is the mean alone.
      temperatures: one for each head, in place of the authors'; from 99 on it is the largest score.

    Reference: Zhu and Wu, "Residual Attention: A Simple but Effective Method for Multi-Label Recognition", ICCV 2021,
      eq. 2 to 8. Temperature infinity is written 99, as in the authors' code.
    """

    backbone: nn.Module
    criterion: Criterion
    meta: Meta
    heads: int = 1
    lam: float = 0.1
    temperatures: tuple[float, ...] = ()
    dtype: Any = jnp.float32
    axis: str | None = None

    def __post_init__(self) -> None:
        if not self.temperatures and self.heads not in TEMPERATURES:
            counts = ", ".join(map(str, sorted(TEMPERATURES)))
            raise UserError(
                f"config.system.heads is {self.heads}; expected one of {counts}, for which the paper has temperatures,"
                " or set config.system.temperatures."
            )
        object.__setattr__(self, "temperatures", tuple(map(float, self.temperatures)))
        if any(not t > 0 for t in self.temperatures):
            raise UserError(f"config.system.temperatures is {self.temperatures}; expected numbers above 0.")
        if not (self.lam >= 0 and math.isfinite(self.lam)):
            raise UserError(
                f"config.system.lam is {self.lam}; expected a number of at least 0, the weight of the attention."
            )
        super().__post_init__()

    @property
    def head_temperatures(self) -> tuple[float, ...]:
        """One for each head: those of the config, or the authors' for that number of heads."""
        return self.temperatures or TEMPERATURES[self.heads]

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> Outputs:
        feature_map = final(encode(self.backbone, batch, train=train))
        b, height, width, d = feature_map.shape
        x = tokens(feature_map).astype(self.dtype)
        temperatures, labels = self.head_temperatures, self.meta.num_labels
        kernel = self.param("kernel", torch_linear_init(d), (len(temperatures), d, labels))
        unit = (kernel / jnp.linalg.norm(kernel, axis=1, keepdims=True)).astype(self.dtype)
        scores = jnp.einsum("bnd,kdl->bkln", x, unit, preferred_element_type=jnp.float32)
        attention = jnp.stack([_attention(scores[:, k], t) for k, t in enumerate(temperatures)], axis=1)
        residual = jnp.stack([_residual(scores[:, k], attention[:, k], t) for k, t in enumerate(temperatures)], 1)
        logits = scores.mean(-1) + self.lam * residual
        pooled = jnp.einsum("bln,bnd->bld", attention.mean(1).astype(self.dtype), x)
        return Outputs(
            logits=logits.sum(1),
            label_features=x.mean(1)[:, None] + jnp.asarray(self.lam, self.dtype) * pooled,
            attention=attention.reshape(b, -1, labels, height, width),
            extra={"head_logits": logits},
        )

    def loss(self, batch: Batch, step: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        del step
        return self.criterion(self(batch, train=True).logits, batch, axis=self.axis), {}


def _attention(scores: Float[Array, "b l n"], temperature: float) -> Float[Array, "b l n"]:
    """Sums to 1 over n."""
    if temperature >= LARGEST:
        return jax.nn.one_hot(scores.argmax(-1), scores.shape[-1], dtype=scores.dtype)
    return nn.softmax(scores * temperature, axis=-1)


def _residual(
    scores: Float[Array, "b l n"], attention: Float[Array, "b l n"], temperature: float
) -> Float[Array, "b l"]:
    """The scores pooled by attention."""
    return largest(scores, -1) if temperature >= LARGEST else (scores * attention).sum(-1)


def _convert(names: Names, system: nn.Module) -> dict[str, Any]:
    assert isinstance(system, CSRA)
    heads = len(system.head_temperatures)
    stored = names.count("classifier.multi_head.")
    if stored != heads:
        raise UserError(
            f"These weights have {stored} heads and the system has {heads}; set config.system.heads={stored}."
        )
    kernels = [names.pointwise(f"classifier.multi_head.{k}.head")["kernel"] for k in range(heads)]
    return {"params": {"kernel": jnp.stack(kernels)}}


def _rename(state: dict[str, Any]) -> dict[str, Any]:
    """The head alone has no "classifier." before its names."""
    return {f"classifier.{name}" if name.startswith("multi_head.") else name: value for name, value in state.items()}


PUBLISHED = Published(_convert, own=r"classifier\..*", rename=_rename)
NAMES = {"csra": CSRA}
