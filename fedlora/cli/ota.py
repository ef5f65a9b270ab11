"""`fedlora ota`: publish releases of the global adapter, for devices to fetch over the air."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fedlora.errors import ConfigError
from fedlora.formats.strict_json import is_digest

if TYPE_CHECKING:
    from fedlora.ota.publisher import Publisher

__all__ = ["app"]

app = typer.Typer(
    help="Publish signed releases of the global adapter. The repository is a folder of plain files "
    "for any web server; devices fetch, verify and revert by themselves.",
    no_args_is_help=True,
)

Repository = Annotated[
    Path,
    typer.Option(
        "--repository", envvar="FEDLORA_OTA_REPOSITORY", help="The repository's folder.",
        show_default=False,
    ),
]  # fmt: skip
KeysFolder = Annotated[
    Path,
    typer.Option(
        "--keys", envvar="FEDLORA_OTA_KEYS", help="The folder of private keys, or of some of them.",
        show_default=False,
    ),
]  # fmt: skip
Passphrase = Annotated[
    str | None,
    typer.Option(
        "--passphrase", envvar="FEDLORA_OTA_PASSPHRASE", show_default=False,
        help="Of the private keys; better in the environment, which other users cannot list.",
    ),
]  # fmt: skip
Version = Annotated[int, typer.Argument(help="A release, by its number.", min=1)]
Percent = Annotated[float, typer.Option("--rollout", help="Percent of the devices, in 0.01.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Run = Annotated[
    Path | None, typer.Option("--run", help="The folder of a run, whose gates must pass first.")
]
RunCodec = Annotated[str, typer.Option("--codec", help="With --run: fp32, fp16, int8 or int4.")]
Worse = Annotated[
    float, typer.Option("--gate-worse", help="With --run: share by which it may be worse than base")
]
Rms = Annotated[
    float, typer.Option("--gate-rms", help="With --run: most that a layer's weights may change by.")
]
MaxBytes = Annotated[int, typer.Option("--gate-bytes", help="With --run: most bytes of the file.")]
Unevaluated = Annotated[
    bool, typer.Option("--unevaluated", help="With --run: also one that is not finished.")
]


@app.command()
def init(
    repository: Repository,
    keys: KeysFolder,
    root_keys: Annotated[int, typer.Option(min=1, help="How many keys root has.")] = 3,
    root_threshold: Annotated[int, typer.Option(min=1, help="How many of them must sign.")] = 2,
    targets_keys: Annotated[int, typer.Option(min=1, help="How many keys targets has.")] = 1,
    targets_threshold: Annotated[int, typer.Option(min=1, help="How many of them must sign.")] = 1,
    passphrase: Passphrase = None,
    as_json: AsJson = False,
) -> None:
    """Make a repository and its keys. Ship devices with metadata/1.root.json.

    Keep KEYS/root and KEYS/targets offline, each on its own medium; KEYS/online on the machine
    that runs `fedlora ota refresh`.

    Examples:

        fedlora ota init --repository releases/ --keys keys/
    """
    from fedlora.ota import Keys, Publisher

    thresholds = {
        "root": (root_keys, root_threshold),
        "targets": (targets_keys, targets_threshold),
    }
    made = Publisher.create(repository, Keys(keys, passphrase), thresholds=thresholds)
    root = made.path / "metadata" / "1.root.json"
    if as_json:
        _print_json({"repository": str(made.path), "root": str(root), "keys": str(keys)})
        return
    typer.echo(f"{made.path}: a new repository; devices are shipped with {root}")
    typer.echo(f"put {keys / 'root'} and {keys / 'targets'} on media of their own, and offline")


@app.command()
def keys(
    repository: Repository,
    folder: KeysFolder,
    rotate: Annotated[
        str | None, typer.Option(help="Replace the keys of root, targets, snapshot, …")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many new keys.")] = 1,
    threshold: Annotated[
        int | None, typer.Option(min=1, help="How many must sign. [default: as before]")
    ] = None,
    renew: Annotated[
        str | None, typer.Option(help="Sign root or targets again with a later expiry.")
    ] = None,
    passphrase: Passphrase = None,
    as_json: AsJson = False,
) -> None:
    """List the roles' keys, replace them, or renew what offline keys sign.

    Replacing the keys of targets, snapshot or timestamp needs the root keys; of rollout, the
    targets key. Devices follow by themselves.

    Examples:

        fedlora ota keys --repository releases/ --keys keys/

        fedlora ota keys --rotate timestamp --repository releases/ --keys keys/

        fedlora ota keys --rotate root --count 3 --threshold 2 --repository releases/ --keys keys/

        fedlora ota keys --renew targets --repository releases/ --keys keys/
    """
    publisher = _publisher(repository, folder, passphrase)
    if rotate is not None and renew is not None:
        raise ConfigError("expected --rotate or --renew, found both")
    new = publisher.rotate(rotate, count=count, threshold=threshold) if rotate else []
    if renew is not None:
        publisher.renew(renew)
    roles = publisher.status()["roles"]
    if as_json:
        _print_json({"new": new, "roles": roles})
        return
    for keyid in new:
        typer.echo(f"new key of {rotate}: {keyid}")
    _print_roles(roles)


@app.command()
def publish(
    repository: Repository,
    keys: KeysFolder,
    adapter: Annotated[Path | None, typer.Argument(help="A packed file.")] = None,
    run: Run = None,
    channel: Annotated[str, typer.Option(help="Which devices ask for it.")] = "stable",
    rollout: Percent = 100.0,
    limit: Annotated[
        float, typer.Option(help="Percent that the rollout may never pass: signed offline.")
    ] = 100.0,
    bundle: Annotated[
        str | None, typer.Option(help="Only for this bundle: its folder, or its manifest's SHA-256")
    ] = None,
    minimum_bundle: Annotated[
        str | None, typer.Option(help="Only for bundles that this fedlora or a newer one exported.")
    ] = None,
    minimum_fedlora: Annotated[
        str | None, typer.Option(help="Only for devices with this fedlora or a newer one.")
    ] = None,
    notes: Annotated[str, typer.Option(help="For people.")] = "",
    codec: RunCodec = "fp16",
    worse: Worse = 0.0,
    rms: Rms = 0.5,
    max_bytes: MaxBytes = 1 << 26,
    unevaluated: Unevaluated = False,
    passphrase: Passphrase = None,
    as_json: AsJson = False,
) -> None:
    """Publish an adapter as the next release; needs the targets key.

    What the file says of its run, rounds, method and privacy goes with it. With --run it is the
    global adapter of a run, which must pass the gates first: not worse than the base for people who
    never took part, weights that changed by a sound amount, and not too large.

    Examples:

        fedlora ota publish --run runs/keyboard --rollout 1 --repository releases/ --keys keys/

        fedlora ota publish adapter.safetensors --rollout 1 --repository releases/ --keys keys/
    """
    if (adapter is None) == (run is None):
        raise ConfigError("expected either a packed file or --run FOLDER")
    about: dict[str, Any] = {
        "channel": channel,
        "rollout": rollout,
        "limit": limit,
        "bundle": _bundle_digest(bundle),
        "minimum_bundle": minimum_bundle,
        "minimum_fedlora": minimum_fedlora,
        "notes": notes,
    }
    publisher = _publisher(repository, keys, passphrase)
    if run is not None:
        from fedlora.release import Gates, publish_run

        gates = Gates(worse, rms, max_bytes)
        release, found = publish_run(
            run, publisher, gates=gates, codec=codec, unevaluated=unevaluated, **about
        )
        if not as_json:
            typer.echo("gates passed: " + ", ".join(f"{k} {_shown(v)}" for k, v in found.items()))
    else:
        assert adapter is not None
        release = publisher.publish(adapter, **about)
    _print_release(repository, keys, release, rollout, as_json)


@app.command()
def rollout(
    version: Version,
    percent: Annotated[float, typer.Argument(help="Of the devices, 0 to 100.")],
    repository: Repository,
    keys: KeysFolder,
    passphrase: Passphrase = None,
    as_json: AsJson = False,
) -> None:
    """Offer a release to so many percent of the devices; needs the online keys only.

    The devices that were offered it at a lower percentage are always among them.

    Examples:

        fedlora ota rollout 7 10 --repository releases/ --keys keys/
    """
    stage = _publisher(repository, keys, passphrase).set_rollout(version, percent)
    _print_stage(stage, as_json)


@app.command()
def halt(
    version: Version,
    repository: Repository,
    keys: KeysFolder,
    withdraw: Annotated[
        bool, typer.Option("--withdraw", help="For good: signed with the targets key too.")
    ] = False,
    passphrase: Passphrase = None,
    as_json: AsJson = False,
) -> None:
    """Offer a release to nobody any more; needs the online keys only.

    Devices that have it keep it: to bring them back, republish the release before.

    Examples:

        fedlora ota halt 7 --repository releases/ --keys keys/
    """
    stage = _publisher(repository, keys, passphrase).halt(version, withdraw=withdraw)
    _print_stage(stage, as_json)


@app.command()
def republish(
    version: Version,
    repository: Repository,
    keys: KeysFolder,
    channel: Annotated[
        str | None, typer.Option(help="Another channel. [default: the same]")
    ] = None,
    rollout: Percent = 100.0,
    passphrase: Passphrase = None,
    as_json: AsJson = False,
) -> None:
    """Publish an old release as the newest one; needs the targets key.

    So devices go back to it, or get from one channel what another one has tried.

    Examples:

        fedlora ota republish 6 --repository releases/ --keys keys/

        fedlora ota republish 7 --channel stable --rollout 1 --repository releases/ --keys keys/
    """
    release = _publisher(repository, keys, passphrase).republish(
        version, channel=channel, rollout=rollout
    )
    _print_release(repository, keys, release, rollout, as_json)


@app.command()
def refresh(repository: Repository, keys: KeysFolder, passphrase: Passphrase = None) -> None:
    """Renew what the online keys sign; run it every few hours. A timestamp lives for a day.

    Examples:

        fedlora ota refresh --repository releases/ --keys keys/
    """
    publisher = _publisher(repository, keys, passphrase)
    publisher.refresh()
    hours = publisher.status()["roles"]["timestamp"]["hours_left"]
    typer.echo(f"{repository}: renewed for {hours:.0f} hours")


@app.command()
def status(repository: Repository, as_json: AsJson = False) -> None:
    """Show the roles, when they expire, and the channels' releases; needs no keys.

    Examples:

        fedlora ota status --repository releases/

        fedlora ota status --repository releases/ --json
    """
    found = _publisher(repository, repository.parent / ".no-keys", None).status()
    for role in found["roles"].values():
        del role["can_sign"]
    if as_json:
        _print_json(found)
        return
    _print_roles(found["roles"])
    for channel, releases in found["channels"].items():
        table = Table("release", "offered to", "bytes", "digest", "notes", title=channel)
        for release in releases:
            table.add_row(
                str(release["version"]), _offered(release), f"{release['num_bytes']:,}",
                release["digest"][:12], release["notes"],
            )  # fmt: skip
        Console(soft_wrap=True).print(table)
    if not found["published"]:
        typer.echo("devices do not see all of this yet: run fedlora ota refresh")


@app.command()
def serve(
    repository: Repository,
    host: Annotated[str, typer.Option(help="0.0.0.0 for every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8077,
) -> None:
    """Serve a repository for trials, until interrupted. In production use any web server.

    Examples:

        fedlora ota serve --repository releases/
    """
    from fedlora.ota.serve import server

    found = server(repository, host, port)
    with found:
        typer.echo(f"http://{host}:{found.server_address[1]}")
        found.serve_forever()


def _publisher(repository: Path, keys: Path, passphrase: str | None) -> Publisher:
    from fedlora.ota import Keys, Publisher

    return Publisher(repository, Keys(keys, passphrase))


def _bundle_digest(text: str | None) -> str | None:
    if text is None or is_digest(text):
        return text
    path = Path(text) / "manifest.json"
    if not path.is_file():
        raise ConfigError(f"--bundle {text}: expected a bundle's folder or a SHA-256")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False))


def _print_release(
    repository: Path, keys: Path, release: Any, percent: float, as_json: bool
) -> None:
    from dataclasses import asdict

    publisher = _publisher(repository, keys, None)
    stage = publisher.channel(release.channel).stage(release.version)
    if as_json:
        _print_json({**asdict(release), "percent": None if stage is None else stage.percent})
        return
    typer.echo(
        f"release {release.version} of {release.channel}: {release.num_bytes:,} bytes, "
        f"{release.digest[:12]}"
    )
    if stage is None:
        typer.echo(
            "signed, not offered yet: where the online keys are, run fedlora ota rollout "
            f"{release.version} {percent:g}"
        )
    else:
        typer.echo(f"offered to {stage.percent:g} % of the devices")


def _print_stage(stage: Any, as_json: bool) -> None:
    if as_json:
        _print_json({"version": stage.version, "percent": stage.percent, "halted": stage.halted})
    elif stage.halted:
        typer.echo(f"release {stage.version} is halted: offered to nobody")
    else:
        typer.echo(f"release {stage.version} is offered to {stage.percent:g} % of the devices")


def _offered(release: dict[str, Any]) -> str:
    stage = release["rollout"]
    if release["withdrawn"]:
        return "nobody: withdrawn"
    if stage is None:
        return "nobody yet"
    if stage["halted"]:
        return f"nobody: halted at {stage['percent']:g} %"
    return f"{min(stage['percent'], release['limit']):g} %"


def _print_roles(roles: dict[str, Any]) -> None:
    table = Table("role", "version", "signed by", "expires in", box=None, pad_edge=False)
    for name, role in roles.items():
        hours = role["hours_left"]
        left = f"{hours / 24:.0f} days" if hours > 72 else f"{hours:.1f} hours"
        signed = f"{role['threshold']} of {role['keys']}"
        table.add_row(name, str(role["version"]), signed, left if hours > 0 else "EXPIRED")
    Console(soft_wrap=True).print(table)
