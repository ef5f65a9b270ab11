"""The last stage of a run on devices: every client evaluates, and the run's folder has results.

One message goes to every client that was met, held-out ones too. Each trains its own and its
personal adapter on its own data and tells how base, own, global and personal do on its held-out
part. The files are those of a simulation (`fedlora.federation.folder`), and a row is on the disk as
soon as it is known: a run that is killed and started again asks those who have none. A client that
fails is noted in its row, and is asked again too.

With privacy clients do the same and keep their adapters, and tell nothing: a row says that one has
answered, and summary.json has no scores.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedlora.adapter import Adapter
from fedlora.aggregation import ClientProfile, Method
from fedlora.errors import ConfigError, FederationError, FedloraError
from fedlora.experiment import ExperimentConfig
from fedlora.federation.checkpoint import Checkpoint, ClientRecord, read_rounds
from fedlora.federation.client import one_line
from fedlora.federation.evaluate import EvaluateOrder, decode_scores, evaluate_content
from fedlora.federation.faults import describe_faults
from fedlora.federation.folder import CLIENTS, SUMMARY, append_row, rows_of_global, save_global
from fedlora.federation.guarantee import privacy_summary
from fedlora.federation.limits import DECLINED, read_declined
from fedlora.federation.population import named_run
from fedlora.federation.records import (
    BOTH,
    ClientSetup,
    EncodedAdapter,
    encode_adapter,
    to_record,
)
from fedlora.federation.results import run_notes, run_summary
from fedlora.files import write_atomic

__all__ = ["OnClient", "evaluate_devices", "require_stage"]

GROUP = "evaluate"  # of the messages, where a round's have its number

OnClient = Callable[[int, int, str], None]  # done, of how many, the client that has just answered

_log = logging.getLogger(__name__)


def require_stage(config: ExperimentConfig) -> None:
    """Raise `ConfigError` for what devices cannot do after the rounds; to be asked before them."""
    if config.personalization.kind != "personal":
        raise ConfigError(
            "personalization.kind: expected 'personal' on devices, found "
            f"{config.personalization.kind!r}, which needs both adapters in every request; change "
            "it, or simulate this experiment"
        )


def evaluate_devices(
    grid: Grid,
    config: ExperimentConfig,
    method: Method,
    checkpoint: Checkpoint,
    nodes: Mapping[str, int],
    out: Path,
    *,
    timeout: float = 3600.0,
    on_client: OnClient | None = None,
) -> dict[str, Any]:
    """Have all clients personalize and evaluate the global adapter; return summary.json.

    nodes: by client id, those that are connected. timeout: seconds for all of them together. `out`
    gets ``adapter/``, ``adapter.safetensors``, ``clients.jsonl`` and, last, ``summary.json``.

    Raises `ConfigError` as `require_stage`, and `FederationError` when no client that took part has
    results.
    """
    require_stage(config)
    save_global(out, config, checkpoint.state)
    digest = checkpoint.state.adapter.fingerprint()
    file, started = out / CLIENTS, time.monotonic()
    rows = rows_of_global(file, digest, failed=False)
    before = max((float(row["seconds"]) for row in rows.values()), default=checkpoint.seconds)
    todo = [client for client in checkpoint.clients if client.client_id not in rows]
    total = len(checkpoint.clients)
    _log.info("evaluation: %d of %d clients are asked", len(todo), total)
    for row in _asked(grid, config, method, checkpoint, nodes, todo, timeout):
        seconds = before + time.monotonic() - started
        rows[row["client"]] = row = row | {"global": digest, "seconds": round(seconds, 3)}
        append_row(file, row)
        if "failed" in row:
            _log.warning("evaluation: %s", row["failed"])
        if on_client is not None:
            on_client(len(rows), total, row["client"])
    summary = _summary(config, checkpoint, [rows[c.client_id] for c in checkpoint.clients], out)
    summary["seconds"] = round(before + time.monotonic() - started, 3)
    write_atomic(out / SUMMARY, json.dumps(summary, indent=2).encode())
    return summary


def _asked(
    grid: Grid,
    config: ExperimentConfig,
    method: Method,
    checkpoint: Checkpoint,
    nodes: Mapping[str, int],
    clients: Iterable[ClientRecord],
    timeout: float,
) -> Iterator[dict[str, Any]]:
    """Ask clients, and yield a row for each as soon as it is known."""
    awaited: dict[int, ClientRecord] = {}
    absent = [client for client in clients if client.client_id not in nodes]
    present = [client for client in clients if client.client_id in nodes]

    def messages() -> Iterator[Message]:
        content = _Contents(config, method, checkpoint)
        for client in present:
            node = nodes[client.client_id]
            awaited[node] = client
            yield Message(content.of(client), node, "evaluate", group_id=GROUP)

    for client in absent:
        yield _failed(client, "not connected")
    if present:
        for reply in grid.send_and_receive(messages(), timeout=timeout):
            found = awaited.pop(reply.metadata.src_node_id, None)
            if found is not None:  # a second reply, or a stranger's
                yield _row(found, reply, config)
    for client in awaited.values():
        yield _failed(client, "no reply in time")


class _Contents:
    """The messages' contents; what clients are sent alike is encoded once."""

    def __init__(self, config: ExperimentConfig, method: Method, checkpoint: Checkpoint) -> None:
        state, train = checkpoint.state, config.personal_training
        kept = method.kept(max(1, state.round))
        self._method, self._state = method, state
        self._setup = to_record(ClientSetup.of(config, named_run(checkpoint.run, config, method)))
        self._trainable = encode_adapter(state.trainable, BOTH, state.round)
        self._frozen = None
        if state.frozen is not None:
            self._frozen = encode_adapter(state.frozen, BOTH, state.round)
        self._order = EvaluateOrder(
            round=state.round,
            seed=config.seed,
            train=train,
            own_steps=config.personalization.steps,
            name=config.name,
            method=config.federation.method,
            proximal_weight=config.personalization.proximal_weight,
            keep_better=config.personalization.keep_better,
            kept=kept,
            tell=not config.sums_only,
        )
        self._starts: dict[int, EncodedAdapter] = {}

    def of(self, client: ClientRecord) -> Any:
        """Return the message's content for one client."""
        order = replace(self._order, own_steps=self._order.own_steps + client.steps)
        start = self._start(client)
        return evaluate_content(self._setup, to_record(order), self._trainable, self._frozen, start)

    def _start(self, client: ClientRecord) -> EncodedAdapter | None:
        """Return what a client trains from that has named a rank below the global adapter's.

        It serves and evaluates the whole global adapter all the same. A method for equal ranks has
        nothing smaller to send: the client then says that it cannot train that.
        """
        rank, whole = client.rank, self._state.trainable
        if rank is None or max(whole.ranks) <= rank or not self._method.any_rank:
            return None
        if rank not in self._starts:
            profile = ClientProfile(client.client_id, rank, client.num_examples)
            smaller: Adapter = self._method.broadcast(self._state, profile).trainable
            self._starts[rank] = encode_adapter(smaller, BOTH, self._state.round)
        return self._starts[rank]


def _row(client: ClientRecord, reply: Message, config: ExperimentConfig) -> dict[str, Any]:
    """Return a client's row; what a stranger sent must not end everyone's run."""
    if reply.has_error():
        return _failed(client, reply.error.reason or "failed, no reason")
    try:
        if word := read_declined(reply.content):
            return _failed(client, f"{DECLINED}{word}")
        scores, kept = decode_scores(
            reply.content,
            f"client {client.client_id!r}",
            keep_better=config.personalization.keep_better and not config.sums_only,
        )
        if config.sums_only and scores is not None:
            raise FederationError(f"client {client.client_id!r}: expected no scores, found some")
    except FedloraError as error:
        return _failed(client, str(error))
    except Exception as error:
        return _failed(client, f"a reply that cannot be read ({type(error).__name__})")
    row = _about(client)
    if config.sums_only:
        return row | {"untold": True}
    if kept is not None:
        row["kept_global"] = kept
    return row | ({"untested": True} if scores is None else {"scores": scores})


def _failed(client: ClientRecord, reason: str) -> dict[str, Any]:
    who = f"client {client.client_id!r}"
    text = reason if reason.startswith(who) else f"{who}: {reason}"
    return _about(client) | {"failed": one_line(text)}


def _about(client: ClientRecord) -> dict[str, Any]:
    return {"client": client.client_id, "held_out": client.held_out, "rounds": client.rounds}


def _summary(
    config: ExperimentConfig, checkpoint: Checkpoint, rows: list[dict[str, Any]], out: Path
) -> dict[str, Any]:
    if config.sums_only:
        return _untold(config, checkpoint, rows, out)
    if not any("scores" in row and not row["held_out"] for row in rows):
        reasons = [row["failed"] for row in rows if "failed" in row]
        raise FederationError(
            f"none of {len(rows)} clients has results of its adapters: "
            f"{reasons[0] if reasons else 'none has held-out examples'}; the global adapter is in "
            f"{out}, and starting the run again asks them again"
        )
    metric, higher_is_better = _metric(config, rows)
    rounds = read_rounds(out)
    summary = run_summary(
        config, checkpoint, rows, rounds, metric=metric, higher_is_better=higher_is_better
    )
    untested = sum("untested" in row for row in rows)
    summary["extra"]["notes"] = [
        *filter(None, [describe_faults(config.faults)]),
        *run_notes(checkpoint, rounds, rows, untested),
    ]
    return summary


def _untold(
    config: ExperimentConfig, checkpoint: Checkpoint, rows: list[dict[str, Any]], out: Path
) -> dict[str, Any]:
    """Return the summary of a run whose clients tell nothing of their adapters.

    Raises `FederationError` when none of them has personalized.
    """
    done = [row for row in rows if "untold" in row]
    if not done:
        reasons = [row["failed"] for row in rows if "failed" in row]
        raise FederationError(
            f"none of {len(rows)} clients has personalized: {reasons[0]}; the global adapter is in "
            f"{out}, and starting the run again asks them again"
        )
    metric, higher_is_better = _metric(config, [])
    summary = run_summary(
        config, checkpoint, [], read_rounds(out), metric=metric,
        higher_is_better=higher_is_better, privacy=privacy_summary(out, config, checkpoint),
    )  # fmt: skip
    summary["clients"] = len(done)
    summary["extra"]["notes"] = [
        f"{len(done)} clients have personalized, and tell nothing of it: their scores are not part "
        "of what this run may release",
        *filter(None, [describe_faults(config.faults)]),
        *run_notes(checkpoint, read_rounds(out), rows, 0),
    ]
    return summary


def _metric(config: ExperimentConfig, rows: list[dict[str, Any]]) -> tuple[str, bool]:
    """Return the metric of the task, and whether higher is better.

    The server has no torch and so no task: one of the user's own is known by what clients report.
    """
    known = {"classification": ("accuracy", True), "next-token": ("loss", False)}
    if config.data.task in known:
        return known[config.data.task]
    scored = [row for row in rows if "scores" in row]
    by_accuracy = all("accuracy" in row["scores"]["base"] for row in scored)
    return known["classification" if by_accuracy else "next-token"]
