"""Cohorts and held-out clients depend on the seed, the round and the ids, and on nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from fedlora.federation.sampling import draw_cohort, draw_held_out

IDS = [f"c{i:02d}" for i in range(20)]


def test_a_fixed_cohort_has_its_size_without_repeats_in_sorted_order() -> None:
    cohort = draw_cohort(IDS, 7, 1, 0)
    assert len(cohort) == len(set(cohort)) == 7
    assert list(cohort) == sorted(cohort)


@pytest.mark.parametrize("sampling", ["fixed", "poisson"])
def test_the_order_in_which_clients_connect_changes_nothing(sampling: str) -> None:
    assert draw_cohort(IDS, 7, 3, 5, sampling) == draw_cohort(IDS[::-1], 7, 3, 5, sampling)  # type: ignore[arg-type]


def test_rounds_and_seeds_draw_different_cohorts() -> None:
    drawn = {draw_cohort(IDS, 7, round, seed) for round in range(1, 6) for seed in range(5)}
    assert len(drawn) == 25


def test_a_cohort_larger_than_the_population_is_everyone() -> None:
    assert draw_cohort(IDS, 99, 1, 0) == tuple(IDS)
    assert draw_cohort(IDS, 20, 1, 0) == tuple(IDS)


def test_fixed_sampling_draws_everyone_equally_often() -> None:
    counts = dict.fromkeys(IDS, 0)
    for round in range(2000):
        for client in draw_cohort(IDS, 5, round, 0):
            counts[client] += 1
    # Binomial(2000, 1/4): five standard deviations are 97.
    assert max(abs(count - 500) for count in counts.values()) < 97


def test_poisson_sampling_draws_each_one_independently_with_its_probability() -> None:
    sizes = np.array([len(draw_cohort(IDS, 5, round, 0, "poisson")) for round in range(2000)])
    # Binomial(20, 1/4): mean 5, variance 3.75; five standard errors of each.
    assert abs(sizes.mean() - 5) < 5 * np.sqrt(3.75 / 2000)
    assert abs(sizes.var() - 3.75) < 5 * 3.75 * np.sqrt(2 / 2000)
    assert sizes.min() == 0  # 0.75**20 of 2000 rounds: 6 are expected to be empty


def test_poisson_sampling_of_everyone_is_everyone() -> None:
    assert draw_cohort(IDS, 20, 1, 0, "poisson") == tuple(IDS)


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.2, 4), (0.12, 2), (0.13, 3), (0.99, 19)])
def test_held_out_clients_are_the_nearest_number_to_the_share(share: float, count: int) -> None:
    held_out = draw_held_out(IDS, share, 0)
    assert len(held_out) == count
    assert set(held_out) <= set(IDS)
    assert held_out == draw_held_out(IDS[::-1], share, 0)
    assert share == 0 or held_out != draw_held_out(IDS, share, 1)


def test_one_client_is_always_left_to_train() -> None:
    assert draw_held_out(["only"], 0.9, 0) == ()
    assert draw_held_out([], 0.9, 0) == ()


def test_copies_of_a_person_are_held_out_together() -> None:
    ids = [f"c{i}" for i in range(10)] + [f"c{i}#{k}" for i in range(10) for k in (2, 3)]
    held_out = draw_held_out(ids, 0.2, 0)
    people = {client_id.partition("#")[0] for client_id in held_out}
    assert len(people) == 2
    assert len(held_out) == 6
    assert not people & {i.partition("#")[0] for i in set(ids) - set(held_out)}
