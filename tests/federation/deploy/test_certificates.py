"""The authority and the server's certificate: their fields, their files, and what is refused."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from fedlora.errors import ConfigError, RunError
from fedlora.federation.deploy.certificates import Certificates, make_certificates
from tests.matching import raises

NOW = datetime.datetime(2030, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)


def read(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_the_authority_signs_certificates_and_nothing_else(tmp_path: Path) -> None:
    files = make_certificates(tmp_path / "certs", now=NOW)
    ca = read(files.ca)
    constraints = ca.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert (constraints.value.ca, constraints.value.path_length) == (True, 0)
    usage = ca.extensions.get_extension_for_class(x509.KeyUsage).value
    assert (usage.key_cert_sign, usage.crl_sign, usage.digital_signature) == (True, True, False)
    assert ca.not_valid_after_utc == NOW + datetime.timedelta(days=3650)
    assert ca.issuer == ca.subject


def test_the_servers_certificate_is_for_its_names_and_for_servers_only(tmp_path: Path) -> None:
    files = make_certificates(tmp_path, ["fl.example.org", "192.0.2.7"], days=30, now=NOW)
    server, ca = read(files.server), read(files.ca)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fl.example.org", "localhost"]
    assert names.get_values_for_type(x509.IPAddress) == [
        ipaddress.ip_address("192.0.2.7"), ipaddress.ip_address("127.0.0.1"),
    ]  # fmt: skip
    assert list(server.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [
        ExtendedKeyUsageOID.SERVER_AUTH
    ]
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert server.not_valid_before_utc == NOW - datetime.timedelta(minutes=5)
    assert server.not_valid_after_utc == NOW + datetime.timedelta(days=30)
    server.verify_directly_issued_by(ca)


def test_keys_are_the_owners_alone(tmp_path: Path) -> None:
    files = make_certificates(tmp_path)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"ca.crt": 0o644, "ca.key": 0o600, "server.crt": 0o644, "server.key": 0o600}
    assert files == Certificates.of(tmp_path)


def test_a_renewal_keeps_the_authority(tmp_path: Path) -> None:
    files = make_certificates(tmp_path)
    authority, first = files.ca.read_bytes(), read(files.server)
    make_certificates(tmp_path, ["new.example.org"])
    assert files.ca.read_bytes() == authority
    second = read(files.server)
    assert second.serial_number != first.serial_number
    second.verify_directly_issued_by(read(files.ca))


def test_a_tls_connection_is_trusted_by_name(tmp_path: Path) -> None:
    files = make_certificates(tmp_path / "one")
    other = make_certificates(tmp_path / "other")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.server, files.server_key)
    for ca, name, works in (
        (files.ca, "localhost", True),
        (files.ca, "127.0.0.1", True),
        (files.ca, "fl.example.org", False),
        (other.ca, "localhost", False),
    ):
        assert handshake(context, ca, name) is works


def handshake(server: ssl.SSLContext, ca: Path, name: str) -> bool:
    left, right = socket.socketpair()

    def serve() -> None:
        try:
            server.wrap_socket(left, server_side=True).close()
        except OSError:
            left.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        context = ssl.create_default_context(cafile=str(ca))
        context.wrap_socket(right, server_hostname=name).close()
        return True
    except ssl.SSLCertVerificationError:
        return False
    finally:
        right.close()
        thread.join()


@pytest.mark.parametrize(
    "host", ["https://fl.example.org", "fl.example.org:443", "a b", "-x.org", "", "x/y", "x..y"]
)
def test_what_is_no_host_is_refused(host: str, tmp_path: Path) -> None:
    with raises(ConfigError, f"--host {host}: expected a name such as fl.example.org"):
        make_certificates(tmp_path / "certs", [host])
    assert not (tmp_path / "certs").exists()


def test_half_an_authority_is_refused(tmp_path: Path) -> None:
    files = make_certificates(tmp_path)
    files.ca_key.unlink()
    with raises(RunError, "found ca.crt without ca.key"):
        make_certificates(tmp_path)


def test_another_authoritys_key_is_refused(tmp_path: Path) -> None:
    files, other = make_certificates(tmp_path / "a"), make_certificates(tmp_path / "b")
    files.ca_key.write_bytes(other.ca_key.read_bytes())
    with raises(RunError, "expected the key of ca.crt, found another one"):
        make_certificates(tmp_path / "a")


def test_a_certificate_does_not_outlive_its_authority(tmp_path: Path) -> None:
    make_certificates(tmp_path, now=NOW)
    later = NOW + datetime.timedelta(days=3600)
    with raises(RunError, "this authority ends on 2039-12-31, before a certificate of 397 days"):
        make_certificates(tmp_path, now=later)
    with raises(ConfigError, "expected at least 1 day"):
        make_certificates(tmp_path, days=0)
