from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedlora.errors import RunError
from fedlora.report import markdown_report
from fedlora.report.folder import RunFolder, read_run
from tests.report.run_folders import write_comparison, write_run


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"nowhere: expected a run's folder, found none"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"found no experiment.toml in it; name the folder that"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("experiment.toml", "name =", "not TOML"),
        ("summary.json", "[1]", "expected a JSON object, found a list"),
        ("summary.json", "{", "expected JSON, found something else"),
        ("summary.json", "{}", "not those of a run of this version: KeyError"),
        ("rounds.jsonl", '{"round": 1}\n', "not those of a run of this version: KeyError"),
        ("rounds.jsonl", "17\n", "rounds.jsonl, line 1: expected a JSON object, found '17'"),
        ("clients.jsonl", '{"client": "a", "scores": 3}\n', "not those of a run of this version"),
    ],
)
def test_files_of_another_program_are_refused_and_named(
    file: str, text: str, words: str, tmp_path: Path
) -> None:
    folder = write_run(tmp_path / "run")
    (folder / file).write_text(text)
    with pytest.raises(RunError) as refused:
        markdown_report(folder)
    assert words in str(refused.value)
    assert str(folder) in str(refused.value)


def test_a_line_that_is_being_written_is_left_out_and_left_alone(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rounds=2, done=False)
    path = folder / "rounds.jsonl"
    torn = path.read_bytes() + b'{"round": 3, "stat'
    path.write_bytes(torn)
    found = read_run(folder)
    assert isinstance(found, RunFolder)
    assert [line["round"] for line in found.rounds] == [1, 2]
    assert path.read_bytes() == torn


def test_a_run_that_is_not_done_has_a_report_of_what_is_there(tmp_path: Path) -> None:
    text = markdown_report(write_run(tmp_path / "run", rounds=2, done=False))
    assert "This run is not done: 2 of 2 rounds, 0 clients evaluated." in text
    assert f"fedlora simulate --resume {tmp_path / 'run'}" in text
    assert "What each person gets" not in text


def test_a_client_s_last_row_counts_and_rows_of_another_adapter_do_not(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", names=("a", "b", "c"), held_out=0)
    path = folder / "clients.jsonl"
    row = json.loads(path.read_text().splitlines()[0])
    old = row | {"global": "old", "client": "z"}
    failed = {key: row[key] for key in ("held_out", "rounds", "global")} | {"failed": "no"}
    lines = [old, failed | {"client": "a"}, row]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_run(folder)
    assert isinstance(found, RunFolder)
    assert found.clients == (row,)


def test_a_comparison_without_results_says_how_to_go_on(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "compared")
    (folder / "comparison.json").unlink()
    with pytest.raises(RunError, match=r"go on with: fedlora compare --resume"):
        read_run(folder)
