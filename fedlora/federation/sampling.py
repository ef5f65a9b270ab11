"""Who takes part: the held-out clients of a run and the cohort of a round. NumPy only.

Both are drawn over sorted client ids with keyed randomness, so that they do not depend on the
engine, on the order in which clients connect, or on a resume.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

from fedlora.randomness import rng

__all__ = ["draw_cohort", "draw_held_out"]


def draw_held_out(client_ids: Collection[str], share: float, seed: int) -> tuple[str, ...]:
    """Return the sorted ids of the clients that are never sampled, the nearest number to `share`.

    At least one client is left to train. Copies of a person ("u7", "u7#2") stay together: who is
    held out must not train under another id. The share is then of the persons.
    """
    people = sorted({client_id.partition("#")[0] for client_id in client_ids})
    count = min(int(share * len(people) + 0.5), len(people) - 1) if people else 0
    chosen = {people[i] for i in rng(seed, "held-out").permutation(len(people))[:count]}
    return tuple(sorted(i for i in client_ids if i.partition("#")[0] in chosen))


def draw_cohort(
    client_ids: Collection[str],
    size: int,
    round: int,
    seed: int,
    sampling: Literal["fixed", "poisson"] = "fixed",
    again: int = 0,
) -> tuple[str, ...]:
    """Return the sorted ids of one round's cohort.

    fixed: `size` of them (all, if there are fewer), uniformly without replacement. poisson: each
    one independently with probability ``size / len(client_ids)``, so that the number varies and
    may be 0. again: how many cohorts of this round have declined; the next one is another.
    """
    ids: Sequence[str] = sorted(client_ids)
    generator = rng(seed, "cohort", round, *(("again", again) if again else ()))
    if sampling == "poisson":
        drawn = generator.random(len(ids)) < size / max(len(ids), 1)
        return tuple(client_id for client_id, taken in zip(ids, drawn, strict=True) if taken)
    chosen = generator.choice(len(ids), min(size, len(ids)), replace=False)
    return tuple(sorted(ids[index] for index in chosen))
