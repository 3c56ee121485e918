"""CvT against the authors' golden tensors and hand-made weight files."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import weight_states
from mljax.backbones import _transformer, cvt
from mljax.trees import flatten
from toy import golden_file

TINY = weight_states.CVT
ALL = ("4", "8", "16")


def initialised(net, size=32, seed=0, batch=4):
    """Random parameters, also where the start is zero or one: (variables, images)."""
    image = jax.random.normal(jax.random.key(seed), (batch, size, size, 3))
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), image, train=False))
    rng = np.random.default_rng(seed)
    draw = lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32)  # noqa: E731
    variables = jax.tree.map(draw, shapes)
    stats = flatten(variables["batch_stats"])
    stats = {k: jnp.abs(v) + 0.5 if k.endswith("var") else v for k, v in stats.items()}
    return variables | {"batch_stats": traverse_util.unflatten_dict(stats, sep="/")}, image


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

    grads = flatten(jax.jit(jax.grad(loss))(variables["params"]))
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
    for path, grad in flatten(grads).items():
        held = any(re.search(pattern, path) for pattern in net.frozen_parameters)
        assert (np.abs(grad).max() == 0) == held, path
    old = flatten(variables["batch_stats"])
    for path, value in flatten(stats).items():
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
