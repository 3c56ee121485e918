"""MulCon against the authors' golden case and plain numpy, its contrastive loss with its memory, and the two steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toy
from mljax import experiment, train
from mljax.config.reading import read_config
from mljax.config.stages import stage_configs
from mljax.config.text import differences
from mljax.errors import UserError
from mljax.losses import contrastive
from mljax.losses.criterion import Criterion
from mljax.rundir.checkpoint import Checkpoints
from mljax.systems.mulcon import PUBLISHED, MulCon, every_view
from mljax.weights import published
from torch_writer import bare_resnet, tensors, torch_zip
from toy import golden_file, weights

L, D, K = 5, 8, 2
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def meta(labels=L):
    return toy.meta(np.ones((4, labels)))


def build(labels=L, **settings):
    loss = Criterion.from_config({"name": "bce", "reduction": "mean"})
    small = {"width": 6, "heads": K, "embedding_width": 4, "std": 0.5}
    return MulCon(backbone=None, criterion=loss, meta=meta(labels), **(small | settings))


CROSS = {"token_layers": 0, "label_layers": 0}
PAPER = {**CROSS, "norm": False, "relu": False, "scale": "none", "queries": "normal"}


# Compiled once for all tests whose systems have equal settings and whose batches have equal shapes.


def init(system, data):
    """Parameters of the initial shapes, drawn by numpy: the random numbers of JAX take seconds to compile."""
    rng, drawn = np.random.default_rng(0), jax.eval_shape(system.init, jax.random.key(0), data)
    return jax.tree.map(lambda p: rng.normal(0, 0.5, p.shape).astype(np.float32), drawn)


@functools.partial(jax.jit, static_argnums=0)
def apply(system, variables, data):
    return system.apply(variables, data)


@functools.partial(jax.jit, static_argnums=0)
def loss_of(system, variables, data):
    return system.apply(variables, data, 0, method="loss")


def batch(b=6, labels=L, seed=0):
    """Two cached views of b images, one of them padding, some labels unknown."""
    rng = np.random.default_rng(seed)
    views = rng.normal(size=(b, 2, 2, 3, D)).astype(np.float32)
    y, z = (rng.random((b, labels)) < share for share in (0.5, 0.8))
    return toy.batch(views[:, 0], y, observed=z, mask=np.arange(b) < b - 1, views={"32": views})


# --- the authors' code ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
    return toy.golden("mulcon", "base/")


@pytest.fixture(scope="module")
def released(golden):
    """The system of the golden case and the authors' arrays."""
    system = build(6, width=24, heads=4, embedding_width=16)
    return system, weights(golden)


def test_golden_forward(golden, released):
    system, state = released
    variables = published.convert_head(state, system)
    y = golden["in/labels"]
    x = golden["in/feature_map"].transpose(0, 2, 3, 1)
    data = {"endpoints": {"32": x}, "labels": y, "observed": np.ones_like(y), "mask": np.ones(4, np.float32)}
    options = {"capture_intermediates": True, "mutable": ["intermediates"]}
    out, seen = jax.jit(functools.partial(system.apply, **options))(variables, data)
    inside = {k: v["__call__"][0][0] for k, v in seen["intermediates"]["attention"].items() if k != "__call__"}
    found = {
        "tokens_after_sab1": inside["tokens_0"],
        "tokens_after_sab2": inside["tokens_1"],
        "label_features_before_label_selfattn": inside["cross"],
        "label_features": out.label_features,
        "logits": out.logits,
        "embeddings": out.extra["embeddings"].reshape(24, 16),
        "cross_attention": out.attention.transpose(1, 0, 2, 3, 4).reshape(16, 6, 9),  # theirs: head * B + image
        "bce_loss": system.criterion(out.logits, data),
    }
    for name, value in found.items():
        if f"out/{name}" in golden:
            np.testing.assert_allclose(value, golden[f"out/{name}"], err_msg=name, **CLOSE)
    assert {"out/logits", "out/cross_attention", "out/embeddings"} <= set(golden)


def test_golden_contrastive_loss_and_gradient(golden):
    z, y = jnp.asarray(golden["out/embeddings"]).reshape(4, 6, 16), jnp.asarray(golden["in/labels"])
    value, gradient = jax.jit(jax.value_and_grad(contrastive.label_contrastive))(z, y)
    np.testing.assert_allclose(value, golden["out/supcon_loss"], **CLOSE)
    np.testing.assert_allclose(gradient.reshape(24, 16), golden["out/supcon_grad_embeddings"], **CLOSE)


def test_golden_filled_denominator(golden):
    """losses.npz: 14 active rows and 4 that have no label, which only denominators see."""
    with np.load(golden_file("losses.npz")) as file:
        features, rows = file["in/supcon_features"], file["in/supcon_labels"]
        names = [name for name in file.files if name.startswith("out/mulcon_supcon/tau0.2_lenpos14")]
        wanted = {name.rpartition("/")[2]: file[name] for name in names}
    place = np.where(rows.any(1), rows.argmax(1), 0)  # one "image" per row: its embedding at its label
    z = np.zeros((18, 6, 16), np.float32)
    z[np.arange(18), place] = features
    others = np.zeros((18, 6), np.float32)
    others[np.arange(18), place] = 1 - rows.any(1)
    value, gradient = jax.jit(jax.value_and_grad(contrastive.label_contrastive))(jnp.asarray(z), rows, others)
    np.testing.assert_allclose(value, wanted["loss"], **CLOSE)
    np.testing.assert_allclose(gradient[np.arange(18), place], wanted["grad"], **CLOSE)


def test_names_that_do_not_fit_are_said(released):
    system, state = released
    stripped = {k: v for k, v in state.items() if not k.startswith("netP")}
    with pytest.raises(UserError, match=r"no netP.*contrast=0"):
        published.convert_head(stripped, system)
    first = build(6, width=24, heads=4, contrast=0.0)
    for given in (stripped, state):
        assert set(published.convert_head(given, first)["params"]) == {"attention", "classifier"}
    with pytest.raises(UserError, match=r"no place for 'netA.mab.ln0"):
        published.convert_head(state, build(6, width=24, heads=4, norm=False))
    with pytest.raises(UserError, match=r"level='label'"):
        published.convert_head(state, build(6, level="image"))


def test_files_of_the_networks_become_one_state(released, tmp_path):
    """`epoch_15_net_A.pth` and its sisters, the trunk numbered as a Sequential; DataParallel's prefix goes."""
    system, state = released
    parts = {name.partition(".")[0] for name in state}
    for part in parts:
        inner = {k.removeprefix(f"{part}."): v for k, v in state.items() if k.startswith(f"{part}.")}
        torch_zip(tmp_path / f"ema_epoch_15_net_{part[3:]}.pth", tensors(inner))
    number = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    trunk = {k: v for k, v in bare_resnet((2, 2, 2, 2), False).items() if not k.startswith("fc.")}
    trunk = {f"{number[k.partition('.')[0]]}.{k.partition('.')[2]}": v for k, v in trunk.items()}
    torch_zip(tmp_path / "ema_epoch_15_net_E.pth", tensors(trunk))
    found = published.read_files(sorted(tmp_path.iterdir()), PUBLISHED)
    e, head = published.split(found, PUBLISHED)
    assert set(e) == set(trunk) and set(head) == set(state)
    wanted, got = published.convert_head(state, system), published.convert_head(found, system)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    with pytest.raises(UserError, match="is not named like the files"):
        published.read_files([tmp_path / "epoch_15.pth"], PUBLISHED)
    files = sorted(tmp_path.iterdir())
    (tmp_path / "notes.txt").write_text("not a network")
    assert set(published.read_files([tmp_path], PUBLISHED)) == set(found)  # the folder stands for its files
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="other holds no file"):
        published.read_files([tmp_path / "other"], PUBLISHED)
    for name, sentence in (
        ("ema_epoch_15_net_A.pth", "are the same network"),
        ("epoch_15_net_C_9.pth", "of different"),
    ):
        more = tmp_path / "other" / name
        torch_zip(more, {})
        with pytest.raises(UserError, match=f"_net_.*pth and .*other/{name} are {sentence.removeprefix('are ')}"):
            published.read_files([*files, more], PUBLISHED)


# --- plain numpy ----------------------------------------------------------------------------------------------------


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def block(p, query, memory, plain, scale):
    """One image: (q d), (n e) -> (q width)."""
    q, k, v = dense(p["query"], query), dense(p["key"], memory), dense(p["value"], memory)
    o, size = q.copy(), q.shape[1] // K
    for head in range(K):
        part = slice(head * size, (head + 1) * size)
        s = np.exp(q[:, part] @ k[:, part].T * scale(q.shape[1], size))
        o[:, part] += s / s.sum(1, keepdims=True) @ v[:, part]
    if plain:
        return o + dense(p["out"], o)
    o = norm(p["norm1"], o)
    return norm(p["norm2"], o + np.maximum(dense(p["out"], o), 0))


def forward(params, feature_map, plain, scale):
    """One image: label features, logits, embeddings."""
    p, x = params["attention"], feature_map.reshape(-1, D)
    for i in range(0 if plain else 2):
        x = block(p[f"tokens_{i}"], x, x, plain, scale)
    u = block(p["cross"], p["queries"], x, plain, scale)
    if not plain:
        u = block(p["labels_0"], u, u, plain, scale)
    logits = [u[c] @ params["classifier"]["kernel"][c] + params["classifier"]["bias"][c] for c in range(L)]
    z = dense(params["projector"]["out"], np.maximum(dense(params["projector"]["hidden"], u), 0))
    return u, np.array(logits), z / np.linalg.norm(z, axis=1, keepdims=True)


def loop_contrast(z, active, others, temperature, how):
    """z (b l d), entry by entry."""
    entries = [(i, c) for i, c in np.argwhere(active + others > 0)]
    anchors, total = [(i, c) for i, c in np.argwhere(active)], 0.0
    for a in anchors:
        rest = [o for o in entries if o != a]
        same = [o for o in rest if o[1] == a[1] and active[o]]
        log_sum = np.log(sum(np.exp(z[a] @ z[o] / temperature) for o in rest)) if rest else 0
        total -= np.mean([z[a] @ z[o] / temperature - log_sum for o in same]) if same else 0
    return total if how == "sum" else total / max(len(anchors), 1)


def loop_fill(logits, active, allowed, size):
    free = [(i, c) for i, c in np.argwhere((allowed > 0) & (active == 0))]
    chosen = sorted(free, key=lambda e: -logits[e])[: max(0, int(size - active.sum()))]
    others = np.zeros_like(active)
    for entry in chosen:
        others[entry] = 1
    return others


@pytest.mark.parametrize("variant", ["code", "paper", "heads"])
def test_forward_equals_numpy(variant):
    settings = {"code": {}, "paper": PAPER, "heads": {"scale": "heads"}}[variant]
    scale = {
        "code": lambda width, size: width**-0.5,
        "paper": lambda width, size: 1,
        "heads": lambda width, size: size**-0.5,
    }
    system, data = build(**settings), batch()
    variables = init(system, data)
    out = apply(system, variables, data)
    for i, image in enumerate(data["endpoints"]["32"]):
        u, logits, z = forward(variables["params"], image, variant == "paper", scale[variant])
        np.testing.assert_allclose(out.label_features[i], u, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(out.logits[i], logits, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(out.extra["embeddings"][i], z, rtol=1e-4, atol=1e-5)
    assert out.attention.shape == (6, K, L, 2, 3)


CONTRASTS = [("mean", 0), ("sum", 0), ("mean", 30), ("sum", 30)]


@pytest.fixture(scope="module")
def losses():
    """A batch, its variables, and the losses by `CONTRASTS`: the network in common is compiled once."""
    data, options = batch(), {"contrast": 0.3, "temperature": 0.5}
    systems = {(how, size): build(how=how, denominator=size, **options) for how, size in CONTRASTS}
    variables = init(systems["mean", 0], data)

    @jax.jit
    def every(variables, data):
        return {case: system.apply(variables, data, 0, method="loss") for case, system in systems.items()}

    return data, variables, every(variables, data)


@pytest.mark.parametrize(("how", "denominator"), CONTRASTS)
def test_loss_equals_numpy(losses, how, denominator):
    """BCE over both views and the weighted contrast of the known labels; padding and unknown labels take no part."""
    data, variables, found = losses
    loss, terms = found[how, denominator]
    images = np.float64(data["views"]["32"]).reshape(12, 2, 3, D)
    found = [forward(variables["params"], x, False, lambda width, size: width**-0.5) for x in images]
    logits, z = np.stack([f[1] for f in found]), np.stack([f[2] for f in found])
    known = np.repeat(data["observed"] * data["mask"][:, None], 2, 0)
    y = np.repeat(data["labels"], 2, 0) * known
    bce = np.log1p(np.exp(logits)) - y * logits
    others = loop_fill(logits, y, known, denominator)
    assert others.sum() == max(0, denominator - y.sum()) and 0 < y.sum() < 30
    contrast = loop_contrast(z, y, others, 0.5, how)
    np.testing.assert_allclose(terms["classification"], (bce * known).sum() / known.sum(), rtol=1e-4)
    np.testing.assert_allclose(terms["contrast"], contrast, rtol=1e-4)
    np.testing.assert_allclose(loss, terms["classification"] + 0.3 * terms["contrast"], rtol=1e-6)


def test_without_contrast_all_views_are_classified():
    """The second step's BCE row sees what the contrast sees: both views of every image."""
    system, data = build(contrast=0.0), batch()
    variables = init(system, data)
    loss, terms = loss_of(system, variables, data)
    assert "projector" not in variables["params"] and not terms
    x = np.float64(data["views"]["32"]).reshape(12, 2, 3, D)
    data = {k: np.repeat(v, 2, 0) for k, v in data.items() if k in ("labels", "observed", "mask")}
    out = apply(system, variables, {"endpoints": {"32": x.astype(np.float32)}, **data})
    logits = np.asarray(out.logits, np.float64)
    known = data["observed"] * data["mask"][:, None]
    bce = np.log1p(np.exp(logits)) - data["labels"] * logits
    np.testing.assert_allclose(loss, (bce * known).sum() / known.sum(), rtol=1e-4)


@pytest.mark.parametrize("data", ["", "voc_resplit"])
def test_the_bce_row_of_both_steps_differs_in_the_contrast_alone(data):
    two = stage_configs(toy.config("mulcon", data))
    plain = stage_configs(toy.config("mulcon", f"{data},bce_two_steps".strip(",")))
    for a, b in zip(two, plain, strict=True):
        changed = differences(a.to_dict(), b.to_dict())
        assert all(x.startswith(("system.contrast: ", "experiment: ")) for x in changed), changed
    assert [s.system.contrast for s in plain] == [0, 0] and [s.input.views for s in plain] == [1, 2]
    if data:
        assert len(two[0].cache.train_views) == 6 and len(two[1].cache.train_views) == 10


@pytest.mark.parametrize("case", ["few", "two_blocks", "all", "none", "one_entry", "one_label"])
def test_blocks_equal_the_dense_matrix(case):
    """More entries than a block, in images of random labels; gradients against autodiff of the whole matrix."""
    rng = np.random.default_rng(1)
    b, l = (520, 1) if case == "one_label" else (130, 4)
    share = {"few": 0.1, "two_blocks": 0.7, "all": 1, "none": 0, "one_entry": 0, "one_label": 0.6}[case]
    active = np.float32(rng.random((b, l)) < share)
    active[3, 0] = active[3, 0] or case == "one_entry"
    z = rng.normal(size=(b, l, 5)).astype(np.float32)
    z = jnp.asarray(z / np.linalg.norm(z, axis=-1, keepdims=True))
    others = np.float32(rng.random((b, l)) < 0.05) * (case != "none")

    def dense_loss(z):
        flat, label = z.reshape(-1, 5), jnp.tile(jnp.arange(l), b)
        a, takes = active.reshape(-1) > 0, (active + others).reshape(-1) > 0
        pair = a[:, None] & takes[None] & ~np.eye(b * l, dtype=bool)
        s = flat @ flat.T / 0.1 - 10
        total = jnp.log(jnp.where(pair.any(1), jnp.where(pair, jnp.exp(s), 0).sum(1), 1))
        same = pair & a[None] & (label[:, None] == label[None])
        mean = jnp.where(same, s, 0).sum(1) / jnp.maximum(jnp.float32(same).sum(1), 1)
        return jnp.where(same.any(1), total - mean, 0).sum() / max(active.sum(), 1)

    step = jax.jit(jax.value_and_grad(lambda z: contrastive.label_contrastive(z, active, others, temperature=0.1)))
    value, gradient = step(z)
    wanted, wanted_gradient = jax.jit(jax.value_and_grad(dense_loss))(z)
    np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, wanted_gradient, rtol=1e-3, atol=1e-6)
    assert np.isfinite(gradient).all() and (case != "none" or value == 0)


def test_small_temperatures_do_not_overflow():
    z = jnp.asarray(np.eye(8, dtype=np.float32)[None])
    z = jnp.concatenate([z, z, -z])
    active = jnp.ones((3, 8))
    loss = functools.partial(contrastive.label_contrastive, temperature=1e-3)
    value, gradient = jax.jit(jax.value_and_grad(loss))(z, active)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_image_level_contrast_counts_shared_labels():
    """Positives are images that share labels, as often as they share one."""
    system, data = build(level="image", temperature=0.5), batch()
    variables = init(system, data)
    _, terms = loss_of(system, variables, data)
    p, x = variables["params"], np.float64(data["views"]["32"]).reshape(12, 6, D).mean(1)
    z = dense(p["projector"]["out"], np.maximum(dense(p["projector"]["hidden"], x), 0))
    z /= np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)
    y, total, anchors = np.repeat(data["labels"] * data["mask"][:, None], 2, 0), 0.0, 0
    for i in range(10):
        rest = [j for j in range(10) if j != i]
        log_sum = np.log(sum(np.exp(z[i] @ z[j] / 0.5) for j in rest))
        shared = np.array([y[i] @ y[j] for j in rest])
        anchors += y[i].any()
        if shared.any():
            total -= (shared * (np.array([z[i] @ z[j] / 0.5 for j in rest]) - log_sum)).sum() / shared.sum()
    np.testing.assert_allclose(terms["contrast"], total / anchors, rtol=1e-4)
    np.testing.assert_allclose(
        apply(system, variables, data).logits, dense(p["classifier"], np.float64(data["endpoints"]["32"]).mean((1, 2))),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip


# --- memory, devices, degenerate batches ----------------------------------------------------------------------------


def test_memory_is_below_one_active_by_active_matrix():
    """Two views of 64 images, 80 labels, 128-d; every second label active would be 5,120 entries.

    Shapes are static, so that the bound holds whatever is active: a quarter of the matrix of these entries, and 2.5
    times what the embeddings themselves take, where one matrix of all entries takes 80 times that.
    """
    b, l, d = 2 * 64, 80, 128
    step = jax.jit(jax.value_and_grad(contrastive.label_contrastive))
    temporary = step.lower(jnp.zeros((b, l, d)), jnp.ones((b, l))).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 5120**2 * 4 / 4
    assert temporary < 2.5 * b * l * d * 4


@pytest.mark.parametrize("settings", [{}, {"denominator": 50, "how": "sum"}, {"level": "image"}])
def test_pmap_equals_jit(settings):
    """The mean over devices of loss and gradients is that of the global batch, hard negatives included."""
    data = batch(b=8)
    one = build(**CROSS, **settings)
    variables = init(one, data)
    del data["endpoints"]

    def step(system):
        def loss(v, x):
            return system.apply(v, x, 0, method="loss")[0]

        return lambda v, x: jax.value_and_grad(loss)(v, x)

    value, gradient = jax.jit(step(one))(variables, data)
    split = jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), data)
    each = jax.pmap(step(build(axis="data", **CROSS, **settings)), axis_name="data", in_axes=(None, 0))
    values, gradients = each(variables, split)
    np.testing.assert_allclose(values.mean(), value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a.mean(0), b, rtol=1e-3, atol=1e-5), gradients, gradient)


@pytest.mark.parametrize("labels", [1, L])
@pytest.mark.parametrize("settings", [{"denominator": 50}, {"level": "image"}])
def test_degenerate_batches_give_finite_losses_and_gradients(labels, settings):
    system, data = build(labels=labels, **CROSS, **settings), batch(labels=labels)
    variables = init(system, data)
    step = jax.jit(jax.value_and_grad(lambda v, x: system.apply(v, x, 0, method="loss")[0]))
    for case in ("nothing", "everything", "unknown", "padding", "one"):
        y = np.full((6, labels), case in ("everything", "padding"), np.float32)
        y[0, 0] += case == "one"
        known = np.full((6, labels), case != "unknown", np.float32)
        mask = np.full(6, case != "padding", np.float32)
        value, gradient = step(variables, {**data, "labels": y, "observed": known, "mask": mask})
        assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(gradient)), case


# --- views, steps, words, errors ------------------------------------------------------------------------------------


def test_every_view_keeps_images_and_labels_together():
    data = batch()
    flat = every_view(data)
    for i in range(6):
        for v in range(2):
            np.testing.assert_array_equal(flat["endpoints"]["32"][2 * i + v], data["views"]["32"][i, v])
            np.testing.assert_array_equal(flat["labels"][2 * i + v], data["labels"][i])
    images = np.arange(6 * 2 * 4 * 4 * 3).reshape(6, 2, 4, 4, 3)
    np.testing.assert_array_equal(every_view({**data, "views": images})["image"][3], images[1, 1])
    assert "endpoints" not in every_view({**data, "views": images})


@pytest.mark.parametrize("word, epochs", [("bce", 25), ("backbone", 25), ("scratch", 25), ("image_level", 15)])
def test_one_step_alone_trains_its_whole_schedule(word, epochs):
    for data in ("coco2014", "nuswide"):
        found = read_config(f"configs/mulcon.py:{data},{word}")
        assert found.optim.epochs == epochs and found.optim.schedule.epochs == 25
    assert read_config(f"configs/mulcon.py:voc_resplit,{word}").optim.epochs == 8


def test_one_view_is_an_error_that_says_what_to_do():
    data = batch()
    variables = init(build(**CROSS), data)
    del data["views"]
    with pytest.raises(UserError, match=r"config.input.views=2.*config.cache.train_views.*config.system.contrast=0"):
        loss_of(build(**CROSS), variables, data)
    loss, terms = loss_of(build(contrast=0.0, **CROSS), variables, data)
    assert np.isfinite(loss) and terms == {}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"level": "labels"}, "config.system.level is 'labels'; expected one of label, image .did you mean 'label'"),
        ({"scale": "witdh"}, "did you mean 'width'"),
        ({"queries": "norml"}, "did you mean 'normal'"),
        ({"how": "means"}, "did you mean 'mean'"),
        ({"contrast": -0.1}, "config.system.contrast is -0.1; expected at least 0"),
        ({"temperature": 0.0}, "config.system.temperature is 0.0; expected a number above 0"),
        ({"level": "image", "denominator": 9}, "level='image' has none"),
    ],
)
def test_wrong_settings(settings, said):
    with pytest.raises(UserError, match=said):
        build(**settings)


def test_heads_that_do_not_divide():
    with pytest.raises(UserError, match="4 heads do not divide the width 6"):
        jax.eval_shape(build(heads=4, token_layers=0).init, jax.random.key(0), batch())


def test_two_steps_in_one_command(tmp_path):
    """The first step has one view and no projector; the second starts from its parameters and adds one."""
    found = toy.shallow(toy.config("mulcon", optim__epochs=1, eval__every=9))
    found.data.update(train_images=32, test_images=16, size=48)
    found.input.size, found.backbone.frozen = 32, "all"
    found.system.update(CROSS)
    first, second = found.stages
    still = {
        "name": "sgd",
        "lr": 1e-9,
        "epochs": 1,
        "batch_size": 16,
        "schedule": {"name": "constant"},
        "momentum": 0.0,
    }
    found.stages = (first, {**second, "optim": still})
    train.fit(found, tmp_path / "run")
    stages = []
    for index in ("0", "1"):
        with Checkpoints(tmp_path / "run" / "checkpoints" / index, keep_best_of="mAP") as checkpoints:
            stages.append(toy.flat(checkpoints.restore_params("last")["params"]))
    assert not any("projector" in path for path in stages[0])
    assert {path for path in stages[1] if path not in stages[0]} == {p for p in stages[1] if "projector" in p}
    for path, value in stages[0].items():
        np.testing.assert_allclose(stages[1][path], value, atol=1e-6, err_msg=path)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert any('"contrast"' in line for line in lines) and not any(
        '"contrast"' in s for s in lines if '"stage": 0' in s
    )


WORDS = ["", "coco2014", "coco2014,paper", "nuswide", "voc2007,paper", "voc_resplit", "voc_resplit,scratch"]
WORDS += ["coco2014,bce", "coco2014,scratch", "coco2014,image_level", "paper,coco2014,bce", "coco2014,backbone"]


@pytest.mark.parametrize("words", WORDS)
def test_every_stage_of_every_experiment_builds(words):
    """Both steps of the full-size experiments: views, parameters, and an optimiser whose groups fit them."""
    found = read_config(f"configs/mulcon.py:{words}").unlock()
    stages = stage_configs(found)
    single = any(word in words for word in ("bce", "scratch", "backbone"))
    assert len(stages) == (1 if single else 2)
    for index, stage in enumerate(stages):
        stage.backbone = {"name": "small", "widths": (8, 16, 16, 16)}
        run = experiment.assemble(stage, meta(), toy.PLAIN)
        contrasts = index == 1 or "scratch" in words
        assert (run.system.contrast > 0) == contrasts and stage.input.views == (2 if contrasts else 1)
        assert run.system.level == ("image" if "image_level" in words or "backbone" in words else "label")
        assert run.system.how == ("sum" if "paper" in words else "mean")
        prepared = run.prepare(experiment.example_batch(run, 2))
        variables = jax.eval_shape(lambda r=run, p=prepared: r.system.init(jax.random.key(0), p, 0, method="loss"))
        assert ("projector" in variables["params"]) == contrasts
        train.make_optimizer(stage, variables["params"], 10)
        run.train_transform()
