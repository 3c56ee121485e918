"""Query2Label against the authors' golden cases and a plain numpy forward pass by the authors' names; its options."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import released_names
import toy
from mljax.config.reading import read_config
from mljax.errors import UserError
from mljax.layers import sine_position
from mljax.losses.criterion import Criterion
from mljax.systems.query2label import Query2Label
from mljax.weights import published
from toy import close, golden_file, weights

L, HEADS = 7, 4
CASES = {
    "base": {"encoder_layers": 1},
    "proj_selfattn": {"width": 32, "encoder_layers": 2, "self_attention": "all"},
    "noenc_onlyfirst": {"encoder_layers": 0, "self_attention": "first"},
}


def build(labels=L, **settings):
    loss = Criterion.from_config({"name": "asl", "gamma_neg": 2.0, "gamma_pos": 0.0, "clip": 0.0, "eps": 1e-5})
    return Query2Label(backbone=None, criterion=loss, meta=toy.meta(labels), **{"heads": HEADS, "ffn": 64, **settings})


def batch(feature_map, labels=L):
    """From a map as the authors have it, (b d h w)."""
    return toy.batch(toy.nhwc(feature_map), np.zeros((len(feature_map), labels)))


def cases():
    """{case: {"w/..", "in/..", "out/.."}} of those of the golden file that are whole networks."""
    file, found = np.load(golden_file("query2label.npz")), {}
    for key in file:
        case, _, rest = key.partition("/")
        found.setdefault(case, {})[rest] = file[key]
    return {case: arrays for case, arrays in found.items() if "in/feature_map" in arrays}


@functools.partial(jax.jit, static_argnums=0)
def capture(module, variables, data):
    """Outputs, and the attention weights (b k q n) of every attention by the authors' name."""
    out, state = module.apply(variables, data, capture_intermediates=True, mutable=["intermediates"])
    inner, found, layers = state["intermediates"], {}, {}
    for i in range(module.encoder_layers):
        found[f"encoder.layers.{i}.self_attn"] = inner[f"encoder_{i}"]["__call__"][0][1]
    for i in range(module.decoder_layers):
        layers[f"decoder_layer{i}"], found[f"decoder.layers.{i}.multihead_attn"] = inner[f"decoder_{i}"]["__call__"][0]
        if "self_attention" in inner[f"decoder_{i}"]:
            own = inner[f"decoder_{i}"]["self_attention"]["__call__"][0][1]
            found[f"decoder.layers.{i}.self_attn"] = own
    return out, found, layers


# --- a forward pass in numpy, from the authors' names -----------------------------------------------------------------


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def norm(w, name, x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def attention(w, name, query, key, value, heads=HEADS):
    """One image: (q d), (n d), (n d) -> (q d) and weights averaged over heads (q n)."""
    d = query.shape[1]
    parts = zip(np.split(w[f"{name}.in_proj_weight"], 3), np.split(w[f"{name}.in_proj_bias"], 3), strict=True)
    q, k, v = (x @ kernel.T + bias for x, (kernel, bias) in zip((query, key, value), parts, strict=True))
    merged, mean, size = [], 0, d // heads
    for i in range(heads):
        part = slice(i * size, (i + 1) * size)
        weights = softmax(q[:, part] @ k[:, part].T / np.sqrt(size))
        merged.append(weights @ v[:, part])
        mean = mean + weights / heads
    return linear(w, f"{name}.out_proj", np.concatenate(merged, 1)), mean


def feed_forward(w, name, x):
    return linear(w, f"{name}.linear2", np.maximum(linear(w, f"{name}.linear1", x), 0))


def positions(d, height, width):
    """DETR's, number by number: (n d), the first half of the channels for y, the second for x."""
    found = np.zeros((height, width, d))
    for y in range(height):
        for x in range(width):
            for c in range(d):
                place = (y + 1) / (height + 1e-6) if c < d // 2 else (x + 1) / (width + 1e-6)
                j = c % (d // 2)
                angle = place * 2 * np.pi / 10000 ** (2 * (j // 2) / (d // 2))
                found[y, x, c] = np.sin(angle) if j % 2 == 0 else np.cos(angle)
    return found.reshape(height * width, d)


def forward(w, image):
    """One map (d h w) -> logits (l), label features (l d), {name: head-averaged attention}."""
    w = {name: value.astype(np.float64) for name, value in w.items()}
    _, height, width = image.shape
    memory, maps = image.reshape(len(image), -1).T.astype(np.float64), {}
    if "input_proj.weight" in w:
        memory = memory @ w["input_proj.weight"][:, :, 0, 0].T + w["input_proj.bias"]
    position, query = positions(memory.shape[1], height, width), w["query_embed.weight"]
    i = 0
    while (name := f"transformer.encoder.layers.{i}") + ".linear1.bias" in w:
        key = memory + position
        attended, maps[f"encoder.layers.{i}.self_attn"] = attention(w, f"{name}.self_attn", key, key, memory)
        memory = norm(w, f"{name}.norm1", memory + attended)
        memory = norm(w, f"{name}.norm2", memory + feed_forward(w, name, memory))
        i += 1
    x, i = np.zeros_like(query), 0
    while (name := f"transformer.decoder.layers.{i}") + ".linear1.bias" in w:
        if f"{name}.norm1.weight" in w:
            labels = x + query
            attended, maps[f"decoder.layers.{i}.self_attn"] = attention(w, f"{name}.self_attn", labels, labels, x)
            x = norm(w, f"{name}.norm1", x + attended)
        cross = f"decoder.layers.{i}.multihead_attn"
        attended, maps[cross] = attention(w, f"transformer.{cross}", x + query, memory + position, memory)
        x = norm(w, f"{name}.norm2", x + attended)
        x = norm(w, f"{name}.norm3", x + feed_forward(w, name, x))
        i += 1
    x = norm(w, "transformer.decoder.norm", x)
    return (x * w["fc.W"][0]).sum(1) + w["fc.b"][0], x, maps


def random_weights(d=32, ffn=64, encoder=1, decoder=2, attending=(), channels=None, labels=L, seed=0):
    """Weights by the authors' names for any setting."""
    rng, shapes = np.random.default_rng(seed), {"query_embed.weight": (labels, d), "fc.W": (1, labels, d)}
    shapes |= {"fc.b": (1, labels), "transformer.decoder.norm.weight": (d,), "transformer.decoder.norm.bias": (d,)}
    if channels:
        shapes |= {"input_proj.weight": (d, channels, 1, 1), "input_proj.bias": (d,)}
    layers = [(f"transformer.encoder.layers.{i}", ["self_attn"], [1, 2]) for i in range(encoder)]
    for i in range(decoder):
        own = i in attending
        attentions = ["self_attn"] * own + ["multihead_attn"]
        layers.append((f"transformer.decoder.layers.{i}", attentions, [1] * own + [2, 3]))
    for name, attentions, norms in layers:
        shapes |= {f"{name}.linear1.weight": (ffn, d), f"{name}.linear1.bias": (ffn,)}
        shapes |= {f"{name}.linear2.weight": (d, ffn), f"{name}.linear2.bias": (d,)}
        for a in attentions:
            shapes |= {f"{name}.{a}.in_proj_weight": (3 * d, d), f"{name}.{a}.in_proj_bias": (3 * d,)}
            shapes |= {f"{name}.{a}.out_proj.weight": (d, d), f"{name}.{a}.out_proj.bias": (d,)}
        for i in norms:
            shapes |= {f"{name}.norm{i}.weight": (d,), f"{name}.norm{i}.bias": (d,)}
    return {name: rng.normal(scale=0.3, size=shape).astype(np.float32) for name, shape in shapes.items()}


# --- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_golden_case(case):
    found = cases()
    if case not in found:
        pytest.skip(f"the golden file on this machine has no case {case!r}")
    arrays, module = found[case], build(**CASES[case])
    variables = published.convert_head(weights(arrays), module)
    out, attentions, layers = capture(module, variables, batch(arrays["in/feature_map"]))
    close(out.logits, arrays["out/logits"])
    close(out.label_features, arrays["out/label_features"])
    close(np.moveaxis(out.extra["memory"], -1, 1), arrays["out/memory"])
    for name, value in attentions.items():
        close(value.mean(1), arrays[f"out/attn_{name}"])
    for name, value in layers.items():
        close(value.swapaxes(0, 1), arrays[f"out/{name}"])
    last = attentions[f"decoder.layers.{module.decoder_layers - 1}.multihead_attn"]
    np.testing.assert_array_equal(out.attention.reshape(last.shape), last)


def test_golden_gradient():
    arrays, module = cases()["base"], build(**CASES["base"])
    variables, data = published.convert_head(weights(arrays), module), batch(arrays["in/feature_map"])
    grads = jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(module.apply({"params": p}, data).logits))))(
        variables["params"]
    )
    wanted = {name: arrays[f"out/grad_sum_sq_logits/{name}"] for name in ("query_embed.weight", "fc.W")}
    np.testing.assert_allclose(grads["queries"], wanted["query_embed.weight"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(grads["classifier"]["kernel"], wanted["fc.W"][0], rtol=1e-4, atol=1e-4)


def test_the_numpy_pass_is_the_authors():
    arrays = cases()["base"]
    logits, features, maps = forward(weights(arrays), arrays["in/feature_map"][0])
    close(logits, arrays["out/logits"][0])
    close(features, arrays["out/label_features"][0])
    for name, value in maps.items():
        close(value, arrays[f"out/attn_{name}"][0])


@pytest.mark.parametrize(
    ("settings", "made"),
    [
        (
            {"encoder_layers": 2, "self_attention": "all", "width": 32},
            {"encoder": 2, "attending": (0, 1), "channels": 24},
        ),
        ({"encoder_layers": 0, "self_attention": "first"}, {"encoder": 0, "attending": (0,)}),
        ({"self_attention": "others", "decoder_layers": 3}, {"decoder": 3, "attending": (1, 2)}),
        ({"self_attention": "all", "decoder_layers": 1, "ffn": None}, {"decoder": 1, "attending": (0,), "ffn": 128}),
        ({"self_attention": "first", "decoder_layers": 1}, {"decoder": 1, "attending": (0,)}),
        ({"width": 32}, {"channels": 32}),
    ],
)
def test_every_option_equals_numpy(settings, made):
    w = random_weights(**made)
    image = np.random.default_rng(1).normal(size=(2, made.get("channels", 32), 2, 3)).astype(np.float32)
    module = build(**settings)
    out, attentions, _ = capture(module, published.convert_head(w, module), batch(image))
    for i in range(2):
        logits, features, maps = forward(w, image[i])
        close(out.logits[i], logits)
        close(out.label_features[i], features)
        assert maps.keys() == attentions.keys()
        for name, value in maps.items():
            close(attentions[name][i].mean(0), value)


@pytest.mark.parametrize(("d", "side"), [(32, 3), (64, 14), (64, 12), (2048, 14)])
def test_positions_are_the_authors(d, side):
    file = np.load(golden_file("query2label.npz"))
    name = f"pos/out/pe_d{d}_h{side}"
    got = np.moveaxis(sine_position(side, side, d).reshape(1, side, side, d), -1, 1)
    wanted, got = (file[name], got) if name in file else (file[f"{name}_every16th_channel"], got[:, ::16])
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("init", "qkv", "out", "ffn", "bias"),
    [
        ("xavier", (6 / 128) ** 0.5, (6 / 128) ** 0.5, (6 / 320) ** 0.5, 0.0),
        ("stacked", (6 / 256) ** 0.5, (6 / 128) ** 0.5, (6 / 320) ** 0.5, 64**-0.5),
        ("torch", (6 / 256) ** 0.5, 64**-0.5, 64**-0.5, 64**-0.5),
    ],
)
def test_initial_values_are_within_the_limits_of_torch(init, qkv, out, ffn, bias):
    """d 64, feed-forward 256: Xavier's sqrt(6 / (in + out)), q, k and v as one (192 64) matrix; 1 / sqrt(in)."""
    module = build(ffn=256, initial=init, self_attention="all", decoder_layers=1)
    data = batch(np.ones((1, 64, 2, 2), np.float32))
    params = jax.jit(module.init)(jax.random.key(0), data)["params"]
    layer = params["decoder_0"]["cross"]
    for attention in (layer["attention"], params["decoder_0"]["self_attention"], params["encoder_0"]["attention"]):
        for name, limit in (("query", qkv), ("key", qkv), ("value", qkv), ("out", out)):
            kernel = np.abs(attention[name]["kernel"])
            assert 0.97 * limit < kernel.max() <= limit and not attention[name]["bias"].any(), name
    assert 0.97 * ffn < np.abs(layer["ffn"]["in"]["kernel"]).max() <= ffn
    found = np.abs(layer["ffn"]["in"]["bias"]).max()
    assert 0.9 * bias <= found <= bias
    assert np.abs(layer["ffn"]["out"]["bias"]).max() <= (256**-0.5 if bias else 0)


def test_papers_words_start_as_the_authors_code():
    starts = {"query2label": "stacked", "ml_decoder": "torch", "tdrg": "stacked"}
    for name, init in starts.items():
        assert read_config(f"configs/{name}.py:coco2014").system.initial == init
        assert "initial" not in read_config(f"configs/{name}.py:voc_resplit").system


def test_loss_is_the_simplified_asymmetric_loss():
    """Element by element: gamma 2 on negatives without gradient through it, mean over labels and images."""
    w, image = random_weights(), np.random.default_rng(1).normal(size=(3, 32, 2, 3)).astype(np.float32)
    module, data = build(dropout=0.0), batch(image)
    data["labels"] = (np.random.default_rng(2).random((3, L)) < 0.4).astype(np.float32)
    loss, terms = jax.jit(functools.partial(module.apply, method="loss"))(published.convert_head(w, module), data, 0)
    total = 0.0
    for i in range(3):
        for x, y in zip(forward(w, image[i])[0], data["labels"][i], strict=True):
            p = 1 / (1 + np.exp(-x))
            total += -np.log(max(p, 1e-5)) if y else -(p**2) * np.log(max(1 - p, 1e-5))
    np.testing.assert_allclose(loss, total / (3 * L), rtol=1e-4)
    assert terms == {}


# --- what a user sets -------------------------------------------------------------------------------------------------


def test_nothing_depends_on_the_size_of_the_map():
    module = build(decoder_layers=1)
    variables = published.convert_head(random_weights(decoder=1), module)
    for height, width in ((3, 3), (2, 5), (1, 1)):
        data = batch(np.ones((2, 32, height, width), np.float32))
        out = jax.jit(module.apply)(variables, data)
        assert out.attention.shape == (2, HEADS, L, height, width)
        np.testing.assert_allclose(out.attention.sum((-2, -1)), 1, rtol=1e-5)


def test_one_label_and_dropout_in_training_only():
    module, data = build(labels=1, dropout=0.5), batch(np.ones((2, 32, 2, 2), np.float32), labels=1)
    variables = published.convert_head(random_weights(labels=1), module)

    @functools.partial(jax.jit, static_argnames="train")
    def forward(variables, key, train):
        return module.apply(variables, data, train=train, rngs={"dropout": key}).logits

    still = [forward(variables, jax.random.key(seed), train=False) for seed in (0, 1)]
    np.testing.assert_array_equal(*still)
    moved = forward(variables, jax.random.key(0), train=True)
    assert np.abs(moved - still[0]).max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"self_attention": "al"},
            r"self_attention is 'al'; expected one of none, first, others, all \(did you mean 'all'",
        ),
        ({"width": 30}, "width is 30; 2-D sine positions need a multiple of 4"),
        ({"width": 32, "heads": 3}, "heads=3 do not divide config.system.width=32"),
        ({"heads": 0}, "heads is 0; expected at least 1"),
        ({"decoder_layers": 0}, "decoder_layers is 0; expected at least 1"),
        ({"encoder_layers": -1}, "encoder_layers is -1; expected at least 0"),
        ({"ffn": 0}, "ffn is 0; expected at least 1"),
    ],
)
def test_wrong_settings(settings, said):
    with pytest.raises(UserError, match=said):
        build(**settings)


def test_heads_that_do_not_divide_the_backbones_channels():
    module = build(heads=3)
    with pytest.raises(UserError, match="3 heads do not divide the width 32"):
        jax.eval_shape(module.init, jax.random.key(0), batch(np.ones((1, 32, 2, 2), np.float32)))


# --- released checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "made", "said"),
    [
        ({"ffn": 128}, {}, "made with config.system.ffn=64 and the config has 128"),
        ({"ffn": None}, {}, "made with config.system.ffn=64 and the config has None"),
        ({"encoder_layers": 0}, {}, "encoder_layers=1 and the config has 0"),
        ({"decoder_layers": 3}, {}, "decoder_layers=2 and the config has 3"),
        ({"self_attention": "all"}, {"attending": (0,)}, "self_attention='first' and the config has 'all'"),
        ({}, {"channels": 24}, "width=32 and the config has None"),
        ({"width": 32}, {}, "width=None and the config has 32"),
    ],
)
def test_a_checkpoint_of_other_settings_names_the_setting(settings, made, said):
    with pytest.raises(UserError, match=said):
        published.convert_head(random_weights(**made), build(**settings))


def test_a_cut_checkpoint_and_a_strange_one():
    w = random_weights()
    with pytest.raises(UserError, match="no place for 'strange.weight'"):
        published.convert_head(w | {"strange.weight": np.ones(3, np.float32)}, build())
    del w["transformer.decoder.norm.bias"]
    with pytest.raises(UserError, match="have no 'transformer.decoder.norm.bias'"):
        published.convert_head(w, build())


RELEASED = {
    "resnet101": ("r101", {"ffn": 8192}),
    "tresnetl": ("tresnet_l", {}),
    "tresnetl_v2": ("tresnet_l_22k", {}),
    "swin_L_384_22k": ("swin_l", {}),
    "CvT_w24": ("cvt_w24", {}),
}


@pytest.mark.parametrize("title", RELEASED)
def test_full_size_names_and_shapes_are_those_of_the_released_files(title):
    """Every array of a checkpoint finds its place, and every parameter of the full-size system is filled."""
    word, settings = RELEASED[title]
    state = released_names.state_dict(f"Q2L {title}", trunk="backbone.0.body." if title == "resnet101" else "")
    counters = sum(name.endswith("running_mean") for name in state) if title == "CvT_w24" else 0  # counted, not listed
    assert len(state) + counters == released_names.total(f"Q2L {title}")
    found = read_config(f"configs/query2label.py:{word}").unlock()
    found.system.update(settings)
    saved = {f"module.{name}": x for name, x in state.items()}  # as by DataParallel
    released_names.fits(found, toy.meta(80), saved)
