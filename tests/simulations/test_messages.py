"""Thousands of clients in one round: right, with the bad ones named, and at a flat cost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, Message, RecordDict

from fedlora.federation import read_checkpoint, read_rounds, run_federation
from fedlora.federation.tasks import read_task
from fedlora.flat import pack, segments_of
from simulations.bench.messages import PreparedGrid, experiment, start_adapter

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = 2000


class SomeAreBad(PreparedGrid):
    """Client 7 sends a NaN, 70 lies about its layout, 700 sends other numbers than it digested."""

    def answer_train(self, message: Message) -> RecordDict:
        content = super().answer_train(message)
        number = message.metadata.dst_node_id - 1000
        array: Any = content["factors"]["factors"]
        if number == 7:
            row = self.rows[number % len(self.rows)].copy()
            row[5] = np.nan
            form = read_task(message.content).reply.buffer
            content["factors"]["factors"] = form.array(row)
            content["layout"]["digest"] = form.digest(form.array(row).data)
        elif number == 70:
            content["layout"]["segments"] = ["block.0.fc|A|1x64"]
        elif number == 700:
            content["factors"]["factors"] = Array(
                np.frombuffer(array.data, np.float32, -1, 128) * 2
            )
        return content


def test_two_thousand_clients_make_the_weighted_mean_and_the_bad_ones_are_named(
    tmp_path: Path,
) -> None:
    config = experiment(CLIENTS)
    start = start_adapter(config)
    rows = np.random.default_rng(0).normal(size=(CLIENTS, start.num_parameters))
    rows = rows.astype(np.float32)
    state = run_federation(SomeAreBad(CLIENTS, rows), config, tmp_path, initial=start)
    (record,) = read_rounds(tmp_path)
    assert sorted((d.client, d.reason) for d in record.dropped) == [
        (
            "c7",
            "client 'c7': A: expected finite numbers, found nan at (0, 5) and 0 more",
        ),
        (
            "c70",
            "client 'c70', layer 'block.0.fc': lora_A is (1, 64), the other side has (8, 64)",
        ),
        (
            "c700",
            "client 'c700': the factors are not those that their digest was made of",
        ),
    ]
    weights = np.array([10 + i % 50 for i in range(CLIENTS)], float)
    weights[[7, 70, 700]] = 0
    expected = weights @ rows.astype(np.float64) / weights.sum()
    for adapter in (state.adapter, read_checkpoint(tmp_path).state.adapter):
        found = pack(adapter, segments_of(adapter, {"A", "B"}))
        # One rounding to float32 of numbers of order 0.1; both sums are in float64.
        np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9)
    clients = {c.client_id: c for c in read_checkpoint(tmp_path).clients}
    assert sum(client.rounds for client in clients.values()) == CLIENTS - 3
    assert (clients["c7"].rounds, clients["c8"].rounds) == (0, 1)
    assert len(record.cohort) == CLIENTS


def measured(clients: int) -> dict[str, float]:
    """The benchmark's figures, from a process of its own."""
    command = [sys.executable, "-m", "simulations.bench.messages", "--here", "--clients"]
    done = subprocess.run(
        [*command, str(clients)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    figures: dict[str, float] = json.loads(done.stdout)[0]
    return figures


@pytest.mark.slow
def test_a_hundred_thousand_clients_fit_and_cost_no_more_each_than_five_thousand() -> None:
    few, many = measured(5_000), measured(100_000)
    assert many["extra_mb"] < 250
    # Flower's own objects are timed beside, so that a slow or busy machine asks for no more. The
    # whole is two to three and a half times as much; with one quadratic step it was over ten.
    assert many["ms"] < 6 * many["flower"]
    assert many["ms"] / many["flower"] < 2 * few["ms"] / few["flower"]
