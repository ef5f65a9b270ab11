"""The benchmark of the secure sum: it runs, and its bytes are what the formats say."""

from __future__ import annotations

import json

from simulations.bench.secure_sum import main


def test_bytes_of_a_client_are_those_of_the_formats(tmp_path, capsys):
    file = tmp_path / "found.json"
    main(["--clients", "6", "--size", "50", "--json", str(file)])
    found = json.loads(file.read_text(encoding="utf-8"))
    assert set(found) == {"everyone, 32 bits", "everyone, 32 bits, 30 % lost", "everyone, 64 bits"}
    case = found["everyone, 32 bits"]
    # Keys and commitment; 158 for each of 6 holders; 50 numbers and the count; 32 for each of 5
    # neighbors; 34 for each owner.
    assert case["up"] == {
        "keys": 138, "shares": 6 * 158, "masked": 51 * 4, "agree": 5 * 32, "unmask": 6 * 34,
    }  # fmt: skip
    assert case["down"]["shares"] == 6 * 138
    assert case["plain_bytes"] == 200
    assert all(row["error_in_steps"] < row["bound_in_steps"] for row in found.values())
    assert capsys.readouterr().out.count("| everyone, 64 bits |") == 3
