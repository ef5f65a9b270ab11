"""A device's state: what is installed, who may write, and what is refused."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fedlora.errors import (
    BaseMismatchError,
    DigestMismatchError,
    FedloraError,
    FormatError,
    RunError,
    StoreError,
)
from fedlora.store import Store
from tests.matching import raises
from tests.store.states import BASE, adapter, make_bundle

METRICS = {"loss_before": 2.5, "loss_after": 2.25, "note": "private words"}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def store(tmp_path: Path, bundle: Path) -> Store:
    return Store.create(tmp_path / "state", bundle)


def test_a_new_state_serves_the_base_from_its_own_copy(store: Store, bundle: Path) -> None:
    (bundle / "infer.onnx").write_bytes(b"changed afterwards")
    found = Store.open(store.path)
    assert found.serving() is None
    assert found.global_adapter() is None
    assert found.personal_adapter() is None
    assert found.bundle == store.path / "bundle"
    assert (found.bundle / "infer.onnx").read_bytes() == b"infer.onnx" * 1000
    assert found.status().bundle.base == BASE
    assert found.status().commits == 0


def test_personal_is_served_before_global_before_base(store: Store) -> None:
    store.install_global(adapter(1), {"round": 12})
    assert Store.open(store.path).serving() == adapter(1)
    store.commit_personal(adapter(2), METRICS)
    found = Store.open(store.path)
    assert found.serving() == found.personal_adapter() == adapter(2)
    assert found.global_adapter() == adapter(1)
    status = found.status()
    assert status.commits == 2
    assert status.installed is not None
    assert status.installed.provenance == {"round": 12}
    assert status.personal is not None
    assert status.personal.metrics == METRICS
    assert status.personal.started_from == adapter(1).fingerprint()


def test_every_adapter_is_a_file_named_by_its_digest_and_no_other_is_kept(store: Store) -> None:
    for seed in range(3):
        store.install_global(adapter(seed))
        store.commit_personal(adapter(10 + seed), {})
    names = {path.name for path in (store.path / "adapters").iterdir()}
    assert names == {f"{digest}.safetensors" for digest in store.status().digests()}
    assert len(names) == 2


def test_another_global_adapter_keeps_the_personal_one_and_marks_it(store: Store) -> None:
    store.install_global(adapter(1))
    store.commit_personal(adapter(2), METRICS)

    def stale() -> bool:
        personal = store.status().personal
        assert personal is not None
        return personal.stale

    assert not stale()
    store.install_global(adapter(1), {"again": True})
    assert not stale(), "the same adapter, whatever its file says of it"
    store.install_global(adapter(3))
    assert stale()
    assert store.serving() == adapter(2)
    store.install_global(adapter(1))
    assert not stale(), "the one that it started from is back"
    store.commit_personal(adapter(4), {}, from_base=True)
    assert not stale()
    store.install_global(adapter(3))
    assert stale()


def test_the_same_adapter_may_be_global_and_personal(store: Store) -> None:
    store.install_global(adapter(1), {"global": None})
    store.commit_personal(adapter(1), {}, from_base=True)
    assert len(store.status().digests()) == 1
    store.forget()
    assert store.serving() == adapter(1)


def test_forget_leaves_no_file_with_the_owners_bytes(store: Store) -> None:
    store.install_global(adapter(1))
    store.commit_personal(adapter(2), METRICS)
    (store.cache / "deep").mkdir()
    (store.cache / "deep" / "sentences").write_text("private words")
    # What crashes left over: an adapter that was replaced, half-written files.
    leftover = adapter(3).layers["a"].A.tobytes()
    (store.path / "adapters" / ".half.safetensors.x1").write_bytes(leftover)
    (store.path / ".state.json.x2").write_bytes(json.dumps(METRICS).encode())
    secrets = [
        b"private words", b"2.25", leftover,
        *(layer.A.tobytes() for layer in adapter(2).layers.values()),
        *(layer.B.tobytes() for layer in adapter(2).layers.values()),
    ]  # fmt: skip
    assert all(_files_with(store.path, secret) for secret in secrets)
    assert store.forget()
    assert not any(_files_with(store.path, secret) for secret in secrets)
    assert Store.open(store.path).serving() == adapter(1)
    assert store.status().personal is None
    assert not store.forget()


def test_forget_removes_a_damaged_personal_adapter_too(store: Store) -> None:
    store.commit_personal(adapter(2), METRICS)
    _damage(_file_of(store, "personal"))
    with raises(DigestMismatchError, "expected SHA-256", "fedlora device forget"):
        store.serving()
    assert store.forget()
    assert store.serving() is None


def _files_with(folder: Path, secret: bytes) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and secret in p.read_bytes()]


def test_only_the_owner_may_read(store: Store) -> None:
    old = os.umask(0)
    try:
        store.install_global(adapter(1))
        store.commit_personal(adapter(2), METRICS)
        (store.cache / "x").touch(mode=0o600)
    finally:
        os.umask(old)
    modes = {
        path.relative_to(store.path).as_posix(): stat.S_IMODE(path.stat().st_mode)
        for path in (store.path, *store.path.rglob("*"))
    }
    folders = {name for name, mode in modes.items() if mode == 0o700}
    assert folders == {".", "adapters", "bundle", "cache"}
    assert {modes[name] for name in modes.keys() - folders} == {0o600}


def test_a_bundle_can_be_used_where_it_is(tmp_path: Path, bundle: Path) -> None:
    store = Store.create(tmp_path / "state", bundle, in_place=True)
    assert store.bundle == bundle
    assert not (store.path / "bundle").exists()
    manifest = bundle / "manifest.json"
    manifest.write_bytes(manifest.read_bytes() + b" ")
    with raises(DigestMismatchError, "manifest.json", "damaged or was changed"):
        Store.open(store.path)
    manifest.unlink()
    with raises(FormatError, "expected the bundle of this state, found none"):
        Store.open(store.path)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_bad_bundle_makes_no_state(tmp_path: Path, bundle: Path, in_place: bool) -> None:
    _damage(bundle / "infer.onnx")
    with raises(DigestMismatchError, "infer.onnx: expected SHA-256", "again"):
        Store.create(tmp_path / "state", bundle, in_place=in_place)
    (bundle / "infer.onnx").unlink()
    with raises(FormatError, "infer.onnx", "found none or a link"):
        Store.create(tmp_path / "state", bundle, in_place=in_place)
    (bundle / "infer.onnx").symlink_to(bundle / "base.onnx.data")
    with raises(FormatError, "infer.onnx", "found none or a link"):
        Store.create(tmp_path / "state", bundle, in_place=in_place)
    (bundle / "manifest.json").unlink()
    with raises(FormatError, "expected a bundle with manifest.json", "fedlora export"):
        Store.create(tmp_path / "state", bundle, in_place=in_place)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "manifest.json", "..", ""])
def test_a_manifest_cannot_name_a_file_outside(tmp_path: Path, bundle: Path, name: str) -> None:
    path = bundle / "manifest.json"
    record = json.loads(path.read_text())
    record["files"][name] = {"sha256": "00" * 32, "num_bytes": 1}
    path.write_text(json.dumps(record))
    with raises(FormatError, "files: expected names of files"):
        Store.create(tmp_path / "state", bundle)


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path, bundle: Path, store) -> None:
    with raises(StoreError, "there is a device's state already"):
        Store.create(store.path, bundle)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    with raises(StoreError, "expected a new or empty folder"):
        Store.create(tmp_path / "mine", bundle)
    with raises(StoreError, "expected a device's state with state.json", "fedlora device init"):
        Store.open(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    (tmp_path / "empty").mkdir()
    assert Store.create(tmp_path / "empty", bundle).serving() is None


def _change(record: dict, key: str, value: object) -> None:
    *path, last = key.split(".")
    for name in path:
        record = record[name]
    if value is DROP:
        del record[last]
    else:
        record[last] = value


DROP = object()
BAD_STATES = {
    "newer": ("version", 3, "state of version 1 or 2"),
    "unknown key": ("slot", "a", "missing or unknown keys"),
    "missing key": ("personal", DROP, "missing or unknown keys"),
    "commits": ("commits", -1, "commits: expected a whole number"),
    "no bundle": ("bundle", None, "bundle: expected an object with digest, base, folder"),
    "digest": ("personal.digest", "../../etc/passwd", "personal: digest: unexpected value"),
    "digest in capitals": ("active.digest", "AB" * 32, "active: digest: unexpected value"),
    "stale": ("personal.stale", 0, "personal: stale"),
    "metrics": ("personal.metrics", [], "personal: metrics"),
    "extra": ("active.extra", 1, "active: expected an object"),
    "base": ("bundle.base", "\n", "bundle: base"),
    "no global": ("active", False, "active: expected an object"),
}


@pytest.mark.parametrize(("key", "value", "text"), BAD_STATES.values(), ids=BAD_STATES.keys())
def test_a_changed_state_is_one_line(store: Store, key: str, value: object, text: str) -> None:
    store.install_global(adapter(1))
    store.commit_personal(adapter(2), METRICS)
    path = store.path / "state.json"
    record = json.loads(path.read_text())
    _change(record, key, value)
    path.write_text(json.dumps(record))
    with raises(FormatError, "state.json", text):
        Store.open(store.path)
    with raises(FormatError, "state.json", text):
        store.forget()


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b'{"version": NaN}', b"[" * 100_000])
def test_a_state_that_is_not_json_is_one_line(store: Store, data: bytes) -> None:
    (store.path / "state.json").write_bytes(data)
    with pytest.raises(FormatError) as caught:
        Store.open(store.path)
    assert "\n" not in str(caught.value)


def test_every_cut_and_every_flipped_byte_of_an_adapter_is_refused(store: Store) -> None:
    store.install_global(adapter(1))
    path = _file_of(store, "installed")
    data = path.read_bytes()
    for place in range(0, len(data), 7):
        flipped = bytearray(data)
        flipped[place] ^= 1
        for bad in (bytes(flipped), data[:place]):
            path.write_bytes(bad)
            with raises(DigestMismatchError, "expected SHA-256", "fedlora device install"):
                store.serving()
    path.unlink()
    with raises(FormatError, "expected the adapter that state.json names, found none"):
        store.serving()
    path.symlink_to(store.path / "state.json")
    with raises(DigestMismatchError, "expected SHA-256"):
        store.serving()


def test_what_could_not_be_read_again_is_not_written(store: Store) -> None:
    store.commit_personal(adapter(1), METRICS)
    deep: dict = {}
    for _ in range(20):
        deep = {"x": deep}
    for metrics in ({"loss": float("nan")}, deep, {"loss": object()}):
        with pytest.raises(FormatError):
            store.commit_personal(adapter(2), metrics)
    with raises(BaseMismatchError, "expected an adapter of the base abababab"):
        store.install_global(adapter(2, base="cd" * 32))
    assert Store.open(store.path).serving() == adapter(1)
    store.install_global(adapter(3, base=None))
    assert store.global_adapter() == adapter(3)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_state_on_a_read_only_disk_is_one_line(store: Store) -> None:
    store.path.chmod(0o500)
    with pytest.raises((RunError, StoreError)):
        store.install_global(adapter(1))
    store.path.chmod(0o700)


OTHER = """
import sys
from fedlora.store import Store
from tests.store.states import adapter
store = Store.open(sys.argv[1])
print(store.serving() is not None)
store.install_global(adapter(5))
"""


def test_one_process_writes_and_others_read(store: Store) -> None:
    store.install_global(adapter(1))
    with store.lock():
        store.commit_personal(adapter(2), {})  # the holder itself is not in its own way
        done = _python(OTHER, store.path)
    assert done.stdout == "True\n"
    assert done.stderr.splitlines()[-1].endswith(
        f"StoreError: {store.path}: another process is writing to this state; wait for it"
    )
    assert _python(OTHER, store.path).returncode == 0
    assert store.global_adapter() == adapter(5)


def test_two_stores_of_one_process_exclude_each_other_and_threads_wait(store: Store) -> None:
    with store.lock(), raises(StoreError, "another process is writing"):
        Store.open(store.path).install_global(adapter(1))
    threads = [
        threading.Thread(target=store.commit_personal, args=(adapter(seed), {}))
        for seed in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.status().commits == 8


def test_a_reader_beside_a_writer_always_gets_a_whole_adapter(store: Store) -> None:
    store.commit_personal(adapter(0), {})
    known = {adapter(seed).fingerprint() for seed in range(40)}
    failures: list[FedloraError] = []
    stop = threading.Event()

    def read() -> None:
        reader = Store.open(store.path)
        while not stop.is_set():
            try:
                found = reader.serving()
                assert found is not None
                assert found.fingerprint() in known
            except FedloraError as error:
                failures.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    for seed in range(40):
        store.commit_personal(adapter(seed), {})
    stop.set()
    thread.join()
    assert failures == []


def _python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    project = Path(__file__).resolve().parents[2]
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True, text=True, check=False, cwd=project,
    )  # fmt: skip


def _file_of(store: Store, which: str) -> Path:
    entry = getattr(store.status(), which)
    return store.path / "adapters" / f"{entry.digest}.safetensors"


def _damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
