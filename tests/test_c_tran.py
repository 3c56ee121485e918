"""C-Tran against the authors' golden cases, its mask training, evaluation and prediction with labels known."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score

import released_names
import toy
from mljax import evaluate, main, predict
from mljax.check import check
from mljax.config.reading import read_config
from mljax.errors import UserError
from mljax.layers import sine_position
from mljax.losses.criterion import Criterion
from mljax.systems.c_tran import CTran, known_in_evaluation, random_known
from mljax.weights import published
from toy import close, golden_file, weights

L = 6


def build(labels=L, reduction="sum", **settings):
    return CTran(
        backbone=None,
        criterion=Criterion.from_config({"name": "bce", "reduction": reduction}),
        meta=toy.meta(labels),
        **settings,
    )


def batch(feature_map, labels=None, **more):
    """From a map as the authors have it, (b d h w)."""
    labels = np.zeros((len(feature_map), L)) if labels is None else labels
    return toy.batch(toy.nhwc(feature_map), labels, **more)


@pytest.fixture(scope="module")
def golden():
    return toy.golden("c_tran")


def known_of(mask):
    """The authors' mask (-1 unknown, else the label) -> labels and which are known."""
    return np.maximum(mask, 0).astype(np.float32), (mask >= 0).astype(np.float32)


# --- the authors' numbers -------------------------------------------------------------------------------------------


def test_golden_forward_with_labels_known(golden):
    module = build()
    variables = published.convert_head(weights(golden), module)
    labels, known = known_of(golden["in/mask"])
    data = batch(golden["in/feature_map"], labels, known=known)
    out, caught = toy.apply(module, variables, data, capture_intermediates=True, mutable=["intermediates"])
    close(out.logits, golden["out/logits"])
    for i in range(3):
        tokens, attended = caught["intermediates"][f"layer_{i}"]["__call__"][0]
        close(attended.mean(1), golden[f"out/attention_item{i}"])
    close(out.label_features, tokens[:, 9:])
    last = golden["out/attention_item2"][:, 9:, :9]
    assert out.attention.shape == (3, 4, L, 3, 3)
    heads = np.asarray(attended)[:, :, 9:, :9]
    np.testing.assert_allclose(heads.mean(1), last, rtol=1e-4, atol=1e-6)
    close(out.attention.reshape(heads.shape), heads / heads.sum(-1, keepdims=True))
    states = np.where(known > 0, labels + 1, 0)
    np.testing.assert_array_equal(states, golden["out/state_index"])


def test_golden_forward_without_mask_training(golden):
    module = build(mask_training=False)
    variables = published.convert_head(weights(golden), module)
    assert "state" not in variables["params"]
    labels, known = known_of(golden["in/mask"])
    out = toy.apply(module, variables, batch(golden["in/feature_map"], labels, known=known))
    close(out.logits, golden["out/logits_use_lmt_false"])


def test_scores_use_what_is_known_and_nothing_else(golden):
    module = build()
    variables = published.convert_head(weights(golden), module)
    labels, known = known_of(golden["in/mask"])
    data = batch(golden["in/feature_map"], labels, known=known)
    close(toy.apply(module, variables, data, method="scores"), golden["out/logits"])
    hidden = {**data, "labels": np.where(known > 0, labels, 1 - labels)}  # what is not known does not matter
    close(toy.apply(module, variables, hidden, method="scores"), golden["out/logits"])
    blind = toy.apply(module, variables, {**data, "known": np.zeros_like(known)}).logits
    del data["known"]
    np.testing.assert_array_equal(toy.apply(module, variables, data).logits, blind)
    assert np.abs(blind - golden["out/logits"]).max() > 1e-2


@pytest.mark.parametrize("case", ["unknown_only", "all"])
def test_golden_losses(case):
    """The criterion on the entries that were asked for: sum of BCE, with its gradient."""
    file = np.load(golden_file("losses.npz"))
    labels = file["in/labels"].astype(np.float32)
    asked = (file["in/partial_labels"] == -1).astype(np.float32) if case == "unknown_only" else np.ones_like(labels)
    loss = Criterion.from_config({"name": "bce", "reduction": "sum"})
    data = {"labels": labels, "observed": np.ones_like(labels), "mask": np.ones(len(labels), np.float32)}
    found, grad = jax.value_and_grad(lambda x: loss(x, data, observed=asked))(jnp.asarray(file["in/logits_normal"]))
    np.testing.assert_allclose(found, file[f"out/ctran/{case}/normal/loss"], rtol=1e-5)
    np.testing.assert_allclose(grad, file[f"out/ctran/{case}/normal/grad"], rtol=1e-5, atol=1e-7)


def test_full_size_names_and_shapes_are_those_of_the_released_files():
    prefix = "backbone.base_network."
    state = released_names.state_dict("C-Tran", trunk=prefix)
    counters = sum(name.endswith("running_mean") for name in state)  # counted, not listed
    assert len(state) + counters == released_names.total("C-Tran")
    state |= {f"{prefix}bn1.num_batches_tracked": np.zeros((), np.int64)}
    found = read_config("configs/c_tran.py:coco2014").unlock()
    released_names.fits(found, toy.meta(80), {f"module.{name}": x for name, x in state.items()})
    released_names.fits(found, toy.meta(80), state)


def test_a_file_of_another_variant_is_refused(golden):
    state = weights(golden)
    with pytest.raises(UserError, match="no place for 'self_attn_layers"):
        published.convert_head(state | {"self_attn_layers.0.more.weight": np.zeros((2, 2))}, build())
    del state["label_lt.weight"]
    with pytest.raises(UserError, match=r"have no 'label_lt.weight'"):
        published.convert_head(state, build())


# --- mask training --------------------------------------------------------------------------------------------------


def test_random_known_is_exact_uniform_and_a_function_of_key_and_index():
    index = np.arange(3000)
    counts = index % (L + 1)
    known = np.asarray(random_known(jax.random.key(0), index, L, counts))
    np.testing.assert_array_equal(known.sum(1), counts)
    assert np.abs(known[counts == 3].mean(0) - 0.5).max() < 0.08  # 428 images: four standard deviations are .097
    again = random_known(jax.random.key(0), index[::-1], L, counts[::-1])
    np.testing.assert_array_equal(again[::-1], known)
    assert (np.asarray(random_known(jax.random.key(1), index, L, counts)) != known).any()


def drawn(module, key, index):
    return np.asarray(module.apply({}, index, method="_draw", rngs={"draw": jax.random.key(key)}))


def test_training_knows_each_number_up_to_three_quarters_equally_often():
    module, index = build(20), np.arange(8000)
    found = drawn(module, 0, index).sum(1)
    share = np.bincount(found, minlength=21) / len(index)
    assert share[16:].sum() == 0  # floor(.75 * 20) = 15
    np.testing.assert_allclose(share[:16], 1 / 16, atol=0.012)
    assert np.abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.04
    assert not drawn(build(20, max_known=0.0), 0, index).any()
    np.testing.assert_array_equal(drawn(module, 0, index[5:7]), drawn(module, 0, index)[5:7])
    assert (drawn(module, 1, index) != drawn(module, 0, index)).any()


@pytest.mark.parametrize("loss_on", ["unknown", "all"])
def test_loss_equals_numpy(loss_on):
    """Sum of BCE on observed entries that were not known (or all), with the drawn part known to the forward pass."""
    module = build(loss_on=loss_on, width=8, heads=2, layers=1, dropout=0.0)
    rng = np.random.default_rng(0)
    labels = (rng.random((5, L)) < 0.5).astype(np.float32)
    observed = (rng.random((5, L)) < 0.7).astype(np.float32)
    data = batch(rng.normal(size=(5, 7, 2, 3)).astype(np.float32), labels * observed, observed=observed)
    data["mask"][-1] = 0
    variables = module.init({"params": jax.random.key(0), "draw": jax.random.key(1)}, data)
    key = jax.random.key(3)
    loss, _ = module.apply(variables, data, jnp.int32(7), method="loss", rngs={"draw": key, "dropout": key})
    known = np.asarray(module.apply({}, data["index"], method="_draw", rngs={"draw": key})) * observed
    assert 0 < known.sum() < observed.sum()
    x = np.asarray(toy.apply(module, variables, {**data, "known": known}).logits, np.float64)
    asked = (observed - known if loss_on == "unknown" else observed) * data["mask"][:, None]
    np.testing.assert_allclose(loss, ((np.logaddexp(0, x) - x * labels) * asked).sum(), rtol=1e-5)


def test_the_unknown_state_is_fixed_and_starts_at_random():
    module = build(width=8, heads=2, layers=1, dropout=0.0)
    data = batch(np.random.default_rng(0).normal(size=(4, 7, 2, 2)).astype(np.float32))
    keys = {"params": jax.random.key(0), "draw": jax.random.key(1), "dropout": jax.random.key(2)}
    variables = module.init(keys, data)
    state = np.asarray(variables["params"]["state"])
    assert 0 < np.abs(state).max() <= 8**-0.5 and np.abs(state[0]).max() > 0.1
    gradient = jax.jit(jax.grad(lambda p: module.apply({"params": p}, data, 0, method="loss", rngs=keys)[0]))
    grads = gradient(variables["params"])
    grad = np.asarray(grads["state"])
    assert not grad[0].any() and grad[1].any()


def test_started_weights_have_the_authors_limits():
    module = build(width=64, heads=2, layers=1, ffn=16)
    variables = module.init(jax.random.key(0), batch(np.zeros((1, 7, 2, 2), np.float32)))
    layer = variables["params"]["layer_0"]
    limits = {"out": 64**-0.5, "ffn_in": 64**-0.5, "ffn_out": 16**-0.5}
    for name, limit in limits.items():
        for leaf in ("kernel", "bias"):
            assert 0.8 * limit < np.abs(layer[name][leaf]).max() <= limit, (name, leaf)
    xavier = np.sqrt(6 / (64 + 3 * 64))  # of the stacked projections of q, k and v
    for name in ("query", "key", "value"):
        assert 0.95 * xavier < np.abs(layer["attention"][name]["kernel"]).max() <= xavier
        assert not np.asarray(layer["attention"][name]["bias"]).any()


def test_positions_are_added_to_the_image_tokens_alone():
    x = np.random.default_rng(0).normal(size=(2, 8, 2, 3)).astype(np.float32)
    plain, placed = (build(heads=2, layers=1, position=p) for p in (False, True))
    variables = plain.init(jax.random.key(0), batch(x))
    moved = x + np.moveaxis(sine_position(2, 3, 8).reshape(2, 3, 8), -1, 0)[None]
    close(toy.apply(placed, variables, batch(x)).logits, toy.apply(plain, variables, batch(moved)).logits)


# --- evaluation with labels known -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("c_tran") / "run"
    argv = [f"--workdir={workdir}", "--config=configs/c_tran.py:smoke", "--config.optim.schedule=plateau"]
    options = (
        "optim.schedule.metric=loss",
        "optim.schedule.mode=min",
        "optim.schedule.patience=0",
        "optim.schedule.threshold=0.9",
        "optim.lr=0.001",
        "optim.epochs=3",
        "system.layers=1",
        "backbone.endpoints=4,",
        "input.size=32",
    )
    assert main.main(argv + [f"--config.{option}" for option in options]) == 0
    return workdir


def test_evaluation_leaves_the_known_labels_out_of_average_precision(run, capsys):
    loaded = predict.load(run, known=0.5)
    report = loaded.evaluate()
    assert "50 % of the labels given" in report["split"] and "50 % of the labels given" in capsys.readouterr().out
    file = np.load(run / "scores_test_raw_known_0_5.npz")
    labels, count = file["labels"], file["labels"].shape[1]
    known = np.asarray(known_in_evaluation(0.5, np.arange(len(labels)), count))
    np.testing.assert_array_equal(known.sum(1), count // 2)
    np.testing.assert_array_equal(file["scored"], ~known)
    blind = np.load(run / "scores.npz")
    assert blind["scored"].all() and np.abs(blind["scores"] - file["scores"]).max() > 1e-3
    for c, name in enumerate(file["classes"]):
        asked = ~known[:, c]
        ap = report["per_class_AP"][str(name)]
        if labels[asked, c].any():
            np.testing.assert_allclose(ap, 100 * average_precision_score(labels[asked, c], file["scores"][asked, c]))
        else:
            assert ap is None
    predicted, truth = file["scores"] >= 0, labels > 0  # CP to OF1 count all labels, as the authors do
    found = report["metrics"]["OP"]
    np.testing.assert_allclose(found, 100 * (predicted & truth).sum() / max(predicted.sum(), 1))


def test_the_known_labels_are_the_same_for_a_subset_in_its_own_order():
    first = np.asarray(known_in_evaluation(0.25, np.arange(50), 20))
    np.testing.assert_array_equal(first.sum(1), 5)
    np.testing.assert_array_equal(np.asarray(known_in_evaluation(0.25, np.array([7, 3]), 20)), first[[7, 3]])


def test_the_command_line_tells_labels(run):
    assert evaluate.main([f"--workdir={run}", "--known=0.25"]) == 0
    report = json.loads((run / "report_test_raw_known_0_25.json").read_text())
    assert report["split"].endswith("25 % of the labels given")


def test_the_plateau_lowers_the_rate_where_the_loss_does_not_fall(run):
    """Three epochs, patience 0 and a threshold that no loss beats: the second evaluation lowers the rate."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if "lr" in line]
    np.testing.assert_allclose(rates, [1e-3] * 6 + [1e-4] * 3, rtol=1e-5)


# --- prediction with labels known -----------------------------------------------------------------------------------


def pictures(count):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(count)]


def test_prediction_with_labels_known(run, tmp_path):
    loaded, images = predict.load(run), pictures(3)
    first, second = loaded.classes[:2]
    known = [{first: 1, second: 0}, {}, {second: True}]
    plain, informed = loaded.scores(images), loaded.scores(images, known=known)
    np.testing.assert_allclose(informed[1], plain[1], atol=1e-6)
    assert np.abs(informed[0, 2:] - plain[0, 2:]).max() > 1e-4
    assert informed[0, 0] == 1 and informed[0, 1] == 0 and informed[2, 1] == 1
    assert loaded.predict(images, known=known, threshold=0.0)[0][first] == 1.0
    batches = list(loaded.stream([images[0], "absent.jpg", images[2]], lambda *_: None, known=known))
    np.testing.assert_allclose(
        batches[0][1], informed[[0, 2]], atol=1e-6
    )  # an unreadable image does not shift the others
    ahead = predict.load(run, known=0.5).scores(images)  # a share for evaluations tells nothing here
    np.testing.assert_allclose(ahead, plain, atol=1e-6)


def test_the_command_predicts_with_labels_known(run, tmp_path, capsys):
    loaded, images = predict.load(run), pictures(2)
    paths = [str(tmp_path / f"{i}.png") for i in range(2)]
    for path, image in zip(paths, images):
        image.save(path)
    first, second = loaded.classes[:2]
    base = [*paths, f"--workdir={run}", "--json", "--threshold=0"]
    assert predict.main([*base, f"--known={first}=1, {second}=0"]) == 0
    found = [json.loads(line)["labels"] for line in capsys.readouterr().out.splitlines()]
    wanted = loaded.scores(images, known=[{first: 1, second: 0}] * 2)
    for labels, row in zip(found, wanted, strict=True):
        np.testing.assert_allclose([labels[name] for name in loaded.classes], row, atol=1e-4)
    for text, sentence in (
        (first, f"'{first}' is not LABEL=1 .present. or LABEL=0"),
        (f"{first}=1,{second}=2", f"'{second}=2' is not LABEL=1"),
        ("", "'' is not LABEL=1"),
        (f"{first}x=1", f"names '{first}x', which is not a label of this run .did you mean '{first}'"),
    ):
        with pytest.raises(UserError, match=sentence):
            predict.main([*base, f"--known={text}"])


def test_few_sizes_are_compiled(run):
    """Three, four and two images run in programs of four and two; padding changes no score."""
    loaded, images = predict.load(run), pictures(4)
    four = loaded.scores(images)
    np.testing.assert_allclose(loaded.scores(images[:3]), four[:3], atol=1e-6)
    assert loaded._apply._cache_size() == 1
    np.testing.assert_allclose(loaded.scores(images[:2]), four[:2], atol=1e-6)
    assert loaded._apply._cache_size() == 2


def test_what_a_user_can_get_wrong(run, tmp_path):
    loaded, images = predict.load(run), pictures(2)
    name = loaded.classes[0]
    with pytest.raises(UserError, match=f"names '{name}x', which is not a label of this run .did you mean '{name}'"):
        loaded.predict(images, known=[{name + "x": 1}, {}])
    with pytest.raises(UserError, match="1 means present, 0 absent"):
        loaded.predict(images, known=[{name: 0.3}, {}])
    with pytest.raises(UserError, match="a list with one dict for each of the 2 images"):
        loaded.predict(images, known=[{name: 1}])
    with pytest.raises(UserError, match="a list with one dict"):
        loaded.predict(images, known={name: 1})
    with pytest.raises(UserError, match="expected a share of the labels"):
        predict.load(run, known=1.0)
    with pytest.raises(UserError, match=r"loss_on is 'unknwn'; expected .* .did you mean 'unknown'"):
        build(loss_on="unknwn")
    with pytest.raises(UserError, match="max_known is 1.5; expected a share of the labels"):
        build(max_known=1.5)
    with pytest.raises(UserError, match="eval_known needs config.system.mask_training=True"):
        build(eval_known=0.5, mask_training=False)
    with pytest.raises(UserError, match="3 heads do not divide the width 8"):
        build(heads=3, width=8).init(jax.random.key(0), batch(np.zeros((1, 7, 2, 2), np.float32)))
    with pytest.raises(UserError, match=r"optim.schedule.metric is 'los'; expected one of .* .did you mean 'loss'"):
        check(toy.config("c_tran", optim__schedule={"name": "plateau", "metric": "los"}))


def test_other_systems_cannot_be_told_labels(run):
    found, _ = toy.assembled(toy.config("baseline"))
    other = predict.Run(run, found, {}, "", 0)
    with pytest.raises(UserError, match="The system 'baseline' does not take known labels"):
        other.scores(pictures(1), known=[{}])
