"""Release a run's global adapter over the air: what `fedlora ota publish --run` does, as a call.

A server that has finished its rounds may call `publish` itself, or a timer may run
``python -m server.publish RUN`` beside it; keys and repository come from the environment, as for
`fedlora ota`. The gates of `fedlora.release` must pass first.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from fedlora.errors import ConfigError, FedloraError
from fedlora.ota import Keys, Publisher, Release
from fedlora.release import Gates, publish_run

__all__ = ["main", "publish"]


def publish(
    run: Path,
    repository: Path,
    keys: Path,
    *,
    rollout: float = 1.0,
    gates: Gates = Gates(),  # noqa: B008 - frozen
    passphrase: str | None = None,
    **about: Any,
) -> Release:
    """Release a run's adapter to `rollout` percent of the devices; see `publish_run`."""
    publisher = Publisher(repository, Keys(keys, passphrase))
    return publish_run(run, publisher, gates=gates, rollout=rollout, **about)[0]


def main(arguments: list[str]) -> int:
    """Publish the run that is named; return an exit code."""
    try:
        if len(arguments) != 1:
            raise ConfigError("usage: python -m server.publish RUN")
        places = {}
        for name in ("REPOSITORY", "KEYS"):
            if not (place := os.environ.get(f"FEDLORA_OTA_{name}")):
                raise ConfigError(f"expected FEDLORA_OTA_{name} in the environment, found none")
            places[name.lower()] = Path(place)
        release = publish(
            Path(arguments[0]), **places, passphrase=os.environ.get("FEDLORA_OTA_PASSPHRASE")
        )
    except FedloraError as error:
        print(f"fedlora: {error}", file=sys.stderr)
        return error.exit_code
    print(f"release {release.version} of {release.channel}: {release.num_bytes:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
