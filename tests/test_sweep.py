"""The sensitivity study: which runs it makes, that it resumes, and the table it prints."""

import json

import pytest

from mljax import sweep
from mljax.config.text import to_json
from mljax.errors import UserError


def test_one_setting_at_a_time_beside_the_config_itself():
    found = sweep.variants(["system.sga_heads=1,2", "system.mode=add,mask"], grid=False)
    assert found == [
        (),
        (("system.sga_heads", "1"),),
        (("system.sga_heads", "2"),),
        (("system.mode", "add"),),
        (("system.mode", "mask"),),
    ]


def test_grid_is_every_combination_and_tuples_stay_whole():
    found = sweep.variants(["a=1,2", "b=(1,2),(3,4)"], grid=True)
    assert found == [(("a", x), ("b", y)) for x in "12" for y in ("(1,2)", "(3,4)")]


def test_mean_and_sample_deviation_over_seeds():
    reports = [{"metrics": {"mAP": m, "CF1": 1.0, "OF1": 2.0}} for m in (80.0, 82.0, 84.0)]
    assert sweep.table({"x": reports}).splitlines()[-1] == "| x | 3 | 82.00 ± 2.00 | 1.00 ± 0.00 | 2.00 ± 0.00 |"


def test_wrong_words_are_said_before_anything_runs(tmp_path):
    options = ["--config=configs/cmsg.py:smoke", f"--workdir={tmp_path}"]
    with pytest.raises(UserError, match="is not KEY=VALUE"):
        sweep.main([*options, "--over", "system.sga_heads"])
    with pytest.raises(UserError, match="no key 'sytem'"):
        sweep.main([*options, "--over", "sytem.sga_heads=1"])
    with pytest.raises(UserError, match="no flag --epochs"):
        sweep.main([*options, "--epochs=3"])
    with pytest.raises(UserError, match="are not whole numbers with commas between them"):
        sweep.main([*options, "--seeds=0;1"])
    with pytest.raises(UserError, match="--jobs is 0"):
        sweep.main([*options, "--jobs=0"])
    assert not list(tmp_path.iterdir())


def finished(tmp_path, argv):
    """The folder of a sweep's only run as a finished run leaves it: its config, and a report of mAP 50."""
    args, extra = sweep.parse(argv)
    (job,) = sweep.jobs_of(args.config, [], sweep.variants(args.over, args.grid), args.seeds)
    path = tmp_path / job.folder
    path.mkdir(parents=True)
    (path / "config.json").write_text(to_json(sweep.config_of(job, extra)))
    metrics = {"mAP": 50.0, "CF1": 40.0, "OF1": 30.0}
    (path / "report.json").write_text(json.dumps({"metrics": metrics, "definition": "raw"}))
    return path


def test_a_finished_run_of_other_settings_is_not_read_as_this_one(tmp_path, capsys):
    options = ["--config=configs/baseline.py:smoke", f"--workdir={tmp_path}"]
    path = finished(tmp_path, [*options, "--config.optim.epochs=1"])
    sweep.main([*options, "--config.optim.epochs=1"])
    assert "| as configured | 1 | 50.00 | 40.00 | 30.00 |" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"another config; it differs in optim.epochs: 1 -> 2\. Choose another --workdir"
    ):
        sweep.main(options)
    (path / "config.json").unlink()
    with pytest.raises(UserError, match="holds no config.json"):
        sweep.main(options)


def test_a_finished_run_from_before_a_key_was_there_is_read(tmp_path, capsys):
    options = ["--config=configs/baseline.py:smoke", f"--workdir={tmp_path}"]
    path = finished(tmp_path, options) / "config.json"
    config = json.loads(path.read_text())
    del config["unseen"], config["weights"]["mean"], config["eval"]["scored_in"]
    config["log_every"] = 7  # changes nothing that is computed
    path.write_text(json.dumps(config))
    sweep.main(options)
    assert "50.00" in capsys.readouterr().out


def test_keys_of_the_same_last_part_have_folders_of_their_own():
    folders = [sweep.folder_of(((key, "8"),), 0) for key in ("system.width", "backbone.width")]
    assert folders == ["system.width=8_seed0", "backbone.width=8_seed0"]


def test_every_run_is_checked_before_the_first_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "_call", lambda *args: pytest.fail("a run began"))
    options = ["--config=configs/baseline.py:smoke", f"--workdir={tmp_path}"]
    with pytest.raises(UserError, match="config.optim.epochs is 0; it must be at least 1"):
        sweep.main([*options, "--over", "optim.epochs=1,0"])
    with pytest.raises(UserError, match="has no setting 'poling'"):
        sweep.main([*options, "--over", "system.poling=max"])
    assert not list(tmp_path.iterdir())


def test_several_configs_and_columns():
    jobs = sweep.jobs_of(["configs/sst.py:voc2007", "configs/ssgrl.py@3,4"], ["known=0.1", "known=0.5"], [()], "0")
    assert [(j.config, j.seed) for j in jobs] == [
        ("configs/sst.py:voc2007,known=0.1", 0),
        ("configs/sst.py:voc2007,known=0.5", 0),
        ("configs/ssgrl.py:known=0.1", 3),
        ("configs/ssgrl.py:known=0.5", 3),
        ("configs/ssgrl.py:known=0.1", 4),
        ("configs/ssgrl.py:known=0.5", 4),
    ]
    assert len({j.folder for j in jobs}) == 6
    report = lambda m: {"metrics": {"mAP": m}}  # noqa: E731
    found = {("sst", "known=0.1"): [report(80.0)], ("sst", "known=0.5"): [report(82.0), report(84.0)]}
    assert sweep.wide_table(found, ["known=0.1", "known=0.5"]).splitlines() == [
        "| mAP | 10 % | 50 % | average |",
        "|---|---|---|---|",
        "| sst | 80.00 | 83.00 ± 1.41 | 81.50 |",
    ]


def test_shares_from_to_and_what_no_average_is_taken_of():
    assert sweep.columns_of("known=0.1..0.9") == [f"known=0.{i}" for i in range(1, 10)]
    assert sweep.columns_of("voc2012,known=1..3,known=0.05..0.06") == [
        *("voc2012", "known=1", "known=2", "known=3", "known=0.05", "known=0.06"),
    ]
    with pytest.raises(UserError, match="ends before it begins"):
        sweep.columns_of("known=0.9..0.1")
    found = {("an", "voc2012"): [{"metrics": {"mAP": 80.0}}]}
    lines = ["| mAP | voc2012 | coco2014 |", "|---|---|---|", "| an | 80.00 | - |"]
    assert sweep.wide_table(found, ["voc2012", "coco2014"]).splitlines() == lines


def test_best_setting_of_each_cell_by_its_own_split():
    """By hand: on VOC the second setting has the better mean over two seeds, on COCO the first."""
    variants = [(("optim.lr", "1e-2"),), (("optim.lr", "1e-3"),)]
    jobs = sweep.jobs_of(["configs/single_positive.py:an"], ["voc2012", "coco2014"], variants, "0,1")
    own = {("voc2012", "1e-2"): (80, 82), ("voc2012", "1e-3"): (79, 85), ("coco2014", "1e-2"): (60, 60)}
    own |= {("coco2014", "1e-3"): (60, 59)}
    shown = {
        ("voc2012", "1e-2"): 99.0,
        ("voc2012", "1e-3"): 70.0,
        ("coco2014", "1e-2"): 50.0,
        ("coco2014", "1e-3"): 99.0,
    }
    results = []
    for job in jobs:
        cell = job.column, job.variant[0][1]
        results.append(sweep.Result(job, own[cell][job.seed], {"metrics": {"mAP": shown[cell] + job.seed}}))
    assert sweep.shown(results, ["voc2012", "coco2014"], True).splitlines() == [
        "| mAP | voc2012 | coco2014 |",
        "|---|---|---|",
        "| single_positive:an | 70.50 ± 0.71 | 50.50 ± 0.71 |",
        "",
        "single_positive:an, voc2012: optim.lr=1e-3 (mAP 82.00 of 2 settings)",
        "single_positive:an, coco2014: optim.lr=1e-2 (mAP 60.00 of 2 settings)",
    ]
    assert sweep.shown(results, ["voc2012"], False).count("\n") == 3  # a row for each setting


@pytest.mark.slow
def test_another_split_is_scored_once(tmp_path, capsys):
    """Another split's report has its own file, and the table shows its mAP."""
    options = ["--config=configs/cmsg.py:smoke", f"--workdir={tmp_path}", "--config.optim.epochs=1", "--split=train"]
    sweep.main(options)
    said = capsys.readouterr().out
    path = tmp_path / "config_seed0" / "report_train_raw.json"
    found = json.loads(path.read_text())
    assert found["images"] == 48 and f"{found['metrics']['mAP']:.2f}" in said
    before = path.stat().st_mtime_ns
    sweep.main(options)
    assert capsys.readouterr().out == said and path.stat().st_mtime_ns == before


@pytest.mark.slow
def test_runs_resume_and_are_summed_up(tmp_path, capsys):
    options = ["--config=configs/cmsg.py:smoke", f"--workdir={tmp_path}", "--config.optim.epochs=1"]
    sweep.main([*options, "--over", "system.sga_layers=0", "--seeds=0,1"])
    first = capsys.readouterr().out
    assert first.count("\n") == 4 and "| system.sga_layers=0 | 2 |" in first
    report = tmp_path / "system.sga_layers=0_seed1" / "report.json"
    assert json.loads(report.read_text())["seed"] == 1
    before = report.stat().st_mtime_ns
    sweep.main([*options, "--over", "system.sga_layers=0", "--seeds=0,1"])
    assert capsys.readouterr().out == first and report.stat().st_mtime_ns == before
