"""The text that tiny-chat may learn from, and the users it must never have read.

ChitChat (MIT) holds 1,315 senders. 117 of them are the clients of the bundled data set `chitchat`;
a base that had read their messages would make personalization look better than it is. So they are
left out whole: also what they wrote beyond the first 1,000 messages that the data set keeps.

A client's id is the first eight characters of the sender's UUID in ChitChat.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import subprocess
import sys
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

WHEEL = "chitchat_dataset-0.9.0-py3-none-any.whl"
WHEEL_SHA256 = "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e"
CLIENTS_FILE = Path("fedlora/data/files/chitchat_117x1000.jsonl.gz")
ID_LENGTH = 8


@dataclass(frozen=True, slots=True, order=True)
class Message:
    """One chat message; `text` is stripped and not empty, `time` is ISO 8601 without a zone."""

    sender: str
    time: str
    text: str


@dataclass(frozen=True, slots=True)
class Corpus:
    """Messages by sender, chronological within a sender."""

    training: dict[str, list[Message]]  # by the sender's UUID
    validation: dict[str, list[Message]]  # other senders of the same kind, to choose a recipe on
    clients: dict[str, list[Message]]  # the 117, by client id: for the last measurement alone

    def training_texts(self) -> list[str]:
        """Every training message, sender after sender."""
        return [m.text for messages in self.training.values() for m in messages]


def load_corpus(cache: Path, clients_file: Path, validation_share: float, seed: int) -> Corpus:
    """Fetch ChitChat into `cache` and split it by sender.

    `validation_share` of the senders (not of the messages) go to validation, drawn by `seed` among
    those of 20 to 300 messages, so that the two senders who wrote thousands stay in training.
    """
    senders = read_chitchat(fetch_chitchat(cache))
    clients = read_clients(clients_file)
    held_out = {client: _sender_of(client, senders) for client in clients}
    for client, messages in clients.items():
        _check_same_messages(client, messages, senders[held_out[client]])

    others = {s: m for s, m in senders.items() if s not in set(held_out.values())}
    _check_no_client_message(others, clients)
    middling = sorted(s for s, m in others.items() if 20 <= len(m) <= 300)
    count = round(validation_share * len(others))
    chosen = set(random.Random(seed).sample(middling, count))
    return Corpus(
        training={s: m for s, m in others.items() if s not in chosen},
        validation={s: m for s, m in others.items() if s in chosen},
        clients=clients,
    )


def fetch_chitchat(cache: Path) -> Path:
    """Path of the pinned ChitChat wheel, downloaded with pip unless `cache` has it."""
    wheel = cache / WHEEL
    if not wheel.exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "chitchat-dataset==0.9.0", "--dest", str(cache)], check=True)
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise ValueError(f"{WHEEL} has SHA-256 {found}, expected {WHEEL_SHA256}; delete it.")
    return wheel


def read_chitchat(wheel: Path) -> dict[str, list[Message]]:
    """Every message that is more than white space, by sender UUID."""
    with zipfile.ZipFile(wheel) as archive:
        conversations = json.loads(archive.read("chitchat_dataset/dataset.json"))
    senders: defaultdict[str, list[Message]] = defaultdict(list)
    for conversation in conversations.values():
        for turn in conversation["messages"]:
            for raw in turn:
                if text := raw["text"].strip():
                    time = raw["timestamp"].rstrip("Z")
                    senders[raw["sender"]].append(Message(raw["sender"], time, text))
    return {s: sorted(senders[s], key=lambda m: m.time) for s in sorted(senders)}


def read_clients(path: Path) -> dict[str, list[Message]]:
    """The bundled data set: a JSON line a user, `{"user": id, "messages": [[time, text], …]}`."""
    clients: dict[str, list[Message]] = {}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            clients[row["user"]] = [Message(row["user"], t, text) for t, text in row["messages"]]
    return clients


def texts_shared_with_clients(corpus: Corpus) -> tuple[int, int]:
    """How many training messages read exactly like some client's message ("lol", "Hello!").

    Two counts: against all the clients' messages, and against their held-out last fifth. These
    are other people's messages and stay in training; the number belongs into the model card.
    """
    everything = {m.text for messages in corpus.clients.values() for m in messages}
    held_out = {m.text for messages in corpus.clients.values() for m in last_fifth(messages)}
    texts = corpus.training_texts()
    return sum(t in everything for t in texts), sum(t in held_out for t in texts)


def last_fifth(messages: list[Message]) -> list[Message]:
    """What a client's adapters are measured on: the last 20 % of its messages by time."""
    return messages[int(0.8 * len(messages)) :]


def _sender_of(client: str, senders: dict[str, list[Message]]) -> str:
    found = [s for s in senders if s[:ID_LENGTH] == client]
    if len(found) != 1:
        raise ValueError(f"client {client!r} fits {len(found)} senders of ChitChat, expected 1.")
    return found[0]


def _check_same_messages(client: str, ours: list[Message], theirs: list[Message]) -> None:
    """The id alone could be a coincidence; every message must be that sender's."""
    known = {(m.time, m.text) for m in theirs}
    if missing := [m for m in ours if (m.time, m.text) not in known]:
        raise ValueError(
            f"client {client!r}: {len(missing)} of {len(ours)} messages are not by the sender of"
            f" that id in ChitChat, the first at {missing[0].time}."
        )


def _check_no_client_message(
    others: dict[str, list[Message]], clients: dict[str, list[Message]]
) -> None:
    """Neither a client's sender id nor one of its (time, text) pairs may be left.

    Two people may send "Hi" in the same second, so a pair counts only if its sender also matches.
    """
    kept = {(m.sender[:ID_LENGTH], m.time, m.text) for ms in others.values() for m in ms}
    leaked = [m for ms in clients.values() for m in ms if (m.sender, m.time, m.text) in kept]
    ids = {sender[:ID_LENGTH] for sender in others} & clients.keys()
    if leaked or ids:
        raise ValueError(f"{len(leaked)} messages of {len(ids)} clients are in the training text.")
