"""up, status and down without Flower's programs: plans, refusals, and processes that have ended."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedlora.errors import ConfigError, FederationError, RunError
from fedlora.experiment import ExperimentConfig
from fedlora.federation import Dropped, RoundRecord
from fedlora.federation.checkpoint import append_round
from fedlora.federation.deploy import local, processes
from fedlora.federation.deploy.folder import Federation, Link, Node
from fedlora.federation.deploy.submit import claim_run, read_run, round_line
from tests.matching import raises

TABLE: dict[str, Any] = {
    "name": "watch",
    "base": {"id": "watch-cnn"},
    "data": {"id": "watch", "task": "classification"},
    "federation": {"rounds": 2, "cohort": 10, "local_steps": 4, "batch_size": 8},
}
CONFIG = ExperimentConfig.from_table(TABLE)


def ended() -> processes.Process:
    """Return the record of a process that ran and has ended."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    recorded = processes.describe(child.pid, uuid.uuid4().hex)
    assert child.stdin is not None
    child.stdin.close()
    child.wait()
    return recorded


def test_a_plan_has_a_trainer_for_every_node(tmp_path: Path) -> None:
    one = local.plan(tmp_path / "fed", 2, ["torch"])
    assert [node.trainer for node in one.nodes] == ["torch", "torch"]
    mixed = local.plan(tmp_path / "fed", 2, ["onnx", "torch"])
    assert [(node.name, node.trainer) for node in mixed.nodes] == [
        ("node-0", "onnx"), ("node-1", "torch"),
    ]  # fmt: skip
    with_bundle = local.with_bundle(mixed, tmp_path / "b")
    assert [node.bundle for node in with_bundle.nodes] == [str(tmp_path / "b"), None]
    assert not (tmp_path / "fed").exists()


def test_a_plan_that_cannot_be_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "fed"
    for trainers, text in (
        (["onnx", "torch"], "--trainer: expected 1 or 3 of them, found 2"),
        (["tensorflow"], "--trainer: expected onnx or torch, found 'tensorflow'"),
    ):
        with raises(ConfigError, text):
            local.plan(folder, 3, trainers)
    with raises(ConfigError, "--nodes: expected at least 1, found 0"):
        local.plan(folder, 0)
    with raises(ConfigError, "expected a bundle's folder, found no manifest.json"):
        local.plan(folder, 1, ["onnx"], bundle=tmp_path)
    with raises(ConfigError, "expected an environment or an interpreter, found none"):
        local.plan(folder, 1, ["onnx"], pythons={"onnx": tmp_path})
    with raises(ConfigError, "--python torch=…: expected a trainer of these nodes: ['onnx']"):
        local.plan(folder, 1, ["onnx"], pythons={"torch": Path(sys.executable)})
    (tmp_path / "file").write_text("x")
    with raises(RunError, f"{tmp_path}: expected a new or empty folder; name another --dir"):
        local.plan(tmp_path, 1, ["torch"])
    Federation(folder).save()
    with raises(RunError, "found a federation; go on with: fedlora federation up --resume --dir"):
        local.plan(folder, 1, ["torch"])


def test_an_environment_without_the_packages_is_refused(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text('#!/bin/sh\necho \'["flwr", "onnxruntime"]\'\n')
    bare.chmod(0o755)
    with raises(
        ConfigError, f"--python {bare}: expected flwr, onnxruntime in it; run there: pip install "
        "'fedlora[client]'",
    ):  # fmt: skip
        local.plan(tmp_path / "fed", 1, ["onnx"], pythons={"onnx": bare})
    bare.write_text("#!/bin/sh\necho no such library >&2; exit 1\n")
    with raises(ConfigError, f"--python {bare}: does not run: no such library"):
        local.plan(tmp_path / "fed", 1, ["onnx"], pythons={"onnx": bare})


def test_the_cohort_fits_the_nodes() -> None:
    assert local.fitting_cohort(CONFIG, 3).federation.cohort == 3
    assert local.fitting_cohort(CONFIG, 12) is CONFIG
    held_out = ExperimentConfig.from_table(TABLE, {"data.held_out_clients": 0.5})
    assert local.fitting_cohort(held_out, 4).federation.cohort == 2


def test_federation_json_is_read_back_and_private(tmp_path: Path) -> None:
    process = processes.Process(1234, "567", "token/link")
    federation = Federation(
        tmp_path,
        link=Link("127.0.0.1", 8000, process),
        nodes=(
            Node(0, "onnx", bundle="/b", node_id="1"),
            Node(1, "torch", port=9, process=process),
        ),
    )
    federation.save()
    assert Federation.read(tmp_path) == federation
    assert (tmp_path / "federation.json").stat().st_mode & 0o777 == 0o600
    with raises(RunError, "no federation here: No such file"):
        Federation.read(tmp_path / "none")
    for text in ("[]", "{", '{"version": 9}', '{"version": 1, "token": "x", "nodes": [1]}'):
        (tmp_path / "federation.json").write_text(text)
        with raises(RunError, "not a federation of this version"):
            Federation.read(tmp_path)


def test_status_with_processes_that_have_ended(tmp_path: Path) -> None:
    federation = Federation(
        tmp_path,
        link=Link("127.0.0.1", 8000, ended()),
        nodes=(Node(0, "torch", node_id="7", process=ended()), Node(1, "torch")),
    )
    federation.save()
    found = local.status(tmp_path)
    assert found["link"]["running"] is False
    assert [(row["running"], row["link_says"]) for row in found["nodes"]] == [(False, None)] * 2
    assert found["nodes"][1]["pid"] is None
    assert found["run"] is None
    assert local.down(tmp_path) == []


def test_down_never_ends_a_process_that_only_has_the_number(tmp_path: Path) -> None:
    mine = processes.Process(os.getpid(), "1", "x/link")
    Federation(tmp_path, link=Link("127.0.0.1", 8000, mine)).save()
    assert local.down(tmp_path) == []  # and this test goes on


def test_a_node_that_ended_is_told_once_and_the_last_one_ends_the_wait(tmp_path: Path) -> None:
    sleeper = processes.start(
        [sys.executable, "-c", "import time; time.sleep(600)"], os.environ, "t/node-1",
        tmp_path / "logs" / "node-1.log",
    )  # fmt: skip
    try:
        federation = Federation(
            tmp_path,
            link=Link("127.0.0.1", 8000),
            nodes=(Node(0, "torch", process=ended()), Node(1, "torch", process=sleeper)),
        )
        federation.save()
        federation.log("node-0").write_text("INFO: start\nKeyError: 'x'\n")
        told: list[str] = []
        watch = local._NodeWatch(federation, CONFIG, told.append)
        watch.look()
        watch.look()
        assert told == [f"node-0 has ended: KeyError: 'x'; see {federation.log('node-0')}"]
    finally:
        processes.stop(sleeper)
    federation.log("node-1").write_text("[code: 2004] Failed to activate SuperNode.\n")
    watch.end = 0.0  # long after it could have been a node that the SuperLink had not missed yet
    with raises(FederationError, "no node is left: node-1 has ended: 127.0.0.1:8000: unregistered"):
        watch.look()


def test_nodes_are_registered_at_once_and_those_that_were_not_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = threading.Barrier(3, timeout=30)  # broken, if they came one after the other

    def register(federation: Federation, public: Path) -> str:
        together.wait()
        if public.name == "node-2.pub":
            raise FederationError(f"{public}: not registered: Public key already in use.")
        return {"node-1.pub": "11", "node-3.pub": "13"}[public.name]

    monkeypatch.setattr(local, "register", register)
    nodes = (Node(0, "torch", node_id="10"), *(Node(number, "torch") for number in (1, 2, 3)))
    federation = local._register_nodes(Federation(tmp_path, nodes=nodes))
    assert [node.node_id for node in federation.nodes] == ["10", "11", "", "13"]
    assert Federation.read(tmp_path) == federation
    assert sorted(path.name for path in (tmp_path / "keys").glob("*.pub")) == [
        "node-1.pub", "node-2.pub", "node-3.pub",
    ]  # fmt: skip


def test_what_the_bundle_fails_with_is_what_up_fails_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        local, "start_link", lambda federation, link: replace(federation, link=link)
    )
    monkeypatch.setattr(local, "register", lambda federation, public: "1")
    started: list[Any] = []
    monkeypatch.setattr(local, "start_nodes", lambda *words: started.append(words))

    def export(folder: Path) -> None:
        raise ConfigError(f"{folder}: no bundle")

    federation = Federation(tmp_path, nodes=(Node(0, "onnx"),))
    with raises(ConfigError, f"{tmp_path / 'bundle'}: no bundle"):
        local.up(federation, CONFIG, say=lambda line: None, export=export)
    assert started == []


def test_the_address_by_which_this_host_reaches_the_link() -> None:
    found = {host: Link(host, 1).address for host in ("127.0.0.1", "0.0.0.0", "::", "::1")}
    assert found == {
        "127.0.0.1": "127.0.0.1:1", "0.0.0.0": "127.0.0.1:1", "::": "localhost:1",
        "::1": "[::1]:1",
    }  # fmt: skip


def test_a_runs_folder_is_claimed_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    claim_run(out, CONFIG)
    assert read_run(out) == CONFIG
    claim_run(out, CONFIG)  # nothing has happened in it yet
    append_round(out, RoundRecord(1, "updated", ("a",), 0.5, 1.0, 1, 1))
    with raises(RunError, f"go on with: fedlora federation submit --resume {out}"):
        claim_run(out, CONFIG)
    longer = read_run(out, {"federation.rounds": 9})
    assert longer == replace(CONFIG, federation=replace(CONFIG.federation, rounds=9))
    with raises(RunError, f"{tmp_path}: expected a run's folder, found no experiment.toml in it"):
        read_run(tmp_path)
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "file").write_text("x")
    with raises(RunError, "name another --out"):
        claim_run(tmp_path / "else", CONFIG)


def test_a_rounds_line_names_who_was_dropped() -> None:
    lost = Dropped("c7", "no answer in time")
    found = RoundRecord(2, "failed", ("a", "c7"), None, 3.0, 1500, 2500, dropped=(lost,))
    assert round_line(found, 5) == (
        "round 2/5: 3.0 s 1 dropped; failed, 2 clients, 2 kB up, 2 kB down, first dropped c7: "
        "no answer in time"
    )
