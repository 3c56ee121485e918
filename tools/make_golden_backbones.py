"""Makes tests/golden/backbone_*.npz, one per case: small torch nets with random weights, and what they compute.

Run by hand where torch is:  python tools/make_golden_backbones.py
Weights and images are float16 numbers, to be read as float32. Keys: w/<torch name>, in/image (b c h w),
out/<stride> (b c h w); case "basic" has also a training step: train/<stride>, train/stats/<name> and the gradients
train/grad/<name> of the sum of the squares of the last map.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
STRIDES = ("4", "8", "16", "32")
RESNETS = {
    "basic": dict(depths=(1, 2, 1, 1), bottleneck=False, width=4),
    "bottleneck": dict(depths=(2, 1, 1, 1), width=4),
    "resnext": dict(depths=(1, 1, 1, 1), width=4, groups=4, base_width=32),
}
TRESNETS = {
    "v1": dict(depths=(2, 1, 1, 1), width=4, bottlenecks=(False, False, True, True)),
    "v2": dict(depths=(1, 2, 1, 1), width=4, bottlenecks=(True, True, True, True)),
}
GRADIENTS = ("conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer2.0.downsample.0.weight", "layer4.0.bn2.bias")


def main() -> None:
    torch: Any = importlib.import_module("torch")
    sys.path.insert(0, str(ROOT / "tests" / "parity"))
    nets: Any = importlib.import_module("torch_backbones")

    def case(net: Any, size: tuple[int, int], seed: int) -> dict[str, Any]:
        net = nets.randomise(net, seed, grid=torch.float16).eval()
        image = torch.rand((2, 3, *size), generator=torch.Generator().manual_seed(seed + 1)).half()
        with torch.no_grad():
            out = net(image.float())
        weights = {k: v.half().numpy() for k, v in net.state_dict().items() if v.is_floating_point()}
        found = {"in/image": image.numpy()} | {f"w/{k}": v for k, v in weights.items()}
        return found | {f"out/{s}": y.numpy() for s, y in zip(STRIDES, out, strict=True)}

    for seed, (name, fields) in enumerate(RESNETS.items()):
        net = nets.ResNet(**fields)
        # odd sides on the way, so that the padding of every stride shows
        found = case(net, (38, 33), seed)
        if name == "basic":
            out = net.train()(torch.from_numpy(found["in/image"]).float())
            out[-1].square().sum().backward()
            found |= {f"train/{s}": y.detach().numpy() for s, y in zip(STRIDES, out, strict=True)}
            found |= {f"train/stats/{k}": v.numpy() for k, v in net.state_dict().items() if "running" in k}
            found |= {f"train/grad/{k}": net.get_parameter(k).grad.numpy() for k in GRADIENTS}
        np.savez_compressed(ROOT / f"tests/golden/backbone_{name}.npz", **found)

    for seed, (name, fields) in enumerate(TRESNETS.items()):
        found = case(nets.TResNet(**fields), (48, 40), seed)
        np.savez_compressed(ROOT / f"tests/golden/backbone_tresnet_{name}.npz", **found)


if __name__ == "__main__":
    main()
