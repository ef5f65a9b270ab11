"""What a run tells to others while it goes: to a tracker, a notebook, a chat room.

    class Loss(RunCallback):
        def on_round(self, record):
            print(record.round, record.loss)

    simulate("watch", callbacks=[Loss()])

`RunCallback` has four methods that do nothing; override those that you need. Calls come one at a
time, in the run's own process and between its steps, so a slow one slows the run. What one raises
is logged as a warning and ends neither the run nor the other callbacks. A real federation's server
passes the rounds on as well: ``run_federation(..., on_round=Callbacks([Loss()]).on_round)``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora.experiment import ExperimentConfig
from fedlora.federation.checkpoint import RoundRecord

__all__ = ["Callbacks", "RunCallback"]

_log = logging.getLogger(__name__)


class RunCallback:
    """Hears of a run; see the module."""

    def on_start(self, folder: Path, config: ExperimentConfig, rounds_done: int) -> None:
        """A run begins in `folder`, or goes on after `rounds_done` rounds."""

    def on_round(self, record: RoundRecord) -> None:
        """A round is over, and on the disk. Its loss is None under a privacy guarantee."""

    def on_client(self, row: Mapping[str, Any]) -> None:
        """A client was evaluated after the rounds: its row of clients.jsonl.

        It has "scores" (by adapter, then by measure) or "failed" (why not).
        """

    def on_end(self, summary: Mapping[str, Any] | None) -> None:
        """The run is over: its summary.json, or None where an error or an interrupt ended it."""


class Callbacks:
    """Several callbacks as one, none of which can end a run.

    The first failure of each method of each callback is logged, with its words; it goes on being
    called, since a tracker that was away may come back.
    """

    def __init__(self, callbacks: Sequence[RunCallback] = ()) -> None:
        self._callbacks = tuple(callbacks)
        self._failed: set[tuple[int, str]] = set()
        self._begun = False

    def on_start(self, folder: Path, config: ExperimentConfig, rounds_done: int) -> None:
        """Pass it on."""
        self._begun = True
        self._tell("on_start", folder, config, rounds_done)

    def on_round(self, record: RoundRecord) -> None:
        """Pass it on."""
        self._tell("on_round", record)

    def on_client(self, row: Mapping[str, Any]) -> None:
        """Pass it on."""
        self._tell("on_client", row)

    def on_end(self, summary: Mapping[str, Any] | None) -> None:
        """Pass it on, once, and only to those that heard of the start."""
        if self._begun:
            self._begun = False
            self._tell("on_end", summary)

    def _tell(self, method: str, *arguments: Any) -> None:
        for number, callback in enumerate(self._callbacks):
            try:
                getattr(callback, method)(*arguments)
            except Exception as error:
                if (number, method) in self._failed:
                    continue
                self._failed.add((number, method))
                name = type(callback).__name__
                _log.warning(
                    "callback %s.%s failed, the run goes on: %s: %s",
                    name, method, type(error).__name__, error,
                )  # fmt: skip
                _log.debug("where it failed", exc_info=True)
