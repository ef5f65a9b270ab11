"""A reply from a row is the one from an adapter, and what it shares with others is fixed."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ConfigRecord, RecordDict

from fedlora.adapter import Adapter
from fedlora.aggregation import Broadcast, method
from fedlora.errors import FederationError, NonFiniteError, ShapeMismatchError
from fedlora.federation import ClientSetup, handle_train
from fedlora.federation._flower_private import identify_process
from fedlora.federation.records import BOTH, content_bytes, encode_adapter
from fedlora.federation.replies import (
    LARGEST,
    ReplyForm,
    decode_reply,
    encode_reply,
    encode_reply_row,
    reply_bytes,
)
from fedlora.federation.tasks import answer_task, read_task
from fedlora.flat import pack
from tests.federation.fakes import FakeTrainer, experiment, raises, start_adapter
from tests.federation.test_client import train_message
from tests.federation.test_records import adapter
from tests.reference.flat import digest

identify_process()
METRICS = {"loss": 1.5, "steps": 4, "num-examples": 9}


def plain(content: RecordDict) -> dict[str, Any]:
    """Everything that a message says, as plain values; an array as its fields."""

    def value(item: Any) -> Any:
        if isinstance(item, Array):
            return (item.dtype, item.shape, item.stype, item.data)
        return list(item) if isinstance(item, list) else item

    return {
        name: (type(record).__name__, {key: value(v) for key, v in record.items()})
        for name, record in content.items()
    }


@pytest.mark.parametrize("uploaded", [BOTH, frozenset({"B"})])
def test_a_reply_from_a_row_is_the_one_from_an_adapter(uploaded: Any) -> None:
    sent, trained = adapter(1), adapter(2)
    form = ReplyForm.of(sent, uploaded, 3)
    row = pack(trained, form.segments)
    reply = encode_reply_row(form, row, METRICS)
    assert plain(reply) == plain(encode_reply(trained, uploaded, METRICS, 3))
    # Flower's own encoding of the array, and the digest over texts and numbers.
    array = Array(row)
    assert plain(reply)["factors"][1]["factors"] == (
        array.dtype, array.shape, array.stype, array.data,
    )  # fmt: skip
    assert reply["layout"]["digest"] == digest(form.segments, row)
    assert list(reply["layout"]) == ["segments", "kinds", "scalings", "base", "round", "digest"]


@pytest.mark.parametrize("name", ["fedit", "ffa-lora"])
def test_an_engine_answers_as_a_client_does(name: str) -> None:
    message, fake = train_message(name), FakeTrainer(1, 7)
    task = read_task(message.content)
    trained = fake.train(
        Broadcast(task.broadcast.trainable), task.order.train, method(name).rule(1), 1, 0
    )
    row = pack(trained.adapter, task.reply.segments)
    mine = answer_task(
        task,
        row,
        client_id=fake.client_id,
        num_examples=trained.num_examples,
        loss=trained.loss,
        steps=trained.steps,
    )
    theirs = handle_train(message, lambda setup: fake).content
    del theirs["metrics"]["seconds"]  # which virtual clients do not tell
    assert plain(mine) == plain(theirs)


def test_a_row_may_be_a_view_and_is_copied() -> None:
    form = ReplyForm.of(adapter(1), BOTH, 3)
    rows = np.random.default_rng(0).normal(size=(3, form.rows.size)).astype(np.float32)
    before = rows[1].copy()
    reply = encode_reply_row(form, rows[1], METRICS)
    rows[1] = 0
    found = decode_reply(reply, form, "client 'a'").adapter
    assert np.array_equal(pack(found, form.segments), before)
    column = np.random.default_rng(0).normal(size=(form.rows.size, 2)).astype(np.float32)[:, 1]
    found = decode_reply(encode_reply_row(form, column, METRICS), form, "client 'a'").adapter
    assert np.array_equal(pack(found, form.segments), column)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (np.zeros(63, np.float32), "expected a row of (64,) float32, found (63,) float32"),
        (np.zeros(64), "expected a row of (64,) float32, found (64,) float64"),
        (np.zeros((1, 64), np.float32), "expected a row of (64,) float32, found (1, 64) float32"),
    ],
)
def test_another_row_is_refused(row: np.ndarray, text: str) -> None:
    with raises(ShapeMismatchError, text):
        encode_reply_row(ReplyForm.of(adapter(1), BOTH, 3), row, METRICS)


def test_an_adapter_read_from_a_reply_is_that_of_its_row() -> None:
    sent, trained = adapter(1), adapter(2)
    form = ReplyForm.of(sent, BOTH, 3)
    reply = decode_reply(encode_reply(trained, BOTH, METRICS, 3), form, "client 'a'")
    assert reply.adapter == trained
    assert reply.adapter.config == sent.config
    assert (reply.num_examples, reply.loss, reply.steps) == (9, 1.5, 4)


def test_bytes_are_counted_as_flower_counts_them() -> None:
    form = ReplyForm.of(adapter(1), BOTH, 3)
    reply = encode_reply(adapter(2), BOTH, METRICS, 3)
    assert reply_bytes(reply, form) == content_bytes(reply)
    reply["layout"]["kinds"] = ["linear"] * 7  # another layout is counted by Flower
    reply["more"] = ConfigRecord({"text": "hello"})
    assert reply_bytes(reply, form) == content_bytes(reply)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("round", True, "layout.round is not of type int"),
        ("scalings", [2, 2, 2], "layout.scalings is not of type float"),
        ("base", b"ba5e" * 16, "layout.base is not of type str"),
        ("digest", b"0", "layout.digest is not of type str"),
        (
            "segments",
            ["fc|A|2x2"],
            "layer 'body.0.fc': lora_A is missing, the other side has (2, 6)",
        ),
    ],
)
def test_a_layout_that_is_equal_but_of_another_type_is_refused(
    key: str, value: Any, text: str
) -> None:
    form = ReplyForm.of(adapter(1), BOTH, 1)
    reply = encode_reply(adapter(2), BOTH, METRICS, 1)
    reply["layout"][key] = value
    with pytest.raises(Exception, match="client 'm'") as error:
        decode_reply(reply, form, "client 'm'")
    assert str(error.value).endswith(text)


def test_what_replies_share_cannot_be_changed_by_one_for_another() -> None:
    form = ReplyForm.of(adapter(1), BOTH, 3)
    row = pack(adapter(2), form.segments)
    one, two = (encode_reply_row(form, row, METRICS) for _ in range(2))
    before = plain(two)
    one["layout"]["round"] = 99
    one["metrics"]["loss"] = 9.0
    del one["factors"]["factors"]
    for key in ("segments", "kinds", "scalings"):
        shared = one["layout"][key]
        for change in (
            lambda found=shared: found.append("x"),
            lambda found=shared: found.__setitem__(0, "x"),
            lambda found=shared: found.clear(),
            lambda found=shared: found.sort(),
        ):
            with pytest.raises(TypeError, match="shared by all messages of a round"):
                change()
    assert plain(two) == before
    assert decode_reply(two, form, "client 'b'").adapter == adapter(2)


def test_lists_of_messages_are_copied_and_pickled_as_plain_lists() -> None:
    shared: Any = encode_adapter(adapter(1), BOTH, 1).layout["scalings"]
    for plainly in (copy.copy(shared), copy.deepcopy(shared), pickle.loads(pickle.dumps(shared))):
        assert type(plainly) is list
        assert plainly == list(shared)


def test_a_setups_lists_cannot_be_changed_either() -> None:
    from fedlora.federation.records import to_record

    record = to_record(ClientSetup.of(experiment()))
    with pytest.raises(TypeError, match="shared"):
        record["lora/target_modules"].append("head")  # type: ignore[union-attr]
    assert record["lora/target_modules"] == ["fc", "conv"]


def test_a_form_is_of_what_was_sent() -> None:
    sent: Adapter = start_adapter(experiment())
    form = ReplyForm.of(sent, frozenset({"B"}), 2)
    assert form.sent is sent
    assert [str(segment) for segment in form.segments] == [
        "body.0.fc|B|5x2", "body.1.fc|B|4x2", "conv|B|6x2",
    ]  # fmt: skip
    assert form.rows.size == 5 * 2 + 4 * 2 + 6 * 2


@pytest.mark.parametrize("value", [LARGEST, -LARGEST])
def test_numbers_up_to_the_largest_are_taken(value: float) -> None:
    form = ReplyForm.of(adapter(1), BOTH, 3)
    row = np.full(form.rows.size, value, np.float32)  # the sum of squares is far over its square
    found = decode_reply(encode_reply_row(form, row, METRICS), form, "client 'a'").adapter
    assert np.array_equal(pack(found, form.segments), row)


@pytest.mark.parametrize("value", [1.01 * LARGEST, -1e30, 3e38])
def test_an_absurd_number_is_refused_with_its_factor(value: float) -> None:
    form = ReplyForm.of(adapter(1), BOTH, 3)
    row = np.zeros(form.rows.size, np.float32)
    row[-1] = value
    last = form.segments[-1]
    with raises(
        NonFiniteError,
        f"client 'a': layer {last.path!r}, {last.factor}: expected numbers up to 1e+06, found "
        f"{abs(np.float32(value)):g}",
    ):
        decode_reply(encode_reply_row(form, row, METRICS), form, "client 'a'")


def test_a_loss_whose_sum_could_overflow_is_refused() -> None:
    form = ReplyForm.of(adapter(1), BOTH, 3)
    row = np.zeros(form.rows.size, np.float32)
    for loss in (1e31, -1e300):
        with raises(FederationError, f"client 'a': expected a loss up to 1e+30, found {loss!r}"):
            decode_reply(encode_reply_row(form, row, METRICS | {"loss": loss}), form, "client 'a'")
