"""What the server and its clients say to each other, as Flower records.

    query   down  "setup"                                    ClientSetup, flat scalars
            up    "client"                                   ClientAnswer
    train   down  "setup", "train"                           TrainOrder, flat scalars
                  "factors" + "layout"                       the trainable adapter
                  "frozen" + "frozen-layout"                 the part that stays (if there is one)
                  "control" + "control-digest"               c (only with control variates)
            up    "factors" + "layout", "metrics"            the uploaded factors only; no metrics
                                                             with privacy
                  "control" + "control-digest"               the change of c_k (as above)

Factors travel as one flat buffer with its layout (`fedlora.federation.buffers`), float32 or in a
codec that the client knows; control variates are always float32. The answer to a training message
is in `fedlora.federation.replies`, the phases of a secure sum are in
`fedlora.federation.secure.records`. Every value that arrives is checked against its type, and every
layout against the one that is expected; an error names the sender.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast
from urllib.parse import quote, unquote

import numpy as np
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedlora.adapter import Adapter, LoraConfig, LoraLayer
from fedlora.aggregation import Broadcast
from fedlora.errors import ConfigError, FederationError, FedloraError
from fedlora.experiment import BaseConfig, DataConfig, ExperimentConfig
from fedlora.federation.buffers import (
    BufferForm,
    FixedList,
    codec_of,
    describe,
    read_array,
    read_layout,
)
from fedlora.federation.codecs import CODECS, FP32, Codec
from fedlora.federation.layout import parse_segments, unpack
from fedlora.flat import RowForm, Segment, pack, segments_of
from fedlora.plain import from_plain, to_plain
from fedlora.privacy.local import LocalNoise
from fedlora.training import Factor, LocalRule, TrainConfig

__all__ = [
    "BOTH",
    "ClientAnswer",
    "ClientSetup",
    "EncodedAdapter",
    "TrainOrder",
    "answer_content",
    "content_bytes",
    "decode_answer",
    "decode_broadcast",
    "decode_start",
    "encode_adapter",
    "from_record",
    "query_content",
    "to_record",
    "train_content",
]

T = TypeVar("T")

BOTH: frozenset[Factor] = frozenset({"A", "B"})

_ANSWER: Mapping[str, type] = {
    "client_id": str, "rank": int, "num_examples": int, "codecs": tuple, "remembers": bool,
}  # fmt: skip
_CODECS = FixedList(CODECS)
MOST_CODECS = 32  # that an answer may name

# The last adapters that came down, by their record's name: bytes, description, adapter, round.
# Several of one round, since those of clients of different ranks alternate.
MOST_DECODED = 8
_DECODED: dict[str, tuple[tuple[bytes, tuple[Any, ...], Adapter, object], ...]] = {}
_PARSED: dict[tuple[type, str], Any] = {}  # frozen values of the last records, by their text


@dataclass(frozen=True, slots=True)
class ClientSetup:
    """What a client must know to open its base and its data: values, never a path to trust."""

    base: BaseConfig
    data: DataConfig
    lora: LoraConfig
    seed: int
    share_num_examples: bool = True  # False with equal weights: the count stays on the device
    # Which run this is, where clients keep something of their own from round to round.
    run: str | None = None
    share_metrics: bool = True  # False with privacy: replies hold factors and nothing else

    @classmethod
    def of(cls, config: ExperimentConfig, run: str | None = None) -> ClientSetup:
        """Return the part of an experiment that clients get."""
        # `extra` holds PEFT keys of any type, which change nothing here.
        lora = replace(config.lora, extra={})
        return cls(
            config.base,
            config.data,
            lora,
            config.seed,
            config.federation.weights == "examples",
            run,
            not config.sums_only,
        )


@dataclass(frozen=True, slots=True)
class TrainOrder:
    """One client's task in one round."""

    round: int  # 1-based
    seed: int
    train: TrainConfig
    uploaded: frozenset[Factor]  # what the client sends back
    rule: LocalRule = field(default_factory=LocalRule)
    upload_codec: Codec | None = None  # None: fp32
    noise: LocalNoise | None = None  # that the client puts on its reply; None: none


@dataclass(frozen=True, slots=True)
class ClientAnswer:
    """What a client says of itself at the start of a run."""

    client_id: str
    rank: int | None = None  # None: the global adapter's
    num_examples: int | None = None  # None: not told, the weights are equal
    # That the client can read and write. Unknown names are allowed: its software may be newer.
    codecs: tuple[str, ...] = (FP32,)
    remembers: bool | None = None  # whether it keeps its own rows over restarts; None: not asked

    def __post_init__(self) -> None:
        if not self.client_id or len(self.client_id) > 200 or not self.client_id.isprintable():
            raise FederationError(
                f"client-id: expected 1 to 200 printable characters, found {self.client_id[:40]!r}"
            )
        for name, value in (("rank", self.rank), ("num-examples", self.num_examples)):
            if value is not None and value < 1:
                raise FederationError(
                    f"client {self.client_id!r}: expected {name} >= 1, found {value}"
                )
        short = (type(codec) is str and 0 < len(codec) <= 20 for codec in self.codecs)
        if self.codecs != CODECS and (len(self.codecs) > MOST_CODECS or not all(short)):
            raise FederationError(
                f"client {self.client_id!r}: expected at most {MOST_CODECS} names of codecs, each "
                "of 1 to 20 characters, found others"
            )


@dataclass(frozen=True, slots=True)
class EncodedAdapter:
    """An adapter's records, made once and put in the messages of a whole round."""

    factors: ArrayRecord
    layout: ConfigRecord
    segments: tuple[Segment, ...]
    sent: Adapter  # as the client reads it
    fp32_surplus: int = 0  # bytes that the records would have more in fp32

    def put_in(self, content: RecordDict, name: str, layout_name: str) -> None:
        """Add copies of the records to `content`; the array's immutable bytes are shared."""
        content[name] = self.factors.copy()
        content[layout_name] = self.layout.copy()


def to_record(value: Any) -> ConfigRecord:
    """Flatten a dataclass into scalars and lists: ``{"data/id": "watch", "seed": 0}``."""
    flat: dict[str, Any] = {}
    _flatten(to_plain(value), "", flat)
    return ConfigRecord(flat)


def from_record(cls: type[T], record: Mapping[str, Any], who: str) -> T:
    """Build the dataclass `cls` from a record. Raises `FederationError`, which opens with `who`."""
    # The same setup and order come to every virtual client of a process, in every round.
    key = (cls, repr(list(record.items())))
    value = _PARSED.get(key)
    if value is None:
        value = _parse_record(cls, record, who)
        if len(_PARSED) > 64:
            _PARSED.clear()  # another thread may do so at any time: nothing is read back here
        _PARSED[key] = value
    return cast(T, value)


def query_content(setup: ConfigRecord) -> RecordDict:
    """Return a message that asks a client who it is, with a record of its own."""
    return RecordDict({"setup": setup.copy()})


def answer_content(answer: ClientAnswer) -> RecordDict:
    """Return what a client answers to a query."""
    told = {
        "client_id": answer.client_id, "rank": answer.rank, "num_examples": answer.num_examples,
        "remembers": answer.remembers,
    }  # fmt: skip
    known: dict[str, Any] = {key: value for key, value in told.items() if value is not None}
    if answer.codecs != (FP32,):
        known["codecs"] = _CODECS if answer.codecs == CODECS else list(answer.codecs)
    return RecordDict({"client": ConfigRecord(known)})


def decode_answer(content: RecordDict, who: str) -> ClientAnswer:
    """Read and check the answer to a query. Raises `FederationError`, which opens with `who`."""
    record = content.get("client")
    if not isinstance(record, ConfigRecord):
        raise FederationError(f"{who}: expected a record 'client', found none")
    told: dict[str, Any] = dict(record.items())
    if isinstance(told.get("codecs"), list):
        told["codecs"] = tuple(told["codecs"])
    if told.keys() <= _ANSWER.keys() and all(type(v) is _ANSWER[key] for key, v in told.items()):
        try:
            return ClientAnswer(**told)
        except (FederationError, TypeError):  # what is wrong is said below
            pass
    return _parse_record(ClientAnswer, record, who)


def train_content(
    setup: ConfigRecord,
    order: ConfigRecord,
    trainable: EncodedAdapter,
    frozen: EncodedAdapter | None = None,
    control: RecordDict | None = None,
) -> RecordDict:
    """Return a training message with records of its own, so that no client sees another's.

    control: the records of `fedlora.federation.control.put_control`.
    """
    content = RecordDict({"setup": setup.copy(), "train": order.copy()})
    trainable.put_in(content, "factors", "layout")
    if frozen is not None:
        frozen.put_in(content, "frozen", "frozen-layout")
    for name, record in (control or {}).items():
        content[name] = record.copy()
    return content


def encode_adapter(
    adapter: Adapter,
    factors: frozenset[Factor],
    round: int,
    codec: Codec = FP32,
    draws: np.random.Generator | None = None,
) -> EncodedAdapter:
    """Pack some factors of `adapter` into one buffer, and describe it.

    draws: for the rounding of the codec. Raises `NonFiniteError` for a number that is too large for
    the codec.
    """
    form = BufferForm.of(segments_of(adapter, factors), codec)
    array = form.array(pack(adapter, form.segments), draws)
    layout = describe(adapter, form, round)
    layout["digest"] = form.digest(array.data)
    sent = adapter
    if codec != FP32:
        sent = RowForm.of(adapter, factors).read(form.row(array.data).tobytes())
    record = ArrayRecord({"factors": array})
    return EncodedAdapter(record, layout, form.segments, sent, form.fp32_surplus)


def decode_broadcast(content: RecordDict, setup: ClientSetup) -> Broadcast:
    """Read what the server sent for training. Raises `FederationError` or an `AdapterError`."""
    frozen = None
    if "frozen" in content:
        frozen = _decode_adapter(content, "frozen", "frozen-layout", setup.lora)
    return Broadcast(_decode_adapter(content, "factors", "layout", setup.lora), frozen)


def decode_start(content: RecordDict, setup: ClientSetup) -> Adapter | None:
    """Read what a client of a smaller rank starts from, where that is sent; raises as above."""
    if "start" not in content:
        return None
    return _decode_adapter(content, "start", "start-layout", setup.lora)


def content_bytes(content: RecordDict) -> int:
    """Return the bytes of all records: the arrays' with their headers, scalars and keys."""
    return sum(record.count_bytes() for record in content.values())


def _parse_record(cls: type[T], record: Mapping[str, Any], who: str) -> T:
    table: dict[str, Any] = {}
    for key, value in record.items():
        *parents, last = (unquote(part) for part in key.split("/"))
        target = table
        for part in parents:
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                raise FederationError(f"{who}: {key!r} is both a value and a table")
        target[last] = value
    try:
        return from_plain(cls, table)
    except (ConfigError, FederationError) as error:
        raise FederationError(f"{who}: {error}") from None


def _decode_adapter(content: RecordDict, name: str, layout_name: str, lora: LoraConfig) -> Adapter:
    """Read an adapter, or take a recent one that is made of the very same bytes object.

    In one process all virtual clients of a round get the same one; on a device it is always read.
    """
    record, layout = content.get(name), content.get(layout_name)
    array = record.get("factors") if isinstance(record, ArrayRecord) else None
    if not isinstance(array, FlowerArray):
        return _read_adapter(content, name, layout_name, lora)
    described = (repr(layout), array.shape, array.dtype, lora)
    recent = _DECODED.get(name, ())
    for data, description, adapter, _ in recent:
        if array.data is data and described == description:
            return adapter
    adapter = _read_adapter(content, name, layout_name, lora)
    round = cast(ConfigRecord, layout)["round"]  # it was just read
    others = (kept for kept in recent if kept[3] == round)
    # Replaced whole: threads may read at any time.
    _DECODED[name] = ((array.data, described, adapter, round), *others)[:MOST_DECODED]
    return adapter


def _read_adapter(content: RecordDict, name: str, layout_name: str, lora: LoraConfig) -> Adapter:
    who = f"message from the server, {name}"
    layout = read_layout(content, layout_name, who)
    form = BufferForm.of(parse_segments(layout["segments"], who), codec_of(layout, who))
    data = read_array(content, name, layout, form, who)
    try:
        row = form.row(data)
    except FedloraError as error:
        raise type(error)(f"{who}: {error}") from None
    factors = unpack(row, form.segments, who)
    paths = sorted({segment.path for segment in form.segments})
    kinds, scalings = layout["kinds"], layout["scalings"]
    if not len(paths) == len(kinds) == len(scalings):
        raise FederationError(
            f"{who}: expected a kind and a scaling for each of {len(paths)} layers, found "
            f"{len(kinds)} and {len(scalings)}"
        )
    layers = {}
    for path, kind, scaling in zip(paths, kinds, scalings, strict=True):
        if (path, "A") not in factors or (path, "B") not in factors:
            raise FederationError(f"{who}, layer {path!r}: expected both lora_A and lora_B")
        layers[path] = LoraLayer(
            factors[path, "A"], factors[path, "B"], scaling, factors.get((path, "magnitude")), kind
        )
    return Adapter(layers, lora, layout["base"] or None)


def _flatten(table: Mapping[str, Any], prefix: str, flat: dict[str, Any]) -> None:
    for name, value in table.items():
        key = f"{prefix}{quote(name, safe='')}"  # a name may be a regular expression
        if isinstance(value, Mapping):
            _flatten(value, f"{key}/", flat)
        elif value != []:  # Flower cannot count the bytes of an empty list; it is the default here
            flat[key] = FixedList(value) if isinstance(value, list) else value
