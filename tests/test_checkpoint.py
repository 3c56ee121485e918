"""Checkpoints: exact round trips, what is kept, and every way in which a file or a process can break."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from conftest import golden_file
from mljax import optim
from mljax.errors import UserError
from mljax.rundir import seal
from mljax.rundir.checkpoint import Checkpoints, NotFinite
from mljax.trees import path_name
from mljax.types import TrainState

ROOT = Path(__file__).parents[1]


def _state(seed=0, *, ema=True, width=4):
    """Two Adam steps from random parameters, with a frozen group, a memory, an empty array and several dtypes."""
    rng = np.random.default_rng(seed)
    params = {
        "backbone": {"kernel": rng.normal(size=(3, width)).astype(np.float32), "bias": np.zeros(width, np.float32)},
        "head": {"kernel": rng.normal(size=(width, 2)).astype(np.float32)},
    }
    params = jax.tree.map(jnp.asarray, params)
    tx = optim.optimizer(params, lr=0.1, total_steps=9, weight_decay=0.1, groups=(("bias", {"frozen": True}),))
    opt_state = tx.init(params)
    for _ in range(2):
        updates, opt_state = tx.update(jax.tree.map(jnp.cos, params), opt_state, params)
        params = optax.apply_updates(params, updates)
    stats = {"backbone": {"mean": jnp.asarray(rng.normal(size=width), jnp.float32)}}
    variables = {
        "batch_stats": stats,
        "memory": {"queue": jnp.asarray(rng.normal(size=(2, 3)), jnp.bfloat16), "full": jnp.asarray(True)},
        "constants": {"none": jnp.zeros((0, 3)), "ids": jnp.arange(5, dtype=jnp.uint8)},
    }
    averaged = {"params": jax.tree.map(lambda p: p * 0.5, params), "batch_stats": stats} if ema else None
    return TrainState(jnp.int32(2), params, variables, opt_state, averaged, jax.random.PRNGKey(seed))


def _same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b)):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes(), jax.tree_util.keystr(path)


def _shapes(state):
    return jax.eval_shape(lambda: state)


def _saved(folder, **metrics_by_step):
    """Steps 1, 2, .. with these mAPs; the state of step s is _state(s)."""
    with Checkpoints(folder) as checkpoints:
        for step, value in enumerate(metrics_by_step["mAP"], 1):
            checkpoints.save(step, _state(step), metrics=None if value is None else {"mAP": value})
    return Checkpoints(folder, read_only=True)


def _biggest(folder):
    return max((path for path in Path(folder).rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


# Round trips


def test_round_trip_is_exact_from_shapes_alone(tmp_path):
    state = _state()
    with Checkpoints(tmp_path / "new" / "folder") as checkpoints:
        assert checkpoints.save(5, state, metrics={"mAP": 0.25}, meta={"stage": 1, "name": "probe", "list": [1, 2]})
        restored = checkpoints.restore(_shapes(state))
        _same(restored, state)
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(restored))
        assert checkpoints.meta() == {"stage": 1, "name": "probe", "list": [1, 2]}
        assert checkpoints.metrics("best") == {"mAP": 0.25}
    _same(Checkpoints(tmp_path / "new" / "folder", read_only=True).restore(state, 5), state)


def test_without_ema(tmp_path):
    state = _state(ema=False)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        assert checkpoints.restore(_shapes(state)).ema is None
        assert checkpoints.restore_params()["ema"] is None
        with pytest.raises(UserError, match="has no ema/batch_stats/backbone/mean"):
            checkpoints.restore(_shapes(_state()))


def test_restore_params_needs_no_template(tmp_path):
    state = _state()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, metrics={"mAP": 1.0})
    shutil.rmtree(tmp_path / "3" / "training")  # so the optimiser's memory cannot have been read
    parts = Checkpoints(tmp_path, read_only=True).restore_params("best")
    _same(parts, {"params": state.params, "variables": state.variables, "ema": state.ema})


def test_training_on_does_not_reach_into_a_save(tmp_path):
    """The step that follows is given the state's memory to overwrite while the save still runs."""
    state = jax.tree.map(jnp.copy, _state())
    before = jax.tree.map(lambda x: np.array(x), state)
    spoil = jax.jit(lambda s: jax.tree.map(lambda x: jnp.zeros_like(x), s), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        jax.block_until_ready(spoil(state))
        _same(checkpoints.restore(_shapes(before)), before)


def test_two_devices_to_one_and_back(tmp_path):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    state = _state()
    both = jax.device_put(state, NamedSharding(mesh, P()))
    one = jax.devices()[1]
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, both)
        restored = checkpoints.restore(_shapes(state), place=one)
        _same(restored, state)
        assert all(leaf.devices() == {one} for leaf in jax.tree.leaves(restored))
        checkpoints.save(2, restored)
        again = checkpoints.restore(_shapes(state), place=lambda s: jax.device_put(s, NamedSharding(mesh, P())))
        _same(again, state)
        assert all(len(leaf.devices()) == 2 for leaf in jax.tree.leaves(again))


def test_pmap_output_is_saved_unreplicated(tmp_path):
    step = jax.pmap(lambda s, x: (s, x), axis_name="data", in_axes=(None, 0), out_axes=(None, 0))
    state = _state()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, step(state, jnp.zeros(2))[0])
        _same(checkpoints.restore(_shapes(state)), state)


# What is kept


def test_best_and_latest_are_kept(tmp_path):
    checkpoints = _saved(tmp_path, mAP=[0.5, 0.9, 0.7, 0.6])
    assert (checkpoints.steps, checkpoints.best, checkpoints.latest) == ([2, 4], 2, 4)
    _same(checkpoints.restore(_shapes(_state()), "best"), _state(2))
    _same(checkpoints.restore(_shapes(_state()), "last"), _state(4))
    _same(checkpoints.restore(_shapes(_state())), _state(4))


def test_nan_and_missing_metrics_are_never_best(tmp_path):
    checkpoints = _saved(tmp_path, mAP=[0.5, float("nan"), 0.4, float("inf"), None])
    assert (checkpoints.steps, checkpoints.best, checkpoints.latest) == ([1, 5], 1, 5)
    nothing = _saved(tmp_path / "b", mAP=[float("nan")])
    assert nothing.best is None and nothing.metrics(1) == {"mAP": None}
    with pytest.raises(UserError, match="has a value of 'mAP'; use 'last'"):
        nothing.restore(_shapes(_state()), "best")


def test_mode_min_and_equal_values(tmp_path):
    with Checkpoints(tmp_path, keep_best_of="loss", mode="min") as checkpoints:
        for step, loss in enumerate([3.0, 1.0, 1.0, 2.0], 1):
            checkpoints.save(step, _state(step), metrics={"loss": loss, "mAP": 10.0 * step})
        assert (checkpoints.steps, checkpoints.best) == ([3, 4], 3)


def test_best_is_of_the_latest_stage(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, _state(1), metrics={"mAP": 0.9}, meta={"stage": 0})
        checkpoints.save(2, _state(2), meta={"stage": 1})
        assert checkpoints.best == 1
        checkpoints.save(3, _state(3), metrics={"mAP": 0.5}, meta={"stage": 1})
        checkpoints.save(4, _state(4), metrics={"mAP": 0.4}, meta={"stage": 1})
        assert (checkpoints.best, checkpoints.steps) == (3, [3, 4])


def test_metric_name_is_checked(tmp_path):
    with Checkpoints(tmp_path, keep_best_of="mAp") as checkpoints, pytest.raises(UserError, match="did you mean 'mAP'"):
        checkpoints.save(1, _state(), metrics={"mAP": 0.5})


def test_same_step_and_older_step(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.save(3, _state(3), metrics={"mAP": 0.5})
        assert not checkpoints.save(3, _state(3), metrics={"mAP": 0.5})
        for step, other in ((3, _state(4)), (3, None)):
            with pytest.raises(UserError, match=r"step 3 cannot be saved .* another state of that step"):
                checkpoints.save(step, other or _state(3), metrics=None if other is None else {"mAP": 0.5})
        with pytest.raises(UserError, match=r"step 2 cannot be saved to .* holds step 3 already"):
            checkpoints.save(2, _state(2))
        assert checkpoints.steps == [3]
        _same(checkpoints.restore(_shapes(_state())), _state(3))


def test_reader_follows_a_writer_and_cleans_nothing(tmp_path):
    with Checkpoints(tmp_path) as writer:
        writer.save(1, _state(1))
        writer.wait()
        reader = Checkpoints(tmp_path, read_only=True)
        assert reader.latest == 1
        unfinished = tmp_path / "9.orbax-checkpoint-tmp"
        unfinished.mkdir()
        writer.save(2, _state(2), metrics={"mAP": 0.5})
        writer.wait()
        assert (reader.steps, reader.best) == ([1, 2], 2)
        _same(reader.restore(_shapes(_state())), _state(2))
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
    checkpoints = _saved(tmp_path, mAP=[0.5])
    with pytest.raises(UserError, match=words) as error:
        checkpoints.restore(_shapes(MISFITS[change](_state())))
    assert "\n" not in str(error.value)


def test_steps_that_are_not_there(tmp_path):
    checkpoints = _saved(tmp_path, mAP=[0.5])
    with pytest.raises(UserError, match=r"no checkpoint of step 7 in .* \(available: 1\)"):
        checkpoints.restore(_shapes(_state()), 7)
    with pytest.raises(UserError, match="no checkpoint of step 'lsat'"):
        checkpoints.restore(_shapes(_state()), "lsat")
    for read_only in (True, False):
        with pytest.raises(UserError, match=r"no checkpoint in .*; train first"):
            Checkpoints(tmp_path / "empty", read_only=read_only).restore(_shapes(_state()))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be used for checkpoints"):
        Checkpoints(tmp_path / "file").save(1, _state())


# Damage


@pytest.mark.parametrize("where", [0.1, 0.5, 0.9])
def test_flipped_byte_names_the_leaf_and_the_way_out(tmp_path, where):
    """A byte of incompressible data in the largest file: orbax loads it, or fails, and both are one sentence here."""
    state = _state(width=400)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, metrics={"mAP": 0.9})
        checkpoints.save(2, state, metrics={"mAP": 0.5})
    path = _biggest(tmp_path / "2" / "weights")
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 4
    path.write_bytes(data)
    checkpoints = Checkpoints(tmp_path, read_only=True)
    with pytest.raises(
        UserError, match=r"step 2 in .* is damaged \(.*\); restore step 1 instead, or delete .*2"
    ) as error:
        checkpoints.restore(_shapes(state), 2)
    assert "the bytes of" in str(error.value) or "cannot be read" in str(error.value)
    _same(checkpoints.restore(_shapes(state), 1), state)


def test_wrong_bytes_name_their_leaf(tmp_path):
    checkpoints = _saved(tmp_path, mAP=[0.5])
    record = tmp_path / "1" / "record" / "metadata"
    content = json.loads(record.read_text())
    content["leaves"]["params/head/kernel"][2] = "12345678"
    content["digest"] = seal.digest(content)
    record.write_text(json.dumps(content))
    with pytest.raises(
        UserError, match=r"the bytes of params/head/kernel are not those .* no other checkpoint there is sound"
    ):
        checkpoints.restore(_shapes(_state()))


@pytest.mark.parametrize("part", ["weights", "training"])
def test_truncated_file(tmp_path, part):
    checkpoints = _saved(tmp_path, mAP=[0.5])
    path = _biggest(tmp_path / "1" / part / "d")
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match=r"step 1 .* is damaged"):
        checkpoints.restore(_shapes(_state()))


@pytest.mark.parametrize("gone", ["weights", "training", "record", "training/d", "record/metadata"])
def test_missing_files(tmp_path, gone):
    checkpoints = _saved(tmp_path, mAP=[0.5])
    path = tmp_path / "1" / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=r"step 1 .* is damaged"):
        checkpoints.restore(_shapes(_state()))


def test_changed_record(tmp_path):
    checkpoints = _saved(tmp_path, mAP=[0.5])
    record = tmp_path / "1" / "record" / "metadata"
    record.write_text(record.read_text().replace("0.5", "0.6"))
    with pytest.raises(UserError, match="its record is not what was saved"):
        checkpoints.meta()


def test_full_disk_before_writing(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, _state(1))
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
        with pytest.raises(
            UserError, match=r"step 2 cannot be written .*0.0 MiB are free.* older checkpoints are whole"
        ):
            checkpoints.save(2, _state(2))
        monkeypatch.undo()
        _same(checkpoints.restore(_shapes(_state())), _state(1))
        assert checkpoints.save(2, _state(2))


def test_full_disk_while_writing(tmp_path, monkeypatch):
    """The write fails in the background: the next call says so in a sentence, the older step stays, saving goes on."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, _state(1))
        checkpoints.save(2, _state(2))

        def fail():
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoints._saver, "wait_until_finished", fail)
        with pytest.raises(UserError, match="No space left on device"):
            checkpoints.wait()
        assert 1 in checkpoints.steps or 2 in checkpoints.steps
        assert checkpoints.save(3, _state(3))
        _same(checkpoints.restore(_shapes(_state())), _state(3))


# Processes that end


def _python(code, *args, **kwargs):
    code = textwrap.dedent(code)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, **kwargs)


BIG = """
    import os, resource, signal, sys
    import numpy as np
    from mljax.rundir.checkpoint import Checkpoints
    from mljax.errors import UserError
    from mljax.types import TrainState

    def state(step, size=2_000_000):
        w = np.random.default_rng(step).random(size, np.float32)
        return TrainState(np.int32(step), {"w": w}, {}, {}, None, np.zeros(2, np.uint32))

    checkpoints = Checkpoints(sys.argv[1])
"""


def test_killed_while_saving_and_saved_at_exit(tmp_path):
    """SIGKILL in the middle of the second save; a later process goes on, quietly, and waits at its exit."""
    killed = _python(
        BIG
        + """
    checkpoints.save(1, state(1), metrics={"mAP": 0.5})
    checkpoints.wait()
    rename = os.rename
    def die(source, target, *args, **kwargs):
        if str(target).endswith("/2"):
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(source, target, *args, **kwargs)
    os.rename = os.replace = die
    checkpoints.save(2, state(2), metrics={"mAP": 0.6})
    checkpoints.wait()
    """,
        tmp_path,
    )
    assert killed.returncode == -signal.SIGKILL
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2.orbax-checkpoint-tmp"]
    going_on = _python(
        BIG
        + """
    assert checkpoints.steps == [1] and checkpoints.best == 1
    old = checkpoints.restore(state(0))
    np.testing.assert_array_equal(old.params["w"], state(1).params["w"])
    checkpoints.save(2, state(3), metrics={"mAP": 0.6})  # and the process ends without close()
    """,
        tmp_path,
    )
    assert (going_on.returncode, going_on.stdout, going_on.stderr) == (0, "", "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]
    expected = np.random.default_rng(3).random(2_000_000, np.float32)
    np.testing.assert_array_equal(Checkpoints(tmp_path, read_only=True).restore_params()["params"]["w"], expected)


def test_killed_at_once(tmp_path):
    done = _python(
        BIG
        + """
    checkpoints.save(1, state(1))
    checkpoints.wait()
    checkpoints.save(2, state(2))
    os.kill(os.getpid(), signal.SIGKILL)
    """,
        tmp_path,
    )
    assert done.returncode == -signal.SIGKILL
    step = Checkpoints(tmp_path, read_only=True).latest
    expected = np.random.default_rng(step).random(2_000_000, np.float32)
    np.testing.assert_array_equal(Checkpoints(tmp_path, read_only=True).restore_params()["params"]["w"], expected)


def test_failing_write_in_the_background(tmp_path):
    """A real failing write (no file may grow beyond 1 MiB): one sentence, the older step is whole."""
    done = _python(
        BIG
        + """
    checkpoints.save(1, state(1, 1000))
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    try:
        checkpoints.save(2, state(2))
        checkpoints.wait()
    except UserError as error:
        print(error)
    np.testing.assert_array_equal(checkpoints.restore_params()["params"]["w"], state(1, 1000).params["w"])
    checkpoints.save(3, state(3, 1000))
    checkpoints.close()
    print(checkpoints.steps)
    """,
        tmp_path,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        f"The checkpoint of step 2 cannot be written to {tmp_path} (File too large); free some space or choose another"
        " folder and resume, the older checkpoints are whole.",
        "[1, 3]",
    ]


def test_damage_is_one_sentence_and_nothing_else(tmp_path):
    """With many reads under way when one fails, and absl's log set up as a command does."""
    _saved(tmp_path, mAP=[0.5])
    path = tmp_path / "1" / "weights" / "manifest.ocdbt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    done = _python(
        BIG
        + """
    import absl.logging
    absl.logging.set_verbosity("info")
    absl.logging.use_absl_handler()
    try:
        checkpoints.restore_params()
    except UserError as error:
        print(error)
    """,
        tmp_path,
    )
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1 and "is damaged" in done.stdout


def test_import_is_light():
    done = _python("import sys, mljax.rundir.checkpoint; print('orbax.checkpoint' in sys.modules)")
    assert (done.stdout, done.stderr) == ("False\n", "")


# The older one takes over


def _flip(path, where=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 4
    path.write_bytes(data)


def _reseal(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(seal.sealed(content)))


DAMAGE = {
    "array": lambda step: _flip(_biggest(step / "weights"), 0.1),
    "optimiser": lambda step: shutil.rmtree(step / "training" / "d"),
    "half deleted": lambda step: (shutil.rmtree(step / "weights"), shutil.rmtree(step / "training")),
    "record": lambda step: (step / "record" / "metadata").unlink(),
    "record flipped": lambda step: _flip(step / "record" / "metadata"),
    "number": lambda step: _reseal(step / "record" / "metadata", lambda record: record.update(step=1)),
    "nothing": lambda step: (shutil.rmtree(step), step.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_older_step_takes_over(tmp_path, damage, caplog):
    """A reader passes the damaged step over; a writer sets it aside, goes on, and may save that step again."""
    state = _state(1, width=400)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, metrics={"mAP": 0.5})
        checkpoints.save(2, _state(2, width=400), metrics={"mAP": 0.9})
    DAMAGE[damage](tmp_path / "2")
    damaged = sorted(path.name for path in (tmp_path / "2").rglob("*"))
    reader = Checkpoints(tmp_path, read_only=True)
    for which in ("last", "best"):
        _same(reader.restore(_shapes(state), which), state)
    assert (reader.restored, reader.latest, reader.best) == (1, 1, 1)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and said[0].startswith(f"The checkpoint of step 2 in {tmp_path} is damaged (")
    assert said[0].endswith("); step 1 is used instead.")
    caplog.clear()
    with Checkpoints(tmp_path) as writer:
        _same(writer.restore(_shapes(state)), state)
        assert (writer.restored, writer.steps) == (1, [1])
        assert writer.save(2, _state(3, width=400), metrics={"mAP": 0.7})
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and said[0].endswith("); it is set aside as damaged-2, and step 1 is used instead.")
    assert sorted(path.name for path in (tmp_path / "damaged-2").rglob("*")) == damaged
    assert Checkpoints(tmp_path, read_only=True).steps == [1, 2]


def test_a_number_that_was_swapped_is_said(tmp_path):
    _saved(tmp_path, mAP=[0.5, 0.4])
    (tmp_path / "2").rename(tmp_path / "8")
    with pytest.raises(UserError, match=r"step 8 in .* is damaged \(it holds step 2\); restore step 1 instead"):
        Checkpoints(tmp_path, read_only=True).restore(_shapes(_state()), 8)


def test_nothing_sound_is_an_error_each_time_and_moves_nothing(tmp_path, caplog):
    _saved(tmp_path, mAP=[0.5, 0.4])
    for step in ("1", "2"):
        shutil.rmtree(tmp_path / step / "training")
    for checkpoints in (Checkpoints(tmp_path, read_only=True), Checkpoints(tmp_path)):
        for _ in range(2):
            with pytest.raises(
                UserError, match=r"step 2 .* is damaged \(.*\); no other checkpoint there is sound; rest"
            ):
                checkpoints.restore(_shapes(_state()))
            assert checkpoints.steps == [1, 2]
    assert not caplog.records


def test_a_machine_that_cannot_read_says_so_and_passes_nothing_over(tmp_path, monkeypatch):
    checkpoints = _saved(tmp_path, mAP=[0.5, 0.4])

    def crowded(*_):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("mljax.rundir.orbax.read", crowded)
    with pytest.raises(UserError, match=r"2 cannot be read \(Too many open files\); it may be sound"):
        checkpoints.restore(_shapes(_state()))
    monkeypatch.undo()
    _same(checkpoints.restore(_shapes(_state())), _state(2))


# What is kept, and how it goes


def test_never_fewer_than_two(tmp_path):
    checkpoints = _saved(tmp_path, mAP=[0.1, 0.2, 0.3])
    assert (checkpoints.steps, checkpoints.best) == ([2, 3], 3)
    with Checkpoints(tmp_path / "b", best=0) as writer:
        for step in (1, 2, 3):
            writer.save(step, _state(step))
        assert writer.steps == [2, 3]


@pytest.mark.parametrize("name, value", [("metrics", 9.0), ("meta", {"stage": 5})])
def test_only_sealed_records_decide_what_is_deleted(tmp_path, name, value):
    """A better value written into a record without its digest: that step is set aside, and the real best stays."""
    with Checkpoints(tmp_path) as checkpoints:
        for step, mAP in ((1, 0.9), (2, 0.5)):
            checkpoints.save(step, _state(step), metrics={"mAP": mAP})
        checkpoints.wait()
        path = tmp_path / "2" / "record" / "metadata"
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, name: {"mAP": value} if name == "metrics" else value}))
        checkpoints.save(3, _state(3), metrics={"mAP": 0.4})
        assert (checkpoints.steps, checkpoints.best) == ([1, 3], 1)
    assert (tmp_path / "damaged-2").is_dir()


def test_a_kill_within_a_deletion_leaves_no_torn_step(tmp_path):
    killed = _python(
        BIG
        + """
    import shutil
    rmtree = shutil.rmtree
    def die(path, *args, **kwargs):
        if os.path.isdir(os.path.join(path, "weights")):
            rmtree(os.path.join(path, "weights"))
            os.kill(os.getpid(), signal.SIGKILL)
        return rmtree(path, *args, **kwargs)
    shutil.rmtree = die
    for step in (1, 2, 3):
        checkpoints.save(step, state(step, 100), metrics={"mAP": 0.1 * step})
    checkpoints.wait()
    """,
        tmp_path,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3", "deleted-1"]
    assert Checkpoints(tmp_path, read_only=True).steps == [2, 3]
    assert Checkpoints(tmp_path).steps == [2, 3] and not (tmp_path / "deleted-1").exists()


def test_a_replaced_step_comes_back_where_its_successor_never_came(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, _state(1))
        checkpoints.save(2, _state(2))
        checkpoints.wait()
        monkeypatch.setattr("mljax.rundir.orbax.save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(UserError, match="No space left"):
            checkpoints.save(2, _state(3), metrics={"mAP": 0.5}, replace=True)
        monkeypatch.undo()
        _same(checkpoints.restore(_shapes(_state())), _state(2))
        assert checkpoints.save(2, _state(3), metrics={"mAP": 0.5}, replace=True)
        _same(checkpoints.restore(_shapes(_state())), _state(3))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


# Numbers


@pytest.mark.parametrize(
    "path, value",
    [("params/head/kernel", np.nan), ("ema/params/backbone/bias", np.inf), ("variables/memory/queue", -np.inf)],
)
def test_a_state_that_is_not_finite_is_never_saved(tmp_path, path, value):
    state = _state(2)
    poison = lambda at, x: (x + value).astype(x.dtype) if path_name(at) == path else x  # noqa: E731
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, _state(1), metrics={"mAP": 0.5})
        with pytest.raises(NotFinite, match=f"step 2 is not saved: {path} is not finite") as error:
            checkpoints.save(2, jax.tree_util.tree_map_with_path(poison, state), metrics={"mAP": 0.9})
        assert error.value.path == path and checkpoints.steps == [1]
        large = jax.tree.map(lambda x: x * 0 + 3e38 if x.dtype == jnp.float32 else x, state.params)
        assert checkpoints.save(2, state.replace(params=large))  # its sum is infinite, and it is not


def test_constants_and_the_optimiser_may_hold_infinities(tmp_path):
    state = _state()
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
        _same(checkpoints.restore(_shapes(_state()), 1), _state(1))
        _same(checkpoints.restore(_shapes(_state())), _state(2))
        checkpoints.save(3, _state(3), metrics={"mAP": 60.0})
        assert (checkpoints.steps, checkpoints.best) == ([2, 3], 3)
