"""Swin against the authors' golden tensors, a plain loop over tokens, and hand-made weight files."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import weight_states
from mljax.backbones import _transformer, swin
from mljax.layers import DropPath
from mljax.trees import flatten
from toy import golden_file

GOLDEN = dict(width=8, depths=(2, 2, 2, 2), heads=(1, 2, 4, 8), window=4)
TINY = weight_states.SWIN
ALL = ("4", "8", "16", "32")


def initialised(net, size=64, seed=0):
    """Random parameters, also where the start is zero or one: (variables, images)."""
    image = jax.random.normal(jax.random.key(seed), (2, size, size, 3))
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), image, train=False))
    rng = np.random.default_rng(seed)
    draw = lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, shapes), image


def golden_weights(*files):
    found = {}
    for name in files:
        with np.load(golden_file(name)) as case:
            found |= {k.removeprefix("swin/"): case[k] for k in case.files if not k.startswith("cvt/")}
    return found, {k.removeprefix("w/"): v for k, v in found.items() if k.startswith("w/")}


def test_stages_equal_the_authors_code():
    """First image of the golden case, first two stages with their mergings, masks and biases (cut out to be small)."""
    case, state = golden_weights("q2l_swin_image.npz", "q2l_swin_stages.npz")
    net = swin.Swin(**GOLDEN, endpoints=("4", "8"))
    params = flatten(swin.convert(state)["params"])
    image = jnp.asarray(case["in/image"].transpose(0, 2, 3, 1))
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), image, train=False))["params"]
    rest = {k: np.zeros(v.shape, v.dtype) for k, v in flatten(shapes).items() if k not in params}
    assert all(k.startswith(("layer3", "layer4", "norm")) for k in rest)
    tree = traverse_util.unflatten_dict(params | rest, sep="/")
    apply = lambda x: net.apply(  # noqa: E731
        {"params": tree}, x, train=False, capture_intermediates=lambda module, _: module.name == "merge"
    )
    _, inside = jax.jit(apply)(image)
    for i in range(2):
        ours = inside["intermediates"][f"layer{i + 1}"]["merge"]["__call__"][0]
        expected = case[f"out/layer{i}_tokens"]
        np.testing.assert_allclose(ours.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)


def test_feature_map_equals_the_authors_code():
    case, state = golden_weights("q2l_backbones.npz")
    net = swin.Swin(**GOLDEN)
    image = jnp.asarray(case["in/image"].transpose(0, 2, 3, 1))
    out = jax.jit(lambda v, x: net.apply(v, x, train=False))(swin.convert(state), image)["32"]
    np.testing.assert_allclose(out, case["out/feature_map"].transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-5)


def attention_by_loops(x, p, heads, window, size, shift):
    """(h w d), already normalised: every token over the tokens of its window that come from the same part."""
    h, w, d = x.shape
    high, wide = -(-h // size) * size, -(-w // size) * size
    padded = np.zeros((high, wide, d))
    padded[:h, :w] = x
    q, k, v = np.split(padded @ p["qkv"]["kernel"] + p["qkv"]["bias"], 3, -1)
    out, e = np.zeros((h, w, d)), d // heads

    def where(i, length):  # place after the roll, its window, whether it came round from the other side
        at = (i - shift) % length
        return at % size, at // size, i < shift

    for i in range(h):
        for j in range(w):
            (y, wy, ry), (z, wz, rz) = where(i, high), where(j, wide)
            for head in range(heads):
                c = slice(head * e, (head + 1) * e)
                scores, values = [], []
                for a in range(high):
                    for b in range(wide):
                        (ya, wa, ra), (zb, wb, rb) = where(a, high), where(b, wide)
                        if (wy, wz, ry, rz) == (wa, wb, ra, rb):
                            row = (y - ya + window - 1) * (2 * window - 1) + z - zb + window - 1
                            scores.append(q[i, j, c] @ k[a, b, c] * e**-0.5 + p["bias_table"][row, head])
                            values.append(v[a, b, c])
                weights = np.exp(scores - np.max(scores))
                out[i, j, c] = weights @ np.array(values) / weights.sum()
    return out @ p["out"]["kernel"] + p["out"]["bias"]


@pytest.mark.parametrize(
    ("h", "w", "window", "shifted", "size", "shift"),
    [
        (8, 8, 4, True, 4, 2),
        (6, 10, 4, True, 4, 2),
        (7, 5, 3, True, 3, 1),
        (3, 8, 4, True, 3, 0),
        (2, 2, 4, False, 2, 0),
    ],
    ids=["shift", "pad", "odd", "short-side", "tiny"],
)
def test_block_equals_loops(h, w, window, shifted, size, shift):
    heads, d = 2, 6
    block = swin._Block(heads, window, shifted, 0.0, jnp.float32)
    x = np.random.default_rng(1).normal(size=(1, h, w, d)).astype(np.float32)
    shapes = jax.eval_shape(lambda: block.init(jax.random.key(0), jnp.asarray(x), False))
    rng = np.random.default_rng(2)
    p = jax.tree.map(lambda s: rng.normal(0, 0.5, s.shape).astype(np.float32), shapes)
    ours = block.apply(p, jnp.asarray(x), False)[0]
    p = p["params"]

    def norm(x, p):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]

    erf = np.vectorize(math.erf)
    y = x[0].astype(np.float64)
    y = y + attention_by_loops(norm(y, p["norm1"]), p["attention"], heads, window, size, shift)
    z = norm(y, p["norm2"]) @ p["mlp"]["fc1"]["kernel"] + p["mlp"]["fc1"]["bias"]
    z = z * (1 + erf(z / np.sqrt(2))) / 2
    expected = y + z @ p["mlp"]["fc2"]["kernel"] + p["mlp"]["fc2"]["bias"]
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_gradient_everywhere_but_at_key_biases():
    net = swin.Swin(**TINY)
    variables, image = initialised(net)
    grads = flatten(
        jax.jit(jax.grad(lambda v: jnp.sum(net.apply(v, image, train=True)["32"] ** 3)))(variables)["params"]
    )
    for path, grad in grads.items():
        if path.endswith("attention/qkv/bias"):
            q, k, v = np.split(np.abs(grad), 3)
            assert k.max() < 1e-4 * min(q.max(), v.max())
        else:
            assert np.abs(grad).max() > 0, path


@pytest.mark.parametrize("frozen", ["stem", "stem, layer1, layer2", "all"])
def test_frozen_stages_get_no_gradient(frozen):
    net = swin.Swin(**TINY, frozen=frozen, drop_path=0.5, endpoints=ALL)
    variables, image = initialised(net)

    def loss(v):
        out = net.apply(v, image, train=True, rngs={"dropout": jax.random.key(3)})
        return sum(jnp.sum(x**3) for x in out.values())

    grads = flatten(jax.jit(jax.grad(loss))(variables)["params"])
    for path, grad in grads.items():
        held = any(re.search(pattern, path) for pattern in net.frozen_parameters)
        assert (np.abs(grad).max() == 0) == held, path


def test_drop_path_drops_whole_images():
    x = jnp.ones((4000, 2, 2, 1))
    drop = DropPath(0.25)
    out = np.asarray(drop.apply({}, x, True, rngs={"dropout": jax.random.key(0)}))
    kept = out[:, 0, 0, 0] > 0
    np.testing.assert_allclose(out[kept], 4 / 3, rtol=1e-6)
    assert not out[~kept].any()
    assert abs(kept.mean() - 0.75) < 0.03
    np.testing.assert_array_equal(drop.apply({}, x, False), x)
    assert _transformer.rates(0.3, 4) == pytest.approx((0.0, 0.1, 0.2, 0.3))


# What torch.nn.functional.interpolate(mode="bicubic") makes of these tables (torch 2.13).
WIDER = [
    [-0.45772779, 0.38128054, 1.48000000, 1.74927998, 1.73427260],
    [1.20528138, -0.42361459, -1.73199892, 0.89513808, 3.31836987],
    [3.67199993, -0.36400008, -4.00000000, 1.00400198, 5.86400032],
    [5.30927992, 3.63113666, 2.37200189, 5.41774702, 8.17203331],
    [6.11827374, 6.87836933, 8.05600071, 8.99603462, 9.51149082],
]
NARROWER = [
    [1.14883494, 2.51851916, 2.43827057],
    [1.88888979, 4.00000000, 0.14814728],
    [1.08779156, 1.20370281, 3.15603542],
]


@pytest.mark.parametrize(
    ("table", "window", "expected"),
    [
        ([[0, 1, 2], [3, -4, 5], [6, 7, 9]], 3, WIDER),
        ([[0, 1, 4, 2, 2], [4, 1, 0, 1, 4], [2, 2, 4, 1, 0], [1, 4, 2, 2, 4], [1, 0, 1, 4, 2]], 2, NARROWER),
    ],
)
def test_adapt_interpolates_as_torch(table, window, expected):
    rows = np.repeat(np.array(table, np.float32).reshape(-1, 1), 2, 1) * np.array([1, -2], np.float32)
    state = {"params": {"layer1": {"block1": {"attention": {"bias_table": rows}}}}, "batch_stats": {}}
    new, notes = swin.adapt(state, swin.Swin(window=window))
    found = new["params"]["layer1"]["block1"]["attention"]["bias_table"]
    want = np.array(expected).reshape(-1, 1) * np.array([1, -2])
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)
    assert found.dtype == np.float32 and len(notes) == 1 and f"to {window}" in notes[0]
    assert state["params"]["layer1"]["block1"]["attention"]["bias_table"] is rows
