"""`fedlora device`: serve a bundle and personalize it, on a device that has no PyTorch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fedlora.adapter import Adapter
from fedlora.errors import ConfigError
from fedlora.formats import read_info
from fedlora.store import GlobalEntry, PersonalEntry, Status, Store
from fedlora.training import TrainConfig

if TYPE_CHECKING:
    from fedlora.device.manifest import Manifest
    from fedlora.device.owner_data import OwnerData
    from fedlora.device.runtime import OpenBundle
    from fedlora.device.session import Session

__all__ = ["app"]

app = typer.Typer(
    help="Serve a bundle and personalize it. What is installed is kept in a state folder; the "
    "owner's data and adapter never leave it.",
    no_args_is_help=True,
)


class Which(StrEnum):
    """An adapter of a state."""

    serving = "serving"
    personal = "personal"
    installed = "global"
    base = "base"


class Start(StrEnum):
    """What a personal adapter starts from."""

    installed = "global"
    base = "base"


State = Annotated[
    Path,
    typer.Option(
        "--state", envvar="FEDLORA_STATE", help="The device's state folder.", show_default=False
    ),
]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        help="Messages: UTF-8 text, one a line, or JSON lines with "
        '"text"; features: .npz with inputs and targets; or a data set of `fedlora data list`.',
    ),
]
Client = Annotated[
    str | None, typer.Option("--client", help="Whose part of a data set it is, for trials.")
]
HeldOut = Annotated[
    float, typer.Option("--held-out", help="Share of the data, its end, that judges the adapters.")
]
With = Annotated[
    Which,
    typer.Option(
        "--adapter", help="Which to use: what is served (personal, else global, else base), or one."
    ),
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="Of one operation. [default: one a core]")
]
LowMemory = Annotated[bool, typer.Option("--low-memory", help="Less memory, a little slower.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]


@app.command()
def init(
    bundle: Annotated[Path, typer.Option("--bundle", help="A folder of `fedlora export`.")],
    state: State,
    in_place: Annotated[
        bool,
        typer.Option(
            "--in-place", help="Use the bundle where it is, unchanged, instead of a copy."
        ),
    ] = False,
) -> None:
    """Make a state folder for a bundle, every file of which is checked and copied.

    Examples:

        fedlora device init --bundle bundle/ --state state/
    """
    from fedlora.device.manifest import read_manifest

    manifest = read_manifest(bundle)
    store = Store.create(state, bundle, in_place=in_place)
    typer.echo(f"{store.path}: {manifest.base_id}, {manifest.task}, {manifest.precisions}")


@app.command()
def status(state: State, as_json: AsJson = False) -> None:
    """Show what is installed, what is served, and how the personal adapter was judged.

    Examples:

        fedlora device status --state state/
    """
    store = Store.open(state)
    found, manifest = store.status(), _manifest(store)
    serving = _serving(found)
    if as_json:
        record = asdict(found)
        record["global"] = record.pop("installed")
        about = {"base_id": manifest.base_id, "task": manifest.task}
        typer.echo(json.dumps({"serving": serving, **about, **record}, ensure_ascii=False))
        return
    rows = [
        ("bundle", f"{manifest.base_id}, {manifest.task}, {manifest.precisions}"),
        ("base", found.bundle.base),
        ("global", _described(found.installed)),
        ("personal", _described(found.personal)),
        ("serving", serving),
    ]
    if found.pending is not None:
        rows.append(("staged", f"{_described(found.pending)}; trials begun: {found.tries}"))
    if found.previous is not None:
        rows.append(("before", _described(found.previous)))
    if found.rejected:
        rows.append(("rejected", ", ".join(f"release {one}" for one in found.rejected)))
    for name, text in rows:
        typer.echo(f"{name:<9} {text}")


@app.command()
def install(
    adapter: Annotated[Path, typer.Argument(help="A PEFT folder or a packed file.")],
    state: State,
    sha256: Annotated[
        str | None, typer.Option("--sha256", help="Expected digest of a packed file.")
    ] = None,
) -> None:
    """Install a global adapter; a personal one stays and is served on.

    Examples:

        fedlora device install global.safetensors --state state/
    """
    from fedlora.device.session import check_adapter

    store = Store.open(state)
    info = read_info(adapter, sha256=sha256)
    check_adapter(info.adapter, _manifest(store))
    store.install_global(info.adapter, info.provenance)
    found = store.status()
    typer.echo(f"{state}: {info.adapter!r} installed; serving {_serving(found)}")
    if found.personal is not None and found.personal.stale:
        typer.echo("the personal adapter started from another one: run fedlora device personalize")


@app.command()
def predict(
    state: State,
    text: Annotated[list[str] | None, typer.Argument(help="Texts to classify.")] = None,
    inputs: Annotated[
        Path | None, typer.Option("--inputs", help="Features: .npy, or .npz with inputs.")
    ] = None,
    adapter: With = Which.serving,
    as_json: AsJson = False,
) -> None:
    """Classify texts, or rows of features: the likeliest class and its probability.

    Examples:

        fedlora device predict --state state/ --inputs windows.npz

        fedlora device predict --state state/ "see you soon"
    """
    from fedlora.device.owner_data import read_inputs

    if bool(text) == (inputs is not None):
        raise ConfigError("expected either texts or --inputs FILE")
    store = Store.open(state)
    rows: Any = text if inputs is None else read_inputs(inputs, _manifest(store))
    found = _session(store, adapter).predict(rows)
    if as_json:
        records = [
            {"label": p.label, "index": p.index, "probability": p.probability} for p in found
        ]
        typer.echo(json.dumps(records, ensure_ascii=False))
        return
    for one in found:
        typer.echo(f"{one.label}\t{one.probability:.3g}")


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="How the message begins.")],
    state: State,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="At most.")] = 64,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0: always the likeliest token.")
    ] = 0.0,
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=1, help="Draw from that many likeliest tokens.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Draw from the likeliest of this probability.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="The same seed draws the same.")] = 0,
    adapter: With = Which.serving,
    as_json: AsJson = False,
) -> None:
    """Continue a message; the text comes piece by piece.

    Examples:

        fedlora device generate "see you" --state state/

        fedlora device generate "see you" --state state/ --temperature 0.8 --top-k 40 --seed 1
    """
    pieces = _session(Store.open(state), adapter).generate(
        prompt, max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    if as_json:
        record = {"prompt": prompt, "text": "".join(pieces)}
        typer.echo(json.dumps(record, ensure_ascii=False))
        return
    typer.echo(prompt, nl=False)
    for piece in pieces:
        typer.echo(piece, nl=False)
        sys.stdout.flush()
    typer.echo()


@app.command()
def suggest(
    text: Annotated[str, typer.Argument(help="What was typed; a last space asks for a new word.")],
    state: State,
    k: Annotated[int, typer.Option("-k", min=1, help="How many words.")] = 3,
    adapter: With = Which.serving,
    as_json: AsJson = False,
) -> None:
    """Suggest the next words, or how to end the word that is being typed.

    Examples:

        fedlora device suggest "see you at the " --state state/

        fedlora device suggest "see you tom" --state state/ -k 5 --json
    """
    found = _session(Store.open(state), adapter).suggest(text, k)
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in found], ensure_ascii=False))
        return
    for one in found:
        typer.echo(f"{one.word}\t{one.probability:.3g}")


@app.command()
def personalize(
    state: State,
    data: Data,
    client: Client = None,
    start: Annotated[
        Start, typer.Option("--from", help="Start from the installed global adapter, or anew.")
    ] = Start.installed,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps.")] = 24,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="Of AdamW.")] = 2e-3,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Examples a step.")] = 8,
    held_out: HeldOut = 0.2,
    seed: Annotated[int, typer.Option("--seed", help="Of the order of the data.")] = 0,
    low_memory: LowMemory = False,
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train the owner's adapter, and keep it if it beats what is served on held-out data.

    Nothing leaves the state folder. The end of the data is held out and judges both.

    Examples:

        fedlora device personalize --state state/ --data messages.txt

        fedlora device personalize --state state/ --data watch --client 1_left --steps 40
    """
    from fedlora.device.personal import personalize as train
    from fedlora.device.runtime import open_bundle
    from fedlora.device.session import Session
    from fedlora.device.trainer import Trainer

    config = TrainConfig(local_steps=steps, learning_rate=learning_rate, batch_size=batch_size)
    store = Store.open(state)
    with store.lock():
        # One mapping of the base for both.
        bundle = open_bundle(store.bundle, threads=threads, low_memory=low_memory)
        examples = _owner_data(bundle, data, client, held_out)
        done = train(
            store,
            Session(bundle),
            Trainer(bundle),
            examples,
            config,
            from_base=start is Start.base,
            seed=seed,
            progress=None if quiet else _show_steps(steps),
        )
    if as_json:
        typer.echo(json.dumps(asdict(done)))
        return
    typer.echo(
        f"trained on {done.train_examples} examples for {done.steps} steps, judged on "
        f"{done.held_out_examples} others"
    )
    _print_measures({done.replaced: done.before, "new": done.after})
    if done.kept:
        typer.echo("the new adapter is better: it is kept and served from now on")
    else:
        typer.echo(f"the new adapter is not better: it is dropped, {done.replaced} is served on")


@app.command()
def evaluate(
    state: State,
    data: Data,
    client: Client = None,
    held_out: HeldOut = 0.2,
    low_memory: LowMemory = False,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Compare base, global and personal adapter on the held-out end of the data.

    Examples:

        fedlora device evaluate --state state/ --data messages.txt

        fedlora device evaluate --state state/ --data chitchat --client 0a2b --json
    """
    from fedlora.device.personal import evaluate_all
    from fedlora.device.session import Session

    store = Store.open(state)
    session = Session(store.bundle, threads=threads, low_memory=low_memory)
    examples = _owner_data(session.bundle, data, client, held_out)
    found = evaluate_all(store, session, examples)
    if as_json:
        count = len(examples.held_out)
        typer.echo(json.dumps({"held_out_examples": count, "adapters": found}))
        return
    _print_measures(found)


@app.command()
def forget(state: State, as_json: AsJson = False) -> None:
    """Erase the personal adapter, its numbers and all cached data; the global adapter stays.

    Files are unlinked; encrypt the disk if deleted bytes must not be found on it.

    Examples:

        fedlora device forget --state state/
    """
    store = Store.open(state)
    found = store.forget()
    serving = _serving(store.status())
    if as_json:
        typer.echo(json.dumps({"forgotten": found, "serving": serving}))
        return
    typer.echo(f"{'erased' if found else 'there was nothing to erase'}; serving {serving}")


def _manifest(store: Store) -> Manifest:
    from fedlora.device.manifest import read_manifest

    return read_manifest(store.bundle)


def _session(store: Store, which: Which) -> Session:
    """Open a session with one of the state's adapters."""
    from fedlora.device.session import Session

    return Session(store.bundle, adapter=_adapter(store, which))


def _adapter(store: Store, which: Which) -> Adapter | None:
    if which is Which.base:
        return None
    if which is Which.serving:
        return store.serving()
    found = store.personal_adapter() if which is Which.personal else store.global_adapter()
    if found is None:
        todo = "personalize" if which is Which.personal else "install"
        raise ConfigError(
            f"--adapter {which.value}: {store.path} has none; make one with fedlora device {todo}"
        )
    return found


def _owner_data(bundle: OpenBundle, data: str, client: str | None, held_out: float) -> OwnerData:
    from fedlora.device.manifest import TOKENIZER
    from fedlora.device.owner_data import read_owner_data

    about = bundle.manifest
    tokenizer = bundle.tokenizer() if TOKENIZER in about.files else None
    return read_owner_data(data, tokenizer, about, client=client, held_out_share=held_out)


def _serving(status: Status) -> str:
    return "personal" if status.personal else "global" if status.installed else "base"


def _described(entry: GlobalEntry | PersonalEntry | None) -> str:
    if entry is None:
        return "none"
    words = [f"{entry.fingerprint[:12]}, {entry.num_bytes:,} bytes"]
    if isinstance(entry, GlobalEntry):
        if entry.release is not None:
            words.append(f"release {entry.release} of {entry.channel}")
        if entry.provenance:
            words.append(json.dumps(entry.provenance, ensure_ascii=False, sort_keys=True))
        return "; ".join(words)
    before, after = (_loss(entry.metrics.get(when)) for when in ("before", "after"))
    if before and after:
        words.append(f"held-out loss {after} (before: {before})")
    if entry.stale:
        words.append("stale: another global adapter was installed since")
    return "; ".join(words)


def _loss(measures: Any) -> str:
    """Return the loss among a state's measures, none where whoever wrote them had none."""
    loss = measures.get("loss") if isinstance(measures, dict) else None
    return f"{loss:.4f}" if isinstance(loss, int | float) else ""


def _print_measures(found: Mapping[str, Mapping[str, float]]) -> None:
    """Print a line an adapter, a column a measure."""
    names = list(next(iter(found.values())))
    table = Table("adapter", *names, box=None, pad_edge=False)
    for adapter, values in found.items():
        table.add_row(adapter, *(f"{values[name]:.4f}" for name in names))
    Console(soft_wrap=True).print(table)


def _show_steps(total: int) -> Callable[[int, float], None]:
    """Return what says on stderr how far a training is: one line that changes, or ten lines."""
    live = sys.stderr.isatty()
    every = max(total // 10, 1)

    def show(step: int, loss: float) -> None:
        if live:
            end = "\n" if step == total else ""
            print(f"\rstep {step}/{total}, loss {loss:.4f}", end=end, file=sys.stderr, flush=True)
        elif step % every == 0 or step == total:
            print(f"step {step}/{total}, loss {loss:.4f}", file=sys.stderr, flush=True)

    return show
