"""Messages: what comes in is what was sent, and anything else is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedlora.adapter import Adapter, stack
from fedlora.errors import FederationError, FedloraError, NonFiniteError, ShapeMismatchError
from fedlora.federation.records import (
    BOTH,
    ClientAnswer,
    ClientSetup,
    TrainOrder,
    content_bytes,
    decode_broadcast,
    encode_adapter,
    from_record,
    to_record,
    train_content,
)
from fedlora.federation.replies import ReplyForm, decode_reply, encode_reply
from fedlora.training import LocalRule, TrainConfig
from tests.federation.fakes import experiment, raises, start_adapter
from tests.reference.flat import digest

CONFIG = experiment(
    lora__rank_pattern={r"body\..*/fc": 3, "conv": 1},
    lora__layers_to_transform=[0, 1],
    lora__target_modules=r".*(fc|conv)",
    federation__weights="equal",
)


def adapter(seed: int = 0) -> Adapter:
    start = start_adapter(experiment())
    rng = np.random.default_rng(seed)
    return start.map(
        lambda layer: replace(
            layer, A=rng.normal(size=layer.A.shape), B=rng.normal(size=layer.B.shape)
        )
    )


def test_a_setup_comes_back_equal() -> None:
    setup = ClientSetup.of(CONFIG)
    again = from_record(ClientSetup, to_record(setup), "server")
    assert again == setup
    assert again.lora.rank_of("body.0/fc") == 3
    assert again.share_num_examples is False


def test_an_order_comes_back_equal() -> None:
    train = TrainConfig(local_epochs=2, optimizer="sgd", momentum=0.9, max_grad_norm=1.0)
    order = TrainOrder(7, 3, train, frozenset({"B"}), LocalRule(frozenset({"B"})))
    assert from_record(TrainOrder, to_record(order), "server") == order


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"round": "1"}, "server: round: expected a whole number, found '1'"),
        (
            {"train/learning_rate": "0.1"},
            "server: train.learning_rate: expected a number, found '0.1'",
        ),
        ({"train/lr": 0.1}, "server: train.lr: unknown key"),
        ({"uploaded": ["A", "C"]}, "server: uploaded: expected one of A, B, magnitude, found 'C'"),
        ({"round/x": 1}, "server: 'round/x' is both a value and a table"),
    ],
)
def test_an_order_with_a_wrong_value_is_refused(change: dict[str, Any], text: str) -> None:
    order = TrainOrder(1, 0, TrainConfig(local_steps=1), BOTH)
    record = to_record(order)
    for key, value in change.items():
        record[key] = value
    with pytest.raises(FederationError) as error:
        from_record(TrainOrder, record, "server")
    assert str(error.value).startswith(text)


@pytest.mark.parametrize("client_id", ["", "x" * 201, "two\nlines"])
def test_a_client_id_that_could_break_a_log_is_refused(client_id: str) -> None:
    with pytest.raises(FederationError, match="1 to 200 printable characters"):
        from_record(ClientAnswer, ConfigRecord({"client_id": client_id}), "node 3")


def test_a_broadcast_comes_back_bit_for_bit_with_its_frozen_part() -> None:
    setup = ClientSetup.of(experiment())
    trainable, frozen = adapter(1), stack([adapter(2), adapter(3)])
    content = train_content(
        to_record(setup),
        ConfigRecord(),
        encode_adapter(trainable, BOTH, 4),
        encode_adapter(frozen, BOTH, 4),
    )
    received = decode_broadcast(content, setup)
    assert received.trainable == trainable
    assert received.frozen == frozen
    assert received.trainable.base == trainable.base


def test_a_broadcast_is_read_again_when_its_bytes_or_its_layout_differ() -> None:
    setup = ClientSetup.of(experiment())

    def received(encoded: Any) -> Adapter:
        content = train_content(ConfigRecord(), ConfigRecord(), encoded)
        return decode_broadcast(content, setup).trainable

    one, two = encode_adapter(adapter(1), BOTH, 1), encode_adapter(adapter(2), BOTH, 1)
    assert received(one) is received(one)
    assert received(two) == adapter(2)
    one.layout["scalings"] = [1.0, 2.0, 3.0]
    assert received(one)["conv"].scaling == 3.0
    one.layout["digest"] = "0" * 64
    with raises(
        FederationError,
        "message from the server, factors: the factors are not those that their digest was made of",
    ):
        received(one)


def test_every_message_has_records_of_its_own() -> None:
    encoded, order = encode_adapter(adapter(), BOTH, 1), ConfigRecord({"round": 1})
    one, two = (train_content(ConfigRecord(), order, encoded) for _ in range(2))
    one["train"]["round"] = 99
    one["layout"]["round"] = 99
    del one["factors"]["factors"]
    assert two["train"]["round"] == 1
    assert two["layout"]["round"] == 1
    assert list(two["factors"]) == ["factors"]


def test_only_the_uploaded_factors_come_back_and_the_rest_is_as_sent() -> None:
    sent, trained = adapter(1), adapter(2)
    content = encode_reply(trained, frozenset({"B"}), METRICS, 3)
    assert content_bytes(content) < content_bytes(encode_reply(trained, BOTH, METRICS, 3))
    reply = decode_reply(content, ReplyForm.of(sent, frozenset({"B"}), 3), "client 'a'")
    for path in sent:
        assert np.array_equal(reply.adapter[path].A, sent[path].A)
        assert np.array_equal(reply.adapter[path].B, trained[path].B)
    assert (reply.num_examples, reply.loss, reply.steps) == (9, 1.5, 4)


METRICS = {"num-examples": 9, "loss": 1.5, "steps": 4}


def _set(record: str, key: str, value: Any) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        content[record][key] = value

    return change


def _factors(array: Any) -> Callable[[RecordDict], None]:
    return _set("factors", "factors", array if isinstance(array, Array) else Array(array))


SIZE = adapter().num_parameters
RIGHT = np.zeros(SIZE, np.float32)
LYING = Array("float32", (SIZE,), "numpy.ndarray", Array(np.zeros(3, np.float32)).data)
PICKLED = Array("float32", (SIZE,), "numpy.ndarray", b"\x80\x04" + bytes(4 * SIZE + 126))

# What a client may send instead of a reply, and what the server says of it.
FORGERIES: dict[str, tuple[Callable[[RecordDict], None], type[FedloraError], str]] = {
    "another size": (
        _factors(RIGHT[1:]),
        ShapeMismatchError,
        f"expected a buffer of ({SIZE},) float32, found ({SIZE - 1},) float32",
    ),
    "another dtype": (
        _factors(RIGHT.astype(np.float64)),
        ShapeMismatchError,
        f"expected a buffer of ({SIZE},) float32, found ({SIZE},) float64",
    ),
    "a matrix": (
        _factors(RIGHT.reshape(2, -1)),
        ShapeMismatchError,
        f"expected a buffer of ({SIZE},) float32, found (2, {SIZE // 2}) float32",
    ),
    "a header that lies": (
        _factors(LYING), FederationError, f"the buffer's bytes are not {SIZE} float32 numbers",
    ),
    "no array at all": (
        _factors(PICKLED), FederationError, f"the buffer's bytes are not {SIZE} float32 numbers",
    ),
    "other numbers than digested": (
        _factors(RIGHT + 1),
        FederationError,
        "the factors are not those that their digest was made of",
    ),
    "a second array": (
        _set("factors", "more", Array(RIGHT)),
        FederationError,
        "expected one array 'factors', found something else",
    ),
    "another round": (
        _set("layout", "round", 2), FederationError, "expected a reply to round 3, found 2",
    ),
    "another base": (
        _set("layout", "base", "f" * 64),
        FederationError,
        "expected an adapter for base ba5eba5eba5e, found ffffffffffff",
    ),
    "other scalings": (
        _set("layout", "scalings", [2.0, 2.0, 3.0]),
        FederationError,
        "expected the server's scalings, found others",
    ),
    "a layout that is a text": (
        _set("layout", "segments", "fc|A|2x2"),
        FederationError,
        "layout.segments is not of type str",
    ),
    "another key in the layout": (
        _set("layout", "more", 1),
        FederationError,
        "expected a record 'layout' with segments, kinds, scalings, base, round, digest",
    ),
    "no metrics": (
        lambda content: content.pop("metrics"),
        FederationError,
        "expected the metrics loss and steps",
    ),
    "no examples": (
        _set("metrics", "num-examples", 0),
        FederationError,
        "expected num-examples, a whole number >= 1, found 0",
    ),
    "half an example": (
        _set("metrics", "num-examples", 0.5),
        FederationError,
        "expected num-examples, a whole number >= 1, found 0.5",
    ),
    "an infinity of examples": (
        _set("metrics", "num-examples", float("inf")),
        FederationError,
        "expected num-examples, a whole number >= 1, found inf",
    ),
    "a loss that is not finite": (
        _set("metrics", "loss", float("nan")), FederationError, "expected a finite loss, found nan",
    ),
    "steps backwards": (
        _set("metrics", "steps", -1),
        FederationError,
        "expected steps, a whole number >= 0, found -1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_reply_is_refused_and_the_client_named(name: str) -> None:
    change, error, text = FORGERIES[name]
    sent = adapter(1)
    zeros = sent.map(lambda layer: replace(layer, A=layer.A * 0, B=layer.B * 0))
    content = encode_reply(zeros, BOTH, METRICS, 3)
    change(content)
    with raises(error, f"client 'mallory': {text}"):
        decode_reply(content, ReplyForm.of(sent, BOTH, 3), "client 'mallory'")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_not_finite_is_refused_and_the_client_named(bad: float) -> None:
    sent = adapter(1)
    encoded = encode_adapter(sent, BOTH, 3)
    buffer = np.frombuffer(encoded.factors["factors"].data, np.float32, offset=128).copy()
    buffer[5] = bad
    told = digest(encoded.segments, buffer)
    layout = ConfigRecord(dict(encoded.layout) | {"digest": told})
    content = RecordDict(
        {
            "factors": ArrayRecord({"factors": Array(buffer)}),
            "layout": layout,
            "metrics": MetricRecord(dict(METRICS)),
        }
    )
    with pytest.raises(NonFiniteError) as error:
        decode_reply(content, ReplyForm.of(sent, BOTH, 3), "client 'mallory'")
    assert str(error.value) == (
        f"client 'mallory': A: expected finite numbers, found {bad} at (0, 5) and 0 more"
    )


def test_a_client_without_steps_has_no_loss() -> None:
    sent = adapter(1)
    content = encode_reply(sent, BOTH, {"num-examples": 9, "loss": float("nan"), "steps": 0}, 3)
    reply = decode_reply(content, ReplyForm.of(sent, BOTH, 3), "client 'a'")
    assert np.isnan(reply.loss)
