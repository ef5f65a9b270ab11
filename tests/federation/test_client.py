"""A client answers with what is declared, and with nothing else, whatever its trainer does."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ConfigRecord, Message, MetricRecord, RecordDict

from fedlora.aggregation import method
from fedlora.errors import DataError, FederationError, NonFiniteError
from fedlora.federation import ClientSetup, handle_query, handle_train
from fedlora.federation._flower_private import identify_process
from fedlora.federation.buffers import BufferForm
from fedlora.federation.client import one_line
from fedlora.federation.codecs import CODECS
from fedlora.federation.guard import check_answer, check_reply
from fedlora.federation.limits import tells_nothing
from fedlora.federation.records import (
    BOTH,
    TrainOrder,
    encode_adapter,
    query_content,
    to_record,
    train_content,
)
from fedlora.federation.replies import encode_reply
from fedlora.flat import segments_of
from fedlora.training import TrainResult
from tests.federation.fakes import FakeTrainer, experiment, raises, start_adapter

identify_process()


def train_message(method_name: str = "fedit", **overrides: Any) -> Message:
    config = experiment(federation__method=method_name, **overrides)
    rule = method(method_name).rule(1)
    uploaded = method(method_name).uploaded(1)
    order = TrainOrder(1, config.seed, config.federation.train, uploaded, rule)
    content = train_content(
        to_record(ClientSetup.of(config)),
        to_record(order),
        encode_adapter(start_adapter(config), BOTH, 1),
    )
    return Message(content, 1001, "train")


def query_message(**overrides: Any) -> Message:
    setup = to_record(ClientSetup.of(experiment(**overrides)))
    return Message(query_content(setup), 1001, "query")


def trainer(change: Callable[[TrainResult], TrainResult] = lambda result: result) -> FakeTrainer:
    return FakeTrainer(1, 7, change=lambda result, round: change(result))


def test_a_query_is_answered_with_id_rank_and_examples() -> None:
    reply = handle_query(query_message(), lambda setup: FakeTrainer(1, 7, rank=4))
    assert dict(reply.content["client"]) == {
        "client_id": "c1", "rank": 4, "num_examples": 7, "codecs": list(CODECS),
    }  # fmt: skip


def test_with_equal_weights_no_count_leaves_the_client() -> None:
    equal = {"federation__weights": "equal"}
    reply = handle_query(query_message(**equal), lambda setup: trainer())
    assert dict(reply.content["client"]) == {"client_id": "c1", "codecs": list(CODECS)}
    reply = handle_train(train_message(**equal), lambda setup: trainer())
    assert set(reply.content["metrics"]) == {"loss", "seconds", "steps"}


def test_a_quiet_device_tells_no_count_whatever_the_run_weights_by() -> None:
    refused = handle_query(query_message(), lambda setup: trainer(), quiet=True)
    assert "lets no count of examples leave it" in refused.error.reason
    equal = {"federation__weights": "equal"}
    reply = handle_query(query_message(**equal), lambda setup: trainer(), quiet=True)
    assert "num_examples" not in reply.content["client"]


def test_an_owner_of_trusted_keys_or_noise_has_a_quiet_device() -> None:
    assert not tells_nothing({})
    assert not tells_nothing({"identity": "key", "min-examples": 3})
    assert tells_nothing({"identity": "key", "trusted-keys": "keys"})
    assert tells_nothing({"min-noise-multiplier": 1})
    assert tells_nothing({"max-clipping-norm": 0.5})


def test_a_reply_holds_the_shared_factors_and_the_declared_metrics_only() -> None:
    reply = handle_train(train_message("ffa-lora"), lambda setup: trainer())
    assert set(reply.content) == {"factors", "layout", "metrics"}
    assert {text.split("|")[1] for text in reply.content["layout"]["segments"]} == {"B"}
    metrics = dict(reply.content["metrics"])
    assert 0 <= metrics.pop("seconds") < 60  # how long this took, to the hundredth
    assert metrics == {"loss": 2.0, "num-examples": 7, "steps": 5}


def _move_a(result: TrainResult) -> TrainResult:
    moved = result.adapter.map(lambda layer: replace(layer, A=layer.A + np.float32(1)))
    return replace(result, adapter=moved)


def _without_a_layer(result: TrainResult) -> TrainResult:
    layers = {path: result.adapter[path] for path in list(result.adapter)[:2]}
    return replace(result, adapter=replace(result.adapter, layers=layers))


def _of_another_base(result: TrainResult) -> TrainResult:
    return replace(result, adapter=replace(result.adapter, base="f" * 64))


def _raise(error: Exception) -> Callable[[TrainResult], TrainResult]:
    def change(result: TrainResult) -> TrainResult:
        raise error

    return change


# What a trainer may do wrong under ffa-lora (A is frozen), and the reason that the server gets.
MISTAKES: dict[str, tuple[Callable[[TrainResult], TrainResult], str]] = {
    "a metric of its own": (
        lambda result: replace(result, metrics={"words": 3.0}),
        "FederationError: refused to send 'words' in the metrics: only loss, num-examples, "
        "seconds, steps may leave this client",
    ),
    "a frozen factor that moved": (
        _move_a,
        "FederationError: the trainer's result, layer 'body.0.fc': lora_A is frozen in this round, "
        "and it changed",
    ),
    "a layer lost": (
        _without_a_layer,
        "LayerMismatchError: the trainer's result: 1 missing layer(s): 'conv'",
    ),
    "another scaling": (
        lambda result: replace(result, adapter=result.adapter.scaled(2.0)),
        "FederationError: the trainer's result, layer 'body.0.fc': expected scaling 2 as it was "
        "sent, found 4",
    ),
    "another base": (
        _of_another_base,
        "FederationError: the trainer's result: it is for another base than what was sent",
    ),
    "an error of ours without data": (
        _raise(NonFiniteError("step 3: expected a finite loss")),
        "NonFiniteError: step 3: expected a finite loss",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_trainers_mistake_is_refused_before_anything_leaves(name: str) -> None:
    change, reason = MISTAKES[name]
    reply = handle_train(train_message("ffa-lora"), lambda setup: trainer(change))
    assert not reply.has_content()
    assert (reply.error.code, reply.error.reason) == (2, reason)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("token 'my secret'"),
        DataError("line 3: 'my secret' is no number"),
        KeyError("my"),
    ],
)
def test_an_error_that_may_quote_an_example_sends_its_name_and_place_only(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        reply = handle_train(train_message(), lambda setup: trainer(_raise(error)))
    reason = reply.error.reason or ""
    assert reason.startswith(f"{type(error).__name__} at test_client.py:")
    assert reason.endswith("; see the client's log")
    assert "my" not in reason
    assert "my" in caplog.text  # the device's own log has it


def test_a_reason_is_one_short_line() -> None:
    assert one_line("two\nlines\x1b[31m and\ttabs") == "two lines [31m and tabs"
    assert len(one_line("x" * 1000)) == 300


def test_a_message_without_an_order_is_refused() -> None:
    message = Message(query_content(to_record(ClientSetup.of(experiment()))), 1001, "train")
    reply = handle_train(message, lambda setup: trainer())
    assert reply.error.reason == (
        "FederationError: message from the server: expected a record 'train', found none"
    )


ADAPTER = start_adapter(experiment())
METRICS = {"loss": 1.0, "steps": 2, "num-examples": 3}


def _reply() -> RecordDict:
    return encode_reply(ADAPTER, BOTH, METRICS, 1)


def _with(name: str, record: Any) -> Callable[[RecordDict], None]:
    return lambda content: content.__setitem__(name, record)


# The guard looks at finished records, so it also stops what no trainer does today.
LEAKS: dict[str, tuple[Callable[[RecordDict], None], frozenset[str], str]] = {
    "another record": (
        _with("examples", ConfigRecord({"text": "hello"})),
        BOTH,
        "refused to send 'examples' in the reply: only factors, layout, metrics may leave this "
        "client",
    ),
    "another array": (
        lambda content: content["factors"].__setitem__("inputs", Array(np.zeros(3))),
        BOTH,
        "refused to send 'inputs' in record factors: only factors may leave this client",
    ),
    "a text beside the layout": (
        lambda content: content["layout"].__setitem__("note", "hello"),
        BOTH,
        "refused to send 'note' in record layout: only base, digest, kinds, round, scalings, "
        "segments may leave this client",
    ),
    "a list of numbers as a metric": (
        _with("metrics", MetricRecord({**METRICS, "loss": [1.0, 2.0]})),
        BOTH,
        "refused to send metric 'loss': it is not one number",
    ),
    "numbers behind the factors": (
        lambda content: content["factors"].__setitem__("factors", Array(np.zeros(999, np.float32))),
        BOTH,
        "refused to send factors: their number is not that of the layout",
    ),
    "bytes behind the numbers": (
        lambda content: setattr(
            content["factors"]["factors"], "data", content["factors"]["factors"].data + b"hello"
        ),
        BOTH,
        "refused to send factors: their number is not that of the layout",
    ),
    "a factor that is not shared": (
        lambda content: None,
        frozenset({"B"}),
        "refused to send 'body.0.fc|A|2x6' in the layout: only body.0.fc|B|5x2, body.1.fc|B|4x2, "
        "conv|B|6x2 may leave this client",
    ),
}


@pytest.mark.parametrize("name", LEAKS)
def test_the_guard_stops_whatever_is_not_declared(name: str) -> None:
    change, shared, text = LEAKS[name]
    content = _reply()
    change(content)
    with raises(FederationError, text):
        form = BufferForm.of(segments_of(ADAPTER, shared))  # type: ignore[arg-type]
        check_reply(content, form, share_num_examples=True)


def test_the_guard_stops_a_count_when_weights_are_equal() -> None:
    form = BufferForm.of(segments_of(ADAPTER, BOTH))
    check_reply(_reply(), form, share_num_examples=True)
    with raises(
        FederationError,
        "refused to send 'num-examples' in the metrics: only loss, seconds, steps may leave this "
        "client",
    ):
        check_reply(_reply(), form, share_num_examples=False)
    answer = RecordDict({"client": ConfigRecord({"client_id": "a", "num_examples": 3})})
    check_answer(answer, share_num_examples=True)
    with raises(
        FederationError,
        "refused to send 'num_examples' in record client: only client_id, codecs, rank may leave "
        "this client",
    ):
        check_answer(answer, share_num_examples=False)
