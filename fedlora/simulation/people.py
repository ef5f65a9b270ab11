"""The last stage of a run: every client's four adapters, several clients at a time.

Clients are taken in windows, one window a core at a time: its clients are trained and evaluated
together, its rows are written, and its adapters are gone before the next one starts. So memory does
not grow with the population, and a run that is killed loses the windows that it was at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from fedlora.adapter import Adapter
from fedlora.aggregation import Broadcast
from fedlora.data import ClientData
from fedlora.errors import NonFiniteError
from fedlora.evaluation import Trial, evaluate, evaluate_many
from fedlora.experiment import ExperimentConfig
from fedlora.federation.checkpoint import ClientRecord
from fedlora.federation.folder import append_row, rows_of_global
from fedlora.federation.results import cross_matrix
from fedlora.formats import load_adapter, save_adapter
from fedlora.personalization import Person, compare_adapters, compare_many
from fedlora.simulation.threads import in_order, one_torch_thread, worker_count
from fedlora.world import World

__all__ = ["cross_evaluate", "evaluate_clients"]

T = TypeVar("T")
S = TypeVar("S")

WINDOW = 24  # clients whose adapters one thread holds at most
WINDOWS = 16  # that there should be at least, for the cores of any machine

Report = Callable[[int, int, str], None]  # done, of how many, a few words


def evaluate_clients(
    world: World,
    config: ExperimentConfig,
    shared: Adapter,
    *,
    parts: Broadcast | None = None,
    start_of: Callable[[str], Adapter] | None = None,
    took_part: Sequence[ClientRecord],
    file: Path,
    keep_own: Mapping[str, Path],
    keep_personal: Mapping[str, Path],
    report: Report,
    seconds: Callable[[], float],
    on_row: Callable[[Mapping[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Return a row per client in the order of ids; each is in `file` as soon as it is known.

    shared, parts: the global adapter, whole and divided (`compare_adapters`). start_of: what the
    personal adapter of a client begins with; None: what of the global one is trained.
    took_part: what each client did in the rounds. keep_own, keep_personal: where to save whose
    adapter. on_row gets each new row once it is written. Rows of this global adapter that `file`
    already has are not computed again. A client whose training diverges has "failed" with the
    reason in place of "scores".
    """
    records = {record.client_id: record for record in took_part}
    digest = shared.fingerprint()
    rows = rows_of_global(file, digest)
    clients = [client for client in world.data.client_ids if client in records]
    kept = {name for name, path in keep_own.items() if path.is_file() and name in rows}
    todo = {c for c in clients if c not in rows or (c in keep_own and c not in kept)}

    def people(local: World, window: Sequence[str]) -> list[Person | NonFiniteError]:
        everyone = [(local.data.client(client), records[client].steps) for client in window]
        starts = None if start_of is None else [start_of(client) for client in window]
        if config.engine.kind != "sequential":
            return compare_many(
                local.model, everyone, local.task, config,
                initial=local.initial, shared=shared, parts=parts, starts=starts,
            )  # fmt: skip
        return [
            _alone(local, data, config, shared, parts, start, steps)
            for (data, steps), start in zip(everyone, starts or repeat(None), strict=False)
        ]

    def rows_of(local: World, window: Sequence[str]) -> list[dict[str, Any]]:
        return [
            row_of(client, person)
            for client, person in zip(window, people(local, window), strict=True)
        ]

    def row_of(client: str, person: Person | NonFiniteError) -> dict[str, Any]:
        row = {
            "client": client,
            "held_out": records[client].held_out,
            "rounds": records[client].rounds,
            "global": digest,
        }
        if isinstance(person, NonFiniteError):
            return row | {"failed": f"client {client!r}: {person}"}
        for adapter, files in ((person.own, keep_own), (person.personal, keep_personal)):
            if client in files:
                files[client].parent.mkdir(exist_ok=True)
                provenance = {"run": config.name, "client": client, "global": digest}
                save_adapter(adapter, files[client], provenance=provenance)
        if config.personalization.keep_better:
            row["kept_global"] = person.kept_global
        return row | {"scores": person.scores}

    done = len(clients) - len(todo)
    report(done, len(clients), "")
    # A window is done as a whole or again as a whole: a resumed run has the bits of any other.
    windows = [w for w in _windows(clients, config) if not todo.isdisjoint(w)]
    for window in _on_all_cores(world, rows_of, windows, config):
        for row in window:
            if row["client"] not in todo:
                continue
            if row["client"] not in rows:
                rows[row["client"]] = row
                append_row(file, row | {"seconds": round(seconds(), 3)})  # of the run so far
                if on_row is not None:
                    on_row(row)
            done += 1
            report(done, len(clients), row["client"])
    return [rows[client] for client in clients]


def _alone(
    world: World,
    data: ClientData,
    config: ExperimentConfig,
    shared: Adapter,
    parts: Broadcast | None,
    start: Adapter | None,
    steps: int,
) -> Person | NonFiniteError:
    try:
        return compare_adapters(
            world.model,
            data,
            world.task,
            config,
            initial=world.initial,
            shared=shared,
            parts=parts,
            start=start,
            federated_steps=steps,
        )
    except NonFiniteError as error:
        return error


def _windows(clients: Sequence[str], config: ExperimentConfig) -> list[Sequence[str]]:
    """Divide clients into windows, in order; one client each where they train one at a time.

    Nothing but the clients decides: neither the cores nor what an earlier part of the run has done.
    """
    share = math.ceil(len(clients) / WINDOWS)
    size = 1 if config.engine.kind == "sequential" else max(1, min(WINDOW, share))
    return [clients[start : start + size] for start in range(0, len(clients), size)]


def cross_evaluate(
    world: World, config: ExperimentConfig, own: Mapping[str, Path], report: Report
) -> dict[str, Any]:
    """Evaluate everyone's own adapter on everyone's held-out examples; see `cross_matrix`.

    Raises `NonFiniteError` when a loss is not finite.
    """
    clients = list(own)

    def values_of(local: World, owner: str) -> list[float]:
        adapter = load_adapter(own[owner])
        trials = [
            Trial(adapter, local.data.client(client).test, f"adapter {owner!r} on {client!r}")
            for client in clients
        ]
        if config.engine.kind != "sequential":
            found = evaluate_many(local.model, trials, local.task)
        else:
            found = [
                evaluate(local.model, t.adapter, t.examples, local.task, t.who) for t in trials
            ]
        return [_metric(scores, local.task.metric) for scores in found]

    matrix = []
    report(0, len(clients), "")
    for values in _on_all_cores(world, values_of, clients, config):
        matrix.append(values)
        report(len(matrix), len(clients), "")
    return cross_matrix(clients, matrix, higher_is_better=world.task.higher_is_better)


def _metric(scores: dict[str, float] | NonFiniteError, name: str) -> float:
    if isinstance(scores, NonFiniteError):
        raise scores
    return scores[name]


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
