"""Plain torch nets with torchvision's and with TResNet's parameter names, written for comparison only.

Of the papers' tables and of the names in the checkpoints; every forward returns the maps of all stages.
"""

import torch
from torch import nn
from torch.nn import functional as F


def conv(c, d, size, stride=1, groups=1):
    return nn.Conv2d(c, d, size, stride, size // 2, groups=groups, bias=False)


class ResidualBlock(nn.Module):
    def __init__(self, c, inner, d, stride, groups, bottleneck):
        super().__init__()
        self.bottleneck = bottleneck
        self.conv1 = conv(c, inner, 1) if bottleneck else conv(c, d, 3, stride)
        self.bn1 = nn.BatchNorm2d(self.conv1.out_channels)
        self.conv2 = conv(inner, inner, 3, stride, groups) if bottleneck else conv(d, d, 3)
        self.bn2 = nn.BatchNorm2d(self.conv2.out_channels)
        if bottleneck:
            self.conv3 = conv(inner, d, 1)
            self.bn3 = nn.BatchNorm2d(d)
        self.downsample = None
        if stride != 1 or c != d:
            self.downsample = nn.Sequential(conv(c, d, 1, stride), nn.BatchNorm2d(d))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.bottleneck:
            y = self.bn3(self.conv3(F.relu(y)))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    def __init__(self, depths, bottleneck=True, width=64, groups=1, base_width=64):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        c = width
        for i, depth in enumerate(depths):
            d = width * 2**i
            inner = d * base_width // 64 * groups
            d = 4 * d if bottleneck else d
            blocks = []
            for j in range(depth):
                blocks.append(ResidualBlock(c, inner, d, 2 if i and not j else 1, groups, bottleneck))
                c = d
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        maps = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            maps.append(x)
        return maps


class InPlaceNorm(nn.Module):
    """Batch norm with the gain |weight| + 1e-5, in evaluation mode, then leaky ReLU (slope 1: none)."""

    def __init__(self, d, slope):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(d)), nn.Parameter(torch.zeros(d))
        self.register_buffer("running_mean", torch.zeros(d))
        self.register_buffer("running_var", torch.ones(d))
        self.slope = slope

    def forward(self, x):
        gain = self.weight.abs() + 1e-5
        x = F.batch_norm(x, self.running_mean, self.running_var, gain, self.bias, False, 0.0, 1e-5)
        return F.leaky_relu(x, self.slope)


def conv_norm(c, d, size, slope=1e-3):
    return nn.Sequential(conv(c, d, size), InPlaceNorm(d, slope))


class Blur(nn.Module):
    def forward(self, x):
        row = torch.tensor([1.0, 2.0, 1.0], dtype=x.dtype) / 4
        kernel = (row[:, None] * row[None]).expand(x.shape[1], 1, 3, 3)
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), kernel, stride=2, groups=x.shape[1])


class SqueezeExcite(nn.Module):
    def __init__(self, c, d):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(c, d, 1), nn.Conv2d(d, c, 1)

    def forward(self, x):
        gate = F.relu(self.fc1(x.mean((2, 3), keepdim=True)))
        return x * torch.sigmoid(self.fc2(gate))


class TBlock(nn.Module):
    def __init__(self, c, inner, stride, squeeze, bottleneck):
        super().__init__()
        d = inner * 4 if bottleneck else inner
        self.bottleneck, self.downsample = bottleneck, None
        strided = conv_norm(inner if bottleneck else c, inner, 3)
        strided = nn.Sequential(strided, Blur()) if stride == 2 else strided
        if bottleneck:
            self.conv1, self.conv2 = conv_norm(c, inner, 1), strided
            self.conv3 = conv_norm(inner, d, 1, slope=1.0)
        else:
            self.conv1, self.conv2 = strided, conv_norm(inner, inner, 3, slope=1.0)
        self.se = SqueezeExcite(inner, max(d // (8 if bottleneck else 4), 64)) if squeeze else nn.Identity()
        if stride == 2 or c != d:
            pool = [nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)] if stride == 2 else []
            self.downsample = nn.Sequential(*pool, conv_norm(c, d, 1, slope=1.0))

    def forward(self, x):
        y = self.se(self.conv2(self.conv1(x)))
        y = self.conv3(y) if self.bottleneck else y
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class TResNet(nn.Module):
    def __init__(self, depths, width, bottlenecks):
        super().__init__()
        self.body = nn.Module()
        self.body.conv1 = conv_norm(48, width, 3, slope=1e-2)
        c = width
        for i, depth in enumerate(depths):
            blocks = []
            for j in range(depth):
                inner = width * 2**i
                blocks.append(TBlock(c, inner, 2 if i and not j else 1, i < 3, bottlenecks[i]))
                c = inner * 4 if bottlenecks[i] else inner
            setattr(self.body, f"layer{i + 1}", nn.Sequential(*blocks))

    def forward(self, x):
        b, c, h, w = x.shape
        x = x.view(b, c, h // 4, 4, w // 4, 4).permute(0, 3, 5, 1, 2, 4).reshape(b, 16 * c, h // 4, w // 4)
        x = self.body.conv1(x)
        maps = []
        for i in range(4):
            x = getattr(self.body, f"layer{i + 1}")(x)
            maps.append(x)
        return maps


def randomise(net, seed, grid=None):
    """Weights of a usable size, negative gains among them; on a grid of float16 numbers if asked for."""
    generator = torch.Generator().manual_seed(seed)
    for name, x in net.state_dict().items():
        if not x.is_floating_point():
            continue
        noise = torch.randn(x.shape, generator=generator)
        if name.endswith("running_var"):
            value = noise.abs() * 0.5 + 0.5
        elif x.ndim == 4:
            value = noise * (2.0 / (x.shape[1] * x.shape[2] * x.shape[3])) ** 0.5
        else:
            value = noise * 0.3 + (0.8 if name.endswith("weight") else 0.0)
        x.copy_(value.to(grid).to(x.dtype) if grid else value)
    return net
