"""Control variates on the wire and on the client (SCAFFOLD, arXiv:1910.06378, option II).

    "control"          one array "factors": the row, as the round's uploaded factors lie in one
    "control-digest"   its digest, which is made over that layout too

Down goes the server's c, up goes the change of the client's own c_k. c_k itself is the client's
private state: a row with the round that made it (`fedlora.federation.own_rows`; of virtual clients
`PersonalSlab`).
"""

from __future__ import annotations

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedlora.adapter import Array
from fedlora.errors import FederationError, FedloraError
from fedlora.federation.buffers import BufferForm, read_array
from fedlora.federation.own_rows import OwnRows
from fedlora.flat import RowForm
from fedlora.training import TrainConfig

__all__ = [
    "CONTROL_RECORDS",
    "LARGEST",
    "next_control",
    "put_control",
    "read_control",
    "read_own_control",
    "require_no_control",
    "write_own_control",
]

CONTROL, DIGEST = "control", "control-digest"
CONTROL_RECORDS = frozenset({CONTROL, DIGEST})

# Finite numbers can be absurd as well: float32 holds 1e30, but not the product of two of them, and
# one such client in the mean makes everyone's next forward pass infinite. Factors that train are of
# order 1, and what half precision on a device can hold ends at 65,504. A mean gradient that is
# larger would move them past it in one step.
LARGEST = 1e6


def put_control(content: RecordDict, form: BufferForm, row: Array) -> None:
    """Add a row to a message. Raises `ShapeMismatchError` for another size or type."""
    array = form.array(row)
    content[CONTROL] = ArrayRecord({"factors": array})
    content[DIGEST] = ConfigRecord({"digest": form.digest(array.data)})


def read_control(content: RecordDict, rows: RowForm, form: BufferForm, who: str) -> Array:
    """Return a message's row, a view of its bytes, checked as factors are.

    Raises a `FedloraError` that opens with `who`: another size, type or digest, a number that is
    not finite or over `LARGEST`.
    """
    who = f"{who}, control"
    record = content.get(DIGEST)
    if not isinstance(record, ConfigRecord) or set(record) != {"digest"}:
        raise FederationError(f"{who}: expected a record {DIGEST!r} with digest")
    data = read_array(content, CONTROL, record, form, who)
    try:
        made = rows.read(data, len(form.header), largest=LARGEST).made_of
    except FedloraError as error:
        raise type(error)(f"{who}: {error}") from None
    assert made is not None  # it was just made of that row
    return made[1]


def require_no_control(content: RecordDict, who: str) -> None:
    """Raise `FederationError` when a message holds a control variate that nobody asked for."""
    if not CONTROL_RECORDS.isdisjoint(content):
        raise FederationError(f"{who}: expected no control variate, found one")


def next_control(
    own: Array, server: Array, before: Array, after: Array, steps: int, config: TrainConfig
) -> tuple[Array, Array]:
    """Return the client's next control variate, and its change, which goes to the server.

    All rows ``(n,)`` float32. own: c_k; server: c; before, after: the factors x and y_k around
    `steps` steps by `config`. Without a step nothing changes.

    Raises `FederationError` when the change is not finite or over `LARGEST`: the server would
    refuse it, and the client must not keep what the server has not seen.
    """
    if not steps:
        return own, np.zeros_like(own)
    moved = before.astype(np.float64) - after
    exact = moved / (steps * config.learning_rate) - server
    most = float(np.abs(exact).max(initial=0.0))
    if not most <= LARGEST:
        raise FederationError(
            f"control variate: expected changes up to {LARGEST:g}, found {most:g}; lower "
            "learning_rate, or set max_grad_norm"
        )
    change: Array = exact.astype(np.float32)
    following: Array = own + change
    return following, change


def read_own_control(form: BufferForm, own: OwnRows, round: int) -> Array:
    """Return a client's c_k as the rounds before `round` left it; zeros in its first one.

    Raises a `FedloraError` when what is kept is of another layout.
    """
    row = own.read(_kind(form), form.segments, round)
    return np.zeros(form.size, np.float32) if row is None else row


def write_own_control(form: BufferForm, own: OwnRows, round: int, row: Array) -> None:
    """Keep the c_k that `round` has made, beside the one that it was made of."""
    own.write(_kind(form), form.segments, round, row)


def _kind(form: BufferForm) -> str:
    # A method may train A in one round and B in the next: each has a row of its own.
    return "own-control-" + "".join(sorted({segment.factor for segment in form.segments}))
