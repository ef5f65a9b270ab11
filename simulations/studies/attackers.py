"""Hostile clients: what one of them can put into its answers, as a table of named attacks.

An attacker stands where a device stands. It knows the protocol, so that digests and layouts fit
whatever it sends, as far as the attack itself is not that they do not. Its answers go to the server
as everyone's: through the messages of a grid.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from flwr.app import Array as FlowerArray
from flwr.app import Message, RecordDict

from fedlora.adapter import Array
from fedlora.federation.buffers import BufferForm
from fedlora.federation.layout import parse_segments, unpack
from fedlora.simulation.grid import VirtualGrid

__all__ = ["ATTACKS", "SILENT", "Attack", "with_attackers"]

# (the row that was trained, the row that was sent) to the row that goes up
_Row: TypeAlias = Callable[[Array, Array], Array]


@dataclass(frozen=True, slots=True)
class Attack:
    """What an attacker changes in its answers; what it leaves alone is honest."""

    refused: str | None  # words of the reason for which the server drops it; None: well-formed
    row: _Row = lambda trained, sent: trained
    content: Callable[[RecordDict], None] = lambda content: None  # after the row
    num_examples: int | None = None  # claimed, at the start and in every round
    silent: bool = False


def _spoiled(value: float) -> _Row:
    """One number of many: what a mean would spread to everyone."""

    def row(trained: Array, sent: Array) -> Array:
        spoiled = trained.copy()
        spoiled[len(spoiled) // 2] = value
        return spoiled

    return row


def _one_number_short(content: RecordDict) -> None:
    row = _row_of(content)[:-1]
    content["factors"]["factors"] = _array(row)


def _scalar(content: RecordDict) -> None:
    content["factors"]["factors"] = FlowerArray(np.array(1.0, np.float32))


def _wrong_keys(content: RecordDict) -> None:
    layout = content["layout"].copy()
    segments = [str(text) for text in layout["segments"]]
    layout["segments"] = [f"stranger.{segments[0]}", *segments[1:]]
    content["layout"] = layout


def _flipped(trained: Array, sent: Array) -> Array:
    return sent - np.float32(10) * (trained - sent)


ATTACKS: Mapping[str, Attack] = {
    "NaN": Attack("expected finite numbers, found nan", row=_spoiled(np.nan)),
    "Inf": Attack("expected finite numbers, found inf", row=_spoiled(np.inf)),
    "1e30": Attack(
        "expected numbers up to 1e+06, found 1e+30",
        row=lambda trained, sent: np.full_like(trained, 1e30),
    ),
    "wrong shape": Attack("expected a buffer of", content=_one_number_short),
    "scalar": Attack("expected a buffer of", content=_scalar),
    "wrong keys": Attack("is missing, the other side has", content=_wrong_keys),
    "weight -50": Attack("num-examples", num_examples=-50),
    "sign x 10": Attack(None, row=_flipped),
    "replay": Attack(None, row=lambda trained, sent: sent),
    "weight 1e12": Attack(None, num_examples=10**12),
    "weight 1e12, sign x 10": Attack(None, row=_flipped, num_examples=10**12),
}
SILENT = Attack("no reply in time", silent=True)  # what a dropped attack has to come to


def with_attackers(grid: VirtualGrid, numbers: Collection[int], attack: Attack) -> VirtualGrid:
    """Return `grid` with some of its clients, by their place in the data, turned into attackers."""
    honest = grid.send_and_receive
    nodes = [node for number, node in enumerate(grid.get_node_ids()) if number in numbers]
    sent: dict[int, RecordDict] = {}

    def watched(messages: Iterable[Message]) -> Iterator[Message]:
        for message in messages:
            if message.metadata.dst_node_id in nodes:
                sent[message.metadata.dst_node_id] = message.content
            yield message

    def send_and_receive(
        messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        for reply in honest(watched(messages), timeout=timeout):
            node = reply.metadata.src_node_id
            if node not in nodes or reply.has_error():
                yield reply
            elif reply.metadata.message_type == "query":
                if attack.num_examples is not None and "num_examples" in reply.content["client"]:
                    reply.content["client"]["num_examples"] = attack.num_examples
                yield reply
            elif not attack.silent:
                _forge(reply.content, sent[node], attack)
                yield reply

    grid.send_and_receive = send_and_receive  # type: ignore[method-assign]
    return grid


def _forge(content: RecordDict, sent: RecordDict, attack: Attack) -> None:
    """Change an honest answer to `sent` into the attack's."""
    trained = _row_of(content)
    segments = parse_segments(content["layout"]["segments"], "attacker")
    known = parse_segments(sent["layout"]["segments"], "attacker")
    before = unpack(_row_of(sent), known, "attacker")
    started = np.concatenate([before[s.path, s.factor].reshape(-1) for s in segments])
    array = BufferForm.of(segments).array(attack.row(trained, started))
    layout = content["layout"].copy()
    layout["digest"] = BufferForm.of(segments).digest(array.data)
    content["factors"]["factors"] = array
    content["layout"] = layout
    if attack.num_examples is not None and "num-examples" in content["metrics"]:
        content["metrics"]["num-examples"] = attack.num_examples
    attack.content(content)


def _row_of(content: RecordDict) -> Any:
    return content["factors"]["factors"].numpy()


def _array(row: Array) -> FlowerArray:
    return FlowerArray(np.ascontiguousarray(row))
