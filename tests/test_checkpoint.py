"""Checkpoints: exact round trips, what is kept, and what is refused."""

import json
import shutil
import tarfile
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mljax.errors import UserError
from mljax.rundir.checkpoint import Checkpoints, NotFinite
from mljax.trees import path_name
from saved_states import new_state, same, saved, shapes
from toy import golden_file

# Round trips


def test_round_trip_is_exact_from_shapes_alone(tmp_path):
    state = new_state()
    with Checkpoints(tmp_path / "new" / "folder") as checkpoints:
        assert checkpoints.save(5, state, metrics={"mAP": 0.25}, meta={"stage": 1, "name": "probe", "list": [1, 2]})
        restored = checkpoints.restore(shapes(state))
        same(restored, state)
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(restored))
        assert checkpoints.meta() == {"stage": 1, "name": "probe", "list": [1, 2]}
        assert checkpoints.metrics("best") == {"mAP": 0.25}
    same(Checkpoints(tmp_path / "new" / "folder", read_only=True).restore(state, 5), state)


def test_without_ema(tmp_path):
    state = new_state(ema=False)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        assert checkpoints.restore(shapes(state)).ema is None
        assert checkpoints.restore_params()["ema"] is None
        with pytest.raises(UserError, match="has no ema/batch_stats/backbone/mean"):
            checkpoints.restore(shapes(new_state()))


def test_restore_params_needs_no_template(tmp_path):
    state = new_state()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, metrics={"mAP": 1.0})
    shutil.rmtree(tmp_path / "3" / "training")  # so the optimiser's memory cannot have been read
    parts = Checkpoints(tmp_path, read_only=True).restore_params("best")
    same(parts, {"params": state.params, "variables": state.variables, "ema": state.ema})


def test_training_on_does_not_reach_into_a_save(tmp_path):
    """The step that follows is given the state's memory to overwrite while the save still runs."""
    state = jax.tree.map(jnp.copy, new_state())
    before = jax.tree.map(lambda x: np.array(x), state)
    spoil = jax.jit(lambda s: jax.tree.map(lambda x: jnp.zeros_like(x), s), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        jax.block_until_ready(spoil(state))
        same(checkpoints.restore(shapes(before)), before)


def test_two_devices_to_one_and_back(tmp_path):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    state = new_state()
    both = jax.device_put(state, NamedSharding(mesh, P()))
    one = jax.devices()[1]
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, both)
        restored = checkpoints.restore(shapes(state), place=one)
        same(restored, state)
        assert all(leaf.devices() == {one} for leaf in jax.tree.leaves(restored))
        checkpoints.save(2, restored)
        again = checkpoints.restore(shapes(state), place=lambda s: jax.device_put(s, NamedSharding(mesh, P())))
        same(again, state)
        assert all(len(leaf.devices()) == 2 for leaf in jax.tree.leaves(again))


def test_pmap_output_is_saved_unreplicated(tmp_path):
    step = jax.pmap(lambda s, x: (s, x), axis_name="data", in_axes=(None, 0), out_axes=(None, 0))
    state = new_state()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, step(state, jnp.zeros(2))[0])
        same(checkpoints.restore(shapes(state)), state)


# What is kept


def test_best_and_latest_are_kept(tmp_path):
    checkpoints = saved(tmp_path, mAP=[0.5, 0.9, 0.7, 0.6])
    assert (checkpoints.steps, checkpoints.best, checkpoints.latest) == ([2, 4], 2, 4)
    same(checkpoints.restore(shapes(new_state()), "best"), new_state(2))
    same(checkpoints.restore(shapes(new_state()), "last"), new_state(4))
    same(checkpoints.restore(shapes(new_state())), new_state(4))


def test_nan_and_missing_metrics_are_never_best(tmp_path):
    checkpoints = saved(tmp_path, mAP=[0.5, float("nan"), 0.4, float("inf"), None])
    assert (checkpoints.steps, checkpoints.best, checkpoints.latest) == ([1, 5], 1, 5)
    nothing = saved(tmp_path / "b", mAP=[float("nan")])
    assert nothing.best is None and nothing.metrics(1) == {"mAP": None}
    with pytest.raises(UserError, match="has a value of 'mAP'; use 'last'"):
        nothing.restore(shapes(new_state()), "best")


def test_mode_min_and_equal_values(tmp_path):
    with Checkpoints(tmp_path, keep_best_of="loss", mode="min") as checkpoints:
        for step, loss in enumerate([3.0, 1.0, 1.0, 2.0], 1):
            checkpoints.save(step, new_state(step), metrics={"loss": loss, "mAP": 10.0 * step})
        assert (checkpoints.steps, checkpoints.best) == ([3, 4], 3)


def test_best_is_of_the_latest_stage(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, new_state(1), metrics={"mAP": 0.9}, meta={"stage": 0})
        checkpoints.save(2, new_state(2), meta={"stage": 1})
        assert checkpoints.best == 1
        checkpoints.save(3, new_state(3), metrics={"mAP": 0.5}, meta={"stage": 1})
        checkpoints.save(4, new_state(4), metrics={"mAP": 0.4}, meta={"stage": 1})
        assert (checkpoints.best, checkpoints.steps) == (3, [3, 4])


def test_metric_name_is_checked(tmp_path):
    with Checkpoints(tmp_path, keep_best_of="mAp") as checkpoints, pytest.raises(UserError, match="did you mean 'mAP'"):
        checkpoints.save(1, new_state(), metrics={"mAP": 0.5})


def test_same_step_and_older_step(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.save(3, new_state(3), metrics={"mAP": 0.5})
        assert not checkpoints.save(3, new_state(3), metrics={"mAP": 0.5})
        for step, other in ((3, new_state(4)), (3, None)):
            with pytest.raises(UserError, match=r"step 3 cannot be saved .* another state of that step"):
                checkpoints.save(step, other or new_state(3), metrics=None if other is None else {"mAP": 0.5})
        with pytest.raises(UserError, match=r"step 2 cannot be saved to .* holds step 3 already"):
            checkpoints.save(2, new_state(2))
        assert checkpoints.steps == [3]
        same(checkpoints.restore(shapes(new_state())), new_state(3))


def test_reader_follows_a_writer_and_cleans_nothing(tmp_path):
    with Checkpoints(tmp_path) as writer:
        writer.save(1, new_state(1))
        writer.wait()
        reader = Checkpoints(tmp_path, read_only=True)
        assert reader.latest == 1
        unfinished = tmp_path / "9.orbax-checkpoint-tmp"
        unfinished.mkdir()
        writer.save(2, new_state(2), metrics={"mAP": 0.5})
        writer.wait()
        assert (reader.steps, reader.best) == ([1, 2], 2)
        same(reader.restore(shapes(new_state())), new_state(2))
        assert unfinished.is_dir()
    with Checkpoints(tmp_path) as writer:
        assert writer.steps == [1, 2] and not unfinished.exists()


# What a template may not hide

Extra = namedtuple("Extra", "moment")


HEAD = {"kernel": jnp.zeros((4, 2))}
MISFITS = {
    "shape": lambda s: s.replace(params={**s.params, "head": {"kernel": jnp.zeros((4, 3))}}),
    "missing": lambda s: s.replace(params={**s.params, "haed": HEAD}),
    "left over": lambda s: s.replace(params={"head": s.params["head"]}),
    "dtype": lambda s: s.replace(params=jax.tree.map(lambda p: p.astype(jnp.bfloat16), s.params)),
    "optimiser": lambda s: s.replace(opt_state=Extra(jnp.zeros(3))),
    "step": lambda s: s.replace(step=jnp.float32(0)),
}


@pytest.mark.parametrize(
    "change, words",
    [
        ("shape", r"params/head/kernel with shape \(4, 2\), not \(4, 3\)"),
        ("missing", r"has no params/haed/kernel \(did you mean 'params/head/kernel'"),
        ("left over", "has params/backbone/bias, which this model or optimiser does not have"),
        ("dtype", "has params/backbone/bias as float32, not bfloat16"),
        ("optimiser", "has no opt_state/moment"),
        ("step", "has step as int32, not float32"),
    ],
)
def test_template_that_does_not_fit(tmp_path, change, words):
    checkpoints = saved(tmp_path, mAP=[0.5])
    with pytest.raises(UserError, match=words) as error:
        checkpoints.restore(shapes(MISFITS[change](new_state())))
    assert "\n" not in str(error.value)


def test_steps_that_are_not_there(tmp_path):
    checkpoints = saved(tmp_path, mAP=[0.5])
    with pytest.raises(UserError, match=r"no checkpoint of step 7 in .* \(available: 1\)"):
        checkpoints.restore(shapes(new_state()), 7)
    with pytest.raises(UserError, match="no checkpoint of step 'lsat'"):
        checkpoints.restore(shapes(new_state()), "lsat")
    for read_only in (True, False):
        with pytest.raises(UserError, match=r"no checkpoint in .*; train first"):
            Checkpoints(tmp_path / "empty", read_only=read_only).restore(shapes(new_state()))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be used for checkpoints"):
        Checkpoints(tmp_path / "file").save(1, new_state())


# What is kept, and how it goes


def test_never_fewer_than_two(tmp_path):
    checkpoints = saved(tmp_path, mAP=[0.1, 0.2, 0.3])
    assert (checkpoints.steps, checkpoints.best) == ([2, 3], 3)
    with Checkpoints(tmp_path / "b", best=0) as writer:
        for step in (1, 2, 3):
            writer.save(step, new_state(step))
        assert writer.steps == [2, 3]


@pytest.mark.parametrize("name, value", [("metrics", 9.0), ("meta", {"stage": 5})])
def test_only_sealed_records_decide_what_is_deleted(tmp_path, name, value):
    """A better value written into a record without its digest: that step is set aside, and the real best stays."""
    with Checkpoints(tmp_path) as checkpoints:
        for step, mAP in ((1, 0.9), (2, 0.5)):
            checkpoints.save(step, new_state(step), metrics={"mAP": mAP})
        checkpoints.wait()
        path = tmp_path / "2" / "record" / "metadata"
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, name: {"mAP": value} if name == "metrics" else value}))
        checkpoints.save(3, new_state(3), metrics={"mAP": 0.4})
        assert (checkpoints.steps, checkpoints.best) == ([1, 3], 1)
    assert (tmp_path / "damaged-2").is_dir()


def test_a_replaced_step_comes_back_where_its_successor_never_came(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, new_state(1))
        checkpoints.save(2, new_state(2))
        checkpoints.wait()
        monkeypatch.setattr("mljax.rundir.orbax.save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(UserError, match="No space left"):
            checkpoints.save(2, new_state(3), metrics={"mAP": 0.5}, replace=True)
        monkeypatch.undo()
        same(checkpoints.restore(shapes(new_state())), new_state(2))
        assert checkpoints.save(2, new_state(3), metrics={"mAP": 0.5}, replace=True)
        same(checkpoints.restore(shapes(new_state())), new_state(3))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


# Numbers


@pytest.mark.parametrize(
    "path, value",
    [("params/head/kernel", np.nan), ("ema/params/backbone/bias", np.inf), ("variables/memory/queue", -np.inf)],
)
def test_a_state_that_is_not_finite_is_never_saved(tmp_path, path, value):
    state = new_state(2)
    poison = lambda at, x: (x + value).astype(x.dtype) if path_name(at) == path else x  # noqa: E731
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, new_state(1), metrics={"mAP": 0.5})
        with pytest.raises(NotFinite, match=f"step 2 is not saved: {path} is not finite") as error:
            checkpoints.save(2, jax.tree_util.tree_map_with_path(poison, state), metrics={"mAP": 0.9})
        assert error.value.path == path and checkpoints.steps == [1]
        large = jax.tree.map(lambda x: x * 0 + 3e38 if x.dtype == jnp.float32 else x, state.params)
        assert checkpoints.save(2, state.replace(params=large))  # its sum is infinite, and it is not


def test_constants_and_the_optimiser_may_hold_infinities(tmp_path):
    state = new_state()
    variables = {**state.variables, "constants": {"mask": jnp.array([0.0, -jnp.inf])}}
    assert Checkpoints(tmp_path).save(1, state.replace(variables=variables, opt_state={"best": jnp.float32(jnp.inf)}))


# The released version


def test_a_run_of_the_released_version_loads(tmp_path):
    """Orbax's own `metrics` stand beside each step there; nothing is read of them, however they are damaged."""
    with tarfile.open(golden_file("released_run.tar.xz")) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "released" / "checkpoints" / "0"
    for step in (1, 2):
        (folder / str(step) / "metrics" / "metrics").write_text("{")
    with Checkpoints(folder) as checkpoints:
        assert (checkpoints.steps, checkpoints.best, checkpoints.latest) == ([1, 2], 1, 2)
        assert checkpoints.meta("best") == {"stage": 0, "step": 1, "kind": "raw", "metrics": {"mAP": 50.0}}
        same(checkpoints.restore(shapes(new_state()), 1), new_state(1))
        same(checkpoints.restore(shapes(new_state())), new_state(2))
        checkpoints.save(3, new_state(3), metrics={"mAP": 60.0})
        assert (checkpoints.steps, checkpoints.best) == ([2, 3], 3)
