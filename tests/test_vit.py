"""ViT against plain numpy (patches, tokens one by one, bicubic positions point by point) and hand-made weight files."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from mljax import build
from mljax.backbones import vit
from mljax.errors import UserError
from mljax.weights.identify import identify

# Published totals, 86,567,656 and 304,326,632 at 224, less 1000 classes; at 384 there are 380 positions more.
PARAMETERS = {
    "vit_base_16_224": 86_567_656 - 1000 * 769,
    "vit_base_16_384": 86_567_656 - 1000 * 769 + 380 * 768,
    "vit_large_16_224": 304_326_632 - 1000 * 1025,
    "vit_large_16_384": 304_326_632 - 1000 * 1025 + 380 * 1024,
}
TINY = dict(width=8, depth=3, heads=2, size=32)


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def initialised(net, h=48, w=32, seed=0):
    """Random parameters, also where the start is zero or one: (variables, images)."""
    rng = np.random.default_rng(seed)
    image = jnp.asarray(rng.normal(size=(2, h, w, 3)), jnp.float32)
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), image, train=False))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32), shapes), image


@pytest.mark.parametrize("name", vit.NAMES)
def test_parameters_and_shapes(name):
    net, size = vit.NAMES[name](), int(name.split("_")[-1])
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    out, variables = jax.eval_shape(lambda x: net.init_with_output(jax.random.key(0), x, train=False), image)
    assert sum(x.size for x in jax.tree.leaves(variables)) == PARAMETERS[name]
    width = {"base": 768, "large": 1024}[name.split("_")[1]]
    assert {k: v.shape for k, v in out.items()} == {"16": (1, size // 16, size // 16, width)}


def test_every_name_is_counted():
    assert set(PARAMETERS) == set(vit.NAMES)


# --- values -----------------------------------------------------------------------------------------------------------


def cubic(t):
    """Keys 1981, a = -0.75."""
    t = abs(t)
    if t <= 1:
        return 1.25 * t**3 - 2.25 * t**2 + 1
    return -0.75 * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


def bicubic(grid, h, w):
    """(H W d) -> (h w d), point by point over its 4x4 neighbours; beyond the border the border repeats."""
    out = np.zeros((h, w, grid.shape[-1]))
    for i in range(h):
        for j in range(w):
            y, x = (i + 0.5) * grid.shape[0] / h - 0.5, (j + 0.5) * grid.shape[1] / w - 0.5
            for a in range(math.floor(y) - 1, math.floor(y) + 3):
                for b in range(math.floor(x) - 1, math.floor(x) + 3):
                    row, column = min(max(a, 0), grid.shape[0] - 1), min(max(b, 0), grid.shape[1] - 1)
                    out[i, j] += cubic(y - a) * cubic(x - b) * grid[row, column]
    return out


def norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def linear(x, p):
    return x @ p["kernel"] + p["bias"]


def attention(tokens, p, heads):
    """(n d): token by token, head by head."""
    n, d = tokens.shape
    q, k, v = np.split(linear(tokens, p["qkv"]), 3, -1)
    out, e = np.zeros((n, d)), d // heads
    for i in range(n):
        for head in range(heads):
            c = slice(head * e, (head + 1) * e)
            scores = np.array([q[i, c] @ k[j, c] / np.sqrt(e) for j in range(n)])
            weights = np.exp(scores - scores.max())
            out[i, c] = sum(weight * v[j, c] for j, weight in enumerate(weights / weights.sum()))
    return linear(out, p["out"])


def by_hand(image, p, depth, heads):
    """One image (h w 3) -> the map (h/16 w/16 d), in float64."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), p)
    rows, columns, side = image.shape[0] // 16, image.shape[1] // 16, 2
    kernel, bias = p["stem"]["conv"]["kernel"], p["stem"]["conv"]["bias"]
    grid = bicubic(p["stem"]["pos_embed"][0, 1:].reshape(side, side, -1), rows, columns)
    tokens = [p["stem"]["cls_token"][0, 0] + p["stem"]["pos_embed"][0, 0]]
    for i in range(rows):
        for j in range(columns):
            patch = np.asarray(image[16 * i : 16 * i + 16, 16 * j : 16 * j + 16], np.float64)
            tokens.append(np.einsum("abc,abcd->d", patch, kernel) + bias + grid[i, j])
    x, erf = np.array(tokens), np.vectorize(math.erf)
    for i in range(depth):
        block = p[f"block{i + 1}"]
        x = x + attention(norm(x, block["norm1"]), block["attention"], heads)
        y = linear(norm(x, block["norm2"]), block["mlp"]["fc1"])
        x = x + linear(y * (1 + erf(y / np.sqrt(2))) / 2, block["mlp"]["fc2"])
    return norm(x, p["norm"])[1:].reshape(rows, columns, -1)


@pytest.mark.parametrize(("h", "w"), [(32, 32), (48, 32), (16, 80)], ids=["its-size", "tall", "wide"])
def test_map_equals_loops(h, w):
    net = vit.ViT(**TINY)
    variables, image = initialised(net, h, w)
    out = jax.jit(lambda v, x: net.apply(v, x, train=False))(variables, image)
    assert out.keys() == {"16"}
    for i in range(2):
        expected = by_hand(np.asarray(image[i]), variables["params"], TINY["depth"], TINY["heads"])
        np.testing.assert_allclose(out["16"][i], expected, rtol=1e-4, atol=1e-5)


def test_the_class_token_takes_part_in_attention():
    net = vit.ViT(**TINY)
    variables, image = initialised(net)
    params = flat(variables["params"])
    moved = traverse_util.unflatten_dict({**params, "stem/cls_token": params["stem/cls_token"] * -5}, sep="/")
    one, other = (net.apply({"params": p}, image, train=False)["16"] for p in (variables["params"], moved))
    assert np.abs(one - other).max() > 1e-3


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("h", [32, 48], ids=["its-size", "interpolated"])
def test_gradient_everywhere_but_at_key_biases(h):
    net = vit.ViT(**TINY)
    variables, image = initialised(net, h)
    grads = flat(jax.jit(jax.grad(lambda v: jnp.sum(net.apply(v, image, train=True)["16"] ** 3)))(variables)["params"])
    for path, grad in grads.items():
        if path.endswith("attention/qkv/bias"):
            q, k, v = np.split(np.abs(grad), 3)
            assert k.max() < 1e-3 * min(q.max(), v.max())
        else:
            assert np.abs(grad).max() > 0, path
    assert np.abs(grads["stem/pos_embed"]).max(-1).all()


@pytest.mark.parametrize("frozen", ["", "stem", "stem, block1", "stem,block1,block2,block3", "all"])
def test_frozen_stages_get_no_gradient(frozen):
    net = vit.ViT(**TINY, frozen=frozen, drop_path=0.5)
    variables, image = initialised(net)

    def loss(v):
        return jnp.sum(net.apply(v, image, train=True, rngs={"dropout": jax.random.key(3)})["16"] ** 3)

    grads = flat(jax.jit(jax.grad(loss))(variables)["params"])
    fixed = {part.strip() for part in frozen.split(",")} if frozen != "all" else {"stem", "block1", "block2", "block3"}
    for path, grad in grads.items():
        held = path.split("/")[0] in fixed or (path.startswith("norm/") and "block3" in fixed)
        assert (np.abs(grad).max() == 0) == held, path
        assert any(re.search(pattern, path) for pattern in net.frozen_parameters) == held, path


def test_names_of_stages_are_whole():
    """block1 is not the beginning of block10."""
    net = vit.ViT(width=4, depth=11, heads=1, frozen="stem,block1")
    assert [bool(re.search(net.frozen_parameters[1], f"{b}/norm1/scale")) for b in ("block1", "block10")] == [
        True,
        False,
    ]


def test_frozen_stages_do_not_drop():
    """What a feature cache keeps is what training sees."""
    net = vit.ViT(**TINY, frozen="all", drop_path=0.9)
    variables, image = initialised(net)
    train = net.apply(variables, image, train=True)  # no rng is asked for
    np.testing.assert_array_equal(train["16"], net.apply(variables, image, train=False)["16"])


def test_stochastic_depth_grows_from_nothing_to_the_last_block():
    """At a rate near 1 the last block is dropped whole: the map is that of the others."""
    net = vit.ViT(**{**TINY, "depth": 2}, drop_path=0.999)
    variables, image = initialised(net)
    out = net.apply(variables, image, train=True, rngs={"dropout": jax.random.key(0)})["16"]
    shorter = {k: v for k, v in variables["params"].items() if k != "block2"}
    expected = vit.ViT(**{**TINY, "depth": 1}).apply({"params": shorter}, image, train=False)["16"]
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_remat_has_the_same_gradient():
    def gradient(remat):
        net = vit.ViT(**TINY, remat=remat)
        variables, image = initialised(net)
        return jax.jit(jax.grad(lambda v: jnp.sum(net.apply(v, image, train=True)["16"] ** 3)))(variables)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-2), gradient(True), gradient(False))


def test_bfloat16_is_close_and_keeps_float32_parameters():
    full, half = (vit.ViT(**TINY, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
    variables, image = initialised(full)
    made = jax.eval_shape(lambda: half.init(jax.random.key(0), image, train=False))
    assert {x.dtype for x in jax.tree.leaves(made)} == {jnp.dtype(jnp.float32)}
    expected, out = (jax.jit(lambda v, net=net: net.apply(v, image, train=False))(variables) for net in (full, half))
    assert out["16"].dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(out["16"], np.float32) - expected["16"])
    assert error < 0.03 * np.linalg.norm(expected["16"])


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "size"), [(2, 64), (4, 48), (3, 16)])
def test_adapt_interpolates_positions_and_keeps_the_class_tokens(old, size):
    table = np.random.default_rng(0).normal(size=(1, 1 + old * old, 5)).astype(np.float32)
    state = {"params": {"stem": {"pos_embed": table, "cls_token": np.ones((1, 1, 5))}}, "batch_stats": {}}
    new, notes = vit.adapt(state, vit.ViT(size=size))
    found, side = new["params"]["stem"]["pos_embed"], size // 16
    np.testing.assert_array_equal(found[:, 0], table[:, 0])
    expected = bicubic(table[0, 1:].reshape(old, old, 5).astype(np.float64), side, side)
    np.testing.assert_allclose(found[0, 1:], expected.reshape(-1, 5), rtol=1e-5, atol=1e-6)
    assert found.dtype == np.float32 and len(notes) == 1 and f"from {old}x{old} to {side}x{side}" in notes[0]
    assert state["params"]["stem"]["pos_embed"] is table


def test_adapt_leaves_a_fitting_state_alone():
    net = vit.ViT(**TINY)
    variables, _ = initialised(net)
    new, notes = vit.adapt({**variables, "batch_stats": {}}, net)
    assert notes == ()
    jax.tree.map(np.testing.assert_array_equal, new["params"], variables["params"])
    with pytest.raises(UserError, match="has 6 rows"):
        vit.adapt({"params": {"stem": {"pos_embed": np.zeros((1, 6, 8))}}}, net)


def test_weights_of_another_size_give_the_same_map():
    """Interpolated once when loading, or in every forward pass: the same image, the same numbers."""
    small, large = vit.ViT(**TINY), vit.ViT(**{**TINY, "size": 64})
    variables, image = initialised(small, 64, 64)
    adapted, _ = vit.adapt(jax.device_get({**variables, "batch_stats": {}}), large)
    one = small.apply(variables, image, train=False)["16"]
    other = large.apply({"params": adapted["params"]}, image, train=False)["16"]
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def official_state(seed=0):
    """Names and shapes as in timm's files, for TINY."""
    rng, state = np.random.default_rng(seed), {}

    def add(name, *shape):
        state[name] = rng.normal(size=shape).astype(np.float32)

    def pair(name, *shape):
        add(f"{name}.weight", *shape)
        add(f"{name}.bias", shape[0])

    add("cls_token", 1, 1, 8)
    add("pos_embed", 1, 5, 8)
    pair("patch_embed.proj", 8, 3, 16, 16)
    for i in range(3):
        for name, shape in (("norm1", (8,)), ("attn.qkv", (24, 8)), ("attn.proj", (8, 8)), ("norm2", (8,))):
            pair(f"blocks.{i}.{name}", *shape)
        pair(f"blocks.{i}.mlp.fc1", 32, 8)
        pair(f"blocks.{i}.mlp.fc2", 8, 32)
    pair("norm", 8)
    pair("head", 5, 8)
    return state


def as_transformers(state, names):
    new = {}
    for name, value in state.items():
        if ".attn.qkv." in name:
            parts = zip(("query", "key", "value"), np.split(value, 3))
            new |= {name.replace("attn.qkv", f"attn.{part}"): v for part, v in parts}
        elif not name.startswith("head."):
            new[name] = value
    for old, now in names:
        new = {re.sub(old, now, name): value for name, value in new.items()}
    new = {f"vit.{name}": value for name, value in new.items()}
    return new | {f"classifier.{k}": state[f"head.{k}"] for k in ("weight", "bias")}


COMMON = (
    (r"^cls_token", "embeddings.cls_token"),
    (r"^pos_embed", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
    (r"^norm\.", "layernorm."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
)


def as_published(state):
    """google/vit-large-patch16-224."""
    names = (
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.attn\.", ".attention.attention."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
        (r"^blocks\.", "encoder.layer."),
    )
    return as_transformers(state, COMMON + names) | {"vit.pooler.dense.weight": np.zeros((8, 8))}


def as_version_5(state):
    names = (
        (r"\.attn\.proj\.", ".attention.o_proj."),
        (r"\.attn\.([qkv])\w+\.", r".attention.\1_proj."),
        (r"^blocks\.", "layers."),
    )
    return as_transformers(state, COMMON + names)


def as_wrapped(state):
    """CSRA's, from several GPUs."""
    new = {f"module.{k}": v for k, v in state.items() if not k.startswith("head.")}
    return new | {"module.classifier.multi_head.0.head.weight": np.zeros((5, 8, 1, 1))}


def test_convert_places_every_tensor():
    net, state = vit.ViT(**TINY), official_state()
    made = vit.convert(state)
    assert made["batch_stats"] == {}
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False))
    assert jax.tree.map(np.shape, made["params"]) == jax.tree.map(lambda x: x.shape, shapes["params"])
    at = flat(made["params"])
    np.testing.assert_array_equal(at["stem/conv/kernel"][1, 2, 0, 5], state["patch_embed.proj.weight"][5, 0, 1, 2])
    np.testing.assert_array_equal(at["stem/pos_embed"], state["pos_embed"])
    np.testing.assert_array_equal(at["stem/cls_token"], state["cls_token"])
    np.testing.assert_array_equal(at["block2/attention/out/kernel"], state["blocks.1.attn.proj.weight"].T)
    np.testing.assert_array_equal(at["block3/norm2/scale"], state["blocks.2.norm2.weight"])
    np.testing.assert_array_equal(at["norm/bias"], state["norm.bias"])


@pytest.mark.parametrize("rename", [as_published, as_version_5, as_wrapped])
def test_convert_reads_every_dialect(rename):
    state = official_state()
    expected, found = flat(vit.convert(state)["params"]), flat(vit.convert(rename(state))["params"])
    assert expected.keys() == found.keys()
    for path in expected:
        np.testing.assert_array_equal(found[path], expected[path], err_msg=path)


@pytest.mark.parametrize(
    "name",
    ["dist_token", "norm_pre.weight", "blocks.0.ls1.gamma", "blocks.0.attn.q_norm.weight", "layer1.0.conv1.weight"],
)
def test_convert_refuses_other_files(name):
    with pytest.raises(UserError, match=re.escape(repr(name))):
        vit.convert(official_state() | {name: np.zeros((4, 4))})


def test_convert_refuses_a_cut_file():
    state = as_published(official_state())
    del state["vit.encoder.layer.0.attention.attention.key.weight"]
    with pytest.raises(UserError, match=r"ViT weights have .*query.* without .*key"):
        vit.convert(state)


def test_files_are_identified():
    def nothing(*shape):
        return np.broadcast_to(np.int8(0), shape)

    def like(width, depth, positions, prefix="", patch=16):
        found = {f"{prefix}blocks.{i}.attn.qkv.weight": nothing(3 * width, width) for i in range(depth)}
        found[f"{prefix}patch_embed.proj.weight"] = nothing(width, 3, patch, patch)
        return found | {f"{prefix}pos_embed": nothing(1, positions, width)}

    label = "a ViT-B with patches of 16 pixels"
    assert identify(like(768, 12, 197)) == (label, "", ("vit_base_16_224", "vit_base_16_384"))
    assert identify(like(768, 12, 577)).archs[0] == "vit_base_16_384"
    assert identify(like(1024, 24, 197, "module.")).archs[0] == "vit_large_16_224"
    for other in (like(768, 12, 785, patch=8), like(384, 12, 197), like(768, 11, 197)):
        assert identify(other).archs == () and identify(other).label.startswith("a ViT of 1")
    hugging = {f"vit.encoder.layer.{i}.attention.attention.query.weight": nothing(768, 768) for i in range(12)}
    hugging["vit.embeddings.patch_embeddings.projection.weight"] = nothing(768, 3, 16, 16)
    assert identify(hugging).archs == ("vit_base_16_224", "vit_base_16_384")
    second = {"layers.0.blocks.0.attn.qkv.weight": nothing(3, 1), "layers.0.blocks.0.attn.cpb_mlp.0.weight": nothing(1)}
    assert identify(second).label == "a Swin of version 2"


@pytest.mark.parametrize(
    ("settings", "shape", "words"),
    [
        ({}, (1, 100, 64, 3), "multiples of 16.*100x64.*96x64"),
        ({}, (64, 64, 3), "expected"),
        ({"endpoints": ("32",)}, (1, 64, 64, 3), "32"),
        ({"frozen": "block4"}, (1, 64, 64, 3), "block4"),
        ({"frozen": "block1"}, (1, 64, 64, 3), "stem,block1"),
        ({"norm": "layer"}, (1, 64, 64, 3), "norm"),
        ({"drop_path": 1.0}, (1, 64, 64, 3), "drop_path"),
        ({"size": 100}, (1, 64, 64, 3), "vit has the size 100; give a multiple of 16"),
        ({"size": 0}, (1, 64, 64, 3), "vit has the size 0"),
    ],
)
def test_what_a_user_can_get_wrong(settings, shape, words):
    net = vit.ViT(**{**TINY, **settings})
    with pytest.raises(UserError, match=words) as error:
        jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros(shape), train=False))
    assert str(error.value).count(". ") == 0 and str(error.value).endswith(".")


def test_records_and_keywords():
    wanted = {"arch", "hub", "file", "sha256", "licence", "paper", "size", "mean", "std", "note"}
    for name, record in vit.RECORDS.items():
        assert set(record) == wanted and name.startswith(record["arch"]) and record["arch"] in vit.NAMES
        assert vit.NAMES[record["arch"]]().size == record["size"]
    assert {record["arch"] for record in vit.RECORDS.values()} == set(vit.NAMES)
    common = {"frozen", "norm", "dtype", "axis", "endpoints", "remat", "drop_path", "size"}
    assert all(common <= set(build.keywords(constructor)) for constructor in vit.NAMES.values())
