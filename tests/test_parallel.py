"""One step, compiled three ways, means the same thing: params, variables and EMA agree for every system."""

import jax
import numpy as np
import pytest

import toy
from mljax import parallel
from mljax.errors import UserError


def drawn(name, low, high=None):
    """A memory whose entry is drawn anew: integers, or normal numbers where nothing is given."""

    def changed(memory):
        old, rng = memory[name], np.random.default_rng(0)
        new = rng.normal(size=old.shape) if high is None else rng.integers(low, high, old.shape)
        return {**memory, name: jax.numpy.asarray(new, old.dtype)}

    return changed


# What begins after some epochs, or after the first refresh, here from the first step on: settings, memory, and terms
# that are above 0 then.
BEGUN = {
    "sst": (
        {"start": 0, "first": 0.1, "last": 0.1, "memory": 4},
        None,
        ("ist_found", "cst_found", "ist_bce", "cst_bce"),
    ),
    "sarb": ({"start": 0}, drawn("prototypes", None), ("instance", "prototype")),
    "cdcr": ({"start": 0}, drawn("weights", 0, 2), ("left_out",)),
    "curriculum": ({}, drawn("labels", -1, 2), ("labels_made",)),
}


# One of each kind: statistics of the batch, memories, tables, refreshes, attention; `make slow` has the others.
QUICK = ("baseline", "cdcr", "cmsg", "csra", "curriculum", "ml_gcn", "role", "single_positive", "sst")


@pytest.mark.parametrize("name", toy.slow_but(toy.CONFIGS, QUICK))
def test_jit_one_device_equals_jit_two_equals_pmap_two(name):
    found = toy.shallow(toy.without_dropout(toy.config(name, ema=0.9)))
    found.optim.update(name="sgd", schedule={"name": "constant"}, lr=0.05)  # Adam would hide a scale
    settings, memory, reached = BEGUN.get(name, ({}, None, ()))
    found.system.update(settings)
    steps = toy.Steps(found, memory)
    one, losses = steps("jit", 1)
    for term in reached:
        assert steps.terms[-1][term] > 0, term
    for kind in ("jit", "pmap"):
        two, other = steps(kind, 2)
        np.testing.assert_allclose(other, losses, rtol=1e-4)
        for part in ("params", "variables", "ema"):
            expected, got = toy.flat(getattr(one, part)), toy.flat(getattr(two, part))
            assert expected.keys() == got.keys()
            for path, value in expected.items():
                np.testing.assert_allclose(got[path], value, rtol=2e-3, atol=2e-5, err_msg=f"{kind} {path}")


@pytest.mark.parametrize("kind, devices", [("jit", 1), ("jit", 2), ("pmap", 2)])
def test_a_step_copies_nothing_to_its_devices(kind, devices):
    """Its batch lies where it wants it, so that the copy of the next one goes on while it computes."""

    def step(state, batch):
        return {"sum": state["sum"] + parallel.pmean(batch["x"].sum(), parallel.axis_of(kind))}, batch["x"].mean()

    compiled, place_state, place = parallel.compile_step(step, kind, jax.devices()[:devices])
    state, batch = place_state({"sum": np.float32(1)}), place({"x": np.ones((4, 3), np.float32)})
    state, _ = compiled(state, batch)  # compiles
    with jax.transfer_guard("disallow"):
        state, mean = compiled(state, batch)
    assert float(state["sum"]) == 1 + 2 * 12 / (devices if kind == "pmap" else 1) and float(mean.reshape(-1)[0]) == 1


def test_collectives_are_the_identity_without_an_axis():
    x = {"a": np.arange(3.0)}
    assert parallel.pmean(x, None) is x and parallel.psum(x, None) is x and parallel.all_gather(x, None) is x


def test_collectives_over_devices():
    def f(x):
        return parallel.pmean(x, "data"), parallel.psum(x, "data"), parallel.all_gather(x, "data")

    mean, total, gathered = jax.pmap(f, axis_name="data")(np.array([[1.0, 2.0], [3.0, 6.0]], np.float32))
    np.testing.assert_array_equal(mean[0], [2, 4])
    np.testing.assert_array_equal(total[1], [4, 8])
    np.testing.assert_array_equal(gathered[0], [1, 2, 3, 6])


def test_what_a_user_can_get_wrong():
    with pytest.raises(UserError, match="asks for 9 devices and this machine has 2"):
        parallel.devices_for(9)
    with pytest.raises(UserError, match="does not divide over 2 devices"):
        parallel.check_batch(15, 2)
    with pytest.raises(UserError, match="config.parallel is 'pjit'; expected one of jit, pmap"):
        parallel.axis_of("pjit")


@pytest.mark.slow
@pytest.mark.parametrize("name", toy.CONFIGS)
def test_bfloat16_computes_near_float32_and_keeps_parameters_float32(name):
    found = toy.without_dropout(toy.config(name))
    _, exact = toy.Steps(found)("jit", 1)
    found.dtype = "bfloat16"
    state, losses = toy.Steps(found)("jit", 1)
    np.testing.assert_allclose(losses, exact, rtol=0.05)
    assert losses != exact
    assert {np.asarray(x).dtype.name for x in jax.tree.leaves(state.params)} == {"float32"}
