"""What a weight file seems to be."""

import numpy as np
import pytest

from mljax.weights.identify import identify
from torch_writer import bare_resnet

RESNET18 = bare_resnet((2, 2, 2, 2), False)


def nothing(*shape):
    return np.zeros(shape, np.float32)


SWIN = {f"layers.2.blocks.{i}.mlp.fc1.weight": nothing(1) for i in range(18)}
CVT = {f"stage2.blocks.{i}.mlp.fc1.weight": nothing(1) for i in range(20)}
TABLE = "layers.0.blocks.0.attn.relative_position_bias_table"
PROJECTION = "stage0.blocks.0.attn.conv_proj_q.conv.weight"
TRESNET = {
    f"body.layer{i + 1}.{j}.conv1.0.weight": nothing(1) for i, n in enumerate((4, 5, 18, 3)) for j in range(n)
} | {"body.conv1.0.weight": nothing(76, 48, 3, 3)}


@pytest.mark.parametrize(
    ("state", "label", "arch", "prefix"),
    [
        (bare_resnet((2, 2, 2, 2), False), "a ResNet-18", "resnet18", ""),
        (bare_resnet((3, 4, 6, 3), True, 64), "a ResNet-50", "resnet50", ""),
        (bare_resnet((3, 4, 23, 3), True, 2), "a wide ResNet-101", None, ""),
        (TRESNET, "a TResNet-L", "tresnet_l", ""),
        ({**SWIN, TABLE: nothing(169, 6)}, "a Swin-L with window 7", "swin_large_224", ""),
        ({**SWIN, TABLE: nothing(529, 4)}, "a Swin-B with window 12", "swin_base_384", ""),
        ({**CVT, PROJECTION: nothing(192, 1, 3, 3)}, "a CvT-W24", "cvt_w24_384", ""),
        ({"conv_dw_1/depthwise_kernel": nothing(3, 3, 32, 1)}, "a Keras MobileNetV1", "mobilenet_v1", ""),
        ({"visual.conv1.weight": nothing(1)}, "a CLIP", None, ""),
        ({"blocks.0.attn.qkv.weight": nothing(1)}, "a ViT of 1 blocks", None, ""),
        ({"vit.encoder.layer.0.attention.attention.query.weight": nothing(1)}, "a ViT", None, "vit."),
        ({"x.y": nothing(1)}, "something unknown, with 1 arrays such as 'x.y'", None, ""),
    ],
)
def test_what_it_seems_to_be(state, label, arch, prefix):
    guess = identify(state)
    assert guess.label.startswith(label) and guess.prefix == prefix
    assert (guess.archs[0] if guess.archs else None) == arch


def test_query2label_checkpoints_are_identified():
    head = {"fc.W": nothing(1, 80, 8), "transformer.decoder.layers.0.linear1.weight": nothing(1)}
    guess = identify({**{f"backbone.0.body.{k}": v for k, v in RESNET18.items()}, **head})
    assert guess == ("a ResNet-18 inside a Query2Label checkpoint", "backbone.0.body.", ("resnet18",))
    guess = identify({**{f"backbone.0.body.{k}": v for k, v in TRESNET.items()}, **head})
    assert guess == ("a TResNet-L inside a Query2Label checkpoint", "backbone.0.body.", ("tresnet_l",))


def test_sequential_resnet_is_identified():
    order = {"conv1": "0", "bn1": "1"} | {f"layer{i}": str(i + 3) for i in range(1, 5)}
    state = {f"features.{order[k.split('.')[0]]}.{k.split('.', 1)[1]}": v for k, v in RESNET18.items() if k[:2] != "fc"}
    assert identify(state) == ("a ResNet-18 under the prefix 'features.'", "features.", ("resnet18",))
