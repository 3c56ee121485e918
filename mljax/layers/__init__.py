"""Blocks that several systems share: attention, linear layers per label, pooling by label, positions."""

from mljax.layers.attention import (
    ACTIVATIONS,
    INITS,
    STACKED,
    AttentionLayer,
    FeedForward,
    MultiHeadAttention,
    attention_bias,
    attention_init,
    attention_maps,
)
from mljax.layers.dropout import Dropout, DropPath
from mljax.layers.feature_maps import constant, encode, final, tokens
from mljax.layers.linear import XAVIER, Affine, GroupLinear, layer_norm, torch_linear_init
from mljax.layers.pooling import ActivationPooling, SemanticPooling, largest
from mljax.layers.positions import sine_position

__all__ = [
    "ACTIVATIONS",
    "INITS",
    "STACKED",
    "XAVIER",
    "ActivationPooling",
    "Affine",
    "AttentionLayer",
    "DropPath",
    "Dropout",
    "FeedForward",
    "GroupLinear",
    "MultiHeadAttention",
    "SemanticPooling",
    "attention_bias",
    "attention_init",
    "attention_maps",
    "constant",
    "encode",
    "final",
    "largest",
    "layer_norm",
    "sine_position",
    "tokens",
    "torch_linear_init",
]
