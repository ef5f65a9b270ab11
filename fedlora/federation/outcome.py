"""What a round's replies make of the server's state: by a method, from noise, from a secure sum."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator

import numpy as np
from flwr.app import Message

from fedlora.aggregation import Method, ServerState, Update
from fedlora.errors import NonFiniteError, TooFewUpdatesError
from fedlora.federation.current_round import CurrentRound
from fedlora.federation.private_sum import CohortSum, PrivateRounds
from fedlora.federation.replies import require_answerable
from fedlora.federation.secure.round import SecureRound
from fedlora.federation.summed import aggregate_mean, sent_row
from fedlora.privacy.secure import SecureTotal

__all__ = ["aggregated", "released", "summed", "total_of"]

_log = logging.getLogger(__name__)


def aggregated(
    method: Method, state: ServerState, current: CurrentRound, updates: Iterator[Update]
) -> ServerState | None:
    """Return the state after the round; None without a valid update, or with no use for them.

    Replies that are right one by one may be too few for a rule, or too large in sum for float32 or
    for the next round's replies. Nobody knows then whose fault it is: all are dropped with the
    reason, and the round is given up.
    """
    first = next(updates, None)
    if first is None:
        return None
    try:
        after = method.aggregate(state, itertools.chain([first], updates))
        require_answerable(after.trainable)
    except (NonFiniteError, TooFewUpdatesError) as error:
        for _ in updates:  # who has answered is not called silent
            pass
        known = isinstance(error, TooFewUpdatesError)
        current.failures += 0 if known else len(current.valid)
        current.give_up(current.valid, str(error) if known else f"all updates together: {error}")
        return None
    return after


def released(
    private: PrivateRounds,
    method: Method,
    state: ServerState,
    current: CurrentRound,
    updates: Iterator[Update],
) -> ServerState | None:
    """Return the state after a private round; None for noise that no adapter can hold.

    It is released and charged with whoever has replied, also with nobody.
    """
    found = private.add_up(method, state, updates)
    return _released_sum(private, method, state, current, found)


def summed(
    private: PrivateRounds | None,
    method: Method,
    state: ServerState,
    current: CurrentRound,
    total: SecureTotal | None,
) -> ServerState | None:
    """Return the state after a round of which the sum alone is known; None: it was given up.

    None as `aggregated` does, or as `released` in a run with privacy.
    """
    if private is not None:
        nobody = CohortSum(np.zeros(len(sent_row(method, state))), 0)
        found = nobody if total is None else CohortSum(total.sum, total.count)
        return _released_sum(private, method, state, current, found)
    if total is None:
        return None
    try:
        after = aggregate_mean(method, state, total.sum / total.count)
        require_answerable(after.trainable)
    except NonFiniteError as error:
        current.give_up(current.valid, f"all updates together: {error}")
        return None
    return after


def total_of(
    current: CurrentRound, secure: SecureRound, replies: Iterable[Message], steps: int
) -> SecureTotal | None:
    """Return the sum, and note what came of the phases; None: the round is given up.

    steps: of a client. What it does not tell and the order does not say counts as none.
    """
    total = secure.finish(replies)
    for phase in secure.phases:
        for dropped in phase.dropped:
            current.drop(dropped.client, dropped.reason)
        current.declined += phase.declined
        current.failures += phase.failures
        current.bytes_up += phase.bytes_up
        current.bytes_down += phase.bytes_down
        current.late += phase.late
    if total is None:
        current.give_up([m.client_id for m in secure.left], secure.given_up or "")
    else:
        current.valid = {member.client_id: steps for member in secure.contributors}
    return total


def _released_sum(
    private: PrivateRounds,
    method: Method,
    state: ServerState,
    current: CurrentRound,
    found: CohortSum,
) -> ServerState | None:
    try:
        return private.release_sum(method, state, found)
    except NonFiniteError as error:
        _log.warning("round %d: given up, and charged: %s", current.number, error)
        current.give_up(current.valid, f"all updates together: {error}")
        return None
