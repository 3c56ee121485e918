"""ViT against plain numpy (patches, tokens one by one, bicubic positions point by point) and hand-made weight files."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import weight_states
from mljax.backbones import vit
from mljax.trees import flatten
from mljax.weights.identify import identify

TINY = weight_states.VIT


def initialised(net, h=48, w=32, seed=0):
    """Random parameters, also where the start is zero or one: (variables, images)."""
    rng = np.random.default_rng(seed)
    image = jnp.asarray(rng.normal(size=(2, h, w, 3)), jnp.float32)
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), image, train=False))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32), shapes), image


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
    params = flatten(variables["params"])
    moved = traverse_util.unflatten_dict({**params, "stem/cls_token": params["stem/cls_token"] * -5}, sep="/")
    one, other = (net.apply({"params": p}, image, train=False)["16"] for p in (variables["params"], moved))
    assert np.abs(one - other).max() > 1e-3


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("h", [32, 48], ids=["its-size", "interpolated"])
def test_gradient_everywhere_but_at_key_biases(h):
    net = vit.ViT(**TINY)
    variables, image = initialised(net, h)
    grads = flatten(
        jax.jit(jax.grad(lambda v: jnp.sum(net.apply(v, image, train=True)["16"] ** 3)))(variables)["params"]
    )
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
        return jnp.sum(net.apply(v, image, train=True, rngs={"dropout": jax.random.key(6)})["16"] ** 3)

    grads = flatten(jax.jit(jax.grad(loss))(variables)["params"])
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


def test_stochastic_depth_grows_from_nothing_to_the_last_block():
    """At a rate near 1 the last block is dropped whole: the map is that of the others."""
    net = vit.ViT(**{**TINY, "depth": 2}, drop_path=0.999)
    variables, image = initialised(net)
    out = net.apply(variables, image, train=True, rngs={"dropout": jax.random.key(0)})["16"]
    shorter = {k: v for k, v in variables["params"].items() if k != "block2"}
    expected = vit.ViT(**{**TINY, "depth": 1}).apply({"params": shorter}, image, train=False)["16"]
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


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


def test_weights_of_another_size_give_the_same_map():
    """Interpolated once when loading, or in every forward pass: the same image, the same numbers."""
    small, large = vit.ViT(**TINY), vit.ViT(**{**TINY, "size": 64})
    variables, image = initialised(small, 64, 64)
    adapted, _ = vit.adapt(jax.device_get({**variables, "batch_stats": {}}), large)
    one = small.apply(variables, image, train=False)["16"]
    other = large.apply({"params": adapted["params"]}, image, train=False)["16"]
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


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
