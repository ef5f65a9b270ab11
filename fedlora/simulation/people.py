"""The last stage of a run: every client's four adapters, several clients at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from fedlora.adapter import Adapter
from fedlora.errors import NonFiniteError
from fedlora.evaluation import evaluate
from fedlora.experiment import ExperimentConfig
from fedlora.federation.checkpoint import ClientRecord
from fedlora.files import write_atomic
from fedlora.formats import load_adapter, save_adapter
from fedlora.personalization import compare_adapters
from fedlora.simulation.folder import append_row, json_line, read_rows
from fedlora.simulation.results import cross_matrix
from fedlora.simulation.threads import in_order, one_torch_thread, worker_count
from fedlora.world import World

__all__ = ["cross_evaluate", "evaluate_clients"]

T = TypeVar("T")
S = TypeVar("S")

Report = Callable[[int, int, str], None]  # done, of how many, a few words


def evaluate_clients(
    world: World,
    config: ExperimentConfig,
    shared: Adapter,
    *,
    took_part: Sequence[ClientRecord],
    file: Path,
    keep_own: Mapping[str, Path],
    keep_personal: Mapping[str, Path],
    report: Report,
    seconds: Callable[[], float],
) -> list[dict[str, Any]]:
    """Return a row per client in the order of ids; each is in `file` as soon as it is known.

    took_part: what each client did in the rounds. keep_own, keep_personal: where to save whose
    adapter. Rows of this global adapter that `file` already has are not computed again. A client
    whose training diverges has "failed" with the reason in place of "scores".
    """
    records = {record.client_id: record for record in took_part}
    digest = shared.fingerprint()
    found = read_rows(file)
    rows = {row["client"]: row for row in found if row.get("global") == digest}
    if len(rows) < len(found):  # the run went on for more rounds after they were written
        write_atomic(file, b"".join(json_line(row) for row in rows.values()))
    clients = [client for client in world.data.client_ids if client in records]
    kept = {name for name, path in keep_own.items() if path.is_file() and name in rows}
    todo = [c for c in clients if c not in rows or (c in keep_own and c not in kept)]

    def one(local: World, client: str) -> dict[str, Any]:
        row = {
            "client": client,
            "held_out": records[client].held_out,
            "rounds": records[client].rounds,
            "global": digest,
        }
        try:
            person = compare_adapters(
                local.model,
                local.data.client(client),
                local.task,
                config,
                initial=local.initial,
                shared=shared,
                federated_steps=records[client].steps,
            )
        except NonFiniteError as error:
            return row | {"failed": f"client {client!r}: {error}"}
        for adapter, files in ((person.own, keep_own), (person.personal, keep_personal)):
            if client in files:
                files[client].parent.mkdir(exist_ok=True)
                provenance = {"run": config.name, "client": client, "global": digest}
                save_adapter(adapter, files[client], provenance=provenance)
        return row | {"scores": person.scores}

    done = len(clients) - len(todo)
    report(done, len(clients), "")
    for row in _on_all_cores(world, one, todo, config):
        if row["client"] not in rows:
            rows[row["client"]] = row
            append_row(file, row | {"seconds": round(seconds(), 3)})  # of the run so far
        done += 1
        report(done, len(clients), row["client"])
    return [rows[client] for client in clients]


def cross_evaluate(
    world: World, config: ExperimentConfig, own: Mapping[str, Path], report: Report
) -> dict[str, Any]:
    """Evaluate everyone's own adapter on everyone's held-out examples; see `cross_matrix`."""
    clients = list(own)
    adapters = {client: load_adapter(path) for client, path in own.items()}

    def column(local: World, client: str) -> list[float]:
        examples = local.data.client(client).test
        return [
            evaluate(
                local.model, adapters[i], examples, local.task, f"adapter {i!r} on {client!r}"
            )[local.task.metric]
            for i in clients
        ]

    columns = []
    report(0, len(clients), "")
    for values in _on_all_cores(world, column, clients, config):
        columns.append(values)
        report(len(columns), len(clients), "")
    better = world.task.higher_is_better
    return cross_matrix(clients, list(zip(*columns, strict=True)), higher_is_better=better)


def _on_all_cores(
    world: World, work: Callable[[World, S], T], items: Sequence[S], config: ExperimentConfig
) -> Iterator[T]:
    """Yield ``work(world, item)`` in the order of `items`; each thread has factors of its own."""
    workers = max(1, min(len(items), worker_count(config)))
    worlds: SimpleQueue[World] = SimpleQueue()
    for number in range(workers):
        worlds.put(world if number == 0 else world.copy())

    def run(item: S) -> T:
        local = worlds.get()
        try:
            return work(local, item)
        finally:
            worlds.put(local)

    with one_torch_thread():
        yield from in_order(run, items, workers)
