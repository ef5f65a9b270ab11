"""What a hostile server, mirror, network or holder of some keys does to a device, one row each.

`tuf_attacks.json` lists what was tried on python-tuf's own client; the rows below it in `ATTACKS`
are those that this updater adds. Before each one the device serves release 1; whatever happens, it
serves that on until it commits another, and a poll of the honest repository then finds release 2.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, TargetFile
from tuf.api.serialization.json import JSONSerializer

import fedlora as fl
from fedlora import errors
from fedlora.ota import DeviceUpdater, Keys, Limits, Publisher, Rollout, Stage, conformance
from fedlora.ota.releases import rollout_path
from fedlora.ota.roles import now
from fedlora.store import Store
from tests.ota.web import Request, Web, cut_after, drip, endless, ignore_range, stall, status
from tests.ota.world import QUICK, World, make_world
from tests.store.states import adapter

RELEASE = r"targets/.*"
TIMESTAMP = r"metadata/timestamp\.json"
ROWS = json.loads(Path(__file__).with_name("tuf_attacks.json").read_text())


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A repository whose first release a device serves, and whose second it has not seen."""
    world = make_world(tmp_path_factory.mktemp("template"), thresholds={"root": (2, 2)})
    world.publish(1)
    with Web(world.repository) as web:
        updater = world.updater(web)
        release = updater.fetch()
        assert release is not None
        updater.commit(release)
    shutil.copytree(world.repository, world.folder / "before")
    world.publish(2)
    return world


class Scene:
    """A copy of the template, and the server that the device asks."""

    def __init__(self, template: World, folder: Path) -> None:
        self.folder = folder / "world"
        shutil.copytree(template.folder, self.folder)
        self.publisher = Publisher(self.folder / "repository", Keys(self.folder / "keys"))
        self.roles = self.publisher.roles
        self.before = self.folder / "before"  # the repository when it had release 1 alone
        self.world = World(
            self.folder, self.publisher, Store.open(self.folder / "state"), template.root
        )
        self.store = self.world.store
        self.metadata = self.folder / "repository" / "metadata"
        self.web = Web(self.folder / "repository")
        self.limits = QUICK
        self.last: DeviceUpdater | None = None

    def fetch(self, **about: Any) -> Any:
        self.last = self.world.updater(self.web, **{"limits": self.limits, **about})
        return self.last.fetch()

    def take(self) -> None:
        """Fetch and commit what there is."""
        release = self.fetch()
        assert release is not None
        assert self.last is not None
        self.last.commit(release)

    def cached(self, name: str) -> Path:
        return self.store.path / "ota" / "metadata" / name

    def passed_over(self) -> dict[int, str]:
        assert self.last is not None
        assert self.last.last_poll is not None
        return self.last.last_poll.passed_over


@pytest.fixture
def scene(template: World, tmp_path: Path) -> Any:
    found = Scene(template, tmp_path)
    yield found
    found.web.close()


def flip(scene: Scene) -> None:
    (path,) = (scene.folder / "repository" / "targets").rglob("*.2.safetensors")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    scene.web.rules[RELEASE] = bytes(data)


def older_timestamp(scene: Scene) -> None:
    scene.take()
    scene.web.rules[TIMESTAMP] = (scene.before / "metadata" / "timestamp.json").read_bytes()


def older_snapshot(scene: Scene) -> None:
    scene.take()
    timestamp, old = scene.roles.timestamp(), newest(scene.before / "metadata", "snapshot")
    timestamp.snapshot_meta = MetaFile.from_data(version(old), old.read_bytes(), ["sha256"])
    scene.roles.write("timestamp", timestamp)


def older_targets(scene: Scene) -> None:
    scene.take()
    snapshot, old = scene.roles.snapshot(), newest(scene.before / "metadata", "targets")
    snapshot.meta["targets.json"] = MetaFile(version(old))
    scene.roles.write("snapshot", snapshot)
    scene.roles.write_timestamp()


def expired(scene: Scene) -> None:
    past = Publisher(
        scene.publisher.path, scene.publisher.keys, clock=lambda: now() - timedelta(days=2)
    )
    past.refresh()


def replay(scene: Scene) -> None:
    scene.web.rules[TIMESTAMP] = (scene.before / "metadata" / "timestamp.json").read_bytes()


def foreign_key(role: str) -> Callable[[Scene], None]:
    def do(scene: Scene) -> None:
        path = newest(scene.metadata, role)
        metadata = Metadata.from_file(str(path))
        metadata.signed.version += 1
        metadata.sign(CryptoSigner.generate_ed25519())
        data = metadata.to_bytes(JSONSerializer())
        if role == "timestamp":
            path.write_bytes(data)
            return
        (scene.metadata / f"{metadata.signed.version}.{role}.json").write_bytes(data)
        scene.roles.write_snapshot()
        scene.roles.write_timestamp()

    return do


def rotate(scene: Scene) -> None:
    scene.publisher.rotate("root", count=2)
    for role in ("targets", "snapshot", "timestamp", "rollout"):
        scene.publisher.rotate(role)


def root_below_threshold(scene: Scene) -> None:
    old = scene.roles.root()
    new = Metadata.from_file(str(newest(scene.metadata, "root")))
    new.signed.version += 1
    public, threshold = scene.roles.public("root", old)
    assert threshold == 2
    new.sign(scene.publisher.keys.signers("root", public, 2)[0])
    (scene.metadata / "2.root.json").write_bytes(new.to_bytes(JSONSerializer()))


def old_as_new(role: str) -> Callable[[Scene], None]:
    """The stronger attacker: also signs away the digests that would tell at once."""

    def do(scene: Scene) -> None:
        old = newest(scene.before / "metadata", role).read_bytes()
        snapshot, timestamp = scene.roles.snapshot(), scene.roles.timestamp()
        if role == "targets":
            snapshot.meta["targets.json"] = MetaFile(snapshot.meta["targets.json"].version)
            scene.roles.write("snapshot", snapshot)
        timestamp.snapshot_meta = MetaFile(scene.roles.snapshot().version)
        scene.roles.write("timestamp", timestamp)
        newest(scene.metadata, role).write_bytes(old)

    return do


def fast_forward(scene: Scene) -> None:
    """Whoever had the online keys once has put the versions beyond reach."""
    kept = scene.folder / "kept"
    shutil.copytree(scene.metadata, kept)
    snapshot, timestamp = scene.roles.snapshot(), scene.roles.timestamp()
    snapshot.version = timestamp.version = (1 << 31) - 2
    scene.roles.write("snapshot", snapshot)
    timestamp.snapshot_meta = MetaFile(snapshot.version)
    scene.roles.write("timestamp", timestamp)
    assert scene.fetch() is not None
    shutil.rmtree(scene.metadata)
    shutil.copytree(kept, scene.metadata)
    with pytest.raises(errors.VersionError):
        scene.fetch()
    for role in ("snapshot", "timestamp"):
        scene.publisher.rotate(role)


def outside(scene: Scene) -> None:
    """A third release that claims another name than it is signed under."""
    hostile_release(scene, {"channel": "../../../etc"})


def hostile_release(scene: Scene, about: dict[str, Any], **changed: Any) -> None:
    """Sign, with the targets key and beside the honest ones, a third release."""
    targets = scene.roles.targets()
    honest = targets.targets["stable/2.safetensors"]
    custom = {**honest.custom, "version": 3, **about}
    path = "stable/3.safetensors"
    given = {"length": honest.length, "hashes": dict(honest.hashes), **changed}
    targets.targets[path] = TargetFile(given["length"], given["hashes"], path, {"custom": custom})
    scene.roles.write("targets", targets)
    offer(scene, Stage(3))


def offer(scene: Scene, *stages: Stage) -> None:
    """Sign with the rollout key that these releases are offered too."""
    rollout = scene.publisher.channel("stable")
    for stage in stages:
        rollout = rollout.with_stage(stage)
    sign_rollout(scene, rollout)


def sign_rollout(scene: Scene, rollout: Rollout) -> None:
    signed, path = scene.roles.rollout(), rollout_path("stable")
    signed.targets[path] = TargetFile(0, {"sha256": "0" * 64}, path, {"custom": rollout.custom()})
    scene.roles.write("rollout", signed)
    scene.roles.write_snapshot()
    scene.roles.write_timestamp()


def corrupt_cache(scene: Scene) -> None:
    for name in ("timestamp", "snapshot", "targets", "rollout"):
        scene.cached(f"{name}.json").write_bytes(b"{}" if name == "targets" else b"\x00" * 10)
    scene.cached("root.json").unlink()
    scene.cached("root_history/1.root.json").write_bytes(b"")


def truncated(scene: Scene) -> None:
    assert scene.fetch() is not None
    pending = scene.store.status().pending
    assert pending is not None
    path = scene.store.path / "adapters" / f"{pending.digest}.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def corrupt_second_root(scene: Scene) -> None:
    scene.publisher.rotate("timestamp")
    assert scene.fetch() is not None
    scene.cached("root_history/2.root.json").write_bytes(b"nonsense")


def rule(path: str, behaviour: Any, **limits: Any) -> Callable[[Scene], None]:
    def do(scene: Scene) -> None:
        scene.web.rules[path] = behaviour
        scene.limits = Limits(**{**fields(QUICK), **limits})

    return do


def fields(limits: Limits) -> dict[str, Any]:
    return {name: getattr(limits, name) for name in Limits.__dataclass_fields__}


def cut_once(scene: Scene) -> None:
    count = iter(range(100))

    def do(request: Request) -> None:
        (cut_after(500) if next(count) == 0 else Request.answer_honestly)(request)

    scene.web.rules[RELEASE] = do


def nothing(scene: Scene) -> None:
    pass


def newest(folder: Path, role: str) -> Path:
    if role == "timestamp":
        return folder / "timestamp.json"
    return max(folder.glob(f"*.{role}.json"), key=version)


def version(path: Path) -> int:
    return int(path.name.partition(".")[0])


# How each row of the file is done. A row that is accepted finds release 2, or what is said here.
LISTED: dict[str, Callable[[Scene], None]] = {
    "honest": nothing,
    "honest, second poll without news": lambda scene: scene.take(),
    "one bit of the release flipped": flip,
    "older timestamp": older_timestamp,
    "older snapshot, with the timestamp key": older_snapshot,
    "older targets, with the timestamp and snapshot keys": older_targets,
    "frozen on a timestamp that has expired": expired,
    "frozen on a timestamp that has not expired": replay,
    "endless release": rule(RELEASE, endless()),
    "endless timestamp": rule(TIMESTAMP, endless()),
    "stall longer than the gap": rule(RELEASE, stall(0.3), gap=0.05),
    "drip within the gap, below the minimum rate": rule(
        RELEASE, drip(30, 0.03), rate_window=0.1, minimum_rate=10_000
    ),
    "connection cut in a release": cut_once,
    "connection cut in a timestamp": rule(TIMESTAMP, cut_after(100)),
    "targets signed with another key": foreign_key("targets"),
    "timestamp signed with another key": foreign_key("timestamp"),
    "keys rotated": rotate,
    "root rotated below its threshold": root_below_threshold,
    "old snapshot under the new name": old_as_new("snapshot"),
    "old targets under the new name": old_as_new("targets"),
    "stale mirror without the release": rule(RELEASE, status(404)),
    "fast-forward, mended by rotation": fast_forward,
    "release named outside of its folder": outside,
    "deeply nested timestamp": rule(TIMESTAMP, b'{"signed":' + b"[" * 8000),
    "cached metadata damaged and root link gone": corrupt_cache,
    "staged file truncated": truncated,
    "cached second root damaged": corrupt_second_root,
}
FINDS_NOTHING = {
    "honest, second poll without news",
    "frozen on a timestamp that has not expired",
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["case"])
def test_listed(row: dict[str, str], scene: Scene) -> None:
    case = row["case"]
    LISTED[case](scene)
    check(scene, row["expected"], None if case in FINDS_NOTHING else 2)


def test_every_listed_attack_is_tried() -> None:
    assert [row["case"] for row in ROWS] == list(LISTED)


def check(scene: Scene, expected: str, release: int | None) -> None:
    """Poll, and compare what is served, staged and raised."""
    before = scene.store.global_adapter()
    assert before in (adapter(1), adapter(2))
    if expected == "accepted":
        found = scene.fetch()
        assert (found and found.version) == release
    else:
        with pytest.raises(getattr(errors, expected)) as caught:
            scene.fetch()
        assert type(caught.value).__name__ == expected
        assert "\n" not in str(caught.value)
    assert scene.store.global_adapter() == before
    pending = scene.store.pending_adapter()
    assert pending is None or pending == adapter(2)
    if expected == "accepted" and release == 2:
        assert pending == adapter(2)


def wrong_base(scene: Scene) -> None:
    """The release says this device's base, the file another one."""
    path = scene.folder / "other.safetensors"
    fl.save_adapter(adapter(9, base="cd" * 32), path)
    scene.publisher.publish(path)
    targets = scene.roles.targets()
    target = targets.targets["stable/3.safetensors"]
    target.unrecognized_fields["custom"]["base"] = "ab" * 32
    scene.roles.write("targets", targets)
    scene.roles.write_snapshot()
    scene.roles.write_timestamp()


def of_another_base(scene: Scene) -> None:
    path = scene.folder / "other.safetensors"
    fl.save_adapter(adapter(9, base="cd" * 32), path)
    scene.publisher.publish(path)


def wrong_layers(scene: Scene) -> None:
    layers = {"zz": next(iter(adapter(9).layers.values()))}
    path = scene.folder / "other.safetensors"
    config = fl.LoraConfig(rank=2, lora_alpha=4, target_modules=("zz",))
    fl.save_adapter(fl.Adapter(layers, config, "ab" * 32), path)
    scene.publisher.publish(path)


def unreadable(scene: Scene) -> None:
    """Signed by the targets key, and no packed file."""
    data = b"x" * 500
    digest = hashlib.sha256(data).hexdigest()
    hostile_release(scene, {}, length=500, hashes={"sha256": digest})
    scene.web.rules[RELEASE] = data


def offer_of_rollout_key(*stages: Stage) -> Callable[[Scene], None]:
    return lambda scene: offer(scene, *stages)


def only_old(scene: Scene) -> None:
    scene.take()
    sign_rollout(scene, Rollout("stable", (Stage(1),)))


def beyond_its_limit(scene: Scene) -> None:
    scene.world.publish(3, limit=0.0, rollout=0.0)
    offer(scene, Stage(3, 100.0))


def withdrawn(scene: Scene) -> None:
    scene.world.publish(3)
    scene.publisher.halt(3, withdraw=True)
    offer(scene, Stage(3, 100.0, False))


def rolled_out_to_none(scene: Scene) -> None:
    scene.world.publish(3, rollout=0.0)


def drip_of_headers(scene: Scene) -> None:
    """A byte of a header now and then: the body, and what counts it, never begin."""

    def do(request: Request) -> None:
        for byte in b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 500:
            time.sleep(0.02)
            request.send(bytes([byte]))
            if request.close_connection:
                return

    scene.web.rules[RELEASE] = do
    scene.limits = Limits(**{**fields(QUICK), "deadline": 0.4})


def slow_for_ever(scene: Scene) -> None:
    """Above the minimum rate, and past the deadline."""
    rule(RELEASE, drip(200, 0.01), deadline=0.3, minimum_rate=1)(scene)


def redirect(scene: Scene) -> None:
    def do(request: Request) -> None:
        request.send_response(302)
        request.send_header("Location", f"{scene.web.url}/metadata/timestamp.json")
        request.send_header("Content-Length", "0")
        request.end_headers()

    scene.web.rules[RELEASE] = do


def compressed(scene: Scene) -> None:
    def do(request: Request) -> None:
        request.send_response(200)
        request.send_header("Content-Encoding", "gzip")
        request.send_header("Content-Length", "10")
        request.end_headers()
        request.send(b"\x1f\x8b" + b"0" * 8)

    scene.web.rules[RELEASE] = do


def another_range(scene: Scene) -> None:
    """Half a file is there; the server sends a part that does not follow on it."""
    rule(RELEASE, cut_after(300), attempts=1)(scene)
    with pytest.raises(errors.DownloadError):
        partial_only(scene)

    def do(request: Request) -> None:
        if request.headers.get("Range"):
            request.send_response(206)
            request.send_header("Content-Range", f"bytes 0-{len(request.data) - 1}/*")
            request.send_header("Content-Length", str(len(request.data)))
            request.end_headers()
            request.send(request.data)
        else:
            request.answer(request.data)

    scene.web.rules[RELEASE] = do
    scene.limits = QUICK


def partial_only(scene: Scene) -> None:
    """One connection, one cut: what has come stays."""
    count = iter(range(100))

    def do(request: Request) -> None:
        (cut_after(300) if next(count) == 0 else status(503))(request)

    scene.web.rules[RELEASE] = do
    scene.fetch()


def server_without_ranges(scene: Scene) -> None:
    with pytest.raises(errors.DownloadError):
        partial_only(scene)
    scene.web.rules[RELEASE] = ignore_range


def damaged_part(scene: Scene) -> None:
    """What had come was damaged on the disk: found by the digest, and fetched anew."""
    with pytest.raises(errors.DownloadError):
        partial_only(scene)
    (part,) = (scene.store.path / "ota" / "partial").glob("*.part")
    part.write_bytes(b"\0" * part.stat().st_size)
    del scene.web.rules[RELEASE]


def no_server(scene: Scene) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    scene.web.url = f"http://127.0.0.1:{port}"


def shorter(scene: Scene) -> None:
    """A whole answer, again and again, that is shorter than what was signed."""
    scene.web.rules[RELEASE] = b"x" * 500


def ends_early(scene: Scene) -> None:
    """No length is announced, and each answer ends as if it were whole."""

    def do(request: Request) -> None:
        request.send_response(200)
        request.send_header("Connection", "close")
        request.end_headers()
        request.send(request.data[:10])
        request.cut()

    scene.web.rules[RELEASE] = do


def not_http(scene: Scene) -> None:
    def do(request: Request) -> None:
        request.send(b"SSH-2.0-OpenSSH_9.6\r\n")
        request.cut()

    scene.web.rules[TIMESTAMP] = do


# What an attacker does, what the device says, and which release it then finds.
ATTACKS: dict[str, tuple[Callable[[Scene], None], str, int | None]] = {
    "file of another base than its release says": (wrong_base, "ReleaseError", None),
    "release of another base": (of_another_base, "accepted", 2),
    "layers that the base has not": (wrong_layers, "ReleaseError", None),
    "signed, and no packed file": (unreadable, "ReleaseError", None),
    "release larger than this device takes": (
        rule("never", b"", max_bytes=1000), "accepted", None,
    ),
    "release larger than signed, announced": (
        rule(RELEASE, endless(announced=True)), "DownloadError", None,
    ),
    "release shorter than signed": (shorter, "DownloadError", None),
    "release that ends early, over and over": (ends_early, "DownloadError", None),
    "version too large to count": (
        lambda scene: hostile_release(scene, {"version": 1 << 60}), "accepted", 2,
    ),
    "release of a later format": (
        lambda scene: hostile_release(scene, {"fedlora": 2}), "accepted", 2,
    ),
    "two digests, of which one might be weak": (
        lambda scene: hostile_release(scene, {}, hashes={"md5": "0" * 32, "sha256": "0" * 64}),
        "MetadataError", None,
    ),
    "rollout key offers what was never signed": (
        offer_of_rollout_key(Stage(77)), "accepted", 2,
    ),
    "rollout key offers only what is older": (only_old, "accepted", None),
    "rollout key goes beyond the signed limit": (beyond_its_limit, "accepted", 2),
    "rollout key offers what was withdrawn": (withdrawn, "accepted", 2),
    "release for nobody yet": (rolled_out_to_none, "accepted", 2),
    "headers that never end": (drip_of_headers, "SlowDownloadError", None),
    "fast enough, and longer than the deadline": (slow_for_ever, "SlowDownloadError", None),
    "redirected into the device's own network": (redirect, "DownloadError", None),
    "compressed without being asked": (compressed, "DownloadError", None),
    "another range than was asked for": (another_range, "accepted", 2),
    "server that ignores Range": (server_without_ranges, "accepted", 2),
    "part on the disk is damaged": (damaged_part, "accepted", 2),
    "server that cuts before the first byte": (
        rule(RELEASE, cut_after(0)), "DownloadError", None,
    ),
    "server that is gone": (no_server, "DownloadError", None),
    "server that speaks no HTTP": (not_http, "DownloadError", None),
    "server that fails": (rule(TIMESTAMP, status(500)), "DownloadError", None),
    "timestamp that is gone": (rule(TIMESTAMP, status(404)), "DownloadError", None),
    "timestamp that is a picture": (rule(TIMESTAMP, b"\x89PNG"), "MetadataError", None),
    "timestamp of another type": (rule(TIMESTAMP, b'{"signed": 1, "signatures": []}'),
                                  "MetadataError", None),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_own(name: str, scene: Scene) -> None:
    do, expected, release = ATTACKS[name]
    do(scene)
    check(scene, expected, release)


def test_after_every_refusal_the_honest_repository_is_found(scene: Scene) -> None:
    """The attacks that change nothing but what the server sends, one after another."""
    refused = 0
    for name, (do, expected, _) in ATTACKS.items():
        if name in ("server that is gone",) or expected == "accepted" or "signed" in name:
            continue
        if "layers" in name or "base" in name or "digests" in name:
            continue
        do(scene)
        with pytest.raises(getattr(errors, expected)):
            scene.fetch()
        scene.web.rules.clear()
        refused += 1
    assert refused >= 8
    scene.limits = QUICK
    found = scene.fetch()
    assert found is not None
    assert found.version == 2


def test_a_release_that_does_not_fit_is_fetched_once(scene: Scene) -> None:
    wrong_base(scene)
    with pytest.raises(errors.ReleaseError, match="not fetched again"):
        scene.fetch()
    scene.web.forget()
    found = scene.fetch()
    assert found is not None
    assert found.version == 2
    assert scene.passed_over() == {3: "rejected on this device"}
    assert not any(".3.safetensors" in path for path in scene.web.paths())


def test_an_endless_answer_costs_no_more_than_the_file(scene: Scene) -> None:
    scene.web.rules[RELEASE] = endless()
    with pytest.raises(errors.DownloadError):
        scene.fetch()
    partial = scene.store.path / "ota" / "partial"
    assert sum(path.stat().st_size for path in partial.iterdir()) == 0


def test_names_that_point_outside_never_leave_the_folder(scene: Scene, tmp_path: Path) -> None:
    """Through the plain client too, which takes whatever name it is given."""
    names = ["../../evil", "/etc/evil", "a/../../evil", "..", "stable/../../x", "C:\\evil", "a b?#"]
    data = b"target"
    targets = scene.roles.targets()
    for name in names:
        targets.targets[name] = TargetFile.from_data(name, data, ["sha256"])
    scene.roles.write("targets", targets)
    scene.roles.write_snapshot()
    scene.roles.write_timestamp()
    scene.web.rules[RELEASE] = data
    for folder in ("trusted", "files"):
        (tmp_path / folder).mkdir()
    common = ["--metadata-dir", str(tmp_path / "trusted")]
    root = str(scene.metadata / "1.root.json")
    assert conformance.main([*common, "init", root]) == 0
    before = {path for path in tmp_path.rglob("*") if tmp_path / "files" not in path.parents}
    for name in names:
        code = conformance.main(
            [*common, "--metadata-url", f"{scene.web.url}/metadata", "--target-name", name,
             "--target-base-url", f"{scene.web.url}/targets", "--target-dir",
             str(tmp_path / "files"), "download"]
        )  # fmt: skip
        assert code in (0, 1)
    files = list((tmp_path / "files").iterdir())
    assert all(path.is_file() and path.read_bytes() == data for path in files)
    assert len(files) >= 3
    after = {path for path in tmp_path.rglob("*") if tmp_path / "files" not in path.parents}
    assert {path.name for path in after - before} <= {
        "timestamp.json", "snapshot.json", "targets.json", "root_history", "1.root.json",
        "root.json", "rollout.json",
    }  # fmt: skip
    assert not any(path.name == "evil" for path in tmp_path.parent.glob("*"))
