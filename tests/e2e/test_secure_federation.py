"""Secure sums over a real SuperLink: TLS, node keys that sign, nodes with and without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedlora.federation import read_rounds
from fedlora.federation.deploy.folder import Federation
from fedlora.privacy.secure.quantize import Quantizer
from fedlora.simulation import simulate
from tests.e2e import test_federation as e2e
from tests.e2e.test_federation import (
    NODES,
    PLAIN_SGD,
    SETTINGS,
    adapter_of,
    apart,
    bring_up,
    leftovers,
    node_store,
    wait_until,
)
from tests.e2e.test_federation import device as device  # fixtures
from tests.e2e.test_federation import one_thread as one_thread
from tests.e2e.test_without_torch import wheel as wheel

pytestmark = e2e.pytestmark
RANGE = 1.0
SECURE: dict[str, Any] = {
    "federation.weights": "equal",
    "secure_aggregation.clipping_range": RANGE,
}


def test_devices_add_up_what_the_simulation_adds_up(device: Path, tmp_path: Path) -> None:
    folder = tmp_path / "fed"
    result = bring_up(folder, PLAIN_SGD | SECURE, device)
    assert (result["rounds"], result["clients"], result["dropped"]) == (3, NODES, 0)
    run = simulate("watch", overrides=SETTINGS | PLAIN_SGD | SECURE, out=tmp_path / "simulated")
    difference = apart(adapter_of(folder), run.adapter)
    print("secure sums, two nodes in ONNX Runtime and one in torch: factors differ by", difference)
    # As without the sums, and each round may fall on the other side of a level.
    assert difference <= 1e-5 + 3 * 2 * Quantizer(32, RANGE, NODES).step
    records = read_rounds(folder / "out")
    for record in records:
        assert record.dropped == ()
        assert record.loss is None
        print({name: dict(phase) for name, phase in record.secure.items()}, dict(record.phases))
        assert [phase["clients"] for phase in record.secure.values()] == [NODES] * 5
    for node in Federation.read(folder).nodes:
        # People personalize all the same, and nothing of it is told.
        assert node_store(folder, node.number).status().commits == 1
        # No secret of a round was ever on the disk.
        written = [p for p in (folder / "nodes").rglob("*") if p.is_file()]
        assert not any(b"mask_secret" in p.read_bytes() for p in written)
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert summary["privacy"]["mechanism"] is None
    assert summary["privacy"]["secure_aggregation"] is True
    wait_until(lambda: leftovers(Federation.read(folder)) == [])
