"""The same network, batch, precision and optimiser in PyTorch, to be timed beside ours; written for this only.

Names of parameters are those of torchvision and of Query2Label's authors, so that tests can give both sides the same
weights. On a GPU the model is compiled, on a CPU it runs eagerly; channels-last and autocast on both.
"""
# pyright: reportMissingImports=false

from collections.abc import Callable
from typing import Any

import numpy as np

from mljax.backbones import resnet
from mljax.bench_model import Model
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

SYSTEMS = ("baseline", "query2label")
LOSSES = ("bce", "asl")


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
    """Post-norm attention and feed-forward; the decoder's own attention is there if `attends`."""

    def __init__(self, d: int, heads: int, hidden: int, dropout: float, cross: bool, attends: bool):
        super().__init__()
        self.cross, self.drop = cross, nn.Dropout(dropout)
        if not cross or attends:
            self.self_attn, self.norm1 = nn.MultiheadAttention(d, heads, dropout, batch_first=True), nn.LayerNorm(d)
        if cross:
            self.multihead_attn = nn.MultiheadAttention(d, heads, dropout, batch_first=True)
            self.norm3 = nn.LayerNorm(d)
        self.linear1, self.linear2, self.norm2 = nn.Linear(d, hidden), nn.Linear(hidden, d), nn.LayerNorm(d)

    def forward(self, x: Any, query: Any, memory: Any = None, key: Any = None) -> Any:
        if hasattr(self, "self_attn"):
            own = x + query
            x = self.norm1(x + self.drop(self.self_attn(own, own, x, need_weights=False)[0]))
        if self.cross:
            x = self.norm2(x + self.drop(self.multihead_attn(x + query, key, memory, need_weights=False)[0]))
        y = self.drop(self.linear2(self.drop(F.relu(self.linear1(x)))))
        return (self.norm3 if self.cross else self.norm2)(x + y)


class GroupLinear(nn.Module):
    def __init__(self, labels: int, d: int):
        super().__init__()
        self.W = nn.Parameter(torch.empty(1, labels, d).uniform_(-(d**-0.5), d**-0.5))
        self.b = nn.Parameter(torch.zeros(1, labels))

    def forward(self, x: Any) -> Any:
        return (self.W * x).sum(-1) + self.b


class Query2Label(nn.Module):
    """Map (b c h w) -> logits (b l), settings as `mljax.systems.query2label`."""

    def __init__(self, channels: int, system: Any, side: tuple[int, int]):
        super().__init__()
        d, labels = system.width or channels, system.labels
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


class Pooled(nn.Module):
    """Map (b c h w) -> logits (b l): the baseline."""

    def __init__(self, channels: int, system: Any):
        super().__init__()
        self.pooling, self.drop = system.pooling, nn.Dropout(system.dropout)
        self.fc = nn.Linear(channels, system.labels)

    def forward(self, maps: Any) -> Any:
        average, largest = maps.mean((2, 3)), maps.amax((2, 3))
        pooled = {"average": average, "max": largest, "mean_of_both": (average + largest) / 2}[self.pooling]
        return self.fc(self.drop(pooled))


class Net(nn.Module):
    """Image (b 3 h w), or with cached features a map (b c h w) -> logits (b l)."""

    def __init__(self, backbone: Any, head: Any):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, x: Any) -> Any:
        return self.head(x if self.backbone is None else self.backbone(x))


def network(model: Model) -> Net:
    """The network of a config.

    Raises:
      UserError: it is none of those that are written here.
    """
    config, system = model.config, model.run.system
    if config.system.name not in SYSTEMS:
        raise UserError(
            f"--against=torch knows the systems {', '.join(SYSTEMS)} and not {config.system.name!r};"
            " leave it out, or compare one of these."
        )
    if config.loss.name not in LOSSES:
        raise UserError(
            f"--against=torch knows the losses {', '.join(LOSSES)} and not {config.loss.name!r};"
            " add --config.loss.name=bce."
        )
    shapes = model.shapes(1)
    backbone = None
    if model.cached:
        _, h, w, channels = list(shapes["endpoints"].values())[-1].shape
    else:
        made = resnet.NAMES.get(config.backbone.name)
        if made is None:
            raise UserError(
                f"--against=torch knows the backbones {', '.join(resnet.NAMES)} and not {config.backbone.name!r};"
                " add --config.backbone.name=resnet101."
            )
        backbone = ResNet(**made.keywords)
        channels, h = backbone.channels, -(-config.input.size // 32)
        w, own = h, model.run.system.backbone
        frozen = tuple(s.strip() for s in own.frozen.split(",") if s.strip())
        backbone.freeze(tuple(backbone.stages()) if frozen == ("all",) else frozen, own.norm)
    head = Query2Label(channels, system, (h, w)) if config.system.name == "query2label" else Pooled(channels, system)
    return Net(backbone, head)


def asl(
    logits: Any, labels: Any, *, gamma_neg: float = 4.0, gamma_pos: float = 1.0, clip: float = 0.05, eps: float = 1e-8
) -> Any:
    """The asymmetric loss as its authors compute it, (b l)."""
    p = torch.sigmoid(logits)
    no = (1 - p + clip).clamp(max=1)
    values = labels * torch.log(p.clamp(min=eps)) + (1 - labels) * torch.log(no.clamp(min=eps))
    if gamma_neg or gamma_pos:
        with torch.no_grad():
            hard = (1 - p * labels - no * (1 - labels)) ** (gamma_pos * labels + gamma_neg * (1 - labels))
        values = values * hard
    return -values


def loss_of(section: Any) -> Callable[[Any, Any], Any]:
    """config.loss -> (logits, labels) -> ()."""
    settings = {k: v for k, v in section.items() if k not in ("name", "reduction")}
    reduction = section.get("reduction", "mean")

    def loss(logits: Any, labels: Any) -> Any:
        logits = logits.float()
        if section.name == "bce":
            values = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        else:
            values = asl(logits, labels, **settings)
        return {"mean": values.mean, "sum": values.sum, "batch_mean": lambda: values.sum(1).mean()}[reduction]()

    return loss


def optimizer(section: Any, parameters: list[Any]) -> Any:
    """config.optim's rule; schedules cost nothing and are left out."""
    decay, name = section.get("weight_decay", 0.0), section.get("name", "adam")
    options: dict[str, Any] = {"lr": section.get("lr", 1e-4), "weight_decay": decay}
    if name == "sgd":
        momentum = section.get("momentum", 0.9)
        return torch.optim.SGD(parameters, **options, momentum=momentum, nesterov=section.get("nesterov", False))
    options |= {"eps": section.get("eps", 1e-8)}
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name](parameters, **options)


class Rival:
    """The network on torch's device with the same random batch: `train(steps)`, `infer(steps)`."""

    def __init__(self, model: Model, batch_size: int):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.config, self.half = model.config, model.config.dtype == "bfloat16"
        if self.device == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as XLA does
            torch.backends.cudnn.benchmark = True
        self.net = network(model).to(self.device, memory_format=torch.channels_last)
        self.parameters = [p for p in self.net.parameters() if p.requires_grad]
        self.run = torch.compile(self.net) if self.device == "cuda" else self.net
        self.optimizer, self.loss = optimizer(self.config.optim, self.parameters), loss_of(self.config.loss)
        self.ema = [p.detach().clone() for p in self.parameters] if self.config.ema else []
        batch = model.batch(batch_size)
        maps = list(batch["endpoints"].values())[-1] if model.cached else batch["image"]
        self.input = torch.from_numpy(np.ascontiguousarray(maps)).to(self.device)  # (b h w c)
        self.labels = torch.from_numpy(batch["labels"]).to(self.device)
        self.scale = torch.tensor([1 / (255 * s) for s in model.run.std], device=self.device).view(1, 3, 1, 1)
        self.shift = torch.tensor([-m / s for m, s in zip(model.run.mean, model.run.std)], device=self.device)
        self.shift = self.shift.view(1, 3, 1, 1)

    def size(self) -> int:
        """Parameters."""
        return sum(p.numel() for p in self.net.parameters())

    def _input(self) -> Any:
        x = self.input.permute(0, 3, 1, 2).float()  # channels-last in memory
        return x * self.scale + self.shift if self.input.dtype == torch.uint8 else x

    def _autocast(self) -> Any:
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.half)

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def train(self, steps: int) -> None:
        self.net.train()
        clip = self.config.optim.get("clip_norm")
        for _ in range(steps):
            with self._autocast():
                logits = self.run(self._input())
            self.optimizer.zero_grad(set_to_none=True)
            self.loss(logits, self.labels).backward()
            if clip:
                nn.utils.clip_grad_norm_(self.parameters, clip)
            self.optimizer.step()
            if self.ema:
                torch._foreach_lerp_(self.ema, [p.detach() for p in self.parameters], 1 - self.config.ema)
        self._wait()

    def infer(self, steps: int) -> None:
        self.net.eval()
        with torch.inference_mode(), self._autocast():
            for _ in range(steps):
                self.run(self._input())
        self._wait()

    def peak(self) -> int | None:
        """Bytes that CUDA's allocator reached; None on a CPU."""
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else None
