"""A run's folder: who may write to it, and what is left after a crash."""

import subprocess
import sys

import pytest

from fedlora.errors import RunError
from fedlora.federation.folder import append_row, claim, free_folder, locked, read_rows


def test_a_claimed_folder_is_refused_with_the_line_that_resumes_it(tmp_path):
    claim(tmp_path / "run", 'name = "x"\n')
    append_row(tmp_path / "run" / "rounds.jsonl", {"round": 1})
    with pytest.raises(RunError) as error:
        claim(tmp_path / "run", 'name = "x"\n')
    assert str(error.value) == (
        f"{tmp_path}/run: expected a new or empty folder, found a file or content; "
        f"go on with: fedlora simulate --resume {tmp_path}/run"
    )


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RunError, match="name another --out"):
        claim(tmp_path, "")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_default_folders_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(free_folder("watch")) == "runs/watch"
    claim(free_folder("watch"), "")
    assert str(free_folder("watch")) == "runs/watch", "a run that never got going is no run"
    append_row(free_folder("watch") / "rounds.jsonl", {"round": 1})
    assert str(free_folder("watch")) == "runs/watch-2"


def test_a_torn_last_row_is_dropped_and_cut_off(tmp_path):
    rows = tmp_path / "rows.jsonl"
    append_row(rows, {"client": "a"})
    with rows.open("a") as file:
        file.write('{"client": "b", "sco')
    assert read_rows(rows) == [{"client": "a"}]
    append_row(rows, {"client": "b"})
    assert read_rows(rows) == [{"client": "a"}, {"client": "b"}]


def test_a_row_that_is_not_json_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\nnonsense\n')
    with pytest.raises(RunError, match="line 2: expected JSON, found b'nonsense'"):
        read_rows(tmp_path / "rows.jsonl")


def test_a_second_process_is_kept_out(tmp_path):
    code = (
        "import sys, pathlib; from fedlora.federation.folder import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): pass"
    )
    with locked(tmp_path):
        other = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
        )
    assert "RunError" in other.stderr
    assert "another process is running this run" in other.stderr
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
