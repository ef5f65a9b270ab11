"""The SuperExec of a device: Flower's own, which forks client processes that are ready to begin.

    python -m fedlora.federation.deploy.superexec <the flags of flower-superexec>

`fedlora.federation.deploy.supernode` starts it in the place of ``flower-superexec``. It sleeps
until the SuperNode wakes it (or for as long as Flower's would), and starts clients through
`fedlora.federation.deploy.prestarted`.
"""

from __future__ import annotations

import logging
import os
import select
import time
from collections.abc import Callable

from fedlora.federation import _flower_private as private
from fedlora.federation.deploy.prestarted import prestart
from fedlora.federation.deploy.supernode import WAKE_VARIABLE

__all__ = ["main", "sleep_until_woken"]

_log = logging.getLogger(__name__)


def sleep_until_woken(reader: int | None) -> Callable[[float], None]:
    """Return a sleep that ends early when something comes through the pipe `reader`.

    Once the other end is closed it is a plain sleep.
    """
    open_reader = reader

    def sleep(seconds: float) -> None:
        nonlocal open_reader
        if open_reader is None:
            time.sleep(seconds)
            return
        ready, _, _ = select.select([open_reader], [], [], seconds)
        if ready and not os.read(open_reader, 4096):
            open_reader = None

    return sleep


def main() -> None:
    """Run the SuperExec until its SuperNode ends."""
    launch = prestart()  # before anything starts a thread: it forks
    wake = os.environ.pop(WAKE_VARIABLE, None)
    try:
        private.with_sleep_in_superexec(sleep_until_woken(int(wake) if wake else None))
        if launch is not None:
            private.with_client_launcher(launch)
    except (ImportError, AttributeError) as error:
        _log.warning("this Flower's SuperExec is started as it is, and waits longer: %s", error)
    private.run_superexec()


if __name__ == "__main__":
    main()
