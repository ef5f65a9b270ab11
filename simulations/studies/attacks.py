"""What two attackers among ten cost everyone else, attack by attack and rule by rule.

    python -m simulations.studies.attacks                  writes attacks.md beside this file
    python -m simulations.studies.attacks --methods fedit --seeds 3 --no-watch

Some methods on a small world (`simulations.studies.small_world`), and fedit once on the
bundled "watch": ten clients, all of them every round, in the experiment's own engine. Two are
attackers (`simulations.studies.attackers`), others in every seed. A figure is the mean loss (nats)
of the global adapter on the test examples of the eight honest clients, over the seeds.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from fedlora.adapter import Adapter
from fedlora.aggregation import method, methods, with_rule
from fedlora.errors import ConfigError, FederationError, NonFiniteError
from fedlora.evaluation import Trial, evaluate_many
from fedlora.experiment import ExperimentConfig, find_experiment
from fedlora.federation import run_federation
from fedlora.files import write_atomic
from fedlora.randomness import rng
from fedlora.simulation.cohort_grid import CohortGrid
from fedlora.simulation.threads import one_torch_thread
from fedlora.world import World, shared_world
from simulations.studies import small_world
from simulations.studies.attackers import ATTACKS, with_attackers

__all__ = ["RULES", "main"]

CLIENTS, ATTACKERS = 10, 2
# What stands in the table's columns: a rule's name and its options.
RULES: Mapping[str, tuple[str | None, Mapping[str, Any]]] = {
    "none": (None, {}),
    "median": ("median", {}),
    "trimmed-mean 0.2": ("trimmed-mean", {"share": 0.2}),
    "multi-krum 2": ("multi-krum", {"attackers": 2}),
    "norm-bound": ("norm-bound", {}),
    "norm-bound, max_share 0.125": ("norm-bound", {"max_share": 0.125}),
    "max-share 0.125": ("max-share", {"share": 0.125}),
}
# Those that are refused are the same for the server: one of them stands for all.
SHOWN = ["no attack", "NaN", *(name for name, attack in ATTACKS.items() if not attack.refused)]


@dataclass(frozen=True, slots=True)
class Setting:
    """An experiment of ten clients, and how often it is run."""

    name: str
    experiment: Callable[[Mapping[str, Any]], ExperimentConfig]  # from dotted overrides
    methods: Sequence[str]
    attacks: Sequence[str]
    rounds: int
    seeds: int


_Found = dict[tuple[str, str, str], list[float | None]]  # by method, attack, rule


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and write its page."""
    parser = argparse.ArgumentParser(prog="python -m simulations.studies.attacks")
    parser.add_argument("--methods", default="fedit,ffa-lora", help="names, or 'all'")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--no-watch", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)  # every dropped client, hundreds of times
    names = sorted(methods()) if options.methods == "all" else options.methods.split(",")
    settings = [Setting("small world", _small, names, SHOWN, 12, options.seeds)]
    if not options.no_watch:
        attacks = ["no attack", "sign x 10"]
        settings.append(Setting("watch", _watch, ["fedit"], attacks, 5, 1))
    started, pages = time.monotonic(), []
    for setting in settings:
        found = run(setting)
        pages += tables(setting, found)
    page = "\n".join([*head(time.monotonic() - started, time.process_time()), *pages])
    write_atomic(options.out, page.encode())
    return 0


def run(setting: Setting) -> _Found:
    """Return the losses of every method, attack and rule of a setting, a value a seed."""
    found: _Found = {}
    for name in setting.methods:
        for attack in setting.attacks:
            for rule in filter(lambda rule: allowed(name, rule), RULES):
                losses = [
                    loss_of(setting, name, attack, rule, seed) for seed in range(setting.seeds)
                ]
                found[name, attack, rule] = losses
                print(setting.name, name, attack, rule, losses, sep=" | ", file=sys.stderr)
    return found


def allowed(name: str, rule: str) -> bool:
    """Whether a rule goes with a method; the two of coordinates do not with all."""
    kind, settings = RULES[rule]
    try:
        return kind is None or bool(with_rule(method(name), kind, **settings))
    except ConfigError:
        return False


def loss_of(setting: Setting, name: str, attack: str, rule: str, seed: int) -> float | None:
    """Return the honest clients' mean test loss; None where the run or the loss came to no end."""
    kind, settings = RULES[rule]
    overrides = {
        "seed": seed, "federation.method": name, "federation.rounds": setting.rounds,
        "federation.robust": kind, "federation.robust_options": dict(settings),
    }  # fmt: skip
    config = setting.experiment(overrides)
    world, bad = _world(config), attackers(seed)
    with tempfile.TemporaryDirectory() as folder, one_torch_thread():
        private = Path(folder) / "private"
        grid = CohortGrid(CLIENTS, engine=config.engine, workers=1, private=private)
        if attack != "no attack":
            with_attackers(grid, bad, ATTACKS[attack])
        try:
            adapter = run_federation(grid, config, Path(folder)).adapter
        except FederationError:  # nobody had a finite loss any more
            return None
    return mean_loss(world, adapter, bad)


def attackers(seed: int) -> list[int]:
    """Return the places of the attackers among the clients."""
    chosen: list[int] = rng(seed, "attackers").permutation(CLIENTS)[:ATTACKERS].tolist()
    return chosen


def mean_loss(world: World, adapter: Adapter, bad: Sequence[int]) -> float | None:
    """Return the mean over the honest clients of the loss on their test examples."""
    honest = [client for number, client in enumerate(world.data.client_ids) if number not in bad]
    trials = [Trial(adapter, world.data.client(client).test, client) for client in honest]
    scores = evaluate_many(world.model, trials, world.task)
    losses = [math.nan if isinstance(s, NonFiniteError) else s["loss"] for s in scores]
    return fmean(losses) if all(map(math.isfinite, losses)) else None


def head(seconds: float, cpu_seconds: float) -> list[str]:
    """Return the top of the page."""
    return [
        "# Two attackers among ten", "",
        "Mean test loss (nats) of the global adapter over the eight honest clients, and in",
        "brackets how far the seeds lie apart. \"diverged\": a loss that is not finite, or nobody",
        "could train any more. Written by `python -m simulations.studies.attacks`; do not edit.",
        f"It took {seconds:.0f} s, and {cpu_seconds:.0f} s of processor time, on {os.cpu_count()} "
        f"cores ({platform.machine()}), which were shared with other work.", "",
        "NaN stands for all attacks that are dropped by name (NaN, Inf, 1e30, wrong shape, scalar,",
        "wrong keys, weight -50): to the server they are the same as silence.", "",
    ]  # fmt: skip


def tables(setting: Setting, found: _Found) -> list[str]:
    """Return a table a method: attacks down, rules across."""
    lines = []
    for name in setting.methods:
        columns = [rule for rule in RULES if allowed(name, rule)]
        lines += [
            f"## {name}, {setting.name}", "",
            f"{setting.rounds} rounds, {setting.seeds} seed(s). Without an adapter: "
            f"{_base_loss(setting):.3f}.", "",
            f"| attack | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|",
        ]  # fmt: skip
        for attack in setting.attacks:
            cells = [_cell(found[name, attack, rule]) for rule in columns]
            lines.append(f"| {attack} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def _base_loss(setting: Setting) -> float:
    losses = []
    for seed in range(setting.seeds):
        world = _world(setting.experiment({"seed": seed}))
        losses.append(mean_loss(world, world.initial, attackers(seed)) or math.nan)
    return fmean(losses)


def _small(overrides: Mapping[str, Any]) -> ExperimentConfig:
    return ExperimentConfig.from_table(small_world.experiment().to_table(), overrides)


def _watch(overrides: Mapping[str, Any]) -> ExperimentConfig:
    return ExperimentConfig.from_toml(find_experiment("watch"), overrides)


def _world(config: ExperimentConfig) -> World:
    return shared_world(
        config.base, config.data, config.lora, config.seed, config.engine.checkpointing
    )


def _cell(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return f"diverged in {len(values) - len(known)} of {len(values)}"
    spread = f" ({max(known) - min(known):.2g})" if len(known) > 1 else ""
    return f"{fmean(known):.3g}{spread}"


if __name__ == "__main__":
    sys.exit(main())
