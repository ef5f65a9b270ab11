"""A run's checkpoint: what the server needs to go on after kill -9, bit for bit.

    OUT/rounds.jsonl                            one line a round
    OUT/checkpoint/round-000012.safetensors     the global adapter after round 12
    OUT/checkpoint/state.json                   round, digests, clients, totals, the experiment

The order of writing is the whole trick: the round's line and the adapter's file are on the disk
before `state.json` is renamed into place, and only then are older files deleted. So `state.json`
always names files that are there. What is newer than it (a line, a file, half a line) belongs to
a round that is done again, and is dropped on resume.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from fedlora.adapter import Adapter
from fedlora.aggregation import ServerState
from fedlora.errors import DigestMismatchError, FedloraError, RunError
from fedlora.experiment import ExperimentConfig
from fedlora.files import write_atomic
from fedlora.formats import load_adapter, save_adapter
from fedlora.plain import from_plain
from fedlora.privacy.central import PrivacyState

__all__ = [
    "Checkpoint",
    "ClientRecord",
    "Dropped",
    "RoundRecord",
    "append_round",
    "has_checkpoint",
    "read_checkpoint",
    "read_rounds",
    "resume_run",
    "write_checkpoint",
]

VERSION = 1
_NUMBER, _OPTIONAL = (int,), (int, type(None))
_CLIENT_TYPES: Mapping[str, tuple[type, ...]] = {
    "client_id": (str,), "rank": _OPTIONAL, "num_examples": _OPTIONAL, "held_out": (bool,),
    "rounds": _NUMBER, "steps": _NUMBER,
}  # fmt: skip
# Keys of an experiment that may differ on resume: how long it runs, on what, and how it fares.
FREE_KEYS = ("federation.rounds", "engine", "quorum", "faults")


@dataclass(frozen=True, slots=True)
class ClientRecord:
    """One client of a run, as the server knows it."""

    client_id: str
    rank: int | None = None  # None: the global adapter's
    num_examples: int | None = None  # None: not told
    held_out: bool = False  # never sampled
    rounds: int = 0  # in which it gave a valid update
    steps: int = 0  # optimizer steps over these rounds
    joined: int = 0  # the round from which it may be sampled; 0: it was there at the start


@dataclass(frozen=True, slots=True)
class Dropped:
    """A client whose reply did not count, and why."""

    client: str
    reason: str


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """One line of rounds.jsonl."""

    round: int
    # empty: Poisson sampling drew nobody; declined: the devices did, and the round comes again.
    # With privacy each of these has released noise, and none comes again.
    status: Literal["updated", "failed", "empty", "declined"]
    cohort: tuple[str, ...]
    loss: float | None  # mean over the clients by their weight; None: nobody took a step
    seconds: float
    bytes_up: int
    bytes_down: int
    dropped: tuple[Dropped, ...] = ()
    # What the method says of the round (`Method.noted`), each the largest over the layers.
    noted: Mapping[str, float] = field(default_factory=dict)
    # Seconds of "prepare", "send", "wait", "aggregate", "save"; see `fedlora.federation.phases`.
    phases: Mapping[str, float] = field(default_factory=dict)
    # The clients' own seconds, "slowest" and "median"; empty where none tells.
    clients: Mapping[str, float] = field(default_factory=dict)
    late: int = 0  # replies to older rounds that came in this one, and were thrown away
    declined: tuple[str, ...] = ()  # client ids: their owners do not allow it now; also in dropped
    # What bytes_up and bytes_down would be in fp32, as "up" and "down", where a codec is in use.
    fp32_bytes: Mapping[str, int] = field(default_factory=dict)
    epsilon: float | None = None  # of all rounds until this one, with privacy
    # By the phases of a secure sum: "clients" whose answer was right, "bytes_up", "bytes_down".
    secure: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A run between two rounds."""

    state: ServerState
    clients: tuple[ClientRecord, ...]  # sorted by client_id
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0  # of all rounds
    failed_in_a_row: int = 0
    left_out: tuple[Dropped, ...] = field(default=())  # at the start of the run
    # Drawn once for a run: clients keep their own rows under it. Not part of what is computed.
    run: str = field(default="", compare=False)
    privacy: PrivacyState | None = None  # None: the run has no guarantee

    @property
    def client_ids(self) -> tuple[str, ...]:
        """The ids of the clients that may be sampled."""
        return tuple(c.client_id for c in self.clients if not c.held_out)

    @property
    def held_out(self) -> tuple[str, ...]:
        """The ids of the clients that never are."""
        return tuple(c.client_id for c in self.clients if c.held_out)


def has_checkpoint(out: Path) -> bool:
    """Whether a run in `out` can be resumed."""
    return (out / "checkpoint" / "state.json").is_file()


def write_checkpoint(out: Path, checkpoint: Checkpoint, config: ExperimentConfig) -> None:
    """Write the files of one round, then `state.json`, then delete what it no longer names."""
    folder = out / "checkpoint"
    folder.mkdir(parents=True, exist_ok=True)
    state = checkpoint.state
    stem = f"round-{state.round:06d}"
    provenance = {"run": config.name, "round": state.round, "method": config.federation.method}
    files = {"adapter": _save(folder / f"{stem}.safetensors", state.trainable, provenance)}
    if state.frozen is not None:
        files["frozen"] = _save(folder / f"{stem}.frozen.safetensors", state.frozen, provenance)
    if state.method_state:
        arrays = {name: np.ascontiguousarray(v) for name, v in state.method_state.items()}
        path = folder / f"{stem}.method.safetensors"
        write_atomic(path, save_arrays(arrays))
        files["method_state"] = _entry(path)
    document = {
        "version": VERSION,
        "round": state.round,
        "run": checkpoint.run,
        "files": files,
        "experiment": config.to_table(),
        "experiment_digest": _experiment_digest(config.to_table()),
        "bytes_up": checkpoint.bytes_up,
        "bytes_down": checkpoint.bytes_down,
        "seconds": checkpoint.seconds,
        "failed_in_a_row": checkpoint.failed_in_a_row,
        "left_out": [_table(dropped) for dropped in checkpoint.left_out],
    }
    if checkpoint.privacy is not None:
        document["privacy"] = dataclasses.asdict(checkpoint.privacy)
    write_atomic(folder / "state.json", _with_clients(document, checkpoint.clients))
    _delete_others(folder, {entry["file"] for entry in files.values()})


def read_checkpoint(out: Path) -> Checkpoint:
    """Read the checkpoint of a run. Raises `RunError`, and `DigestMismatchError` for a bad file."""
    return _checkpoint(out, _document(out))


def _checkpoint(out: Path, document: dict[str, Any]) -> Checkpoint:
    folder = out / "checkpoint"
    try:
        files = document["files"]
        arrays: Mapping[str, Any] = {}
        if "method_state" in files:
            arrays = load_arrays(_checked_bytes(folder, files["method_state"]))
        state = ServerState(
            round=document["round"],
            trainable=_load(folder, files["adapter"]),
            frozen=_load(folder, files["frozen"]) if "frozen" in files else None,
            method_state=arrays,
        )
        return Checkpoint(
            state,
            tuple(map(_client, document["clients"])),
            document["bytes_up"],
            document["bytes_down"],
            document["seconds"],
            document["failed_in_a_row"],
            tuple(from_plain(Dropped, dropped) for dropped in document["left_out"]),
            str(document.get("run", "")),
            from_plain(PrivacyState, document["privacy"]) if "privacy" in document else None,
        )
    except (KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise RunError(
            f"{folder / 'state.json'}: not a checkpoint of this version: {error!r}"
        ) from None


def resume_run(out: Path, config: ExperimentConfig) -> Checkpoint:
    """Read the checkpoint for going on with `config`, and drop what is newer than it.

    Raises `RunError` when the run was made with another experiment; it names the keys that differ.
    """
    document = _document(out)
    theirs, mine = document.get("experiment", {}), config.to_table()
    if document.get("experiment_digest") != _experiment_digest(mine):
        differ = sorted(_differences(_comparable(theirs), _comparable(mine)))
        shown = ", ".join(
            f"{key} (run: {before!r}, now: {after!r})" for key, before, after in differ[:3]
        )
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise RunError(
            f"{out}: cannot resume with another experiment: {shown}{more}; only "
            f"{', '.join(FREE_KEYS)} may change; restore them, or choose another folder"
        )
    checkpoint = _checkpoint(out, document)
    kept = [record for record in read_rounds(out) if record.round <= checkpoint.state.round]
    write_atomic(out / "rounds.jsonl", b"".join(_line(record) for record in kept))
    _delete_others(out / "checkpoint", {entry["file"] for entry in document["files"].values()})
    return checkpoint


def append_round(out: Path, record: RoundRecord) -> None:
    """Add one line to rounds.jsonl and flush it to the disk."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "rounds.jsonl", "ab") as file:
        file.write(_line(record))
        file.flush()
        os.fsync(file.fileno())


def read_rounds(out: Path) -> list[RoundRecord]:
    """Read rounds.jsonl; a torn last line is left out. Raises `RunError` for any other bad line."""
    path = out / "rounds.jsonl"
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    lines.pop()  # "" after the last newline, or a line that was not finished
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(from_plain(RoundRecord, json.loads(line)))
        except (ValueError, AttributeError, FedloraError) as error:
            raise RunError(f"{path}, line {number}: not a round's record: {error}") from None
    return records


def _line(record: RoundRecord) -> bytes:
    table = _table(record) | {"dropped": [_table(dropped) for dropped in record.dropped]}
    return json.dumps(table, ensure_ascii=False).encode() + b"\n"


def _table(value: Dropped | RoundRecord) -> dict[str, Any]:
    """Return the fields of a record; `dataclasses.asdict` would copy a cohort's every id."""
    return {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}


def _with_clients(document: Mapping[str, Any], clients: Sequence[ClientRecord]) -> bytes:
    """Return `document` as JSON with the clients in it, one a line.

    They are written as text here: 100,000 tables of them, and their encoding with an indent, would
    take 150 MB and seconds a round.
    """
    lines = (
        f'  {{"client_id": {json.dumps(c.client_id)}, "rank": {_or_null(c.rank)}, '
        f'"num_examples": {_or_null(c.num_examples)}, '
        f'"held_out": {"true" if c.held_out else "false"}, '
        f'"rounds": {c.rounds}, "steps": {c.steps}'
        f"{_joined(c)}}}"
        for c in clients
    )
    head = json.dumps(document, indent=1).removesuffix("\n}")
    return b"".join((head.encode(), b',\n "clients": [\n', ",\n".join(lines).encode(), b"\n ]\n}"))


def _joined(client: ClientRecord) -> str:
    """Return the round that it joined in; most were there at the start, and nothing is said."""
    return f', "joined": {client.joined}' if client.joined else ""


def _or_null(number: int | None) -> int | str:
    return "null" if number is None else number


def _client(table: Any) -> ClientRecord:
    """Read one client; only what is not as it was written takes the way that says what is wrong."""
    if type(table) is dict and table.keys() == _CLIENT_TYPES.keys():
        known = all(type(value) in _CLIENT_TYPES[key] for key, value in table.items())
        if known:
            return ClientRecord(**table)
    return from_plain(ClientRecord, table)


def _document(out: Path) -> dict[str, Any]:
    path = out / "checkpoint" / "state.json"
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise RunError(f"{path}: no checkpoint to resume from: {error.strerror}") from None
    except ValueError as error:
        raise RunError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(document, dict) or document.get("version") != VERSION:
        raise RunError(f"{path}: expected a checkpoint of version {VERSION}")
    return document


def _save(path: Path, adapter: Adapter, provenance: Mapping[str, Any]) -> dict[str, str]:
    save_adapter(adapter, path, provenance=provenance)
    return _entry(path)


def _load(folder: Path, entry: Mapping[str, str]) -> Adapter:
    _checked_bytes(folder, entry)
    return load_adapter(folder / entry["file"])


def _entry(path: Path) -> dict[str, str]:
    return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _checked_bytes(folder: Path, entry: Mapping[str, str]) -> bytes:
    path = folder / entry["file"]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from None
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise DigestMismatchError(
            f"{path}: expected SHA-256 {entry['sha256'][:12]}…, found other bytes; this checkpoint "
            "cannot be resumed"
        )
    return data


def _delete_others(folder: Path, named: set[str]) -> None:
    for path in folder.glob("round-*.safetensors"):
        if path.name not in named:
            with contextlib.suppress(OSError):  # a leftover costs space, not a run
                path.unlink()


def _comparable(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted key to value, without the keys that may change."""
    flat: dict[str, Any] = {}
    for name, value in table.items():
        key = f"{prefix}{name}"
        if key in FREE_KEYS:
            continue
        if isinstance(value, Mapping):
            flat |= _comparable(value, f"{key}.")
        else:
            flat[key] = list(value) if isinstance(value, tuple) else value
    return flat


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    keys = before.keys() | after.keys()
    return [
        (key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)
    ]


def _experiment_digest(table: Mapping[str, Any]) -> str:
    text = json.dumps(_comparable(table), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
