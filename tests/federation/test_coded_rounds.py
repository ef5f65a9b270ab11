"""Rounds whose factors travel in a codec: who agrees to what, what is added up, what it costs."""

from __future__ import annotations

import logging
import tracemalloc
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedlora.adapter import Adapter
from fedlora.errors import FederationError, FedloraError, NonFiniteError
from fedlora.federation import ClientSetup, handle_train, run_federation
from fedlora.federation._flower_private import identify_process
from fedlora.federation.buffers import BufferForm
from fedlora.federation.checkpoint import read_checkpoint, read_rounds
from fedlora.federation.codecs import CODECS, FP32, rounding
from fedlora.federation.records import (
    BOTH,
    TrainOrder,
    content_bytes,
    decode_answer,
    decode_broadcast,
    encode_adapter,
    to_record,
    train_content,
)
from fedlora.federation.replies import (
    ReplyForm,
    decode_reply,
    encode_reply_row,
    reply_bytes,
)
from fedlora.federation.results import codec_bytes
from fedlora.federation.tasks import answer_task, read_task
from fedlora.flat import pack, segments_of
from fedlora.simulation.grid import InProcessGrid
from fedlora.targets import LayerSpec, initial_adapter
from fedlora.training import LocalRule, TrainConfig, TrainResult
from tests.federation.fakes import (
    FakeTrainer,
    experiment,
    fake_app,
    raises,
    run,
    start_adapter,
)
from tests.federation.test_records import adapter

identify_process()
CODED = [codec for codec in CODECS if codec != FP32]
METRICS = {"loss": 1.5, "steps": 4, "num-examples": 9}
WHO = "client 'mallory'"


def coded(codec: str = "int8", down: str = FP32, **more: Any) -> Any:
    codecs = {"federation__upload_codec": codec, "federation__download_codec": down}
    return experiment(**codecs, **more)


class Watching(InProcessGrid):
    """Keeps what passes; the clients in `old` do not know any codec and say nothing of them."""

    def __init__(self, app: Any, clients: int = 8, old: frozenset[str] = frozenset()) -> None:
        super().__init__(app, clients)
        self.old = old
        self.down: dict[str, RecordDict] = {}
        self.up: dict[str, RecordDict] = {}

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        def seen() -> Iterator[Message]:
            for message in messages:
                if message.metadata.message_type == "train":
                    self.down[f"c{message.metadata.dst_node_id - 1000}"] = message.content
                yield message

        for reply in super().send_and_receive(seen(), timeout=timeout):
            name = f"c{reply.metadata.src_node_id - 1000}"
            if "client" in reply.content and name in self.old:
                del reply.content["client"]["codecs"]
            elif "layout" in reply.content:
                self.up[name] = reply.content
            yield reply


def form_and_reply(
    codec: str, down: str = "int8", seed: int = 2
) -> tuple[ReplyForm, ReplyForm, RecordDict, Adapter]:
    """The server's form, the client's, and a reply of another adapter, which is near the first."""
    own = adapter(1)
    sent = encode_adapter(own, BOTH, 3, down, rounding(down, 0, "server", 3)).sent  # type: ignore[arg-type]
    step = adapter(seed).map(lambda layer: replace(layer, A=layer.A / 100, B=layer.B / 100))
    layers = {
        path: replace(layer, A=layer.A + step[path].A, B=layer.B + step[path].B)
        for path, layer in sent.layers.items()
    }
    trained = replace(sent, layers=layers)
    server = ReplyForm.of(sent, BOTH, 3, codec=codec, own=own)  # type: ignore[arg-type]
    client = ReplyForm.of(sent, BOTH, 3, codec=codec)  # type: ignore[arg-type]
    draws = rounding(codec, 0, "mallory", 3)
    reply = encode_reply_row(client, pack(trained, client.segments), METRICS, None, draws)
    return server, client, reply, trained


@pytest.mark.parametrize("down", CODECS)
@pytest.mark.parametrize("codec", CODECS)
def test_a_reply_is_the_servers_own_adapter_and_the_change(codec: str, down: str) -> None:
    server, client, reply, trained = form_and_reply(codec, down)
    own, sent = (pack(a, server.segments) for a in (server.rows.like, server.sent))
    change = pack(trained, server.segments) - sent
    found = pack(decode_reply(reply, server, WHO).adapter, server.segments)
    steps = {"fp32": 0.0, "fp16": 2.0**-11, "int8": 1 / 127, "int4": 1 / 7}[codec]
    # A codec's error is at most a step of the largest change, and float32 rounds both sums.
    largest = np.abs(change).max()
    np.testing.assert_allclose(found - own, change, rtol=0, atol=steps * largest + 1e-6)
    if codec != FP32:
        assert not np.array_equal(found - own, change)
    assert (reply["factors"]["factors"].dtype, "codec" in reply["layout"]) == (
        ("float32", False) if codec == FP32 else ("uint8", True)
    )
    assert reply_bytes(reply, server) == content_bytes(reply)
    # Who takes no step gives the server its own adapter back, to the last bit.
    idle = encode_reply_row(client, sent, METRICS, None, rounding(codec, 0, "idle", 3))
    assert decode_reply(idle, server, WHO).adapter == server.rows.like


@pytest.mark.parametrize("codec", CODED)
def test_what_came_down_is_read_by_both_sides_alike(codec: str) -> None:
    own, setup = adapter(1), ClientSetup.of(experiment())
    draws = rounding(codec, 0, "server", 4)
    encoded = encode_adapter(own, BOTH, 4, codec, draws)  # type: ignore[arg-type]
    content = train_content(to_record(setup), ConfigRecord(), encoded, encoded)
    found = decode_broadcast(content, setup)
    assert found.trainable == found.frozen == encoded.sent
    assert found.trainable != own
    for path, layer in own.layers.items():
        bound = {"fp16": 2.0**-11, "int8": 1 / 127, "int4": 1 / 7}[codec]
        assert np.abs(found.trainable[path].A - layer.A).max() <= bound * np.abs(layer.A).max()
        assert np.abs(found.trainable[path].B - layer.B).max() <= bound * np.abs(layer.B).max()


@pytest.mark.parametrize("name", ["fedit", "ffa-lora"])
def test_rounding_downwards_is_not_added_up(tmp_path: Path, name: str) -> None:
    """Clients that send back what they got leave the server's adapter as it is, bit for bit."""

    class Idle(FakeTrainer):
        def train(self, broadcast: Any, config: Any, *rest: Any) -> TrainResult:
            return TrainResult(broadcast.trainable, self.num_examples, float("nan"), 0)

    trainers = {number: Idle(number, 10) for number in range(8)}
    changes = {"federation__method": name, "federation__rounds": 5}
    start = start_adapter(experiment(**changes))
    for up in (FP32, "int8"):
        state, _ = run(coded(up, "int4", **changes), tmp_path / up, trainers)
        assert state.trainable == start


def test_a_client_that_knows_fp32_only_takes_part_in_the_same_cohort(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = coded("int8", "int4", federation__cohort=8)
    old = frozenset({"c1", "c4"})
    grid = Watching(fake_app(), old=old)
    with caplog.at_level(logging.WARNING):
        state, records = run(config, tmp_path / "mixed", grid=grid)
    assert all(record.dropped == () for record in records)
    for name in (f"c{number}" for number in range(8)):
        down, up = grid.down[name], grid.up[name]
        expected = (None, None, None) if name in old else ("int4", "int8", "int8")
        found = down["layout"].get("codec"), down["train"].get("upload_codec")
        assert (*found, up["layout"].get("codec")) == expected
    said = [record.getMessage() for record in caplog.records if "travels" in record.getMessage()]
    # Once in three rounds.
    assert sorted(said) == [
        f"client {name!r} travels up in fp32 and down in fp32: it does not know what this run "
        "uses, int8 and int4"
        for name in sorted(old)
    ]
    plain, _ = run(experiment(federation__cohort=8), tmp_path / "plain")
    for path, layer in plain.trainable.layers.items():
        # Fakes move a factor by about 1 a round, and by up to 4: three rounds of int8's steps, and
        # nine tenths of where int4 sent them from, which the difference takes out again.
        assert np.abs(state.trainable[path].A - layer.A).max() <= 3 * 4 / 127


def test_bytes_are_those_of_the_codec_and_the_fp32_ones_are_told(tmp_path: Path) -> None:
    # Layers as wide as those of a small language model, where layouts weigh little.
    specs = {f"block.{i}.fc": LayerSpec("linear", (256,), 256) for i in range(2)}
    wide = {
        "lora__rank": 8,
        "lora__target_modules": ["fc"],
        "federation__cohort": 2,
        "federation__rounds": 2,
    }

    def bytes_of(config: Any) -> tuple[Any, dict[str, Any]]:
        start = initial_adapter(specs, config.lora, config.seed, "ba5e" * 16)
        out = tmp_path / f"{config.federation.upload_codec}-{config.federation.download_codec}"
        run_federation(InProcessGrid(fake_app(), 2), config, out, initial=start)
        rounds = read_rounds(out)
        checkpoint = read_checkpoint(out)
        assert checkpoint.bytes_up == sum(record.bytes_up for record in rounds)
        return checkpoint, codec_bytes(config.federation, rounds)

    plain, nothing = bytes_of(experiment(**wide))
    assert nothing == {}
    assert all(record.fp32_bytes == {} for record in read_rounds(tmp_path / "fp32-fp32"))
    for codec, most in (("fp16", 0.52), ("int8", 0.28), ("int4", 0.16)):
        end, told = bytes_of(coded(codec, codec, **wide))
        assert end.bytes_up <= most * plain.bytes_up
        assert end.bytes_down <= (most + 0.03) * plain.bytes_down  # with the settings of the run
        assert told["codecs"]["up"] == {
            "codec": codec,
            "bytes": end.bytes_up,
            "fp32_bytes": plain.bytes_up,
            "share": round(end.bytes_up / plain.bytes_up, 4),
        }
        assert told["codecs"]["down"]["fp32_bytes"] == plain.bytes_down
        assert told["codecs"]["down"]["bytes"] == end.bytes_down


@pytest.mark.parametrize("name", ["fedit", "flora", "rolora"])
def test_a_run_that_is_resumed_ends_in_the_same_bits(tmp_path: Path, name: str) -> None:
    config = coded("int8", "int8", federation__method=name, federation__rounds=4)
    whole, _ = run(config, tmp_path / "whole")
    half = coded("int8", "int8", federation__method=name, federation__rounds=2)
    run(half, tmp_path / "half")
    resumed, _ = run(config, tmp_path / "half")
    assert resumed.adapter == whole.adapter
    assert [r.bytes_up for r in read_rounds(tmp_path / "half")] == [
        r.bytes_up for r in read_rounds(tmp_path / "whole")
    ]


def test_a_frozen_part_travels_in_the_codec(tmp_path: Path) -> None:
    grid = Watching(fake_app())
    config = coded("int8", "int8", federation__method="flora", federation__cohort=8)
    _, records = run(config, tmp_path, grid=grid)
    assert all(record.dropped == () for record in records)
    assert grid.down["c0"]["frozen-layout"]["codec"] == "int8"
    assert grid.down["c0"]["frozen"]["factors"].dtype == "uint8"


@pytest.mark.parametrize("codec", CODED)
def test_a_real_client_and_an_engine_answer_alike(codec: str) -> None:
    config, fake = coded(codec), FakeTrainer(1, 7)
    order = TrainOrder(1, 0, config.federation.train, BOTH, LocalRule(), codec)  # type: ignore[arg-type]
    encoded = encode_adapter(start_adapter(config), BOTH, 1)
    content = train_content(to_record(ClientSetup.of(config)), to_record(order), encoded)
    theirs = handle_train(Message(content, 1001, "train"), lambda setup: fake).content
    task = read_task(content)
    trained = fake.train(task.broadcast, order.train, order.rule, 1, 0)
    mine = answer_task(
        task, pack(trained.adapter, task.reply.segments), client_id="c1", num_examples=7,
        loss=trained.loss, steps=trained.steps,
    )  # fmt: skip
    assert mine["factors"]["factors"].data == theirs["factors"]["factors"].data
    assert mine["layout"] == theirs["layout"]


def test_a_client_that_diverged_says_so_itself(tmp_path: Path) -> None:
    def broken(result: TrainResult, round: int) -> TrainResult:
        layers = {
            path: object.__new__(type(layer)) for path, layer in result.adapter.layers.items()
        }
        for path, layer in result.adapter.layers.items():
            A = layer.A.copy()
            A[0] = np.inf
            for name in ("B", "scaling", "magnitude", "kind"):
                object.__setattr__(layers[path], name, getattr(layer, name))
            object.__setattr__(layers[path], "A", A)
        bad = replace(result.adapter)
        object.__setattr__(bad, "layers", layers)
        return replace(result, adapter=bad)

    trainers = {3: FakeTrainer(3, 13, change=broken)}
    config = coded("int8", federation__cohort=8, federation__rounds=1)
    _, records = run(config, tmp_path, trainers)
    assert [(d.client, d.reason) for d in records[0].dropped] == [
        ("c3", "NonFiniteError: layer 'body.0.fc', A: expected finite numbers, found inf")
    ]


def test_a_number_that_half_precision_cannot_hold_goes_down_in_fp32(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = coded(FP32, "fp16", federation__rounds=1)
    start = start_adapter(config)
    big = start.map(lambda layer: replace(layer, A=layer.A * 0 + 7e4))
    grid = Watching(fake_app())
    with caplog.at_level(logging.WARNING):
        run_federation(grid, config, tmp_path, initial=big)
    assert all("codec" not in content["layout"] for content in grid.down.values())
    assert "round 1: sent as fp32: the factors: codec fp16 holds numbers up to 65504" in caplog.text
    assert read_rounds(tmp_path)[0].dropped == ()


def _digest(reply: RecordDict, form: ReplyForm) -> None:
    """Make the digest that of the bytes: a stranger can do that as well."""
    layout = reply["layout"]
    layout["digest"] = form.wire.digest(reply["factors"]["factors"].data)


def _array(reply: RecordDict, data: bytes, **changes: Any) -> None:
    before = reply["factors"]["factors"]
    fields = {"dtype": before.dtype, "shape": before.shape, "stype": before.stype} | changes
    reply["factors"] = ArrayRecord({"factors": Array(data=data, **fields)})


@pytest.mark.parametrize("codec", CODED)
def test_replies_with_random_changes_are_read_or_refused_by_name(codec: str) -> None:
    generator, refused, count = np.random.default_rng(7), 0, 150
    server, _, right, _ = form_and_reply(codec, "fp32")
    for number in range(count):
        reply = RecordDict({name: record.copy() for name, record in right.items()})
        data = bytearray(reply["factors"]["factors"].data)
        kind = number % 5
        if kind == 0:  # bits
            for place in generator.integers(len(data), size=4):
                data[place] ^= 1 << generator.integers(8)
        elif kind == 1:  # bytes of the scales, where there are any
            place = len(server.wire.header) + 4 * generator.integers(4)
            data[place : place + 4] = generator.bytes(4)
        elif kind == 2:
            del data[generator.integers(len(data)) :]
        elif kind == 3:
            data += generator.bytes(int(generator.integers(1, 9)))
        else:
            data[len(server.wire.header) :] = generator.bytes(len(data) - len(server.wire.header))
        _array(reply, bytes(data))
        if number % 2:
            _digest(reply, server)
        try:
            found = decode_reply(reply, server, WHO).adapter
        except FedloraError as error:
            assert str(error).startswith(WHO)  # noqa: PT017 - not every change is refused
            refused += 1
        else:
            assert np.isfinite(pack(found, server.segments)).all()
    assert refused > count / 2


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            lambda reply: reply["layout"].pop("codec"),
            FederationError, "expected codec int8, found fp32",
        ),
        (
            lambda reply: reply["layout"].update({"codec": "int4"}),
            FederationError, "expected codec int8, found int4",
        ),
        (
            lambda reply: reply["layout"].update({"codec": "fp32"}),
            FederationError, "codec 'fp32' is not one of fp16, int8 or int4",
        ),
        (
            lambda reply: reply["layout"].update({"codec": 8}),
            FederationError, "codec '8' is not one of fp16, int8 or int4",
        ),
    ],
)  # fmt: skip
def test_a_reply_in_another_codec_is_refused(change: Any, error: Any, text: str) -> None:
    server, _, reply, _ = form_and_reply("int8")
    change(reply)
    with raises(error, f"{WHO}: {text}"):
        decode_reply(reply, server, WHO)


def test_a_change_that_is_too_large_is_refused() -> None:
    server, client, _, _ = form_and_reply("int8")
    row = np.full(client.rows.size, 2e6, np.float32)
    reply = encode_reply_row(client, row, METRICS, None, rounding("int8", 0, "mallory", 3))
    with pytest.raises(NonFiniteError, match=rf"^{WHO}: layer 'body.0.fc', A: .* up to 1e\+06"):
        decode_reply(reply, server, WHO)


def test_a_download_that_claims_to_be_huge_allocates_nothing() -> None:
    setup = ClientSetup.of(experiment())
    encoded = encode_adapter(adapter(1), BOTH, 4, "int4", rounding("int4", 0, "server", 4))
    content = train_content(to_record(setup), ConfigRecord(), encoded)
    content["layout"]["segments"] = [f"l{i}|{f}|30000x30000" for i in range(9) for f in "AB"]
    tracemalloc.start()
    try:
        with pytest.raises(FedloraError, match="expected a buffer of"):
            decode_broadcast(content, setup)
        assert tracemalloc.get_traced_memory()[1] < 1 << 18
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("told", "codecs"),
    [
        ({}, ("fp32",)),
        ({"codecs": ["fp32", "int8"]}, ("fp32", "int8")),
        ({"codecs": ["zstd"]}, ("zstd",)),  # of a client that is newer
        ({"codecs": ["x" * 21]}, None),
        ({"codecs": [f"c{i}" for i in range(33)]}, None),
        ({"codecs": "int8"}, None),
        ({"codecs": [8]}, None),
    ],
)
def test_an_answer_names_the_codecs_that_a_client_knows(told: Any, codecs: Any) -> None:
    content = RecordDict({"client": ConfigRecord({"client_id": "c3"} | told)})
    if codecs is not None:
        assert decode_answer(content, "node 3").codecs == codecs
        return
    with pytest.raises(FederationError, match=r"^node 3: .*codecs"):
        decode_answer(content, "node 3")


def test_an_order_in_an_unknown_codec_is_refused_by_the_client() -> None:
    order = TrainOrder(1, 0, TrainConfig(local_steps=1), BOTH)
    record = to_record(order)
    assert "upload_codec" not in record  # fp32 costs nothing
    record["upload_codec"] = "int2"
    encoded = encode_adapter(adapter(1), BOTH, 1)
    content = train_content(to_record(ClientSetup.of(experiment())), record, encoded)
    with pytest.raises(FederationError, match=r"upload_codec: expected one of .* found 'int2'"):
        read_task(content)


def test_the_digest_covers_the_codec() -> None:
    segments = segments_of(adapter(1), BOTH)
    # As many bytes of either: what they mean must not be open.
    data = bytes(200)
    digests = {BufferForm.of(segments, codec).digest(data) for codec in CODECS}  # type: ignore[arg-type]
    assert len(digests) == len(CODECS)
