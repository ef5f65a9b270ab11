"""Who is whose neighbor, and how few neighbors are enough.

The clients sit on a ring in an order that follows from the names of the run and the round alone;
each has the k / 2 nearest ones on both sides as neighbors (the Harary graph of arXiv:2007.06210,
section 3.1). A client shares masks with its neighbors, and its secrets among its neighbors and
itself: k + 1 holders, any t of whom open one. All neighborhoods are uniform draws of k from the
other n - 1 clients, so what can go wrong has hypergeometric tails H(draws; marked; at least x).
With a share of `DROPOUTS` of all clients lost at random and one of `COLLUDING` on the server's
side, each of these stays below `FAILURE`, by the union over the n clients:

*lost*  A client keeps fewer than t holders: the round is given up, nothing is revealed.
    n * P[surviving neighbors < t]
*both*  A server that lies about who is left gets both secrets of a client. An honest holder
    reveals one, a colluding one both: it takes 2 t <= (k + 1) + c with c colluding neighbors.
    n * H(k; colluding; 2 t - (k + 1))
*apart*  The honest clients that are left fall into groups without masks between them, so that the
    server sees a sum a group. On the ring that takes a gap of k / 2 consecutive clients, lost or
    colluding. The client at a gap's edge has k / 2 + 1 holders on its own side at most, and those
    across must collude to open its mask, *whichever* clients the server calls lost, as long as
    it tells all the same. 2 n * H(k / 2; colluding; t - (k / 2 + 1))

t is the smallest that keeps the last two; a graph in which the first fails then is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from functools import lru_cache

from fedlora.errors import SecureTermsError

__all__ = [
    "COLLUDING",
    "DROPOUTS",
    "FAILURE",
    "Odds",
    "fewest_neighbors",
    "odds",
    "ring_neighbors",
    "share_threshold",
    "tail",
]

DROPOUTS = 0.3
COLLUDING = 0.05
FAILURE = 2.0**-20


@dataclass(frozen=True, slots=True)
class Odds:
    """The most probable each failure of a graph is; see the module."""

    lost: float
    both: float
    apart: float


@lru_cache(maxsize=16)
def _ring(run: str, round: int, clients: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the clients in the ring's order, and every client's place in it."""
    # Digests rather than a generator's permutation: devices run different versions of NumPy.
    name = f"fedlora secure aggregation ring\n{round}\n{json.dumps(run)}\n".encode()
    order = sorted(
        range(clients), key=lambda client: hashlib.sha256(name + str(client).encode()).digest()
    )
    places = [0] * clients
    for place, client in enumerate(order):
        places[client] = place
    return tuple(order), tuple(places)


def ring_neighbors(run: str, round: int, clients: int, neighbors: int, index: int) -> list[int]:
    """Return the `neighbors` (even) clients nearest to one on the ring, sorted."""
    order, places = _ring(run, round, clients)
    here = places[index]
    half = neighbors // 2
    return sorted(
        order[(here + distance) % clients] for distance in range(-half, half + 1) if distance
    )


def tail(everyone: int, marked: int, draws: int, least: int) -> float:
    """Return the probability of `least` or more marked ones among draws without replacement.

    >>> tail(10, 5, 2, 2) == 5 / 10 * 4 / 9
    True
    """
    ways = sum(
        math.comb(marked, found) * math.comb(everyone - marked, draws - found)
        for found in range(max(least, 0), min(marked, draws) + 1)
    )
    return ways / math.comb(everyone, draws)  # whole numbers: the quotient is rounded once


def odds(clients: int, neighbors: int, threshold: int) -> Odds:
    """Return how probable the failures are with `threshold` of ``neighbors + 1`` shares."""
    others = clients - 1
    lost = math.ceil(DROPOUTS * clients)
    colluding = math.ceil(COLLUDING * clients)
    half = neighbors // 2
    return Odds(
        # Fewer than t of k survive: k - t + 1 or more are lost.
        lost=min(1.0, clients * tail(others, lost, neighbors, neighbors - threshold + 1)),
        both=min(1.0, clients * tail(others, colluding, neighbors, 2 * threshold - neighbors - 1)),
        apart=min(1.0, 2 * clients * tail(others, colluding, half, threshold - half - 1)),
    )


@lru_cache(maxsize=1024)
def _smallest(clients: int, neighbors: int) -> int | None:
    """Return the smallest threshold that keeps the secrets, where it keeps the round too."""
    low, high = neighbors // 2 + 1, neighbors + 1
    while low < high:  # all three are monotone in the threshold
        middle = (low + high) // 2
        found = odds(clients, neighbors, middle)
        if max(found.both, found.apart) <= FAILURE:
            high = middle
        else:
            low = middle + 1
    found = odds(clients, neighbors, low)
    return low if max(found.lost, found.both, found.apart) <= FAILURE else None


@lru_cache(maxsize=64)
def fewest_neighbors(clients: int) -> int | None:
    """Return the smallest even number of neighbors that is enough; None: everyone must be one."""
    low, high = 1, (clients - 1) // 2  # halves
    if high < 1 or _smallest(clients, 2 * high) is None:
        return None
    while low < high:
        middle = (low + high) // 2
        if _smallest(clients, 2 * middle) is None:
            low = middle + 1
        else:
            high = middle
    return 2 * low


def share_threshold(clients: int, neighbors: int) -> int:
    """Return how many of a client's ``neighbors + 1`` holders open one of its secrets.

    Raises `SecureTermsError` for a graph that is too sparse, and names the fewest that are enough.
    """
    found = _smallest(clients, neighbors)
    if found is None:
        fewest = fewest_neighbors(clients)
        raise SecureTermsError(
            f"neighbors: expected {'all of' if fewest is None else f'{fewest} or more for'} "
            f"{clients} clients, so that {DROPOUTS:.0%} may be lost and {COLLUDING:.0%} collude "
            f"with the server and it fails once in a million rounds at most, found {neighbors}; "
            "leave out neighbors for a complete graph"
        )
    return found
