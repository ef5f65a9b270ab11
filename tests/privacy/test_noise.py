"""The noise is normal, keyed, secret on the disk, and never the same for two things."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from fedlora.errors import RunError
from fedlora.privacy.noise import derive, fresh_key, make_key, normals, read_key, uniforms
from tests.matching import raises

KEY = bytes(range(32))
N = 200_000


def test_the_numbers_are_standard_normal() -> None:
    found = normals(derive(KEY, "test"), N)
    assert found.shape == (N,)
    assert found.dtype == np.float64
    # Fixed keys: these are no chances, but bounds that a right generator keeps for nearly all.
    assert stats.kstest(found, "norm").pvalue > 0.01
    # Standard errors of the first four moments are 1, 1.4, 2.4 and 4.9 over the root of N.
    root = N**0.5
    assert abs(found.mean()) < 4 / root
    assert abs(found.std() - 1) < 4 / root
    assert abs(stats.skew(found)) < 10 / root
    assert abs(stats.kurtosis(found)) < 20 / root
    # Tails: 2 in 1,000 numbers are beyond 3.09 standard deviations.
    assert 0.0016 < float(np.mean(np.abs(found) > 3.09)) < 0.0024
    # Neighbors in the row, and the two halves that share radii, do not follow one another.
    half = N // 2
    for one, other in ((found[1:], found[:-1]), (found[:half], found[half:])):
        for f in (np.asarray, np.abs):
            assert abs(np.corrcoef(f(one), f(other))[0, 1]) < 4 / half**0.5


def test_uniform_numbers_fill_their_interval() -> None:
    found = uniforms(derive(KEY, "u"), N)
    assert found.min() >= 0
    assert found.max() < 1
    assert stats.kstest(found, "uniform").pvalue > 0.01


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_any_number_of_them(count: int) -> None:
    assert normals(KEY, count).shape == (count,)
    assert uniforms(KEY, count).shape == (count,)


def test_the_same_key_gives_the_same_bits_and_another_independent_ones() -> None:
    one = normals(derive(KEY, "sum", 1, b"digest"), 10_000)
    assert np.array_equal(one, normals(derive(KEY, "sum", 1, b"digest"), 10_000))
    others = (
        derive(KEY, "sum", 2, b"digest"),
        derive(KEY, "sum", 1, b"digesu"),
        derive(KEY, "count", 1, b"digest"),
        derive(bytes(32), "sum", 1, b"digest"),
    )
    for other in others:
        # The standard error of a correlation of 10,000 pairs is 0.01.
        assert abs(np.corrcoef(one, normals(other, 10_000))[0, 1]) < 0.04


def test_no_two_lists_of_words_are_one() -> None:
    lists = [("a", 1), ("a", "1"), ("a1",), ("a", b"1"), ("ab", "c"), ("a", "bc"), ("a", "b;c")]
    assert len({derive(KEY, *words) for words in lists}) == len(lists)


def test_fresh_keys_differ() -> None:
    assert fresh_key() != fresh_key()
    assert len(fresh_key()) == 32


def test_a_key_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint" / "noise.key"
    key = make_key(path)
    assert read_key(path) == key
    if os.name == "posix":
        assert path.stat().st_mode & 0o777 == 0o600
    with raises(RunError, "the key of another run is not overwritten"):
        make_key(path)
    assert read_key(path) == key


def test_a_key_that_is_gone_short_or_open_to_others_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "noise.key"
    with raises(RunError, "released twice, with two noises"):
        read_key(path)
    path.write_bytes(bytes(31))
    with raises(RunError, "expected a key of 32 bytes, found 31"):
        read_key(path)
    path.write_bytes(bytes(32))
    path.chmod(0o644)
    if os.name == "posix":
        with raises(RunError, "found 0644"):
            read_key(path)
