"""A method that exercises what no averaging does: a frozen part, and a rank for each client."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from fedlora.adapter import Adapter, LoraLayer, stack
from fedlora.aggregation import Broadcast, ClientProfile, Method, ServerState, Update
from fedlora.training import LocalRule

MOST = 6  # rank of the frozen part
asked: list[tuple[int, int | None]] = []  # (round, rank) of each call of `broadcast`


def stacking() -> Method:
    """Put the mean of the updates' products into the frozen part; clients begin from B = 0."""
    return Method(
        name="stacking",
        trained=lambda round: frozenset({"A", "B"}),
        shared=frozenset({"A", "B"}),
        aggregate=aggregate,
        broadcast=broadcast,
        local=LocalRule(),
        exact=False,  # it is cut to MOST
        linear=False,
    )


def aggregate(state: ServerState, updates: Iterable[Update]) -> ServerState:
    found = list(updates)
    total = sum(update.num_examples for update in found)
    mean = [u.adapter.scaled(u.num_examples / total) for u in sorted(found, key=_client)]
    known = [] if state.frozen is None else [state.frozen]
    frozen = stack([*known, *mean]).truncated(MOST)
    return replace(state, round=state.round + 1, frozen=frozen)


def broadcast(state: ServerState, profile: ClientProfile) -> Broadcast:
    """Send the first rows of A: another object at every call."""
    asked.append((state.round + 1, profile.rank))
    if profile.rank is None:
        return state.broadcast
    return Broadcast(first(state.trainable, profile.rank), state.frozen)


def first(adapter: Adapter, rank: int) -> Adapter:
    def cut(layer: LoraLayer) -> LoraLayer:
        return replace(layer, A=layer.A[:rank], B=layer.B[:, :rank])

    return adapter.map(cut)


def _client(update: Update) -> str:
    return update.client_id
