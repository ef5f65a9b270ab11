"""A certificate authority of one's own, and the SuperLink's certificate signed by it.

    CERTS/ca.crt        goes to every device; it is not secret
    CERTS/ca.key        signs server certificates: whoever has it can pose as the server (0600)
    CERTS/server.crt    the SuperLink's, for the names that devices call it by
    CERTS/server.key    its key (0600)

Keys are NIST EC P-384. Devices have no certificates: they show who they are by a node key
(`fedlora.federation.deploy.keys`).
"""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedlora.errors import ConfigError, RunError
from fedlora.files import write_atomic

__all__ = ["Certificates", "make_certificates"]

CA_DAYS = 3650
SERVER_DAYS = 397  # the most that common TLS libraries accept of a server's certificate
EARLIER = datetime.timedelta(minutes=5)  # a device's clock may be behind by so much
LOOPBACK = ("localhost", "127.0.0.1")  # by which the server's own commands reach it


@dataclass(frozen=True, slots=True)
class Certificates:
    """The files of a folder of certificates."""

    ca: Path
    ca_key: Path
    server: Path
    server_key: Path

    @classmethod
    def of(cls, folder: Path) -> Certificates:
        """Name the files, whether or not they are there."""
        names = ("ca.crt", "ca.key", "server.crt", "server.key")
        return cls(*(folder / name for name in names))


def make_certificates(
    folder: Path,
    hosts: Sequence[str] = (),
    *,
    days: int = SERVER_DAYS,
    now: datetime.datetime | None = None,
) -> Certificates:
    """Sign a new server certificate, by the authority in `folder` or by a new one.

    hosts: names and addresses by which devices call the server; the loopback's are always added.
    An authority that is there stays, so that devices keep their ca.crt. days: of the server's
    certificate. now: UTC, for tests.

    Raises `ConfigError` for what is no host name, and `RunError` when only one half of an authority
    is in the folder, or it ends before the new certificate would.
    """
    if days < 1:
        raise ConfigError(f"certificates: expected at least 1 day of validity, found {days}")
    names = _alternative_names([*hosts, *(host for host in LOOPBACK if host not in hosts)])
    now = now or datetime.datetime.now(datetime.UTC)
    files = Certificates.of(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if files.ca.exists() != files.ca_key.exists():
        there, missing = files.ca, files.ca_key
        if files.ca_key.exists():
            there, missing = missing, there
        raise RunError(
            f"{folder}: found {there.name} without {missing.name}; put it back to sign with the "
            "authority that devices know, or name a new folder"
        )
    if files.ca.exists():
        authority, authority_key = _read_authority(files)
    else:
        authority, authority_key = _new_authority(files, now)
    end = now + datetime.timedelta(days=days)
    if end > authority.not_valid_after_utc:
        raise RunError(
            f"{files.ca}: this authority ends on {authority.not_valid_after_utc:%Y-%m-%d}, before "
            f"a certificate of {days} days would; name fewer days, or make a new authority in "
            "another folder and give its ca.crt to every device"
        )
    key = ec.generate_private_key(ec.SECP384R1())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(_name((hosts or LOOPBACK)[0][:64]))
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLIER)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()),
            critical=False,
        )
        .sign(authority_key, hashes.SHA384())
    )
    write_atomic(files.server_key, _pem(key), mode=0o600)
    write_atomic(files.server, certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)
    return files


def _new_authority(
    files: Certificates, now: datetime.datetime
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP384R1())
    name = _name("fedlora federation")
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLIER)
        .not_valid_after(now + datetime.timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    write_atomic(files.ca_key, _pem(key), mode=0o600)
    write_atomic(files.ca, certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)
    return certificate, key


def _read_authority(files: Certificates) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    try:
        certificate = x509.load_pem_x509_certificate(files.ca.read_bytes())
        key = serialization.load_pem_private_key(files.ca_key.read_bytes(), None)
    except (ValueError, TypeError) as error:
        raise RunError(f"{files.ca}: the authority cannot be read: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise RunError(f"{files.ca_key}: expected an EC key, found {type(key).__name__}")
    if key.public_key() != certificate.public_key():
        raise RunError(f"{files.ca_key}: expected the key of {files.ca.name}, found another one")
    return certificate, key


def _alternative_names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    names: list[x509.GeneralName] = []
    for host in hosts:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            label = r"[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
            if len(host) > 253 or not re.fullmatch(rf"(\*\.)?{label}(\.{label})*", host):
                raise ConfigError(
                    f"--host {host}: expected a name such as fl.example.org or an address, without "
                    "a scheme, a port or a path"
                ) from None
            names.append(x509.DNSName(host))
    return names


def _usage(**allowed: bool) -> x509.KeyUsage:
    words = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment",
        "key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(**{word: allowed.get(word, False) for word in words})


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
