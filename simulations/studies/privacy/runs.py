"""One run of the study: federate with a budget, then evaluate each person once.

The virtual users are copies of few people. Everything is computed for the copies in the rounds, and
each person is evaluated once: a copy's personal adapter would differ by its batches alone.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedlora.adapter import Adapter
from fedlora.aggregation import ServerState
from fedlora.errors import DataError, FedloraError, NonFiniteError
from fedlora.evaluation import Trial as Judged
from fedlora.evaluation import evaluate_many
from fedlora.experiment import ExperimentConfig
from fedlora.federation.summed import sent_row
from fedlora.files import write_atomic
from fedlora.personalization import Person, compare_many
from fedlora.privacy import PrivacyEvent
from fedlora.privacy.accounting import calibrate, epsilon_of
from fedlora.privacy.ledger import Ledger
from fedlora.simulation.rounds import run_rounds
from fedlora.simulation.threads import one_torch_thread
from fedlora.world import World, shared_world
from simulations.studies.privacy.plan import DELTA, NONE, Task, Trial

__all__ = ["Multipliers", "carry_out", "config_of", "product_noise"]

WINDOW = 24  # people whose adapters are in memory at once


@dataclass(frozen=True, slots=True)
class Multipliers:
    """Noise multipliers of budgets, kept in a file: one takes fifteen seconds."""

    path: Path

    def of(self, epsilon: float, probability: float, rounds: int) -> float:
        """Return the multiplier by which so many rounds of Poisson sampling cost `epsilon`."""
        key = f"{epsilon:g}/{DELTA:g}/{probability:g}/{rounds}"
        known = json.loads(self.path.read_text()) if self.path.is_file() else {}
        if key not in known:
            known[key] = calibrate(
                epsilon, DELTA, rounds, lambda z: PrivacyEvent(z, "poisson", probability)
            )
            write_atomic(self.path, json.dumps(known, indent=1).encode())
        return float(known[key])


def config_of(task: Task, trial: Trial, multipliers: Multipliers) -> ExperimentConfig:
    """Return a run's experiment. Raises `ConfigError`."""
    settings = {
        **task.overrides,
        "data.clients": trial.users,
        "seed": trial.seed,
        "federation.method": trial.method,
        "federation.learning_rate": trial.settings.learning_rate,
    }
    config = ExperimentConfig.from_table(task.table, settings)
    if trial.epsilon == NONE:
        return config
    federation = config.federation
    multiplier = multipliers.of(trial.epsilon, federation.cohort / trial.users, federation.rounds)
    return ExperimentConfig.from_table(
        task.table,
        settings
        | {
            "privacy.clipping_norm": trial.settings.clipping_norm,
            "privacy.noise_multiplier": multiplier,
            "privacy.delta": DELTA,
            # In the rounds, since it takes no time; what is reported is the ledger by PLD.
            "privacy.accountant": "rdp",
        },
    )


def carry_out(task: Task, trial: Trial, folder: Path) -> dict[str, Any]:
    """Run a trial in a new folder, which is gone afterwards; return its row.

    "failed" has the reason where the run diverged.
    """
    config = config_of(task, trial, Multipliers(folder.parent / "multipliers.json"))
    shutil.rmtree(folder, ignore_errors=True)
    started, before = time.monotonic(), time.process_time()
    row: dict[str, Any] = {
        "key": trial.key, "stage": trial.stage, "task": trial.task, "users": trial.users,
        "method": trial.method, "epsilon": None if trial.epsilon == NONE else trial.epsilon,
        "learning_rate": trial.settings.learning_rate,
        "clipping_norm": trial.settings.clipping_norm, "seed": trial.seed,
    }  # fmt: skip
    world = shared_world(
        config.base, config.data, config.lora, config.seed, config.engine.checkpointing
    )
    people = _people(world, task.people)
    try:
        checkpoint = run_rounds(config, folder, len(world.data))
        state = checkpoint.state
        row |= {"metric": world.task.metric, "higher_is_better": world.task.higher_is_better}
        row |= _noise(config, state, folder)
        if trial.stage == "final":
            row["scores"] = _compared(world, config, state, people)
        else:
            row["scores"] = _validated(world, state, people)
    except FedloraError as error:
        row["failed"] = f"{type(error).__name__}: {error}"[:200]
    row["seconds"] = round(time.monotonic() - started, 1)
    row["cpu_seconds"] = round(time.process_time() - before, 1)
    shutil.rmtree(folder, ignore_errors=True)
    return row


def _people(world: World, count: int | None) -> list[str]:
    """Return the people themselves, no copies: all of them, or `count` over the whole list."""
    people = [client for client in world.data.client_ids if "#" not in client]
    people = [client for client in people if len(world.data.client(client).test)]
    if count is None or count >= len(people):
        return people
    return [people[place * len(people) // count] for place in range(count)]


def _noise(config: ExperimentConfig, state: ServerState, folder: Path) -> dict[str, Any]:
    """Return what the run has spent, and how long the noise of one round's mean is.

    Its length is z C sqrt(d) / cohort, the mean over the rounds; a cohort that agrees moves the
    mean by C. Of the whole run: what noise there is in the product, see `product_noise`.
    """
    method = config.federation.build_method()
    rounds = range(1, config.federation.rounds + 1)
    sizes = [len(sent_row(method, ServerState(round - 1, state.trainable))) for round in rounds]
    row: dict[str, Any] = {"uploaded": max(sizes)}
    if config.privacy is None:
        return row
    ledger = Ledger.read(folder)
    if len(ledger.lines) != config.federation.rounds:
        raise DataError(f"expected {config.federation.rounds} releases, found {len(ledger.lines)}")
    multiplier = config.privacy.noise_multiplier or 0.0
    deviation = multiplier * config.privacy.clipping_norm / config.federation.cohort
    length = sum(map(math.sqrt, sizes)) / len(sizes) * deviation
    sent = {factor: sum(factor in method.uploaded(round) for round in rounds) for factor in "AB"}
    once, twice = product_noise(state.adapter, {f: deviation**2 * sent[f] for f in sent})
    return row | {
        "noise_multiplier": round(multiplier, 5),
        "epsilon_of_ledger": round(_spent(ledger.events()), 4),
        "noise_length": round(length, 6),
        "noise_once": float(f"{once:.5g}"),
        "noise_twice": float(f"{twice:.5g}"),
        "adapter_squared": float(
            f"{sum(layer.norm() ** 2 for layer in state.adapter.layers.values()):.5g}"
        ),
    }


def product_noise(adapter: Adapter, variances: Mapping[str, float]) -> tuple[float, float]:
    """Return the expected squared length of noise in scaling B A, summed over layers.

    variances: of each number of A and of B, all rounds together. In (B + M)(A + N) the noise which
    is there once is M A + B N, and that which is multiplied by noise is M N (arXiv:2403.12313):
    scaling^2 (var_B out |A|^2 + var_A in |B|^2) and scaling^2 var_A var_B out in rank.
    """
    once = twice = 0.0
    for path in adapter:
        layer = adapter[path]
        (rank, inputs), outputs = layer.A.shape, layer.out_features
        squared_A, squared_B = float((layer.A**2).sum()), float((layer.B**2).sum())
        of_A, of_B = variances["A"] * inputs, variances["B"] * outputs
        once += layer.scaling**2 * (of_B * squared_A + of_A * squared_B)
        twice += layer.scaling**2 * of_A * of_B * rank
    return once, twice


@lru_cache(maxsize=64)
def _spent(events: tuple[PrivacyEvent, ...]) -> float:
    return epsilon_of(events, DELTA, "pld")


def _validated(world: World, state: ServerState, people: Sequence[str]) -> dict[str, Any]:
    """Return the global adapter's mean metric and loss on the validation parts."""
    trials = [
        Judged(state.adapter, world.data.client(client).validation, client) for client in people
    ]
    with one_torch_thread():
        found = evaluate_many(world.model, trials, world.task)
    return {"global": _means(world, found)}


def _compared(
    world: World, config: ExperimentConfig, state: ServerState, people: Sequence[str]
) -> dict[str, Any]:
    """Return base, own, global and personal on the test parts; own is personal training alone.

    So own minus base is what a person has without any federation, for the same steps.
    """
    found: list[Person] = []
    for start in range(0, len(people), WINDOW):
        window = [(world.data.client(client), 0) for client in people[start : start + WINDOW]]
        with one_torch_thread():
            for person in compare_many(
                world.model, window, world.task, config,
                initial=world.initial, shared=state.adapter, parts=state.broadcast,
            ):  # fmt: skip
                if isinstance(person, NonFiniteError):
                    raise person
                found.append(person)
    return {
        name: _means(world, [person.scores[name] for person in found])
        for name in ("base", "own", "global", "personal")
    }


def _means(
    world: World, scores: Sequence[Mapping[str, float] | NonFiniteError]
) -> tuple[float, float]:
    """Return (metric, loss), the means over people."""
    for score in scores:
        if isinstance(score, NonFiniteError):
            raise score
    values = [score for score in scores if not isinstance(score, NonFiniteError)]
    metric = sum(score[world.task.metric] for score in values) / len(values)
    loss = sum(score["loss"] for score in values) / len(values)
    return round(metric, 6), round(loss, 6)
