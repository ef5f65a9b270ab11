"""Node keys: the format that Flower takes, and what it would refuse."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from fedlora.errors import FormatError, RunError
from fedlora.federation.deploy.keys import (
    fingerprint,
    make_node_key,
    public_path,
    require_private_key,
    require_public_key,
)
from tests.matching import raises


def test_a_node_key_is_what_flower_reads(tmp_path: Path) -> None:
    public = make_node_key(tmp_path / "node")
    private = serialization.load_ssh_private_key((tmp_path / "node").read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert private.curve.name == "secp384r1"
    assert serialization.load_ssh_public_key(public.read_bytes()) == private.public_key()
    require_private_key(tmp_path / "node")
    require_public_key(public)
    assert (tmp_path / "node").stat().st_mode & 0o777 == 0o600
    assert public == public_path(tmp_path / "node") == tmp_path / "node.pub"


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")
def test_the_fingerprint_is_ssh_keygens(tmp_path: Path) -> None:
    public = make_node_key(tmp_path / "node")
    listed = subprocess.run(
        ["ssh-keygen", "-l", "-f", public], capture_output=True, text=True, check=True
    )
    assert fingerprint(public) == listed.stdout.split()[1]


@pytest.mark.parametrize("there", ["node", "node.pub"])
def test_a_key_is_never_replaced(there: str, tmp_path: Path) -> None:
    (tmp_path / there).write_text("mine")
    with raises(RunError, f"{tmp_path / there}: expected no file, found one"):
        make_node_key(tmp_path / "node")
    assert (tmp_path / there).read_text() == "mine"


def test_what_flower_refuses_is_named_before_it_does(tmp_path: Path) -> None:
    other = ed25519.Ed25519PrivateKey.generate()
    openssh = serialization.PrivateFormat.OpenSSH
    none = serialization.NoEncryption()
    (tmp_path / "ed").write_bytes(other.private_bytes(serialization.Encoding.PEM, openssh, none))
    (tmp_path / "ed.pub").write_bytes(
        other.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
    )
    curve = ec.generate_private_key(ec.SECP384R1())
    pkcs8 = serialization.PrivateFormat.PKCS8
    (tmp_path / "pem").write_bytes(curve.private_bytes(serialization.Encoding.PEM, pkcs8, none))
    with raises(FormatError, "expected a key on a NIST curve", "found Ed25519PrivateKey"):
        require_private_key(tmp_path / "ed")
    with raises(FormatError, "expected a key on a NIST curve"):
        require_public_key(tmp_path / "ed.pub")
    with raises(FormatError, "expected a private key in OpenSSH's format without a passphrase"):
        require_private_key(tmp_path / "pem")
    with raises(FormatError, "no node key: No such file"):
        require_private_key(tmp_path / "missing")
    make_node_key(tmp_path / "node")
    with raises(FormatError, "found a private one: keep it on its device, and give KEY.pub"):
        require_public_key(tmp_path / "node")
