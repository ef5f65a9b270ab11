"""The federation stage of a simulation: the rounds, in the engine that the experiment names."""

from __future__ import annotations

import importlib
import logging
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from flwr.serverapp import Grid

from fedlora.errors import RunError
from fedlora.experiment import ExperimentConfig, app_root
from fedlora.federation import (
    Checkpoint,
    QuorumGrid,
    RoundRecord,
    read_checkpoint,
    run_federation,
)
from fedlora.federation.faults import with_faults
from fedlora.federation.owner import owner_node_config
from fedlora.simulation.cohort_grid import CohortGrid
from fedlora.simulation.flower import run_in_flower
from fedlora.simulation.grid import InProcessGrid
from fedlora.simulation.threads import one_torch_thread, worker_count
from fedlora.simulation.workers import ray_workers

__all__ = ["PRIVATE", "load_app", "run_rounds"]

PRIVATE = "private"  # in a run's folder: factors that virtual clients keep to themselves


def run_rounds(
    config: ExperimentConfig,
    out: Path,
    num_clients: int,
    *,
    on_round: Callable[[RoundRecord], None] | None = None,
) -> Checkpoint:
    """Run the rounds of `config` in its engine, or go on with those in `out`; return the end.

    num_clients: virtual clients, all of the data's. on_round gets each round once it is on the
    disk. `out` gets ``rounds.jsonl`` and ``checkpoint/``.

    Raises what `run_federation` and `run_in_flower` raise.
    """
    if config.engine.kind == "flower":
        run_in_flower(config, out, num_clients, on_round=on_round)
    else:
        with _quiet_flower(), one_torch_thread(), _grid(config, out, num_clients) as grid:
            grid = with_faults(grid, config.faults)
            if config.quorum is not None:
                grid = QuorumGrid(grid, config.quorum, config.federation.cohort)
            # The cohort engine keeps its clients' states in the run's folder.
            remember = config.engine.kind == "cohort"
            run_federation(grid, config, out, clients_remember=remember, on_round=on_round)
    return read_checkpoint(out)


@contextmanager
def _grid(config: ExperimentConfig, out: Path, num_clients: int) -> Iterator[Grid]:
    threads, private = worker_count(config), out / PRIVATE
    if config.engine.kind == "sequential":
        app, node_config = load_app("clientapp"), owner_node_config(config)
        yield InProcessGrid(app, num_clients, node_config, workers=threads)
    elif config.engine.workers == 0:
        yield CohortGrid(num_clients, engine=config.engine, workers=threads, private=private)
    else:
        with ray_workers(config.engine.workers) as pool:
            yield CohortGrid(
                num_clients, engine=config.engine, workers=pool.count, train=pool, private=private
            )


def load_app(component: Literal["clientapp", "serverapp"]) -> Any:
    """Return this app's ClientApp or ServerApp, found as Flower finds it: by the pyproject."""
    root = app_root()
    table = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    module_name, _, attribute = table["tool"]["flwr"]["app"]["components"][component].partition(":")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    module = importlib.import_module(module_name)
    if not Path(module.__file__ or "").resolve().is_relative_to(root.resolve()):
        raise RunError(
            f"{module_name}: expected fedlora's own in {root}, found {module.__file__}, which is "
            "before it on sys.path; rename that package or start elsewhere"
        )
    return getattr(module, attribute)


@contextmanager
def _quiet_flower() -> Iterator[None]:
    """Keep Flower's own log of every round out of the progress; warnings stay."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)
