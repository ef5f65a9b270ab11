"""A client's part of a secure sum: its answers in the five phases of a round.

Between two messages a client's secrets lie in its `Sessions`: `Context.state` on a device, which is
in the memory of its SuperNode and ends with the run, or a dictionary for virtual clients. They are
never written to a disk, so a lost device holds none; a node that restarts in the middle of a round
is a dropout of that round. After the last phase only the round's number is left.

A client answers each phase of a round once and in order, for one run, and for no round before the
last one. What it is told of the others is checked by `fedlora.privacy.secure`. What it answers
passes the guard.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, cast

import numpy as np
from flwr.app import ConfigRecord, RecordDict

from fedlora.adapter import Array
from fedlora.errors import FederationError, PhaseOrderError, SecureTermsError
from fedlora.federation.guard import check_advertised, check_masked, check_parts
from fedlora.federation.secure.once import answer_once
from fedlora.federation.secure.records import (
    AGREE,
    KEYS,
    MASKED,
    SHARES,
    PhaseOrder,
    advertisement_content,
    masked_record,
    parts_record,
    read_keys,
    read_parts,
    read_phase,
)
from fedlora.federation.tasks import TrainTask
from fedlora.flat import pack
from fedlora.low_rank import Matrix
from fedlora.privacy.clipping import clip
from fedlora.privacy.secure import Advertisement, ClientSession, Identity, Terms
from fedlora.randomness import rng

__all__ = [
    "ContextSessions",
    "Kept",
    "MemorySessions",
    "Sessions",
    "answer_agree",
    "answer_keys",
    "answer_masked",
    "answer_phase",
    "answer_shares",
    "answer_unmask",
    "require_masking",
]

_RECORD = "secure-session"
_SERVER = "message from the server"


@dataclass(frozen=True, slots=True)
class Kept:
    """What a client keeps of a round between two of its phases."""

    run: str
    round: int
    session: ClientSession | None  # None: the round is done


class Sessions(Protocol):
    """Where one client keeps its round."""

    def read(self) -> Kept | None:
        """Return what is kept; None: nothing yet."""

    def write(self, kept: Kept) -> None:
        """Keep this, and nothing of before."""


class ContextSessions:
    """`Sessions` in a `Context.state`.

    answers: where a device notes each phase that it has answered (`answer_once`), since the state
    may be an old copy; None: it notes nothing.
    """

    def __init__(self, state: RecordDict, answers: Path | None = None) -> None:
        self._state, self._answers = state, answers

    def read(self) -> Kept | None:
        """See `Sessions`."""
        record = self._state.get(_RECORD)
        if not isinstance(record, ConfigRecord):
            return None
        data = cast(bytes, record["session"])
        return Kept(
            str(record["run"]),
            cast(int, record["round"]),
            ClientSession.from_bytes(data) if data else None,
        )

    def write(self, kept: Kept) -> None:
        """See `Sessions`. Raises `PhaseOrderError` for a phase that another process has done."""
        if self._answers is not None:
            phase = "revealed" if kept.session is None else kept.session.phase
            answer_once(self._answers, kept.run, kept.round, phase)
        data = b"" if kept.session is None else kept.session.to_bytes()
        self._state[_RECORD] = ConfigRecord({"run": kept.run, "round": kept.round, "session": data})


class MemorySessions:
    """`Sessions` of one of many virtual clients, in a dictionary of all of them."""

    def __init__(self, everyone: MutableMapping[int, Kept], number: int) -> None:
        self._everyone, self._number = everyone, number

    def read(self) -> Kept | None:
        """See `Sessions`."""
        return self._everyone.get(self._number)

    def write(self, kept: Kept) -> None:
        """See `Sessions`."""
        self._everyone[self._number] = kept


def answer_keys(
    content: RecordDict, sessions: Sessions, identity: Identity | None = None
) -> RecordDict:
    """Begin a round: draw its keys and tell the public ones, signed where there is an `identity`.

    Raises `FederationError` for a round that this client has begun already or left behind.
    """
    order = read_keys(content)
    terms, before = order.terms, sessions.read()
    if before is not None and terms.round < before.round:
        raise FederationError(
            f"{_SERVER}: expected a round after {before.round}, found {terms.round}"
        )
    if before is not None and (terms.run, terms.round) == (before.run, before.round):
        raise FederationError(
            f"{_SERVER}: expected the phases of round {terms.round} once, found a second beginning"
        )
    session, advertisement = ClientSession.begin(terms, order.place, identity)
    signer = None if identity is None else hashlib.sha256(identity.public_bytes).digest()
    reply = advertisement_content(advertisement.to_bytes(), signer)
    check_advertised(reply)
    sessions.write(Kept(terms.run, terms.round, session))
    return reply


def answer_shares(
    content: RecordDict, sessions: Sessions, trusted: Mapping[bytes, bytes] | None = None
) -> RecordDict:
    """Deal shares of this client's secrets to those who hold them, each sealed for one of them.

    trusted: the public keys of the devices that the owner trusts, by their SHA-256; with them an
    advertisement counts only if one of these has signed it, and no two if the same has. None: the
    server is believed.

    Raises `FederationError` out of order, and what the session raises for a forged directory.
    """
    order = read_phase(content)
    kept, session = _kept(sessions, order)
    parts = read_parts(content, "directory", _SERVER)
    directory = {place: Advertisement.from_bytes(part) for place, part in parts.items()}
    known = None
    if trusted is not None:
        signers = read_parts(content, "signers", _SERVER) if "signers" in content else {}
        known = {p: trusted[signer] for p, signer in signers.items() if signer in trusted}
    shares = session.share(directory, known)
    reply = RecordDict({"shares": parts_record(shares)})
    check_parts(reply, "shares", session.terms.holders_of(session.index))
    sessions.write(kept)
    return reply


def require_masking(content: RecordDict, sessions: Sessions) -> None:
    """Raise `FederationError` for what asks for a masked update out of order.

    To be asked before anything is trained for it.
    """
    order = read_phase(content)
    _, session = _kept(sessions, order)
    if session.phase != "shares":
        raise PhaseOrderError(
            f"{_SERVER}: expected what follows the phase {session.phase!r} of round "
            f"{order.round}, found {MASKED}"
        )


def answer_masked(
    content: RecordDict, sessions: Sessions, task: TrainTask, row: Array, client_id: str
) -> RecordDict:
    """Return a trained update under its masks.

    row: ``(task.reply.rows.size,)`` float32, the trained factors in the order of
    ``task.reply.segments``. client_id: keys the rounding, as that of a codec.

    Raises `FederationError` out of order, `NonFiniteError` for an update that is not finite, and
    what the session raises for shares that are missing or changed.
    """
    order = read_phase(content)
    kept, session = _kept(sessions, order)
    terms = session.terms
    if task.order.round != terms.round:
        raise FederationError(
            f"{_SERVER}: expected a task of round {terms.round}, found {task.order.round}"
        )
    if task.reply.rows.size != terms.size:
        raise FederationError(
            f"{_SERVER}: expected {terms.size} trained numbers as its terms say, found "
            f"{task.reply.rows.size}"
        )
    sent = pack(task.reply.sent, task.reply.segments)
    difference = row.astype(np.float64) - sent
    if order.clipping_norm is not None:
        difference = _clipped(difference, order.clipping_norm, terms)
    draws = rng(task.order.seed, "secure", client_id, task.order.round)
    shares = read_parts(content, "shares", _SERVER)
    masked = session.mask(difference, shares, order.survivors, draws)
    reply = masked_record(masked, terms.bits)
    check_masked(reply, terms.size + 1, terms.bits)
    sessions.write(kept)
    return reply


def answer_agree(content: RecordDict, sessions: Sessions) -> RecordDict:
    """Tell the neighbors, by tags that the server cannot make, who this client was told is left.

    Raises `FederationError` out of order, and what the session raises for lists of survivors and
    dropouts that would uncover a single update.
    """
    order = read_phase(content)
    kept, session = _kept(sessions, order)
    reply = RecordDict({"tags": parts_record(session.agree(order.survivors, order.dropouts))})
    check_parts(reply, "tags", order.survivors)
    sessions.write(kept)
    return reply


def answer_unmask(content: RecordDict, sessions: Sessions) -> RecordDict:
    """Tell what removes the masks from the sum, and forget the round's secrets.

    Raises `FederationError` out of order, and what the session raises where too few others were
    told what this client was told.
    """
    order = read_phase(content)
    kept, session = _kept(sessions, order)
    revealed = session.reveal(read_parts(content, "tags", _SERVER))
    reply = RecordDict({"revealed": parts_record(revealed)})
    check_parts(reply, "revealed", session.terms.holders_of(session.index))
    sessions.write(replace(kept, session=None))
    return reply


def answer_phase(kind: str, content: RecordDict, sessions: Sessions) -> RecordDict:
    """Return a virtual client's answer in a phase without training, by its message type.

    Virtual clients are all the caller's own, and need no identities.
    """
    answers: Mapping[str, Callable[[RecordDict, Sessions], RecordDict]] = {
        KEYS: answer_keys,
        SHARES: answer_shares,
        AGREE: answer_agree,
    }
    return answers.get(kind, answer_unmask)(content, sessions)


def _kept(sessions: Sessions, order: PhaseOrder) -> tuple[Kept, ClientSession]:
    """Return the round that is under way."""
    kept = sessions.read()
    if kept is None or (kept.run, kept.round) != (order.run, order.round):
        found = "no round" if kept is None else f"round {kept.round} of {kept.run[:40]!r}"
        raise PhaseOrderError(
            f"{_SERVER}: expected a phase of a round that this client has begun, which is {found}, "
            f"found one of round {order.round} of {order.run[:40]!r}"
        )
    if kept.session is None:
        raise PhaseOrderError(
            f"{_SERVER}: expected nothing more of round {order.round}, in which this client has "
            "revealed its shares, found another phase"
        )
    return kept, kept.session


def _clipped(difference: Matrix, clipping_norm: float, terms: Terms) -> Matrix:
    """Return an update ``(n,)`` that is at most `clipping_norm` long after its rounding, too.

    Rounding moves a number by less than a step, so a vector by less than ``step * sqrt(n)``.
    """
    margin = terms.quantizer.step * math.sqrt(terms.size)
    if not margin < clipping_norm:
        raise SecureTermsError(
            f"{_SERVER}: expected room for rounding in a clipping_norm of {clipping_norm:g}, found "
            f"{margin:g} for it; take 64 bits, or fewer clients"
        )
    return clip(difference, clipping_norm - margin)
