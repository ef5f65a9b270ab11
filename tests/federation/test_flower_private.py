"""The names that Flower does not promise to keep: when one of these fails, look at Flower first."""

from __future__ import annotations

import ast
from pathlib import Path

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
