"""`fedlora device update|run|revert`: keep a device up to date over the air."""

from __future__ import annotations

import json
import signal
import threading
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedlora.cli.device import AsJson, Client, HeldOut, LowMemory, State, Threads, app
from fedlora.errors import ConfigError, FedloraError
from fedlora.store import Store

if TYPE_CHECKING:
    from fedlora.agent import Agent, Turn

__all__: list[str] = []

Url = Annotated[
    str,
    typer.Option(
        "--url", envvar="FEDLORA_OTA_URL", show_default=False,
        help="Where the repository of releases is served.",
    ),
]  # fmt: skip
Root = Annotated[
    Path,
    typer.Option(
        "--root", envvar="FEDLORA_OTA_ROOT", show_default=False,
        help="The root metadata that this device trusts, shipped with it: 1.root.json.",
    ),
]  # fmt: skip
Channel = Annotated[
    str, typer.Option("--channel", envvar="FEDLORA_OTA_CHANNEL", help="Whose releases to take.")
]
OwnData = Annotated[
    str | None,
    typer.Option(
        "--data", envvar="FEDLORA_DATA",
        help="The owner's data, as for `fedlora device personalize`: judges releases, and trains "
        "the personal adapter anew. Never sent.",
    ),
]  # fmt: skip
Personalize = Annotated[
    bool, typer.Option("--personalize", help="Train a personal adapter even if there is none yet.")
]
Margin = Annotated[
    float, typer.Option("--margin", help="Share by which the held-out loss may be worse than now.")
]
Slower = Annotated[float, typer.Option("--slower", help="Factor by which a run may be slower.")]
Report = Annotated[
    str | None,
    typer.Option(
        "--report", envvar="FEDLORA_OTA_REPORT",
        help="POST version, healthy or not, and one of seven words about the loss to this URL. "
        "[default: nothing is reported]",
    ),
]  # fmt: skip


@app.command()
def update(
    state: State,
    url: Url,
    root: Root,
    channel: Channel = "stable",
    data: OwnData = None,
    client: Client = None,
    held_out: HeldOut = 0.2,
    personalize: Personalize = False,
    margin: Margin = 0.05,
    slower: Slower = 2.0,
    report: Report = None,
    threads: Threads = None,
    low_memory: LowMemory = False,
    as_json: AsJson = False,
) -> None:
    """Fetch the newest release for this device, check its health, and commit or reject it.

    Exit code 1 when a release was rejected, or the update failed; what was served is served on.

    Examples:

        fedlora device update --state state/ --url https://example.org/releases --root 1.root.json

        fedlora device update --state state/ --url https://example.org/releases --root 1.root.json
        --data messages.txt --json
    """
    agent = _agent(
        state, url, root, channel, data, client, held_out, personalize, margin, slower, report,
        threads, low_memory,
    )  # fmt: skip
    turn = agent.update()
    _print_turn(turn, agent.store, as_json)
    if turn.outcome == "rejected":
        raise typer.Exit(1)


@app.command()
def run(
    state: State,
    url: Url,
    root: Root,
    channel: Channel = "stable",
    every: Annotated[
        float, typer.Option(min=1.0, help="Seconds between two polls, give or take a tenth.")
    ] = 21_600.0,
    data: OwnData = None,
    client: Client = None,
    held_out: HeldOut = 0.2,
    personalize: Personalize = False,
    margin: Margin = 0.05,
    slower: Slower = 2.0,
    report: Report = None,
    threads: Threads = None,
    low_memory: LowMemory = False,
    as_json: AsJson = False,
) -> None:
    """Update every few hours, until interrupted or terminated; for a service.

    With --json a line for each turn. Applications that serve from the same state see a new adapter
    with their next `fedlora.store.Store.serving`.

    Examples:

        fedlora device run --state state/ --url https://example.org/releases --root 1.root.json
        --data messages.txt
    """
    agent = _agent(
        state, url, root, channel, data, client, held_out, personalize, margin, slower, report,
        threads, low_memory,
    )  # fmt: skip
    stop = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())

    def show(turn: Turn | FedloraError) -> None:
        if not isinstance(turn, FedloraError):
            _print_turn(turn, agent.store, as_json)
        elif as_json:
            _print_json({"outcome": "failed", "error": type(turn).__name__, "text": str(turn)})
        else:
            typer.echo(f"fedlora: {turn}", err=True)

    try:
        agent.run(every=every, stop=stop, on_turn=show)
    finally:
        signal.signal(signal.SIGTERM, before)


@app.command()
def revert(state: State, as_json: AsJson = False) -> None:
    """Serve the global adapter before the active one again; its release is not fetched any more.

    One step, to the adapter before or to the base. A personal adapter stays and is served on.

    Examples:

        fedlora device revert --state state/
    """
    from fedlora.agent.agent import log_of

    store = Store.open(state)
    before = store.status().installed
    store.revert()
    found = store.status()
    release = None if before is None else before.release
    log_of(store).add("reverted", release=release)
    serving = "personal" if found.personal else "global" if found.installed else "base"
    now = None if found.installed is None else found.installed.release
    if as_json:
        _print_json({"reverted": release, "active": now, "serving": serving})
        return
    typer.echo(f"release {release or 'without a number'} is reverted; serving {serving}")
    if found.personal is not None and found.personal.stale:
        typer.echo("the personal adapter started from another one: run fedlora device personalize")


@app.command()
def log(
    state: State,
    last: Annotated[int, typer.Option("--last", "-n", min=1, help="How many events.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Show what the updates of this device did; the log never leaves it.

    Examples:

        fedlora device log --state state/ -n 5
    """
    from fedlora.agent.agent import log_of

    rows = log_of(Store.open(state)).read(last)
    if as_json:
        _print_json(rows)
        return
    for row in rows:
        about = {k: v for k, v in row.items() if k not in ("time", "event") and v not in (None, "")}
        words = ", ".join(f"{key} {value}" for key, value in about.items())
        typer.echo(f"{row.get('time', '?')}  {row.get('event', '?'):<12} {words}")


def _agent(
    state: Path,
    url: str,
    root: Path,
    channel: str,
    data: str | None,
    client: str | None,
    held_out: float,
    personalize: bool,
    margin: float,
    slower: float,
    report: str | None,
    threads: int | None,
    low_memory: bool,
) -> Agent:
    from fedlora.agent import Agent, Limits
    from fedlora.cli.device import _owner_data
    from fedlora.ota import DeviceUpdater

    try:
        bootstrap = root.read_bytes()
    except OSError as error:
        raise ConfigError(f"--root {root}: cannot be read: {error.strerror or error}") from None
    if client is not None and data is None:
        raise ConfigError("--client: expected --data beside it, the data set that it is one of")
    updater = DeviceUpdater(url, Store.open(state), bootstrap=bootstrap, channel=channel)
    return Agent(
        updater,
        data=None if data is None else lambda b: _owner_data(b, data, client, held_out),
        personalize=personalize,
        limits=Limits(margin=margin, slower=slower),
        report=report,
        threads=threads,
        low_memory=low_memory,
    )


def _print_turn(turn: Turn, store: Store, as_json: bool) -> None:
    found = store.status()
    serving = "personal" if found.personal else "global" if found.installed else "base"
    if as_json:
        active = None if found.installed is None else found.installed.release
        _print_json({**asdict(turn), "active": active, "serving": serving})
        return
    if turn.outcome == "nothing":
        typer.echo(f"nothing new for this device; serving {serving}")
    elif turn.outcome == "rejected":
        typer.echo(f"release {turn.release} is rejected: {turn.reason}; serving {serving}")
    else:
        typer.echo(f"release {turn.release} is committed; serving {serving}")
    health = turn.health
    if health is not None and health.loss_before is not None and health.loss_after is not None:
        typer.echo(
            f"held-out loss of {health.examples} examples: {health.loss_before:.4f} before, "
            f"{health.loss_after:.4f} with it"
        )
    if turn.personalized is not None:
        done = turn.personalized
        words = "kept" if done.kept else f"dropped, {done.replaced} is served on"
        typer.echo(
            f"personal adapter trained anew: {done.before['loss']:.4f} before, "
            f"{done.after['loss']:.4f} after: {words}"
        )


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False))
