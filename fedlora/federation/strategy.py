"""The rounds of a run as a Flower Strategy: draw a cohort, send, check every reply, aggregate.

It is a Flower `Strategy` of its own and not a `FedAvg`, whose averaging believes shapes, weights
and NaN. Flower's loop (`Strategy.start`) is used as it is; only its round number is not: it counts
from 1 after a resume, so the round here is always the state's.

A client that fails, or whose reply is wrong, is dropped with its reason, and the round goes on with
the others. Replies are read one at a time into the method's streaming sum, so memory does not grow
with the cohort.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedlora.aggregation import ClientProfile, Method, ServerState, Update
from fedlora.errors import (
    FederationError,
    FedloraError,
)
from fedlora.experiment import ExperimentConfig
from fedlora.federation.checkpoint import Checkpoint, Dropped, RoundRecord
from fedlora.federation.codecs import FP32, Codecs, agreed
from fedlora.federation.current_round import CurrentRound, Sent
from fedlora.federation.limits import DECLINED, read_declined
from fedlora.federation.outcome import aggregated, released, summed, total_of
from fedlora.federation.phases import PhaseClock, slowest_and_median
from fedlora.federation.population import counted, deal_ranks, named_run, total_weight, with_answers
from fedlora.federation.prepared import Prepared, PrepareOnce
from fedlora.federation.private_sum import PrivateRounds
from fedlora.federation.quorum import Replies
from fedlora.federation.records import (
    ClientSetup,
    TrainOrder,
    to_record,
)
from fedlora.federation.replies import (
    Reply,
    decode_reply,
    reply_bytes,
)
from fedlora.federation.roster import Roster
from fedlora.federation.sampling import draw_cohort
from fedlora.federation.secure.phase import Member
from fedlora.federation.secure.round import SecureRound, begin_secure, phases_told
from fedlora.federation.summed import sent_row
from fedlora.privacy.secure import SecureTotal

__all__ = ["FederatedLora", "most_failed_rounds"]

# Without one valid update in so many rounds in a row, and from so many clients, a run is given up.
# By rounds alone, 86 % of all runs of 100 rounds would end whose cohort is one client and which
# lose 30 % of their messages by chance; that twelve in a row are lost happens in one of 30,000.
MAX_FAILED_ROUNDS = 3
MAX_FAILED_CLIENTS = 12
# A round that its devices declined is tried again after a pause, which doubles up to the longest.
# A night of declining must neither end a run nor use up its rounds; a week is an owner's holiday.
SHORTEST_PAUSE = 60.0  # seconds
LONGEST_PAUSE = 900.0
MOST_PAUSES = 7 * 24 * 3600.0  # in all, without one update or failure between them

_log = logging.getLogger(__name__)


class FederatedLora(Strategy):
    """Federated LoRA by a `Method`, from a checkpoint on.

    `nodes` maps client ids to the node ids that Flower gave them in this run, `codecs` to the
    codecs that they know; who is not named there knows fp32 alone. After each round `save` gets the
    new checkpoint and the round's record; `checkpoint` is always the latest.
    `roster`: who is connected now, asked before each round; None: the same nodes all along.
    A round without an update in which as many clients declined as failed (or more; silence is
    neither) is no failed one: it is tried again, with another cohort, after `pause` seconds.
    private: what makes the rounds private; then each of them releases noise, also one without an
    update, and none is tried again.
    timeout: seconds for each phase of a secure sum that is an exchange of its own.

    Raises `FederationError` after `most_failed_rounds` rounds in a row without an update, and after
    a week of nothing but declining; `BudgetSpent` before a round that would pass `max_epsilon`.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        method: Method,
        checkpoint: Checkpoint,
        nodes: Mapping[str, int],
        save: Callable[[Checkpoint, RoundRecord], None],
        roster: Roster | None = None,
        codecs: Mapping[str, Sequence[str]] | None = None,
        *,
        pause: Callable[[float], None] = time.sleep,
        private: PrivateRounds | None = None,
        timeout: float = 3600.0,
    ) -> None:
        self.config = config
        self.method = method
        self._private = private
        self._nodes = dict(nodes)
        self._save = save
        self._roster = roster
        self._codecs = dict(codecs or {})
        self._otherwise: set[str] = set()  # clients that were said to travel otherwise
        self._round: CurrentRound | None = None
        self._run = named_run(checkpoint.run, config, method)
        self._save_seconds = 0.0
        self._have_clients(checkpoint)
        self._pause = pause
        self._timeout = timeout
        self._again = 0  # cohorts that have declined the round that is next
        self._paused = 0.0  # seconds, for their sake

    def connected(self) -> Mapping[str, int]:
        """Return the nodes of the clients that are here now, by client id."""
        if self._roster is not None:
            self._nodes, _ = self._roster.update()
        return self._nodes

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw the cohort and yield one message per client, each with its own records."""
        number = self.checkpoint.state.round + 1
        clock = PhaseClock(self._save_seconds)
        if self._roster is not None:
            self._nodes, answers = self._roster.update()
            self._codecs |= {client_id: answer.codecs for client_id, answer in answers.items()}
            told = with_answers(self.checkpoint, answers, joining=number)
            if told is not self.checkpoint:
                self._have_clients(told)
        cohort = self._cohort(number)
        self._round = current = CurrentRound(number, cohort, clock=clock)
        if self.config.secure_aggregation is not None:
            self._begin_secure(current, grid)
        messages = clock.within("prepare", self._messages(current))
        clock.enter("send")
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate the valid replies as they come, and save the checkpoint."""
        current = self._round
        if current is None:
            raise FederationError("aggregate_train was called before configure_train")
        current.clock.enter("aggregate")
        received = current.clock.within("wait", replies)
        if current.secure is None and isinstance(replies, Replies):
            # A private round waits for everyone: a reply must not shut another out.
            private = self._private
            replies.count_by(lambda: len(current.valid) if private is None else 0)
        method, state, private = self.method, self.checkpoint.state, self._private
        if current.secure is not None:
            after = summed(private, method, state, current, self._total(current, replies))
        elif private is None:
            after = aggregated(method, state, current, self._updates(current, received))
        else:
            after = released(private, method, state, current, self._updates(current, received))
        # A private round has released its noise: it does not come again.
        declined = self._private is None and after is None and current.is_declined
        # A round that fails changes nothing but the number; one that is tried again, not even that.
        number = current.number - declined
        state = after or replace(self.checkpoint.state, round=number)
        silent = "no reply in time"
        if isinstance(replies, Replies):
            if current.secure is None:  # whose phases count for themselves
                current.late = replies.late
                current.bytes_up += replies.late_bytes
            if replies.ended == "quorum":
                silent = "not waited for: the round had its quorum"
        for sent in current.awaited.values():
            current.drop(sent.client_id, silent)
        before = replace(self.checkpoint, state=state)
        if self._private is not None:
            before = replace(before, privacy=self._private.state)
        counts = after is not None and (self._private is None or bool(current.valid))
        self._finish(current, before, updated=counts)
        self._wait_for_the_willing(current, declined=not counts and current.is_declined)
        loss = current.loss
        return None, None if loss is None else MetricRecord({"loss": loss})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send nothing: a client evaluates in the message that it trains in, or after the run."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return nothing; see `configure_evaluate`."""
        return None

    def summary(self) -> None:
        """Log what this run does."""
        _log.info(
            "%s: %d clients, %d held out, cohort %d (%s)",
            self.method.name,
            len(self._clients),
            len(self.checkpoint.held_out),
            self.config.federation.cohort,
            self.config.federation.sampling,
        )

    def _have_clients(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint whose clients may be others than before."""
        weight = total_weight(checkpoint, self.config)
        state = replace(checkpoint.state, total_weight=weight)
        self.checkpoint = replace(checkpoint, state=state)
        self._clients = {client.client_id: client for client in checkpoint.clients}
        self._ranks = deal_ranks(checkpoint.clients, self.config)

    def _cohort(self, number: int) -> tuple[str, ...]:
        """Draw a round's cohort: from the run's secret where it has one, else from the seed."""
        if self._private is not None:
            return self._private.begin(number, self.checkpoint.client_ids)
        federation, quorum = self.config.federation, self.config.quorum
        more = quorum.over_selection if quorum else 0.0
        return draw_cohort(
            self.checkpoint.client_ids,
            math.ceil(federation.cohort * (1 + more) - 1e-9),  # 10 * 1.1 is a little over 11
            number,
            self.config.seed,
            federation.sampling,
            self._again,
        )

    def _begin_secure(self, current: CurrentRound, grid: Grid) -> None:
        """Carry out the phases of a secure sum that come before its training."""
        members = []
        for place, client_id in enumerate(current.cohort):
            if (node := self._nodes.get(client_id)) is not None:
                members.append(Member(client_id, node, place))
            else:
                current.drop(client_id, "not connected")
        current.secure = begin_secure(
            self.config,
            run=self.checkpoint.run,
            round=current.number,
            cohort=len(current.cohort),
            members=members,
            size=len(sent_row(self.method, self.checkpoint.state)),
            setup=to_record(ClientSetup.of(self.config, self._run)),
            exchange=lambda messages: grid.send_and_receive(messages, timeout=self._timeout),
            clock=current.clock,
        )

    def _messages(self, current: CurrentRound) -> Iterator[Message]:
        prepared = self._preparing(current)
        if isinstance(current.secure, SecureRound):
            yield from current.secure.messages(lambda m: prepared(m.client_id).content())
        if current.secure is not None:
            return
        for client_id in current.cohort:
            node = self._nodes.get(client_id)
            if node is None:
                current.drop(client_id, "not connected")
                continue
            found = prepared(client_id)
            current.awaited[node] = Sent(client_id, found.form)
            current.bytes_down += found.num_bytes
            current.surplus_down += found.fp32_surplus
            yield Message(found.content(), node, "train", group_id=str(current.number))

    def _preparing(self, current: CurrentRound) -> Callable[[str], Prepared]:
        """Return what prepares the message of a client, by its id."""
        setup = to_record(ClientSetup.of(self.config, self._run))
        order = TrainOrder(
            current.number,
            self.config.seed,
            self.config.federation.train_in(current.number),
            self.method.uploaded(current.number),
            self.method.rule(current.number),
            noise=None if self._private is None else self._private.local_noise,
        )
        config = self.config
        prepare = PrepareOnce(
            self.method,
            setup,
            order,
            dealt=bool(config.federation.client_ranks),
            measured=not config.sums_only,
        )

        def prepared(client_id: str) -> Prepared:
            num_examples = self._clients[client_id].num_examples
            profile = ClientProfile(client_id, self._ranks[client_id], num_examples)
            return prepare(self.checkpoint.state, profile, self._agreed(client_id))

        return prepared

    def _agreed(self, client_id: str) -> Codecs:
        """Return how a client's factors travel; say once who does not know the run's codecs."""
        federation = self.config.federation
        wanted = Codecs(federation.upload_codec, federation.download_codec)
        found = agreed(wanted, self._codecs.get(client_id, (FP32,)))
        if found != wanted and client_id not in self._otherwise:
            self._otherwise.add(client_id)
            _log.warning(
                "client %r travels up in %s and down in %s: it does not know what this run uses, "
                "%s and %s",
                *(client_id, found.upload, found.download, wanted.upload, wanted.download),
            )
        return found

    def _updates(self, current: CurrentRound, replies: Iterable[Message]) -> Iterator[Update]:
        """Yield an update per valid reply; drop the others, each with its reason."""
        for message in replies:
            node = message.metadata.src_node_id
            if message.metadata.group_id != str(current.number):
                # Before it is looked up: a late reply must not take the place of the right one.
                reason = f"a reply to round {message.metadata.group_id[:20]}, too late to count"
                current.drop(self._name_of(node), reason)
                continue
            sent = current.awaited.pop(node, None)
            if sent is None and node in current.answered:
                client = current.answered[node]
                current.drop(client, "a second reply in one round; the first counts")
                continue
            if sent is None:
                current.drop(f"node {node}", "was not asked in this round")
                continue
            current.answered[node] = sent.client_id
            if message.has_error():
                current.failures += 1
                current.drop(sent.client_id, message.error.reason or "failed, no reason")
                continue
            try:
                current.bytes_up += reply_bytes(message.content, sent.form)
                if word := read_declined(message.content):
                    current.declined.append(sent.client_id)
                    current.dropped.append(Dropped(sent.client_id, f"{DECLINED}{word}"))
                    continue
                current.surplus_up += sent.form.wire.fp32_surplus
                reply, weight = self._check(current, sent, message)
            except FedloraError as error:
                current.failures += 1
                current.drop(sent.client_id, str(error))
                continue
            except Exception as error:  # what a stranger sent must not end everyone's run
                current.failures += 1
                reason = f"client {sent.client_id!r}: a reply that cannot be read"
                current.drop(sent.client_id, f"{reason} ({type(error).__name__})")
                continue
            current.valid[sent.client_id] = reply.steps
            if reply.seconds is not None:
                current.client_seconds.append(reply.seconds)
            if math.isfinite(reply.loss):
                current.loss_sum += weight * reply.loss
                current.loss_weight += weight
            yield Update(reply.adapter, weight, sent.client_id, reply.control)

    def _total(self, current: CurrentRound, replies: Iterable[Message]) -> SecureTotal | None:
        """Return the secure sum; None: the round was given up, at its start or in a phase."""
        if isinstance(current.secure, SecureRound):
            steps = self.config.federation.train_in(current.number).local_steps or 0
            return total_of(current, current.secure, replies, steps)
        here = [client for client in current.cohort if client in self._nodes]
        current.give_up(here, current.secure or "")
        return None

    def _check(self, current: CurrentRound, sent: Sent, message: Message) -> tuple[Reply, float]:
        who = f"client {sent.client_id!r}"
        reply = decode_reply(message.content, sent.form, who)
        if self.config.federation.weights == "equal":
            return reply, 1.0
        told = self._clients[sent.client_id].num_examples
        if reply.num_examples is None or reply.num_examples != told:
            raise FederationError(
                f"{who}: expected num-examples {told} as at the start of the run, found "
                f"{reply.num_examples}"
            )
        return reply, float(reply.num_examples)

    def _wait_for_the_willing(self, current: CurrentRound, *, declined: bool) -> None:
        """Pause before a round that was declined is tried again; forget the pauses otherwise."""
        if not declined:
            self._again, self._paused = 0, 0.0
            return
        if self._paused >= MOST_PAUSES:
            raise FederationError(
                f"round {current.number}: for {self._paused / 3600:.0f} hours every device that "
                "was asked has declined; look at the limits in their node configs"
            )
        seconds = min(LONGEST_PAUSE, SHORTEST_PAUSE * 2.0 ** min(self._again, 10))
        _log.info(
            "round %d: %d of %d devices declined, nobody trained; others are asked in %.0f s",
            current.number, len(current.declined), len(current.cohort), seconds,
        )  # fmt: skip
        self._pause(seconds)
        self._again += 1
        self._paused += seconds

    def _name_of(self, node: int) -> str:
        named = (client for client, its_node in self._nodes.items() if its_node == node)
        return next(named, f"node {node}")

    def _finish(self, current: CurrentRound, checkpoint: Checkpoint, *, updated: bool) -> None:
        declined = checkpoint.state.round < current.number  # the round is tried again
        willing = not (declined or (not updated and current.is_declined))
        failed = not updated and willing and bool(current.cohort)
        without: Literal["declined", "failed", "empty"] = (
            "declined" if not willing else "failed" if failed else "empty"
        )
        phases = current.clock.seconds()
        seconds = sum(phases.values()) - phases["save"]  # that is of the round before
        record = RoundRecord(
            round=current.number,
            status="updated" if updated else without,
            cohort=current.cohort,
            loss=current.loss,
            seconds=round(seconds, 6),
            bytes_up=current.bytes_up,
            bytes_down=current.bytes_down,
            dropped=tuple(current.dropped),
            noted=_noted(self.method, checkpoint.state) if updated else {},
            phases=phases,
            clients=slowest_and_median(current.client_seconds),
            late=current.late,
            declined=tuple(current.declined),
            fp32_bytes=current.fp32_bytes(self.config.federation),
            epsilon=None if self._private is None else round(self._private.epsilon, 6),
            secure=phases_told(current.secure),
        )
        self.checkpoint = replace(
            checkpoint,
            clients=tuple(counted(client, current.valid) for client in checkpoint.clients),
            bytes_up=checkpoint.bytes_up + current.bytes_up,
            bytes_down=checkpoint.bytes_down + current.bytes_down,
            seconds=checkpoint.seconds + seconds,
            # Those who declined say nothing of whether the others would have failed.
            failed_in_a_row=checkpoint.failed_in_a_row + failed if failed or not willing else 0,
        )
        self._round = None
        saving = time.monotonic()
        self._save(self.checkpoint, record)
        self._save_seconds = time.monotonic() - saving
        most = most_failed_rounds(self.config.federation.cohort)
        if failed and self.checkpoint.failed_in_a_row >= most:
            last = record.dropped[-1] if record.dropped else Dropped("nobody", "no reply")
            raise FederationError(
                f"round {record.round}: {most} rounds in a row without one valid "
                f"update; the last was {last.client}: {last.reason}"
            )


def most_failed_rounds(cohort: int) -> int:
    """Return after how many rounds in a row without an update a run is given up.

    >>> [most_failed_rounds(cohort) for cohort in (1, 3, 10)]
    [12, 4, 3]
    """
    return max(MAX_FAILED_ROUNDS, math.ceil(MAX_FAILED_CLIENTS / max(1, cohort)))


def _noted(method: Method, state: ServerState) -> dict[str, float]:
    """Return the numbers that a method has the round's record say, the largest over the layers."""
    kept = {name: state.method_state[name] for name in method.noted if name in state.method_state}
    return {name.replace("-", "_"): float(value.max()) for name, value in kept.items()}
