"""Node keys: by its key a SuperNode shows that it is one of the registered devices.

Flower wants NIST EC keys in OpenSSH's own format, as ``ssh-keygen -t ecdsa -b 384`` writes them,
and no passphrase; Ed25519 is refused. The private key is made on the device and stays there; the
public one goes to the server, which registers it.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedlora.errors import FormatError, RunError
from fedlora.files import write_atomic

__all__ = [
    "fingerprint",
    "make_node_key",
    "public_path",
    "require_private_key",
    "require_public_key",
]

_HINT = "make one with fedlora federation key NAME, or ssh-keygen -t ecdsa -b 384 -N ''"
_CURVES = ("secp256r1", "secp384r1", "secp521r1")


def public_path(key: Path) -> Path:
    """Return where the public half of a private key's file is: KEY.pub."""
    return key.with_name(f"{key.name}.pub")


def make_node_key(path: Path) -> Path:
    """Write a new private key to `path` (0600) and the public one beside it; return the latter.

    Raises `RunError` where a key is already: the device would lose its registration.
    """
    public = public_path(path)
    for file in (path, public):
        if file.exists():
            raise RunError(
                f"{file}: expected no file, found one; a new key would need a new registration: "
                "use this one, or name another file"
            )
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    line = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    write_atomic(path, private, mode=0o600)
    write_atomic(public, line + b" fedlora\n", mode=0o644)
    return public


def require_private_key(path: Path) -> None:
    """Raise `FormatError` unless Flower takes the file as a node's key."""
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), None)
    except OSError as error:
        raise FormatError(f"{path}: no node key: {error.strerror}; {_HINT}") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise FormatError(
            f"{path}: expected a private key in OpenSSH's format without a passphrase; {_HINT}"
        ) from None
    _require_nist(path, getattr(getattr(key, "curve", None), "name", type(key).__name__))


def require_public_key(path: Path) -> None:
    """Raise `FormatError` unless Flower takes the file as a node's public key."""
    try:
        data = path.read_bytes()
        key = serialization.load_ssh_public_key(data)
    except OSError as error:
        raise FormatError(f"{path}: no public key: {error.strerror}; {_HINT}") from None
    except (ValueError, UnsupportedAlgorithm):
        private = b"PRIVATE KEY" in data
        found = "a private one: keep it on its device, and give KEY.pub" if private else "another"
        raise FormatError(
            f"{path}: expected a public key in OpenSSH's format, found {found}"
        ) from None
    _require_nist(path, getattr(getattr(key, "curve", None), "name", type(key).__name__))


def fingerprint(public: Path) -> str:
    """Return a public key's fingerprint as ``ssh-keygen -l`` prints it: SHA256:…"""
    blob = base64.b64decode(public.read_text(encoding="ascii").split()[1])
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def _require_nist(path: Path, found: str) -> None:
    if found not in _CURVES:
        raise FormatError(
            f"{path}: expected a key on a NIST curve ({', '.join(_CURVES)}), which is all that "
            f"Flower takes, found {found}; {_HINT}"
        )
