"""The ServerApp: read the experiment, run the federation, leave its files in a folder.

Run config: ``experiment`` (a TOML file; a relative path is taken from this app's own folder),
``out`` (the folder of the run) and ``min-clients`` (the run starts once so many are connected).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlora.errors import FedloraError
from fedlora.experiment import ExperimentConfig
from fedlora.federation import QuorumGrid, RoundRecord, round_words, run_federation

AT_ONCE = 32  # messages in one call to the SuperLink: their arrays are all in memory together

app = ServerApp()
_log = logging.getLogger("fedlora.server")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one federation, or go on with the one whose checkpoint is in ``out``."""
    settings = context.run_config
    experiment = Path(__file__).resolve().parent.parent / str(settings["experiment"])
    try:
        config = ExperimentConfig.from_toml(experiment)
        run_federation(
            QuorumGrid(grid, config.quorum, config.federation.cohort, at_once=AT_ONCE),
            config,
            Path(str(settings["out"])),
            min_clients=int(settings["min-clients"]),
            on_round=_log_rounds(config.federation.rounds),
        )
    except FedloraError as error:
        # One line that whoever reads this log can find: Flower adds a trace over many.
        _log.error("fedlora-error %s: %s", type(error).__name__, error)
        raise


def _log_rounds(total: int) -> Callable[[RoundRecord], None]:
    def log(record: RoundRecord) -> None:
        _log.info("round %d/%d %s", record.round, total, round_words(record))

    return log
