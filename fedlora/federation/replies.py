"""A client's answer to a training message: made from one flat row, and read back with every check.

Nearly everything of a reply is known before it comes: its layout, its size, its base and its round.
A `ReplyForm` is prepared once from what was sent down. The client copies from it, the server
compares with it in one step, and looks closer only where something differs, to say what.

    "factors"  one array "factors"
    "layout"   segments, kinds, scalings, base, round, digest; codec, where it is not fp32
    "metrics"  loss, steps, num-examples, seconds (may be left out); no such record with privacy

With control variates, "control" and "control-digest" beside these (`fedlora.federation.control`).

fp32 carries the trained factors, bit for bit. A codec carries the difference between them and those
that were sent, which is smaller than they are and so loses less. Both sides know what was sent to
the last bit: the server decodes its own message.

What the server takes as the client's factors is that difference added to its own, as they were
before the download codec. So the rounding of a download is an error of the place where clients
train, a new one in every round, and never part of the global adapter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedlora.adapter import Adapter, Array
from fedlora.errors import FederationError, FedloraError, NonFiniteError
from fedlora.federation.buffers import (
    BufferForm,
    codec_of,
    describe,
    read_array,
    read_layout,
    require_segments,
)
from fedlora.federation.codecs import FP32, Codec
from fedlora.federation.control import LARGEST, put_control, read_control, require_no_control
from fedlora.flat import RowForm, Segment, pack
from fedlora.training import Factor

__all__ = [
    "LARGEST",
    "Reply",
    "ReplyForm",
    "decode_reply",
    "encode_reply",
    "encode_reply_row",
    "reply_bytes",
    "require_answerable",
]

LARGEST_LOSS = 1e30  # its sum over clients by weight stays finite


@dataclass(frozen=True, slots=True, eq=False)
class ReplyForm:
    """What all replies to one broadcast have in common."""

    sent: Adapter  # the trainable adapter as the client was sent it
    rows: RowForm  # the uploaded factors; the others are those of the server's own adapter
    buffer: BufferForm  # of a row in fp32, as a control variate's change travels
    wire: BufferForm  # of the factors as they travel; `buffer` itself in fp32
    round: int
    layout: ConfigRecord  # of every reply, its digest left out
    _told: dict[str, Any]  # the same as plain values
    _types: list[type]  # of the scalings: 1 == 1.0 == True
    _bytes: int  # of the layout, without its digest's text
    controlled: bool = False  # whether a control variate's change comes beside the factors
    measured: bool = True  # whether metrics come beside them
    # Rows of the uploaded factors: those sent, and the server's. Not needed where all is fp32.
    _sent_row: Array | None = None
    _own_row: Array | None = None

    @classmethod
    def of(
        cls,
        sent: Adapter,
        uploaded: frozenset[Factor],
        round: int,
        *,
        controlled: bool = False,
        codec: Codec = FP32,
        own: Adapter | None = None,
        measured: bool = True,
    ) -> ReplyForm:
        """Prepare the replies with factors `uploaded` to the trainable adapter `sent`.

        codec: of the replies. own: the server's adapter, of which a download codec has made `sent`;
        None: it is the same. measured: whether they hold metrics.
        """
        own = sent if own is None else own
        rows = RowForm.of(own, uploaded)
        buffer = BufferForm.of(rows.segments)
        wire = buffer if codec == FP32 else BufferForm.of(rows.segments, codec)
        layout = describe(sent, wire, round)
        told: dict[str, Any] = dict(layout.items())
        texts = (*told, "digest", *told["segments"], *told["kinds"], told["base"])
        size = sum(map(len, texts)) + 8 * (len(sent) + 1)  # a float a layer, and the round
        size += 0 if codec == FP32 else len(codec)
        types: list[type] = [float] * len(sent)
        sent_row = own_row = None
        if codec != FP32 or own is not sent:
            sent_row, own_row = pack(sent, rows.segments), pack(own, rows.segments)
        return cls(
            sent, rows, buffer, wire, round, layout, told, types, size, controlled, measured,
            sent_row, own_row,
        )  # fmt: skip

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The factors in a reply's row, in order."""
        return self.rows.segments

    def array(self, row: Array, draws: np.random.Generator | None) -> FlowerArray:
        """Return trained factors, ``(size,)`` float32, as they travel; `draws` for the rounding."""
        if self.wire.codec == FP32 or self._sent_row is None or row.shape != self._sent_row.shape:
            return self.wire.array(row)  # which refuses another shape
        return self.wire.array(row - self._sent_row, draws)

    def adapter(self, data: bytes) -> Adapter:
        """Return the client's adapter of an array's bytes, as `read_array` returns them.

        Raises `FormatError` for what no encoder makes, and `NonFiniteError` for a number that is
        not finite or over `LARGEST`.
        """
        if self._sent_row is None or self._own_row is None:
            return self.rows.read(data, len(self.wire.header), largest=LARGEST)
        row = self.wire.row(data)
        with np.errstate(over="ignore", invalid="ignore"):  # refused below, by the layer's name
            change = row - self._sent_row if self.wire.codec == FP32 else row
            row = self._own_row + change
        return self.rows.read(row.tobytes(), largest=LARGEST)

    def describes(self, layout: object) -> bool:
        """Whether a record is exactly what a right reply says of its factors, whatever digest."""
        if not isinstance(layout, ConfigRecord):
            return False
        found: dict[str, Any] = dict(layout.items())
        digest = found.pop("digest", None)
        return (
            type(digest) is str
            and found == self._told
            and type(found["round"]) is int
            and list(map(type, found["scalings"])) == self._types
        )


@dataclass(frozen=True, slots=True)
class Reply:
    """One client's round as it arrived, checked."""

    adapter: Adapter  # the uploaded factors; the others are those of the server's own adapter
    num_examples: int | None
    loss: float  # NaN when there was no step, or it is not told
    steps: int  # 0 where they are not told
    control: Array | None = None  # the change of its control variate, as a row of the factors
    seconds: float | None = None  # how long the client took, as it says itself


def encode_reply_row(
    form: ReplyForm,
    row: Array,
    metrics: Mapping[str, int | float],
    control: Array | None = None,
    draws: np.random.Generator | None = None,
) -> RecordDict:
    """Return the reply with the uploaded factors in `row`, ``(size,)`` float32, which is copied.

    metrics: left out where the form has none. control: a row of the same layout, the change of the
    client's control variate. draws: for the rounding of the reply's codec.

    Raises `ShapeMismatchError` for another row. fp32 does not look at the numbers: the server does.
    The other codecs raise `NonFiniteError` for what they cannot hold.
    """
    array = form.array(row, draws)
    factors = ArrayRecord()
    factors["factors"] = array
    layout = form.layout.copy()
    layout["digest"] = form.wire.digest(array.data)
    content = RecordDict({"factors": factors, "layout": layout})
    if form.measured:
        content["metrics"] = MetricRecord(dict(metrics))
    if control is not None:
        put_control(content, form.buffer, control)
    return content


def encode_reply(
    adapter: Adapter, uploaded: frozenset[Factor], metrics: Mapping[str, int | float], round: int
) -> RecordDict:
    """Return the reply of one client alone; of many, `encode_reply_row` is the cheaper way."""
    form = ReplyForm.of(adapter, uploaded, round)
    return encode_reply_row(form, pack(adapter, form.segments), metrics)


def decode_reply(content: RecordDict, form: ReplyForm, who: str) -> Reply:
    """Read and check a client's answer. In fp32 its factors are views of the message's bytes.

    Raises a `FedloraError` that opens with `who`: another layout, base, round, digest or size, a
    codec, number that is not finite or over `LARGEST`, a missing or senseless metric.
    """
    layout: Any = content.get("layout")
    usual = form.describes(layout)
    if not usual:
        layout = read_layout(content, "layout", who)
        require_segments(layout, form.buffer, who)
        if (codec := codec_of(layout, who)) != form.wire.codec:
            raise FederationError(f"{who}: expected codec {form.wire.codec}, found {codec}")
    data = read_array(content, "factors", layout, form.wire, who)
    if not usual:
        _require_same(layout, form, who)
    try:
        adapter = form.adapter(data)
    except FedloraError as error:
        raise type(error)(f"{who}: {error}") from None
    control = None
    if form.controlled:
        control = read_control(content, form.rows, form.buffer, who)
    else:
        require_no_control(content, who)
    if not form.measured:
        if "metrics" in content:
            raise FederationError(f"{who}: expected no metrics in a run with privacy, found some")
        return Reply(adapter, None, math.nan, 0, control)
    count, loss, steps, seconds = _metrics(content, who)
    return Reply(adapter, count, loss, steps, control, seconds)


def require_answerable(adapter: Adapter) -> None:
    """Raise `NonFiniteError` when a client that trained nothing could not send this one back.

    A mean of replies stays below `LARGEST`. What is decomposed and factored anew need not: the
    largest number of ``U S`` is over those of the factors that it was made of. Were such an adapter
    sent, every honest reply would be refused from then on.
    """
    for path, layer in adapter.layers.items():
        for factor, array in (("A", layer.A), ("B", layer.B)):
            most = max(float(array.max(initial=0.0)), -float(array.min(initial=0.0)))
            if most > LARGEST:
                raise NonFiniteError(
                    f"layer {path!r}, {factor}: expected numbers up to {LARGEST:g}, found {most:g}"
                )


def reply_bytes(content: RecordDict, form: ReplyForm) -> int:
    """Return the bytes of a reply's records, as `content_bytes` does, but faster."""
    total = 0
    for name, record in content.items():
        if name == "layout" and form.describes(record):
            total += form._bytes + len(cast(str, record["digest"]))
        else:
            total += record.count_bytes()
    return total


def _require_same(layout: Mapping[str, Any], form: ReplyForm, who: str) -> None:
    if layout["round"] != form.round:
        raise FederationError(
            f"{who}: expected a reply to round {form.round}, found {layout['round']}"
        )
    if layout["base"] != (form.sent.base or ""):
        raise FederationError(
            f"{who}: expected an adapter for base {_short(form.sent.base)}, found "
            f"{_short(layout['base'])}"
        )
    if list(layout["scalings"]) != [layer.scaling for layer in form.sent.layers.values()]:
        raise FederationError(f"{who}: expected the server's scalings, found others")


def _metrics(content: RecordDict, who: str) -> tuple[int | None, float, int, float | None]:
    record = content.get("metrics")
    found = dict(record.items()) if isinstance(record, MetricRecord) else {}
    if "loss" not in found or "steps" not in found:
        raise FederationError(f"{who}: expected the metrics loss and steps")
    count, loss, steps = found.get("num-examples"), found["loss"], found["steps"]
    if count is not None and (type(count) is not int or not 1 <= count < 2**53):
        raise FederationError(f"{who}: expected num-examples, a whole number >= 1, found {count!r}")
    if type(steps) is not int or steps < 0:
        raise FederationError(f"{who}: expected steps, a whole number >= 0, found {steps!r}")
    if type(loss) is not float or (steps > 0 and not math.isfinite(loss)):
        raise FederationError(f"{who}: expected a finite loss, found {loss!r}")
    if abs(loss) > LARGEST_LOSS:
        raise FederationError(f"{who}: expected a loss up to {LARGEST_LOSS:g}, found {loss!r}")
    seconds = found.get("seconds")
    if seconds is not None and (type(seconds) is not float or not 0 <= seconds < math.inf):
        raise FederationError(f"{who}: expected seconds, a finite number >= 0, found {seconds!r}")
    return count, loss, steps, seconds


def _short(fingerprint: str | None) -> str:
    return fingerprint[:12] if fingerprint else "of no name"
