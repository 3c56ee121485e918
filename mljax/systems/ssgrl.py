"""SSGRL: semantic-specific graph representation learning (Chen, Xu, Hui, Wu, Lin; ICCV 2019).

Backbone -> 2x2 average pooling -> semantic decoupling: each label's vector looks for its label on the map and pools one
feature (b l d) -> gated propagation over the label graph -> one classifier per label.

Exact: forward pass, graph and start of the weights are those of the authors' code, HCPLab-SYSU/SSGRL. With partial
labels and `config.loss.name = "partial_bce"` it is the baseline that SST and SARB are compared with.
"""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mljax.errors import UserError
from mljax.layers import constant, encode, final
from mljax.losses.criterion import Criterion
from mljax.systems import _semantic
from mljax.types import Batch, Constant, Meta, Outputs
from mljax.weights.published import Names, Published

RESET_GATES = ("released", "fixed")


class SSGRL(nn.Module):
    """The network; settings are explained at `ssgrl`, which builds it.

    Label features are those before propagation (b l d), d `channels` or the backbone's. `extra`: `propagated` (b l d).
    """

    backbone: nn.Module
    criterion: Criterion
    labels: int
    adjacency: Constant
    vectors: Constant
    channels: int | None
    width: int
    hidden: int
    steps: int
    reset_gate: str
    pool: int
    dtype: Any = jnp.float32
    axis: str | None = None

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> Outputs:
        feature_map = final(encode(self.backbone, batch, train=train))
        decoupling = _semantic.Decoupling(
            self.labels, self.channels, self.hidden, self.pool, "semantic", self.dtype, self.axis, name="decoupling"
        )
        features, attention = decoupling(feature_map, constant(self, "vectors", self.vectors), train=train)
        head = _semantic.GraphClassifier(self.width, self.steps, self.reset_gate, self.dtype, name="head")
        logits, propagated = head(features, constant(self, "adjacency", self.adjacency))
        return Outputs(logits, features, attention, {"propagated": propagated})

    def loss(self, batch: Batch, step: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        del step
        return self.criterion(self(batch, train=True).logits, batch, axis=self.axis), {}


def ssgrl(
    *,
    backbone: nn.Module,
    criterion: Criterion,
    meta: Meta,
    channels: int | None = None,
    width: int = 2048,
    hidden: int | None = None,
    steps: int = 3,
    reset_gate: str = "released",
    graph: str = "labels",
    pool: int = 2,
    dtype: Any = jnp.float32,
    axis: str | None = None,
) -> SSGRL:
    """SSGRL for a data set with label vectors.

    Args:
      backbone, criterion, meta: image -> endpoints, the loss, and the facts of the training split.
      channels: of label features, by a 1x1 convolution with BatchNorm as in SST; None: the backbone's, as the authors'.
      width: of what is classified.
      hidden: of the joint space of positions and label vectors; None: half of width, as the authors'.
      steps: of the propagation; 0 is the network without a graph.
      reset_gate: "released": the reset gate uses the update gate's U, as the released code and so its checkpoints do;
        "fixed": its own, as the paper writes.
      graph: conditional probabilities of the training "labels", "none", or a .npy file of them (l l): the authors'
        checkpoints do not hold the graph.
      pool: side of the average pooling of the map; 1: none.
    Raises:
      UserError: an unknown choice, a setting out of range, no label vectors, a graph of another size.
    Reference: Chen et al., "Learning Semantic-Specific Graph Representation for Multi-Label Image Recognition",
    ICCV 2019, eq. 1 to 10.
    Differs from the authors' code: nothing in values; see `mljax.layers.SemanticPooling` for how scores are computed.
    """
    _semantic.choice("reset_gate", reset_gate, RESET_GATES)
    _semantic.at_least(0, steps=steps)
    hidden = max(width // 2, 1) if hidden is None else hidden
    _semantic.at_least(1, pool=pool, channels=1 if channels is None else channels, width=width, hidden=hidden)
    vectors = Constant(_semantic.label_vectors(meta, "SSGRL"))
    adjacency = Constant(_semantic.graph(meta, graph))
    return SSGRL(
        backbone, criterion, meta.num_labels, adjacency, vectors, channels, width, hidden, steps, reset_gate, pool,
        dtype, axis,
    )  # fmt: skip


def _convert(names: Names, system: nn.Module) -> dict[str, Any]:
    """Neither graph nor label vectors are in SSGRL's files: they stay the data set's; HCP-MLR-PL's hold both."""
    assert isinstance(system, SSGRL)
    if HCP in names:
        if system.reset_gate != "fixed":
            raise UserError("The weights have a reset gate of their own; set config.system.reset_gate='fixed'.")
        names.ignore(r"intra_.*")  # SST's head over pairs of labels, which its repository builds in any case
        found = _semantic.published_hcp(names)
        _check_channels(system, found["params"]["decoupling"])
        return found
    gates = {
        f"{gate}_{part}": f"graph_net.fc_eq{i}_{part}"
        for i, gate in enumerate(("update", "reset", "candidate"), 3)
        for part in "wu"
    }
    if system.reset_gate == "released":
        del gates["reset_u"]
        names.ignore(r"graph_net\.fc_eq4_u\.(weight|bias)")
    pooling = _semantic.published_decoupling(names, "word_semantic", ("fc_1", "fc_2", "fc_3", "fc_a"))
    head = _semantic.published_classifier(names, gates, "fc_output")
    if system.steps and np.isnan(system.adjacency.value).any():
        raise UserError(
            "The file holds no label graph; give --config.system.graph=FILE.npy, or leave out --classes with the data"
            " set here."
        )
    _check_channels(system, {"pooling": pooling})
    return {
        "params": {"decoupling": {"pooling": pooling}, "head": head},
        "constants": {"adjacency": system.adjacency.value, "vectors": system.vectors.value},
    }


def _check_channels(system: SSGRL, decoupling: dict[str, Any]) -> None:
    """UserError unless the file reduces the map to `channels`, or has a map of so many, as the system does."""
    found = decoupling["pooling"]["image"]["kernel"].shape[0]
    if system.channels not in (None, found):
        raise UserError(
            f"The weights were made with {found} channels and config.system.channels is {system.channels}; change it"
            f" to {found}{'' if 'reduce' in decoupling else ' or None'}."
        )
    if system.channels is None and "reduce" in decoupling:
        raise UserError(f"The weights reduce the map to {found} channels; set config.system.channels={found}.")


def _rename(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The trunk of HCP-MLR-PL's files under the prefix that SSGRL's have."""
    if HCP not in state:
        return state
    return {re.sub(r"^backbone\.", TRUNK, name): value for name, value in state.items()}


HCP = "SemanticDecoupling.fc1.weight"  # a name of HCP-MLR-PL's files, whose network is SSGRL's with fewer channels
TRUNK = "resnet_101."
PUBLISHED = Published(_convert, trunk=TRUNK, rename=_rename)
NAMES = {"ssgrl": ssgrl}
