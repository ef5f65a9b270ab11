"""A run's folder: who may write to it, and what is left after a crash."""

import pytest

from fedlora.errors import RunError
from fedlora.federation.folder import append_row, claim, free_folder, locked, read_rows
from tests.forked import start


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
    assert found_elsewhere(tmp_path, tmp_path / "free") == "none"
    with locked(tmp_path):
        found = found_elsewhere(tmp_path, tmp_path / "held")
    assert found.startswith("RunError")
    assert "another process is running this run" in found


def found_elsewhere(folder, said):
    """What another process says when it wants to write to a folder."""
    other = start(lock, folder, out=said)
    other.join()
    assert other.exitcode == 0
    return said.read_text()


def lock(folder):
    try:
        with locked(folder):
            print("none", end="", flush=True)
    except RunError as error:
        print(f"RunError: {error}", end="", flush=True)
