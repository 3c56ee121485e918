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
from jaxtyping import Float

from mljax.errors import UserError, one_of
from mljax.layers import constant, encode, final
from mljax.losses.criterion import Criterion
from mljax.systems import _semantic
from mljax.types import Batch, Meta, Outputs
from mljax.weights.published import Names, Published


class SSGRL(nn.Module):
    """SSGRL for a data set with label vectors.

    Label features are those before propagation (b l d), d `channels` or the backbone's. `extra`: `propagated` (b l d).

    Attributes:
      channels: of label features, by a 1x1 convolution with BatchNorm as in SST; None: the backbone's, as the authors'.
      width: of what is classified.
      hidden: of the joint space of positions and label vectors; None: half of width, as the authors'.
      steps: of the propagation; 0 is the network without a graph.
      reset_gate: "released": the reset gate uses the update gate's U, as the released code and so its checkpoints do;
        "fixed": its own, as the paper writes.
      graph: conditional probabilities of the training "labels", "none", or a .npy file of them (l l): the authors'
        checkpoints do not hold the graph.
      pool: side of the average pooling of the map; 1: none.

    Reference: Chen et al., "Learning Semantic-Specific Graph Representation for Multi-Label Image Recognition",
    ICCV 2019, eq. 1 to 10.
    Differs from the authors' code: nothing in values; see `mljax.layers.SemanticPooling` for how scores are computed.
    """

    backbone: nn.Module
    criterion: Criterion
    meta: Meta
    channels: int | None = None
    width: int = 2048
    hidden: int | None = None
    steps: int = 3
    reset_gate: str = "released"
    graph: str = "labels"
    pool: int = 2
    dtype: Any = jnp.float32
    axis: str | None = None

    def __post_init__(self) -> None:
        one_of("config.system.reset_gate", self.reset_gate, ("released", "fixed"))
        _semantic.not_negative(steps=self.steps)
        _semantic.at_least_one(pool=self.pool, channels=self.channels, width=self.width, hidden=self.hidden)
        _semantic.label_vectors(self.meta, "SSGRL")
        _semantic.graph(self.meta, self.graph)  # says early what is wrong with it
        super().__post_init__()

    @property
    def adjacency(self) -> Float[np.ndarray, "l l"]:
        """The label graph; see `_semantic.graph`."""
        return _semantic.graph(self.meta, self.graph)

    @property
    def vectors(self) -> Float[np.ndarray, "l e"]:
        return _semantic.label_vectors(self.meta, "SSGRL")

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool = False) -> Outputs:
        feature_map = final(encode(self.backbone, batch, train=train))
        decoupling = _semantic.Decoupling(
            self.meta.num_labels, self.channels, _semantic.half(self.width, self.hidden), self.pool, "semantic",
            self.dtype, self.axis, name="decoupling",
        )  # fmt: skip
        features, attention = decoupling(feature_map, constant(self, "vectors", lambda: self.vectors), train=train)
        head = _semantic.GraphClassifier(self.width, self.steps, self.reset_gate, self.dtype, name="head")
        logits, propagated = head(features, constant(self, "adjacency", lambda: self.adjacency))
        return Outputs(logits, features, attention, {"propagated": propagated})

    def loss(self, batch: Batch, step: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        del step
        return self.criterion(self(batch, train=True).logits, batch, axis=self.axis), {}


def _convert(names: Names, system: nn.Module) -> dict[str, Any]:
    """Neither graph nor label vectors are in SSGRL's files: they stay the data set's; HCP-MLR-PL's hold both."""
    assert isinstance(system, SSGRL)
    if HCP in names:
        if system.reset_gate != "fixed":
            raise UserError("The weights have a reset gate of their own; set config.system.reset_gate='fixed'.")
        names.ignore(r"intra_.*")  # SST's head over pairs of labels, which its repository builds in any case
        variables = _semantic.published_hcp(names)
        _check_channels(system, variables["params"]["decoupling"])
        return variables
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
    if system.steps and np.isnan(system.adjacency).any():
        raise UserError(
            "The file holds no label graph; give --config.system.graph=FILE.npy, or leave out --classes with the data"
            " set here."
        )
    _check_channels(system, {"pooling": pooling})
    return {
        "params": {"decoupling": {"pooling": pooling}, "head": head},
        "constants": {"adjacency": system.adjacency, "vectors": system.vectors},
    }


def _check_channels(system: SSGRL, decoupling: dict[str, Any]) -> None:
    """UserError unless the file reduces the map to `channels`, or has a map of so many, as the system does."""
    channels = decoupling["pooling"]["image"]["kernel"].shape[0]
    if system.channels not in (None, channels):
        raise UserError(
            f"The weights were made with {channels} channels and config.system.channels is {system.channels}; change it"
            f" to {channels}{'' if 'reduce' in decoupling else ' or None'}."
        )
    if system.channels is None and "reduce" in decoupling:
        raise UserError(f"The weights reduce the map to {channels} channels; set config.system.channels={channels}.")


def _rename(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The trunk of HCP-MLR-PL's files under the prefix that SSGRL's have."""
    if HCP not in state:
        return state
    return {re.sub(r"^backbone\.", TRUNK, name): value for name, value in state.items()}


HCP = "SemanticDecoupling.fc1.weight"  # a name of HCP-MLR-PL's files, whose network is SSGRL's with fewer channels
TRUNK = "resnet_101."
PUBLISHED = Published(_convert, trunk=TRUNK, rename=_rename)
NAMES = {"ssgrl": SSGRL}
