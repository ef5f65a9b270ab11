"""Private keys of a repository: one PEM file a key, 0600, in a folder for each custody.

    KEYS/root/KEYID.pem               offline
    KEYS/targets/KEYID.pem            offline
    KEYS/online/snapshot/KEYID.pem    on the machine that renews timestamps
    KEYS/online/timestamp/KEYID.pem
    KEYS/online/rollout/KEYID.pem

Any of the first two folders may be a link to a medium that is only there when it is needed. Keys
are Ed25519, as PKCS #8, encrypted where a passphrase is given.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import CryptoSigner, Key, SSlibKey

from fedlora.errors import PublishError
from fedlora.files import write_atomic

__all__ = ["FOLDERS", "Keys"]

FOLDERS = {
    "root": Path("root"),
    "targets": Path("targets"),
    "snapshot": Path("online") / "snapshot",
    "timestamp": Path("online") / "timestamp",
    "rollout": Path("online") / "rollout",
}


class Keys:
    """A folder of private keys. passphrase: for all of them; None where they have none."""

    def __init__(self, folder: str | os.PathLike[str], passphrase: str | None = None) -> None:
        self.folder = Path(folder)
        self._passphrase = passphrase.encode() if passphrase else None

    def generate(self, role: str) -> SSlibKey:
        """Make a key for a role, keep the private half, and return the public one."""
        private = Ed25519PrivateKey.generate()
        public = SSlibKey.from_crypto(private.public_key())
        secret = self._passphrase
        data = private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(secret)
            if secret
            else serialization.NoEncryption(),
        )
        path = self._path(role, public.keyid)
        for folder in reversed([p for p in path.parents if p.is_relative_to(self.folder)]):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(path, data, mode=0o600)
        return public

    def signers(self, role: str, public: Iterable[Key], needed: int) -> list[CryptoSigner]:
        """Return signers for those of a role's public keys whose private half is here.

        Raises `PublishError` when they are fewer than needed, or cannot be read.
        """
        public = list(public)
        found = [self._signer(role, key) for key in public if self._path(role, key.keyid).exists()]
        if len(found) < needed:
            raise PublishError(
                f"{self.folder / FOLDERS[role]}: expected {needed} of the {len(public)} private "
                f"keys of the role {role}, found {len(found)}; name their folder with --keys, or "
                "bring the medium that they are on"
            )
        return found

    def has(self, role: str, public: Iterable[Key], needed: int) -> bool:
        """Whether enough private keys of a role are here."""
        return sum(self._path(role, key.keyid).exists() for key in public) >= needed

    def _signer(self, role: str, key: Key) -> CryptoSigner:
        path = self._path(role, key.keyid)
        try:
            private = serialization.load_pem_private_key(path.read_bytes(), self._passphrase)
            return CryptoSigner(private, key)  # type: ignore[arg-type]
        except OSError as error:
            raise PublishError(f"{path}: cannot be read: {error.strerror or error}") from None
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise PublishError(
                f"{path}: cannot be read as a private key; is the passphrase right?"
            ) from None

    def _path(self, role: str, keyid: str) -> Path:
        return self.folder / FOLDERS[role] / f"{keyid}.pem"
