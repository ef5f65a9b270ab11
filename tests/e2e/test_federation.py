"""A real federation on the loopback: TLS, node keys, nodes with and without torch, and disasters.

Everything is brought up by the command line, as a user would. The torch-free environment gets the
wheel with the extra `client` and the versions of constraints.txt, which pip downloads.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlora.adapter import Adapter
from fedlora.conditions import FaultsConfig
from fedlora.data import load_data
from fedlora.federation import read_rounds
from fedlora.federation.deploy import local, processes
from fedlora.federation.deploy.certificates import make_certificates
from fedlora.federation.deploy.folder import Federation, Link
from fedlora.federation.deploy.keys import make_node_key, public_path
from fedlora.federation.deploy.link import answers, register, start_link
from fedlora.federation.deploy.submit import read_run
from fedlora.federation.faults import CRASHED, draw_fault
from fedlora.federation.flower_commands import free_port
from fedlora.federation.folder import read_rows
from fedlora.formats import load_adapter
from fedlora.store import Store
from tests.e2e.test_without_torch import install, installed
from tests.e2e.test_without_torch import wheel as wheel  # a fixture

pytest.importorskip("build")
pytest.importorskip("hatchling")
pytest.importorskip("onnx")
torch = pytest.importorskip("torch")

from fedlora.nn import load_adapter_into  # noqa: E402
from fedlora.simulation import simulate  # noqa: E402
from fedlora.world import shared_world  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="finds killed processes' children by /proc"),
]
PROJECT = Path(__file__).resolve().parents[2]
PATIENCE = 1200.0  # seconds for anything; 60 to 300 are usual, by what else the machine does
NODES = 3
SETTINGS = {
    "data.clients": NODES,
    "federation.cohort": NODES,
    "federation.rounds": 3,
    "engine.kind": "sequential",
}
CLIENTS = ("1_right", "2_right", "3_left")  # whose data the nodes have
FAULTS_SEED = 0
PLAIN_SGD = {"federation.optimizer": "sgd", "federation.learning_rate": 0.05}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Sums in one order, here and in every process that is started."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("MKL_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def device(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment of a device that takes part: Flower and ONNX Runtime, no torch."""
    venv = tmp_path_factory.mktemp("device") / "venv"
    install(wheel, "client", venv)
    assert "torch" not in installed(venv)
    return venv


@pytest.fixture(scope="module")
def undisturbed(device: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a federation that ran with plain SGD from its first to its last round."""
    folder = tmp_path_factory.mktemp("undisturbed") / "fed"
    result = bring_up(folder, PLAIN_SGD, device)
    assert (result["rounds"], result["clients"], result["dropped"]) == (3, NODES, 0)
    assert result["failed_rounds"] == 0
    return folder


@pytest.fixture(scope="module")
def bundle(undisturbed: Path) -> Path:
    """The bundle that `up` has exported there: once is enough for these tests."""
    return undisturbed / "bundle"


def test_devices_without_torch_train_what_the_simulation_trains(
    undisturbed: Path, tmp_path: Path
) -> None:
    run = simulate("watch", overrides=SETTINGS | PLAIN_SGD, out=tmp_path / "simulated")
    difference = apart(adapter_of(undisturbed), run.adapter)
    print("plain SGD, two nodes in ONNX Runtime and one in torch: factors differ by", difference)
    assert difference <= 1e-5  # DESIGN's tolerance after three rounds of SGD
    there, here = read_rounds(undisturbed / "out"), read_rounds(tmp_path / "simulated")
    assert [record.cohort for record in there] == [record.cohort for record in here]
    assert all(record.dropped == () for record in there)


def test_nothing_is_left_running_and_secrets_are_the_owners(undisturbed: Path) -> None:
    federation = Federation.read(undisturbed)
    assert leftovers(federation) == []
    for secret in ("certs/ca.key", "certs/server.key", "keys/node-0", "federation.json"):
        assert (undisturbed / secret).stat().st_mode & 0o777 == 0o600
    found = local.status(undisturbed)
    assert [row["running"] for row in found["nodes"]] == [False] * NODES
    assert found["run"]["round"] == found["run"]["rounds"] == 3


def test_every_device_has_its_personal_adapter_and_the_summary_compares_four(
    undisturbed: Path,
) -> None:
    for node in Federation.read(undisturbed).nodes:
        assert node_store(undisturbed, node.number).status().commits == 1
    assert len(personal_adapters(undisturbed)) == NODES
    seen = four_adapters(undisturbed)
    print({name: round(values["mean"], 4) for name, values in seen.items()})
    # What its own data gives a device is more than what it had (measured: 0.74 to 0.97).
    assert seen["personal"]["mean"] > seen["base"]["mean"]


def test_adamw_gives_the_same_outputs(device: Path, bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "fed"
    bring_up(folder, {}, device, bundle)
    run = simulate("watch", overrides=SETTINGS, out=tmp_path / "simulated")
    difference = outputs_apart(read_run(folder / "out"), adapter_of(folder), run.adapter)
    print("AdamW: outputs differ by", difference)
    assert difference <= 1e-4  # DESIGN's tolerance: AdamW divides by gradients that are nearly 0


def test_a_stranger_is_refused_and_told_why(tmp_path: Path) -> None:
    folder = tmp_path / "fed"
    make_certificates(folder / "certs")
    other = make_certificates(tmp_path / "other")
    make_node_key(tmp_path / "known")
    make_node_key(tmp_path / "stranger")
    federation = start_link(Federation(folder), Link("127.0.0.1", free_port()))
    try:
        assert federation.link is not None
        assert register(federation, public_path(tmp_path / "known")).isdecimal()
        link = federation.link.address
        ca = folder / "certs" / "ca.crt"
        table = {
            "unregistered node: the server does not know the key SHA256:": (
                "--ca", ca, "--key", tmp_path / "stranger",
            ),
            "wrong certificate: the server's is not one that": (
                "--ca", other.ca, "--key", tmp_path / "known",
            ),
            "plain connection: the server speaks TLS only": (
                "--insecure", "--key", tmp_path / "known",
            ),
        }  # fmt: skip
        for reason, arguments in table.items():
            home = ("--home", tmp_path / "home")
            done = fedlora("start-node", "--link", link, *arguments, *home)
            last = done.stderr.splitlines()[-1]
            print(last)
            assert done.returncode == 1
            assert last.startswith(f"fedlora: {link}: {reason}")
        again = fedlora("register", tmp_path / "known.pub", "--dir", folder)
        assert again.returncode == 1
        assert again.stderr.endswith("known.pub: not registered: Public key already in use.\n")
    finally:
        assert local.down(folder) == ["link"]
    assert leftovers(federation) == []


def test_step_by_step_as_on_real_hosts(tmp_path: Path) -> None:
    """certs, start-link, key, register, start-node, submit, and submit again for another round."""
    fed, port = tmp_path / "fed", str(free_port())
    ok("certs", "--dir", fed, "--host", "fl.example.org")
    with running("start-link", "--dir", fed, "--port", port) as link:
        ok("key", tmp_path / "node.key")
        wait_until(lambda: answers(f"127.0.0.1:{port}", fed / "certs" / "ca.crt"))
        node_id = json.loads(ok("register", tmp_path / "node.key.pub", "--dir", fed, "--json"))
        with running(
            "start-node", "--link", f"127.0.0.1:{port}", "--ca", fed / "certs" / "ca.crt",
            "--key", tmp_path / "node.key", "--trainer", "torch", "--client", "1_left",
            "--home", tmp_path / "home", "--state", tmp_path / "state",
        ) as node:  # fmt: skip
            # It is in the middle of a run whose command is killed: the run goes on.
            words = ("--dir", fed, "--min-clients", "1", "--set", "federation.cohort=1")
            with running("submit", "watch", *words, "--set", "federation.rounds=2") as submitting:
                wait_until(lambda: len(read_rounds(fed / "out")) == 1)
                submitting.kill()
            done = fedlora("submit", "--resume", fed / "out", "--dir", fed, "--json")
            assert done.returncode == 0, done.stderr
            assert "still goes on; following it" in done.stderr
            result = json.loads(done.stdout)
            assert (result["rounds"], result["clients"], result["dropped"]) == (2, 1, 0)
            # More rounds, by a new run of Flower that begins at the checkpoint.
            more = fedlora(
                "submit", "--resume", fed / "out", "--dir", fed, "--min-clients", "1",
                "--set", "federation.rounds=3", "--json",
            )  # fmt: skip
            assert more.returncode == 0, more.stderr
            assert "going on after round 2 of 3" in more.stderr
            assert json.loads(more.stdout)["rounds"] == 3
            found = json.loads(ok("status", "--dir", fed, "--json"))
            assert found["link"]["running"] is True
            node.terminate()
            assert node.wait(PATIENCE) == 0
        link.terminate()
        link.wait(PATIENCE)
    assert node_id["node_id"].isdecimal()
    assert [record.cohort for record in read_rounds(fed / "out")] == [("1_left",)] * 3
    wait_until(lambda: leftovers(Federation.read(fed)) == [])


def test_a_failed_run_is_reported_as_failed(tmp_path: Path) -> None:
    folder = tmp_path / "fed"
    # One node, and a held-out share that leaves it in: the cohort is the data's only client, but
    # the learning rate lets its update become infinite, round after round.
    done = fedlora(
        "up", "--nodes", "1", "--trainer", "torch", "--dir", folder,
        "--set", "federation.learning_rate=1e30", "--set", "federation.rounds=4",
    )  # fmt: skip
    print(done.stderr)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("fedlora: ")
    assert "Traceback" not in done.stderr
    assert leftovers(Federation.read(folder)) == []


def test_a_killed_superlink_costs_no_round(
    undisturbed: Path, device: Path, bundle: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "fed"
    with going_up(folder, PLAIN_SGD, device, bundle) as up:
        wait_for_round(folder, 1, up)
        federation = Federation.read(folder)
        # The whole server at once, as when its power goes: the SuperLink, its ServerApp, and the
        # command that follows them. The nodes live on.
        up.kill()
        kill("link", federation)
        up.wait()
    found = local.status(folder)
    assert found["link"]["running"] is False
    assert [row["running"] for row in found["nodes"]] == [True] * NODES
    done = fedlora("up", "--resume", "--dir", folder, "--json")
    print(done.stderr)
    assert done.returncode == 0, done.stderr
    assert "going on after round" in done.stderr
    records = read_rounds(folder / "out")
    assert [record.round for record in records] == [1, 2, 3]
    assert all(record.dropped == () and len(record.cohort) == NODES for record in records)
    # The same replies arrived, so the same bits come out, on the devices too.
    assert apart(adapter_of(folder), adapter_of(undisturbed)) == 0
    for here, there in zip(personal_adapters(folder), personal_adapters(undisturbed), strict=True):
        assert apart(here, there) == 0
    assert four_adapters(folder) == four_adapters(undisturbed)
    assert leftovers(federation) == []


def test_kills_in_the_last_stage_leave_every_personal_adapter_intact(
    undisturbed: Path, device: Path, bundle: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "fed"
    with going_up(folder, PLAIN_SGD, device, bundle) as up:
        wait_for_round(folder, 3, up)
        federation = Federation.read(folder)
        log = federation.log("node-0")
        wait_until(lambda: "Receiving: evaluate message" in log.read_text())
        # One device in the middle of its own training, and then the server; the others live on, and
        # may be writing to their states.
        kill("node-0", federation)
        up.kill()
        kill("link", federation)
        up.wait()
    done = fedlora("up", "--resume", "--dir", folder, "--json")
    print(done.stderr)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rounds"] == 3
    assert apart(adapter_of(folder), adapter_of(undisturbed)) == 0
    for here, there in zip(personal_adapters(folder), personal_adapters(undisturbed), strict=True):
        assert apart(here, there) == 0
    assert four_adapters(folder) == four_adapters(undisturbed)
    assert leftovers(federation) == []


def test_a_killed_node_a_straggler_and_a_killed_superlink(
    device: Path, bundle: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "fed"
    settings = PLAIN_SGD | {
        "federation.method": "fedsa-lora",  # B are the devices' own, in their states alone
        "federation.rounds": 5,
        "quorum.share": 0.6,  # two of three
        "quorum.grace": 2,
        "quorum.deadline": 300,
    }
    with going_up(folder, settings, device, bundle) as up:
        wait_for_round(folder, 1, up)
        federation = Federation.read(folder)
        # A node in mid-train: it has the message of round 2, and its client's process dies with it.
        log = federation.log("node-0")
        wait_until(lambda: log.read_text().count("Receiving: train message") >= 2)
        kill("node-0", federation)
        wait_for_round(folder, 2, up)
        config = read_run(folder / "out")
        federation = local.start_nodes(Federation.read(folder), config)
        # A straggler: it stands still for a while, and then goes on.
        still = processes.marked(federation.mark("node-1"))
        for pid in still:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(15)
        for pid in still:
            os.kill(pid, signal.SIGCONT)
        wait_for_round(folder, 3, up)
        up.kill()
        kill("link", federation)
        up.wait()
    done = fedlora("up", "--resume", "--dir", folder, "--json")
    print(done.stderr)
    assert done.returncode == 0, done.stderr
    records = read_rounds(folder / "out")
    for record in records:
        print(record)
    assert [record.round for record in records] == [1, 2, 3, 4, 5]
    # No round is lost beyond the quorum's rule: each had its two of three.
    assert all(record.status == "updated" for record in records)
    assert all(len(record.dropped) <= 1 for record in records)
    assert is_finite(adapter_of(folder))
    for number, adapter in enumerate(personal_adapters(folder)):
        assert any(layer.B.any() for layer in adapter.layers.values())
        # What the device has kept of the rounds is whole: it would be refused by its digest.
        (run,) = (node_store(folder, number).path / "federation").iterdir()
        assert [len(path.name) for path in run.iterdir()] == [32]
    four_adapters(folder)
    assert leftovers(federation) == []


def test_faults_of_every_kind_and_a_short_deadline(
    device: Path, bundle: Path, tmp_path: Path
) -> None:
    """What `[faults]` and `[quorum]` say holds on a real link too, set by --set."""
    folder, rounds = tmp_path / "fed", 6
    chances = dict.fromkeys(("drop", "crash", "delay", "duplicate", "corrupt"), 0.2)
    faults = FaultsConfig(**chances, seconds=2.0, seed=FAULTS_SEED)
    drawn = {
        (number, client): draw_fault(faults, client, str(number))
        for number in range(1, rounds + 1)
        for client in CLIENTS
    }
    hits = [fault for fault in drawn.values() if fault is not None]
    assert all(any(getattr(fault, kind) for fault in hits) for kind in chances)
    settings: dict[str, Any] = PLAIN_SGD | {
        "federation.rounds": rounds,
        "faults.seconds": faults.seconds,
        "faults.seed": faults.seed,
        "quorum.share": 0.6,  # two of three
        "quorum.grace": 20,  # longer than a delay, so that what was delayed still comes
        "quorum.deadline": 40,
    }
    settings |= {f"faults.{kind}": chance for kind, chance in chances.items()}
    result = bring_up(folder, settings, device, bundle)
    assert (result["rounds"], result["clients"], result["failed_rounds"]) == (rounds, NODES, 0)
    records = read_rounds(folder / "out")
    for record in records:
        print(record)
    assert [record.round for record in records] == list(range(1, rounds + 1))
    for record in records:
        assert set(record.cohort) == set(CLIENTS)
        assert record.seconds < 40 + 20  # the deadline, and the server's own work
        reasons: dict[str, list[str]] = {client: [] for client in CLIENTS}
        for dropped in record.dropped:
            reasons[dropped.client].append(dropped.reason)
        for client in CLIENTS:
            assert_told(drawn[record.round, client], reasons[client], client)
    assert is_finite(adapter_of(folder))
    assert len(personal_adapters(folder)) == NODES
    four_adapters(folder)
    (note,) = [
        note for note in result["summary"]["extra"]["notes"] if note.startswith("faults were")
    ]
    assert "drop 0.2, crash 0.2, delay 0.2, duplicate 0.2, corrupt 0.2" in note


def assert_told(fault: Any, reasons: list[str], client: str) -> None:
    """What rounds.jsonl says of one client's message is what was done to it, and nothing else."""
    if fault is None or not (fault.drop or fault.crash or fault.corrupt or fault.duplicate):
        assert reasons == []
    elif fault.drop:
        assert reasons in (["no reply in time"], ["not waited for: the round had its quorum"])
    elif fault.crash:
        assert reasons == [CRASHED]
    else:
        twice = ["a second reply in one round; the first counts"]
        if fault.corrupt:
            assert reasons[0].startswith(f"client {client!r}") or "too late to count" in reasons[0]
            reasons = reasons[1:]
        assert reasons == (twice if fault.duplicate else [])


def test_an_owner_who_allows_nothing_now_is_left_in_peace(tmp_path: Path) -> None:
    """Two of three devices decline: one at this hour, one with as little data as it has."""
    fed, port, hour = tmp_path / "fed", free_port(), datetime.now().hour
    limits = {
        "1_left": [],
        "1_right": ["--node-config", f"hours={(hour + 6) % 24}-{(hour + 7) % 24}"],
        "2_right": ["--node-config", "min-examples=1000000"],
    }
    make_certificates(fed / "certs")
    federation = start_link(Federation(fed), Link("127.0.0.1", port))
    try:
        with ExitStack() as nodes:
            for client, words in limits.items():
                key, folder = tmp_path / f"{client}.key", tmp_path / client
                register(federation, make_node_key(key))
                nodes.enter_context(
                    running(
                        "start-node", "--link", f"127.0.0.1:{port}", "--key", key,
                        "--ca", fed / "certs" / "ca.crt", "--trainer", "torch",
                        "--client", client, "--home", folder / "home", "--state",
                        folder / "state", *words,
                    )
                )  # fmt: skip
            done = fedlora(
                "submit", "watch", "--dir", fed, "--min-clients", "3", "--json",
                "--set", "federation.cohort=3", "--set", "federation.rounds=2",
            )  # fmt: skip
    finally:
        local.down(fed)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["rounds"], result["clients"], result["failed_rounds"]) == (2, 3, 0)
    expected = {"1_right": "declined: hours", "2_right": "declined: examples"}
    for record in read_rounds(fed / "out"):
        assert record.status == "updated"
        assert sorted(record.declined) == sorted(expected)
        assert {drop.client: drop.reason for drop in record.dropped} == expected
    rows = {row["client"]: row for row in read_rows(fed / "out" / "clients.jsonl")}
    assert "scores" in rows["1_left"]
    for client, reason in expected.items():
        assert rows[client]["failed"] == f"client {client!r}: {reason}"
        # Nothing was trained there, so there is nothing to keep.
        assert not (tmp_path / client / "state" / "state.json").exists()
    assert Store.open(tmp_path / "1_left" / "state").personal_adapter() is not None
    wait_until(lambda: leftovers(Federation.read(fed)) == [])


def arguments(
    folder: Path, settings: dict[str, Any], device: Path, bundle: Path | None
) -> list[str | Path]:
    keys = (SETTINGS | settings).items()
    overrides = [word for key, value in keys for word in ("--set", f"{key}={value}")]
    if bundle is not None:
        overrides += ["--bundle", str(bundle)]
    return [
        "up", "--nodes", str(NODES), "--trainer", "onnx,onnx,torch", "--experiment", "watch",
        "--python", f"onnx={device}", "--dir", folder, *overrides,
    ]  # fmt: skip


def bring_up(
    folder: Path, settings: dict[str, Any], device: Path, bundle: Path | None = None
) -> Any:
    done = fedlora(*arguments(folder, settings, device, bundle), "--json")
    print(done.stderr)
    logs = "".join(path.read_text() for path in (folder / "logs").glob("*.log"))
    assert done.returncode == 0, done.stderr + logs[-5000:]
    return json.loads(done.stdout)


@contextmanager
def going_up(
    folder: Path, settings: dict[str, Any], device: Path, bundle: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Yield the process of `up` in its middle; nothing of it is left when the test fails."""
    words = arguments(folder, settings, device, bundle)
    command = [sys.executable, "-m", "fedlora", "federation", *words]
    with open(folder.with_name("up.log"), "wb") as log:
        up = subprocess.Popen(
            [str(word) for word in command], env=environment(), stdout=log, stderr=log
        )
    try:
        yield up
    except BaseException:
        up.kill()
        up.wait()
        if Federation.there(folder):
            local.down(folder)
        print(folder.with_name("up.log").read_text())
        raise


def fedlora(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fedlora", "federation", *map(str, words)]
    return subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False
    )


def ok(*words: str | Path) -> str:
    done = fedlora(*words)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def running(*words: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """Yield a command that goes on; it is asked to stop at the end, and then made to."""
    command = [sys.executable, "-m", "fedlora", "federation", *map(str, words)]
    process = subprocess.Popen(command, env=environment())
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(PROJECT)}


def wait_for_round(folder: Path, number: int, up: subprocess.Popen[bytes]) -> None:
    def there() -> bool:
        assert up.poll() is None, folder.with_name("up.log").read_text()
        return len(read_rounds(folder / "out")) >= number

    wait_until(there)


def wait_until(happened: Any) -> None:
    end = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


def leftovers(federation: Federation) -> list[int]:
    names = ["link", *(node.name for node in federation.nodes)]
    return [pid for name in names for pid in processes.marked(federation.mark(name))]


def kill(name: str, federation: Federation) -> None:
    """Kill link or node-0, … with all that it has started, as a power cut does."""
    for pid in processes.marked(federation.mark(name)):
        with suppress(ProcessLookupError):  # a child that has just ended
            os.kill(pid, signal.SIGKILL)


def node_store(folder: Path, number: int) -> Store:
    federation = Federation.read(folder)
    return Store.open(federation.node_folder(federation.nodes[number]) / "state")


def personal_adapters(folder: Path) -> list[Adapter]:
    """Return each node's personal adapter, of this run's global one; reading compares digests."""
    found = []
    for node in Federation.read(folder).nodes:
        store = node_store(folder, node.number)
        shared, personal = store.global_adapter(), store.personal_adapter()
        assert shared is not None
        assert personal is not None
        assert shared == load_adapter(folder / "out" / "adapter.safetensors")
        assert is_finite(personal)
        assert personal != shared
        assert store.status().personal.stale is False  # type: ignore[union-attr]
        found.append(personal)
    return found


def four_adapters(folder: Path) -> dict[str, dict[str, float]]:
    """Return what summary.json has of base, own, global and personal, as all clients told it."""
    summary = json.loads((folder / "out" / "summary.json").read_bytes())
    rows = read_rows(folder / "out" / "clients.jsonl")
    assert summary["clients"] == NODES
    assert sorted({row["client"] for row in rows if "scores" in row}) == sorted(CLIENTS)
    found = {}
    for name in ("base", "own", "global", "personal"):
        found[name] = summary[name]
        assert all(np.isfinite(value) for value in found[name].values())
        assert 0 <= found[name]["mean"] <= 1  # an accuracy
    return found


def is_finite(adapter: Adapter) -> bool:
    return all(
        bool(np.isfinite(layer.A).all() and np.isfinite(layer.B).all())
        for layer in adapter.layers.values()
    )


def adapter_of(folder: Path) -> Adapter:
    (path,) = (folder / "out" / "checkpoint").glob("round-*[0-9].safetensors")
    return load_adapter(path)


def apart(a: Adapter, b: Adapter) -> float:
    assert a.layers.keys() == b.layers.keys()
    return max(
        float(np.abs(getattr(a[path], factor) - getattr(b[path], factor)).max())
        for path in a.layers
        for factor in ("A", "B")
    )


def outputs_apart(config: Any, a: Adapter, b: Adapter) -> float:
    """Return the largest difference of the two adapters' logits on a client's held-out windows."""
    world = shared_world(config.base, config.data, config.lora, config.seed)
    found = load_data("watch").client("1_left").test
    inputs = torch.from_numpy(np.array(found.inputs, dtype=np.float32))
    logits = []
    for adapter in (a, b):
        load_adapter_into(world.model, adapter)
        with torch.no_grad():
            logits.append(world.model.eval()(inputs))
    return float((logits[0] - logits[1]).abs().max())
