"""The ServerApp: read the experiment, run the federation, leave its files in a folder.

Run config: ``experiment`` (a TOML file; a relative path is taken from this app's own folder),
``out`` (the folder of the run), ``min-clients`` (the run starts once so many are connected) and
``evaluate`` (true: after the rounds every client personalizes and evaluates the global adapter).
"""

from __future__ import annotations

import logging
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlora.errors import FedloraError
from fedlora.experiment import ExperimentConfig
from fedlora.federation import run_federation
from fedlora.federation.results import run_table

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
        run_federation(
            grid, config, out, min_clients=int(settings["min-clients"]), evaluate=evaluate
        )
        if evaluate:
            _log.info("results:\n%s", run_table(out))
    except FedloraError as error:
        # One line that whoever reads this log can find: Flower adds a trace over many.
        _log.error("fedlora-error %s: %s", type(error).__name__, error)
        raise
