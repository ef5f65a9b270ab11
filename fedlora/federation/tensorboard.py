"""A callback that writes a run for TensorBoard, as an example of one.

    simulate("watch", callbacks=[TensorBoard()])    # writes OUT/tensorboard
    $ pip install tensorboard && tensorboard --logdir runs

It needs the extra ``tracking``: tensorboardX writes the files by itself, without torch and without
TensorBoard, which is needed to look at them only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora.errors import MissingExtraError
from fedlora.experiment import ExperimentConfig
from fedlora.federation.callbacks import RunCallback
from fedlora.federation.checkpoint import RoundRecord
from fedlora.federation.folder import CLIENTS, read_rows
from fedlora.federation.guard import ADAPTERS

__all__ = ["TensorBoard"]


class TensorBoard(RunCallback):
    """Writes scalars a round, and scores of clients that took part as histograms at the end.

    folder: where to; None: ``tensorboard`` in the run's folder. Raises `MissingExtraError` without
    tensorboardX, before a run has begun.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise MissingExtraError("TensorBoard", "tracking") from None
        self._folder = None if folder is None else Path(folder)
        self._open = SummaryWriter
        self._writer: Any = None
        self._clients = Path()

    def on_start(self, folder: Path, config: ExperimentConfig, rounds_done: int) -> None:
        """Open the files. Steps beyond `rounds_done`, of a part that was killed, are taken back."""
        self._clients = folder / CLIENTS
        self._writer = self._open(
            str(self._folder or folder / "tensorboard"), purge_step=rounds_done + 1
        )
        if rounds_done == 0:
            self._writer.add_text("experiment", f"```\n{config.to_toml()}\n```", 0)

    def on_round(self, record: RoundRecord) -> None:
        """Write what the round's line of rounds.jsonl says; its step is the round."""
        values: dict[str, float | None] = {
            "round/loss": record.loss,
            "round/seconds": record.seconds,
            "round/asked": len(record.cohort),
            "round/counted": len(record.cohort) - len(record.dropped),
            "bytes/up": record.bytes_up,
            "bytes/down": record.bytes_down,
            "privacy/epsilon": record.epsilon,
            **{f"noted/{name}": value for name, value in record.noted.items()},
        }
        for tag, value in values.items():
            if value is not None:
                self._writer.add_scalar(tag, value, record.round)
        self._writer.flush()

    def on_end(self, summary: Mapping[str, Any] | None) -> None:
        """Write the results, at the step of the last round, and close the files."""
        if summary is not None:
            step, metric = summary["rounds"], summary["metric"]
            # From the file: a resumed run hears only of clients that it evaluates itself.
            rows = read_rows(self._clients)
            told = [row["scores"] for row in rows if "scores" in row and not row["held_out"]]
            for name in ADAPTERS:
                for key, value in (summary.get(name) or {}).items():
                    self._writer.add_scalar(f"{name}/{key}", value, step)
                values = [scores[name][metric] for scores in told if name in scores]
                if values:
                    self._writer.add_histogram(f"clients/{name}_{metric}", values, step)
        self._writer.close()
