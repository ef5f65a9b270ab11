"""What the server and its clients say to each other, as Flower records.

    query   down  "setup"                                    ClientSetup, flat scalars
            up    "client"                                   client-id, rank, num-examples
    train   down  "setup", "train"                           TrainOrder, flat scalars
                  "factors" + "layout"                       the trainable adapter
                  "frozen" + "frozen-layout"                 the part that stays (if there is one)
            up    "factors" + "layout", "metrics"            the uploaded factors only

Factors travel as one flat float32 buffer with its layout (`fedlora.federation.layout`). Every value
that arrives is checked against its type, and every layout against the one that is expected; an
error names the sender.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast
from urllib.parse import quote, unquote

import numpy as np
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedlora.adapter import Adapter, Array, LoraConfig, LoraLayer
from fedlora.aggregation import Broadcast
from fedlora.errors import ConfigError, FederationError, FedloraError, ShapeMismatchError
from fedlora.experiment import BaseConfig, DataConfig, ExperimentConfig, from_plain, to_plain
from fedlora.federation.layout import (
    Segment,
    digest,
    pack,
    parse_segments,
    require_same_segments,
    segments_of,
    unpack,
    with_factors,
)
from fedlora.training import Factor, LocalRule, TrainConfig

__all__ = [
    "BOTH",
    "ClientAnswer",
    "ClientSetup",
    "EncodedAdapter",
    "Reply",
    "TrainOrder",
    "content_bytes",
    "decode_broadcast",
    "decode_reply",
    "encode_adapter",
    "encode_reply",
    "from_record",
    "query_content",
    "to_record",
    "train_content",
]

T = TypeVar("T")

BOTH: frozenset[Factor] = frozenset({"A", "B"})

# What describes a buffer, each with its type; those of LAYOUT_LISTS are lists of it.
LAYOUT_ORDER: Mapping[str, type] = {
    "segments": str, "kinds": str, "scalings": float, "base": str, "round": int, "digest": str,
}  # fmt: skip
LAYOUT_LISTS = frozenset({"segments", "kinds", "scalings"})
LAYOUT_KEYS = frozenset(LAYOUT_ORDER)

# The last adapter that came down, by its record's name: its array, its description, itself.
_DECODED: dict[str, tuple[FlowerArray, tuple[str, LoraConfig], Adapter]] = {}
_PARSED: dict[tuple[type, str], Any] = {}  # frozen values of the last records, by their text


@dataclass(frozen=True, slots=True)
class ClientSetup:
    """What a client must know to open its base and its data: values, never a path to trust."""

    base: BaseConfig
    data: DataConfig
    lora: LoraConfig
    seed: int
    share_num_examples: bool = True  # False with equal weights: the count stays on the device

    @classmethod
    def of(cls, config: ExperimentConfig) -> ClientSetup:
        """Return the part of an experiment that clients get."""
        # `extra` holds PEFT keys of any type, which change nothing here.
        lora = replace(config.lora, extra={})
        return cls(
            config.base, config.data, lora, config.seed, config.federation.weights == "examples"
        )


@dataclass(frozen=True, slots=True)
class TrainOrder:
    """One client's task in one round."""

    round: int  # 1-based
    seed: int
    train: TrainConfig
    uploaded: frozenset[Factor]  # what the client sends back
    rule: LocalRule = field(default_factory=LocalRule)


@dataclass(frozen=True, slots=True)
class ClientAnswer:
    """What a client says of itself at the start of a run."""

    client_id: str
    rank: int | None = None  # None: the global adapter's
    num_examples: int | None = None  # None: not told, the weights are equal

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


@dataclass(frozen=True, slots=True)
class Reply:
    """One client's round as it arrived, checked."""

    adapter: Adapter  # the uploaded factors; the others are those that were sent down
    num_examples: int | None
    loss: float  # NaN when there was no step
    steps: int


@dataclass(frozen=True, slots=True)
class EncodedAdapter:
    """An adapter's records, made once and put in the messages of a whole round."""

    factors: ArrayRecord
    layout: ConfigRecord
    segments: tuple[Segment, ...]

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


def query_content(setup: ClientSetup) -> RecordDict:
    """Return the message that asks a client who it is."""
    return RecordDict({"setup": to_record(setup)})


def train_content(
    setup: ConfigRecord,
    order: ConfigRecord,
    trainable: EncodedAdapter,
    frozen: EncodedAdapter | None = None,
) -> RecordDict:
    """Return a training message with records of its own, so that no client sees another's."""
    content = RecordDict({"setup": setup.copy(), "train": order.copy()})
    trainable.put_in(content, "factors", "layout")
    if frozen is not None:
        frozen.put_in(content, "frozen", "frozen-layout")
    return content


def encode_adapter(adapter: Adapter, factors: frozenset[Factor], round: int) -> EncodedAdapter:
    """Pack some factors of `adapter` into one buffer, and describe it."""
    segments = segments_of(adapter, factors)
    buffer = pack(adapter, segments)
    layers = adapter.layers.values()
    layout = ConfigRecord(
        {
            "segments": [str(segment) for segment in segments],
            "kinds": [str(layer.kind) for layer in layers],
            "scalings": [layer.scaling for layer in layers],
            "base": adapter.base or "",
            "round": round,
            "digest": digest(segments, buffer),
        }
    )
    return EncodedAdapter(ArrayRecord({"factors": FlowerArray(buffer)}), layout, segments)


def decode_broadcast(content: RecordDict, setup: ClientSetup) -> Broadcast:
    """Read what the server sent for training. Raises `FederationError` or an `AdapterError`."""
    frozen = None
    if "frozen" in content:
        frozen = _decode_adapter(content, "frozen", "frozen-layout", setup.lora)
    return Broadcast(_decode_adapter(content, "factors", "layout", setup.lora), frozen)


def encode_reply(
    adapter: Adapter, uploaded: frozenset[Factor], metrics: Mapping[str, int | float], round: int
) -> RecordDict:
    """Return a client's answer to a training message: the uploaded factors and the metrics."""
    content = RecordDict()
    encode_adapter(adapter, uploaded, round).put_in(content, "factors", "layout")
    content["metrics"] = MetricRecord(dict(metrics))
    return content


def decode_reply(
    content: RecordDict, sent: Adapter, expected: tuple[Segment, ...], round: int, who: str
) -> Reply:
    """Read and check a client's answer; `sent` is the adapter that it trained from.

    Raises a `FedloraError` that opens with `who`: another layout, base, round, digest or size, a
    number that is not finite, a missing or senseless metric.
    """
    layout = _config(content, "layout", who)
    factors = _decode_factors(content, "factors", layout, who, expected)
    if layout["round"] != round:
        raise FederationError(f"{who}: expected a reply to round {round}, found {layout['round']}")
    if layout["base"] != (sent.base or ""):
        raise FederationError(
            f"{who}: expected an adapter for base {_short(sent.base)}, found "
            f"{_short(layout['base'])}"
        )
    mine = [layer.scaling for layer in sent.layers.values()]
    if list(layout["scalings"]) != mine:
        raise FederationError(f"{who}: expected the server's scalings, found others")
    try:
        adapter = with_factors(sent, factors)
    except FedloraError as error:
        raise type(error)(f"{who}: {error}") from None
    return Reply(adapter, *_metrics(content, who))


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
    """Read an adapter, or take the last one when it is made of the very same bytes object.

    In one process all virtual clients of a round get the same one; on a device it is always read.
    """
    record, layout = content.get(name), content.get(layout_name)
    array = record.get("factors") if isinstance(record, ArrayRecord) else None
    described = (repr(layout), lora)
    last = _DECODED.get(name)
    if last is not None and array is not None and array is last[0] and described == last[1]:
        return last[2]
    adapter = _read_adapter(content, name, layout_name, lora)
    if array is not None:
        _DECODED[name] = (array, described, adapter)
    return adapter


def _read_adapter(content: RecordDict, name: str, layout_name: str, lora: LoraConfig) -> Adapter:
    who = f"message from the server, {name}"
    layout = _config(content, layout_name, who)
    segments = parse_segments(layout["segments"], who)
    factors = _decode_factors(content, name, layout, who, segments)
    paths = sorted({segment.path for segment in segments})
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


def _decode_factors(
    content: RecordDict,
    name: str,
    layout: Mapping[str, Any],
    who: str,
    expected: tuple[Segment, ...],
) -> dict[tuple[str, Factor], Array]:
    # The usual case needs no parsing: the texts are equal.
    if list(layout["segments"]) != [str(segment) for segment in expected]:
        require_same_segments(expected, parse_segments(layout["segments"], who), who)
    record = content.get(name)
    if not isinstance(record, ArrayRecord) or list(record) != ["factors"]:
        raise FederationError(f"{who}: expected one array 'factors', found something else")
    buffer = _read_array(record["factors"], sum(segment.size for segment in expected), who)
    if layout["digest"] != digest(expected, buffer):
        raise FederationError(f"{who}: the factors are not those that their digest was made of")
    return unpack(buffer, expected, who)


def _read_array(array: FlowerArray, size: int, who: str) -> Array:
    """Return a 1-D float32 array of `size` numbers, a view of the message's bytes.

    Flower's own reader parses a header that the sender wrote and allocates what it asks for. The
    header of what we expect is known, so here it is only compared.
    """
    if tuple(array.shape) != (size,) or array.dtype != "float32":
        raise ShapeMismatchError(
            f"{who}: expected a buffer of ({size},) float32, found {tuple(array.shape)[:8]} "
            f"{array.dtype[:20]}"
        )
    header = _array_header(size)
    if array.data[: len(header)] != header or len(array.data) != len(header) + 4 * size:
        raise FederationError(f"{who}: the buffer's bytes are not {size} float32 numbers")
    return np.frombuffer(array.data, dtype=np.float32, offset=len(header))


@functools.cache
def _array_header(size: int) -> bytes:
    stream = io.BytesIO()
    description = {"descr": "<f4", "fortran_order": False, "shape": (size,)}
    np.lib.format.write_array_header_1_0(stream, description)
    return stream.getvalue()


def _config(content: RecordDict, name: str, who: str) -> Mapping[str, Any]:
    """Return a layout's record with every key there and of its type."""
    record = content.get(name)
    if not isinstance(record, ConfigRecord) or set(record) != LAYOUT_KEYS:
        raise FederationError(f"{who}: expected a record {name!r} with {', '.join(LAYOUT_ORDER)}")
    for key, kind in LAYOUT_ORDER.items():
        value = record[key]
        items = value if isinstance(value, list) and key in LAYOUT_LISTS else [value]
        if isinstance(value, list) != (key in LAYOUT_LISTS) or not all(
            type(item) is kind for item in items
        ):
            raise FederationError(f"{who}: {name}.{key} is not of type {kind.__name__}")
    return record


def _metrics(content: RecordDict, who: str) -> tuple[int | None, float, int]:
    record = content.get("metrics")
    if not isinstance(record, MetricRecord) or not {"loss", "steps"} <= set(record):
        raise FederationError(f"{who}: expected the metrics loss and steps")
    count, loss, steps = record.get("num-examples"), record["loss"], record["steps"]
    if count is not None and (type(count) is not int or not 1 <= count < 2**53):
        raise FederationError(f"{who}: expected num-examples, a whole number >= 1, found {count!r}")
    if type(steps) is not int or steps < 0:
        raise FederationError(f"{who}: expected steps, a whole number >= 0, found {steps!r}")
    if type(loss) is not float or (steps > 0 and not math.isfinite(loss)):
        raise FederationError(f"{who}: expected a finite loss, found {loss!r}")
    return count, loss, steps


def _flatten(table: Mapping[str, Any], prefix: str, flat: dict[str, Any]) -> None:
    for name, value in table.items():
        key = f"{prefix}{quote(name, safe='')}"  # a name may be a regular expression
        if isinstance(value, Mapping):
            _flatten(value, f"{key}/", flat)
        elif value != []:  # Flower cannot count the bytes of an empty list; it is the default here
            flat[key] = value


def _short(fingerprint: str | None) -> str:
    return fingerprint[:12] if fingerprint else "of no name"
