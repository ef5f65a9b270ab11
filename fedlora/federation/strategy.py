"""The rounds of a run as a Flower Strategy: draw a cohort, send, check every reply, aggregate.

It is a Flower `Strategy` of its own and not a `FedAvg`, whose averaging believes shapes, weights
and NaN. Flower's loop (`Strategy.start`) is used as it is; only its round number is not: it counts
from 1 after a resume, so the round here is always the state's.

A client that fails, or whose reply is wrong, is dropped with its reason, and the round goes on with
the others. Replies are read one at a time into the method's streaming sum, so memory does not grow
with the cohort.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedlora.adapter import Adapter
from fedlora.aggregation import Broadcast, ClientProfile, Method, ServerState, Update
from fedlora.errors import (
    ConfigError,
    FederationError,
    FedloraError,
    NonFiniteError,
    TooFewUpdatesError,
)
from fedlora.experiment import ExperimentConfig
from fedlora.federation.checkpoint import Checkpoint, ClientRecord, Dropped, RoundRecord
from fedlora.federation.client import one_line
from fedlora.federation.control import put_control
from fedlora.federation.phases import PhaseClock, slowest_and_median
from fedlora.federation.quorum import Replies
from fedlora.federation.records import (
    BOTH,
    ClientAnswer,
    ClientSetup,
    EncodedAdapter,
    TrainOrder,
    content_bytes,
    encode_adapter,
    to_record,
    train_content,
)
from fedlora.federation.replies import (
    Reply,
    ReplyForm,
    decode_reply,
    reply_bytes,
    require_answerable,
)
from fedlora.federation.roster import Roster
from fedlora.federation.sampling import draw_cohort

__all__ = ["MAX_FAILED_ROUNDS", "FederatedLora", "deal_ranks", "with_answers"]

MAX_FAILED_ROUNDS = 3  # in a row without one valid update, before the run is given up

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Round:
    """What is known of the round that is under way."""

    number: int
    cohort: tuple[str, ...]
    awaited: dict[int, _Sent] = field(default_factory=dict)  # by node id, until it answers
    answered: dict[int, str] = field(default_factory=dict)  # node id -> client id
    dropped: list[Dropped] = field(default_factory=list)
    valid: dict[str, int] = field(default_factory=dict)  # client id -> steps
    loss_sum: float = 0.0
    loss_weight: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    clock: PhaseClock = field(default_factory=PhaseClock)
    client_seconds: list[float] = field(default_factory=list)
    late: int = 0  # replies to older rounds


@dataclass(frozen=True, slots=True)
class _Sent:
    """What was sent to one client, against which its reply is checked."""

    client_id: str
    form: ReplyForm  # one for all clients that were sent the same


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A broadcast as records, made once for all the clients that get it."""

    source: Broadcast  # kept alive, so that its adapters' ids stay theirs
    content: Callable[[], RecordDict]  # a message with records of its own
    num_bytes: int
    form: ReplyForm


class FederatedLora(Strategy):
    """Federated LoRA by a `Method`, from a checkpoint on.

    `nodes` maps client ids to the node ids that Flower gave them in this run. After each round
    `save` gets the new checkpoint and the round's record; `checkpoint` is always the latest.
    `roster`: who is connected now, asked before each round; None: the same nodes all along.
    Raises `FederationError` after `MAX_FAILED_ROUNDS` rounds in a row without an update.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        method: Method,
        checkpoint: Checkpoint,
        nodes: Mapping[str, int],
        save: Callable[[Checkpoint, RoundRecord], None],
        roster: Roster | None = None,
    ) -> None:
        self.config = config
        self.method = method
        self._nodes = dict(nodes)
        self._save = save
        self._roster = roster
        self._round: _Round | None = None
        self._save_seconds = 0.0
        self._have_clients(checkpoint)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw the cohort and yield one message per client, each with its own records."""
        federation, number = self.config.federation, self.checkpoint.state.round + 1
        clock = PhaseClock(self._save_seconds)
        if self._roster is not None:
            self._nodes, answers = self._roster.update()
            told = with_answers(self.checkpoint, answers, joining=number)
            if told is not self.checkpoint:
                self._have_clients(told)
        more = self.config.quorum.over_selection if self.config.quorum else 0.0
        cohort = draw_cohort(
            self.checkpoint.client_ids,
            math.ceil(federation.cohort * (1 + more) - 1e-9),  # 10 * 1.1 is a little over 11
            number,
            self.config.seed,
            federation.sampling,
        )
        self._round = current = _Round(number, cohort, clock=clock)
        messages = clock.within("prepare", self._messages(current, grid))
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
        if isinstance(replies, Replies):
            replies.count_by(lambda: len(current.valid))
        received = current.clock.within("wait", replies)
        after = self._aggregated(current, self._updates(current, received))
        # A round that fails changes nothing but the number.
        state = after or replace(self.checkpoint.state, round=current.number)
        silent = "no reply in time"
        if isinstance(replies, Replies):
            current.late = replies.late
            current.bytes_up += replies.late_bytes
            if replies.ended == "quorum":
                silent = "not waited for: the round had its quorum"
        for sent in current.awaited.values():
            self._drop(current, sent.client_id, silent)
        self._finish(current, replace(self.checkpoint, state=state), updated=after is not None)
        loss = _mean_loss(current)
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
        weight = _total_weight(checkpoint, self.config)
        state = replace(checkpoint.state, total_weight=weight)
        self.checkpoint = replace(checkpoint, state=state)
        self._clients = {client.client_id: client for client in checkpoint.clients}
        self._ranks = deal_ranks(checkpoint.clients, self.config)

    def _messages(self, current: _Round, grid: Grid) -> Iterator[Message]:
        setup = to_record(ClientSetup.of(self.config))
        order = to_record(
            TrainOrder(
                current.number,
                self.config.seed,
                self.config.federation.train_in(current.number),
                self.method.uploaded(current.number),
                self.method.rule(current.number),
            )
        )
        dealt = bool(self.config.federation.client_ranks)
        prepare = _PrepareOnce(self.method, setup, order, current.number, dealt=dealt)
        for client_id in current.cohort:
            node = self._nodes.get(client_id)
            if node is None:
                self._drop(current, client_id, "not connected")
                continue
            client = self._clients[client_id]
            profile = ClientProfile(client_id, self._ranks[client_id], client.num_examples)
            prepared = prepare(self.checkpoint.state, profile)
            current.awaited[node] = _Sent(client_id, prepared.form)
            current.bytes_down += prepared.num_bytes
            yield Message(prepared.content(), node, "train", group_id=str(current.number))

    def _updates(self, current: _Round, replies: Iterable[Message]) -> Iterator[Update]:
        """Yield an update per valid reply; drop the others, each with its reason."""
        for message in replies:
            node = message.metadata.src_node_id
            sent = current.awaited.pop(node, None)
            if sent is None and node in current.answered:
                client = current.answered[node]
                self._drop(current, client, "a second reply in one round; the first counts")
                continue
            if sent is None:
                self._drop(current, f"node {node}", "was not asked in this round")
                continue
            current.answered[node] = sent.client_id
            if message.has_error():
                self._drop(current, sent.client_id, message.error.reason or "failed, no reason")
                continue
            try:
                current.bytes_up += reply_bytes(message.content, sent.form)
                reply, weight = self._check(current, sent, message)
            except FedloraError as error:
                self._drop(current, sent.client_id, str(error))
                continue
            except Exception as error:  # what a stranger sent must not end everyone's run
                reason = f"client {sent.client_id!r}: a reply that cannot be read"
                self._drop(current, sent.client_id, f"{reason} ({type(error).__name__})")
                continue
            current.valid[sent.client_id] = reply.steps
            if reply.seconds is not None:
                current.client_seconds.append(reply.seconds)
            if math.isfinite(reply.loss):
                current.loss_sum += weight * reply.loss
                current.loss_weight += weight
            yield Update(reply.adapter, weight, sent.client_id, reply.control)

    def _aggregated(self, current: _Round, updates: Iterator[Update]) -> ServerState | None:
        """Return the state after the round; None without a valid update, or with no use for them.

        Replies that are right one by one may be too few for a rule, or too large in sum for float32
        or for the next round's replies. Nobody knows then whose fault it is: all are dropped with
        the reason, and the round is given up.
        """
        first = next(updates, None)
        if first is None:
            return None
        try:
            state = self.method.aggregate(self.checkpoint.state, itertools.chain([first], updates))
            require_answerable(state.trainable)
        except (NonFiniteError, TooFewUpdatesError) as error:
            for _ in updates:  # who has answered is not called silent
                pass
            known = isinstance(error, TooFewUpdatesError)
            reason = str(error) if known else f"all updates together: {error}"
            for client in current.valid:
                self._drop(current, client, reason)
            current.valid.clear()
            return None
        return state

    def _check(self, current: _Round, sent: _Sent, message: Message) -> tuple[Reply, float]:
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

    def _drop(self, current: _Round, client: str, reason: str) -> None:
        dropped = Dropped(client, one_line(reason))
        current.dropped.append(dropped)
        _log.warning("round %d: dropped %s: %s", current.number, dropped.client, dropped.reason)

    def _finish(self, current: _Round, checkpoint: Checkpoint, *, updated: bool) -> None:
        failed = not updated and bool(current.cohort)
        phases = current.clock.seconds()
        seconds = sum(phases.values()) - phases["save"]  # that is of the round before
        record = RoundRecord(
            round=current.number,
            status="updated" if updated else "failed" if failed else "empty",
            cohort=current.cohort,
            loss=_mean_loss(current),
            seconds=round(seconds, 6),
            bytes_up=current.bytes_up,
            bytes_down=current.bytes_down,
            dropped=tuple(current.dropped),
            noted=_noted(self.method, checkpoint.state) if updated else {},
            phases=phases,
            clients=slowest_and_median(current.client_seconds),
            late=current.late,
        )
        self.checkpoint = replace(
            checkpoint,
            clients=tuple(_counted(client, current.valid) for client in checkpoint.clients),
            bytes_up=checkpoint.bytes_up + current.bytes_up,
            bytes_down=checkpoint.bytes_down + current.bytes_down,
            seconds=checkpoint.seconds + seconds,
            failed_in_a_row=checkpoint.failed_in_a_row + 1 if failed else 0,
        )
        self._round = None
        saving = time.monotonic()
        self._save(self.checkpoint, record)
        self._save_seconds = time.monotonic() - saving
        if self.checkpoint.failed_in_a_row >= MAX_FAILED_ROUNDS:
            last = record.dropped[-1] if record.dropped else Dropped("nobody", "no reply")
            raise FederationError(
                f"round {record.round}: {MAX_FAILED_ROUNDS} rounds in a row without one valid "
                f"update; the last was {last.client}: {last.reason}"
            )


def deal_ranks(clients: Sequence[ClientRecord], config: ExperimentConfig) -> dict[str, int | None]:
    """Return the rank that each client trains; None: the global adapter's.

    `federation.client_ranks` are dealt out in turn over the sorted ids, so that a rank stays with
    its client whoever is drawn, and when the run is resumed; those who joined later come after all
    who were there before them. A client that names its own rank keeps that, but for what is over
    the largest of the run: nothing more is sent.
    """
    dealt: Sequence[int | None] = config.federation.client_ranks or (None,)
    most = max(config.lora.rank, *config.lora.rank_pattern.values(), 1)
    found: dict[str, int | None] = {}
    ordered = sorted(clients, key=lambda client: (client.joined, client.client_id))
    for place, client in enumerate(ordered):
        rank = dealt[place % len(dealt)]
        found[client.client_id] = rank if client.rank is None else min(client.rank, most)
    return found


def with_answers(
    checkpoint: Checkpoint, answers: Mapping[str, ClientAnswer], joining: int | None = None
) -> Checkpoint:
    """Return the checkpoint with what the clients just said of themselves.

    joining: the round from which clients that the run does not know take part; None: they do not.
    Nobody leaves the population: a client that is gone is dropped when it is drawn, so that a
    resumed run draws the same cohorts. Who joins is never held out, but for another copy of a
    person ("u7#2") who is.

    The checkpoint is the very same where nothing changes.
    """
    known = {client.client_id for client in checkpoint.clients}
    clients = [_told(client, answers.get(client.client_id)) for client in checkpoint.clients]
    if joining is not None and not answers.keys() <= known:
        apart = {client_id.partition("#")[0] for client_id in checkpoint.held_out}
        for client_id in answers.keys() - known:
            held_out = client_id.partition("#")[0] in apart
            client = ClientRecord(client_id, held_out=held_out, joined=joining)
            clients.append(_told(client, answers[client_id]))
            _log.info("client %r joins in round %d", client_id, joining)
        clients.sort(key=lambda client: client.client_id)
    changed = len(clients) != len(checkpoint.clients) or any(
        new is not old for new, old in zip(clients, checkpoint.clients, strict=True)
    )
    return replace(checkpoint, clients=tuple(clients)) if changed else checkpoint


def _told(client: ClientRecord, answer: ClientAnswer | None) -> ClientRecord:
    if answer is None:
        return client
    if (client.rank, client.num_examples) == (answer.rank, answer.num_examples):
        return client
    return replace(client, rank=answer.rank, num_examples=answer.num_examples)


class _PrepareOnce:
    """Prepare what clients share once a round: a method's broadcast for a rank, and its records."""

    def __init__(
        self, method: Method, setup: ConfigRecord, order: ConfigRecord, round: int, *, dealt: bool
    ) -> None:
        self._method, self._setup, self._order = method, setup, order
        self._dealt = dealt  # whether the experiment gives clients their ranks
        self._uploaded, self._round = method.uploaded(round), round
        self._of_rank: dict[int | None, _Prepared] = {}
        self._kept: dict[tuple[int, int], _Prepared] = {}
        self._frozen: tuple[Adapter, EncodedAdapter] | None = None  # the last one, of any rank

    def __call__(self, state: ServerState, profile: ClientProfile) -> _Prepared:
        """Return the messages for a client; the same value for the same adapters."""
        if self._method.broadcasts_by_client:
            return self._once(self._method.broadcast(state, profile))
        found = self._of_rank.get(profile.rank)
        if found is None:
            found = self._once(self._method.broadcast(state, profile))
            if self._dealt:
                self._require_rank(profile, found.source.trainable)
            self._of_rank[profile.rank] = found
        return found

    def _require_rank(self, profile: ClientProfile, sent: Adapter) -> None:
        """Refuse to deal out ranks for a method that does not look at them."""
        if profile.rank is not None and max(sent.ranks) > profile.rank:
            raise ConfigError(
                f"federation.client_ranks: expected a method that sends client "
                f"{profile.client_id!r} an adapter of rank {profile.rank}, found rank "
                f"{max(sent.ranks)} of {self._method.name!r}; use a method for mixed ranks, or "
                "leave the key out"
            )

    def _once(self, broadcast: Broadcast) -> _Prepared:
        key = id(broadcast.trainable), id(broadcast.frozen)
        found = self._kept.get(key)
        if found is None:
            if len(self._kept) >= 4:  # those of single clients do not pile up
                self._kept.clear()
            found = self._kept[key] = self._prepared(broadcast)
        return found

    def _prepared(self, broadcast: Broadcast) -> _Prepared:
        trainable = encode_adapter(broadcast.trainable, BOTH, self._round)
        frozen = None
        if broadcast.frozen is not None:
            if self._frozen is None or self._frozen[0] is not broadcast.frozen:
                encoded = encode_adapter(broadcast.frozen, BOTH, self._round)
                self._frozen = broadcast.frozen, encoded
            frozen = self._frozen[1]
        controlled = broadcast.control is not None
        form = ReplyForm.of(broadcast.trainable, self._uploaded, self._round, controlled=controlled)
        control = RecordDict()
        if broadcast.control is not None:
            put_control(control, form.buffer, broadcast.control)
        content = partial(train_content, self._setup, self._order, trainable, frozen, control)
        return _Prepared(broadcast, content, content_bytes(content()), form)


def _mean_loss(current: _Round) -> float | None:
    return current.loss_sum / current.loss_weight if current.loss_weight else None


def _noted(method: Method, state: ServerState) -> dict[str, float]:
    """Return the numbers that a method has the round's record say, the largest over the layers."""
    kept = {name: state.method_state[name] for name in method.noted if name in state.method_state}
    return {name.replace("-", "_"): float(value.max()) for name, value in kept.items()}


def _total_weight(checkpoint: Checkpoint, config: ExperimentConfig) -> float:
    """Return the weight of all clients that may be sampled, as `_check` weights their updates."""
    clients = [client for client in checkpoint.clients if not client.held_out]
    if config.federation.weights == "equal":
        return float(len(clients))
    return float(sum(client.num_examples or 0 for client in clients))


def _counted(client: ClientRecord, valid: Mapping[str, int]) -> ClientRecord:
    steps = valid.get(client.client_id)
    if steps is None:
        return client
    return replace(client, rounds=client.rounds + 1, steps=client.steps + steps)
