"""The names of Flower that are not public, in one place; `tests/federation` pins them.

Flower only exposes `flwr.app`, `flwr.clientapp` and `flwr.serverapp`. What a grid of our own needs
beyond that is here, so that a Flower release which moves it breaks one module and one test.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from flwr.app import Message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = [
    "CLIENT_ERROR",
    "IDLE_SECONDS",
    "LINK_NODE_ID",
    "MESSAGE_UNAVAILABLE",
    "Run",
    "empty_run",
    "identify_process",
    "import_client_process",
    "run_client_process",
    "run_superexec",
    "run_supernode",
    "set_message_id",
    "set_source_node",
    "with_client_launcher",
    "with_quick_objects_in_grid",
    "with_quick_objects_in_supernode",
    "with_sleep_in_superexec",
    "with_sleep_in_supernode",
    "with_superexec",
]

CLIENT_ERROR: int = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
MESSAGE_UNAVAILABLE: int = ErrorCode.MESSAGE_UNAVAILABLE  # it expired, or was never there
LINK_NODE_ID: int = SUPERLINK_NODE_ID
IDLE_SECONDS = (
    3.0  # that a SuperNode sleeps when there is no message; all its other sleeps are less
)

# Imported when they are asked for: a client process or a server needs none of them.
_SUPERNODE = "flwr.supernode.start_client_internal"
_GRID = "flwr.superlink.grid.http_grid"
_SUPEREXEC = "flwr.supercore.superexec.run_superexec"
_CLIENT = "flwr.supernode.runtime.run_clientapp"
_TLS = "flwr.supercore.tls"

# A message is seen before all of it has arrived. Flower asks for the rest again after 1 s, then
# after twice as long, up to 10 s; the limits of time and tries stay as they are.
FIRST_BACKOFF_SECONDS = 0.05


def empty_run(run_id: int = 1) -> Any:
    """Return the `Run` that a grid shows to a ServerApp."""
    run = Run.create_empty(run_id=run_id)
    run.primary_task_id = 1
    return run


def identify_process(run_id: int = 1) -> None:
    """Say whose messages this process creates; without it `Message(...)` raises."""
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = LINK_NODE_ID
    TaskIdentity.task_id = 1


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message the id that a SuperLink would give it."""
    message.metadata.__dict__["_message_id"] = message_id


def set_source_node(message: Message, node_id: int) -> None:
    """Say that a message comes from a node, where a SuperLink has answered in its place."""
    message.metadata.__dict__["_src_node_id"] = node_id


def with_sleep_in_supernode(sleep: Callable[[float], None]) -> None:
    """Let this process's SuperNode sleep with `sleep`. Raises `AttributeError`, `ImportError`."""
    _with_sleep(_SUPERNODE, sleep)


def with_sleep_in_superexec(sleep: Callable[[float], None]) -> None:
    """Let this process's SuperExec sleep with `sleep`. Raises `AttributeError`, `ImportError`."""
    _with_sleep(_SUPEREXEC, sleep)


def with_quick_objects_in_supernode() -> None:
    """Let this process's SuperNode ask soon for what of a message has not arrived.

    Raises `AttributeError`, `ImportError`.
    """
    _with_quick_objects(_SUPERNODE)


def with_quick_objects_in_grid() -> None:
    """Let this process's grid of a deployed server ask soon for what of a reply has not arrived.

    Raises `AttributeError`, `ImportError`.
    """
    _with_quick_objects(_GRID)


def with_superexec(
    command: Sequence[str], variables: Mapping[str, str], files: tuple[int, ...]
) -> None:
    """Let this process's SuperNode start `command` in the place of ``flower-superexec``.

    variables: added to its environment, files: numbers of open files that it gets.
    Raises `AttributeError`, `ImportError`.
    """
    module: Any = import_module(_SUPERNODE)
    plain = module.subprocess.Popen

    def popen(given: Sequence[str], *more: Any, **options: Any) -> Any:
        if given[0] != "flower-superexec":
            return plain(given, *more, **options)
        environment = {**(options.pop("env", None) or os.environ), **variables}
        return plain([*command, *given[1:]], *more, env=environment, pass_fds=files, **options)

    module.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": popen})


def with_client_launcher(launch: Callable[[Mapping[str, Any]], bool]) -> None:
    """Let this process's SuperExec start clients with `launch`; what it refuses, Flower starts.

    `launch` gets what `run_client_process` takes. Raises `AttributeError`, `ImportError`.
    """
    module: Any = import_module(_SUPEREXEC)
    types = import_module("flwr.supercore.superexec.executor")
    client = import_module("flwr.supercore.constant").TaskType.CLIENT_APP
    accepted = types.LaunchResult.accepted
    names = ("runtime_api_address", "token", "insecure", "root_certificates_path",
             "parent_pid", "runtime_dependency_install")  # fmt: skip

    class Launcher(types.SubprocessExecutor):  # type: ignore[misc, name-defined]
        def launch(self, spec: Any) -> Any:
            if spec.task_type == client and launch({name: getattr(spec, name) for name in names}):
                return accepted()
            return super().launch(spec)

    plain = module.get_executor

    def get_executor(*arguments: Any, **options: Any) -> Any:
        executor = plain(*arguments, **options)
        return Launcher() if type(executor) is types.SubprocessExecutor else executor

    module.get_executor = get_executor


def import_client_process() -> None:
    """Import all that `run_client_process` needs. Raises `AttributeError`, `ImportError`."""
    _ = import_module(_CLIENT).run_clientapp, import_module(_TLS)


def run_client_process(task: Mapping[str, Any]) -> None:
    """Do what a ``flwr-clientapp`` process does for one message, and end this process."""
    certificates = import_module(_TLS).validate_and_resolve_root_certificates(
        task["root_certificates_path"], task["insecure"]
    )
    import_module(_CLIENT).run_clientapp(
        runtime_api_address=task["runtime_api_address"],
        token=task["token"],
        insecure=task["insecure"],
        certificates=certificates,
        parent_pid=task["parent_pid"],
        runtime_dependency_install=task["runtime_dependency_install"],
    )


def run_supernode() -> None:
    """Be ``flower-supernode`` with this process's arguments."""
    import_module("flwr.supernode.cli").flower_supernode()


def run_superexec() -> None:
    """Be ``flower-superexec`` with this process's arguments."""
    import_module("flwr.supercore.cli").flower_superexec()


def _with_sleep(name: str, sleep: Callable[[float], None]) -> None:
    module: Any = import_module(name)
    _ = module.time.sleep
    module.time = SimpleNamespace(**{**vars(time), "sleep": sleep})


def _with_quick_objects(name: str) -> None:
    module: Any = import_module(name)
    module.pull_objects = partial(module.pull_objects, initial_backoff=FIRST_BACKOFF_SECONDS)
