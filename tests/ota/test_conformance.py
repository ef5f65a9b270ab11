"""The client under test of TUF's conformance suite: its three commands and their exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from tuf.api.metadata import Metadata, TargetFile

from fedlora.ota import Publisher, conformance
from fedlora.ota.roles import now
from tests.ota.web import Web
from tests.ota.world import World, make_world


@pytest.fixture
def world(tmp_path: Path) -> World:
    found = make_world(tmp_path)
    for folder in ("trusted", "files"):
        (tmp_path / folder).mkdir()
    return found


@pytest.fixture
def web(world: World) -> Iterator[Web]:
    with Web(world.repository) as found:
        yield found


class Client:
    """The commands, in the order of arguments that the suite gives them in."""

    def __init__(self, world: World, web: Web) -> None:
        self.metadata, self.files = world.folder / "trusted", world.folder / "files"
        self.url = web.url
        self.root = world.repository / "metadata" / "1.root.json"

    def init(self) -> int:
        return conformance.main(["--metadata-dir", str(self.metadata), "init", str(self.root)])

    def _common(self) -> list[str]:
        return ["--metadata-url", f"{self.url}/metadata/", "--metadata-dir", str(self.metadata)]

    def refresh(self) -> int:
        return conformance.main([*self._common(), "refresh"])

    def download(self, *names: str) -> int:
        return conformance.main(
            [*self._common(), *(text for name in names for text in ("--target-name", name)),
             "--target-dir", str(self.files), "--target-base-url", f"{self.url}/targets/",
             "download"]
        )  # fmt: skip

    def version(self, role: str) -> int:
        return Metadata.from_file(str(self.metadata / f"{role}.json")).signed.version


@pytest.fixture
def client(world: World, web: Web) -> Client:
    found = Client(world, web)
    assert found.init() == 0
    return found


def test_init_asks_nobody_and_keeps_the_root(client: Client, web: Web) -> None:
    assert web.log == []
    assert (client.metadata / "root.json").read_bytes() == client.root.read_bytes()
    client.root = client.root.with_name("9.root.json")
    assert client.init() == 1


def test_refresh_keeps_metadata_by_its_role(client: Client, web: Web, world: World) -> None:
    assert client.refresh() == 0
    assert web.paths() == [
        "metadata/2.root.json", "metadata/timestamp.json", "metadata/1.snapshot.json",
        "metadata/1.targets.json",
    ]  # fmt: skip
    names = {path.name for path in client.metadata.glob("*.json")}
    assert names == {"root.json", "timestamp.json", "snapshot.json", "targets.json"}
    world.publisher.refresh()
    world.publisher.rotate("timestamp")
    assert client.refresh() == 0
    assert client.version("root") == 2
    assert client.version("timestamp") == world.publisher.roles.timestamp().version


@pytest.mark.parametrize("role", ["root", "timestamp", "snapshot", "targets"])
def test_expired_metadata_is_exit_code_1(client: Client, world: World, role: str) -> None:
    if role == "root":
        past = Publisher(
            world.repository, world.publisher.keys, clock=lambda: now() - timedelta(days=400)
        )
        past.renew("root")
    else:
        past = Publisher(
            world.repository, world.publisher.keys, clock=lambda: now() - timedelta(days=400)
        )
        if role == "targets":
            past.roles.write("targets", past.roles.targets())
        if role == "snapshot":
            past.roles.write_snapshot()
        else:
            world.publisher.roles.write_snapshot()
        (past if role == "timestamp" else world.publisher).roles.write_timestamp()
    assert client.refresh() == 1
    # What was verified before the expired role is kept.
    assert (client.metadata / "timestamp.json").exists() == (role in ("snapshot", "targets"))


def test_an_older_timestamp_is_exit_code_1(client: Client, web: Web, world: World) -> None:
    old = (world.repository / "metadata" / "timestamp.json").read_bytes()
    world.publisher.refresh()
    assert client.refresh() == 0
    web.rules[r"metadata/timestamp\.json"] = old
    assert client.refresh() == 1
    assert client.version("timestamp") == 2


def test_a_target_is_downloaded_once(client: Client, web: Web, world: World) -> None:
    world.publish(1)
    name = "stable/1.safetensors"
    for requests in (1, 0):
        web.forget()
        assert client.download(name) == 0
        assert sum(path.startswith("targets/") for path in web.paths()) == requests
    (file,) = client.files.iterdir()
    source = next((world.repository / "targets").rglob("*.1.safetensors"))
    assert file.read_bytes() == source.read_bytes()
    assert client.download("no such target") == 1


def sign(world: World, target: TargetFile) -> None:
    """Have the targets role sign one more target."""
    roles = world.publisher.roles
    targets = roles.targets()
    targets.targets[target.path] = target
    roles.write("targets", targets)
    roles.write_snapshot()
    roles.write_timestamp()


def test_several_targets_are_taken_in_order_up_to_the_first_that_fails(
    client: Client, web: Web, world: World
) -> None:
    for number in (1, 2, 3):
        world.publish(number)
    first, second, third = (f"stable/{number}.safetensors" for number in (1, 2, 3))
    assert client.download(second, "no such target", third) == 1
    assert {path.name for path in client.files.iterdir()} == {"stable%2F2.safetensors"}
    web.forget()
    assert client.download(first, second, third) == 0
    assert len(list(client.files.iterdir())) == 3
    paths = web.paths()
    asked = [path.split(".", 1)[1] for path in paths if path.startswith("targets/")]
    assert asked == ["1.safetensors", "3.safetensors"]  # the second is there
    assert paths.count("metadata/timestamp.json") == 1  # one client, one refresh
    assert client.download() == 1


@pytest.mark.parametrize("kinds", [["sha256"], ["sha512"], ["sha256", "sha512"], ["sha512", "md5"]])
def test_a_target_may_have_the_longer_digest(
    client: Client, web: Web, world: World, kinds: list[str]
) -> None:
    target = TargetFile.from_data("dir/file.txt", b"content", kinds)
    sign(world, target)
    web.rules["targets/dir/[0-9a-f]{32,128}[.]file[.]txt"] = b"content"
    assert client.download("dir/file.txt") == 0
    (file,) = client.files.iterdir()
    assert file.read_bytes() == b"content"
    (asked,) = (path for path in web.paths() if path.startswith("targets/"))
    assert asked.split("/")[-1].split(".")[0] in target.hashes.values()


@pytest.mark.parametrize(
    "hashes",
    [
        {"md5": "9a0364b9e99bb480dd25e1f0284c8555"},  # right, and weak
        {"unknown": "00" * 32},
        {"sha256": "../../../outside"},
        {"sha256": "00" * 32, "sha512": "/"},
        {"sha256": ""},
    ],
)
def test_digests_that_are_weak_or_no_names_of_files_ask_for_nothing(
    client: Client, web: Web, world: World, hashes: dict[str, str]
) -> None:
    sign(world, TargetFile(7, hashes, "dir/file.txt"))
    web.rules["targets/.*"] = b"content"
    assert client.download("dir/file.txt") == 1
    assert not any(path.startswith("targets/") for path in web.paths())
    assert list(client.files.iterdir()) == []


def test_a_target_that_changed_keeps_its_file(client: Client, web: Web, world: World) -> None:
    for content in (b"first", b"second"):
        target = TargetFile.from_data("dir/file.txt", content, ["sha256"])
        sign(world, target)
        digest = target.hashes["sha256"]
        web.rules[f"targets/dir/{digest}.file.txt"] = content
        assert client.download("dir/file.txt") == 0
        (file,) = client.files.iterdir()
        assert file.read_bytes() == content
    web.rules.clear()
    file.write_bytes(b"changed here")
    web.rules[f"targets/dir/{digest}.file.txt"] = b"flip"
    assert client.download("dir/file.txt") == 1
    assert file.read_bytes() == b"changed here"


def test_a_role_with_an_unusual_name_is_asked_for_as_one_segment(
    client: Client, web: Web, world: World
) -> None:
    from tuf.api.metadata import DelegatedRole, MetaFile, Targets

    roles, role = world.publisher.roles, "../delegated role?#"
    targets = roles.targets()
    delegations = targets.delegations
    assert delegations is not None
    assert delegations.roles is not None
    key = roles.public("rollout")[0][0]
    delegations.roles[role] = DelegatedRole(role, [key.keyid], 1, False, ["*"])
    roles.write("targets", targets)
    delegated = Metadata(Targets(1, expires=now() + timedelta(days=1)))
    delegated.sign(world.publisher.keys.signers("rollout", [key], 1)[0])
    name = "metadata/1...%2Fdelegated%20role%3F%23.json"
    web.rules[name.replace(".", r"\.").replace("?", r"\?")] = delegated.to_bytes()
    snapshot = roles.snapshot()
    snapshot.meta["targets.json"] = MetaFile(targets.version)
    snapshot.meta[f"{role}.json"] = MetaFile(1)
    roles.write("snapshot", snapshot)
    roles.write_timestamp()
    assert client.download("nothing") == 1
    assert name in web.paths()
    assert len(list(client.metadata.glob("*.json"))) == 5


def test_it_runs_as_a_module(client: Client) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fedlora.ota.conformance", *client._common(), "refresh"],
        capture_output=True, text=True, check=False, cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    root = json.loads((client.metadata / "root.json").read_text())
    assert root["signed"]["_type"] == "root"
