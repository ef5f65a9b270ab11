"""A Flower `Grid` whose clients train in groups: the unchanged ServerApp and Strategy on it.

A round's messages are read in windows. The clients of a window are sorted into groups that go
through the base together (`fedlora.nn.cohort`), several groups at a time, each in a thread of its
own or on a Ray worker. Replies stream back as groups are done, in an order that depends on nothing
but the messages: neither the number of cores nor that of workers changes a result, and memory does
not grow with the cohort.

The clients are all the caller's own, so no message passes through a ClientApp. What a client says
is made by the same functions as on a device, and passes the same guard.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from flwr.app import Message, RecordDict

from fedlora.adapter import Adapter, Array
from fedlora.errors import BaseMismatchError, FederationError
from fedlora.experiment import EngineConfig
from fedlora.federation import ClientSetup
from fedlora.federation.client import error_reply
from fedlora.federation.control import next_control
from fedlora.federation.kept_factors import kept_factors, kept_segments, split_row, with_kept
from fedlora.federation.secure.client import (
    Kept,
    MemorySessions,
    answer_masked,
    answer_phase,
    require_masking,
)
from fedlora.federation.secure.records import MASKED, PHASES, training_records
from fedlora.federation.tasks import TrainTask, answer_query, answer_task, read_query, read_task
from fedlora.flat import Segment, pack
from fedlora.nn.cohort import Job, group_jobs, must_train_alone, outlined_job, usual_positions
from fedlora.simulation.grid import VirtualGrid
from fedlora.simulation.groups import GroupOrder, Outcome, job_of, train_order, world_of
from fedlora.simulation.slab import PersonalSlab, open_slab
from fedlora.simulation.threads import in_order
from fedlora.world import World

__all__ = ["CohortGrid"]

WINDOW = 1024  # messages that are sorted into groups together
WINDOW_BYTES = 1 << 26  # and the bytes of their factors, if that is fewer

Train = Callable[[GroupOrder], list[Outcome]]


@dataclass(frozen=True, slots=True, eq=False)
class _Client:
    """One client's task of a round."""

    message: Message
    number: int  # its place in the data
    name: str
    task: TrainTask
    start: Adapter  # the broadcast, with the factors that the client keeps to itself
    control: Array | None = None  # the client's own control variate, where the task asks for one


class CohortGrid(VirtualGrid):
    """Train `num_clients` virtual clients in groups, `workers` groups at a time.

    train: carries out a group, called in the thread of a worker; by default it does so itself.
    private: the folder for the factors that clients train and do not share, and for their control
    variates; None: a method that has either is refused. positions: of a pass; None:
    `usual_positions`.
    """

    def __init__(
        self,
        num_clients: int,
        *,
        engine: EngineConfig = EngineConfig(),  # noqa: B008 - frozen
        workers: int = 1,
        train: Train = train_order,
        private: Path | None = None,
        positions: int | None = None,
    ) -> None:
        super().__init__(num_clients)
        self._workers, self._positions = workers, positions
        self._engine, self._train = engine, train
        self._private = private
        self._slabs: dict[tuple[str, tuple[Segment, ...]], PersonalSlab] = {}
        self._alone: dict[ClientSetup, bool] = {}
        self._opened: tuple[ClientSetup, World] | None = None
        self._sessions: dict[int, Kept] = {}  # of secure sums, by the client's place in the data

    def replies(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Yield a reply to each message, group by group."""
        for done in in_order(lambda work: work(), self._works(messages), self._workers):
            yield from done
        for slab in self._slabs.values():
            slab.flush()

    def _works(self, messages: Iterable[Message]) -> Iterator[Callable[[], list[Message]]]:
        """Read messages, and yield what has to be done, a group's work each."""
        source = iter(messages)
        size = WINDOW
        while window := list(islice(source, size)):
            clients: list[_Client] = []
            answers: list[Message] = []
            for message in window:
                try:
                    if message.metadata.message_type in ("train", MASKED):
                        clients.append(self._read(message))
                    else:
                        answers.append(self._answer(message))
                except Exception as error:
                    answers.append(error_reply(message, error))
            if answers:
                yield lambda answers=answers: answers  # type: ignore[misc]
            if clients:  # before any group runs: the probe needs the model for itself
                self._probe(clients)
            for group in self._groups(clients):
                yield lambda group=group: self._train_group(group)  # type: ignore[misc]
            if clients:
                size = min(WINDOW, max(64, WINDOW_BYTES // clients[0].start.num_bytes))

    def _answer(self, message: Message) -> Message:
        kind = message.metadata.message_type
        if kind in PHASES:
            content = answer_phase(kind, message.content, self._own_session(message))
            return Message(content, reply_to=message)
        setup = read_query(message.content)
        data = self._world(setup).data
        name = data.client_ids[self.number_of(message)]
        count = len(data.client(name).train) if setup.share_num_examples else 0
        return Message(answer_query(setup, name, None, count), reply_to=message)

    def _read(self, message: Message) -> _Client:
        if message.metadata.message_type == MASKED:
            require_masking(message.content, self._own_session(message))
        task = read_task(training_records(message.content))
        world, sent = self._world(task.setup), task.broadcast
        if any(
            a is not None and a.base != world.initial.base for a in (sent.trainable, sent.frozen)
        ):
            raise BaseMismatchError("the server's adapter is for another base than this run's")
        number = self.number_of(message)
        start = self._start(task, number)
        name, control = world.data.client_ids[number], self._control(task, number)
        return _Client(message, number, name, task, start, control)

    def _groups(self, clients: Sequence[_Client]) -> Iterator[list[_Client]]:
        """Yield the groups of a window: of one setup and order, beside one frozen adapter.

        Ranks may differ in a group.
        """
        rest = list(clients)
        while rest:
            first = rest[0].task
            same = [client for client in rest if _together(client.task, first)]
            rest = [client for client in rest if not _together(client.task, first)]
            world = self._world(first.setup)
            jobs = [_outline(world, client) for client in same]
            positions = self._positions or usual_positions(world.model, jobs)
            for group in group_jobs(jobs, positions):
                yield [same[index] for index in group]

    def _train_group(self, group: Sequence[_Client]) -> list[Message]:
        """Train a group and return its replies."""
        task, starts = group[0].task, tuple(client.start for client in group)
        if all(start is starts[0] for start in starts):
            starts = starts[:1]
        names = tuple(client.name for client in group)
        alone = self._alone[task.setup]
        frozen = task.broadcast.frozen
        order = GroupOrder(
            self._engine, task.setup, task.order, names, starts, frozen, _corrections(group), alone
        )
        try:
            outcomes = self._train(order)
        except Exception as error:
            if len(group) == 1:
                return [error_reply(group[0].message, error)]
            # One client's data or settings may be at fault, and the others' work is not.
            return [reply for client in group for reply in self._train_group([client])]
        return [self._reply(*pair) for pair in zip(group, outcomes, strict=True)]

    def _reply(self, client: _Client, outcome: Outcome) -> Message:
        try:
            if outcome.error is not None:
                raise outcome.error
            row = self._uploaded(client, outcome.row)
            if client.message.metadata.message_type == MASKED:
                return Message(self._masked(client, row), reply_to=client.message)
            following, change = _next_control(client, outcome)
            content = answer_task(
                client.task,
                row,
                client_id=client.name,
                num_examples=outcome.num_examples,
                loss=outcome.loss,
                steps=outcome.steps,
                control=change,
            )
            if following is not None:  # after the guard has let the change pass
                slab = self._control_slab(client.task)
                slab.write(client.number, client.task.order.round, following)
        except Exception as error:
            return error_reply(client.message, error)
        return Message(content, reply_to=client.message)

    def _masked(self, client: _Client, row: Array) -> RecordDict:
        session = self._own_session(client.message)
        return answer_masked(client.message.content, session, client.task, row, client.name)

    def _own_session(self, message: Message) -> MemorySessions:
        return MemorySessions(self._sessions, self.number_of(message))

    def _probe(self, clients: Sequence[_Client]) -> None:
        """Find out once for a run whether its clients can share a pass; say so if they cannot."""
        for setup, some in itertools.groupby(clients, key=lambda client: client.task.setup):
            if setup in self._alone:
                continue
            world = self._world(setup)
            jobs = [_job(world, client) for client in some]
            self._alone[setup] = must_train_alone(world.model, jobs, world.task)

    def _world(self, setup: ClientSetup) -> World:
        """Return the run's world, for the thread that reads the messages."""
        if self._opened is None or self._opened[0] is not setup:
            world = world_of(setup, self._engine)
            if len(world.data) != self.num_clients:
                raise FederationError(
                    f"expected data of {self.num_clients} clients, one a node, found "
                    f"{len(world.data)}"
                )
            self._opened = setup, world
        return self._opened[1]

    def _start(self, task: TrainTask, number: int) -> Adapter:
        """Return what the client starts from: the broadcast, with its own factors in it."""
        if not kept_factors(task):
            return task.broadcast.trainable
        row = self._kept_slab(task).read(number, task.order.round)
        return task.broadcast.trainable if row is None else with_kept(task, row)

    def _uploaded(self, client: _Client, row: Array) -> Array:
        """Return the part of a trained row that the client uploads, and keep the rest for it."""
        task = client.task
        if not kept_factors(task):
            return row
        kept, uploaded = split_row(task, row)
        self._kept_slab(task).write(client.number, task.order.round, kept)
        return uploaded

    def _control(self, task: TrainTask, number: int) -> Array | None:
        """Return the client's own control variate, zero in its first round; None: not asked for."""
        if task.broadcast.control is None:
            return None
        row = self._control_slab(task).read(number, task.order.round)
        return np.zeros_like(task.broadcast.control) if row is None else row

    def _kept_slab(self, task: TrainTask) -> PersonalSlab:
        factors = ", ".join(sorted(kept_factors(task)))
        wanted = f"{factors}: expected a folder for factors that are trained and not shared"
        return self._slab("", kept_segments(task), wanted)

    def _control_slab(self, task: TrainTask) -> PersonalSlab:
        wanted = "control variates: expected a folder for those of the clients"
        return self._slab("control-", task.reply.segments, wanted)

    def _slab(self, kind: str, segments: tuple[Segment, ...], wanted: str) -> PersonalSlab:
        if (kind, segments) not in self._slabs:
            if self._private is None:
                raise FederationError(f"{wanted}, found none")
            self._slabs[kind, segments] = open_slab(self._private, self.num_clients, segments, kind)
        return self._slabs[kind, segments]


def _corrections(group: Sequence[_Client]) -> tuple[Array, ...]:
    """Return what is added to each client's gradients; nothing without control variates."""
    found = []
    for client in group:
        server = client.task.broadcast.control
        if server is not None and client.control is not None:
            found.append(server - client.control)
    return tuple(found)


def _next_control(client: _Client, outcome: Outcome) -> tuple[Array | None, Array | None]:
    """Return the client's next control variate and its change; None without control variates."""
    own, task = client.control, client.task
    server = task.broadcast.control
    if own is None or server is None:
        return None, None
    before = pack(client.start, task.reply.segments)
    return next_control(own, server, before, outcome.row, outcome.steps, task.order.train)


def _job(world: World, client: _Client) -> Job:
    """Return the training for the probe, which takes no step."""
    return job_of(world, client.name, client.start, client.task.order)


def _outline(world: World, client: _Client) -> Job:
    examples, order = world.data.client(client.name).train, client.task.order
    return outlined_job(examples, client.name, client.start, order.train, rule=order.rule)


def _together(one: TrainTask, other: TrainTask) -> bool:
    """Whether clients with these tasks may share a group."""
    # By identity: all clients of a round that are sent the same frozen adapter have one object.
    return one is other or (
        one.broadcast.frozen is other.broadcast.frozen
        and one.order == other.order
        and one.setup == other.setup
    )
