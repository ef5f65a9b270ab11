"""What a device does with the messages of a secure sum; an error becomes an error reply.

The owner's word, in the node config:

    identity=PATH       this device's signing key: the one it was registered by will do
    trusted-keys=PATH   the public keys of the devices it adds up with, in OpenSSH's format, a line
                        each, as in the KEY.pub files

    least-clients=N     a sum is of at least so many updates (2 without it)

With both files, advertisements are signed and those of strangers refused, so that the server cannot
put clients of its own making in others' places. Such a device takes part in secure sums alone: an
ordinary training message, by which the server would see its update, is refused. Without them the
server is believed to pass on what the clients have sent, and to ask for secure sums.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from flwr.app import Message, RecordDict

from fedlora.errors import ConfigError, FederationError, FormatError
from fedlora.federation.client import (
    OpenTrainer,
    Trainer,
    declined,
    reply_with,
    trained,
)
from fedlora.federation.device_state import DeviceState
from fedlora.federation.limits import owners_limits
from fedlora.federation.secure.client import (
    ContextSessions,
    answer_agree,
    answer_keys,
    answer_masked,
    answer_shares,
    answer_unmask,
    require_masking,
)
from fedlora.federation.secure.once import answers_of
from fedlora.federation.secure.records import read_keys, training_records
from fedlora.federation.tasks import TrainTask, read_query
from fedlora.flat import pack
from fedlora.privacy.local import NoiseLimits
from fedlora.privacy.secure import Identity
from fedlora.training import TrainResult

__all__ = [
    "handle_agree",
    "handle_keys",
    "handle_masked",
    "handle_plain",
    "handle_shares",
    "handle_unmask",
    "owners_identity",
    "owners_least",
    "owners_trusted",
    "read_trusted_keys",
]

NOTHING: Mapping[str, object] = {}  # said by an owner


def handle_keys(
    message: Message,
    open_trainer: OpenTrainer,
    state: RecordDict,
    device: DeviceState | None = None,
    *,
    min_examples: int = 0,
    node_config: Mapping[str, object] = NOTHING,
) -> Message:
    """Begin a round's secure sum; the reply holds this client's public keys of the round.

    min_examples: as in `handle_train`; a device that declines does so here, where it costs the
    others nothing.
    """

    def build() -> RecordDict:
        content = message.content
        least, fewest = owners_least(node_config), read_keys(content).terms.threshold
        if fewest < least:
            raise FederationError(
                f"this device's owner wants sums of {least} or more updates, found a threshold of "
                f"{fewest}: node config least-clients"
            )
        if min_examples and open_trainer(read_query(content)).num_examples < min_examples:
            return declined("examples")
        owners_limits(node_config).noise.agreed(None)  # nobody puts local noise on a secure sum
        identity = owners_identity(node_config)
        own = None if identity is None else Identity.from_pem_file(identity)
        return answer_keys(content, _sessions(state, node_config), own)

    return reply_with(message, build)


def handle_shares(
    message: Message, state: RecordDict, node_config: Mapping[str, object] = NOTHING
) -> Message:
    """Deal this client's shares to those whom it trusts."""

    def build() -> RecordDict:
        trusted = owners_trusted(node_config)
        known = None if trusted is None else read_trusted_keys(trusted)
        return answer_shares(message.content, _sessions(state, node_config), known)

    return reply_with(message, build)


def handle_masked(
    message: Message,
    open_trainer: OpenTrainer,
    state: RecordDict,
    device: DeviceState | None = None,
    *,
    min_examples: int = 0,
    node_config: Mapping[str, object] = NOTHING,
) -> Message:
    """Train for one round; the reply holds the update under its masks, and nothing else."""
    sessions = _sessions(state, node_config)

    def answer(task: TrainTask, trainer: Trainer, result: TrainResult, _: float) -> RecordDict:
        row = pack(result.adapter, task.reply.segments)
        return answer_masked(message.content, sessions, task, row, trainer.client_id)

    def build() -> RecordDict:
        require_masking(message.content, sessions)
        content = training_records(message.content)
        return trained(content, open_trainer, state, device, min_examples, NoiseLimits(), answer)

    return reply_with(message, build)


def handle_agree(
    message: Message, state: RecordDict, node_config: Mapping[str, object] = NOTHING
) -> Message:
    """Tell the others who this client was told is left, whatever its limits say by now."""
    return reply_with(message, lambda: answer_agree(message.content, _sessions(state, node_config)))


def handle_unmask(
    message: Message, state: RecordDict, node_config: Mapping[str, object] = NOTHING
) -> Message:
    """Help to take the masks off the sum; a device does so whatever its limits say by now."""
    return reply_with(
        message, lambda: answer_unmask(message.content, _sessions(state, node_config))
    )


def handle_plain(message: Message) -> Message:
    """Refuse an ordinary training message: such a device takes part in secure sums alone."""

    def build() -> RecordDict:
        raise FederationError(
            "this device's owner has named trusted-keys: expected a secure sum, found a round in "
            "which the server would see this device's update"
        )

    return reply_with(message, build)


def _sessions(state: RecordDict, node_config: Mapping[str, object]) -> ContextSessions:
    """Return where the sessions are kept; a device with an identity of its own answers once."""
    identity = owners_identity(node_config)
    return ContextSessions(state, None if identity is None else answers_of(identity))


def owners_least(node_config: Mapping[str, object]) -> int:
    """Return the fewest updates in a sum that the owner allows. Raises `ConfigError`."""
    text = str(node_config.get("least-clients", 2))
    if not (text.isascii() and text.isdigit() and 2 <= int(text) < 10**6):
        raise ConfigError(
            f"node config least-clients: expected a whole number >= 2, found {text!r}"
        )
    return int(text)


def owners_identity(node_config: Mapping[str, object]) -> Path | None:
    """Return the file of this device's signing key; None: the owner names none."""
    path = node_config.get("identity")
    return Path(str(path)) if path else None


def owners_trusted(node_config: Mapping[str, object]) -> Path | None:
    """Return the file of the public keys that the owner trusts; None: the owner names none.

    Raises `ConfigError` without an identity beside it: the others would refuse this device.
    """
    path = node_config.get("trusted-keys")
    if path and not node_config.get("identity"):
        raise ConfigError(
            "node config trusted-keys: expected this device's own signing key beside it, found "
            "none; name it as identity='…'"
        )
    return Path(str(path)) if path else None


def read_trusted_keys(path: Path) -> dict[bytes, bytes]:
    """Return the public keys in a file, as DER, by their SHA-256. Raises `FormatError`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: no file of public keys: {error}") from None
    found = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            key = serialization.load_ssh_public_key(line.encode())
        except (ValueError, UnsupportedAlgorithm):
            raise FormatError(
                f"{path}, line {number}: expected a public key in OpenSSH's format, as in a "
                "device's KEY.pub, found something else"
            ) from None
        der = key.public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        found[hashlib.sha256(der).digest()] = der
    return found
