"""What many clients are asked alike is read once; what differs in anything is read again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ConfigRecord, RecordDict

from fedlora.aggregation import method
from fedlora.errors import FederationError
from fedlora.federation import ClientSetup
from fedlora.federation.codecs import CODECS
from fedlora.federation.records import (
    BOTH,
    TrainOrder,
    encode_adapter,
    query_content,
    to_record,
    train_content,
)
from fedlora.federation.tasks import answer_query, answer_task, read_query, read_task
from tests.federation.fakes import experiment, raises, start_adapter
from tests.federation.test_records import adapter


def contents(count: int, **overrides: Any) -> list[RecordDict]:
    """A round's messages as the strategy makes them."""
    config = experiment(**overrides)
    rule = method(config.federation.method)
    order = to_record(
        TrainOrder(1, config.seed, config.federation.train, rule.uploaded(1), rule.rule(1))
    )
    setup = to_record(ClientSetup.of(config))
    encoded = encode_adapter(start_adapter(config), BOTH, 1)
    return [train_content(setup, order, encoded) for _ in range(count)]


def test_the_messages_of_a_round_are_read_as_one_and_the_same_task() -> None:
    one, two, three = contents(3)
    assert read_task(one) is read_task(two) is read_task(three)
    assert read_task(one).broadcast.trainable == start_adapter(experiment())
    assert read_task(one).order.round == 1
    assert read_task(one).reply.sent is read_task(one).broadcast.trainable


def _last_number(content: RecordDict) -> None:
    array = content["factors"]["factors"]
    array.data = array.data[:-4] + np.float32(3).tobytes()


def _another_list(content: RecordDict) -> None:
    content["train"]["uploaded"] = ["B"]


# What may differ in the message of one client, and the error or the value that reading it gives.
CHANGES: dict[str, tuple[Callable[[RecordDict], None], str | None]] = {
    "True for 1": (
        lambda content: content["train"].__setitem__("round", True),
        "message from the server, train: round: expected a whole number, found True",
    ),
    "a key more": (
        lambda content: content["train"].__setitem__("more", 1),
        "message from the server, train: more: unknown key",
    ),
    "an array changed in place": (
        _last_number,
        "message from the server, factors: the factors are not those that their digest was made of",
    ),
    "no layout": (
        lambda content: content.pop("layout"),
        "message from the server, factors: expected a record 'layout'",
    ),
    "other factors asked for": (_another_list, None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_message_that_differs_in_anything_is_read_again(name: str) -> None:
    change, text = CHANGES[name]
    one, two = contents(2)
    task = read_task(one)
    change(two)
    if text is None:
        assert read_task(two).order.uploaded == {"B"}
        assert [segment.factor for segment in read_task(two).reply.segments] == ["B"] * 3
    else:
        with pytest.raises(FederationError) as error:
            read_task(two)
        assert str(error.value).startswith(text)
    if name != "an array changed in place":  # the arrays are one and the same
        again = read_task(one)
        assert again.order == task.order
        assert again.broadcast.trainable == task.broadcast.trainable


def test_a_list_that_is_changed_in_place_is_seen() -> None:
    (content,) = contents(1)
    content["train"]["uploaded"] = ["A", "B"]
    assert read_task(content).order.uploaded == BOTH
    content["train"]["uploaded"].remove("A")
    assert read_task(content).order.uploaded == {"B"}


def test_what_one_client_does_to_its_message_is_not_seen_by_another() -> None:
    one, two = contents(2)
    read_task(one)
    one["train"]["seed"] = 99
    one["setup"]["seed"] = 99
    one["layout"]["round"] = 99
    one["factors"]["factors"] = Array(np.zeros(64, np.float32))
    task = read_task(two)
    assert (task.setup.seed, task.order.seed, task.reply.round) == (0, 0, 1)
    assert task.broadcast.trainable == start_adapter(experiment())


def test_another_adapter_is_another_task() -> None:
    setup, order = (contents(1)[0][name] for name in ("setup", "train"))
    tasks = [
        read_task(train_content(setup, order, encode_adapter(adapter(seed), BOTH, 1)))
        for seed in (1, 2)
    ]
    assert tasks[0].broadcast.trainable == adapter(1)
    assert tasks[1].broadcast.trainable == adapter(2)


def test_queries_are_read_once_and_answered_with_what_may_be_told() -> None:
    record = to_record(ClientSetup.of(experiment()))
    one, two = read_query(query_content(record)), read_query(query_content(record))
    assert one is two
    assert one == ClientSetup.of(experiment())
    told = answer_query(one, "c1", 4, 7)
    known = {"codecs": list(CODECS)}
    assert dict(told["client"]) == {"client_id": "c1", "rank": 4, "num_examples": 7} | known
    equal = ClientSetup.of(experiment(federation__weights="equal"))
    assert dict(answer_query(equal, "c1", None, 7)["client"]) == {"client_id": "c1"} | known
    with raises(FederationError, "client 'c1': expected num-examples >= 1, found 0"):
        answer_query(one, "c1", None, 0)


def test_a_query_without_a_setup_is_refused() -> None:
    with raises(FederationError, "message from the server: expected a record 'setup', found none"):
        read_query(RecordDict({"other": ConfigRecord()}))


def test_an_answer_with_a_metric_that_is_not_declared_is_refused() -> None:
    task = read_task(contents(1)[0])
    row = np.zeros(task.reply.rows.size, np.float32)
    with raises(
        FederationError,
        "refused to send 'words' in the metrics: only loss, num-examples, seconds, steps may "
        "leave this client",
    ):
        answer_task(
            task, row, client_id="c1", num_examples=3, loss=1.0, steps=1, metrics={"words": 3.0}
        )


def test_no_count_leaves_where_weights_are_equal() -> None:
    task = read_task(contents(1, federation__weights="equal")[0])
    row = np.zeros(task.reply.rows.size, np.float32)
    content = answer_task(task, row, client_id="c1", num_examples=3, loss=1.0, steps=1)
    assert dict(content["metrics"]) == {"loss": 1.0, "steps": 1}


def test_messages_of_two_ranks_are_read_once_each_and_forgotten_with_their_round() -> None:
    setup, order = (contents(1)[0][name] for name in ("setup", "train"))
    frozen = encode_adapter(adapter(9), BOTH, 1)
    sent = [encode_adapter(adapter(seed), BOTH, 1) for seed in (1, 2)]
    messages = [train_content(setup, order, sent[n % 2], frozen) for n in range(6)]
    tasks = [read_task(message) for message in messages]
    assert len({id(task) for task in tasks}) == 2
    assert tasks[0] is tasks[2] is tasks[4]
    assert tasks[0].broadcast.frozen is tasks[1].broadcast.frozen  # one object for both ranks

    later = order.copy()
    later["round"] = 2
    again = encode_adapter(adapter(9), BOTH, 2)
    read_task(train_content(setup, later, encode_adapter(adapter(3), BOTH, 2), again))
    assert read_task(messages[0]) is not tasks[0]
