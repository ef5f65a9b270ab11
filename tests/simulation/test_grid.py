"""The grid of this process behaves as a link does: own records, error replies, kept state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedlora.errors import FederationError
from fedlora.simulation.grid import InProcessGrid
from tests.federation.fakes import raises


def content() -> RecordDict:
    return RecordDict(
        {
            "config": ConfigRecord({"list": [1, 2], "one": 1}),
            "arrays": ArrayRecord({"a": Array(np.arange(3, dtype=np.float32))}),
        }
    )


def app_of(answer: Any) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return answer(message, context)

    return app


def echo(message: Message, context: Context) -> Message:
    return Message(message.content, reply_to=message)


def send(grid: InProcessGrid, nodes: list[int]) -> list[Message]:
    messages = [grid.create_message(content(), "train", node, "1") for node in nodes]
    return list(grid.send_and_receive(messages))


def test_a_reply_knows_its_message_and_its_sender() -> None:
    grid = InProcessGrid(app_of(echo), 3)
    nodes = list(grid.get_node_ids())
    assert len(set(nodes)) == 3
    messages = [grid.create_message(content(), "train", node, "1") for node in nodes]
    replies = list(grid.send_and_receive(messages))
    assert [reply.metadata.src_node_id for reply in replies] == nodes
    assert [reply.metadata.reply_to_message_id for reply in replies] == [
        message.metadata.message_id for message in messages
    ]
    assert len({m.metadata.message_id for m in messages + replies}) == 6


def test_node_config_is_that_of_flowers_simulation_and_the_callers() -> None:
    seen: list[dict[str, Any]] = []

    def note(message: Message, context: Context) -> Message:
        seen.append(dict(context.node_config))
        return echo(message, context)

    grid = InProcessGrid(app_of(note), 2, {"base": "mine", "partition-id": 99})
    send(grid, list(grid.get_node_ids()))
    assert seen == [
        {"base": "mine", "partition-id": 0, "num-partitions": 2},
        {"base": "mine", "partition-id": 1, "num-partitions": 2},
    ]


def test_a_client_cannot_change_what_another_one_gets() -> None:
    def spoil(message: Message, context: Context) -> Message:
        received = message.content["config"]
        reply = RecordDict({"config": ConfigRecord({"seen": list(received["list"])})})
        received["list"].append(3)
        received["one"] = 2
        del message.content["arrays"]
        return Message(reply, reply_to=message)

    grid = InProcessGrid(app_of(spoil), 2)
    one = content()
    messages = [Message(one, node, "train") for node in grid.get_node_ids()]
    replies = list(grid.send_and_receive(messages))
    assert [reply.content["config"]["seen"] for reply in replies] == [[1, 2], [1, 2]]
    assert dict(one["config"]) == {"list": [1, 2], "one": 1}
    assert list(one) == ["config", "arrays"]


def test_an_exception_becomes_an_error_reply_and_the_others_go_on() -> None:
    def fail(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 0:
            raise ZeroDivisionError("no examples")
        return echo(message, context)

    grid = InProcessGrid(app_of(fail), 2)
    first, second = send(grid, list(grid.get_node_ids()))
    assert (first.error.code, first.error.reason) == (
        2,
        "<class 'ZeroDivisionError'>:<'no examples'>",
    )
    assert first.metadata.src_node_id == next(iter(grid.get_node_ids()))
    assert second.has_content()


def test_a_client_keeps_its_state_between_messages_and_no_other_has_it() -> None:
    def count(message: Message, context: Context) -> Message:
        before = context.state.get("count")
        number = 1 if before is None else before["n"] + 1
        context.state["count"] = ConfigRecord({"n": number})
        return Message(RecordDict({"n": ConfigRecord({"n": number})}), reply_to=message)

    grid = InProcessGrid(app_of(count), 2)
    one, two = grid.get_node_ids()
    assert [reply.content["n"]["n"] for reply in send(grid, [one, two, one, one])] == [1, 1, 2, 3]


def test_a_client_is_called_when_its_reply_is_read() -> None:
    called: list[int] = []

    def note(message: Message, context: Context) -> Message:
        called.append(int(context.node_config["partition-id"]))
        return echo(message, context)

    grid = InProcessGrid(app_of(note), 3)
    made: list[int] = []

    def messages() -> Any:
        for node in grid.get_node_ids():
            made.append(node)
            yield Message(content(), node, "train")

    replies = iter(grid.send_and_receive(messages()))
    assert (called, made) == ([], [])
    next(replies)
    assert (called, len(made)) == ([0], 1)
    list(replies)
    assert called == [0, 1, 2]


def test_pushed_messages_are_answered_once_when_pulled() -> None:
    grid = InProcessGrid(app_of(echo), 2)
    ids = list(grid.push_messages(Message(content(), n, "train") for n in grid.get_node_ids()))
    assert len(list(grid.pull_messages([*ids, "unknown"]))) == 2
    assert list(grid.pull_messages(ids)) == []


def test_a_message_to_nobody_is_an_error_reply() -> None:
    grid = InProcessGrid(app_of(echo), 1)
    (reply,) = send(grid, [4711])
    assert reply.error.reason == (
        "<class 'fedlora.errors.FederationError'>:<'no node 4711 in this simulation'>"
    )


def test_a_simulation_without_clients_is_refused() -> None:
    with raises(FederationError, "expected at least one virtual client, found 0"):
        InProcessGrid(app_of(echo), 0)


@pytest.mark.parametrize("clients", [1, 5])
def test_the_grid_shows_flower_its_run(clients: int, tmp_path: Path) -> None:
    grid = InProcessGrid(app_of(echo), clients)
    assert grid.run.run_id == 1
    assert [node.node_id for node in grid.get_nodes()] == list(grid.get_node_ids())
    grid.set_run("another")
    assert grid.run == "another"
