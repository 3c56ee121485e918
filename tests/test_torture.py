"""The harness of `make torture`: a few cases of each kind that is quick, and that each check can fail."""

import json
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest

from benchmarks.torture import __main__ as command
from benchmarks.torture import harness, pool, report
from benchmarks.torture.kinds import bitrot, configs, images, nan, soak
from benchmarks.torture.kinds.all import KINDS

FULL = {
    **{"kill": 100, "signals": 100, "bitrot": 10_351, "nan": 60, "images": 12_020, "disk": 60, "topology": 32},
    **{"workers": 40, "configs": 5_000, "soak": 50_001},
}


def made(tmp_path, name, count=1, what=None):
    """The outcomes of some cases of a kind, or of a category, in this process."""
    kind, options = KINDS[name], harness.Options(tmp_path)
    every = kind.categories()
    chosen = [i for i, category in enumerate(every) if what in (None, category)][:count]
    return [harness.run_case(kind, i, options) for i in chosen]


def test_the_full_plan_has_the_numbers_that_are_published():
    for name, units in FULL.items():
        assert KINDS[name].planned(KINDS[name].total) == units, name
    plan = KINDS["hostile"].plan
    assert sum(n for what, n in plan.items() if what.startswith("file")) >= 120
    assert sum(n for what, n in plan.items() if what.startswith("name")) == 200
    assert sum(n for what, n in KINDS["data"].plan.items() if what not in ("nothing", "only touched")) == 40
    assert KINDS["kill"].plan == {"anywhere": 50, "save or deletion": 30, "evaluation": 20}
    page = report.PAGE.read_text()
    assert all(f"\n| {name} |" in page for name in KINDS)


# --- the harness ------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A kind whose cases pass, fail, die and hang, run by real workers; returns its outcomes by case."""
    source = tmp_path / "fake.py"
    source.write_text(
        "import os, time\n"
        "from benchmarks.torture.harness import Failed, Kind\n"
        "def case(case):\n"
        "    (case.shared / f'ran{case.index}.{time.time()}').touch()\n"
        "    if case.index == 1: raise Failed('it is not so')\n"
        "    if case.index == 2: os.kill(os.getpid(), 11)\n"
        "    if case.index == 3: time.sleep(60)\n"
        "    if case.index == 4: raise KeyError('x')\n"
        "    return {'figures': {'drawn': int(case.rng.integers(1 << 30))}}\n"
        "KIND = Kind('fake', 'a goal', {'x': 6}, case, units={'x': 10}, limit=2.0)\n"
        "from benchmarks.torture.kinds import all as kinds\n"
        "kinds.KINDS['fake'] = KIND\n"
        "from benchmarks.torture.worker import main\n"
        "import sys\n"
        "if __name__ == '__main__': main('fake', sys.argv[-1])\n"
    )
    scope = {"__name__": "fake"}
    exec(source.read_text(), scope)
    popen = pool.subprocess.Popen

    def started(command, **options):
        return popen([command[0], str(source), command[-1]], **options)

    monkeypatch.setattr(pool.subprocess, "Popen", started)
    yield scope["KIND"]
    KINDS.pop("fake", None)


def test_cases_that_fail_die_and_hang_are_counted_and_a_stopped_harness_goes_on(fake, tmp_path, capsys):
    out, said = tmp_path / "out", []
    out.mkdir()
    options = harness.Options(out, seed=3, jobs=2)
    pool.run_kind(fake, 5, options, said.append)
    lines = harness.read_outcomes(out / "fake.jsonl")
    assert [lines[i]["outcome"] for i in range(5)] == ["ok", "failed", "died", "hung", "failed"]
    assert lines[1]["why"] == "it is not so" and signal.SIGSEGV.name in lines[2]["why"] and len(said) == 4
    assert lines[4]["why"].startswith("KeyError at fake.py")
    kept = (out / "fake.jsonl").read_text().splitlines()
    (out / "fake.jsonl").write_text("\n".join(kept[:4]) + '\n{"case": 0, "out')  # killed within a line
    pool.run_kind(fake, 6, options, said.append)
    again = harness.read_outcomes(out / "fake.jsonl")
    assert sorted(again) == [*range(6)] and again[0] | {"seconds": 0} == lines[0] | {"seconds": 0}
    assert len(list((out / "shared" / "fake").glob("ran1.*"))) == 1  # it was not run twice
    row = report.row(out, fake, 6)
    assert (row.full, row.planned, row.run, row.failures) == (60, 60, 60, 40) and len(row.why) == 4


def test_command(tmp_path, monkeypatch, capsys):
    argv = [f"--out={tmp_path}", "--count=2"]
    monkeypatch.setattr(pool, "run_kind", lambda kind, count, options, say, preload: lines(tmp_path, kind, "ok"))
    assert command.main(["nan", *argv]) == 0
    monkeypatch.setattr(pool, "run_kind", lambda kind, count, options, say, preload: lines(tmp_path, kind, "failed"))
    assert command.main(["nan", *argv]) == 1
    assert "| nan | 60 | 2 | 2 | 2 |" in capsys.readouterr().out
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    monkeypatch.setattr(report, "PAGE", page)
    assert command.main(["nan", "--report", *argv]) == 1
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text and "- nan 0 (" in text
    with pytest.raises(SystemExit):
        command.main(["nam"])


def lines(out, kind, outcome):
    rows = {i: {"case": i, "what": "x", "outcome": outcome, "units": 1, "seconds": 1, "why": "y"} for i in range(2)}
    harness.write_outcomes(out / f"{kind.name}.jsonl", rows)


# --- kinds that are quick ---------------------------------------------------------------------------------------------


def test_mutants_and_special_files(tmp_path, monkeypatch):
    assert {line["outcome"] for line in made(tmp_path, "images", 1, "mutants")} == {"ok"}
    for what in ("fifo", "link to itself", "PNG of 60,000 by 60,000"):
        (line,) = made(tmp_path, "images", 1, what)
        assert line["outcome"] == "ok" and line["unreadable"] == 1, line
    monkeypatch.setattr(images, "_decoded", lambda path: "x" * (path.name == "3.jpg"))  # another list than the loader's
    assert made(tmp_path, "images", 1, "mutants")[0]["why"].startswith(("1 cannot be read", "0 cannot be read"))


def test_fuzzed_overrides(tmp_path, monkeypatch):
    outcomes = made(tmp_path, "configs", 15)
    assert {line["outcome"] for line in outcomes} == {"ok"}, outcomes
    assert sum(line["refused"] for line in outcomes) > 0
    monkeypatch.setattr(configs, "_argv", lambda rng: ["--config=configs/baseline.py:smoke", "--config.seed"])
    monkeypatch.setattr("mljax.check.check", lambda config: 1 / 0)
    assert made(tmp_path, "configs")[0]["outcome"] == "ok"  # refused before the check: the flag has no value
    monkeypatch.setattr(configs, "_argv", lambda rng: ["--config=configs/baseline.py:smoke"])
    assert "ZeroDivisionError" in made(tmp_path, "configs")[0]["why"]


def test_memory_that_grows_and_descriptors_that_stay_open_are_failures():
    def points(growth, opened):
        return [(s, int(1e9 * (1 + growth * s / 1000)), 20 + (s > 900) * opened) for s in range(1, 1001, 10)]

    assert soak._judge(points(0.01, 0), 1000)["figures"]["growth in %"] < 1
    with pytest.raises(harness.Failed, match="memory grew by"):
        soak._judge(points(0.05, 0), 1000)
    with pytest.raises(harness.Failed, match=r"\+3 open descriptors"):
        soak._judge(points(0, 3), 1000)


def test_silent_damage_is_a_failure(tmp_path, monkeypatch):
    """A reader that gives other values without a word, against one that says so."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "env.json").write_text(json.dumps({"a": 1}))
    copy = object.__new__(bitrot.Copy)
    copy.run, copy.steps = run, {}
    copy.whole = {"env.json": bitrot.outcome("env.json", run)}
    assert copy.judge("env.json") == ""
    (run / "env.json").write_text(json.dumps({"a": 2}))
    assert copy.judge("env.json") == "env.json: another value without a word"
    (run / "env.json").write_text("{")
    assert copy.judge("env.json") == ""  # an error
    copy.whole["state"], copy.steps = ("value", [6, {"w": "00"}]), {3: {"w": "11"}, 6: {"w": "00"}}
    for read, said, wrong in (
        ([6, {"w": "01"}], [], "arrays of step 6 are not"),
        ([3, {"w": "11"}], [], "step 3 without a word, not 6"),
        ([3, {"w": "11"}], ["damaged"], ""),
        ([3, {"w": "12"}], ["damaged"], "arrays of step 3 are not"),
        ([6, {"w": "00"}], [], ""),
    ):
        answer = ("said", [read, said]) if said else ("value", read)
        monkeypatch.setattr(bitrot, "outcome", lambda reader, run, answer=answer: answer)
        assert wrong in copy.judge("state") and bool(wrong) == bool(copy.judge("state"))


def test_what_was_saved_after_a_bad_number_is_a_failure(tmp_path):
    path = tmp_path / "read"
    for read, wrong in (
        ({"steps": [3, 6], "bad": []}, None),
        ({"steps": [3, 9], "bad": []}, "step 9 was saved after it"),
        ({"steps": [3], "bad": [[3, "params/w"]]}, "saved with params/w not finite"),
    ):
        path.write_text(json.dumps(read))
        if wrong is None:
            nan._check_saved(path, "x", 6)
        else:
            with pytest.raises(harness.Failed, match=wrong):
                nan._check_saved(path, "x", 6)
    batch = {"image": np.zeros((4, 2, 2, 3), np.uint8), "labels": np.zeros((4, 3), np.float32)}
    assert np.isnan(nan._bad_batch(batch, "input", np.nan)["image"]).any()
    assert np.isinf(nan._bad_batch(batch, "label", np.inf)["labels"]).any()


# --- kinds that train -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_case_through_workers_forks_and_faults(tmp_path):
    cache = Path(tempfile.gettempdir()) / "mljax-test-torture"  # compiled once for all runs of this test
    cache.mkdir(exist_ok=True)
    (tmp_path / "cache").symlink_to(cache)
    names = ("disk", "hostile")
    assert command.main([*names, "--count=1", f"--out={tmp_path}"]) == 0
    for name in names:
        (line,) = harness.read_outcomes(tmp_path / f"{name}.jsonl").values()
        assert line["outcome"] == "ok"
