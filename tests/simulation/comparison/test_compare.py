"""Whole comparisons of a tiny federation: numbers, folders, resuming and what goes wrong."""

import json
import re
import shutil
import sys
from dataclasses import replace

import pytest

import fedlora.report
from fedlora.data import load_data
from fedlora.errors import ConfigError, RunError, UnknownNameError
from fedlora.experiment import ExperimentConfig
from fedlora.federation.folder import read_rows
from fedlora.report import markdown_report, report_at_end
from fedlora.simulation import compare, simulate
from fedlora.simulation.comparison.runs import on_validation
from tests.simulation.small import PEOPLE, config

SMALL = config(federation__rounds=2, personalization__steps=2)
# The package's `compare` is the function; this is its module.
module = sys.modules["fedlora.simulation.comparison.compare"]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    out = tmp_path_factory.mktemp("comparison") / "a"
    return compare(SMALL, "fedit,ffa-lora", seeds=2, out=out)


def test_every_run_is_an_ordinary_simulation(both, tmp_path):
    run = simulate(
        SMALL, overrides={"federation.method": "ffa-lora", "seed": 1}, out=tmp_path / "x"
    )
    result = both.results[0, "ffa-lora"][1]
    for name in ("base", "own", "global", "personal"):
        assert result.scores[name].mean == run.summary[name]["mean"]
        assert result.scores[name].loss == pytest.approx(run.summary[name]["loss"])  # sums' order
    assert (result.bytes_up, result.bytes_down) == (
        run.summary["bytes_up"], run.summary["bytes_down"],
    )  # fmt: skip
    folder = both.folder / "runs" / "ffa-lora" / "seed-1"
    assert read_rows(folder / "clients.jsonl")[0]["scores"] == run.clients[0]["scores"]
    assert not (folder / "personal").exists()


def test_a_cell_and_a_difference_follow_from_the_runs(both):
    means = [both.results[0, "fedit"][seed].scores["global"].mean for seed in (0, 1)]
    assert both.cell("fedit").adapters["global"].metric.mean == pytest.approx(sum(means) / 2)
    others = [both.results[0, "ffa-lora"][seed].scores["global"].mean for seed in (0, 1)]
    found = both.difference("ffa-lora")
    gain = (others[0] - means[0] + others[1] - means[1]) / 2
    assert found.over_seeds.interval.mean == pytest.approx(gain)
    assert found.over_clients.interval.count == PEOPLE
    # FFA-LoRA sends B alone: 2·(16 + 16 + 3) of the 2·(6 + 16 + 16 + 16 + 16 + 3) numbers.
    assert both.cell("ffa-lora").bytes_up < both.cell("fedit").bytes_up


def test_the_folder_has_numbers_tables_and_a_plot(both):
    numbers = json.loads((both.folder / "comparison.json").read_text())
    assert numbers == json.loads(json.dumps(both.summary()))
    assert numbers["metric"] == "accuracy"
    assert [run["seed"] for run in numbers["runs"]] == [0, 1, 0, 1]
    resolved = {e["method"]: e["resolved"] for e in numbers["experiments"]}
    assert ExperimentConfig.from_table(resolved["ffa-lora"]).federation.method == "ffa-lora"
    text = (both.folder / "comparison.md").read_text()
    cell = both.cell("fedit").adapters["global"].metric
    assert f"| {cell.mean:.4f} ± {cell.high - cell.mean:.4f} |" in text
    pytest.importorskip("matplotlib")
    assert both.plot.read_bytes().startswith(b"\x89PNG")


def test_its_report_has_its_numbers_and_its_plan_makes_it_again(both, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    text = markdown_report(both.folder)
    for method in ("fedit", "ffa-lora"):
        interval = both.cell(method).adapters["personal"].metric
        assert f"{interval.mean:.4f} ± {interval.high - interval.mean:.4f}" in text
    again = tmp_path / "again"
    again.mkdir()
    shutil.copy(both.folder / "plan.json", again)
    monkeypatch.setattr(fedlora.report, "report_at_end", report_at_end)
    assert [c.adapters for c in compare(resume=again).cells] == [c.adapters for c in both.cells]
    assert (again / "report.html").is_file()
    assert not list(again.rglob("seed-*/report.html"))  # of single runs there would be too many


def test_only_global_has_the_same_global_and_trains_nothing_else(both, tmp_path):
    found = compare(SMALL, "fedit,ffa-lora", seeds=2, only="global", out=tmp_path / "a")
    for key, results in both.results.items():
        for seed, result in results.items():
            less = found.results[key][seed]
            assert less.scores.keys() == {"base", "global"}
            # Grouped otherwise for evaluation, hence up to rounding.
            assert less.scores["global"].loss == pytest.approx(
                result.scores["global"].loss, rel=1e-5
            )
            assert less.clients["global"] == result.clients["global"]
            assert less.bytes_up == result.bytes_up
    assert {d.adapter for d in found.differences} == {"global"}


def test_a_grid_sweeps_any_key(tmp_path):
    grid = {"lora.rank": [1, 2], "federation.local_epochs": [1, 2]}
    found = compare(SMALL, ["fedit"], seeds=2, grid=grid, only="global", out=tmp_path / "a")
    assert len(found.cells) == 4
    ups = [found.cell("fedit", point).bytes_up for point in range(4)]
    assert ups[0] == ups[1] < ups[2] == ups[3]  # the rank is in the message, the epochs are not
    folder = tmp_path / "a" / "runs" / "002-lora.rank=2,federation.local_epochs=1" / "fedit"
    run = ExperimentConfig.from_toml(folder / "seed-0" / "experiment.toml")
    assert (run.lora.rank, run.federation.train.local_epochs) == (2, 1)
    assert (
        "| lora.rank | federation.local_epochs | method |"
        in (tmp_path / "a" / "comparison.md").read_text()
    )


def test_a_tuned_learning_rate_is_that_of_the_reported_runs(tmp_path):
    found = compare(SMALL, "fedit", seeds=2, tune="global", only="global", out=tmp_path / "a")
    (tuned,) = found.tuned
    assert len(tuned.tried) >= 5
    assert tuned.learning_rate != tuned.tried[0].learning_rate or tuned.at_edge
    run = ExperimentConfig.from_toml(
        tmp_path / "a" / "runs" / "fedit" / "seed-1" / "experiment.toml"
    )
    assert run.federation.train.learning_rate == tuned.learning_rate
    assert run.data.validation_share == 0.1
    tuning = ExperimentConfig.from_toml(
        next((tmp_path / "a" / "tuning" / "fedit").iterdir()) / "experiment.toml"
    )
    assert tuning.seed == 1_000_000
    best = max(one.score for one in tuned.tried if one.score is not None)
    (score,) = {one.score for one in tuned.tried if one.learning_rate == tuned.learning_rate}
    assert score == best


def test_tuning_on_personal_scores_the_personal_adapter(tmp_path):
    found = compare(SMALL, "fedit", seeds=2, tune="personal", out=tmp_path / "a")
    rate = found.tuned[0].tried[0].learning_rate
    folder = tmp_path / "a" / "tuning" / "fedit" / f"{rate:g}"
    rows = read_rows(folder / "clients.jsonl")
    mean = sum(row["scores"]["personal"]["accuracy"] for row in rows) / len(rows)
    assert found.tuned[0].tried[0].score == pytest.approx(mean)


def test_validation_takes_the_place_of_the_test_parts():
    data = load_data("tests.simulation.small:data", task="classification")
    for client in data.client_ids:
        mine, moved = data.client(client), on_validation(data).client(client)
        assert moved.test is mine.validation
        assert moved.train is mine.train


def test_diverged_runs_are_in_the_table(tmp_path):
    wild = {"fedit": {}, "wild": {"federation.learning_rate": 1e30}}
    found = compare(SMALL, wild, seeds=2, out=tmp_path / "a")
    assert found.cell("wild").done == 0
    assert found.cell("fedit").done == 2
    assert found.any_done
    assert {result.status for result in found.results[0, "wild"].values()} == {"diverged"}
    assert found.difference("wild").over_seeds is None
    text = (tmp_path / "a" / "comparison.md").read_text()
    assert "| wild | diverged | diverged | diverged | diverged | 0 of 2 |" in text
    assert "- wild: seed 0 diverged: client 'c00': train_local, step 2" in text


def test_a_run_most_of_whose_replies_diverge_is_not_taken_for_the_base(tmp_path):
    """It ends without an error, and its global adapter has learned next to nothing."""
    wild = {"fedit": {}, "wild": {"federation.learning_rate": 1e30}}
    found = compare(SMALL, wild, seeds=2, only="global", out=tmp_path / "a")
    for result in found.results[0, "wild"].values():
        assert result.status == "diverged"
        # Whoever takes one step alone does not notice; two rounds of 8 clients were asked.
        assert re.match(r"\d+ of 16 replies; the last: NonFiniteError", result.reason)


def test_personal_adapters_that_all_diverge_are_a_diverged_run(tmp_path):
    wild = {"personalization.learning_rate": 1e30, "personalization.steps": 4}
    found = compare(SMALL, "fedit", seeds=2, overrides=wild, out=tmp_path / "a")
    assert {result.status for result in found.results[0, "fedit"].values()} == {"diverged"}
    assert not found.any_done


def test_the_same_comparison_goes_on_and_another_is_refused(both, monkeypatch):
    monkeypatch.setattr(module, "compute", None)  # nothing is run again
    again = compare(SMALL, "fedit,ffa-lora", seeds=2, out=both.folder)
    assert again.summary() == both.summary()
    assert compare(resume=both.folder).summary() == both.summary()
    with pytest.raises(
        RunError, match=f"go on with that one: fedlora compare --resume {both.folder}"
    ):
        compare(SMALL, "fedit,ffa-lora", seeds=3, out=both.folder)


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="name another --out"):
        compare(SMALL, "fedit", seeds=2, out=tmp_path)
    with pytest.raises(RunError, match="found no plan"):
        compare(resume=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_comparison_that_stops_in_the_middle_goes_on(both, tmp_path, monkeypatch):
    real, calls = module.compute, []

    def stops(config, folder, *rest):
        calls.append(folder)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(config, folder, *rest)

    monkeypatch.setattr(module, "compute", stops)
    with pytest.raises(KeyboardInterrupt):
        compare(SMALL, "fedit,ffa-lora", seeds=2, out=tmp_path / "a")
    found = compare(resume=tmp_path / "a")
    assert calls[3:] == [calls[2], calls[2].parents[1] / "ffa-lora" / "seed-1"]
    for key, results in both.results.items():
        for seed, result in results.items():
            same = replace(found.results[key][seed], seconds=result.seconds)
            assert same == result


@pytest.mark.parametrize(
    ("methods", "changes", "error", "words"),
    [
        ("fedot", {}, UnknownNameError, "did you mean 'fedit'"),
        ("fedit", {"federation.round": 1}, ConfigError, "method 'fedit': .*did you mean 'rounds'"),
        ("fedit:rank=1", {}, ConfigError, "unexpected keyword argument 'rank'"),
        ("fedit", {"federation.cohort": 99}, ConfigError, "federation.cohort: expected at most"),
    ],
)
def test_what_no_run_can_do_ends_it_with_its_error(methods, changes, error, words, tmp_path):
    with pytest.raises(error, match=words):
        compare(SMALL, methods, seeds=2, overrides=changes, out=tmp_path / "a")


def test_without_matplotlib_there_are_tables_and_a_word(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    found = compare(SMALL, "fedit", seeds=2, only="global", out=tmp_path / "a")
    assert found.plot is None
    assert found.notes == (
        "a plot needs packages that are not installed: run pip install 'fedlora[plots]'",
    )
    assert (tmp_path / "a" / "comparison.md").is_file()
