"""ROLE around any system, its table of labels, and the single-positive losses as any config names them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toy
from mljax import experiment, optim, parallel, train
from mljax.check import check
from mljax.config.overrides import override
from mljax.config.stages import stage_configs
from mljax.errors import UserError
from mljax.losses.criterion import Criterion
from mljax.optim import groups
from mljax.rundir.checkpoint import Checkpoints
from mljax.systems.role import Role, RoleCriterion
from mljax.types import Meta


@pytest.fixture(scope="module")
def golden():
    return toy.golden("losses")


def batch_of(labels, observed, **more):
    ones = np.ones(len(labels), np.float32)
    return {"labels": np.float32(labels), "observed": np.float32(observed), "mask": ones, **more}


# --- the losses that a config can name, against the authors' code -----------------------------------------------------


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("spml_bce", {"name": "bce", "eps": 1e-5}),
        ("spml_bce_ls", {"name": "bce_ls", "eps": 1e-5}),
        ("spml_an", {"name": "an"}),
        ("spml_an_ls", {"name": "an_ls"}),
        ("spml_wan", {"name": "wan"}),
        ("spml_epr", {"name": "epr", "expected": 2.9}),
        ("spml_pr", {"name": "pr"}),
        ("spml_iu", {"name": "iu"}),
        ("spml_iun", {"name": "iu"}),
    ],
)
def test_losses_of_a_config_equal_the_authors(golden, name, section):
    full, partial, single = (golden[f"in/{k}labels"] for k in ("", "partial_", "single_positive_"))
    if name in ("spml_bce", "spml_bce_ls"):
        data = batch_of(full, np.ones_like(full))
    elif name == "spml_iu":
        data = batch_of(partial == 1, partial != 0)
    elif name == "spml_iun":
        data = batch_of(single * full, np.maximum(single * full, 1 - full))
    else:
        data = batch_of(single, single)
    loss = Criterion.from_config({**section, "reduction": "mean"})
    x = jnp.asarray(golden["in/logits_normal"])
    value, gradient = jax.value_and_grad(lambda x: loss(x, data))(x)
    np.testing.assert_allclose(value, golden[f"out/{name}/normal/loss"], rtol=1e-5)
    np.testing.assert_allclose(gradient, golden[f"out/{name}/normal/grad"], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"name": "epr"}, "needs 'expected'"),
        ({"name": "epr", "expectd": 2}, "no setting 'expectd' .did you mean 'expected'"),
        ({"name": "pr", "margn": 2}, "did you mean 'margin'"),
        ({"name": "eprr"}, "no 'eprr' among the losses .did you mean 'epr'"),
    ],
)
def test_wrong_losses(section, said):
    with pytest.raises(UserError, match=said):
        Criterion.from_config(section)


@pytest.mark.parametrize("name", ["an", "an_ls", "wan", "epr", "pr", "iu", "bce", "partial_bce"])
@pytest.mark.parametrize("labels", [1, 5])
def test_nothing_known_and_one_class_are_finite(name, labels):
    """Every combination of known and positive, for one label and more, at extreme logits too."""
    loss = Criterion.from_config({"name": name, **({"expected": 1.0} if name == "epr" else {})})
    for scale in (1.0, 1e4):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(4, labels)) * scale, jnp.float32)
        for y, known in ((0, 0), (1, 1), (0, 1)):
            data = batch_of(np.full((4, labels), y), np.full((4, labels), known))
            value, gradient = jax.value_and_grad(lambda x: loss(x, data))(x)  # noqa: B023
            assert np.isfinite(value) and np.isfinite(gradient).all()


# --- ROLE itself ------------------------------------------------------------------------------------------------------


def test_criterion_equals_the_authors(golden):
    single = golden["in/single_positive_labels"]

    def loss(x, theta):
        return RoleCriterion(2.9)(x, batch_of(single, single, theta=theta))

    x, theta = jnp.asarray(golden["in/logits_normal"]), jnp.asarray(golden["in/role_theta"])
    value, (on_x, on_theta) = jax.value_and_grad(loss, argnums=(0, 1))(x, theta)
    np.testing.assert_allclose(value, golden["out/spml_role/normal/loss"], rtol=1e-5)
    np.testing.assert_allclose(on_x, golden["out/spml_role/normal/grad"], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(on_theta, golden["out/spml_role/normal/grad_extra0"], rtol=1e-4, atol=1e-7)


def meta(n=12, l=4):
    rng = np.random.default_rng(0)
    observed = (rng.random((n, l)) < 0.5).astype(np.uint8)
    labels = (rng.random((n, l)) < 0.5).astype(np.uint8) * observed
    return Meta(name="toy", classes=tuple("abcd"[:l]), labels=labels, observed=observed)


def features(b=3, l=4, **more):
    x = np.random.default_rng(1).normal(size=(b, 2, 2, 6)).astype(np.float32)
    zeros = np.zeros((b, l), np.float32)
    more = {"index": np.arange(b, dtype=np.int32), **more}
    return {"endpoints": {"32": x}, **batch_of(zeros, zeros), **more}


def test_where_the_table_starts():
    """systems.md 12: half-range 0.4054651, observed 5.2933048."""
    module = Role(backbone=None, meta=meta(), expected=1.0)
    table = module.init(jax.random.key(0), features(), 0, method="loss")["params"]["label_table"]
    known, positive = meta().observed > 0, meta().labels > 0
    np.testing.assert_allclose(table[positive], 5.2933048, rtol=1e-6)
    np.testing.assert_allclose(table[known & ~positive], -5.2933048, rtol=1e-6)
    free = np.asarray(table[~known])
    assert np.abs(free).max() <= 0.4054651 and np.abs(free).max() > 0.3 and len(set(free.tolist())) == free.size


def test_loss_reads_the_rows_of_the_batch():
    """Against a plain loop: L = (L'(p | q) + L'(q | p)) / 2 with the table's rows."""
    labels = np.float32([[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]])
    data = features(index=np.int32([7, 2, 9])) | batch_of(labels, labels)
    module = Role(backbone=None, meta=meta(), expected=1.5)
    variables = module.init(jax.random.key(0), data, 0, method="loss")
    logits = np.float64(toy.apply(module, variables, data).logits)
    theta = np.float64(variables["params"]["label_table"])[[7, 2, 9]]
    p, q = 1 / (1 + np.exp(-logits)), 1 / (1 + np.exp(-theta))
    expected = 0.0
    for own, other in ((p, q), (q, p)):
        total = 0.0
        for i in range(3):
            for c in range(4):
                total -= labels[i, c] * np.log(own[i, c] + 1e-5)
                total -= other[i, c] * np.log(own[i, c] + 1e-5) + (1 - other[i, c]) * np.log(1 - own[i, c] + 1e-5)
        expected += total / 12 + ((own.sum() / 3 - 1.5) / 4) ** 2
    loss, _ = module.apply(variables, data, 0, method="loss")
    np.testing.assert_allclose(loss, expected / 2, rtol=1e-5)


def test_table_has_ten_times_the_rate_no_decay_and_no_average():
    found = toy.config("role", ema=0.9)
    found.optim.update(name="sgd", schedule={"name": "constant"}, lr=0.01, momentum=0.0, weight_decay=0.1)
    run, source = toy.assembled(found)
    variables = experiment.init_variables(run, 0)
    tx = train.make_optimizer(found, variables["params"], 10, run.system.backbone.frozen_parameters)
    state = train.create_state(variables, tx, ema=0.9, seed=0)
    assert "label_table" not in state.ema["params"] and "net" in state.ema["params"]
    data = toy.batches(found, source, run, 1)[0]
    rest = {k: v for k, v in variables.items() if k != "params"}

    def loss(params):
        out = run.system.apply(
            {"params": params, **rest}, run.prepare(data), 0, method="loss", mutable=["batch_stats", "memory"],
            rngs={"dropout": jax.random.key(0), "draw": jax.random.key(0)},
        )  # fmt: skip
        return out[0][0]

    before, gradient = np.array(variables["params"]["label_table"]), jax.jit(jax.grad(loss))(variables["params"])
    after, _ = jax.jit(train.make_step(run, tx))(state, data)
    np.testing.assert_allclose(
        np.asarray(after.params["label_table"]) - before, -0.1 * gradient["label_table"], rtol=1e-3, atol=1e-6
    )
    touched = np.flatnonzero(np.abs(np.asarray(gradient["label_table"])).sum(1))
    assert sorted(touched) == sorted(set(data["index"].tolist()))
    evaluated = optim.averaged(after.params, after.variables, after.ema)
    np.testing.assert_array_equal(evaluated["params"]["label_table"], after.params["label_table"])
    own = (("label_table$", {"lr": 3.0}),)
    assert groups.label_tables(variables["params"], own) == () and groups.label_tables({"a": 1}) == ()


def test_rows_touched_on_two_devices_are_summed():
    found = toy.config("role")
    found.optim.update(name="sgd", schedule={"name": "constant"}, lr=0.05, momentum=0.0, weight_decay=0.0)
    results = []
    for kind, count in (("jit", 1), ("jit", 2), ("pmap", 2)):
        found.parallel = kind
        run, source = toy.assembled(found)
        variables = experiment.init_variables(run, 0)
        tx = train.make_optimizer(found, variables["params"], 10, run.system.backbone.frozen_parameters)
        state, before = train.create_state(variables, tx, ema=0.0, seed=0), np.array(variables["params"]["label_table"])
        step, place_state, place = parallel.compile_step(train.make_step(run, tx), kind, jax.devices()[:count])
        data = toy.batches(found, source, run, 1)[0]
        half = len(data["index"]) // 2
        data["index"][half:] = data["index"][:half]  # every row on both devices
        state, _ = step(place_state(state), place(data))
        results.append(np.asarray(state.params["label_table"]) - before)
    assert np.abs(results[0]).max() > 1e-4
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], rtol=1e-3, atol=1e-6)


def test_any_system_inside_keeps_its_paths_and_its_scores():
    found = toy.config("role")
    override(found.lock(), "system.net.name", "cmsg")
    found = found.unlock()
    found.vectors = "auto"
    found.system.net = {"name": "cmsg", "width": 16, "ffn": 16, "sga_heads": 2, "saa_heads": 2}
    check(found)
    run, source = toy.assembled(found)
    variables = experiment.init_variables(run, 0)
    assert set(variables["params"]) == {"backbone", "net", "label_table"}
    assert "saa_0" in variables["params"]["net"] and "backbone" not in variables["params"]["net"]
    data = toy.batches(found, source, run, 1)[0]
    out = run.system.apply(variables, run.prepare(data), train=False)
    np.testing.assert_array_equal(run.scores(variables, data), out.logits)
    assert out.attention is not None


def test_the_inner_system_gets_the_steps_of_an_epoch():
    vectors = np.random.default_rng(2).normal(size=(4, 6)).astype(np.float32)
    inner = Role(
        backbone=None, meta=dataclasses.replace(meta(), vectors=vectors), net={"name": "sst"}, steps_per_epoch=7
    ).net
    assert inner.steps_per_epoch == 7


def test_linear_then_end_to_end_carries_the_table_over(tmp_path):
    found = toy.config("role", "linear_init,smoke")
    first, second = (dict(stage) for stage in found.stages)
    first["optim"], second["optim"] = ({**stage.get("optim", {}), "epochs": 1} for stage in (first, second))
    second["optim"]["groups"] = (("label_table$", {"lr": 0.0}),)  # so that it ends as it began
    found.stages = (first, second)
    train.fit(found, tmp_path / "run")
    tables, backbones = [], []
    for stage in ("0", "1"):
        with Checkpoints(tmp_path / "run" / "checkpoints" / stage, read_only=True) as checkpoints:
            params = checkpoints.restore_params("last")["params"]
        tables.append(params["label_table"])
        backbones.append(params["backbone"])
    start = experiment.init_variables(toy.assembled(found)[0], 0)["params"]
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(backbones[0]), jax.tree.leaves(start["backbone"])))
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(backbones[1]), jax.tree.leaves(start["backbone"])))
    trained = np.abs(tables[0] - np.asarray(start["label_table"]))
    assert trained.max() > 1e-3
    np.testing.assert_array_equal(tables[1], tables[0])  # what the first stage estimated is where the second began


def test_the_authors_grid_reaches_the_stage_that_they_search():
    """Their linear stage has one rate and batch; what is searched is those of the whole network."""
    for name, first in (("role", (1e-3, 16)), ("single_positive", (1e-3, 16))):
        found = toy.config(name, "voc2012,linear_init").lock()
        override(found, "optim.lr", "1e-4")
        override(found, "optim.batch_size", "12")
        one, two = stage_configs(found)
        assert (one.optim.lr, one.optim.batch_size, one.optim.epochs) == (*first, 25)
        assert (two.optim.lr, two.optim.batch_size, two.optim.epochs) == (1e-4, 12, 10)


def test_an_override_that_every_stage_overrides_is_said():
    found = toy.config("role", "voc2012,linear_init").lock()
    with pytest.raises(UserError, match="backbone.frozen=stem has no effect: every stage of this config sets its own"):
        override(found, "backbone.frozen", "stem")
    found = toy.config("cdcr", "smoke").lock()
    with pytest.raises(UserError, match="optim.epochs=3 has no effect"):
        override(found, "optim.epochs", "3")
    override(found, "optim.lr", "0.5")  # of no stage's own
    override(found, "system.net.pooling", "max")
    found = toy.config("mulcon", "voc2007").lock()
    override(found, "optim.lr", "0.5")  # of the first step
    assert [stage.optim.lr for stage in stage_configs(found)] == [0.5, 1e-2]


def test_an_override_of_one_stage():
    found = toy.config("mulcon", "voc2007").lock()
    before = stage_configs(found)
    override(found, "stages[1].optim.lr", "3e-3")
    override(found, "stages[0].input.train.flip", "0.25")
    override(found, "ema", "0.5")  # of both, still
    one, two = stage_configs(found)
    assert (one.optim.lr, two.optim.lr) == (before[0].optim.lr, 3e-3)
    assert (one.input.train.flip, two.input.train.flip) == (0.25, before[1].input.train.flip)
    assert one.ema == two.ema == 0.5 and two.optim.name == before[1].optim.name
    override(found, "stages[1].loss.name", "asl")
    assert stage_configs(found)[1].loss.name == "asl" != stage_configs(found)[0].loss.name
    for key, text, sentence in (
        ("stages[2].optim.lr", "1", r"stages\[2\].optim.lr=1: this config has 2, counted from 0"),
        ("stages[1].optim.rate", "1", r"--config.stages\[1\].optim.rate: there is no key 'rate'|no setting"),
        ("stages[1].seed", "x", r"--config.stages\[1\].seed=x: expected a value of type int"),
    ):
        with pytest.raises(UserError, match=sentence):
            override(found, key, text)
            train.make_optimizer(stage_configs(found)[1], {}, 1)
    plain = toy.config("baseline", "smoke").lock()
    with pytest.raises(UserError, match=r"this config has none; write --config.optim.lr=1"):
        override(plain, "stages[0].optim.lr", "1")


def test_what_a_user_can_get_wrong():
    with pytest.raises(UserError, match=r"expected is 9; expected positives per image, from 0 to the 4 labels of toy"):
        Role(backbone=None, meta=meta(), expected=9)
    found = toy.config("role")
    found.system.net = {"name": "basline"}
    with pytest.raises(UserError, match="no 'basline' among the systems .did you mean 'baseline'"):
        check(found)
    found.system.net = {"name": "baseline", "poling": "max"}
    with pytest.raises(
        UserError, match=r"config.system.net .'baseline'. has no setting 'poling' .did you mean 'pooling'"
    ):
        check(found)
    found.system.net = {"pooling": "max"}
    with pytest.raises(UserError, match=r"config.system.net is .*; expected the section of a system"):
        check(found)


def test_one_label_and_none_known_are_finite():
    one = dataclasses.replace(meta(l=1), labels=np.zeros((12, 1), np.uint8), observed=np.zeros((12, 1), np.uint8))
    module = Role(backbone=None, meta=one, expected=0.5)
    data = features(l=1)
    variables = module.init(jax.random.key(0), data, 0, method="loss")
    value, gradient = jax.jit(jax.value_and_grad(lambda v: module.apply(v, data, 0, method="loss")[0]))(variables)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
