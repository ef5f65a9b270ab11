"""The commands that list bases and data, and count an adapter before it exists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from fedlora.bases import load_card
from fedlora.cli import budget, data, models
from fedlora.errors import ConfigError, UnknownNameError


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLORA_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "160")


def run(*words: str) -> str:
    app = typer.Typer()
    app.command()(budget.budget)
    app.add_typer(models.app, name="models")
    app.add_typer(data.app, name="data")
    result = CliRunner().invoke(app, words)
    if result.exception:
        raise result.exception
    return result.stdout


def test_models_list_says_what_is_here_and_how_to_get_the_rest() -> None:
    found = {entry["id"]: entry for entry in json.loads(run("models", "list", "--json"))}
    assert found["watch-cnn"]["ready"] is True
    assert found["smollm2-135m"]["ready"] is False
    assert "fedlora models fetch smollm2-135m" in run("models", "list")


def test_models_fetch_refuses_an_unknown_base() -> None:
    with pytest.raises(UnknownNameError, match="unknown base to fetch 'gpt-5'"):
        run("models", "fetch", "gpt-5")


def test_data_list_names_every_data_set() -> None:
    found = {entry["id"]: entry for entry in json.loads(run("data", "list", "--json"))}
    assert found["watch"]["clients"] == 10
    assert "chitchat-punctuation" in run("data", "list")


def test_budget_counts_rank_times_in_plus_out() -> None:
    words = ("budget", "tiny-chat", "--targets", "q_proj,v_proj", "--rank", "8", "--json")
    found = json.loads(run(*words))
    assert found["layers"] == 6
    assert found["parameters"] == 6 * 8 * (256 + 256)
    assert found["bytes"] == {"fp32": 98304, "fp16": 49152, "int8": 24576, "int4": 12288}
    assert found["share"] == found["parameters"] / load_card("tiny-chat").parameters


def test_budget_of_the_last_block_and_of_a_regular_expression() -> None:
    last = json.loads(run("budget", "tiny-chat", "--layers", "last:1", "--json"))
    assert last["layers"] == 7
    matched = json.loads(run("budget", "watch-cnn", "--targets", r"conv\d", "--json"))
    assert matched["layers"] == 3
    assert "24,576" in run("budget", "tiny-chat", "--targets", "q_proj,v_proj")


def test_budget_refuses_names_that_the_base_does_not_have() -> None:
    with pytest.raises(ConfigError, match="no layer of the base is called 'q_prj'; did you mean"):
        run("budget", "tiny-chat", "--targets", "q_prj")
