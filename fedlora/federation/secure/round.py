"""A round whose server learns the sum of its clients' updates, and none of them: five phases.

    train.keys     every client of the cohort draws keys and advertises the public ones
    train.shares   each deals shares of its secrets to its neighbors, sealed for them
    train.masked   the model goes down; each trains, and sends its update under masks
    train.agree    those whose update came make sure that all were told the same of who is left
    train.unmask   those whose update came tell what removes the masks from the sum, and only that

The cryptography is that of `fedlora.privacy.secure`; here are the messages. Each phase is an
exchange of its own through the run's grid, with its deadline and quorum. The masked one is the
exchange that Flower's strategy does anyway, so the first two belong to its beginning and the last
two to its end.

A client that fails, declines or is silent in a phase is out of the round, by name and with the
phase, and the others go on. With fewer than the threshold left the round is given up and nothing is
revealed. Whoever has sent its update stays in the sum, whatever it does in the last two phases.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence

from flwr.app import ConfigRecord, Message, RecordDict

from fedlora.errors import (
    ConfigError,
    SecureAggregationError,
    SecureTermsError,
    ThresholdError,
)
from fedlora.experiment import ExperimentConfig
from fedlora.federation.phases import PhaseClock
from fedlora.federation.secure.phase import Member, Phase
from fedlora.federation.secure.records import (
    AGREE,
    KEYS,
    MASKED,
    SHARES,
    UNMASK,
    PhaseOrder,
    keys_content,
    parts_record,
    phase_record,
    read_advertisement,
    read_masked,
    read_parts,
)
from fedlora.privacy import SecureAggregationConfig
from fedlora.privacy.secure import Advertisement, SecureTotal, ServerSession, Terms

__all__ = [
    "Exchange",
    "SecureRound",
    "begin_secure",
    "least_clients",
    "phases_told",
    "require_terms",
]

# Sends messages and returns their replies as they come, within the round's time.
Exchange = Callable[[Iterable[Message]], Iterable[Message]]


def least_clients(config: SecureAggregationConfig, cohort: int) -> int:
    """Return the fewest clients of a cohort whose sum may be revealed: never one alone.

    >>> [least_clients(SecureAggregationConfig(threshold=0.6), cohort) for cohort in (1, 2, 5, 10)]
    [2, 2, 3, 6]
    """
    return max(2, math.ceil(config.threshold * cohort - 1e-9))  # 0.6 * 5 is a little over 3


class SecureRound:
    """The phases of one round; `phases` holds those that are over, in order.

    members: the clients of the cohort that are connected. exchange: sends messages and returns
    their replies as they come. clipping_norm: what each client clips its whole update to, as an L2
    norm; None: to nothing. clock: of the round.

    Once fewer clients than the threshold are left, `given_up` says so, and what is still called
    does nothing.
    """

    def __init__(
        self,
        terms: Terms,
        members: Sequence[Member],
        exchange: Exchange,
        *,
        clipping_norm: float | None = None,
        clock: PhaseClock | None = None,
    ) -> None:
        self.terms, self.members = terms, tuple(members)
        self.phases: list[Phase] = []
        self.given_up: str | None = None
        self._names = {member.node: member.client_id for member in members}
        self._send, self._clock = exchange, clock or PhaseClock()
        self._clipping_norm = clipping_norm
        self._server = ServerSession(terms)
        self._signers: dict[int, bytes] = {}  # SHA-256 of the public keys, by place
        self._masked = self._phase(MASKED)

    def begin(self, setup: ConfigRecord) -> None:
        """Carry out the two phases before the training.

        setup: the record by which clients open their data.
        """

        def keys(member: Member) -> RecordDict:
            return keys_content(self.terms, member.place, setup)

        def directory(member: Member) -> RecordDict:
            near = self._server.directory_for(member.place)
            content = RecordDict(
                {
                    "secure": self._order(),
                    "directory": parts_record({p: ad.to_bytes() for p, ad in near.items()}),
                }
            )
            if signers := {p: self._signers[p] for p in near if p in self._signers}:
                content["signers"] = parts_record(signers)
            return content

        advertised = self._exchange(KEYS, self.members, keys, self._take_advertisement)
        self._exchange(SHARES, advertised, directory, self._take_shares)
        if self.given_up is None:
            try:
                _ = self._server.survivors_of_sharing
            except ThresholdError as error:
                self.given_up = str(error)

    def messages(self, content: Callable[[Member], RecordDict]) -> Iterator[Message]:
        """Yield the messages of the training; content: the ordinary message for a client."""
        if self.given_up is not None:
            return iter(())
        server = self._server
        order = self._order(server.survivors_of_sharing, clipping_norm=self._clipping_norm)

        def masking(member: Member) -> RecordDict:
            records = content(member)
            records["secure"] = order.copy()
            records["shares"] = parts_record(server.shares_for(member.place))
            return records

        return self._masked.messages((member, masking(member)) for member in self._sharing())

    def finish(self, replies: Iterable[Message]) -> SecureTotal | None:
        """Add up the masked updates as they come, and have the masks removed.

        Return the sum; None if the round was given up.
        """
        if self.given_up is not None:
            return None
        masked = self._masked
        masked.read(replies, self._take_masked, self._clock)
        self.phases.append(masked)
        self._require_enough(masked)
        lists = self._order(self._server.survivors, self._server.dropouts)

        def agree(_: Member) -> RecordDict:
            return RecordDict({"secure": lists.copy()})

        def unmask(member: Member) -> RecordDict:
            tags = parts_record(self._server.tags_for(member.place))
            return RecordDict({"secure": self._order(), "tags": tags})

        agreed = self._exchange(AGREE, masked.right, agree, self._take_tags)
        self._exchange(UNMASK, agreed, unmask, self._take_revealed)
        return None if self.given_up is not None else self._total()

    def _total(self) -> SecureTotal | None:
        try:
            return self._server.total()
        except SecureAggregationError as error:
            self.given_up = str(error)
            return None

    @property
    def contributors(self) -> Sequence[Member]:
        """The clients whose updates are in the sum; none if the round was given up."""
        return () if self.given_up is not None else self._masked.right

    @property
    def left(self) -> Sequence[Member]:
        """The clients that were still in the round when it ended."""
        return self.phases[-1].right if self.phases else self.members

    def _sharing(self) -> list[Member]:
        """Return who may train: with few neighbors, one may have lost too many of them."""
        sharing = frozenset(self._server.survivors_of_sharing)
        shared = self.phases[-1]
        for member in shared.right:
            if member.place not in sharing:
                shared.drop(member.client_id, "too few of its neighbors are left")
        return [member for member in shared.right if member.place in sharing]

    def _exchange(
        self,
        kind: str,
        members: Sequence[Member],
        content: Callable[[Member], RecordDict],
        take: Callable[[Member, RecordDict], None],
    ) -> Sequence[Member]:
        """Carry out one phase that is an exchange of its own; return whose answer is right."""
        if self.given_up is not None:
            return ()
        phase = self._phase(kind)
        before = self._clock.enter(phase.name)
        messages = phase.messages((member, content(member)) for member in members)
        phase.read(self._send(messages), take)
        self._clock.enter(before)
        self.phases.append(phase)
        self._require_enough(phase)
        return phase.right

    def _phase(self, kind: str) -> Phase:
        # A private round waits for everyone: a reply must not shut another out.
        patient = self._clipping_norm is not None
        return Phase(kind, self.terms.round, self._names, patient)

    def _order(
        self,
        survivors: tuple[int, ...] = (),
        dropouts: tuple[int, ...] = (),
        clipping_norm: float | None = None,
    ) -> ConfigRecord:
        terms = self.terms
        order = PhaseOrder(terms.run, terms.round, survivors, dropouts, clipping_norm)
        return phase_record(order)

    def _require_enough(self, phase: Phase) -> None:
        if len(phase.right) < self.terms.threshold:
            self.given_up = (
                f"the secure sum was given up after its phase {phase.name!r}: expected at least "
                f"{self.terms.threshold} of {self.terms.clients} clients, found "
                f"{len(phase.right)}; no update was revealed"
            )

    def _take_advertisement(self, member: Member, content: RecordDict) -> None:
        data, signer = read_advertisement(content, _who(member))
        self._server.add_advertisement(member.place, Advertisement.from_bytes(data))
        if signer is not None:
            self._signers[member.place] = signer

    def _take_shares(self, member: Member, content: RecordDict) -> None:
        self._server.add_shares(member.place, read_parts(content, "shares", _who(member)))

    def _take_masked(self, member: Member, content: RecordDict) -> None:
        row = read_masked(content, self.terms.size + 1, self.terms.bits, _who(member))
        self._server.add_masked(member.place, row)

    def _take_tags(self, member: Member, content: RecordDict) -> None:
        self._server.add_agreement(member.place, read_parts(content, "tags", _who(member)))

    def _take_revealed(self, member: Member, content: RecordDict) -> None:
        self._server.add_reveal(member.place, read_parts(content, "revealed", _who(member)))


def _who(member: Member) -> str:
    return f"client {member.client_id!r}"


def phases_told(secure: SecureRound | str | None) -> dict[str, dict[str, int]]:
    """Return what a round's record says of the phases: clients, and bytes up and down."""
    phases = secure.phases if isinstance(secure, SecureRound) else []
    return {
        phase.name: {
            "clients": len(phase.right),
            "bytes_up": phase.bytes_up,
            "bytes_down": phase.bytes_down,
        }
        for phase in phases
    }


def require_terms(config: ExperimentConfig, size: int) -> None:
    """Raise `ConfigError` for a secure sum that no round of the expected cohort could do.

    size: numbers in an update.
    """
    secure, cohort = config.secure_aggregation, config.federation.cohort
    if secure is None:
        return
    if cohort < 2:
        raise ConfigError(
            f"federation.cohort: expected 2 or more with [secure_aggregation], found {cohort}; the "
            "sum of one client is its update"
        )
    try:
        _terms(config, secure, "", 0, cohort, size, secure.neighbors)
    except SecureTermsError as error:
        raise ConfigError(f"secure_aggregation: {error}") from None


def begin_secure(
    config: ExperimentConfig,
    *,
    run: str,
    round: int,
    cohort: int,
    members: Sequence[Member],
    size: int,
    setup: ConfigRecord,
    exchange: Exchange,
    clock: PhaseClock,
) -> SecureRound | str:
    """Return a round after the phases before its training; a text: why there can be none.

    run: the run's name. cohort: clients that were drawn, be they connected or not. size: numbers in
    an update. The others are those of `SecureRound`.
    """
    secure = config.secure_aggregation
    if secure is None:
        raise ConfigError("secure_aggregation: expected the table, found none")
    least = least_clients(secure, cohort)
    if len(members) < least:
        return (
            f"no secure sum was begun: expected at least {least} connected clients of {cohort}, "
            f"found {len(members)}"
        )
    # A round that is tried again is another one: nothing of the first attempt fits into it.
    name = f"{run}/{secrets.token_hex(8)}"
    try:
        terms = _terms(config, secure, name, round, cohort, size, secure.neighbors)
    except SecureTermsError:  # the graph is too sparse for a smaller cohort than expected
        terms = _terms(config, secure, name, round, cohort, size, None)
    norm = None if config.privacy is None else config.privacy.clipping_norm
    found = SecureRound(terms, members, exchange, clipping_norm=norm, clock=clock)
    found.begin(setup)
    return found


def _terms(
    config: ExperimentConfig,
    secure: SecureAggregationConfig,
    run: str,
    round: int,
    cohort: int,
    size: int,
    neighbors: int | None,
) -> Terms:
    clipping_range = secure.clipping_range
    if clipping_range is None and config.privacy is not None:
        clipping_range = config.privacy.clipping_norm
    return Terms(
        run=run,
        round=round,
        size=size,
        clients=cohort,
        threshold=least_clients(secure, cohort),
        neighbors=None if neighbors is None or neighbors >= cohort - 1 else neighbors,
        bits=secure.bits,
        clipping_range=clipping_range or 0.0,  # the config asks for one of the two
    )
