"""ML-Decoder against the authors' golden cases and a numpy forward pass by their names; groups, zero-shot mode."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import released_names
import toy
from mljax.config.reading import read_config
from mljax.errors import UserError
from mljax.losses.criterion import Criterion
from mljax.systems.ml_decoder import MLDecoder, with_labels
from mljax.weights import published
from toy import close, weights

CASES = {
    "full": (7, {}),
    "groups": (23, {"groups": 5}),
    "tokens": (7, {}),
    "zsl": (6, {"zero_shot": True}),
}


def build(labels, vectors=None, **settings):
    loss = Criterion.from_config({"name": "asl", "gamma_neg": 4.0, "gamma_pos": 0.0, "clip": 0.05, "reduction": "sum"})
    sizes = {"width": 32, "heads": 8, "ffn": 2048}
    return MLDecoder(backbone=None, criterion=loss, meta=toy.meta(labels, vectors=vectors), **{**sizes, **settings})


def batch(feature_map, labels):
    """feature_map: (b h w d)."""
    return toy.batch(feature_map, np.zeros((len(feature_map), labels)))


@functools.partial(jax.jit, static_argnums=0)
def apply(module, variables, data):
    return module.apply(variables, data)


def parts(module, data, *paths, seed=0):
    """Some initial variables; the others are not computed."""

    @jax.jit
    def of(key):
        variables = module.init(key, data)
        return [variables[collection][name] for collection, name in (path.split("/") for path in paths)]

    return jax.device_get(of(jax.random.key(seed)))


def golden(case):
    arrays = toy.golden("ml_decoder", f"{case}/")
    return weights(arrays), arrays


def as_map(feature_map):
    """The authors take (b d h w) or (b tokens d)."""
    if feature_map.ndim == 3:
        b, n, d = feature_map.shape
        return feature_map.reshape(b, 3, n // 3, d)
    return np.moveaxis(feature_map, 1, -1)


# --- a forward pass in numpy, from the authors' names -----------------------------------------------------------------


def norm(w, name, x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def cross_attention(w, name, query, memory, heads):
    d = query.shape[1]
    inputs = zip(
        (query, memory, memory), np.split(w[f"{name}.in_proj_weight"], 3), np.split(w[f"{name}.in_proj_bias"], 3)
    )
    (q, k, v), merged, size = [x @ kernel.T + bias for x, kernel, bias in inputs], [], d // heads
    for i in range(heads):
        part = slice(i * size, (i + 1) * size)
        e = np.exp(q[:, part] @ k[:, part].T / np.sqrt(size))
        merged.append(e / e.sum(1, keepdims=True) @ v[:, part])
    return linear(w, f"{name}.out_proj", np.concatenate(merged, 1))


def forward(w, image, labels, vectors=None, heads=8):
    """One map (h w d) -> logits (l) and queries after the decoder (q d)."""
    w = {name.removeprefix("head."): value.astype(np.float64) for name, value in w.items()}
    memory = np.maximum(linear(w, "decoder.embed_standart", image.reshape(-1, image.shape[-1])), 0)
    words = vectors is not None
    x = np.maximum(linear(w, "wordvec_proj", vectors), 0) if words else w["decoder.query_embed.weight"]
    layer = "decoder.layers.0"
    x = norm(w, f"{layer}.norm1", 2 * x)
    x = norm(w, f"{layer}.norm2", x + cross_attention(w, f"{layer}.multihead_attn", x, memory, heads))
    hidden = np.maximum(linear(w, f"{layer}.linear1", x), 0)
    x = norm(w, f"{layer}.norm3", x + linear(w, f"{layer}.linear2", hidden))
    pooling, bias = w["decoder.duplicate_pooling"], w["decoder.duplicate_pooling_bias"]
    logits = []
    for i in range(labels):
        if words:
            logits.append(x[i] @ pooling[:, 0] + bias[0])
        else:
            slots = pooling.shape[2]
            logits.append(x[i // slots] @ pooling[i // slots, :, i % slots] + bias[i])
    return np.array(logits), x


# --- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_golden_case(case):
    w, arrays = golden(case)
    labels, settings = CASES[case]
    module = build(labels, arrays.get("in/word_vectors"), **settings)
    feature_map = as_map(arrays["in/feature_map"])
    out = apply(module, published.convert_head(w, module), batch(feature_map, labels))
    close(out.logits, arrays["out/logits"])
    queries = arrays["out/queries_after_decoder"].swapaxes(0, 1)
    close(out.extra["query_features"], queries)
    maps = out.extra["query_attention"]
    close(maps.mean(1).reshape(arrays["out/attention"].shape), arrays["out/attention"])
    share = -(-labels // queries.shape[1])
    assert out.label_features.shape[1] == out.attention.shape[2] == labels
    for i in range(labels):
        np.testing.assert_array_equal(out.label_features[:, i], out.extra["query_features"][:, i // share])
        np.testing.assert_array_equal(out.attention[:, :, i], maps[:, :, i // share])


@pytest.mark.parametrize("case", CASES)
def test_the_numpy_pass_is_the_authors(case):
    w, arrays = golden(case)
    image = as_map(arrays["in/feature_map"])[0]
    logits, queries = forward(w, image, CASES[case][0], arrays.get("in/word_vectors"))
    close(logits, arrays["out/logits"][0])
    close(queries, arrays["out/queries_after_decoder"][:, 0])


def test_names_with_and_without_the_wrapper_mean_the_same():
    w, _ = golden("groups")
    module = build(23, groups=5)
    wrapped = {f"module.head.{name}": value for name, value in w.items()}
    wrapped["module.body.conv1.0.weight"] = np.ones((4, 48, 3, 3), np.float32)
    jax.tree.map(
        np.testing.assert_array_equal, published.convert_head(w, module), published.convert_head(wrapped, module)
    )


def test_loss_is_the_asymmetric_loss_summed():
    w, arrays = golden("groups")
    module, labels = build(23, groups=5, dropout=0.0), 23
    data = batch(as_map(arrays["in/feature_map"]), labels)
    data["labels"] = (np.random.default_rng(0).random((3, labels)) < 0.3).astype(np.float32)
    value, _ = jax.jit(functools.partial(module.apply, method="loss"))(published.convert_head(w, module), data, 0)
    total = 0.0
    for x, y in zip(arrays["out/logits"].ravel(), data["labels"].ravel(), strict=True):
        p = 1 / (1 + np.exp(-float(x)))
        shifted = max(p - 0.05, 0)
        total -= np.log(p) if y else shifted**4 * np.log(1 - shifted)
    np.testing.assert_allclose(value, total, rtol=1e-4)


# --- queries ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "groups", "queries", "slots"),
    [
        (80, None, 80, 1),
        (100, None, 100, 1),
        (9605, 200, 200, 49),
        (10_000, None, 100, 100),
        (20, 7, 7, 3),
        (1, None, 1, 1),
    ],
)
def test_how_many_labels_share_a_query(labels, groups, queries, slots):
    module = build(labels, groups=groups, width=16, ffn=8)
    data = batch(np.ones((2, 2, 2, 3), np.float32), labels)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), data))
    assert shapes["constants"]["queries"].shape == (queries, 16)
    assert shapes["params"]["kernel"].shape == (queries, 16, slots) and shapes["params"]["bias"].shape == (labels,)
    out = jax.eval_shape(module.apply, shapes, data)
    assert out.logits.shape == (2, labels) and out.attention.shape == (2, 8, labels, 2, 2)


def test_ten_thousand_labels_equal_numpy():
    labels = 10_000
    module = build(labels, width=16, ffn=8)
    image = np.random.default_rng(0).normal(size=(1, 2, 2, 3)).astype(np.float32)
    variables = jax.jit(module.init)(jax.random.key(0), batch(image, labels))
    p, queries = variables["params"], variables["constants"]["queries"]
    kernel = np.random.default_rng(1).normal(size=(100, 16, 100)).astype(np.float32)
    out = apply(module, {**variables, "params": {**p, "kernel": kernel}}, batch(image, labels))
    features = np.asarray(out.extra["query_features"][0])
    for label in (0, 99, 100, 5_050, 9_999):
        np.testing.assert_allclose(
            out.logits[0, label], features[label // 100] @ kernel[label // 100, :, label % 100], rtol=1e-4
        )
    assert queries.shape == (100, 16)


def test_initial_values_are_those_of_the_authors():
    """Queries N(0, 1); the classifier Xavier-normal with torch's fans of a tensor (q d slots)."""
    module = build(2000, groups=100, width=64, ffn=8)
    data = batch(np.ones((1, 2, 2, 3), np.float32), 2000)
    queries, kernel, bias = parts(module, data, "constants/queries", "params/kernel", "params/bias")
    np.testing.assert_allclose(queries.std(), 1, rtol=0.05)
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (64 * 20 + 100 * 20)), rtol=0.02)
    assert not bias.any()
    zero_shot = build(4, np.ones((4, 5), np.float32), zero_shot=True, width=4096, ffn=8)
    (kernel,) = parts(zero_shot, batch(np.ones((1, 1, 1, 3), np.float32), 4), "params/kernel")
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / 4097), rtol=0.05)


def test_queries_are_fixed():
    """They are no parameters, and the seed of the run draws them."""
    module, data = build(7), batch(np.ones((1, 2, 2, 3), np.float32), 7)
    drawn = [parts(module, data, "constants/queries", seed=seed)[0] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.abs(drawn[0] - drawn[2]).max() > 0.1
    assert "queries" not in jax.eval_shape(module.init, jax.random.key(0), data)["params"]


# --- zero-shot mode ---------------------------------------------------------------------------------------------------


def test_other_labels_in_the_zero_shot_mode():
    """Labels that were never trained are scored by their vectors; labels do not see each other."""
    w, arrays = golden("zsl")
    vectors, image = arrays["in/word_vectors"], as_map(arrays["in/feature_map"])
    module = build(6, vectors, zero_shot=True)
    variables = published.convert_head(w, module)
    new = np.random.default_rng(0).normal(size=(9, 300)).astype(np.float32)
    new[4] = vectors[2]
    system, changed = with_labels(module, variables, toy.meta(9, vectors=new))
    out = apply(system, changed, batch(image, 9))
    for i in range(3):
        close(out.logits[i], forward(w, image[i], 9, new)[0])
    close(out.logits[:, 4], arrays["out/logits"][:, 2])
    np.testing.assert_array_equal(variables["constants"]["vectors"], vectors)


def test_word_vectors_get_no_gradient_and_their_projection_does():
    w, arrays = golden("zsl")
    module = build(6, arrays["in/word_vectors"], zero_shot=True)
    variables, data = published.convert_head(w, module), batch(as_map(arrays["in/feature_map"]), 6)
    squares = jax.grad(lambda p: jnp.sum(module.apply({**variables, "params": p}, data).logits ** 2))
    grads = jax.jit(squares)(variables["params"])
    assert np.abs(grads["words"]["kernel"]).max() > 0 and "vectors" not in grads


# --- what a user can get wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"groups": 8}, "groups is 8 and 'toy' has 7 labels; give at most as many"),
        ({"groups": 0}, "groups is 0; expected at least 1"),
        ({"heads": 5}, "heads=5 do not divide config.system.width=32"),
        ({"ffn": 0}, "ffn is 0; expected at least 1"),
        ({"zero_shot": True}, "there are none for 'toy'; set config.vectors"),
        ({"zero_shot": True, "groups": 3}, "one query per label; set config.system.groups=None"),
    ],
)
def test_wrong_settings(settings, said):
    with pytest.raises(UserError, match=said):
        build(7, **settings)


def test_other_labels_need_the_zero_shot_mode_and_vectors_of_the_same_width():
    with pytest.raises(UserError, match="train it with config.system.zero_shot=True"):
        with_labels(build(7), {}, toy.meta(3, vectors=np.ones((3, 5))))
    with pytest.raises(UserError, match=r"shape \(3, 4\) and should have \(labels, 5\)"):
        with_labels(build(7, np.ones((7, 5), np.float32), zero_shot=True), {}, toy.meta(3, vectors=np.ones((3, 4))))


@pytest.mark.parametrize(
    ("case", "settings", "said"),
    [
        ("full", {"zero_shot": True, "vectors": np.ones((7, 300), np.float32)}, "not of the zero-shot mode; .*=False"),
        ("zsl", {}, "are of the zero-shot mode; set config.system.zero_shot=True"),
        ("groups", {}, "groups=5 and the config has 7"),
        ("full", {"width": 64}, "width=32 and the config has 64"),
        ("full", {"ffn": 64}, "ffn=2048 and the config has 64"),
    ],
)
def test_a_checkpoint_of_other_settings_names_the_setting(case, settings, said):
    with pytest.raises(UserError, match=said):
        published.convert_head(golden(case)[0], build(7, **settings))


# --- released checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["M", "L", "XL"])
def test_full_size_names_and_shapes_are_those_of_the_released_files(size):
    state = released_names.state_dict(f"ML-Decoder TResNet-{size}")
    assert len(state) == released_names.total(f"ML-Decoder TResNet-{size} ")
    found = read_config(f"configs/ml_decoder.py:tresnet_{size.lower()}").unlock()
    released_names.fits(found, toy.meta(80), state)


def test_full_size_zero_shot_names():
    """As the full decoder, less the queries, with the projection of word vectors and one classifier for all labels."""
    state = released_names.state_dict("ML-Decoder TResNet-M")
    state = {name: value for name, value in state.items() if "query_embed" not in name and "duplicate" not in name}
    shapes = {"wordvec_proj.weight": (768, 300), "wordvec_proj.bias": (768,)}
    shapes |= {"decoder.duplicate_pooling": (768, 1), "decoder.duplicate_pooling_bias": (1,)}
    state |= {f"head.{name}": np.broadcast_to(released_names.PLACEHOLDER, shape) for name, shape in shapes.items()}
    found = read_config("configs/ml_decoder.py:tresnet_m,zero_shot").unlock()
    released_names.fits(found, toy.meta(81, vectors=np.ones((81, 300), np.float32)), state)
