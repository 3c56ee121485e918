"""Checkpoints: every way in which a file or a process can break, and what takes over."""

import json
import shutil
import signal

import numpy as np
import pytest

from mljax import seal
from mljax.errors import UserError
from mljax.rundir.checkpoint import Checkpoints
from saved_states import BIG, biggest, new_state, python, same, saved, shapes

# Damage


@pytest.mark.parametrize("where", [0.1, 0.5, 0.9])
def test_flipped_byte_names_the_leaf_and_the_way_out(tmp_path, where):
    """A byte of incompressible data in the largest file: orbax loads it, or fails, and both are one sentence here."""
    state = new_state(width=400)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, metrics={"mAP": 0.9})
        checkpoints.save(2, state, metrics={"mAP": 0.5})
    path = biggest(tmp_path / "2" / "weights")
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 4
    path.write_bytes(data)
    checkpoints = Checkpoints(tmp_path, read_only=True)
    with pytest.raises(
        UserError, match=r"step 2 in .* is damaged \(.*\); restore step 1 instead, or delete .*2"
    ) as error:
        checkpoints.restore(shapes(state), 2)
    assert "the bytes of" in str(error.value) or "cannot be read" in str(error.value)
    same(checkpoints.restore(shapes(state), 1), state)


def test_wrong_bytes_name_their_leaf(tmp_path):
    checkpoints = saved(tmp_path, mAP=[0.5])
    record = tmp_path / "1" / "record" / "metadata"
    content = json.loads(record.read_text())
    content["leaves"]["params/head/kernel"][2] = "12345678"
    content["digest"] = seal.digest(content)
    record.write_text(json.dumps(content))
    with pytest.raises(
        UserError, match=r"the bytes of params/head/kernel are not those .* no other checkpoint there is sound"
    ):
        checkpoints.restore(shapes(new_state()))


@pytest.mark.parametrize("part", ["weights", "training"])
def test_truncated_file(tmp_path, part):
    checkpoints = saved(tmp_path, mAP=[0.5])
    path = biggest(tmp_path / "1" / part / "d")
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match=r"step 1 .* is damaged"):
        checkpoints.restore(shapes(new_state()))


@pytest.mark.parametrize("gone", ["weights", "training", "record", "training/d", "record/metadata"])
def test_missing_files(tmp_path, gone):
    checkpoints = saved(tmp_path, mAP=[0.5])
    path = tmp_path / "1" / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=r"step 1 .* is damaged"):
        checkpoints.restore(shapes(new_state()))


def test_changed_record(tmp_path):
    checkpoints = saved(tmp_path, mAP=[0.5])
    record = tmp_path / "1" / "record" / "metadata"
    record.write_text(record.read_text().replace("0.5", "0.6"))
    with pytest.raises(UserError, match="its record is not what was saved"):
        checkpoints.meta()


def test_full_disk_before_writing(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, new_state(1))
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
        with pytest.raises(
            UserError, match=r"step 2 cannot be written .*0.0 MiB are free.* older checkpoints are whole"
        ):
            checkpoints.save(2, new_state(2))
        monkeypatch.undo()
        same(checkpoints.restore(shapes(new_state())), new_state(1))
        assert checkpoints.save(2, new_state(2))


def test_full_disk_while_writing(tmp_path, monkeypatch):
    """The write fails in the background: the next call says so in a sentence, the older step stays, saving goes on."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, new_state(1))
        checkpoints.save(2, new_state(2))

        def fail():
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoints._saver, "wait_until_finished", fail)
        with pytest.raises(UserError, match="No space left on device"):
            checkpoints.wait()
        assert 1 in checkpoints.steps or 2 in checkpoints.steps
        assert checkpoints.save(3, new_state(3))
        same(checkpoints.restore(shapes(new_state())), new_state(3))


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
    "array": lambda step: _flip(biggest(step / "weights"), 0.1),
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
    state = new_state(1, width=400)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, metrics={"mAP": 0.5})
        checkpoints.save(2, new_state(2, width=400), metrics={"mAP": 0.9})
    DAMAGE[damage](tmp_path / "2")
    damaged = sorted(path.name for path in (tmp_path / "2").rglob("*"))
    reader = Checkpoints(tmp_path, read_only=True)
    for which in ("last", "best"):
        same(reader.restore(shapes(state), which), state)
    assert (reader.restored, reader.latest, reader.best) == (1, 1, 1)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and said[0].startswith(f"The checkpoint of step 2 in {tmp_path} is damaged (")
    assert said[0].endswith("); step 1 is used instead.")
    caplog.clear()
    with Checkpoints(tmp_path) as writer:
        same(writer.restore(shapes(state)), state)
        assert (writer.restored, writer.steps) == (1, [1])
        assert writer.save(2, new_state(3, width=400), metrics={"mAP": 0.7})
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and said[0].endswith("); it is set aside as damaged-2, and step 1 is used instead.")
    assert sorted(path.name for path in (tmp_path / "damaged-2").rglob("*")) == damaged
    assert Checkpoints(tmp_path, read_only=True).steps == [1, 2]


def test_a_number_that_was_swapped_is_said(tmp_path):
    saved(tmp_path, mAP=[0.5, 0.4])
    (tmp_path / "2").rename(tmp_path / "8")
    with pytest.raises(UserError, match=r"step 8 in .* is damaged \(it holds step 2\); restore step 1 instead"):
        Checkpoints(tmp_path, read_only=True).restore(shapes(new_state()), 8)


def test_nothing_sound_is_an_error_each_time_and_moves_nothing(tmp_path, caplog):
    saved(tmp_path, mAP=[0.5, 0.4])
    for step in ("1", "2"):
        shutil.rmtree(tmp_path / step / "training")
    for checkpoints in (Checkpoints(tmp_path, read_only=True), Checkpoints(tmp_path)):
        for _ in range(2):
            with pytest.raises(
                UserError, match=r"step 2 .* is damaged \(.*\); no other checkpoint there is sound; rest"
            ):
                checkpoints.restore(shapes(new_state()))
            assert checkpoints.steps == [1, 2]
    assert not caplog.records


def test_a_machine_that_cannot_read_says_so_and_passes_nothing_over(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, mAP=[0.5, 0.4])

    def crowded(*_):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("mljax.rundir.orbax.read", crowded)
    with pytest.raises(UserError, match=r"2 cannot be read \(Too many open files\); it may be sound"):
        checkpoints.restore(shapes(new_state()))
    monkeypatch.undo()
    same(checkpoints.restore(shapes(new_state())), new_state(2))


# Processes that end


def test_killed_while_saving_and_saved_at_exit(tmp_path):
    """SIGKILL in the middle of the second save; a later process goes on, quietly, and waits at its exit."""
    killed = python(
        BIG
        + """
    checkpoints.save(1, new_state(1), metrics={"mAP": 0.5})
    checkpoints.wait()
    rename = os.rename
    def die(source, target, *args, **kwargs):
        if str(target).endswith("/2"):
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(source, target, *args, **kwargs)
    os.rename = os.replace = die
    checkpoints.save(2, new_state(2), metrics={"mAP": 0.6})
    checkpoints.wait()
    """,
        tmp_path,
    )
    assert killed.returncode == -signal.SIGKILL
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2.orbax-checkpoint-tmp"]
    going_on = python(
        BIG
        + """
    assert checkpoints.steps == [1] and checkpoints.best == 1
    old = checkpoints.restore(new_state(0))
    np.testing.assert_array_equal(old.params["w"], new_state(1).params["w"])
    checkpoints.save(2, new_state(3), metrics={"mAP": 0.6})  # and the process ends without close()
    """,
        tmp_path,
    )
    assert (going_on.returncode, going_on.stdout, going_on.stderr) == (0, "", "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]
    expected = np.random.default_rng(3).random(2_000_000, np.float32)
    np.testing.assert_array_equal(Checkpoints(tmp_path, read_only=True).restore_params()["params"]["w"], expected)


def test_killed_at_once(tmp_path):
    done = python(
        BIG
        + """
    checkpoints.save(1, new_state(1))
    checkpoints.wait()
    checkpoints.save(2, new_state(2))
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
    done = python(
        BIG
        + """
    checkpoints.save(1, new_state(1, 1000))
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    try:
        checkpoints.save(2, new_state(2))
        checkpoints.wait()
    except UserError as error:
        print(error)
    np.testing.assert_array_equal(checkpoints.restore_params()["params"]["w"], new_state(1, 1000).params["w"])
    checkpoints.save(3, new_state(3, 1000))
    checkpoints.close()
    print(checkpoints.steps)
    """,
        tmp_path,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        f"The checkpoint of step 2 cannot be written to {tmp_path} (File too large); free some space or choose another"
        " folder and resume; the older checkpoints are whole.",
        "[1, 3]",
    ]


def test_damage_is_one_sentence_and_nothing_else(tmp_path):
    """With many reads under way when one fails, and absl's log set up as a command does."""
    saved(tmp_path, mAP=[0.5])
    path = tmp_path / "1" / "weights" / "manifest.ocdbt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    done = python(
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
    done = python("import sys, mljax.rundir.checkpoint; print('orbax.checkpoint' in sys.modules)")
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_a_kill_within_a_deletion_leaves_no_torn_step(tmp_path):
    killed = python(
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
        checkpoints.save(step, new_state(step, 100), metrics={"mAP": 0.1 * step})
    checkpoints.wait()
    """,
        tmp_path,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3", "deleted-1"]
    assert Checkpoints(tmp_path, read_only=True).steps == [2, 3]
    assert Checkpoints(tmp_path).steps == [2, 3] and not (tmp_path / "deleted-1").exists()
