"""Swin against the authors' golden tensors, a plain loop over tokens, and hand-made weight files."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from conftest import golden_file
from mljax import build
from mljax.backbones import _transformer, swin
from mljax.errors import UserError

# Trainable parameters without the classifier: those of transformers' SwinModel with the same configuration.
PARAMETERS = {
    "swin_tiny_224": 27_519_354,
    "swin_small_224": 48_837_258,
    "swin_base_224": 86_743_224,
    "swin_base_384": 86_878_584,
    "swin_large_224": 194_995_476,
    "swin_large_384": 195_198_516,
}
GOLDEN = dict(width=8, depths=(2, 2, 2, 2), heads=(1, 2, 4, 8), window=4)
TINY = dict(width=8, depths=(1, 2, 1, 1), heads=(1, 2, 2, 4), window=2)
ALL = ("4", "8", "16", "32")


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def initialised(net, size=64, seed=0):
    """Random parameters, also where the start is zero or one: (variables, images)."""
    image = jax.random.normal(jax.random.key(seed), (2, size, size, 3))
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), image, train=False))
    rng = np.random.default_rng(seed)
    draw = lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, shapes), image


@pytest.mark.parametrize("name", swin.NAMES)
def test_parameters_and_shapes(name):
    net, size = swin.NAMES[name](endpoints=ALL), int(name.split("_")[-1])
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    out, variables = jax.eval_shape(lambda x: net.init_with_output(jax.random.key(0), x, train=False), image)
    assert sum(x.size for x in jax.tree.leaves(variables)) == PARAMETERS[name]
    width = {"tiny": 96, "small": 96, "base": 128, "large": 192}[name.split("_")[1]]
    for i, stride in enumerate(ALL):
        side = size // int(stride)
        assert out[stride].shape == (1, side, side, width * 2**i)


def test_every_name_is_counted():
    assert set(PARAMETERS) == set(swin.NAMES)


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
    params = flat(swin.convert(state)["params"])
    image = jnp.asarray(case["in/image"].transpose(0, 2, 3, 1))
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), image, train=False))["params"]
    rest = {k: np.zeros(v.shape, v.dtype) for k, v in flat(shapes).items() if k not in params}
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
    grads = flat(jax.jit(jax.grad(lambda v: jnp.sum(net.apply(v, image, train=True)["32"] ** 3)))(variables)["params"])
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

    grads = flat(jax.jit(jax.grad(loss))(variables)["params"])
    for path, grad in grads.items():
        held = any(re.search(pattern, path) for pattern in net.frozen_parameters)
        assert (np.abs(grad).max() == 0) == held, path


def test_frozen_stages_do_not_drop():
    """What a feature cache keeps is what training sees."""
    net = swin.Swin(**TINY, frozen="all", drop_path=0.9, endpoints=ALL)
    variables, image = initialised(net)
    train = net.apply(variables, image, train=True)  # no rng is asked for
    for stride, out in net.apply(variables, image, train=False).items():
        np.testing.assert_array_equal(train[stride], out)


def test_remat_has_the_same_gradient():
    def gradient(remat):
        net = swin.Swin(**TINY, remat=remat)
        variables, image = initialised(net)
        return jax.jit(jax.grad(lambda v: jnp.sum(net.apply(v, image, train=True)["32"] ** 3)))(variables)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-2), gradient(True), gradient(False))


def test_bfloat16_is_close_and_keeps_float32_parameters():
    full, half = (swin.Swin(**TINY, dtype=dtype, endpoints=ALL) for dtype in (jnp.float32, jnp.bfloat16))
    variables, image = initialised(full)
    made = jax.eval_shape(lambda: half.init(jax.random.key(0), image, train=False))
    assert {x.dtype for x in jax.tree.leaves(made)} == {jnp.dtype(jnp.float32)}
    expected, out = (jax.jit(lambda v, net=net: net.apply(v, image, train=False))(variables) for net in (full, half))
    for stride in ALL:
        assert out[stride].dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(out[stride], np.float32) - expected[stride])
        assert error < 0.03 * np.linalg.norm(expected[stride])


def test_drop_path_drops_whole_images():
    x = jnp.ones((4000, 2, 2, 1))
    drop = _transformer.DropPath(0.25)
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


def test_adapt_leaves_a_fitting_state_alone():
    net = swin.Swin(**TINY)
    variables, _ = initialised(net)
    new, notes = swin.adapt({**variables, "batch_stats": {}}, net)
    assert notes == ()
    jax.tree.map(np.testing.assert_array_equal, new["params"], variables["params"])
    with pytest.raises(UserError, match="has 8 rows"):
        swin.adapt({"params": {"bias_table": np.zeros((8, 1))}}, net)


def official_state(seed=0):
    """Names and shapes as in the authors' files, for TINY."""
    rng, state = np.random.default_rng(seed), {}

    def add(name, *shape):
        state[name] = rng.normal(size=shape).astype(np.float32)

    def pair(name, *shape):
        add(f"{name}.weight", *shape)
        add(f"{name}.bias", shape[0])

    pair("patch_embed.proj", 8, 3, 4, 4)
    pair("patch_embed.norm", 8)
    for i, (depth, heads) in enumerate(zip(TINY["depths"], TINY["heads"])):
        d = 8 * 2**i
        for j in range(depth):
            b = f"layers.{i}.blocks.{j}"
            pair(f"{b}.norm1", d)
            add(f"{b}.attn.relative_position_bias_table", 9, heads)
            state[f"{b}.attn.relative_position_index"] = np.zeros((4, 4), np.int64)
            pair(f"{b}.attn.qkv", 3 * d, d)
            pair(f"{b}.attn.proj", d, d)
            pair(f"{b}.norm2", d)
            pair(f"{b}.mlp.fc1", 4 * d, d)
            pair(f"{b}.mlp.fc2", d, 4 * d)
        if i < 3:
            add(f"layers.{i}.downsample.reduction.weight", 2 * d, 4 * d)
            pair(f"layers.{i}.downsample.norm", 4 * d)
    state["layers.1.blocks.1.attn_mask"] = np.zeros((4, 4, 4), np.float32)
    pair("norm", 64)
    pair("head", 5, 64)
    return state


def as_new_timm(state):
    shift = lambda m: f"layers.{int(m[1]) + 1}.downsample"  # noqa: E731
    new = {re.sub(r"layers\.(\d)\.downsample", shift, k).replace("head.", "head.fc."): v for k, v in state.items()}
    return {k: v for k, v in new.items() if not k.endswith(("relative_position_index", "attn_mask"))}


def as_published_transformers(state):
    new = {}
    for name, value in state.items():
        if ".attn.qkv." in name:
            parts = zip(("query", "key", "value"), np.split(value, 3))
            new |= {name.replace("attn.qkv", f"attention.self.{part}"): v for part, v in parts}
        else:
            new[name] = value
    for old, now in (
        ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
        ("patch_embed.norm", "embeddings.norm"),
        ("layers.", "encoder.layers."),
        (".norm1.", ".layernorm_before."),
        (".norm2.", ".layernorm_after."),
        (".attn.proj.", ".attention.output.dense."),
        (".attn.relative", ".attention.self.relative"),
        (".mlp.fc1.", ".intermediate.dense."),
        (".mlp.fc2.", ".output.dense."),
    ):
        new = {name.replace(old, now): value for name, value in new.items()}
    new["layernorm.weight"], new["layernorm.bias"] = new.pop("norm.weight"), new.pop("norm.bias")
    new = {f"swin.{k}": v for k, v in new.items() if not k.startswith("head.")}
    return new | {"classifier.weight": state["head.weight"], "classifier.bias": state["head.bias"]}


def as_query2label(state):
    new = {f"module.backbone.0.{k}": v for k, v in state.items() if not k.startswith("head.")}
    return new | {"module.backbone.1.pe": np.zeros((1, 64, 2, 2)), "module.fc.W": np.zeros((1, 5, 64))}


def test_convert_places_every_tensor():
    net = swin.Swin(**TINY)
    state = official_state()
    made = swin.convert(state)
    assert made["batch_stats"] == {}
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), train=False))
    assert jax.tree.map(np.shape, made["params"]) == jax.tree.map(lambda x: x.shape, shapes["params"])
    at = flat(made["params"])
    np.testing.assert_array_equal(at["stem/conv/kernel"][1, 2, 0, 5], state["patch_embed.proj.weight"][5, 0, 1, 2])
    np.testing.assert_array_equal(
        at["layer2/block2/attention/out/kernel"], state["layers.1.blocks.1.attn.proj.weight"].T
    )
    np.testing.assert_array_equal(at["layer3/merge/norm/scale"], state["layers.2.downsample.norm.weight"])
    np.testing.assert_array_equal(at["norm/bias"], state["norm.bias"])


@pytest.mark.parametrize("rename", [as_new_timm, as_published_transformers, as_query2label])
def test_convert_reads_every_dialect(rename):
    state = official_state()
    expected, found = flat(swin.convert(state)["params"]), flat(swin.convert(rename(state))["params"])
    assert expected.keys() == found.keys()
    for path in expected:
        np.testing.assert_array_equal(found[path], expected[path], err_msg=path)


def test_convert_refuses_other_files():
    with pytest.raises(UserError, match="absolute_pos_embed"):
        swin.convert({"absolute_pos_embed": np.zeros((1, 4, 8))})
    with pytest.raises(UserError, match=r"layer1\.0\.conv1\.weight"):
        swin.convert({"layer1.0.conv1.weight": np.zeros((4, 4, 1, 1))})
    state = as_published_transformers(official_state())
    del state["swin.encoder.layers.0.blocks.0.attention.self.key.weight"]
    with pytest.raises(UserError, match="key"):
        swin.convert(state)


@pytest.mark.parametrize(
    ("settings", "shape", "words"),
    [
        ({}, (1, 100, 64, 3), "multiples of 32.*100x64.*96x64"),
        ({}, (64, 64, 3), "expected"),
        ({"endpoints": ("64",)}, (1, 64, 64, 3), "64"),
        ({"frozen": "layer5"}, (1, 64, 64, 3), "layer5"),
        ({"frozen": "layer1"}, (1, 64, 64, 3), "stem,layer1"),
        ({"norm": "layer"}, (1, 64, 64, 3), "norm"),
        ({"drop_path": 1.0}, (1, 64, 64, 3), "drop_path"),
    ],
)
def test_what_a_user_can_get_wrong(settings, shape, words):
    net = swin.Swin(**TINY, **settings)
    with pytest.raises(UserError, match=words):
        jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros(shape), train=False))


def test_records_and_keywords():
    wanted = {"arch", "hub", "file", "sha256", "licence", "paper", "size", "mean", "std", "note"}
    for name, record in swin.RECORDS.items():
        assert set(record) == wanted and name.startswith(record["arch"]) and record["arch"] in swin.NAMES
        assert f"_{record['size']}" in record["arch"]
    common = {"frozen", "norm", "dtype", "axis", "endpoints", "remat", "drop_path"}
    assert all(common <= set(build.keywords(constructor)) for constructor in swin.NAMES.values())
