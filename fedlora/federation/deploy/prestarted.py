"""Client processes forked from one that has Flower and fedlora imported already.

    SuperExec --(a launch: address, token, ...)--> waiting process --fork--> client process

The waiting process has one thread, no connection, no data and no bundle: only imported modules. It
forks a process for each launch and goes on waiting, so that as before nothing of one message is
left for the next, and an update of the bundle or the data is seen by the next message. ONNX Runtime
and torch are not imported before the fork: they may start threads, which a fork does not copy.

An app of a run that brings its own ``fedlora`` is not heard: the device's installed one is used.
Elsewhere than on Linux Flower starts its processes itself.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import signal
import socket
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from fedlora.federation import _flower_private as private

__all__ = ["CLIENT_MODULES", "prestart", "serve"]

Launch = Mapping[str, Any]
MOST_BYTES = 1 << 16  # of one launch: an address, a token and a path
# What clients/app.py and clients/onnx_app.py import, without ONNX Runtime.
CLIENT_MODULES = (
    "fedlora.data.watch",
    "fedlora.data.registry",
    "fedlora.device.manifest",
    "fedlora.device.optimizers",
    "fedlora.experiment",
    "fedlora.federation.client",
    "fedlora.federation.owner",
)

_log = logging.getLogger(__name__)


def prestart() -> Callable[[Launch], bool] | None:
    """Fork the waiting process; return what asks it for a client process. None: not possible here.

    The returned function says whether the launch was handed over. In the client processes this
    function never returns: each one answers its message and exits.
    """
    if sys.platform != "linux":
        return None
    try:
        private.import_client_process()
    except (ImportError, AttributeError) as error:
        _log.warning("client processes are not prestarted with this Flower: %s", error)
        return None
    for name in CLIENT_MODULES:
        import_module(name)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if _fork() == 0:
        ours.close()
        private.run_client_process(serve(theirs))
        sys.exit(0)  # Flower's client ends its process itself
    theirs.close()

    def launch(task: Launch) -> bool:
        try:
            ours.send(json.dumps(dict(task)).encode())
        except OSError as error:
            _log.warning("the waiting process is gone, Flower starts the client: %s", error)
            ours.close()
            return False
        return True

    return launch


def serve(connection: socket.socket) -> Launch:
    """Fork a process for each launch that comes; return the launch in that process.

    The waiting process itself never returns: it exits when the other end is closed.
    """
    plain = {number: signal.getsignal(number) for number in (signal.SIGCHLD, signal.SIGINT)}
    signal.signal(signal.SIGCHLD, _reap)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the SuperExec, and so this process
    gc.collect()
    gc.freeze()  # a collection would write to every page that the processes share
    while message := connection.recv(MOST_BYTES):
        if _fork() == 0:
            connection.close()
            for number, handler in plain.items():
                signal.signal(number, handler)
            launch: Launch = json.loads(message)
            return launch
    os._exit(0)


def _fork() -> int:
    # Python 3.12 warns of any second thread. There is one, of the linear algebra's pool, which
    # ends before a fork and starts anew when it is needed.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _reap(*_: object) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
