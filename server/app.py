"""The ServerApp: read the experiment, run the federation, leave its files in a folder.

Run config: ``experiment`` (a TOML file; a relative path is taken from this app's own folder),
``out`` (the folder of the run), ``min-clients`` (the run starts once so many are connected) and
``evaluate`` (true: after the rounds every client personalizes and evaluates the global adapter).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

import fedlora.report as reports
from fedlora.errors import FedloraError
from fedlora.experiment import ExperimentConfig
from fedlora.federation import QuorumGrid, RoundRecord, round_words, run_federation
from fedlora.federation._flower_private import with_quick_objects_in_grid
from fedlora.federation.faults import with_faults
from fedlora.federation.results import run_table

AT_ONCE = 32  # messages in one call to the SuperLink: their arrays are all in memory together

app = ServerApp()
_log = logging.getLogger("fedlora.server")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one federation, or go on with the one whose checkpoint is in ``out``."""
    settings = context.run_config
    experiment = Path(__file__).resolve().parent.parent / str(settings["experiment"])
    out, evaluate = Path(str(settings["out"])), bool(settings.get("evaluate", True))
    try:
        config = ExperimentConfig.from_toml(experiment)
        with contextlib.suppress(ImportError, AttributeError):  # another Flower: it waits longer
            with_quick_objects_in_grid()
        run_federation(
            QuorumGrid(
                with_faults(grid, config.faults, real_time=True),
                config.quorum,
                config.federation.cohort,
                at_once=AT_ONCE,
            ),
            config,
            out,
            min_clients=int(settings["min-clients"]),
            on_round=_print_rounds(config.federation.rounds),
            evaluate=evaluate,
            on_client=lambda done, total, client: print(
                f"evaluated {done}/{total} {client}", flush=True
            ),
        )
        if evaluate:
            print(run_table(out), flush=True)
            reports.report_at_end(out)
    except FedloraError as error:
        # One line that whoever reads this log can find: Flower adds a trace over many.
        _log.error("fedlora-error %s: %s", type(error).__name__, error)
        raise


def _print_rounds(total: int) -> Callable[[RoundRecord], None]:
    """Return what says how each round went, where ``flwr log`` shows it."""

    def show(record: RoundRecord) -> None:
        print(f"round {record.round}/{total} {round_words(record)}", flush=True)

    return show
