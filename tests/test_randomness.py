"""Keyed randomness: one stream for one key."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np

from fedlora.randomness import rng


def test_same_words_give_the_same_numbers_in_any_order():
    first = rng(3, "batches", "c1", 2).integers(2**62, size=4).tolist()
    rng(3, "other").integers(9)
    assert rng(3, "batches", "c1", 2).integers(2**62, size=4).tolist() == first


def test_keys_that_look_alike_give_different_numbers():
    keys = [(0,), (1,), (0, "a"), (0, "ab", "c"), (0, "a", "bc"), (0, "a", 1), (0, "a", "1"),
            (0, "a;int:1:1"), (0, ""), (0, "", ""), (-1,), (0, "1:a")]  # fmt: skip
    drawn = [rng(*key).integers(2**62, size=2).tolist() for key in keys]
    assert all(a != b for a, b in itertools.combinations(drawn, 2))


def test_stream_is_the_published_one():
    # Adapters in the field were started from these numbers.
    assert rng(0, "init", "layer").integers(1000, size=3).tolist() == [613, 986, 619]


def test_the_key_is_the_first_half_of_the_digest() -> None:
    text = "int:1:7;str:7:batches;str:2:c1;int:1:3;"
    key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
    plain = np.random.Generator(np.random.Philox(key=key))
    mine = rng(7, "batches", "c1", 3)
    np.testing.assert_array_equal(mine.permutation(1000), plain.permutation(1000))
    np.testing.assert_array_equal(mine.normal(size=9), plain.normal(size=9))
