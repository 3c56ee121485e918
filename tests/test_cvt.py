"""CvT against the authors' golden tensors and hand-made weight files."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from conftest import golden_file
from mljax import build
from mljax.backbones import _transformer, cvt
from mljax.errors import UserError

# Trainable parameters without the classifier: those of transformers' CvtModel as configured so, and the final norm.
PARAMETERS = {
    "cvt_13_224": 19_612_480,
    "cvt_13_384": 19_612_480,
    "cvt_21_224": 31_237_696,
    "cvt_21_384": 31_237_696,
    "cvt_w24_384": 276_171_392,
}
TINY = dict(widths=(8, 12, 16), depths=(1, 1, 2), heads=(1, 3, 4))
ALL = ("4", "8", "16")


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def initialised(net, size=32, seed=0, batch=4):
    """Random parameters, also where the start is zero or one: (variables, images)."""
    image = jax.random.normal(jax.random.key(seed), (batch, size, size, 3))
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), image, train=False))
    rng = np.random.default_rng(seed)
    draw = lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32)  # noqa: E731
    variables = jax.tree.map(draw, shapes)
    stats = flat(variables["batch_stats"])
    stats = {k: jnp.abs(v) + 0.5 if k.endswith("var") else v for k, v in stats.items()}
    return variables | {"batch_stats": traverse_util.unflatten_dict(stats, sep="/")}, image


@pytest.mark.parametrize("name", cvt.NAMES)
def test_parameters_and_shapes(name):
    net, size = cvt.NAMES[name](endpoints=ALL), int(name.split("_")[-1])
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    out, variables = jax.eval_shape(lambda x: net.init_with_output(jax.random.key(0), x, train=False), image)
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == PARAMETERS[name]
    for stride, width in zip(ALL, (192, 768, 1024) if "w24" in name else (64, 192, 384)):
        assert out[stride].shape == (1, size // int(stride), size // int(stride), width)


def test_every_name_is_counted():
    assert set(PARAMETERS) == set(cvt.NAMES)


@pytest.mark.parametrize("files", [("q2l_cvt_a.npz", "q2l_cvt_b.npz"), ("q2l_backbones.npz",)], ids=["cut", "whole"])
def test_equals_the_authors_code(files):
    """The cut files hold the first image of the whole case."""
    case = {}
    for name in files:
        with np.load(golden_file(name)) as arrays:
            case |= {k.removeprefix("cvt/"): arrays[k] for k in arrays.files if not k.startswith("swin/")}
    variables = cvt.convert({k.removeprefix("w/"): v for k, v in case.items() if k.startswith("w/")})
    net = cvt.CvT(widths=(12, 24, 32), depths=(1, 2, 2), heads=(1, 3, 4), endpoints=ALL)
    image = jnp.asarray(case["in/image"].transpose(0, 2, 3, 1))
    out = jax.jit(lambda v, x: net.apply(v, x, train=False))(variables, image)
    for stride, name in zip(ALL, ("stage0", "stage1", "feature_map")):
        expected = case[f"out/{name}"].transpose(0, 2, 3, 1)
        np.testing.assert_allclose(out[stride], expected, rtol=1e-4, atol=1e-5)


def test_attention_equals_loops():
    """Scale by the full width, class token past the convolutions, strided keys and values, batch statistics."""
    (h, w), d, heads = (3, 4), 6, 2
    net = cvt._Attention(heads, "batch", None, jnp.float32)
    tokens = np.random.default_rng(0).normal(size=(2, 1 + h * w, d)).astype(np.float32)
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.asarray(tokens), (h, w), True))
    rng = np.random.default_rng(1)
    variables = jax.tree.map(lambda s: rng.normal(0, 0.6, s.shape).astype(np.float32), shapes)
    ours, _ = net.apply(variables, jnp.asarray(tokens), (h, w), True, mutable=["batch_stats"])
    p = variables["params"]

    def project(name, stride):
        image = np.pad(tokens[:, 1:].reshape(2, h, w, d), ((0, 0), (1, 1), (1, 1), (0, 0)))
        kernel = p[f"{name}_conv"]["kernel"][:, :, 0]
        y = np.array(
            [
                [
                    [(x[i : i + 3, j : j + 3] * kernel).sum((0, 1)) for j in range(0, w, stride)]
                    for i in range(0, h, stride)
                ]
                for x in image
            ]
        )
        bn = p[f"{name}_bn"]
        y = (y - y.mean((0, 1, 2))) / np.sqrt(y.var((0, 1, 2)) + 1e-5) * bn["scale"] + bn["bias"]
        y = np.concatenate([tokens[:, :1], y.reshape(2, -1, d)], 1)
        return y @ p[name]["kernel"] + p[name]["bias"]

    q, k, v = project("q", 1), project("k", 2), project("v", 2)
    assert q.shape[1] == 13 and k.shape[1] == 1 + 2 * 2
    out = np.zeros((2, 13, d))
    for b in range(2):
        for head in range(heads):
            c = slice(head * 3, head * 3 + 3)
            scores = np.exp(q[b, :, c] @ k[b, :, c].T / np.sqrt(d))
            out[b, :, c] = scores / scores.sum(-1, keepdims=True) @ v[b, :, c]
    expected = out @ p["out"]["kernel"] + p["out"]["bias"]
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_activations():
    x = jnp.array([-2.0, 0.0, 0.5, 3.0])
    np.testing.assert_allclose(_transformer.quick_gelu(x), [-0.06434137, 0.0, 0.35038843, 2.98192869], rtol=1e-5)
    np.testing.assert_allclose(_transformer.gelu(x), [-0.04550026, 0.0, 0.34573123, 2.99595030], rtol=1e-5)
    assert cvt.CvT().activation == "quick_gelu"


def test_gradient_everywhere_but_at_what_keys_share():
    net = cvt.CvT(**TINY)
    variables, image = initialised(net)

    def loss(params):
        out, _ = net.apply({**variables, "params": params}, image, train=True, mutable=["batch_stats"])
        return jnp.sum(out["16"] ** 3)

    grads = flat(jax.jit(jax.grad(loss))(variables["params"]))
    for path, grad in grads.items():
        beside = grads[path.replace("/k/", "/q/").replace("/k_bn/", "/q_bn/")]
        if path.endswith("attention/k/bias") or re.search(r"layer[12]/.*k_bn/bias", path):
            assert np.abs(grad).max() < 1e-3 * np.abs(beside).max(), path
        else:
            assert np.abs(grad).max() > 1e-3 * np.abs(beside).max() > 0, path


@pytest.mark.parametrize(("frozen", "norm"), [("stem", "batch"), ("stem,layer1,layer2", "batch"), ("", "frozen")])
def test_frozen_stages_get_no_gradient_and_keep_their_statistics(frozen, norm):
    net = cvt.CvT(**TINY, frozen=frozen, norm=norm, endpoints=ALL)
    variables, image = initialised(net)

    def loss(params):
        out, new = net.apply({**variables, "params": params}, image, train=True, mutable=["batch_stats"])
        return sum(jnp.sum(x**3) for x in out.values()), new["batch_stats"]

    grads, stats = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    for path, grad in flat(grads).items():
        held = any(re.search(pattern, path) for pattern in net.frozen_parameters)
        assert (np.abs(grad).max() == 0) == held, path
    old = flat(variables["batch_stats"])
    for path, value in flat(stats).items():
        keeps = norm == "frozen" or path.split("/")[0] in frozen
        assert np.array_equal(value, old[path]) == keeps, path


def test_two_devices_share_the_statistics():
    whole, half = cvt.CvT(**TINY), cvt.CvT(**TINY, axis="data")
    variables, image = initialised(whole)
    expected, stats = jax.jit(lambda x: whole.apply(variables, x, train=True, mutable=["batch_stats"]))(image)
    step = lambda x: half.apply(variables, x, train=True, mutable=["batch_stats"])  # noqa: E731
    out, new = jax.pmap(step, axis_name="data")(image.reshape(2, 2, *image.shape[1:]))
    np.testing.assert_allclose(out["16"].reshape(expected["16"].shape), expected["16"], rtol=1e-3, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-4, atol=1e-5), new, stats)


def test_remat_and_drop_path_have_the_same_gradient_under_the_same_key():
    def gradient(remat):
        net = cvt.CvT(**TINY, remat=remat, drop_path=0.5)
        variables, image = initialised(net)

        def loss(params):
            out, _ = net.apply(
                {**variables, "params": params},
                image,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(1)},
            )
            return jnp.sum(out["16"] ** 3)

        return jax.jit(jax.grad(loss))(variables["params"])

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-2), gradient(True), gradient(False))


def test_bfloat16_is_close_and_keeps_float32_variables():
    full, half = (cvt.CvT(**TINY, dtype=dtype, endpoints=ALL) for dtype in (jnp.float32, jnp.bfloat16))
    variables, image = initialised(full)
    made = jax.eval_shape(lambda: half.init(jax.random.key(0), image, train=False))
    assert {x.dtype for x in jax.tree.leaves(made)} == {jnp.dtype(jnp.float32)}
    expected, out = (jax.jit(lambda v, net=net: net.apply(v, image, train=False))(variables) for net in (full, half))
    for stride in ALL:
        assert out[stride].dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(out[stride], np.float32) - expected[stride])
        assert error < 0.03 * np.linalg.norm(expected[stride])


def official_state(seed=0):
    """Names and shapes as in the authors' files, for TINY."""
    rng, state = np.random.default_rng(seed), {}

    def pair(name, *shape):
        state[f"{name}.weight"] = rng.normal(size=shape).astype(np.float32)
        state[f"{name}.bias"] = rng.normal(size=shape[:1]).astype(np.float32)

    below = 3
    for i, (d, depth) in enumerate(zip(TINY["widths"], TINY["depths"])):
        pair(f"stage{i}.patch_embed.proj", d, below, *((7, 7) if i == 0 else (3, 3)))
        pair(f"stage{i}.patch_embed.norm", d)
        for j in range(depth):
            b = f"stage{i}.blocks.{j}"
            for part in "qkv":
                conv = f"{b}.attn.conv_proj_{part}"
                state[f"{conv}.conv.weight"] = rng.normal(size=(d, 1, 3, 3)).astype(np.float32)
                pair(f"{conv}.bn", d)
                state[f"{conv}.bn.running_mean"] = rng.normal(size=d).astype(np.float32)
                state[f"{conv}.bn.running_var"] = rng.uniform(size=d).astype(np.float32)
                state[f"{conv}.bn.num_batches_tracked"] = np.array(7)
                pair(f"{b}.attn.proj_{part}", d, d)
            for name, shape in (("norm1", (d,)), ("attn.proj", (d, d)), ("norm2", (d,))):
                pair(f"{b}.{name}", *shape)
            pair(f"{b}.mlp.fc1", 4 * d, d)
            pair(f"{b}.mlp.fc2", d, 4 * d)
        below = d
    state["stage2.cls_token"] = rng.normal(size=(1, 1, below)).astype(np.float32)
    pair("norm", below)
    pair("head", 5, below)
    return state


def as_transformers(state):
    words, new = {"q": "query", "k": "key", "v": "value"}, {}
    for name, value in state.items():
        name = re.sub(r"stage(\d)\.", r"cvt.encoder.stages.\1.", name)
        name = name.replace("patch_embed.proj", "embedding.convolution_embeddings.projection")
        name = name.replace("patch_embed.norm", "embedding.convolution_embeddings.normalization")
        name = name.replace(".blocks.", ".layers.")
        for part, word in words.items():
            inner = f".attention.attention.convolution_projection_{word}.convolution_projection."
            name = name.replace(f".attn.conv_proj_{part}.conv.", f"{inner}convolution.")
            name = name.replace(f".attn.conv_proj_{part}.bn.", f"{inner}normalization.")
            name = name.replace(f".attn.proj_{part}.", f".attention.attention.projection_{word}.")
        name = name.replace(".attn.proj.", ".attention.output.dense.")
        name = name.replace(".norm1.", ".layernorm_before.").replace(".norm2.", ".layernorm_after.")
        name = name.replace(".mlp.fc1.", ".intermediate.dense.").replace(".mlp.fc2.", ".output.dense.")
        new[re.sub("^norm", "layernorm", re.sub("^head", "classifier", name))] = value
    return new


def as_query2label(state):
    new = {f"backbone.0.{k}": v for k, v in state.items() if not k.startswith("head.")}
    return new | {"backbone.1.pe": np.zeros((1, 16, 2, 2)), "fc.W": np.zeros((1, 5, 16))}


def test_convert_places_every_tensor():
    net, state = cvt.CvT(**TINY), official_state()
    made = cvt.convert(state)
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False))
    assert jax.tree.map(np.shape, made) == jax.tree.map(lambda x: x.shape, dict(shapes))
    params, stats = flat(made["params"]), flat(made["batch_stats"])
    np.testing.assert_array_equal(
        params["layer3/block2/attention/k_conv/kernel"][0, 2, 0],
        state["stage2.blocks.1.attn.conv_proj_k.conv.weight"][:, 0, 0, 2],
    )
    np.testing.assert_array_equal(
        stats["layer1/block1/attention/v_bn/var"], state["stage0.blocks.0.attn.conv_proj_v.bn.running_var"]
    )
    np.testing.assert_array_equal(params["layer3/cls_token"], state["stage2.cls_token"])
    adapted, notes = cvt.adapt(made, net)
    assert adapted == made and notes == ()


@pytest.mark.parametrize("rename", [as_transformers, as_query2label])
def test_convert_reads_every_dialect(rename):
    state = official_state()
    expected, found = flat(cvt.convert(state)), flat(cvt.convert(rename(state)))
    assert expected.keys() == found.keys()
    for path in expected:
        np.testing.assert_array_equal(found[path], expected[path], err_msg=path)


@pytest.mark.parametrize("name", ["layers.0.blocks.0.norm1.weight", "stage0.pos_embed", "stage0.cls_token"])
def test_convert_refuses_other_files(name):
    with pytest.raises(UserError, match=re.escape(name)):
        cvt.convert({name: np.zeros(4)})


@pytest.mark.parametrize(
    ("settings", "shape", "words"),
    [
        ({}, (1, 40, 32, 3), "multiples of 16.*40x32"),
        ({"endpoints": ("32",)}, (1, 32, 32, 3), "32"),
        ({"frozen": "layer4"}, (1, 32, 32, 3), "layer3"),
        ({"norm": "none"}, (1, 32, 32, 3), "norm"),
        ({"activation": "quick-gelu"}, (1, 32, 32, 3), "did you mean 'quick_gelu'"),
        ({"drop_path": -0.1}, (1, 32, 32, 3), "drop_path"),
    ],
)
def test_what_a_user_can_get_wrong(settings, shape, words):
    net = cvt.CvT(**TINY, **settings)
    with pytest.raises(UserError, match=words):
        jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros(shape), train=False))


def test_records_and_keywords():
    wanted = {"arch", "hub", "file", "sha256", "licence", "paper", "size", "mean", "std", "note"}
    for name, record in cvt.RECORDS.items():
        assert set(record) == wanted and name.startswith(record["arch"]) and record["arch"] in cvt.NAMES
    common = {"frozen", "norm", "dtype", "axis", "endpoints", "remat", "drop_path", "activation"}
    assert all(common <= set(build.keywords(constructor)) for constructor in cvt.NAMES.values())
