"""The benchmark of a deployed federation adds up, and a device's process stays cheap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from simulations.bench.federation import (
    MARKS,
    PARTS,
    _parts_of_rounds,
    export_bundle,
    federation_table,
    measure,
)


def client(round: int, begin: float, node: int, slow: float = 1.0) -> dict[str, Any]:
    """One client process whose marks are `slow` seconds apart, its CPU time half of that."""
    marks = {
        mark: (begin + slow * number, max(0.0, slow * (number - 1) / 2))
        for number, mark in enumerate(MARKS)
    }
    return {
        "round": str(round), "kind": "train" if round else "query", "node": node, **marks,
        "ended": (begin + 6 * slow, 3 * slow),
    }  # fmt: skip


def test_a_round_is_told_by_the_client_that_answers_last_and_its_parts_add_up() -> None:
    clients = [
        client(0, 0.0, 0), client(1, 10.0, 0), client(1, 10.0, 1, slow=2.0), client(2, 23.0, 0),
        client(2, 23.0, 1),
    ]  # fmt: skip
    (parts,) = _parts_of_rounds(clients, 2)  # nothing says when the second one's answers came back
    assert parts == {
        "waits": 2.0, "starts": 2.0, "imports": 2.0, "opens": 2.0, "trains": 2.0, "returns": 3.0,
    }  # fmt: skip
    assert sum(parts.values()) == 23.0 - 10.0


def test_a_client_that_failed_in_the_middle_tells_no_round() -> None:
    broken = {key: value for key, value in client(1, 0.0, 0).items() if key != "answered"}
    assert _parts_of_rounds([broken, client(2, 9.0, 0)], 2) == []


def test_the_first_round_is_left_out_of_the_table() -> None:
    clients = [client(number, 10.0 * number, 0) for number in range(4)]
    phases = dict.fromkeys(("prepare", "send", "wait", "aggregate", "save"), 0.5)
    result = {
        "side": "fedlora", "nodes": 1, "seconds": [99.0, 8.0, 9.0], "clients": clients,
        "rounds": _parts_of_rounds(clients, 3), "phases": [phases] * 3, "busy_cores": 1.5,
    }  # fmt: skip
    rounds, processes, server = federation_table([result]).split("\n\n")
    assert "| fedlora's start of a SuperNode | 8.50 (8.00–9.00) | 1.00 (1.00–1.00) |" in rounds
    assert rounds.endswith(" | 5.00 (5.00–5.00) | 1.5 |")
    assert "| first | 2.00 (2.00–2.00) | 1.00 (1.00–1.00) |" in processes
    assert server.count("0.500") == 0
    assert server.count("0.5 (0.5–0.5)") == 5
    assert len(PARTS) == len(MARKS)


@pytest.mark.slow
def test_a_round_of_three_devices_takes_no_new_imports(tmp_path: Path) -> None:
    export_bundle(tmp_path / "bundle")
    result = measure("fedlora", tmp_path / "bundle", tmp_path / "work", 3, 3)
    assert result["statuses"] == ["updated"] * 3
    trained = [c for c in result["clients"] if c["kind"] == "train"]
    assert sorted((c["round"], c["node"]) for c in trained) == [
        (str(number), node) for number in (1, 2, 3) for node in (0, 1, 2)
    ]
    # Processor time of a whole client process: measured 0.5 s, against 3 s with all its imports.
    assert max(c["ended"][1] for c in result["clients"]) < 1.5
