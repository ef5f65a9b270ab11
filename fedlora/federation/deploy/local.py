"""A whole federation on the loopback of this host: up, status and down.

Every step can be taken again: what is there and runs is left as it is. So a command that was killed
leaves a folder from which `up` with resume, or `down`, goes on.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedlora.errors import ConfigError, FederationError, MissingExtraError, RunError
from fedlora.experiment import ExperimentConfig
from fedlora.federation.checkpoint import RoundRecord, has_checkpoint, read_checkpoint, read_rounds
from fedlora.federation.deploy import processes
from fedlora.federation.deploy.certificates import make_certificates
from fedlora.federation.deploy.folder import Federation, Link, Node
from fedlora.federation.deploy.keys import make_node_key, public_path
from fedlora.federation.deploy.link import online_nodes, register, start_link
from fedlora.federation.deploy.node import (
    AGAIN_SECONDS,
    REJOIN_SECONDS,
    NodeOptions,
    is_activated,
    node_command,
    node_refusal,
    not_activated,
)
from fedlora.federation.deploy.submit import (
    Submission,
    claim_run,
    read_run,
    submit,
    was_submitted,
)
from fedlora.federation.flower_commands import flower_environment, free_port, last_line
from fedlora.federation.owner import owner_node_config
from fedlora.federation.sampling import draw_held_out
from fedlora.files import write_atomic

__all__ = [
    "begin",
    "down",
    "fitting_cohort",
    "plan",
    "resumed",
    "start_nodes",
    "status",
    "up",
    "with_bundle",
]

Say = Callable[[str], None]
AT_ONCE = 8  # nodes that are registered or stopped at one time


def plan(
    folder: Path,
    nodes: int,
    trainers: Sequence[str] = (),
    *,
    bundle: Path | None = None,
    pythons: Mapping[str, Path] | None = None,
) -> Federation:
    """Return the federation that `up` is to start; nothing is written.

    trainers: onnx or torch, one for all nodes or one for each; (): torch where it is installed.
    pythons: by trainer, an environment (or its interpreter) to run that node in.

    Raises `ConfigError` for what does not fit together, `MissingExtraError` for an environment
    without what the trainer needs, and `RunError` for a folder that is in use.
    """
    folder = folder.absolute()
    if Federation.there(folder):
        raise RunError(
            f"{folder}: expected a new or empty folder, found a federation; go on with: fedlora "
            f"federation up --resume --dir {folder}, or stop it with: fedlora federation down "
            f"--dir {folder}"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder}: expected a new or empty folder; name another --dir")
    if nodes < 1:
        raise ConfigError(f"--nodes: expected at least 1, found {nodes}")
    kinds = list(trainers) or ["torch" if find_spec("torch") else "onnx"]
    for kind in kinds:
        if kind not in ("onnx", "torch"):
            raise ConfigError(f"--trainer: expected onnx or torch, found {kind!r}")
    if len(kinds) not in (1, nodes):
        raise ConfigError(f"--trainer: expected 1 or {nodes} of them, found {len(kinds)}")
    kinds = kinds * nodes if len(kinds) == 1 else kinds
    interpreters = {kind: _interpreter(path) for kind, path in (pythons or {}).items()}
    for kind in interpreters:
        if kind not in kinds:
            raise ConfigError(f"--python {kind}=…: expected a trainer of these nodes: {kinds}")
    for kind in dict.fromkeys(kinds):
        _require_packages(kind, interpreters.get(kind))
    if bundle is not None and not (bundle / "manifest.json").is_file():
        raise ConfigError(f"--bundle {bundle}: expected a bundle's folder, found no manifest.json")
    return Federation(
        folder,
        nodes=tuple(
            Node(
                number,
                kind,
                bundle=str(bundle.absolute()) if kind == "onnx" and bundle else None,
                python=str(interpreters[kind]) if kind in interpreters else None,
            )
            for number, kind in enumerate(kinds)
        ),
    )


def with_bundle(federation: Federation, bundle: Path) -> Federation:
    """Return the federation with this bundle for every onnx node that has none."""
    return replace(
        federation,
        nodes=tuple(
            replace(node, bundle=str(bundle.absolute()))
            if node.trainer == "onnx" and node.bundle is None
            else node
            for node in federation.nodes
        ),
    )


def fitting_cohort(config: ExperimentConfig, nodes: int) -> ExperimentConfig:
    """Return the experiment with a cohort of all `nodes` that are not held out, if it had more."""
    ids = [f"{number}" for number in range(nodes)]
    most = nodes - len(draw_held_out(ids, config.data.held_out_clients, config.seed))
    if config.federation.cohort <= most:
        return config
    return replace(config, federation=replace(config.federation, cohort=most))


def begin(federation: Federation, config: ExperimentConfig) -> None:
    """Make the folder that `resumed` reads: what is to be started, and for which experiment."""
    claim_run(federation.out, config)
    federation.save()


def resumed(folder: Path) -> tuple[Federation, ExperimentConfig]:
    """Return what `up` had begun in a folder. Raises `RunError` when there is nothing."""
    federation = Federation.read(folder)
    if not federation.nodes:
        raise RunError(
            f"{federation.folder}: expected a federation of fedlora federation up, found a server's"
            " folder; start its SuperLink, and go on with submit --resume"
        )
    return federation, read_run(federation.out)


def up(
    federation: Federation,
    config: ExperimentConfig,
    *,
    say: Say,
    on_round: Callable[[RoundRecord], None] | None = None,
    keep_up: bool = False,
    export: Callable[[Path], None] | None = None,
) -> dict[str, Any]:
    """Start what does not run yet, submit the experiment or go on with it, and follow it.

    The federation is one that has begun (`begin`) or is `resumed`. export: makes a bundle in a
    folder, for onnx nodes that have none; it works while the SuperLink starts.

    What was started is stopped at the end, however that comes, unless `keep_up`. Returns what
    `submit` does. Raises what it raises, and `FederationError` when something does not start.
    """
    try:
        federation = _bring_up(federation, config, say, export)
        submission = Submission(config, federation.out, len(federation.nodes))
        watch = _NodeWatch(federation, config, say)
        # The server would ask nodes that it only believes to be connected, as after a power cut. A
        # first run's waits for its nodes by itself.
        again = was_submitted(federation.out)
        while again and time.monotonic() < watch.end and not watch.all_accepted():
            watch.look()
            time.sleep(0.2)
        return submit(federation, submission, on_round=on_round, say=say, look=watch.look)
    finally:
        if not keep_up:
            down(federation.folder)


def down(folder: Path) -> list[str]:
    """Stop what was started in a folder, by its recorded processes; return what was running."""
    federation = Federation.read(folder)
    stopped = []
    link = federation.link.process if federation.link else None
    if link is not None and processes.is_running(link):
        # The ServerApp first: it would note rounds as failed while the nodes leave. Then the nodes,
        # which sign off at the SuperLink: else it would not take them again for a minute.
        processes.stop_marked(link.mark, but=link.pid)
    started = [(node.name, node.process) for node in federation.nodes if node.process is not None]
    with ThreadPoolExecutor(AT_ONCE) as pool:  # each takes seconds to sign off
        ended = list(pool.map(processes.stop, [process for _, process in started]))
    stopped += [name for (name, _), was_running in zip(started, ended, strict=True) if was_running]
    if link is not None and processes.stop(link):
        stopped.append("link")
    return stopped


def status(folder: Path) -> dict[str, Any]:
    """Return what runs in a folder: link, nodes and the run, as `fedlora federation status --json`.

    A node is starting or offline, online, or ended; the SuperLink is asked where it runs.
    """
    federation = Federation.read(folder)
    link = federation.link
    link_runs = link is not None and link.process is not None and processes.is_running(link.process)
    online = online_nodes(federation) if link_runs and federation.nodes else {}
    rows = []
    for node in federation.nodes:
        runs = node.process is not None and processes.is_running(node.process)
        rows.append(
            {
                "name": node.name,
                "trainer": node.trainer,
                "pid": node.process.pid if node.process else None,
                "running": runs,
                "node_id": node.node_id,
                "link_says": online.get(node.node_id or ""),
            }
        )
    out = federation.out
    records = read_rounds(out)
    run: dict[str, Any] | None = None
    if has_checkpoint(out):
        config = read_run(out)
        run = {
            "out": str(out),
            "round": read_checkpoint(out).state.round,
            "rounds": config.federation.rounds,
            "loss": records[-1].loss if records else None,
        }
    return {
        "dir": str(federation.folder),
        "link": None
        if link is None
        else {
            "address": link.address,
            "pid": link.process.pid if link.process else None,
            "running": link_runs,
        },
        "nodes": rows,
        "run": run,
    }


def _bring_up(
    federation: Federation,
    config: ExperimentConfig,
    say: Say,
    export: Callable[[Path], None] | None = None,
) -> Federation:
    federation.save()
    with ThreadPoolExecutor(1) as pool:
        exporting: Future[None] | None = None
        if export is not None and _lacks_bundle(federation):
            exporting = pool.submit(export, federation.folder / "bundle")
        if not federation.certificates.server.is_file():
            make_certificates(federation.certificates.ca.parent)
            say("certificates: made")
        link = federation.link
        if link is None or link.process is None or not processes.is_running(link.process):
            # The old port, since nodes that still run know it.
            port = free_port() if link is None else link.port
            federation = start_link(federation, Link("127.0.0.1", port))
            say(f"link: up on 127.0.0.1:{port}")
        federation = _register_nodes(federation)
        if exporting is not None:
            exporting.result()
            federation = with_bundle(federation, federation.folder / "bundle")
    federation = start_nodes(federation, config)
    trainers = ", ".join(node.trainer for node in federation.nodes)
    say(f"nodes: {len(federation.nodes)} started ({trainers})")
    return federation


def _lacks_bundle(federation: Federation) -> bool:
    return any(node.trainer == "onnx" and node.bundle is None for node in federation.nodes)


def start_nodes(federation: Federation, config: ExperimentConfig) -> Federation:
    """Register and start every node that does not run, also in the middle of a run."""
    federation = _register_nodes(federation)
    if config.secure_aggregation is not None:
        _let_them_trust_each_other(federation)
    for node in federation.nodes:
        federation = _start_node(federation, node, config)
    return federation


def _register_nodes(federation: Federation) -> Federation:
    """Register those that are not, several at once: each takes seconds in a process of Flower."""
    todo = [node for node in federation.nodes if node.node_id is None]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for node in pool.map(partial(_registered, federation), todo):
            federation = _with_node(federation, node)
    return federation


def _registered(federation: Federation, node: Node) -> Node:
    key = federation.key(node)
    if not public_path(key).is_file():
        key.unlink(missing_ok=True)  # of a command that was killed between the two
        make_node_key(key)
    try:
        return replace(node, node_id=register(federation, public_path(key)))
    except FederationError as error:
        if "already" not in str(error):
            raise
        return replace(node, node_id="")  # registered by a command that was killed after it


def _let_them_trust_each_other(federation: Federation) -> None:
    """Write the file of all nodes' public keys, by which each knows the others in a secure sum."""
    publics = (public_path(federation.key(node)) for node in federation.nodes)
    lines = "".join(path.read_text(encoding="ascii") for path in publics)
    write_atomic(_trusted(federation), lines.encode())


def _trusted(federation: Federation) -> Path:
    return federation.key(federation.nodes[0]).with_name("trusted")


def _start_node(federation: Federation, node: Node, config: ExperimentConfig) -> Federation:
    if node.process is None or not processes.is_running(node.process):
        processes.stop_marked(federation.mark(node.name))
        node = replace(node, port=free_port())
        options = _options(federation, node, config)
        options.home.mkdir(parents=True, exist_ok=True)
        log = federation.log(node.name)
        if log.is_file():  # what the node before said must not be taken for this one's
            log.replace(log.with_suffix(".before.log"))
        process = processes.start(
            node_command(options),
            flower_environment(options.home, options.python),
            federation.mark(node.name),
            log,
        )
        federation = _with_node(federation, replace(node, process=process))
    return federation


def _options(federation: Federation, node: Node, config: ExperimentConfig) -> NodeOptions:
    assert federation.link is not None
    folder = federation.node_folder(node)
    values: dict[str, Any] = {
        "partition-id": node.number,
        "num-partitions": len(federation.nodes),
        "trainer": node.trainer,
        "state": str(folder / "state"),
        **owner_node_config(config),  # whoever starts nodes here is their owner
    }
    if node.bundle is not None:
        values["bundle"] = node.bundle
    if config.secure_aggregation is not None:
        values["identity"] = str(federation.key(node).absolute())
        values["trusted-keys"] = str(_trusted(federation).absolute())
    return NodeOptions(
        link=federation.link.address,
        key=federation.key(node),
        port=node.port or free_port(),
        home=folder / "home",
        ca=federation.certificates.ca,
        config=values,
        python=None if node.python is None else Path(node.python),
    )


def _with_node(federation: Federation, node: Node) -> Federation:
    nodes = tuple(node if old.number == node.number else old for old in federation.nodes)
    federation = replace(federation, nodes=nodes)
    federation.save()
    return federation


class _NodeWatch:
    """Says once of a node that it has ended, and why; raises when none is left."""

    def __init__(self, federation: Federation, config: ExperimentConfig, say: Say) -> None:
        self.folder = federation.folder
        self.config = config
        self.end = time.monotonic() + REJOIN_SECONDS
        self.again = 0.0
        self.say = say
        self.told: set[tuple[str, int]] = set()

    def all_accepted(self) -> bool:
        """Whether the SuperLink has taken every node in its latest start."""
        federation = Federation.read(self.folder)
        logs = [federation.log(node.name) for node in federation.nodes]
        return all(
            log.is_file() and is_activated(log.read_text("utf-8", "replace")) for log in logs
        )

    def look(self) -> None:
        federation = Federation.read(self.folder)  # a node may have been started again
        running = 0
        reason = ""
        for node in federation.nodes:
            if node.process is None:
                continue
            if processes.is_running(node.process):
                running += 1
                continue
            log = federation.log(node.name)
            text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
            if not_activated(text) and time.monotonic() < self.end:
                running += 1  # it was killed a moment ago, and the SuperLink has not missed it yet
                if time.monotonic() >= self.again:
                    self.again = time.monotonic() + AGAIN_SECONDS
                    federation = start_nodes(federation, self.config)
                continue
            address = federation.link.address if federation.link else ""
            refusal = node_refusal(text[-20_000:], address, federation.key(node))
            reason = f"{node.name} has ended: {refusal or last_line(text)}; see {log}"
            if (node.name, node.process.pid) not in self.told:
                self.told.add((node.name, node.process.pid))
                self.say(reason)
        if not running:
            raise FederationError(f"no node is left: {reason}")


def _interpreter(path: Path) -> Path:
    """Return the interpreter of an environment's folder, or the file itself."""
    # Not resolved: an environment's python is a link to the system's, which has not its packages.
    path = path.absolute()
    for candidate in (path, path / "bin" / "python", path / "Scripts" / "python.exe"):
        if candidate.is_file():
            return candidate
    raise ConfigError(f"--python {path}: expected an environment or an interpreter, found none")


def _require_packages(kind: str, python: Path | None) -> None:
    needed = ("fedlora", "flwr", "onnxruntime" if kind == "onnx" else "torch")
    extra = "client" if kind == "onnx" else "client,train"
    if python is None:
        missing = [name for name in needed if find_spec(name) is None]
        if missing:
            raise MissingExtraError(f"a node that trains in {kind}", extra)
        return
    code = (
        "import json, importlib.util as u\n"
        f"print(json.dumps([n for n in {needed!r} if u.find_spec(n) is None]))"
    )
    done = subprocess.run(
        [str(python), "-I", "-c", code], capture_output=True, text=True, check=False
    )
    try:
        missing = json.loads(done.stdout)
    except ValueError:
        raise ConfigError(f"--python {python}: does not run: {last_line(done.stderr)}") from None
    if missing:
        raise ConfigError(
            f"--python {python}: expected {', '.join(missing)} in it; run there: pip install "
            f"'fedlora[{extra}]'"
        )
