"""The same network, batch, precision and optimiser in PyTorch, to be timed beside ours; written for this only.

On a GPU the model is compiled, on a CPU it runs eagerly; channels-last and autocast on both.
"""
# pyright: reportMissingImports=false

from collections.abc import Callable
from typing import Any

import numpy as np

from mljax.backbones import resnet, swin
from mljax.bench import torch_nets
from mljax.bench.model import Model
from mljax.errors import UserError

# isort: split
import torch
from torch import nn
from torch.nn import functional as F

HEADS = {"baseline": torch_nets.Pooled, "query2label": torch_nets.Query2Label, "cmsg": torch_nets.Cmsg}
LOSSES = ("bce", "asl")


def network(model: Model) -> Any:
    """The network of a config.

    Raises:
      UserError: it is none of those that are written here.
    """
    config, system = model.config, model.run.system
    for what, name, known, instead in (
        ("systems", config.system.name, HEADS, "leave it out, or compare one of these"),
        ("losses", config.loss.name, LOSSES, "add --config.loss.name=bce"),
    ):
        if name not in known:
            raise UserError(f"--against=torch knows the {what} {', '.join(known)} and not {name!r}; {instead}.")
    if model.cached:
        _, h, w, channels = list(model.shapes(1)["endpoints"].values())[-1].shape
        backbone = None
    else:
        backbone = _backbone(model)
        channels, h = backbone.channels, -(-config.input.size // 32)
        w = h
    return torch_nets.Net(backbone, HEADS[config.system.name](channels, system, (h, w)))


def _backbone(model: Model) -> Any:
    config, own = model.config, model.run.system.backbone
    name, size = config.backbone.name, config.input.size
    frozen = tuple(s.strip() for s in own.frozen.split(",") if s.strip())
    if name in swin.NAMES and not frozen:
        return torch_nets.Swin(size, **swin.NAMES[name].keywords, drop_path=own.drop_path)
    if name in resnet.NAMES:
        backbone = torch_nets.ResNet(**resnet.NAMES[name].keywords)
        backbone.freeze(tuple(backbone.stages()) if frozen == ("all",) else frozen, own.norm)
        return backbone
    known = (*resnet.NAMES, *swin.NAMES)
    state = f"{name!r} with frozen stages" if name in swin.NAMES else repr(name)
    raise UserError(
        f"--against=torch knows the backbones {', '.join(known)} and not {state}; add --config.backbone.name=resnet101."
    )


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
    """config.optim's rule, in one kernel on a GPU; schedules cost nothing and are left out."""
    decay, name = section.get("weight_decay", 0.0), section.get("name", "adam")
    options: dict[str, Any] = {"lr": section.get("lr", 1e-4), "weight_decay": decay}
    options["fused"] = parameters[0].device.type == "cuda"
    if name == "sgd":
        momentum = section.get("momentum", 0.9)
        return torch.optim.SGD(parameters, **options, momentum=momentum, nesterov=section.get("nesterov", False))
    options |= {"eps": section.get("eps", 1e-8)}
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name](parameters, **options)


def _device(model: Model) -> str:
    """PyTorch's name of the device that JAX uses; both must run on the same."""
    platform = model.devices[0].platform
    if len(model.devices) > 1:
        raise UserError("--against=torch compares one device; add --config.devices=1.")
    if model.config.optim.get("accumulate", 1) > 1 or model.config.input.views > 1:
        raise UserError("--against=torch knows neither config.optim.accumulate nor config.input.views; set both to 1.")
    if platform != "cpu" and not torch.cuda.is_available():
        raise UserError(
            f"JAX runs on {platform} here and PyTorch {torch.__version__} sees no GPU; install its CUDA build."
        )
    if platform == "cpu" and torch.cuda.is_available():
        raise UserError(
            "PyTorch sees a GPU here and JAX does not; install jax[cuda13], or set CUDA_VISIBLE_DEVICES=-1 to compare"
            " on the CPU."
        )
    return "cpu" if platform == "cpu" else "cuda"


class Rival:
    """The network on torch's device with the same random batch: `train(steps)`, `infer(steps)`."""

    def __init__(self, model: Model, batch_size: int):
        self.device = _device(model)
        self.version = torch.__version__
        self.config, self.half = model.config, model.config.dtype == "bfloat16"
        if self.device == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as XLA does
            torch.backends.cudnn.benchmark = True
        self.net = network(model).to(self.device, memory_format=torch.channels_last)
        self.parameters = [p for p in self.net.parameters() if p.requires_grad]
        self.run = torch.compile(self._forward) if self.device == "cuda" else self._forward
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

    def _forward(self, x: Any) -> Any:
        """(b h w c) -> (b l), normalised as our step does it."""
        photos, x = x.dtype == torch.uint8, x.permute(0, 3, 1, 2).float()  # channels-last in memory
        return self.net(x * self.scale + self.shift if photos else x)

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
                logits = self.run(self.input)
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
                self.run(self.input)
        self._wait()

    def forget_peak(self) -> None:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int | None:
        """Bytes that CUDA's allocator reached; None on a CPU."""
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else None
