"""Writing: old or new, never half, and nothing lost."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedlora.errors import RunError
from fedlora.files import interrupted_folder, replace_folder, write_atomic
from tests.matching import raises


def build(text: str):
    def fill(folder: Path) -> None:
        (folder / "x").write_text(text)

    return fill


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Crash(BaseException):
    """A kill: nothing may run after it, so no `except Exception` sees it."""


def test_file_is_replaced_and_folders_are_made(tmp_path):
    write_atomic(tmp_path / "a" / "b", b"1")
    write_atomic(tmp_path / "a" / "b", b"2")
    assert tree(tmp_path) == {"a/b": "2"}


def test_mode_of_a_file_is_kept_and_a_new_one_follows_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_atomic(tmp_path / "new", b"")
    finally:
        os.umask(old)
    (tmp_path / "secret").touch(mode=0o600)
    write_atomic(tmp_path / "secret", b"x")
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("new", "secret")]
    assert modes == [0o640, 0o600]


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    write_atomic(tmp_path / "a", b"1")
    monkeypatch.setattr(os, "replace", _fail(OSError(28, "No space left on device")))
    with raises(RunError, f"{tmp_path}/a: cannot be written: No space left on device"):
        write_atomic(tmp_path / "a", b"2")
    assert tree(tmp_path) == {"a": "1"}


def test_folder_is_replaced(tmp_path):
    replace_folder(tmp_path / "a", build("1"))
    replace_folder(tmp_path / "a", build("2"))
    assert tree(tmp_path) == {"a/x": "2"}
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("entry", ["README.md", "folder/deep", "x/deep"])
def test_folder_with_anything_else_in_it_is_left_alone(entry, tmp_path):
    (tmp_path / "a" / entry).parent.mkdir(parents=True)
    (tmp_path / "a" / entry).write_text("mine")
    name = repr(entry.split("/")[0])
    with raises(RunError, f"found {name}, which would be lost", "write to another folder"):
        replace_folder(tmp_path / "a", build("1"))
    assert tree(tmp_path) == {f"a/{entry}": "mine"}


def test_link_is_not_taken_for_our_file(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "a" / "x").symlink_to(tmp_path / "mine")
    with raises(RunError, "found 'x', which would be lost"):
        replace_folder(tmp_path / "a", build("1"))


def test_what_a_link_points_to_is_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "file-link").symlink_to("file")
    for text in "12":
        replace_folder(tmp_path / "link", build(text))
        write_atomic(tmp_path / "file-link", text.encode())
    assert tree(tmp_path / "real") == {"x": "2"}
    assert (tmp_path / "file").read_text() == "2"
    assert sorted(os.listdir(tmp_path)) == ["file", "file-link", "link", "real"]
    assert (tmp_path / "link").is_symlink()


def test_owned_names_may_go(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "round-3.npz").write_text("old")
    replace_folder(tmp_path / "a", build("1"), owned=("round-*.npz",))
    assert tree(tmp_path) == {"a/x": "1"}


def test_file_is_not_replaced_by_a_folder_nor_a_folder_by_a_file(tmp_path):
    (tmp_path / "a").write_text("mine")
    (tmp_path / "b").mkdir()
    with raises(RunError, "a: expected a folder to write, found a file"):
        replace_folder(tmp_path / "a", build("1"))
    with raises(RunError, "b: expected a file to write, found a folder"):
        write_atomic(tmp_path / "b", b"")
    assert tree(tmp_path) == {"a": "mine"}


def test_failing_build_leaves_the_old_folder(tmp_path):
    replace_folder(tmp_path / "a", build("1"))

    def fail(folder: Path) -> None:
        (folder / "x").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_folder(tmp_path / "a", fail)
    assert tree(tmp_path) == {"a/x": "1"}


@pytest.mark.parametrize("kill_at", [1, 2, 3])
def test_kill_at_each_rename_leaves_one_whole_folder(kill_at, tmp_path, monkeypatch):
    replace_folder(tmp_path / "a", build("1"))
    rename, calls = os.rename, []

    def killed(source, target):
        calls.append(source)
        if len(calls) >= kill_at:  # and all that would clean up
            raise Crash
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        patch.setattr("shutil.rmtree", _fail(Crash()) if kill_at == 3 else lambda *a, **k: None)
        with pytest.raises(Crash):
            replace_folder(tmp_path / "a", build("2"))
    left = tmp_path / "a"
    whole = left if left.exists() else interrupted_folder(left)
    assert tree(whole) == {"x": {1: "1", 2: "1", 3: "2"}[kill_at]}
    replace_folder(tmp_path / "a", build("3"))
    assert tree(tmp_path / "a") == {"x": "3"}
    assert os.listdir(tmp_path) == ["a"]


def test_folder_that_cannot_be_made_is_a_typed_error(tmp_path):
    (tmp_path / "file").touch()
    with raises(RunError, "file/a: cannot be written"):
        replace_folder(tmp_path / "file" / "a", build("1"))
    with raises(RunError, "cannot be written"):
        write_atomic(tmp_path / "file" / "a", b"")


def _fail(error: BaseException):
    def fail(*_, **__):
        raise error

    return fail
