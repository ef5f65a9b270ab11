"""The clients of a run as the server knows them: who they are, their ranks and their weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedlora.aggregation import Method
from fedlora.experiment import ExperimentConfig
from fedlora.federation.checkpoint import Checkpoint, ClientRecord
from fedlora.federation.records import ClientAnswer

__all__ = ["counted", "deal_ranks", "named_run", "total_weight", "with_answers"]

_log = logging.getLogger(__name__)


def named_run(run: str, config: ExperimentConfig, method: Method) -> str | None:
    """Return the run's name where clients keep something of their own under it in any round."""
    rounds = range(1, config.federation.rounds + 1)
    keeps = method.local.correction is not None or any(map(method.kept, rounds))
    return (run or "unnamed") if keeps else None


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


def total_weight(checkpoint: Checkpoint, config: ExperimentConfig) -> float:
    """Return the weight of all clients that may be sampled, as a round weights their updates."""
    clients = [client for client in checkpoint.clients if not client.held_out]
    if config.federation.weights == "equal":
        return float(len(clients))
    return float(sum(client.num_examples or 0 for client in clients))


def counted(client: ClientRecord, valid: Mapping[str, int]) -> ClientRecord:
    """Return a client after a round; valid: the steps of each whose update counted."""
    steps = valid.get(client.client_id)
    if steps is None:
        return client
    return replace(client, rounds=client.rounds + 1, steps=client.steps + steps)
