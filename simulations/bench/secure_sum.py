"""What a secure sum costs beside plain sending: CPU seconds and bytes, phase by phase.

    python -m simulations.bench secure-sum [--clients 100] [--size 1000000] [--quick] [--json FILE]

Everyone runs in this process, without messages: bytes are those of the values that are sent, and
four for each client's index in a list. Each client sends its numbers plainly as well, right before
it masks them, so both sides meet the same machine. "lost" clients are those whose masked vector
does not arrive, which is what costs the server most. Every sum is checked against the plain one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from fedlora.privacy.secure import ClientSession, ServerSession, Terms
from fedlora.privacy.secure.graph import fewest_neighbors
from simulations.bench.spent import spent
from simulations.bench.tables import spread, table

Vector = npt.NDArray[np.float64]
PHASES = ("keys", "shares", "masked", "agree", "unmask")
INDEX_BYTES = 4
MEGABYTE = 1e6


@dataclass
class Costs:
    """CPU seconds of every client and of the server, and bytes of every client, by phase."""

    client: dict[str, list[float]] = field(default_factory=lambda: {p: [] for p in PHASES})
    server: dict[str, float] = field(default_factory=lambda: dict.fromkeys((*PHASES, "total"), 0.0))
    up: dict[str, list[int]] = field(default_factory=lambda: {p: [] for p in PHASES})
    down: dict[str, list[int]] = field(default_factory=lambda: {p: [] for p in PHASES})
    plain_client: list[float] = field(default_factory=list)
    plain_server: float = 0.0
    plain_bytes: int = 0
    error: float = 0.0  # the largest of the sum's numbers, in steps
    bound: float = 0.0  # what it may be, in steps

    def sent(self, phase: str, up: int, down: int) -> None:
        """Count what one client sends and receives."""
        self.up[phase].append(up)
        self.down[phase].append(down)


def run_round(terms: Terms, lost: int) -> Costs:
    """Run one round in which the last `lost` clients send no vector."""
    costs = Costs()
    server = ServerSession(terms)
    clients: dict[int, ClientSession] = {}
    for index in range(terms.clients):
        with spent() as work:
            clients[index], advertisement = ClientSession.begin(terms, index)
        costs.client["keys"].append(work.cpu)
        with spent() as work:
            server.add_advertisement(index, advertisement)
        costs.server["keys"] += work.cpu
        costs.sent("keys", len(advertisement.to_bytes()), 0)
    for index, session in clients.items():
        with spent() as work:
            directory = server.directory_for(index)
        costs.server["shares"] += work.cpu
        with spent() as work:
            shares = session.share(directory)
        costs.client["shares"].append(work.cpu)
        with spent() as work:
            server.add_shares(index, shares)
        costs.server["shares"] += work.cpu
        down = sum(len(other.to_bytes()) for other in directory.values())
        costs.sent("shares", sum(map(len, shares.values())), down)
    plain = _mask(terms, server, clients, lost, costs)
    lists = server.survivors, server.dropouts
    for index in server.survivors:
        with spent() as work:
            tags = clients[index].agree(*lists)
        costs.client["agree"].append(work.cpu)
        with spent() as work:
            server.add_agreement(index, tags)
        costs.server["agree"] += work.cpu
        costs.sent("agree", sum(map(len, tags.values())), INDEX_BYTES * terms.clients)
    for index in server.survivors:
        with spent() as work:
            received = server.tags_for(index)
        costs.server["unmask"] += work.cpu
        with spent() as work:
            revealed = clients[index].reveal(received)
        costs.client["unmask"].append(work.cpu)
        with spent() as work:
            server.add_reveal(index, revealed)
        costs.server["unmask"] += work.cpu
        down = sum(map(len, received.values()))
        costs.sent("unmask", sum(map(len, revealed.values())), down)
    with spent() as work:
        total = server.total()
    costs.server["total"] = work.cpu
    step = terms.quantizer.step
    costs.error = float(np.abs(total.sum - plain).max()) / step
    costs.bound = terms.quantizer.error_bound(total.count) / step
    # Float64's own rounding of either sum is far below a step of 32 bits, and not of 64.
    if costs.error * step > costs.bound * step + 1e-12 * total.count:
        raise SystemExit(f"wrong sum: off by {costs.error:.3g} steps, allowed {costs.bound:.3g}")
    return costs


def _mask(
    terms: Terms,
    server: ServerSession,
    clients: dict[int, ClientSession],
    lost: int,
    costs: Costs,
) -> Vector:
    """Send vectors plainly and masked; return the plain sum of those that arrive."""
    sharing = server.survivors_of_sharing
    plain = np.zeros(terms.size)
    for index in range(terms.clients - lost):
        draws = np.random.default_rng(index)
        row = draws.uniform(-1, 1, terms.size).astype(np.float32)
        with spent() as work:
            sent = row.tobytes()
        costs.plain_client.append(work.cpu)
        costs.plain_bytes = len(sent)
        with spent() as work:
            plain += np.frombuffer(sent, np.float32)
        costs.plain_server += work.cpu
        with spent() as work:
            shares = server.shares_for(index)
        costs.server["masked"] += work.cpu
        with spent() as work:
            masked = clients[index].mask(row.astype(np.float64), shares, sharing, draws)
        costs.client["masked"].append(work.cpu)
        with spent() as work:
            server.add_masked(index, masked)
        costs.server["masked"] += work.cpu
        down = sum(map(len, shares.values())) + INDEX_BYTES * len(sharing)
        costs.sent("masked", masked.nbytes, down)
    return plain


def measure(clients: int, size: int) -> dict[str, dict[str, Any]]:
    """Return each case's figures."""
    sparse = fewest_neighbors(clients)
    third = int(0.3 * clients)
    cases: dict[str, tuple[int | None, int, int]] = {
        "everyone, 32 bits": (None, 32, 0),
        "everyone, 32 bits, 30 % lost": (None, 32, third),
        "everyone, 64 bits": (None, 64, 0),
    }
    if sparse is not None:
        cases[f"{sparse} neighbors, 32 bits"] = (sparse, 32, 0)
        cases[f"{sparse} neighbors, 32 bits, 30 % lost"] = (sparse, 32, third)
    found = {}
    for name, (neighbors, bits, lost) in cases.items():
        threshold = int(0.6 * clients) + 1
        terms = Terms("bench", 1, size, clients, threshold, neighbors, bits, 1.0)
        found[name] = _figures(run_round(terms, lost))
    return found


def _figures(costs: Costs) -> dict[str, Any]:
    return {
        "client_cpu": costs.client,
        "server_cpu": costs.server,
        "up": {phase: median(sizes) for phase, sizes in costs.up.items()},
        "down": {phase: median(sizes) for phase, sizes in costs.down.items()},
        "plain_client_cpu": costs.plain_client,
        "plain_server_cpu": costs.plain_server,
        "plain_bytes": costs.plain_bytes,
        "error_in_steps": costs.error,
        "bound_in_steps": costs.bound,
    }


def client_table(found: dict[str, dict[str, Any]]) -> str:
    """CPU milliseconds of one client by phase: median, lowest and highest of all clients."""
    rows = []
    for name, case in found.items():
        by_phase = [case["client_cpu"][phase] for phase in PHASES]
        everything = sum(median(times) for times in by_phase)
        plain = case["plain_client_cpu"]
        rows.append(
            [
                name,
                *(spread(_milliseconds(times)) for times in by_phase),
                f"{1e3 * everything:.0f}",
                spread(_milliseconds(plain)),
            ]
        )
    return table(("a client's CPU ms", *PHASES, "all", "plain"), rows)


def server_table(found: dict[str, dict[str, Any]]) -> str:
    """CPU seconds of the server for the whole round."""
    rows = []
    for name, case in found.items():
        times = case["server_cpu"]
        rows.append(
            [
                name,
                *(f"{seconds:.2f}" for seconds in times.values()),
                f"{sum(times.values()):.2f}",
                f"{case['plain_server_cpu']:.2f}",
                f"{case['error_in_steps']:.1f} of {case['bound_in_steps']:.0f}",
            ]
        )
    header = ("the server's CPU s", *PHASES, "taking off masks", "all", "plain", "error, steps")
    return table(header, rows)


def bytes_table(found: dict[str, dict[str, Any]]) -> str:
    """Bytes of one client; the model that goes down to train on is the same on both sides."""
    rows = []
    for name, case in found.items():
        up, down = (case[way] for way in ("up", "down"))
        beside = sum(up.values()) - up["masked"] + sum(down.values())
        more = (sum(up.values()) + sum(down.values())) / case["plain_bytes"] - 1
        rows.append(
            [
                name,
                *(f"{up[phase]:,.0f}" for phase in PHASES),
                *(f"{down[phase]:,.0f}" for phase in PHASES[1:]),
                f"{beside / MEGABYTE:.3f}",
                f"{case['plain_bytes']:,}",
                f"{more:+.1%}",
            ]
        )
    header = (
        "a client's bytes", *(f"{phase} up" for phase in PHASES),
        *(f"{phase} down" for phase in PHASES[1:]), "beside the vector, MB", "plain up", "more",
    )  # fmt: skip
    return table(header, rows)


def _milliseconds(seconds: Sequence[float]) -> list[float]:
    return [1e3 * value for value in seconds]


def main(arguments: list[str] | None = None) -> None:
    """Measure and print three tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--size", type=int, default=1_000_000)
    parser.add_argument("--quick", action="store_true", help="20 clients of 20,000 numbers")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    clients, size = (20, 20_000) if options.quick else (options.clients, options.size)
    found = measure(clients, size)
    print(f"{clients} clients, {size:,} numbers each\n")
    print("\n\n".join(show(found) for show in (client_table, server_table, bytes_table)))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
