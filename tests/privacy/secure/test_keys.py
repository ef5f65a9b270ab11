"""Identities and advertisements: which files, which signatures, which bytes."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from fedlora.errors import ForgedKeyError, FormatError, SecureTermsError
from fedlora.privacy.secure import Advertisement, ClientSession, Identity
from fedlora.privacy.secure.keys import opened_key, require_signed, shared_secret
from tests.matching import raises
from tests.privacy.secure.rounds import terms_of

PRIVATE, PUBLIC = serialization.PrivateFormat, serialization.PublicFormat
ENCODING = serialization.Encoding


@pytest.mark.parametrize("format", [PRIVATE.OpenSSH, PRIVATE.PKCS8, PRIVATE.TraditionalOpenSSL])
@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_a_nodes_key_signs_and_all_forms_of_its_public_half_verify(tmp_path, curve, format):
    key = ec.generate_private_key(curve)
    file = tmp_path / "node"
    file.write_bytes(key.private_bytes(ENCODING.PEM, format, serialization.NoEncryption()))
    identity = Identity.from_pem_file(file)
    terms = terms_of()
    _, ad = ClientSession.begin(terms, 2, identity)
    public = key.public_key()
    info = PUBLIC.SubjectPublicKeyInfo
    forms = [
        identity.public_bytes,
        public.public_bytes(ENCODING.DER, info),
        public.public_bytes(ENCODING.PEM, info),
        public.public_bytes(ENCODING.OpenSSH, PUBLIC.OpenSSH) + b" a comment\n",
    ]
    for form in forms:
        require_signed(terms, 2, ad, form)


@pytest.mark.parametrize("what", ["missing", "text", "ed25519", "locked", "k1"])
def test_files_that_are_no_identity_are_refused(tmp_path, what):
    file = tmp_path / "node"
    key = ec.generate_private_key(ec.SECP256K1() if what == "k1" else ec.SECP256R1())
    encryption = serialization.NoEncryption()
    if what == "ed25519":
        key = ed25519.Ed25519PrivateKey.generate()
    if what == "locked":
        encryption = serialization.BestAvailableEncryption(b"secret")
    data = key.private_bytes(ENCODING.PEM, PRIVATE.PKCS8, encryption)
    if what != "missing":
        file.write_bytes(b"hello" if what == "text" else data)
    with raises(FormatError, str(file)):
        Identity.from_pem_file(file)


def test_a_known_identity_that_is_no_key_is_refused():
    _, ad = ClientSession.begin(terms_of(), 0)
    for data in (b"", b"ecdsa-sha2-nistp256 AAAA", b"-----BEGIN PUBLIC KEY-----\n", b"\x30\x00"):
        with raises(ForgedKeyError, "NIST curve"):
            require_signed(terms_of(), 0, ad, data)


def test_an_advertisement_survives_as_bytes():
    identity = Identity(ec.generate_private_key(ec.SECP384R1()))
    for signer in (None, identity):
        _, ad = ClientSession.begin(terms_of(), 4, signer)
        assert Advertisement.from_bytes(ad.to_bytes()) == ad
    assert len(ClientSession.begin(terms_of(), 4)[1].to_bytes()) == 138


def test_bytes_of_another_length_are_refused():
    _, ad = ClientSession.begin(terms_of(), 0)
    data = ad.to_bytes()
    for wrong in (b"", data[:-1], data + b"\0", bytes(138)):
        with raises(ForgedKeyError, f"{len(wrong)} bytes"):
            Advertisement.from_bytes(wrong)


def test_a_signature_is_bound_to_its_client_and_its_terms():
    identity = Identity(ec.generate_private_key(ec.SECP256R1()))
    _, ad = ClientSession.begin(terms_of(), 0, identity)
    with raises(ForgedKeyError, "client 1", "found those of 0"):
        require_signed(terms_of(), 1, ad, identity.public_bytes)
    with raises(SecureTermsError, "client 0", "round 4"):
        require_signed(terms_of(round=4), 0, ad, identity.public_bytes)


@pytest.mark.parametrize("point", [bytes(32), b"\1" + bytes(31)])
def test_a_point_of_small_order_is_refused(point):
    with raises(ForgedKeyError, "client 3", "small order"):
        shared_secret(opened_key(b"s" * 32), point, 3)
