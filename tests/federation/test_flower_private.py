"""The names that Flower does not promise to keep: when one of these fails, look at Flower first."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message, RecordDict

from fedlora.federation import _flower_private as private

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = {"flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy"}


def test_the_constants_are_flowers() -> None:
    assert private.CLIENT_ERROR == 2
    assert private.MESSAGE_UNAVAILABLE == 3
    assert private.LINK_NODE_ID == 1


def test_a_message_can_be_made_and_numbered_in_this_process() -> None:
    private.identify_process(7)
    message = Message(RecordDict(), 5, "train")
    assert (message.metadata.run_id, message.metadata.src_node_id) == (7, 1)
    private.set_message_id(message, "abc")
    assert message.metadata.message_id == "abc"
    assert Message(RecordDict(), reply_to=message).metadata.reply_to_message_id == "abc"
    private.set_source_node(message, 9)
    assert message.metadata.src_node_id == 9
    private.identify_process()


def test_an_empty_run_has_its_id() -> None:
    run = private.empty_run(3)
    assert (run.run_id, run.primary_task_id) == (3, 1)


def test_no_other_module_imports_a_private_name_of_flower() -> None:
    found = []
    for folder in ("fedlora", "clients", "server"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name == "_flower_private.py":
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    names = [node.module or ""]
                found += [
                    (path.name, n) for n in names if n.split(".")[0] == "flwr" and n not in PUBLIC
                ]
    assert found == []


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any, Any]:
    """Flower's SuperNode, SuperExec and grid of a deployed server; unchanged after the test."""
    names = (private._SUPERNODE, private._SUPEREXEC, private._GRID)
    found = tuple(import_module(name) for name in names)
    replaced = (("time", "subprocess", "pull_objects"), ("time", "get_executor"), ("pull_objects",))
    for module, attributes in zip(found, replaced, strict=True):
        for attribute in attributes:
            monkeypatch.setattr(module, attribute, getattr(module, attribute))
    supernode, superexec, grid = found
    return supernode, superexec, grid


def test_the_sleeps_of_a_message_are_where_they_are_replaced(modules: Any) -> None:
    supernode, superexec, _ = modules
    loop, reply = map(
        inspect.getsource, (supernode.start_client_internal, supernode._push_messages)
    )
    assert loop.count("time.sleep(3)") == 1
    assert reply.count("time.sleep(0.5)") == 2
    assert inspect.getsource(superexec.run_superexec).count("time.sleep(task_poll_interval)") == 1
    assert private.IDLE_SECONDS == 3


def test_a_sleep_is_replaced_in_one_module_alone(modules: Any) -> None:
    supernode, superexec, _ = modules
    slept: list[float] = []
    private.with_sleep_in_supernode(slept.append)
    supernode.time.sleep(3)
    assert slept == [3]
    assert superexec.time.sleep is time.sleep
    private.with_sleep_in_superexec(slept.append)
    superexec.time.sleep(1.0)
    assert slept == [3, 1.0]
    assert time.sleep is not superexec.time.sleep


def test_a_supernode_starts_the_given_superexec_with_flowers_flags(
    modules: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[Any, ...]] = []
    supernode = modules[0]
    monkeypatch.setattr(
        "subprocess.Popen", lambda command, **options: started.append((command, options))
    )
    private.with_superexec(["python", "-m", "ours"], {"WAKE": "7"}, (7,))
    supernode.subprocess.Popen(["flower-superexec", "--insecure"])
    supernode.subprocess.Popen(["another"])
    (ours, options), other = started
    assert (ours, options["pass_fds"]) == (["python", "-m", "ours", "--insecure"], (7,))
    assert options["env"] == {**os.environ, "WAKE": "7"}
    assert other == (["another"], {})
    assert '"flower-superexec"]' in inspect.getsource(supernode.start_client_internal)


@pytest.mark.parametrize("accepts", [True, False])
def test_clients_are_launched_as_asked_and_by_flower_when_refused(
    modules: Any, monkeypatch: pytest.MonkeyPatch, accepts: bool
) -> None:
    types = import_module("flwr.supercore.superexec.executor")
    task_type = import_module("flwr.supercore.constant").TaskType
    asked: list[Mapping[str, Any]] = []
    by_flower: list[Any] = []
    monkeypatch.setattr(
        types.SubprocessExecutor, "launch", lambda self, spec: by_flower.append(spec)
    )
    private.with_client_launcher(lambda task: asked.append(task) or accepts)
    kind = import_module("flwr.supercore.constant").ExecutorType.SUBPROCESS
    executor = modules[1].get_executor(kind, executor_config=None)
    common = {
        "runtime_api_address": "127.0.0.1:9", "token": "secret", "insecure": True,
        "root_certificates_path": None, "parent_pid": 12, "runtime_dependency_install": False,
    }  # fmt: skip
    spec = types.ExecutionSpec(
        **common, task_type=task_type.CLIENT_APP, suppress_output=False, task_id=5
    )
    result = executor.launch(spec)
    assert asked == [common]
    assert by_flower == ([] if accepts else [spec])
    assert (result == types.LaunchResult.accepted()) is accepts
    server = dataclasses.replace(spec, task_type=task_type.SERVER_APP)
    executor.launch(server)
    assert (len(asked), by_flower[-1]) == (1, server)


def test_a_client_process_is_run_with_what_was_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    private.import_client_process()
    client = import_module(private._CLIENT)
    known = inspect.signature(client.run_clientapp).parameters
    ran: list[Mapping[str, Any]] = []
    monkeypatch.setattr(client, "run_clientapp", lambda **given: ran.append(given))
    private.run_client_process(
        {
            "runtime_api_address": "127.0.0.1:9", "token": "secret", "insecure": True,
            "root_certificates_path": None, "parent_pid": 12, "runtime_dependency_install": False,
        }
    )  # fmt: skip
    assert ran == [
        {
            "runtime_api_address": "127.0.0.1:9", "token": "secret", "insecure": True,
            "certificates": None, "parent_pid": 12, "runtime_dependency_install": False,
        }
    ]  # fmt: skip
    assert set(ran[0]) == set(known)


def test_what_has_not_arrived_is_asked_for_again_soon(modules: Any) -> None:
    supernode, _, grid = modules
    private.with_quick_objects_in_supernode()
    private.with_quick_objects_in_grid()
    flowers = import_module("flwr.supercore.inflatable.inflatable_utils")
    late = [flowers.ObjectUnavailableError("a")] * 2

    def pull(object_id: str) -> bytes:
        if late:
            raise late.pop()
        return object_id.encode()

    for module in (supernode, grid):
        assert "pull_objects(" in inspect.getsource(module)
        begun = time.monotonic()
        assert module.pull_objects(["a"], pull_object_fn=pull) == {"a": b"a"}
        # Flower's own would take 0.8 s at least for the first.
        assert time.monotonic() - begun < 0.8
        late[:] = [flowers.ObjectUnavailableError("a")]


def test_the_commands_are_functions_that_take_no_arguments() -> None:
    for module, name in (
        ("flwr.supernode.cli", "flower_supernode"), ("flwr.supercore.cli", "flower_superexec"),
    ):  # fmt: skip
        assert not inspect.signature(getattr(import_module(module), name)).parameters
