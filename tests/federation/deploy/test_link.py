"""Registration of a device: why it was not, in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.errors import FederationError
from fedlora.federation.deploy import link
from fedlora.federation.deploy.folder import Federation, Link
from fedlora.federation.deploy.keys import make_node_key
from tests.matching import raises


class Printed:
    """Flower's command, which prints the same whatever it is asked."""

    def __init__(self, output: str) -> None:
        self.output = output

    def flwr(self, *words: str) -> str:
        return self.output


@pytest.mark.parametrize(
    ("up", "output", "said"),
    [
        (False, '{\n  "success": false\n}\n', "no SuperLink answers at 127.0.0.1:8000"),
        (True, "[code: 2003] Public key already in use.\n", "Public key already in use."),
        (True, "some other failure\n", "some other failure"),
    ],
)
def test_why_a_device_was_not_registered(
    up: bool, output: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    public = make_node_key(tmp_path / "node")
    monkeypatch.setattr(link, "link_commands", lambda federation: Printed(output))
    monkeypatch.setattr(link, "answers", lambda address, ca: up)
    federation = Federation(tmp_path, link=Link("127.0.0.1", 8000))
    with raises(FederationError, "node.pub: not registered", said):
        link.register(federation, public)


def test_a_registered_device_has_the_id_of_its_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    public = make_node_key(tmp_path / "node")
    monkeypatch.setattr(link, "link_commands", lambda federation: Printed('{"node-id": "7"}'))
    assert link.register(Federation(tmp_path, link=Link("127.0.0.1", 8000)), public) == "7"
