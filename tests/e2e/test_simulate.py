"""Whole runs on real data, cut short: what a run leaves, and that kill -9 costs nothing."""

import json
import signal
import time
from pathlib import Path

import pytest

from fedlora import load_adapter
from fedlora.errors import ConfigError, DataError, RunError
from fedlora.experiment import ExperimentConfig
from fedlora.federation.folder import read_rows
from fedlora.formats import read_info
from fedlora.simulation import simulate
from tests.forked import start_command

SHORT = {
    "data.clients": 4,
    "data.held_out_clients": 0.25,
    "federation.rounds": 3,
    "federation.cohort": 2,
    "federation.local_steps": 2,
    "personalization.steps": 2,
    "personalization.cross": 2,
}
SUMMARY_KEYS = {
    "name", "metric", "higher_is_better", "clients", "rounds", "base", "own", "global", "personal",
    "held_out", "share_improved", "bytes_up", "bytes_down", "seconds", "seed", "fedlora_version",
    "privacy", "extra",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return simulate("watch", overrides=SHORT, out=tmp_path_factory.mktemp("runs") / "a")


def test_a_run_leaves_everything_in_its_folder(run):
    names = {path.name for path in run.folder.iterdir()} - {".lock"}
    assert names == {
        "experiment.toml", "rounds.jsonl", "checkpoint", "clients.jsonl", "own",
        "personal", "adapter",
        "adapter.safetensors", "summary.json",
    }  # fmt: skip
    config = ExperimentConfig.from_toml(run.folder / "experiment.toml")
    assert config.federation.rounds == 3
    assert load_adapter(run.folder / "adapter") == run.adapter
    assert load_adapter(run.folder / "adapter.safetensors") == run.adapter


def test_summary_has_the_documented_keys(run):
    on_disk = json.loads((run.folder / "summary.json").read_text())
    assert on_disk.keys() == SUMMARY_KEYS
    assert on_disk == run.summary
    assert on_disk["rounds"] == 3
    assert on_disk["clients"] == 3
    assert on_disk["extra"]["held_out_clients"] == 1
    assert on_disk["base"].keys() == {"mean", "median", "worst_tenth", "loss"}
    # Three rounds of two clients, each sends its float32 factors once.
    assert on_disk["bytes_up"] > 6 * run.adapter.num_bytes


def test_held_out_clients_are_never_sampled(run):
    rounds = read_rows(run.folder / "rounds.jsonl")
    sampled = {client for row in rounds for client in row["cohort"]}
    held_out = {row["client"] for row in run.clients if row["held_out"]}
    assert len(held_out) == 1
    assert not sampled & held_out


def test_rows_say_in_how_many_rounds_a_client_took_part(run):
    rounds = read_rows(run.folder / "rounds.jsonl")
    for row in run.clients:
        took_part = sum(row["client"] in line["cohort"] for line in rounds)
        assert row["rounds"] == took_part


def test_everyones_personal_adapter_is_kept_and_names_its_global(run):
    files = sorted((run.folder / "personal").iterdir())
    assert [file.stem for file in files] == [row["client"] for row in run.clients]
    info = read_info(files[0])
    assert info.provenance["global"] == run.adapter.fingerprint()
    assert info.adapter != run.adapter


def test_a_start_that_failed_leaves_its_folder_free(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(ConfigError, match=r"federation\.cohort: expected at most"):
        simulate("watch", overrides=SHORT | {"federation.cohort": 9}, out=out)
    again = simulate("watch", overrides=SHORT | {"federation.rounds": 1}, out=out)
    assert again.summary["rounds"] == 1


def test_a_client_that_diverges_is_named_and_left_out_of_the_means(tmp_path):
    wild = SHORT | {"personalization.learning_rate": 1e30, "personalization.steps": 4}
    with pytest.raises(DataError, match="at least one client, found 0 values"):
        simulate("watch", overrides=wild, out=tmp_path / "run")
    rows = read_rows(tmp_path / "run" / "clients.jsonl")
    assert all(row["failed"].startswith(f"client {row['client']!r}: ") for row in rows)


def test_cross_matrix_has_the_own_scores_on_its_diagonal(run):
    cross = run.summary["extra"]["cross"]
    by_client = {row["client"]: row["scores"]["own"]["accuracy"] for row in run.clients}
    for i, client in enumerate(cross["clients"]):
        assert cross["values"][i][i] == by_client[client]


def test_the_same_experiment_gives_the_same_bits(run, tmp_path):
    again = simulate("watch", overrides=SHORT, out=tmp_path / "b")
    assert again.adapter == run.adapter
    assert [row["scores"] for row in again.clients] == [row["scores"] for row in run.clients]


def test_a_finished_run_is_returned_as_it_is(run):
    before = (run.folder / "summary.json").stat().st_mtime_ns
    assert simulate(resume=run.folder).summary == run.summary
    assert (run.folder / "summary.json").stat().st_mtime_ns == before


def test_a_killed_run_resumes_bit_for_bit(run, tmp_path):
    """Kill in a round and again among the clients; then finish."""
    out = tmp_path / "killed"
    sets = [part for key, value in SHORT.items() for part in ("--set", f"{key}={value}")]
    start = ["simulate", "watch", "--out", str(out), *sets]
    _kill_when(start, out / "rounds.jsonl")
    assert not (out / "summary.json").exists()
    resume = ["simulate", "--resume", str(out)]
    _kill_when(resume, out / "clients.jsonl")
    last = start_command(*resume, "--json", out=tmp_path / "stdout")
    last.join()
    assert last.exitcode == 0
    summary = json.loads((tmp_path / "stdout").read_text())
    assert load_adapter(out / "adapter") == run.adapter
    rows = read_rows(out / "clients.jsonl")
    assert [row["scores"] for row in rows] == [row["scores"] for row in run.clients]
    for key in SUMMARY_KEYS - {"seconds"}:
        assert summary[key] == run.summary[key]


def test_resume_takes_nothing_beside_the_folder(run):
    with pytest.raises(ConfigError, match="name nothing beside it"):
        simulate("watch", resume=run.folder)


def test_resume_of_something_else_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"expected a run's folder, found no experiment\.toml"):
        simulate(resume=tmp_path)


def test_own_data_and_own_task_run(tmp_path, monkeypatch):
    """A user's module gives the base, the data and the task."""
    (tmp_path / "mine.py").write_text(OWN_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("FEDLORA_HOME", str(tmp_path / "home"))
    toml = tmp_path / "mine.toml"
    toml.write_text(OWN_EXPERIMENT)
    result = simulate(toml, out=tmp_path / "run")
    assert result.summary["metric"] == "accuracy"
    assert result.summary["clients"] == 3
    assert result.summary["own"]["mean"] > result.summary["base"]["mean"]


OWN_MODULE = """
import numpy as np
import torch
from torch import nn
from fedlora.nn import get_task

def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

def data():
    generator = np.random.default_rng(0)
    people = {}
    for name in ("ann", "bob", "cyd"):
        inputs = generator.normal(size=(60, 4)).astype(np.float32)
        people[name] = {"inputs": inputs, "targets": (inputs[:, 0] > 0).astype(np.int64)}
    return people

def task():
    return get_task("classification")
"""
OWN_EXPERIMENT = """
name = "mine"
[base]
id = "mine:base"
[data]
id = "mine:data"
task = "mine:task"
[lora]
rank = 2
target_modules = ["0", "2"]
[federation]
rounds = 2
cohort = 3
local_steps = 5
learning_rate = 0.05
[personalization]
steps = 10
"""


def _kill_when(arguments: list[str], file: Path) -> None:
    """Start fedlora, and kill it with SIGKILL as soon as `file` has a line."""
    process = start_command(*arguments)
    end = time.monotonic() + 60
    while time.monotonic() < end and process.is_alive():
        if file.exists() and file.stat().st_size:
            break
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "it was over before it could be killed"


def test_a_new_head_is_trained_as_low_rank_factors(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLORA_HOME", str(tmp_path / "home"))
    small = {
        "data.clients": 3,
        "data.held_out_clients": 0.0,
        "lora.target_modules": ["q_proj", "zero_head"],
        "federation.rounds": 1,
        "federation.cohort": 2,
        "personalization.steps": 2,
        "personalization.cross": 0,
    }
    run = simulate("punctuation", overrides=small, out=tmp_path / "run")
    assert run.adapter["zero_head"].out_features == 5
    assert run.summary["own"]["loss"] < run.summary["base"]["loss"]
    with pytest.raises(ConfigError, match=r"has 5 classes; set base\.num_classes = 5"):
        simulate("punctuation", overrides=small | {"base.num_classes": None}, out=tmp_path / "no")
    with pytest.raises(ConfigError, match="expected a rank of at least 5, the number of classes"):
        simulate("punctuation", overrides=small | {"lora.rank": 4}, out=tmp_path / "no")
