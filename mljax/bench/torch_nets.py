"""Networks in PyTorch that the benchmark times ours against: written for this, Swin from transformers.

Names of parameters are those of torchvision and of Query2Label's authors, so that tests can give both sides the same
weights.
"""
# pyright: reportMissingImports=false

from typing import Any

import numpy as np

from mljax.errors import UserError
from mljax.layers import sine_position

try:
    import torch
    from torch import nn
    from torch.nn import functional as F
except ImportError:
    raise UserError(
        "--against=torch needs PyTorch, which is not installed here; install it with: pip install torch"
        " (make parity sets up an environment that has both)."
    ) from None


class Block(nn.Module):
    """A residual block of torchvision's layout."""

    def __init__(self, c: int, inner: int, d: int, stride: int, groups: int, bottleneck: bool):
        super().__init__()
        self.bottleneck = bottleneck

        def conv(a: int, b: int, size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
            return nn.Conv2d(a, b, size, stride, size // 2, groups=groups, bias=False)

        self.conv1 = conv(c, inner, 1) if bottleneck else conv(c, d, 3, stride)
        self.bn1 = nn.BatchNorm2d(self.conv1.out_channels)
        self.conv2 = conv(inner, inner, 3, stride, groups) if bottleneck else conv(d, d, 3)
        self.bn2 = nn.BatchNorm2d(self.conv2.out_channels)
        if bottleneck:
            self.conv3, self.bn3 = conv(inner, d, 1), nn.BatchNorm2d(d)
        self.downsample = None
        if stride != 1 or c != d:
            self.downsample = nn.Sequential(conv(c, d, 1, stride), nn.BatchNorm2d(d))

    def forward(self, x: Any) -> Any:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        if self.bottleneck:
            y = self.bn3(self.conv3(F.relu(y, inplace=True)))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)), inplace=True)


class ResNet(nn.Module):
    """Image (b 3 h w) -> the map of layer4; `frozen` stages and a frozen `norm` as in `mljax.backbones.resnet`."""

    def __init__(self, *, depths: Any, bottleneck: bool = True, groups: int = 1, base_width: int = 64, width: int = 64):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        c, self.frozen, self.norm = width, (), "batch"
        for i, depth in enumerate(depths):
            d = width * 2**i
            inner, d = d * base_width // 64 * groups, 4 * d if bottleneck else d
            blocks = []
            for j in range(depth):
                blocks.append(Block(c, inner, d, 2 if i and not j else 1, groups, bottleneck))
                c = d
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.channels = c

    def forward(self, x: Any) -> Any:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x)), inplace=True), 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def stages(self) -> dict[str, list[Any]]:
        return {"stem": [self.conv1, self.bn1], **{f"layer{i}": [getattr(self, f"layer{i}")] for i in range(1, 5)}}

    def freeze(self, frozen: tuple[str, ...], norm: str) -> None:
        self.frozen, self.norm = frozen, norm
        for stage, parts in self.stages().items():
            for part in parts:
                if stage in frozen:
                    part.requires_grad_(False)
                for module in part.modules():
                    if norm == "frozen" and isinstance(module, nn.BatchNorm2d):
                        module.requires_grad_(False)

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        for stage, parts in self.stages().items():
            for module in (m for part in parts for m in part.modules()):
                if isinstance(module, nn.BatchNorm2d) and (stage in self.frozen or self.norm == "frozen"):
                    module.eval()
        return self


class Layer(nn.Module):
    """Post-norm attention and feed-forward.

    Self-attention if not `cross`; a layer that attends to a memory has self-attention before it if it `attends`.
    """

    def __init__(
        self, d: int, heads: int, hidden: int, dropout: float, cross: bool, attends: bool, activation: str = "relu"
    ):
        super().__init__()
        self.cross, self.drop, self.activation = cross, nn.Dropout(dropout), getattr(F, activation)
        if not cross or attends:
            self.self_attn, self.norm1 = nn.MultiheadAttention(d, heads, dropout, batch_first=True), nn.LayerNorm(d)
        if cross:
            self.multihead_attn = nn.MultiheadAttention(d, heads, dropout, batch_first=True)
            self.norm3 = nn.LayerNorm(d)
        self.linear1, self.linear2, self.norm2 = nn.Linear(d, hidden), nn.Linear(hidden, d), nn.LayerNorm(d)

    def forward(self, x: Any, query: Any = 0, memory: Any = None, key: Any = None, bias: Any = None) -> Any:
        """x (b q d), query: positions of x, memory (b n d), key: memory with positions, bias (q q) of the scores."""
        if hasattr(self, "self_attn"):
            own = x + query
            x = self.norm1(x + self.drop(self.self_attn(own, own, x, attn_mask=bias, need_weights=False)[0]))
        if self.cross:
            x = self.norm2(x + self.drop(self.multihead_attn(x + query, key, memory, need_weights=False)[0]))
        y = self.drop(self.linear2(self.drop(self.activation(self.linear1(x)))))
        return (self.norm3 if self.cross else self.norm2)(x + y)


class GroupLinear(nn.Module):
    def __init__(self, labels: int, d: int):
        super().__init__()
        self.W = nn.Parameter(torch.empty(1, labels, d).uniform_(-(d**-0.5), d**-0.5))
        self.b = nn.Parameter(torch.zeros(1, labels))

    def forward(self, x: Any) -> Any:
        return (self.W * x).sum(-1) + self.b


class Query2Label(nn.Module):
    """Map (b c h w) -> logits (b l), settings as `mljax.systems.query2label.Query2Label`."""

    def __init__(self, channels: int, system: Any, side: tuple[int, int]):
        super().__init__()
        d, labels = system.width or channels, system.meta.num_labels
        sizes = (d, system.heads, system.ffn or 4 * d, system.dropout)
        from mljax.systems.query2label import attends

        if system.width is not None:
            self.input_proj = nn.Conv2d(channels, d, 1)
        position = np.asarray(sine_position(*side, d)).reshape(1, -1, d)
        self.register_buffer("position", torch.from_numpy(position.astype(np.float32)), persistent=False)
        self.query_embed = nn.Embedding(labels, d)
        self.transformer = nn.Module()
        encoder, decoder = nn.Module(), nn.Module()
        encoder.layers = nn.ModuleList(Layer(*sizes, False, True) for _ in range(system.encoder_layers))
        kinds = [attends(system.self_attention, i) for i in range(system.decoder_layers)]
        decoder.layers, decoder.norm = nn.ModuleList(Layer(*sizes, True, kind) for kind in kinds), nn.LayerNorm(d)
        self.transformer.encoder, self.transformer.decoder = encoder, decoder
        self.fc = GroupLinear(labels, d)

    def forward(self, maps: Any) -> Any:
        memory = self.input_proj(maps) if hasattr(self, "input_proj") else maps
        memory = memory.flatten(2).transpose(1, 2)
        for layer in self.transformer.encoder.layers:
            memory = layer(memory, self.position)
        query = self.query_embed.weight[None]
        x, key = torch.zeros_like(query).expand(len(memory), -1, -1), memory + self.position
        for layer in self.transformer.decoder.layers:
            x = layer(x, query, memory, key)
        return self.fc(self.transformer.decoder.norm(x))


class Cmsg(nn.Module):
    """Map (b c h w) -> logits (b l), settings as `mljax.systems.cmsg`."""

    def __init__(self, channels: int, system: Any, side: tuple[int, int]):
        super().__init__()
        d, self.normalise = system.width, system.normalise
        if system.features != "activation" or system.mode not in ("add", "none"):
            raise UserError(
                "--against=torch knows CMSG with config.system.features='activation' and mode='add' or 'none'."
            )
        self.score, self.transform = nn.Linear(channels, system.meta.num_labels, bias=False), nn.Linear(channels, d)
        bias = torch.from_numpy(np.array(system.matrix(), np.float32)) if system.guided else None
        self.register_buffer("bias", bias)
        sizes = (system.ffn, system.dropout)
        self.sga = nn.ModuleList(
            Layer(d, system.sga_heads, *sizes, False, True, system.activation) for _ in range(system.sga_layers)
        )
        self.saa = nn.ModuleList(
            Layer(d, system.saa_heads, *sizes, True, False, system.activation) for _ in range(system.saa_layers)
        )
        self.memory = nn.Linear(channels, d) if system.saa_layers else None
        position = torch.from_numpy(np.array(sine_position(*side, d), np.float32)) if system.position else None
        self.register_buffer("position", position, persistent=False)
        self.fc = GroupLinear(system.meta.num_labels, d)

    def forward(self, maps: Any) -> Any:
        x = maps.flatten(2).transpose(1, 2)
        features = torch.sigmoid(self.score(x)).transpose(1, 2) @ self.transform(x)
        features = features / x.shape[1] if self.normalise else features
        for layer in self.sga:
            features = layer(features, bias=None if self.bias is None else self.bias.to(features.dtype))
        if self.memory is not None:
            memory = self.memory(x)
            key = memory if self.position is None else memory + self.position
            for layer in self.saa:
                features = layer(features, 0, memory, key)
        return self.fc(features)


class Pooled(nn.Module):
    """Map (b c h w) -> logits (b l): the baseline."""

    def __init__(self, channels: int, system: Any, side: tuple[int, int]):
        super().__init__()
        del side
        self.pooling, self.drop = system.pooling, nn.Dropout(system.dropout)
        self.fc = nn.Linear(channels, system.meta.num_labels)

    def forward(self, maps: Any) -> Any:
        average, largest = maps.mean((2, 3)), maps.amax((2, 3))
        pooled = {"average": average, "max": largest, "mean_of_both": (average + largest) / 2}[self.pooling]
        return self.fc(self.drop(pooled))


class Swin(nn.Module):
    """Image (b 3 h w) -> the map after the last norm, (b c h w), of transformers, with PyTorch's fused attention."""

    def __init__(self, size: int, *, width: int, depths: Any, heads: Any, window: int, drop_path: float):
        super().__init__()
        try:
            import transformers
        except ImportError:
            raise UserError(
                "--against=torch needs transformers for Swin; install it with: pip install transformers."
            ) from None
        config = transformers.SwinConfig(
            image_size=size, embed_dim=width, depths=list(depths), num_heads=list(heads), window_size=window,
            drop_path_rate=drop_path, attn_implementation="sdpa",
        )  # fmt: skip
        self.net, self.side = transformers.SwinModel(config, add_pooling_layer=False), size // 32
        self.channels = 8 * width

    def forward(self, x: Any) -> Any:
        return self.net(x).last_hidden_state.transpose(1, 2).unflatten(2, (self.side, self.side))


class Net(nn.Module):
    """Image (b 3 h w), or with cached features a map (b c h w) -> logits (b l)."""

    def __init__(self, backbone: Any, head: Any):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, x: Any) -> Any:
        return self.head(x if self.backbone is None else self.backbone(x))
