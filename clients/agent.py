"""A device's program: it keeps itself up to date, and answers requests, one JSON object a line.

    {"text": "see you "}      →  {"words": [["tomorrow", 0.21], …]}      a language model
    {"inputs": [[0.1, …]]}    →  {"labels": [["walk", 0.97], …]}         a classifier

Run it with ``python -m clients.agent``. The environment says where everything is, as for
`fedlora device run`: ``FEDLORA_STATE``, ``FEDLORA_OTA_URL``, ``FEDLORA_OTA_ROOT``, and if the owner
wants them ``FEDLORA_OTA_CHANNEL``, ``FEDLORA_DATA``, ``FEDLORA_OTA_REPORT`` and
``FEDLORA_OTA_SECONDS`` between two polls. A new adapter serves from the request after its commit
on; none waits for an update. It ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from fedlora.agent import Agent, Turn
from fedlora.device.manifest import TOKENIZER
from fedlora.device.owner_data import OwnerData, read_owner_data
from fedlora.device.runtime import OpenBundle
from fedlora.device.session import Session
from fedlora.errors import ConfigError, FedloraError
from fedlora.ota import DeviceUpdater

__all__ = ["answer", "main", "open_agent", "serve"]


def open_agent(settings: Mapping[str, str]) -> Agent:
    """Return the agent that an environment describes. Raises `ConfigError` and `StoreError`."""
    for name in ("FEDLORA_STATE", "FEDLORA_OTA_URL", "FEDLORA_OTA_ROOT"):
        if not settings.get(name):
            raise ConfigError(f"expected {name} in the environment, found none")
    updater = DeviceUpdater(
        settings["FEDLORA_OTA_URL"],
        settings["FEDLORA_STATE"],
        bootstrap=Path(settings["FEDLORA_OTA_ROOT"]).read_bytes(),
        channel=settings.get("FEDLORA_OTA_CHANNEL", "stable"),
    )
    source = settings.get("FEDLORA_DATA")

    def read(bundle: OpenBundle) -> OwnerData:
        assert source is not None
        tokenizer = bundle.tokenizer() if TOKENIZER in bundle.manifest.files else None
        return read_owner_data(source, tokenizer, bundle.manifest)

    report = settings.get("FEDLORA_OTA_REPORT")
    return Agent(updater, data=read if source else None, report=report)


def serve(agent: Agent, requests: Iterable[str], out: IO[str], *, every: float = 21_600.0) -> None:
    """Answer requests until there are no more; update in between, in a thread of its own."""
    session, stop = agent.session(), threading.Event()

    def keep_up_to_date() -> None:
        try:
            agent.run(every=every, stop=stop, on_turn=_tell)
        except FedloraError as error:  # another agent, or wrong usage: requests are answered on
            _tell(error)

    thread = threading.Thread(target=keep_up_to_date, name="fedlora-agent")
    thread.start()
    try:
        for line in requests:
            print(json.dumps(answer(session, line), ensure_ascii=False), file=out, flush=True)
    finally:
        stop.set()
        thread.join()


def answer(session: Session, line: str) -> dict[str, Any]:
    """Return the answer to one request; what is wrong with it is an answer too."""
    try:
        request = json.loads(line)
        if session.manifest.task == "next-token":
            return {"words": [[w.word, w.probability] for w in session.suggest(request["text"])]}
        return {"labels": [[p.label, p.probability] for p in session.predict(request["inputs"])]}
    except FedloraError as error:
        return {"error": str(error)}
    except (ValueError, KeyError, TypeError):
        return {"error": 'expected a JSON object with "text" or "inputs"'}


def main() -> int:
    """Run until standard input ends; return an exit code."""
    try:
        every = float(os.environ.get("FEDLORA_OTA_SECONDS", "21600"))
        serve(open_agent(os.environ), sys.stdin, sys.stdout, every=every)
    except FedloraError as error:
        print(f"fedlora: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _tell(turn: Turn | FedloraError) -> None:
    if isinstance(turn, FedloraError):
        print(f"fedlora: {turn}", file=sys.stderr)
    elif turn.outcome != "nothing":
        print(f"fedlora: release {turn.release} is {turn.outcome}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
