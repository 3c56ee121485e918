"""What the systems share that turn label vectors into classifiers with a graph convolution: ML-GCN and GATN."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mljax.errors import UserError
from mljax.layers import largest, torch_linear_init
from mljax.types import Meta, Outputs
from mljax.weights.published import Names

SMALLEST = 1e-12  # a row sum nearer to zero than this has no square root worth taking


def normalise(adjacency: Float[Array, "l l"]) -> Float[Array, "l l"]:
    """D A^T D with D = diag(|row sums|)^(-1/2); the transposition is in ML-GCN's code.

    Differs from the authors' code: the sign of a row sum is dropped, and a row that sums to zero gets zero; theirs
    gives NaN or infinity. GATN's learned graph can have such rows (one random start of ten has one), ML-GCN's cannot.
    `mljax.data.labels.normalise_adjacency`, for fixed graphs, gives zero to negative rows too; a label of a learned
    graph would then stay without a classifier.
    """
    rows = jnp.abs(adjacency.sum(1))
    usable = rows > SMALLEST
    scale = jnp.where(usable, jax.lax.rsqrt(jnp.where(usable, rows, 1.0)), 0.0)
    return scale[:, None] * adjacency.T * scale[None, :]


class GraphConvolution(nn.Module):
    """adjacency . x . kernel, no bias.

    Reference: Kipf and Welling, ICLR 2017, eq. 2, started as in ML-GCN's code: U(-1/sqrt(features), 1/sqrt(features)).
    """

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "l e"], adjacency: Float[Array, "l l"]) -> Float[Array, "l d"]:
        kernel = self.param("kernel", torch_linear_init(self.features), (x.shape[-1], self.features))
        return adjacency @ (x @ kernel)


class GraphClassifiers(nn.Module):
    """Label vectors -> one classifier per label: two graph convolutions, LeakyReLU 0.2 between them.

    Always in float32: it is computed once per batch, not per image, and a 300-d vector is summed over.

    Attributes:
      width: between the convolutions (the authors' 1024).
      features: d of the image features that are to be classified.
    """

    width: int
    features: int

    @nn.compact
    def __call__(self, vectors: Float[Array, "l e"], adjacency: Float[Array, "l l"]) -> Float[Array, "l d"]:
        """The classifiers; the adjacency is normalised already."""
        hidden = nn.leaky_relu(GraphConvolution(self.width, name="gc1")(vectors, adjacency), 0.2)
        return GraphConvolution(self.features, name="gc2")(hidden, adjacency)


def classify(feature_map: Float[Array, "b h w d"], classifiers: Float[Array, "l d"]) -> Outputs:
    """Globally max-pooled features times classifiers, and class activation maps.

    Attention is the softmax over positions of what each position's features score (Zhou et al., CVPR 2016).
    Differs from the authors' code: theirs pools 14x14 windows, which is all of the map at 448 pixels and a choice at
    other sizes; ours pools the whole map.
    """
    feature_map = feature_map.astype(jnp.float32)
    logits = largest(feature_map, (1, 2)) @ classifiers.T
    activation = jnp.einsum("bhwd,ld->blhw", feature_map, classifiers)
    attention = nn.softmax(activation.reshape(*activation.shape[:2], -1), axis=-1).reshape(activation.shape)
    return Outputs(logits=logits, attention=attention[:, None])


def vectors(meta: Meta, system: str) -> Float[np.ndarray, "l e"]:
    """The data set's label vectors.

    Raises:
      UserError: it has none; `system` is who asks for them.
    """
    if meta.vectors is None:
        raise UserError(
            f"{system} makes its classifiers from label vectors and {meta.name!r} has none; set config.vectors to"
            " 'glove' or to a file of names and vectors."
        )
    return meta.vectors


def published_classifiers(names: Names) -> dict[str, dict[str, np.ndarray]]:
    """gc1, gc2 of the authors' state dicts; their weights are (in out) as ours."""
    return {name: {"kernel": names.array(f"{name}.weight")} for name in ("gc1", "gc2")}
