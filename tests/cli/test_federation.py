"""fedlora federation: steps that need no SuperLink, wrong usage, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedlora.cli import federation as commands
from fedlora.cli.federation import _pythons
from fedlora.cli.federation_hosts import _node_values
from fedlora.cli.main import app
from fedlora.errors import ConfigError, RunError, UsageError
from fedlora.federation.deploy import local
from fedlora.federation.deploy.folder import Federation, Node
from tests.matching import raises


def run(*arguments: str | Path) -> str:
    words = ["federation", *map(str, arguments)]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_certs_makes_a_federations_folder_and_renews(tmp_path: Path) -> None:
    found = json.loads(run("certs", "--dir", tmp_path / "fed", "--host", "a.example", "--json"))
    assert found["ca"] == str(tmp_path / "fed" / "certs" / "ca.crt")
    token = Federation.read(tmp_path / "fed").token
    text = run("certs", "--dir", tmp_path / "fed", "--host", "b.example")
    assert "for b.example, localhost, 127.0.0.1" in text
    assert Federation.read(tmp_path / "fed").token == token


def test_key_prints_what_the_server_registers(tmp_path: Path) -> None:
    found = json.loads(run("key", tmp_path / "node.key", "--json"))
    assert found["public"] == str(tmp_path / "node.key.pub")
    assert found["fingerprint"].startswith("SHA256:")
    with raises(RunError, "expected no file, found one"):
        run("key", tmp_path / "node.key")


def test_status_and_down_of_a_folder_in_which_nothing_runs(tmp_path: Path) -> None:
    run("certs", "--dir", tmp_path)
    found = json.loads(run("status", "--dir", tmp_path, "--json"))
    assert found == {"dir": str(tmp_path), "link": None, "nodes": [], "run": None}
    assert run("down", "--dir", tmp_path) == "nothing was running\n"
    assert json.loads(run("down", "--dir", tmp_path, "--json")) == {"stopped": []}


WRONG = {
    ("up", "--resume", "--nodes", "3"): (UsageError, "--resume goes on with what its folder says"),
    ("up", "--python", "onnx"): (UsageError, "--python onnx: expected onnx=VENV or torch=VENV"),
    ("up", "--trainer", "jax"): (ConfigError, "--trainer: expected onnx or torch, found 'jax'"),
    ("up", "--resume"): (RunError, "no federation here"),
    ("submit",): (UsageError, "name an experiment, or a folder to --resume"),
    ("submit", "watch", "--resume", "x"): (UsageError, "name an experiment, or a folder"),
    ("submit", "--resume", "x", "--out", "y"): (UsageError, "--resume goes on in its folder"),
    ("submit", "watch"): (RunError, "no federation here"),
    ("register", "x.pub"): (RunError, "no federation here"),
    ("start-link",): (RunError, "no certificate; make one with fedlora federation certs"),
    ("start-node", "--link", "h:1"): (ConfigError, "--key: expected the file of this node's"),
    ("start-node", "--link", "h"): (ConfigError, "--link h: expected HOST:PORT"),
    ("start-node", "--link", "h:1", "--key", "k", "--trainer", "x"): (UsageError, "--trainer"),
    ("start-node", "--link", "h:1", "--key", "k", "--client", "a", "--partition", "1"): (
        UsageError, "--client and --partition: expected one of them",
    ),
    ("certs", "--host", "https://x"): (ConfigError, "expected a name such as fl.example.org"),
}  # fmt: skip


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_wrong_usage_is_one_line(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kind, text = WRONG[words]
    with raises(kind, text):
        run(*words)


def test_a_bundle_that_cannot_be_exported_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = commands.find_spec
    monkeypatch.setattr(commands, "find_spec", lambda name: None if name == "torch" else real(name))
    planned = Federation(tmp_path / "fed", nodes=(Node(0, "onnx"),))
    monkeypatch.setattr(local, "plan", lambda *words, **options: planned)
    with raises(ConfigError, "--bundle: expected the folder of a device bundle", "where torch is"):
        run("up", "--dir", tmp_path / "fed", "--nodes", "1", "--trainer", "onnx")
    assert not (tmp_path / "fed").exists()  # so that the folder can be named again


def test_values_of_a_node_config_keep_their_type() -> None:
    texts = ["min-battery=30", "on-power=true", "hours=22-7", "at=07:30:00", "data=my mod:f"]
    assert _node_values(texts) == {
        "min-battery": 30, "on-power": True, "hours": "22-7", "at": "07:30:00", "data": "my mod:f",
    }  # fmt: skip
    with raises(UsageError, "--node-config x: expected KEY=VALUE"):
        _node_values(["x"])
    assert _pythons(["onnx=a/b", "torch=c"]) == {"onnx": Path("a/b"), "torch": Path("c")}
