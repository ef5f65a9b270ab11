"""Private rounds: draw a cohort in secret, add up what it sends, release noise, keep the ledger.

Central: each update is clipped, the sum is noised and divided by the expected cohort
(`fedlora.privacy.central`). Updates are read as a stream into one float64 row, so memory does not
grow with the cohort. Every round releases and is charged, be it one of an empty cohort.

Local: the devices clip and noise before they send (`fedlora.privacy.local`), and the server's part
is a plain sum over the expected cohort.

    OUT/privacy.jsonl          the ledger (`fedlora.privacy.ledger`)
    OUT/checkpoint/noise.key   the secret of a run of central privacy (0600)
    OUT/checkpoint/asked.jsonl whom a run of local privacy has asked (`fedlora.federation.asked`)

The ledger's line is on the disk before the checkpoint that releases what it stands for. What is
newer than the checkpoint was never released, and is dropped on resume: with the same replies, the
round that is done again releases the same numbers. A local line is written before devices are
asked, and stays: what they have sent in a round that was cut off has left them. The ledger counts
the most that any one device may have sent, so some local rounds add no line.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedlora.aggregation import Method, ServerState, Update
from fedlora.errors import RunError
from fedlora.experiment import ExperimentConfig, FederationConfig
from fedlora.federation.asked import ASKED, append_asked, read_asked
from fedlora.federation.checkpoint import Checkpoint
from fedlora.federation.replies import require_answerable
from fedlora.federation.sampling import draw_cohort
from fedlora.federation.summed import aggregate_mean, sent_row
from fedlora.flat import RowReader
from fedlora.low_rank import Matrix
from fedlora.privacy import PrivacyConfig, PrivacyEvent
from fedlora.privacy.accounting import calibrate, epsilon_of, grouped, rounded_up
from fedlora.privacy.audit.canaries import Canaries, Trace
from fedlora.privacy.central import CentralMechanism, PrivacyState, draw_members, event_of
from fedlora.privacy.clipping import count_noise
from fedlora.privacy.ledger import Ledger, LedgerLine
from fedlora.privacy.local import LocalNoise, local_event
from fedlora.privacy.noise import derive, make_key, read_key

__all__ = ["NOISE_KEY", "BudgetSpent", "CohortSum", "PrivateRounds"]

NOISE_KEY = "checkpoint/noise.key"

_log = logging.getLogger(__name__)


class BudgetSpent(Exception):
    """The next round would pass `max_epsilon`; the run ends before it."""


@dataclass(frozen=True, slots=True)
class CohortSum:
    """What a server keeps of a cohort."""

    total: Matrix  # (n,) float64, the sum of the clipped differences from what was sent
    replies: int
    below: int | None = None  # how many of them were within the clipping norm; None: nobody asked


class PrivateRounds:
    """The privacy of one run, between its rounds and in them."""

    def __init__(
        self,
        config: ExperimentConfig,
        privacy: PrivacyConfig,
        state: PrivacyState,
        ledger: Ledger,
        secret: bytes,
        asked: Counter[str] | None = None,
    ) -> None:
        self.state = state
        self._config, self._privacy = config, privacy
        self._ledger, self._secret = ledger, secret
        self._event: PrivacyEvent | None = None  # of the round that has begun
        self._asked = asked or Counter()  # local: how often each client was
        self.canaries = canaries_of(privacy, secret)
        self._drawn: tuple[str, ...] = ()  # the canaries of the round that has begun
        self.epsilon = self._epsilon(ledger.events())

    @classmethod
    def open(cls, config: ExperimentConfig, out: Path, checkpoint: Checkpoint) -> PrivateRounds:
        """Begin the privacy of a run, or go on with that of a checkpoint that has one.

        Calibrates where the experiment names an epsilon: once, for the rounds that it has then.
        Raises `RunError` for a missing key, or a ledger that does not fit the checkpoint, and
        `ConfigError` for what no noise can give.
        """
        privacy = config.privacy
        if privacy is None:
            raise RunError(f"{out}: expected an experiment with [privacy], found none")
        local = privacy.mechanism == "local"
        state, ledger, path = checkpoint.privacy, Ledger.read(out), out / NOISE_KEY
        round, secret, asked = checkpoint.state.round, b"", Counter[str]()
        if state is None:
            people = len(checkpoint.client_ids)
            state = PrivacyState(_multiplier(config, privacy, people), privacy.clipping_norm)
            # Before the first checkpoint a run starts anew, with the key that it may have made.
            if not local:
                secret = read_key(path) if path.exists() else make_key(path)
        elif not local:
            secret = read_key(path)
        if not local:
            ledger = ledger.drop_after(round)
            found = {line.round for line in ledger.lines}
            if found != set(range(1, round + 1)):
                raise RunError(
                    f"{ledger.path}: expected lines of all {round} rounds, found {len(found)} of "
                    "them; what the others cost is not known, and the run cannot go on"
                )
        else:
            asked, told = read_asked(out)
            most, paid = max(asked.values(), default=0), _paid(ledger)
            lost = set(range(1, round + 1)) - told
            # A run that was cut off between the two files has paid for a release that nobody made.
            if lost or not most <= paid <= most + 1:
                raise RunError(
                    f"{ledger.path}: expected lines for {most} releases of one device as in "
                    f"{ASKED}, which has {round - len(lost)} of {round} rounds, found {paid}; one "
                    "of the files was changed, what devices have sent is not known, and the run "
                    "cannot go on"
                )
        return cls(config, privacy, state, ledger, secret, asked)

    @property
    def local_noise(self) -> LocalNoise | None:
        """What devices are told to do; None: the server does it."""
        if self._privacy.mechanism == "central":
            return None
        return LocalNoise(self.state.clipping_norm, self.state.noise_multiplier)

    @property
    def mechanism(self) -> CentralMechanism:
        """The mechanism of the round that is next."""
        cohort = self._config.federation.cohort
        return CentralMechanism.of(self._secret, self._privacy, self.state, cohort)

    def begin(self, round: int, client_ids: Sequence[str]) -> tuple[str, ...]:
        """Return the cohort of a round; raise `BudgetSpent` where there is no budget for it."""
        federation, local = self._config.federation, self._privacy.mechanism == "local"
        ids = sorted(client_ids)
        population, size = _drawn_of(self._privacy, federation, len(ids))
        if local:
            cohort = draw_cohort(
                ids, federation.cohort, round, self._config.seed, federation.sampling
            )
            event = self._local_event(cohort)
        else:
            event = event_of(
                self.state.noise_multiplier,
                population,
                size,
                federation.sampling,
                self._relation,
            )
        most = self._privacy.max_epsilon or self._privacy.epsilon
        after = self._epsilon([*self._ledger.events(), event])
        if most is not None and after > most:
            raise BudgetSpent(
                f"round {round} would make epsilon {rounded_up(after, 4):.4f}, over "
                f"max_epsilon = {most:g}"
            )
        self._event = event
        if local:
            self._asked.update(cohort)
            self._charge_local(round, event)
            append_asked(self._ledger.path.parent, round, cohort)
            return cohort
        places = draw_members(self._secret, round, population, size, federation.sampling)
        self._drawn = tuple(
            self.canaries.ids[place - len(ids)] for place in places if place >= len(ids)
        )
        return tuple(ids[place] for place in places if place < len(ids))

    def release(self, method: Method, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Add up a cohort's updates as they come, and return the state after the round.

        Raises as `release_sum` does.
        """
        return self.release_sum(method, state, self.add_up(method, state, updates))

    def add_up(self, method: Method, state: ServerState, updates: Iterable[Update]) -> CohortSum:
        """Return the sum of what clients have changed, each clipped where the server is to.

        The canaries that were drawn are among them, as if they had replied.
        """
        sent = sent_row(method, state).astype(np.float64)
        row_of = RowReader(state.trainable, method.uploaded(state.round + 1))
        mechanism = None if self._privacy.mechanism == "local" else self.mechanism
        total, replies, below = np.zeros(len(sent)), 0, 0
        canaries = self.canaries.updates(
            self._drawn, _kind(method, state), len(sent), self.state.clipping_norm
        )
        clients = (row_of(update.adapter) - sent for update in updates)
        for difference in itertools.chain(clients, canaries):
            if mechanism is not None:
                below += mechanism.is_below(difference)
                difference = mechanism.clip(difference)
            total += difference
            replies += 1
        adaptive = self._privacy.target_quantile is not None
        return CohortSum(total, replies, below if adaptive else None)

    def release_sum(self, method: Method, state: ServerState, found: CohortSum) -> ServerState:
        """Charge the round that has begun, noise its sum, and return the state after it.

        With local privacy the sum has its noise, and the round was charged when it began.

        Raises `NonFiniteError` for noise that no adapter can hold; the round is charged.
        """
        round, trace = state.round + 1, None
        if self._privacy.mechanism == "local":
            mean = found.total / self._config.federation.cohort
        else:
            if self._event is None:
                raise RunError(f"round {round}: expected it to have begun before its release")
            mechanism = self.mechanism
            mean = mechanism.release(found.total, round, found.below)
            self._charge(round, self._event, mechanism)
            if self.canaries.count:
                released = mean * mechanism.denominator
                before = Trace.of_state(state.method_state)
                trace = before.after(_kind(method, state), released, mechanism.clipping_norm)
            if found.below is not None:
                norm = mechanism.next_norm(found.total, round, found.below, found.replies)
                self.state = replace(self.state, clipping_norm=norm)
        self._event = None
        after = aggregate_mean(method, state, mean)
        require_answerable(after.trainable)
        if trace is None:
            return after
        kept: dict[str, Any] = {**after.method_state, **trace.to_state()}  # of float64: a long sum
        return replace(after, method_state=kept)

    @property
    def _relation(self) -> Literal["add-or-remove-one", "replace-one"] | None:
        lines = self._ledger.lines
        return lines[0].event.neighboring_relation if lines else None

    def _charge(self, round: int, event: PrivacyEvent, mechanism: CentralMechanism) -> None:
        """Write down what a round releases: its sum, and the count of an adaptive norm."""
        # In norms: 2 where one person more takes another's place.
        moves = mechanism.noise_multiplier / event.noise_multiplier
        notes = () if moves == 1 else ("one person more takes another's place in the cohort",)

        def write(multiplier: float, norm: float, kind: Literal["central", "count"]) -> None:
            # Multipliers are the same to the last bit in all rounds: equal events are grouped.
            each = replace(event, noise_multiplier=multiplier / moves)
            line = LedgerLine(round, each, moves * norm, multiplier * norm, kind, notes)
            self._ledger = self._ledger.append(line)

        write(mechanism.sum_multiplier, mechanism.clipping_norm, "central")
        if mechanism.target_quantile is not None:
            # Of a count that one client moves by a half at most: see `share_below`.
            write(2 * count_noise(mechanism.denominator), 0.5, "count")
        self.epsilon = self._epsilon(self._ledger.events())

    def _charge_local(self, round: int, event: PrivacyEvent) -> None:
        if event.count:
            norm, z = self.state.clipping_norm, self.state.noise_multiplier
            self._ledger = self._ledger.charge(LedgerLine(round, event, norm, z * norm, "local"))
        self.epsilon = self._epsilon(self._ledger.events())

    def _local_event(self, cohort: Sequence[str]) -> PrivacyEvent:
        """Return what is new of the most that any one client has sent, if all of these answer."""
        after = self._asked.copy()
        after.update(cohort)
        most = max(after.values(), default=0)
        return local_event(self.state.noise_multiplier, max(0, most - _paid(self._ledger)))

    def _epsilon(self, events: Sequence[PrivacyEvent]) -> float:
        return _epsilon_of(grouped(events), self._privacy.delta, self._privacy.accountant)


def canaries_of(privacy: PrivacyConfig, secret: bytes) -> Canaries:
    """Return the canaries of a run with this secret; they are none without any."""
    count = 0 if privacy.mechanism == "local" else privacy.canaries
    return Canaries(count, derive(secret, "canaries") if count else b"")


def _kind(method: Method, state: ServerState) -> str:
    """Return which factors the rows of the next round hold."""
    return "+".join(sorted(method.uploaded(state.round + 1)))


def _drawn_of(
    privacy: PrivacyConfig, federation: FederationConfig, clients: int
) -> tuple[int, int]:
    """Return of how many a cohort is drawn, and of what expected size: canaries are among them.

    Where all clients take part in every round, so do all canaries.
    """
    population = clients + privacy.canaries
    return population, federation.cohort if federation.cohort < clients else population


def _paid(ledger: Ledger) -> int:
    """Return for how many releases of one device a local ledger pays."""
    return sum(line.event.count for line in ledger.lines)


@functools.lru_cache(maxsize=64)
def _epsilon_of(events: tuple[PrivacyEvent, ...], delta: float, accountant: str) -> float:
    return epsilon_of(events, delta, accountant)


def _multiplier(config: ExperimentConfig, privacy: PrivacyConfig, population: int) -> float:
    """Return the run's noise multiplier: the given one, or that which its epsilon allows."""
    if privacy.noise_multiplier is not None or privacy.epsilon is None:
        return privacy.noise_multiplier or 0.0
    federation = config.federation
    of: Callable[[float], PrivacyEvent]
    if privacy.mechanism == "local":
        of = local_event  # in the worst case everyone is drawn in every round
    else:
        drawn_of = _drawn_of(privacy, federation, population)

        def of(multiplier: float) -> PrivacyEvent:
            return event_of(multiplier, *drawn_of, federation.sampling)

    found = calibrate(
        privacy.epsilon, privacy.delta, max(1, federation.rounds), of, privacy.accountant
    )
    _log.info("noise multiplier %.4f for epsilon %g", found, privacy.epsilon)
    return found
