"""ResNet, ResNeXt, TResNet and MobileNetV1 beside torch and transformers with the same weights, at real widths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mljax.backbones import mobilenet, resnet, tresnet

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
nets = pytest.importorskip("torch_backbones")
pytestmark = pytest.mark.parity

ALL = ("4", "8", "16", "32")


def images(*shape, seed=0):
    x = np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)
    return jnp.asarray(x), torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


def state(net):
    return {k: v.detach().numpy().copy() for k, v in net.state_dict().items()}


def close(ours, theirs, error=1e-4):
    """Relative to the largest value of the tensor."""
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else theirs
    ours = np.asarray(ours)
    ours = ours.transpose(0, 3, 1, 2) if ours.ndim == 4 else ours
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < error * np.abs(theirs).max()


def run(net, variables, image):
    return jax.jit(lambda v, x: net.apply(v, x, train=False))(variables, image)


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_transformers_resnet(kind):
    widths = [64, 128, 256, 512] if kind == "basic" else [256, 512, 1024, 2048]
    config = transformers.ResNetConfig(
        embedding_size=64, hidden_sizes=widths, depths=[2, 1, 2, 1], layer_type=kind, downsample_in_bottleneck=False
    )
    with torch.no_grad():
        model = nets.randomise(transformers.ResNetModel(config), 0).eval()
    ours, theirs = images(2, 75, 64, 3)
    with torch.no_grad():
        wanted = model(theirs, output_hidden_states=True).hidden_states[1:]
    net = resnet.ResNet(endpoints=ALL, depths=(2, 1, 2, 1), bottleneck=kind == "bottleneck")
    maps = run(net, resnet.convert(state(model)), ours)
    for stride, theirs in zip(ALL, wanted, strict=True):
        close(maps[stride], theirs)
    classifier = transformers.ResNetForImageClassification(config)
    named = resnet.convert(state(classifier))
    assert jax.tree.structure(named) == jax.tree.structure(resnet.convert(state(model)))


@pytest.mark.parametrize("name, fields", [
    ("resnet50", dict(depths=(3, 4, 6, 3))),
    ("resnet34", dict(depths=(3, 4, 6, 3), bottleneck=False)),
    ("resnext50_32x4d", dict(depths=(3, 4, 6, 3), groups=32, base_width=4)),
])  # fmt: skip
def test_whole_nets(name, fields):
    with torch.no_grad():
        model = nets.randomise(nets.ResNet(**fields), 1).eval()
    ours, theirs = images(2, 96, 65, 3)
    maps = run(resnet.NAMES[name](endpoints=ALL), resnet.convert(state(model)), ours)
    with torch.no_grad():
        for stride, wanted in zip(ALL, model(theirs), strict=True):
            close(maps[stride], wanted)


def test_training_step_of_a_resnext():
    """In float32 on both sides: maps, running statistics and every gradient."""
    fields = dict(depths=(1, 1, 1, 1), groups=32, base_width=4)
    with torch.no_grad():
        model = nets.randomise(nets.ResNet(**fields), 2).train()
    before = state(model)
    ours, theirs = images(4, 64, 64, 3)
    out = model(theirs)[-1]
    out.square().mean().backward()
    variables = resnet.convert(before)
    net = resnet.ResNet(**fields)

    def loss(params):
        maps, new = net.apply(variables | {"params": params}, ours, train=True, mutable=["batch_stats"])
        return jnp.mean(jnp.square(maps["32"])), (maps, new)

    gradients, (maps, new) = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    close(maps["32"], out)
    wanted = resnet.convert(state(model))["batch_stats"]
    jax.tree.map(lambda a, b: close(a, b), new["batch_stats"], wanted)
    found = {k: p.grad.numpy() for k, p in model.named_parameters()}
    wanted = resnet.convert(before | found)["params"]
    jax.tree.map(lambda a, b: close(a, b.transpose(0, 3, 1, 2) if b.ndim == 4 else b, 5e-3), gradients, wanted)


@pytest.mark.parametrize("bottlenecks", [(False, False, True, True), (True,) * 4])
def test_tresnet(bottlenecks):
    fields = dict(depths=(2, 2, 1, 1), width=64, bottlenecks=bottlenecks)
    with torch.no_grad():
        model = nets.randomise(nets.TResNet(**fields), 3).eval()
    ours, theirs = images(2, 80, 72, 3)
    maps = run(tresnet.TResNet(endpoints=ALL, **fields), tresnet.convert(state(model)), ours)
    with torch.no_grad():
        for stride, wanted in zip(ALL, model(theirs), strict=True):
            close(maps[stride], wanted)


@pytest.mark.parametrize("size", [(224, 224), (161, 130)])
def test_mobilenet_with_real_weights(real_data, size):
    weights = dict(np.load(real_data / "weights" / "mobilenet_v1_imagenet_to_conv_pw_12.npz"))
    ours, x = images(2, *size, 3)
    net = mobilenet.MobileNetV1(endpoints=("conv_pw_3", "conv_pw_10", "32"))
    maps = run(net, mobilenet.convert(weights), ours)
    for layer in ("conv1", *(f"conv_{kind}_{i}" for i in range(1, 13) for kind in ("dw", "pw"))):
        depthwise = "_dw_" in layer
        kernel = torch.from_numpy(weights[f"{layer}/{'depthwise_kernel' if depthwise else 'kernel'}"])
        kernel = kernel.permute(2, 3, 0, 1) if depthwise else kernel.permute(3, 2, 0, 1)
        stride = 2 if layer in ("conv1", "conv_dw_2", "conv_dw_4", "conv_dw_6", "conv_dw_12") else 1
        pads = []
        for n in x.shape[:1:-1]:  # as TensorFlow's SAME; torch.nn.functional.pad starts with the last axis
            missing = max((-(-n // stride) - 1) * stride + kernel.shape[-1] - n, 0)
            pads += [missing // 2, missing - missing // 2]
        x = torch.nn.functional.pad(x, pads)
        x = torch.nn.functional.conv2d(x, kernel, stride=stride, groups=x.shape[1] if depthwise else 1)
        gamma, beta, mean, var = (
            torch.from_numpy(weights[f"{layer}_bn/{k}"]) for k in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        x = torch.nn.functional.batch_norm(x, mean, var, gamma, beta, False, 0.0, 1e-3).clamp(0, 6)
        if layer in maps:
            close(maps[layer], x)
    close(maps["32"], x)
