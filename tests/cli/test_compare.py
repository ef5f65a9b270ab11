"""`fedlora compare` as a command: exit codes, streams, and kill -9 in the middle."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from fedlora.simulation import compare
from tests.forked import start_command
from tests.simulation.small import config

COMMAND = ("compare",)
SMALL = config(federation__rounds=2, personalization__steps=2)
ARGUMENTS = ("--methods", "fedit,ffa-lora", "--seeds", "2")

# Arguments, what the one line on stderr says.
REFUSED = {
    "nothing": ([], ["name an experiment and --methods", "fedit", "--resume"]),
    "no methods": (["watch"], ["name an experiment and --methods"]),
    "unknown method": (["watch", "--methods", "fedot"], ["'fedot'", "did you mean 'fedit'?"]),
    "unknown experiment": (["wach", "--methods", "fedit"], ["did you mean 'watch'?"]),
    "one seed": (["watch", "--methods", "fedit", "--seeds", "1"], ["--seeds: expected at least 2"]),
    "bad grid": (["watch", "--methods", "fedit", "--grid", "lora.rank"], ["--grid lora.rank: exp"]),
    "a key swept twice": (
        ["watch", "--methods", "fedit", "--grid", "lora.rank=2", "--grid", "lora.rank=4"],
        ["lora.rank is swept twice"],
    ),
    "unknown key in the grid": (
        ["watch", "--methods", "fedit", "--grid", "lora.rang=2,4"],
        ["method 'fedit', lora.rang=2: lora.rang: unknown key", "did you mean 'rank'?"],
    ),
    "unknown reference": (
        ["watch", "--methods", "fedit", "--against", "flora"], ["--against flora: not among"],
    ),
    "unknown adapter": (["watch", "--methods", "fedit", "--only", "own"], ["expected 'global'"]),
    "tuned on nothing": (
        ["watch", "--methods", "fedit", "--tune", "--tune-on", "own"], ["--tune-on: expected"],
    ),
    "--tune-on alone": (["watch", "--methods", "fedit", "--tune-on", "global"], ["add it"]),
    "--resume beside a name": (["watch", "--resume", "."], ["name nothing beside it"]),
}  # fmt: skip


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def small(tmp_path) -> str:
    path = tmp_path / "small.toml"
    path.write_text(SMALL.to_toml())
    return str(path)


@pytest.mark.parametrize(("arguments", "texts"), REFUSED.values(), ids=REFUSED.keys())
def test_a_refusal_is_one_line_and_leaves_nothing(arguments, texts, run):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("fedlora: ")
    assert err.count("\n") == 1
    for text in texts:
        assert text in err
    assert not list(Path().iterdir())


def test_it_prints_tables_on_stdout_and_a_line_a_run_on_stderr(run, small):
    code, out, err = run(small, *ARGUMENTS, "--only", "global")
    assert code == 0
    lines = err.splitlines()
    assert lines[-1] == "runs: 4/4 ffa-lora, seed 1"
    assert lines[0].startswith("runs: 1/4 fedit, seed 0, 0:")
    assert lines[0].endswith(" left")
    assert "Against fedit" in out
    assert out.splitlines()[-1] == "everything is in runs/small-comparison/"
    numbers = json.loads(Path("runs/small-comparison/comparison.json").read_text())
    mean = numbers["cells"][0]["adapters"]["global"]["metric"]["mean"]
    assert f"{mean:.4f} ± " in out


def test_json_is_the_file_and_quiet_is_silent(run, small):
    code, out, err = run(small, *ARGUMENTS, "--only", "global", "--json", "--quiet", "--out", "a")
    assert (code, err) == (0, "")
    assert out == Path("a/comparison.json").read_text() + "\n"


def test_where_every_run_diverges_the_table_says_so_and_the_code_is_1(run, small):
    wild = ("--set", "federation.learning_rate=1e30", "--out", "a")
    code, out, err = run(small, "--methods", "fedit", "--seeds", "2", *wild)
    assert code == 1
    assert "diverged" in out
    assert "Traceback" not in err


def test_another_command_on_its_folder_is_refused_with_the_line_that_resumes_it(run, small):
    assert run(small, *ARGUMENTS, "--only", "global", "--out", "a")[0] == 0
    code, out, err = run(small, *ARGUMENTS, "--out", "a")
    assert (code, out) == (1, "")
    assert err.endswith("go on with that one: fedlora compare --resume a\n")


def test_a_killed_comparison_goes_on_with_what_it_has(small, tmp_path):
    """Killed in its second run, it ends with the numbers of one that never was."""
    out = tmp_path / "killed"
    more = ("--out", out, "--set", "federation.rounds=6")
    process = start_command("compare", small, *ARGUMENTS, *more)
    second = out / "runs" / "ffa-lora" / "seed-0" / "rounds.jsonl"
    end = time.monotonic() + 120
    while time.monotonic() < end and process.is_alive() and not second.exists():
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "it was over before it could be killed"
    first = out / "runs" / "fedit" / "seed-0" / "result.json"
    written = first.stat().st_mtime_ns
    assert not (out / "comparison.json").exists()
    last = start_command("compare", "--resume", out, "--json", out=tmp_path / "stdout")
    last.join()
    assert last.exitcode == 0
    assert first.stat().st_mtime_ns == written
    overrides = {"federation.rounds": 6}
    whole = compare(small, "fedit,ffa-lora", seeds=2, overrides=overrides, out=tmp_path / "whole")
    found, expected = json.loads((tmp_path / "stdout").read_text()), whole.summary()
    for mine, other in zip(found["runs"], expected["runs"], strict=True):
        assert {**mine, "seconds": 0} == json.loads(json.dumps({**other, "seconds": 0}))
    for mine, other in zip(found["differences"], expected["differences"], strict=True):
        assert mine == other
