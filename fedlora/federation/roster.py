"""Who is connected and who they are: clients come, go and return while a run goes on.

At the start of a run everyone is asked and waited for. Later nobody waits: at the start of a round
the nodes that were never met are asked, and whoever has answered by the next round takes part from
then on. A node that is gone is not asked to train. Its client is known again when it is back: by
the same node id where nodes have keys, by its answer where Flower gave it a new one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from flwr.app import ConfigRecord, Message

from fedlora.errors import FederationError, FedloraError
from fedlora.federation.client import one_line
from fedlora.federation.quorum import LONGEST_PAUSE, QuorumGrid
from fedlora.federation.records import ClientAnswer, decode_answer, query_content

__all__ = ["Roster", "query_messages", "read_answer"]

_log = logging.getLogger(__name__)


class Roster:
    """The nodes of a run and their clients, up to date at the start of each round.

    setup: the record that a query brings. answers, refused: what the nodes that were asked at the
    start said, and those whose answer was wrong, who are asked again only after they were away.
    min_clients: a round does not start with fewer known clients connected, for `timeout` seconds;
    with as many as answered at the start, if these were fewer.
    """

    def __init__(
        self,
        grid: QuorumGrid,
        setup: ConfigRecord,
        answers: Mapping[int, ClientAnswer],
        refused: Iterable[int] = (),
        *,
        needs_examples: bool,
        min_clients: int = 1,
        timeout: float = 3600.0,
    ) -> None:
        self._grid, self._setup = grid, setup
        self._answers = dict(answers)  # by node, in the order of meeting
        self._asked = set(answers) | set(refused)
        self._here: set[int] = set()
        self._twice: set[int] = set()  # nodes with a client id that another one has
        self._needs_examples = needs_examples
        # Who was left out at the start is not waited for in every round.
        met = len({answer.client_id for answer in answers.values()})
        self._min_clients, self._timeout = min(max(min_clients, 1), met), timeout

    def update(self) -> tuple[dict[str, int], dict[str, ClientAnswer]]:
        """Return the connected clients' nodes and what they said, by client id.

        It asks the nodes that are new, and does not wait for their answers; only while fewer than
        `min_clients` are connected it waits.
        """
        end, told = self._grid.clock() + self._timeout, False
        while True:
            self._look()
            nodes = self._connected()
            if len(nodes) >= self._min_clients or self._grid.clock() >= end:
                return nodes, {name: self._answers[node] for name, node in nodes.items()}
            if not told:
                told = True
                _log.warning(
                    "%d of the clients are connected, waiting for %d", len(nodes), self._min_clients
                )
            self._grid.sleep(LONGEST_PAUSE)

    def _look(self) -> None:
        """Read the answers that have come, note who is away, and ask who is new."""
        for reply in self._grid.late_answers():
            self._read(reply)
        self._here = set(self._grid.get_node_ids())
        gone = self._asked - self._here
        self._asked -= gone  # whoever returns is asked again: its data may have changed
        new = sorted(self._here - self._asked)
        if new:
            self._asked.update(new)
            self._grid.post(query_messages(self._setup, new), self._timeout)

    def _read(self, reply: Message) -> None:
        node = reply.metadata.src_node_id
        try:
            self._answers[node] = read_answer(reply, f"node {node}", self._needs_examples)
        except FedloraError as error:
            _log.warning("left out node %d: %s", node, one_line(str(error)))
        except Exception as error:  # what a stranger sent must not end everyone's run
            _log.warning("left out node %d: cannot be read (%s)", node, type(error).__name__)

    def _connected(self) -> dict[str, int]:
        nodes: dict[str, int] = {}
        for node, answer in self._answers.items():
            if node not in self._here:
                continue
            first = nodes.setdefault(answer.client_id, node)
            if first != node and node not in self._twice:
                self._twice.add(node)
                _log.warning(
                    "node %d: client id %r is already taken by node %d; give each device its own",
                    node,
                    answer.client_id,
                    first,
                )
        return nodes


def query_messages(setup: ConfigRecord, nodes: Iterable[int]) -> Iterable[Message]:
    """Yield the message to each node that asks who it is."""
    return (Message(query_content(setup), node, "query", group_id="0") for node in nodes)


def read_answer(reply: Message, who: str, needs_examples: bool) -> ClientAnswer:
    """Read an answer to a query. Raises `FedloraError` for an error or an answer that is wrong."""
    if reply.has_error():
        raise FederationError(f"{who}: {reply.error.reason or 'failed, no reason'}")
    answer = decode_answer(reply.content, who)
    if needs_examples and answer.num_examples is None:
        raise FederationError(f"{who}: expected num-examples, found none")
    return answer
