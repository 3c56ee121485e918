"""TDRG against the authors' golden cases, a plain numpy forward pass for attention within an image, and its options."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import released_names
import toy
from mljax.config.reading import read_config
from mljax.errors import UserError
from mljax.losses.criterion import Criterion
from mljax.systems.tdrg import TDRG, cross_scale, resize, top_share
from mljax.weights import published
from toy import close, weights

L, D, HEADS = 6, 16, 4


def build(**settings):
    loss = Criterion.from_config({"name": "soft_margin"})
    return TDRG(backbone=None, criterion=loss, meta=toy.meta(L), **{"width": D, "ffn": 40, **settings})


def batch(fine, coarse):
    """From maps as the authors have them, (b d h w)."""
    return toy.batch({"16": toy.nhwc(fine), "32": toy.nhwc(coarse)}, L)


@pytest.fixture(scope="module")
def golden():
    return toy.golden("tdrg")


def maps(arrays):
    return arrays["in/layer3_feature_map"], arrays["in/layer4_feature_map"]


def encoded(caught):
    """The three scales (b n d) that the transformer gave."""
    return caught["intermediates"]["transformer"]["__call__"][0]


# --- the authors' numbers -------------------------------------------------------------------------------------------


def test_golden_forward_over_the_batch(golden):
    module = build(attend="batch")
    variables = published.convert_head(weights(golden), module)
    out, caught = toy.apply(
        module, variables, batch(*maps(golden)), capture_intermediates=True, mutable=["intermediates"]
    )
    for name, x in zip(("f3", "f4", "f5"), encoded(caught), strict=True):
        close(x.transpose(0, 2, 1), golden[f"out/transformer_{name}"])
    close(out.extra["transformer_logits"], golden["out/logits_trans"])
    close(out.extra["graph_logits"], golden["out/logits_gcn"])
    close(out.extra["activation_logits"], golden["out/logits_sac"])
    close(out.extra["nodes"].transpose(0, 2, 1), golden["out/nodes"])
    close(out.extra["adjacency"], golden["out/joint_correlation"])
    close(out.logits, golden["out/logits"])


def test_golden_one_image_at_a_time(golden):
    """The authors' first code with one image: over the batch, or each position alone, whatever the batch."""
    variables = published.convert_head(weights(golden), build())
    data = batch(*maps(golden))
    out = toy.apply(build(attend="alone"), variables, data)
    close(out.extra["transformer_logits"], golden["out/logits_trans_one_image_at_a_time"])
    close(out.extra["graph_logits"], golden["out/logits_gcn_one_image_at_a_time"])
    single = toy.apply(build(attend="batch"), variables, jax.tree.map(lambda x: x[1:2], data))
    close(single.extra["transformer_logits"][0], golden["out/logits_trans_one_image_at_a_time"][1])


def test_padding_does_not_change_what_real_images_get_over_the_batch(golden):
    module = build(attend="batch")
    variables = published.convert_head(weights(golden), module)
    padded = jax.tree.map(lambda x: np.concatenate([x, x[-1:] * 3]), batch(*maps(golden)))
    padded["mask"] = np.array([1, 1, 1, 0], np.float32)
    close(toy.apply(module, variables, padded).logits[:3], golden["out/logits"])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def norm(w, name, x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


def encoder(w, x):
    """Three post-norm layers over the positions (n d) of one image, head by head."""
    for i in range(3):
        start = f"transformer.encoder.layers.{i}"
        q, k, v = (
            x @ part.T + bias
            for part, bias in zip(
                np.split(w[f"{start}.self_attn.in_proj_weight"], 3), np.split(w[f"{start}.self_attn.in_proj_bias"], 3)
            )
        )
        merged, size = np.zeros_like(x), D // HEADS
        for h in range(HEADS):
            part = slice(h * size, (h + 1) * size)
            scores = np.exp(q[:, part] @ k[:, part].T / np.sqrt(size))
            merged[:, part] = scores / scores.sum(-1, keepdims=True) @ v[:, part]
        attended = merged @ w[f"{start}.self_attn.out_proj.weight"].T + w[f"{start}.self_attn.out_proj.bias"]
        x = norm(w, f"{start}.norm1", x + attended)
        y = gelu(x @ w[f"{start}.linear1.weight"].T + w[f"{start}.linear1.bias"])
        x = norm(w, f"{start}.norm2", x + y @ w[f"{start}.linear2.weight"].T + w[f"{start}.linear2.bias"])
    return x


def bilinear(x, height, width):
    """(h w d) -> (height width d), corners in place, one position at a time."""
    old_h, old_w, d = x.shape
    out = np.zeros((height, width, d))
    for i in range(height):
        for j in range(width):
            y, z = i * (old_h - 1) / max(height - 1, 1), j * (old_w - 1) / max(width - 1, 1)
            y0, z0 = int(y), int(z)
            y1, z1 = min(y0 + 1, old_h - 1), min(z0 + 1, old_w - 1)
            a, b = y - y0, z - z0
            out[i, j] = (1 - a) * ((1 - b) * x[y0, z0] + b * x[y0, z1]) + a * ((1 - b) * x[y1, z0] + b * x[y1, z1])
    return out


def image_forward(w, fine, coarse):
    """Three logits (l) of one image by the authors' names, with attention within the image; fine, coarse (d h w)."""
    fine, coarse = np.moveaxis(fine, 0, -1).astype(np.float64), np.moveaxis(coarse, 0, -1).astype(np.float64)
    x3 = fine @ w["transform_28.weight"][..., 0, 0].T + w["transform_28.bias"]
    x4 = coarse @ w["transform_14.weight"][..., 0, 0].T + w["transform_14.bias"]
    side = (coarse.shape[0] - 3) // 2 + 1
    x5 = np.zeros((side, side, D))
    for i in range(side):
        for j in range(side):
            window = coarse[2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
            x5[i, j] = np.einsum("hwc,dchw->d", window, w["transform_7.weight"]) + w["transform_7.bias"]
    large = [bilinear(x, *x3.shape[:2]) for x in (x3, x4, x5)]
    mixed = [bilinear(x + large[0] * large[1] * large[2], *old.shape[:2]) for x, old in zip(large, (x3, x4, x5))]
    f = [encoder(w, x.reshape(-1, D)) for x in mixed]
    trans = w["trans_classifier.weight"] @ np.concatenate([x.max(0) for x in f]) + w["trans_classifier.bias"]
    cells = coarse.reshape(-1, coarse.shape[-1])
    scores = cells @ w["constraint_classifier.weight"][..., 0, 0].T
    gates = sigmoid(scores)
    nodes = gates.T @ (cells @ w["gcn_dim_transform.weight"][..., 0, 0].T + w["gcn_dim_transform.bias"])
    guided = gates.T @ f[1] @ w["guidance_transform.weight"][..., 0].T + w["guidance_transform.bias"]
    nodes = np.concatenate([nodes, guided], -1)
    guide = w["guidance_conv.weight"][..., 0] @ np.concatenate([x.mean(0) for x in f]) + w["guidance_conv.bias"]
    guide = (guide - w["guidance_bn.running_mean"]) / np.sqrt(w["guidance_bn.running_var"] + 1e-5)
    guide = guide * w["guidance_bn.weight"] + w["guidance_bn.bias"]
    guide = np.where(guide > 0, guide, 0.2 * guide)
    joint = np.concatenate([np.tile(guide, (L, 1)), nodes], -1)
    adjacency = sigmoid(w["matrix_transform.weight"][..., 0] @ joint.T + w["matrix_transform.bias"][:, None])
    y = nodes.T @ adjacency
    y = w["forward_gcn.weight.weight"][..., 0] @ np.where(y > 0, y, 0.2 * y) + w["forward_gcn.weight.bias"][:, None]
    y = np.where(y > 0, y, 0.2 * y) + nodes.T
    gcn = np.array([w["gcn_classifier.weight"][c, :, 0] @ y[:, c] + w["gcn_classifier.bias"][c] for c in range(L)])
    count = round(0.05 * len(scores))
    return trans, gcn, np.sort(scores, axis=0)[-count:].mean(0), gates


def test_attention_within_the_image_equals_numpy(golden):
    module, w = build(), weights(golden)
    assert module.attend == "image"
    variables = published.convert_head(w, module)
    out = toy.apply(module, variables, batch(*maps(golden)))
    for i, (fine, coarse) in enumerate(zip(*maps(golden))):
        trans, gcn, sac, gates = image_forward(w, fine, coarse)
        close(out.extra["transformer_logits"][i], trans)
        close(out.extra["graph_logits"][i], gcn)
        close(out.extra["activation_logits"][i], sac)
        close(out.logits[i], 0.7 * trans + 0.3 * gcn)
        close(out.attention[i, 0].reshape(L, -1).T, gates / gates.sum(0))
    assert np.abs(out.extra["transformer_logits"] - golden["out/logits_trans"]).max() > 1e-2


def test_loss_is_the_sum_of_four(golden):
    module = build(attend="batch")
    variables = published.convert_head(weights(golden), module)
    data = batch(*maps(golden))
    (loss, terms), _ = toy.apply(module, variables, data, jnp.int32(0), method="loss", mutable=["batch_stats"])
    out, _ = toy.apply(module, variables, data, train=True, mutable=["batch_stats"])
    total = 0.0
    for x in (out.logits, *(out.extra[f"{name}_logits"] for name in ("transformer", "graph", "activation"))):
        x = np.asarray(x, np.float64)
        total += (np.logaddexp(0, x) - x * data["labels"]).mean()
    np.testing.assert_allclose(loss, total, rtol=1e-5)
    np.testing.assert_allclose(sum(terms.values()), loss, rtol=1e-5)
    assert set(terms) == {"loss_mixed", "loss_transformer", "loss_graph", "loss_activation"}


def test_the_graph_does_not_train_the_transformer(golden):
    module = build()
    variables = published.convert_head(weights(golden), module)
    data = batch(*maps(golden))

    def graph(params):
        return (module.apply({**variables, "params": params}, data).extra["graph_logits"] ** 2).sum()

    grads = jax.jit(jax.grad(graph))(variables["params"])
    assert not any(np.abs(g).max() > 0 for g in jax.tree.leaves((grads["transformer"], grads["scale_1"])))
    assert np.abs(grads["constraint"]["kernel"]).max() > 0 and np.abs(grads["node_guide"]["kernel"]).max() > 0


# --- released files -------------------------------------------------------------------------------------------------


def released():
    """The state dict of the full size, the trunk under both of its names."""
    state = released_names.state_dict("TDRG")
    trunk = released_names.state_dict("R101")
    stem = {"conv1.": "layer1.0.", "bn1.": "layer1.1.", "layer1.": "layer1.4."}
    for name, value in trunk.items():
        start = next((s for s in stem if name.startswith(s)), "")
        state[stem[start] + name.removeprefix(start) if start else name] = value
        number = {"layer2.": 1, "layer3.": 2, "layer4.": 3}.get(name[:7], 0)
        rest = stem[start].removeprefix("layer1.") + name.removeprefix(start) if start else name[7:]
        state[f"backbone.{number}.{rest}"] = value
    return state


def test_full_size_names_and_shapes_are_those_of_the_released_files():
    state = released()
    counters = sum(name.endswith("running_mean") for name in state)  # counted, not listed
    assert len(state) + counters == released_names.total("TDRG")
    found = read_config("configs/tdrg.py:coco2014").unlock()
    state |= {f"{start}.num_batches_tracked": np.zeros((), np.int64) for start in ("guidance_bn", "layer1.1")}
    released_names.fits(found, toy.meta(80), state)


OLD = {
    "layer1.": "features.",
    "trans_classifier.": "classifier.",
    "guidance_transform.": "conv_position.",
    "constraint_classifier.": "fc.",
    "gcn_dim_transform.": "conv_transform.",
    "guidance_conv.": "gcn.conv_global.",
    "guidance_bn.": "gcn.bn_global.",
    "matrix_transform.": "gcn.conv_create_co_mat.",
    "forward_gcn.weight.": "gcn.dynamic_weight.",
    "gcn_classifier.": "last_linear.",
}


def older(state):
    """The names that the authors' released COCO checkpoint has, with what it stores besides."""
    found = {}
    for name, value in state.items():
        start = next((new for new in OLD if name.startswith(new)), "")
        found[OLD.get(start, "") + name.removeprefix(start)] = value
    extra = ("bottleneck.0.weight", "classifier_global.weight", "bn_position.weight", "gcn.static_adj.0.weight")
    return found | dict.fromkeys(extra, np.zeros(3, np.float32))


def test_the_older_naming_is_read(golden):
    state = {name: value for name, value in weights(golden).items() if not name.startswith("backbone.")}
    module = build(attend="batch")
    variables = published.convert_head(older(state), module)
    close(toy.apply(module, variables, batch(*maps(golden))).logits, golden["out/logits"])
    full = {name: value for name, value in released().items() if not name.startswith("backbone.")}
    released_names.fits(read_config("configs/tdrg.py:coco2014").unlock(), toy.meta(80), older(full))


def test_a_file_of_another_variant_is_refused(golden):
    with pytest.raises(UserError, match="no place for 'third_classifier.weight'"):
        published.convert_head(weights(golden) | {"third_classifier.weight": np.zeros((2, 2))}, build())


# --- parts and options ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), [((2, 2), (10, 10)), ((5, 4), (2, 3)), ((1, 1), (3, 2)), ((4, 3), (1, 1))])
def test_resize_keeps_corners(old, new):
    x = np.random.default_rng(0).normal(size=(2, *old, 3)).astype(np.float32)
    got = np.asarray(resize(jnp.asarray(x), *new))
    for image, found in zip(x, got):
        np.testing.assert_allclose(found, bilinear(image, *new), rtol=1e-5, atol=1e-6)


def test_cross_scale_works_on_maps_that_are_not_square():
    rng = np.random.default_rng(0)
    scales = [jnp.asarray(rng.normal(size=(1, h, w, 2)), jnp.float32) for h, w in ((4, 6), (2, 3), (1, 1))]
    large = [bilinear(np.asarray(x[0]), 4, 6) for x in scales]
    for got, x, own in zip(cross_scale(scales), large, scales):
        wanted = bilinear(x + large[0] * large[1] * large[2], *own.shape[1:3])
        np.testing.assert_allclose(got[0], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("n", "count"), [(196, 10), (49, 2), (25, 1), (4, 1)])
def test_top_share_is_the_mean_of_five_percent(n, count):
    x = np.random.default_rng(0).normal(size=(2, n, 3)).astype(np.float32)
    np.testing.assert_allclose(top_share(jnp.asarray(x)), np.sort(x, axis=1)[:, -count:].mean(1), rtol=1e-5)


def test_normalised_nodes_do_not_grow_with_the_map(golden):
    variables = published.convert_head(weights(golden), build())
    data = batch(*maps(golden))
    plain, divided = (np.asarray(toy.apply(build(normalise=n), variables, data).extra["nodes"]) for n in (False, True))
    close(divided[..., :D], plain[..., :D] / 25)
    bias = weights(golden)["guidance_transform.bias"]
    close(divided[..., D:] - bias, (plain[..., D:] - bias) / 25)


@pytest.mark.slow
def test_attention_over_the_batch_is_the_same_on_two_devices():
    found = toy.config("tdrg", optim__name="sgd", optim__schedule={"name": "constant"}, optim__lr=0.05)
    found.system.update(attend="batch", layers=1, width=16, heads=2, ffn=16)
    steps = toy.Steps(toy.shallow(found))
    one, losses = steps("jit", 1)
    for kind in ("jit", "pmap"):
        two, other = steps(kind, 2)
        np.testing.assert_allclose(other, losses, rtol=1e-4)
        expected, got = toy.flat(one.params), toy.flat(two.params)
        for path, value in expected.items():
            np.testing.assert_allclose(got[path], value, rtol=2e-3, atol=2e-5, err_msg=f"{kind} {path}")


def test_what_a_user_can_get_wrong(golden):
    with pytest.raises(UserError, match=r"attend is 'bacth'; expected .* .did you mean 'batch'"):
        build(attend="bacth")
    with pytest.raises(UserError, match=r"config.backbone.endpoints to two strides.*not \('16',\)"):
        toy.assembled(toy.config("tdrg", backbone__endpoints=("16",)))
    fine, coarse = maps(golden)
    with pytest.raises(UserError, match="at least 3x3, and it is 2x2"):
        build().init(jax.random.key(0), batch(fine, coarse[:, :, :2, :2]))
    with pytest.raises(UserError, match="3 heads do not divide the width 16"):
        build(heads=3).init(jax.random.key(0), batch(fine, coarse))
