"""Backbones: exact sizes, torch's golden maps and statistics, plain numpy convolutions, freezing, conversion."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import toy
import weight_states
from mljax import build
from mljax.backbones import mobilenet, resnet, tresnet
from mljax.errors import UserError
from mljax.trees import flatten
from plain_convolution import conv_loops
from toy import golden_file

# Trainable parameters without classifiers. ResNets and ResNeXts: torchvision's published totals less 1000 classes;
# TResNets: the shapes in the official state dicts;
# mobilenet_v1: Keras's total without its top, less block 13; small: by hand; the others as in their own tests.
COUNTS = {
    "mobilenet_v1": 3_206_976 - 1_061_888,
    "resnet18": 11_689_512 - 513_000,
    "resnet34": 21_797_672 - 513_000,
    "resnet50": 25_557_032 - 2_049_000,
    "resnet101": 44_549_160 - 2_049_000,
    "resnet152": 60_192_808 - 2_049_000,
    "resnext50_32x4d": 25_028_904 - 2_049_000,
    "resnext101_32x8d": 88_791_336 - 2_049_000,
    "resnext101_32x16d": 194_026_792 - 2_049_000,
    "tresnet_m": 29_340_032,
    "tresnet_l": 53_556_256,
    "tresnet_xl": 75_779_244,
    "tresnet_l_v2": 44_125_824,
    "tresnet_xl_v2": 67_251_712,
    "small": 696 + 32_544 + 129_600 + 384_960,
    "swin_tiny_224": 27_519_354,
    "swin_small_224": 48_837_258,
    "swin_base_224": 86_743_224,
    "swin_base_384": 86_878_584,
    "swin_large_224": 194_995_476,
    "swin_large_384": 195_198_516,
    "cvt_13_224": 19_612_480,
    "cvt_13_384": 19_612_480,
    "cvt_21_224": 31_237_696,
    "cvt_21_384": 31_237_696,
    "cvt_w24_384": 276_171_392,
    "vit_base_16_224": 85_798_656,
    "vit_base_16_384": 86_090_496,
    "vit_large_16_224": 303_301_632,
    "vit_large_16_384": 303_690_752,
}
ALL = ("4", "8", "16", "32")
WIDTHS = {
    "resnet18": (64, 128, 256, 512),
    "resnet34": (64, 128, 256, 512),
    "tresnet_m": (64, 128, 1024, 2048),
    "tresnet_l": (76, 152, 1216, 2432),
    "tresnet_xl": (83, 166, 1328, 2656),
    "mobilenet_v1": (128, 256, 512, 1024),
}
GOLDEN = {
    "basic": (resnet, resnet.ResNet(endpoints=ALL, depths=(1, 2, 1, 1), bottleneck=False, width=4)),
    "bottleneck": (resnet, resnet.ResNet(endpoints=ALL, depths=(2, 1, 1, 1), width=4)),
    "resnext": (resnet, resnet.ResNet(endpoints=ALL, depths=(1,) * 4, width=4, groups=4, base_width=32)),
    "tresnet_v1": (tresnet, tresnet.TResNet(endpoints=ALL, depths=(2, 1, 1, 1), width=4)),
    "tresnet_v2": (tresnet, tresnet.TResNet(endpoints=ALL, depths=(1, 2, 1, 1), width=4, bottlenecks=(True,) * 4)),
}
TINY = {
    "resnet": resnet.ResNet(depths=(1,) * 4, width=4),
    "tresnet": tresnet.TResNet(depths=(1,) * 4, width=4, zero_gain=False),
    "mobilenet": mobilenet.MobileNetV1(width=0.125, last="conv_pw_4", endpoints=("8",)),
}


def to_nhwc(x):
    return np.asarray(x, np.float32).transpose(0, 2, 3, 1)


def golden(name):
    """(arrays, torch weights by name in float32, image (b h w c))."""
    arrays = dict(np.load(golden_file(f"backbone_{name}.npz")))
    weights = {k[2:]: v.astype(np.float32) for k, v in arrays.items() if k.startswith("w/")}
    return arrays, weights, to_nhwc(arrays["in/image"])


def drawn(net, seed=0, size=32, batch=3, channels=3):
    """Random parameters and statistics, so that nothing is zero or one by its start: (variables, images)."""
    rng = np.random.default_rng(seed)
    image = jnp.asarray(rng.uniform(-1, 1, (batch, size, size, channels)), jnp.float32)
    shapes = flatten(jax.eval_shape(lambda: net.init(jax.random.key(0), image, train=False)))

    def draw(path, shape):
        if path.endswith("kernel"):
            return rng.normal(0, (2 / np.prod(shape[:-1])) ** 0.5, shape)
        return rng.uniform(0.5, 1.5, shape) if path.endswith(("var", "scale")) else rng.normal(0, 0.2, shape)

    variables = {k: jnp.asarray(draw(k, v.shape), jnp.float32) for k, v in shapes.items()}
    return traverse_util.unflatten_dict(variables, sep="/"), image


def run(net, variables, image):
    """The maps in evaluation mode."""
    return jax.jit(lambda v, x: net.apply(v, x, train=False))(variables, image)


# Sizes


def test_no_backbone_is_missing_from_the_table():
    assert set(COUNTS) == set(build.names("backbones"))


OWN = [name for name in COUNTS if not name.startswith(("swin", "vit", "cvt"))]


@pytest.mark.parametrize("name", toy.slow_but(OWN, ["resnet50", "resnet101", "tresnet_l", "mobilenet_v1", "small"]))
def test_parameter_count_and_shapes(name):
    """Those of Swin, ViT and CvT: tests/test_transformers.py."""
    own = name != "small"
    net = build.build("backbones", {"name": name}, **({"endpoints": ALL} if own else {}))
    size = 224 if own else 64
    image = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    maps, variables = jax.eval_shape(lambda x: net.init_with_output(jax.random.key(0), x, train=True), image)
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == COUNTS[name]
    if own:
        widths = WIDTHS.get(name, (256, 512, 1024, 2048))
        assert {k: v.shape for k, v in maps.items()} == {
            s: (2, 224 // int(s), 224 // int(s), width) for s, width in zip(ALL, widths)
        }
        assert variables.keys() == {"params", "batch_stats"}
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(variables))


# Torch's maps


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_maps(name):
    module, net = GOLDEN[name]
    arrays, weights, image = golden(name)
    maps = run(net, module.convert(weights), image)
    assert maps.keys() == set(ALL)
    for stride in ALL:
        np.testing.assert_allclose(maps[stride], to_nhwc(arrays[f"out/{stride}"]), rtol=1e-4, atol=1e-5)


def test_golden_training_step():
    arrays, weights, image = golden("basic")
    net, variables = GOLDEN["basic"][1], resnet.convert(weights)

    def loss(params):
        maps, new = net.apply(variables | {"params": params}, image, train=True, mutable=["batch_stats"])
        return jnp.sum(jnp.square(maps["32"])), (maps, new)

    gradients, (maps, new) = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    for stride in ALL:
        np.testing.assert_allclose(maps[stride], to_nhwc(arrays[f"train/{stride}"]), rtol=1e-3, atol=1e-4)
    stats = {k.removeprefix("train/stats/"): v for k, v in arrays.items() if k.startswith("train/stats/")}
    wanted = flatten(resnet.convert(weights | stats)["batch_stats"])
    for path, value in flatten(new["batch_stats"]).items():
        np.testing.assert_allclose(value, wanted[path], rtol=1e-4, atol=1e-5, err_msg=path)
    grads = {k.removeprefix("train/grad/"): v for k, v in arrays.items() if k.startswith("train/grad/")}
    wanted, found = flatten(resnet.convert(weights | grads)["params"]), flatten(gradients)
    for path in ("stem/conv/kernel", "stem/bn/scale", "layer1_0/conv1/kernel", "layer2_0/downsample_conv/kernel"):
        size = np.abs(wanted[path]).max()
        np.testing.assert_allclose(found[path] / size, wanted[path] / size, atol=1e-3, err_msg=path)


def test_authors_tresnet():
    case = np.load(golden_file("tresnet.npz"))
    image = to_nhwc(case["in/image"])
    squares = tresnet.space_to_depth(image)
    np.testing.assert_array_equal(squares, to_nhwc(case["out/space_to_depth"]))
    np.testing.assert_allclose(tresnet.blur_pool(image), to_nhwc(case["out/blur_pool"]), rtol=1e-5, atol=1e-6)
    weights = {k[5:]: v for k, v in case.items() if k.startswith("v1/w/")}
    net = tresnet.TResNet(endpoints=ALL, depths=(2, 1, 1, 1), width=8)
    maps = run(net, tresnet.convert(weights), image)
    for i, stride in enumerate(ALL):
        np.testing.assert_allclose(maps[stride], to_nhwc(case[f"v1/out/layer{i + 1}"]), rtol=1e-4, atol=1e-5)


def keras_forward(weights, image, last):
    """MobileNetV1 with plain loops in float64 -> {layer: map}."""
    maps, x = {}, np.asarray(image, np.float64)
    layers = ["conv1", *(f"conv_{kind}_{i}" for i in range(1, 14) for kind in ("dw", "pw"))]
    for layer in layers[: layers.index(last) + 1]:
        depthwise = "_dw_" in layer
        kernel = weights[f"{layer}/{'depthwise_kernel' if depthwise else 'kernel'}"]
        stride = 2 if layer in ("conv1", "conv_dw_2", "conv_dw_4", "conv_dw_6", "conv_dw_12") else 1
        missing = [max((-(-n // stride) - 1) * stride + kernel.shape[0] - n, 0) for n in x.shape[1:3]]
        pads = [(m // 2, m - m // 2) for m in missing]
        kernel = kernel.reshape(3, 3, 1, -1) if depthwise else kernel
        x = conv_loops(x, kernel, stride, x.shape[-1] if depthwise else 1, pads)
        gamma, beta, mean, var = (
            weights[f"{layer}_bn/{k}"] for k in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        x = maps[layer] = np.clip((x - mean) / np.sqrt(var + 1e-3) * gamma + beta, 0, 6)
    return maps


def test_mobilenet_with_real_weights(real_data):
    weights = dict(np.load(real_data / "weights" / "mobilenet_v1_imagenet_to_conv_pw_12.npz"))
    image = np.random.default_rng(0).uniform(-1, 1, (1, 71, 64, 3)).astype(np.float32)
    wanted = keras_forward(weights, image, "conv_pw_12")
    net = mobilenet.MobileNetV1(endpoints=("conv_pw_10", "8", "32", "conv_dw_1"))
    maps = run(net, mobilenet.convert(weights), image)
    for endpoint, layer in (("conv_pw_10",) * 2, ("8", "conv_pw_5"), ("32", "conv_pw_12"), ("conv_dw_1",) * 2):
        np.testing.assert_allclose(maps[endpoint], wanted[layer], rtol=1e-4, atol=1e-4)


def test_mobilenet_with_random_weights_and_any_width():
    net = mobilenet.MobileNetV1(endpoints=("2", "conv_pw_3"), last="conv_pw_3", width=0.25)
    variables, image = drawn(net, size=17)
    found, weights = flatten(variables), {}
    for layer in ("conv1", *(f"conv_{kind}_{i}" for i in (1, 2, 3) for kind in ("dw", "pw"))):
        kernel = np.asarray(found[f"params/{layer}/conv/kernel"])
        weights |= (
            {f"{layer}/depthwise_kernel": kernel.transpose(0, 1, 3, 2)}
            if "_dw_" in layer
            else {f"{layer}/kernel": kernel}
        )
        names = {"gamma": "params/{}/bn/scale", "beta": "params/{}/bn/bias"}
        names |= {"moving_mean": "batch_stats/{}/bn/mean", "moving_variance": "batch_stats/{}/bn/var"}
        weights |= {f"{layer}_bn/{k}": np.asarray(found[v.format(layer)]) for k, v in names.items()}
    maps = run(net, variables, image)
    wanted = keras_forward(weights, image, "conv_pw_3")
    np.testing.assert_allclose(maps["2"], wanted["conv_pw_1"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(maps["conv_pw_3"], wanted["conv_pw_3"], rtol=1e-4, atol=1e-4)
    assert maps["conv_pw_3"].shape == (3, 5, 5, 32)
    # and back: what is in Keras's names is read as it was; also as Keras writes them
    again = {f"{k.split('/')[0]}/{k}:0": v for k, v in weights.items()}
    for tree in (mobilenet.convert(weights), mobilenet.convert(again)):
        jax.tree.map(np.testing.assert_array_equal, tree, jax.tree.map(np.asarray, dict(variables)))


# Freezing, endpoints, forms


def gradients_and_stats(net, variables, image):
    def loss(params):
        maps, new = net.apply(variables | {"params": params}, image, train=True, mutable=["batch_stats"])
        return sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in maps.values()), new

    gradients, new = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    return flatten(gradients), flatten(new["batch_stats"])


@pytest.mark.parametrize("name, frozen, norm", [
    ("resnet", "", "batch"), ("resnet", "stem", "batch"), ("resnet", "layer1, stem", "batch"),
    ("resnet", "all", "batch"), ("resnet", "stem", "frozen"), ("tresnet", "layer1, stem", "batch"),
    ("tresnet", "", "frozen"), ("mobilenet", "layer1, stem", "batch"), ("mobilenet", "", "frozen"),
])  # fmt: skip
def test_frozen_parameters_have_no_gradient_and_all_others_one(name, frozen, norm):
    net = TINY[name].clone(frozen=frozen, norm=norm)
    variables, image = drawn(net, size=64)
    gradients, new = gradients_and_stats(net, variables, image)
    patterns = [re.compile(p) for p in net.frozen_parameters]
    for path, gradient in gradients.items():
        still = any(p.search(path) for p in patterns)
        assert (np.abs(gradient).max() == 0) == still, path
    stages = {"": (), "stem": ("stem",), "layer1, stem": ("stem", "layer1")}
    for path, value in flatten(variables["batch_stats"]).items():
        stage = path.split("/")[0].split("_")[0]
        if name == "mobilenet":
            block = int(re.search(r"\d+", path)[0])
            stage = next(k for k, blocks in mobilenet.STAGES.items() if block in blocks)
        kept = norm == "frozen" or frozen == "all" or stage in stages[frozen]
        assert np.array_equal(new[path], value) == kept, path


@pytest.mark.parametrize("name", TINY)
def test_remat_and_bfloat16_compute_the_same(name):
    net = TINY[name]
    variables, image = drawn(net, size=64)
    plain, stats = gradients_and_stats(net, variables, image)
    again, stats_again = gradients_and_stats(net.clone(remat=True), variables, image)
    for a, b in ((plain, again), (stats, stats_again)):
        for path, value in a.items():
            np.testing.assert_allclose(b[path], value, rtol=1e-3, atol=1e-3 * np.abs(value).max(), err_msg=path)
    (exact,) = run(net, variables, image).values()
    (half,) = run(net.clone(dtype=jnp.bfloat16), variables, image).values()
    assert half.dtype == jnp.bfloat16
    assert np.abs(half.astype(np.float32) - exact).max() < 0.06 * np.abs(exact).max()


def test_endpoints_are_keyed_by_what_was_asked_for_and_do_not_change_parameters():
    net = TINY["resnet"]
    variables, image = drawn(net)
    every = run(net.clone(endpoints=ALL), variables, image)
    one = run(net.clone(endpoints=("16",)), variables, image)
    assert list(one) == ["16"]
    np.testing.assert_allclose(one["16"], every["16"], rtol=1e-6)
    image = jnp.zeros((1, 32, 32, 5))
    net = net.clone(in_channels=5)
    params = jax.eval_shape(lambda: net.init(jax.random.key(0), image, train=False))["params"]
    assert params["stem"]["conv"]["kernel"].shape[2] == 5


def test_zero_gain_makes_every_block_the_identity_at_first():
    net = resnet.ResNet(depths=(2, 1, 1, 1), width=4, zero_gain=True, endpoints=("4",))
    image = jnp.asarray(np.random.default_rng(0).normal(size=(1, 16, 16, 3)), jnp.float32)
    params = toy.init(net, image, train=False)["params"]
    assert all(not params[f"layer1_{j}"]["bn3"]["scale"].any() for j in (0, 1))
    assert params["layer1_0"]["downsample_bn"]["scale"].all()


# Conversion


@pytest.mark.parametrize("name", ["basic", "bottleneck"])
@pytest.mark.parametrize("rename", [weight_states.sequential_names, weight_states.transformers_names])
def test_resnet_names_of_every_family_mean_the_same(name, rename):
    _, weights, _ = golden(name)
    wanted = resnet.convert(weights)
    prefixed = {"backbone.0.body." + k: v for k, v in rename(weights).items()}
    found = resnet.convert(prefixed | {"head.weight": np.zeros(3)}, prefix="backbone.0.body.")
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert flatten(found["params"]).keys() == flatten(wanted["params"]).keys()
    extra = {"fc.weight": np.zeros((3, 4)), "bn1.num_batches_tracked": np.zeros(())}
    jax.tree.map(
        np.testing.assert_array_equal,
        resnet.convert({f"module.{k}": v for k, v in (weights | extra).items()}),
        wanted,
    )


@pytest.mark.parametrize("name", ["tresnet_v1", "tresnet_v2"])
def test_timms_tresnet_names_and_plain_gains(name):
    _, weights, _ = golden(name)
    assert any((v < 0).any() for k, v in weights.items() if v.ndim == 1 and k.endswith("weight"))
    renamed = weight_states.timm_names(weights)
    assert "body.layer2.0.downsample.1.bn.weight" in renamed
    jax.tree.map(np.testing.assert_array_equal, tresnet.convert(renamed), tresnet.convert(weights))


@pytest.mark.parametrize("change, message", [
    ({"layer1.0.conv7.weightx": np.zeros(1)}, "'layer1.0.conv7.weightx' is not a weight of a ResNet"),
    ({"layer2.0.bn1.running_var": None}, "lack 'layer2_0/bn1/var'"),
    ({"layer2.0.conv1.weight": None}, "lack 'layer2_0/conv1/kernel'"),
    ({k: None for k in ("bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var")}, "lack 'stem/bn/scale'"),
])  # fmt: skip
def test_broken_files_are_named(change, message):
    _, weights, _ = golden("basic")
    weights = {k: v for k, v in (weights | change).items() if v is not None}
    with pytest.raises(UserError, match=re.escape(message)):
        resnet.convert(weights)


def test_other_broken_files():
    _, weights, _ = golden("basic")
    with pytest.raises(UserError, match=r"No weight of a ResNet has the prefix 'net\.'"):
        resnet.convert(weights, prefix="net.")
    with pytest.raises(UserError, match="is not a weight of a TResNet"):
        tresnet.convert(weights)
    with pytest.raises(UserError, match="'block/kernel' is not a weight of a Keras MobileNetV1"):
        mobilenet.convert({"block/kernel": np.zeros((1, 1, 2, 2))})
    parts = ("gamma", "beta", "moving_mean", "moving_variance")
    layer = {"conv_pw_2/kernel": np.zeros((1, 1, 2, 2))} | {f"conv_pw_2_bn/{p}": np.zeros(2) for p in parts}
    with pytest.raises(UserError, match="lack the layer 'conv1'"):
        mobilenet.convert(layer)
    with pytest.raises(UserError, match="lack 'conv_pw_2/bn/var'"):
        mobilenet.convert({k: v for k, v in layer.items() if "variance" not in k})


# Errors and records


def shapes(net, size=(32, 32)):
    image = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    return jax.eval_shape(lambda x: net.init(jax.random.key(0), x, train=False), image)


@pytest.mark.parametrize("fields, message", [
    ({"endpoints": ("64",)}, "no endpoint '64'"),
    ({"frozen": "layer9"}, "no stage 'layer9'"),
    ({"frozen": "layer2"}, "as in 'stem,layer1,layer2'"),
    ({"norm": "group"}, "norm is 'group'"),
    ({"in_channels": 1}, "expected (b, h, w, 1)"),
])  # fmt: skip
@pytest.mark.parametrize("name", TINY)
def test_wrong_settings_are_named(name, fields, message):
    with pytest.raises(UserError, match=re.escape(message)):
        shapes(TINY[name].clone(**fields))


def test_wrong_images_and_layers_are_named():
    with pytest.raises(UserError, match="an image of 30 x 32; make both sides multiples of 4"):
        shapes(TINY["tresnet"], size=(30, 32))
    with pytest.raises(UserError, match=r"no layer 'conv_pw_14' \(did you mean 'conv_pw_"):
        shapes(TINY["mobilenet"].clone(last="conv_pw_14"))
    with pytest.raises(UserError, match="no endpoint '32'"):
        shapes(TINY["mobilenet"].clone(last="conv_pw_11", endpoints=("32",)))


@pytest.mark.parametrize("module", [mobilenet, resnet, tresnet])
def test_records_are_complete(module):
    keys = {"arch", "hub", "file", "sha256", "licence", "paper", "size", "mean", "std", "note"}
    for name, record in module.RECORDS.items():
        assert record.keys() == keys
        assert record["arch"] in module.NAMES and name.startswith(record["arch"])
        assert record["sha256"] is None or re.fullmatch("[0-9a-f]{64}", record["sha256"])
        assert len(record["mean"]) == len(record["std"]) == 3 and record["licence"] and record["note"]
