"""A round of a secure sum without messages: every client is lost where it is told to be."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from fedlora.errors import SecureAggregationError
from fedlora.privacy.secure import Advertisement, ClientSession, Identity, ServerSession, Terms

PHASES = ("keys", "shares", "masked", "agree", "unmask")


def terms_of(clients: int = 5, threshold: int | None = None, **changes: object) -> Terms:
    """Terms of a small round: more than half of the clients are enough."""
    plain = {
        "run": "run-1",
        "round": 3,
        "size": 16,
        "clients": clients,
        "threshold": clients // 2 + 1 if threshold is None else threshold,
        "neighbors": None,
        "bits": 32,
        "clipping_range": 1.0,
    }
    return Terms.from_plain(plain | changes)


def vectors_of(terms: Terms, seed: int = 0) -> np.ndarray:
    """(clients, size) float64 within the clipping range."""
    shape = terms.clients, terms.size
    return np.random.default_rng(seed).uniform(-1, 1, shape) * terms.clipping_range


@dataclass
class Round:
    """Server and clients; each step drives one phase, for all who are still there.

    lost: by phase, whose message does not reach the server. A client that refuses something, or
    whose message the server refuses, is lost from then on, and its error is kept.
    """

    terms: Terms
    lost: Mapping[str, Collection[int]] = field(default_factory=dict)
    identities: Mapping[int, Identity] | None = None
    stored: bool = False  # sessions become bytes and back between all phases

    def __post_init__(self) -> None:
        self.known = None
        if self.identities is not None:
            self.known = {i: who.public_bytes for i, who in self.identities.items()}
        self.server = ServerSession(self.terms, self.known)
        self.clients: dict[int, ClientSession] = {}
        self.errors: dict[int, SecureAggregationError] = {}

    def step(self, phase, index, work) -> None:
        """Let a client do its part of a phase, unless it is gone."""
        if index in self.errors:
            return
        try:
            send = work()
            if self.stored:
                self.clients[index] = ClientSession.from_bytes(self.clients[index].to_bytes())
            if index not in self.lost.get(phase, ()):
                send()
        except SecureAggregationError as error:
            self.errors[index] = error

    def keys(self, changed=lambda index, data: data) -> Round:
        """Run the first phase. changed: of a client's bytes on their way to the server."""

        def work(index):
            identity = None if self.identities is None else self.identities[index]
            self.clients[index], ad = ClientSession.begin(self.terms, index, identity)
            data = changed(index, ad.to_bytes())
            return lambda: self.server.add_advertisement(index, Advertisement.from_bytes(data))

        for index in range(self.terms.clients):
            self.step("keys", index, lambda i=index: work(i))
        return self

    def shares(
        self, changed=lambda index, messages: messages, seen=lambda index, ads: ads
    ) -> Round:
        """Run the second. seen: of the directory on its way to a client."""

        def work(index):
            directory = seen(index, self.server.directory_for(index))
            messages = changed(index, self.clients[index].share(directory, self.known))
            return lambda: self.server.add_shares(index, messages)

        for index in self.server.directory():
            self.step("shares", index, lambda i=index: work(i))
        return self

    def masked(
        self, vectors, seen=lambda index, messages: messages, changed=lambda index, vector: vector
    ) -> Round:
        """Run the third."""
        sharing = self.server.survivors_of_sharing

        def work(index):
            draws = np.random.default_rng(index)
            messages = seen(index, self.server.shares_for(index))
            masked = self.clients[index].mask(vectors[index], messages, sharing, draws)
            return lambda: self.server.add_masked(index, changed(index, masked))

        for index in sharing:
            self.step("masked", index, lambda i=index: work(i))
        return self

    def agree(self, changed=lambda index, tags: tags) -> Round:
        """Run the fourth."""
        lists = self.server.survivors, self.server.dropouts

        def work(index):
            tags = changed(index, self.clients[index].agree(*lists))
            return lambda: self.server.add_agreement(index, tags)

        for index in lists[0]:
            self.step("agree", index, lambda i=index: work(i))
        self.agreed = [i for i in lists[0] if i not in {*self.errors, *self.lost.get("agree", ())}]
        return self

    def unmask(self, changed=lambda index, revealed: revealed) -> Round:
        """Run the fifth, after the fourth where that was not run."""
        if not hasattr(self, "agreed"):
            self.agree()

        def work(index):
            revealed = changed(index, self.clients[index].reveal(self.server.tags_for(index)))
            return lambda: self.server.add_reveal(index, revealed)

        for index in self.agreed:
            self.step("unmask", index, lambda i=index: work(i))
        return self


def assert_total(found: Round, vectors: np.ndarray, survivors: Collection[int]) -> None:
    """The sum is that of the survivors' vectors, within the quantizer's bound."""
    total = found.server.total()
    assert total.survivors == tuple(sorted(survivors))
    assert total.count == len(survivors)
    exact = vectors[sorted(survivors)].sum(axis=0)
    # Float64 itself: a few roundings of numbers of the sum's size.
    rounding = 1e-14 * total.count * found.terms.clipping_range
    bound = found.terms.quantizer.error_bound(total.count) + rounding
    assert np.abs(total.sum - exact).max() < bound
