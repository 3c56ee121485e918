"""What a weight file seems to be, from the names and shapes of its arrays."""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from mljax.build import names

State = Mapping[str, np.ndarray]
PREFIX = r"(|.*?[./])"


class Guess(NamedTuple):
    """What weights seem to be.

    Attributes:
      label: in words: "a ResNet-101".
      prefix: what stands before the names of the net.
      archs: the backbones of ours that it could be, the likeliest first; empty if it is none of them.
    """

    label: str
    prefix: str = ""
    archs: tuple[str, ...] = ()


Describe = Callable[[State, str], Guess]


def identify(state: State) -> Guess:
    """The net that weights belong to; `Guess("something unknown")` with a few names if it is none of those we know."""
    for anchor, describe in _NETS:
        for name in state:
            if found := re.fullmatch(PREFIX + anchor, name):
                guess = describe(state, found[1])
                return guess._replace(label=guess.label + _around(state, guess.prefix))
    for anchor, label in _STRANGERS:
        for name in state:
            if found := re.fullmatch(PREFIX + anchor, name):
                return Guess(label, found[1])
    shown = ", ".join(repr(name) for name in list(state)[:3])
    return Guess(f"something unknown, with {len(state)} arrays such as {shown}")


def _around(state: State, prefix: str) -> str:
    """What is built around a backbone, in words."""
    if any(re.search(r"(^|\.)fc\.W$", name) for name in state):
        return " inside a Query2Label checkpoint"
    if any(".duplicate_pooling" in name or "head.decoder." in name for name in state):
        return " inside an ML-Decoder checkpoint"
    return f" under the prefix {prefix!r}" if prefix else ""


def _count(state: State, start: str) -> int:
    """How many numbers follow a start among the names: the blocks of a stage."""
    return len({name[len(start) :].split(".")[0] for name in state if name.startswith(start)})


def _named(start: str) -> tuple[str, ...]:
    """Our backbones of that name, for any image size."""
    return tuple(name for name in names("backbones") if name == start or re.fullmatch(rf"{start}_\d{{3}}", name))


_DEPTHS: dict[tuple[bool, tuple[int, ...]], int] = {
    (False, (2, 2, 2, 2)): 18,
    (False, (3, 4, 6, 3)): 34,
    (True, (3, 4, 6, 3)): 50,
    (True, (3, 4, 23, 3)): 101,
    (True, (3, 8, 36, 3)): 152,
}


def _resnet(stages: tuple[str, ...], last: str, middle: str) -> Describe:
    """stages: how the names of each begin; last: a name in bottlenecks alone; middle: their 3x3 weight."""

    def describe(state: State, prefix: str) -> Guess:
        blocks = tuple(_count(state, f"{prefix}{stage}") for stage in stages)
        first = f"{prefix}{stages[0]}0."
        bottleneck = first + last in state
        depth = _DEPTHS.get((bottleneck, blocks))
        if depth is None:
            return Guess(f"a ResNet with {blocks} blocks", prefix)
        label, arch = f"a ResNet-{depth}", f"resnet{depth}"
        kernel = state.get(first + middle)
        if bottleneck and kernel is not None and kernel.ndim == 4:
            width, inner = kernel.shape[:2]
            if inner != width:
                label = f"a ResNeXt-{depth} {width // inner}x{inner}d"
                arch = f"resnext{depth}_{width // inner}x{inner}d"
            elif width != 64:
                label, arch = f"a wide ResNet-{depth}", f"wide_resnet{depth}_{width // 64}"
        return Guess(label, prefix, _named(arch))

    return describe


_TRESNETS: dict[tuple[tuple[int, ...], int], str] = {
    ((3, 4, 11, 3), 64): "m",
    ((4, 5, 18, 3), 76): "l",
    ((4, 5, 24, 3), 83): "xl",
    ((3, 4, 23, 3), 64): "l_v2",
    ((3, 8, 34, 5), 64): "xl_v2",
}


def _tresnet(state: State, prefix: str) -> Guess:
    blocks = tuple(_count(state, f"{prefix}body.layer{i}.") for i in range(1, 5))
    stem = next(state[n] for n in (f"{prefix}body.conv1.0.weight", f"{prefix}body.conv1.conv.weight") if n in state)
    size = _TRESNETS.get((blocks, len(stem)))
    if size is None:
        return Guess(f"a TResNet with {blocks} blocks of {len(stem)} features", prefix)
    return Guess(f"a TResNet-{size.upper().replace('_V', ' v')}", prefix, _named(f"tresnet_{size}"))


_SWINS = {(3, 6): "tiny", (3, 18): "small", (4, 18): "base", (6, 18): "large"}


def _swin(stages: str) -> Describe:
    def describe(state: State, prefix: str) -> Guess:
        first, table = f"{prefix}{stages}0.blocks.0.", "relative_position_bias_table"
        offsets, heads = next(v for n, v in state.items() if n.startswith(first) and n.endswith(table)).shape
        third = _count(state, f"{prefix}{stages}2.blocks.")
        size = _SWINS.get((heads, third))
        if size is None:
            return Guess(f"a Swin with {heads} heads and {third} blocks in its third stage", prefix)
        window = (round(offsets**0.5) + 1) // 2
        usual = f"_{window * 32}"  # a last stage of one window: 224 pixels with window 7, 384 with 12
        archs = sorted(_named(f"swin_{size}"), key=lambda name: not name.endswith(usual))
        return Guess(f"a Swin-{size[0].upper()} with window {window}", prefix, tuple(archs))

    return describe


_CVTS = {10: "13", 16: "21", 20: "w24"}


def _cvt(stage: str) -> Describe:
    def describe(state: State, prefix: str) -> Guess:
        last = _count(state, prefix + stage)
        if last not in _CVTS:
            return Guess(f"a CvT with {last} blocks in its last stage", prefix)
        return Guess(f"a CvT-{_CVTS[last].upper()}", prefix, _named(f"cvt_{_CVTS[last]}"))

    return describe


_VITS = {(12, 768): "base", (24, 1024): "large"}


def _vit(blocks: str, patches: str, positions: str) -> Describe:
    """What the names of the blocks begin with, the patches' kernel, and the table of positions."""

    def describe(state: State, prefix: str) -> Guess:
        count, kernel, table = _count(state, prefix + blocks), *(state.get(prefix + x) for x in (patches, positions))
        width, patch = (0, 0) if kernel is None else (kernel.shape[0], kernel.shape[-1])
        size = _VITS.get((count, width))
        if size is None or patch != 16:
            return Guess(f"a ViT of {count} blocks", prefix)
        usual = "" if table is None or table.ndim != 3 else f"_{round((table.shape[1] - 1) ** 0.5) * patch}"
        archs = sorted(_named(f"vit_{size}_{patch}"), key=lambda name: not name.endswith(usual))
        return Guess(f"a ViT-{size[0].upper()} with patches of {patch} pixels", prefix, tuple(archs))

    return describe


def _mobilenet(state: State, prefix: str) -> Guess:
    return Guess("a Keras MobileNetV1", "", _named("mobilenet_v1"))


_TORCH = ("conv3.weight", "conv2.weight")
_TRANSFORMERS = ("layer.2.convolution.weight", "layer.1.convolution.weight")
_STAGES = tuple(f"encoder.stages.{i}.layers." for i in range(4))
# What follows the prefix in one name of a net, and what looks at the rest; the first that is found decides.
_NETS: tuple[tuple[str, Describe], ...] = (
    (r"body\.conv1\.(?:0|conv)\.weight", _tresnet),
    (r"(?:conv_dw_1/)+depthwise_kernel(?::0)?", _mobilenet),
    (r"layers\.0\.blocks\.0\.attn\.relative_position_bias_table", _swin("layers.")),
    (r"encoder\.layers\.0\.blocks\.0\..*relative_position_bias_table", _swin("encoder.layers.")),
    (r"stage0\.blocks\.0\.attn\.conv_proj_q\.conv\.weight", _cvt("stage2.blocks.")),
    (r"encoder\.stages\.0\.layers\.0\..*projection_query\..*convolution\.weight", _cvt(_STAGES[2])),
    (r"encoder\.stages\.0\.layers\.0\.layer\.0\.convolution\.weight", _resnet(_STAGES, *_TRANSFORMERS)),
    (r"layer1\.0\.conv1\.weight", _resnet(tuple(f"layer{i}." for i in range(1, 5)), *_TORCH)),
    (r"4\.0\.conv1\.weight", _resnet(tuple(f"{i}." for i in range(4, 8)), *_TORCH)),
    # not after "layers.0.", as in a Swin of version 2
    (r"(?<!layers\.0\.)blocks\.0\.attn\.qkv\.weight", _vit("blocks.", "patch_embed.proj.weight", "pos_embed")),
    (
        r"encoder\.layer\.0\.attention\.attention\.query\.weight",
        _vit("encoder.layer.", "embeddings.patch_embeddings.projection.weight", "embeddings.position_embeddings"),
    ),
)
# Nets that we have no backbone for.
_STRANGERS = (
    (r"(?:visual\.conv1\.weight|vision_model\.embeddings\..*|logit_scale)", "a CLIP"),
    (r"layers\.0\.blocks\.0\.attn\.(?:logit_scale|cpb_mlp.*)", "a Swin of version 2"),
    (r"encoder\.layers\.encoder_layer_0\..*", "a ViT"),
    (r"transformer\.decoder\.layers\.0\..*", "a transformer decoder (DETR, Query2Label) without its backbone"),
    (r"encoder\.layer\.0\.attention\.self\.query\.weight", "a BERT"),
    (r"stages\.0\.blocks\.0\.conv_dw\.weight", "a ConvNeXt"),
    (r"(?:downsample_layers|convnext)\..*", "a ConvNeXt"),
    (r"features\.denseblock1\..*", "a DenseNet"),
    (r"blocks\.0\.0\.conv_dw\.weight", "an EfficientNet or MobileNet"),
    (r"features\.1\.conv\.0\.0\.weight", "a MobileNetV2"),
    (r"Mixed_5b\..*", "an Inception"),
    (r"features\.0\.weight", "a VGG or AlexNet"),
)
