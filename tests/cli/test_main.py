"""The whole command: exit codes, one line an error, and which stream says what."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from fedlora import __version__
from fedlora.cli.main import app

SHORT = (
    "data.clients=2", "federation.rounds=1", "federation.cohort=2", "federation.local_steps=1",
    "personalization.steps=1",
)  # fmt: skip
FETCH = "fedlora models fetch smollm2-135m"

# Arguments, exit code, what the one line on stderr says.
REFUSED = {
    "no experiment": (["simulate"], 2, ["name an experiment", "keyboard", "watch", "--resume"]),
    "unknown experiment": (["simulate", "wach"], 2, ["'wach'", "did you mean 'watch'?"]),
    "missing file": (["simulate", "mine.toml"], 2, ["mine.toml: no such experiment file"]),
    "unknown key": (
        ["simulate", "watch", "--set", "federation.round=3"], 2,
        ["federation.round: unknown key", "did you mean 'rounds'?"],
    ),
    "--set without a value": (
        ["simulate", "watch", "--set", "federation.rounds"], 2,
        ["--set federation.rounds: expected key=value"],
    ),
    "--set without a key": (["simulate", "watch", "--set", "=3"], 2, ["expected key=value"]),
    "--set of a wrong type": (
        ["simulate", "watch", "--set", "federation.rounds=many"], 2,
        ["federation.rounds: expected a whole number, found 'many'"],
    ),
    "unknown engine": (["simulate", "watch", "--engine", "spark"], 2, ["engine.kind", "'spark'"]),
    "--resume of no run": (["simulate", "--resume", "."], 1, ["found no experiment.toml"]),
    "--resume beside a name": (["simulate", "watch", "--resume", "."], 2, ["name nothing beside"]),
    "base not fetched": (["simulate", "keyboard-smollm2"], 2, ["'smollm2-135m'", FETCH]),
    "unknown base": (["budget", "tiny-chta"], 2, ["did you mean 'tiny-chat'?"]),
    "unknown base to fetch": (["models", "fetch", "gpt-5"], 2, ["'gpt-5'"]),
    "no adapter": (["inspect", "nothing"], 1, ["nothing: expected a PEFT folder"]),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _empty_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No fetched bases, and an empty current folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("FEDLORA_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize(("arguments", "code", "texts"), REFUSED.values(), ids=REFUSED.keys())
def test_a_refusal_is_one_line_on_stderr(arguments, code, texts, run):
    found, out, err = run(*arguments)
    assert (found, out) == (code, "")
    assert err.startswith("fedlora: ")
    assert err.count("\n") == 1
    for text in texts:
        assert text in err


def test_a_folder_with_a_run_is_refused_with_the_line_that_resumes_it(run):
    Path("mine").mkdir()
    Path("mine", "experiment.toml").touch()
    Path("mine", "rounds.jsonl").touch()
    code, out, err = run("simulate", "watch", "--out", "mine")
    assert (code, out) == (1, "")
    assert err.endswith("; go on with: fedlora simulate --resume mine\n")


def test_a_folder_with_something_else_is_refused_and_left_alone(run):
    Path("mine").mkdir()
    Path("mine", "thesis.txt").write_text("years of work")
    code, out, err = run("simulate", "watch", "--out", "mine")
    assert (code, out) == (1, "")
    assert err.endswith("; name another --out\n")
    assert [path.name for path in Path("mine").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("package", ["torch", "flwr"])
def test_a_missing_extra_is_one_line_with_its_pip_line(package):
    extra = {"torch": "train", "flwr": "sim"}[package]
    code = f"import sys; sys.modules[{package!r}] = None; from fedlora.cli.main import main; main()"
    done = _python("-c", code, "simulate", "watch")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("fedlora: ")
    assert done.stderr.endswith(f": run pip install 'fedlora[{extra}]'\n")
    assert done.stderr.count("\n") == 1
    assert not Path("runs").exists()


def test_an_interruption_is_one_line_and_130(run, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedlora.simulation.simulate", interrupted)
    assert run("simulate", "watch") == (130, "", "fedlora: interrupted\n")


def test_an_unknown_option_is_wrong_usage(run):
    code, out, err = run("simulate", "--rounds", "3")
    assert (code, out) == (2, "")
    assert "--rounds" in err


def test_version(run):
    assert run("--version") == (0, f"fedlora {__version__}\n", "")


def _commands(command, *path: str) -> list[tuple[str, ...]]:
    """Return the words that lead to each command that does something."""
    if not hasattr(command, "commands"):
        return [path]
    found = (_commands(inner, *path, name) for name, inner in command.commands.items())
    return [words for some in found for words in some]


COMMANDS = _commands(typer.main.get_command(app))


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_has_examples(path, run):
    code, out, err = run(*path, "--help")
    assert (code, err) == (0, "")
    assert "Examples" in out
    assert f"fedlora {' '.join(path)}" in out


@pytest.mark.parametrize(
    "path", [(), ("models",), ("data",), ("device",), ("federation",), ("privacy",)], ids=" ".join
)
def test_help_of_a_group_lists_its_commands(path, run):
    code, out, err = run(*path, "--help")
    assert (code, err) == (0, "")
    names = [words[len(path)] for words in COMMANDS if words[: len(path)] == path]
    assert names
    for name in names:
        assert name in out


def test_simulate_json_is_all_of_stdout_and_quiet_leaves_stderr_empty():
    """In its own process, so that what torch or Flower would say is seen too."""
    sets = [word for key in SHORT for word in ("--set", key)]
    done = _python("-m", "fedlora", "simulate", "watch", "--out", "a", "--json", "--quiet", *sets)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == json.loads(Path("a", "summary.json").read_text())


def test_simulate_prints_the_table_on_stdout_and_progress_on_stderr(run):
    sets = [word for key in SHORT for word in ("--set", key)]
    code, out, err = run("simulate", "watch", "--out", "a", "--cross", "1", *sets)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:5]] == [
        "base", "own", "global", "personal",
    ]  # fmt: skip
    assert out.endswith("everything is in a/\n")
    assert "rounds: 1/1" in err
    assert "clients: 2/2" in err
    assert "rounds:" not in out


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run this Python, with the fedlora that the tests import, in the current folder."""
    project = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (project, os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
