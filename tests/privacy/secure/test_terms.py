"""Terms: what they refuse to promise."""

from __future__ import annotations

import json
import math

import pytest

from fedlora.errors import SecureTermsError
from fedlora.privacy.secure import Terms
from tests.matching import raises
from tests.privacy.secure.rounds import terms_of

WRONG = [
    ({"threshold": 5}, "threshold: expected more than half of 10"),
    ({"threshold": 0}, "threshold: expected more than half of 10"),
    ({"threshold": 11}, "no more than all, found 11"),
    ({"clients": 1, "threshold": 1}, "the sum of one"),
    ({"clients": 20_000, "threshold": 20_000}, "clients: expected 2 to 10000"),
    ({"clients": True}, "clients: expected a whole number"),
    ({"round": -1}, "round: expected a whole number"),
    ({"round": 1.0}, "round: expected a whole number"),
    ({"size": 0}, "size: expected 1 to"),
    ({"size": 2**40}, "size: expected 1 to"),
    ({"bits": 16}, "bits: expected 32 or 64"),
    ({"clipping_range": 0.0}, "clipping_range: expected a finite number > 0"),
    ({"clipping_range": math.inf}, "clipping_range: expected a finite number > 0"),
    ({"clipping_range": math.nan}, "clipping_range: expected a finite number > 0"),
    ({"clipping_range": "1"}, "clipping_range: expected a finite number > 0"),
    ({"run": "x" * 1001}, "run: expected a name"),
    ({"run": 3}, "run: expected a name"),
    ({"neighbors": 3}, "neighbors: expected an even number >= 2, found 3"),
    ({"neighbors": 0}, "neighbors: expected an even number >= 2, found 0"),
    ({"neighbors": -2}, "neighbors: expected a whole number"),
    ({"neighbors": "2"}, "neighbors: expected a whole number"),
]


@pytest.mark.parametrize(("changes", "text"), WRONG, ids=[str(row[0])[:40] for row in WRONG])
def test_terms_that_promise_too_little_are_refused(changes, text):
    with raises(SecureTermsError, text):
        terms_of(**({"clients": 10} | changes))


def test_terms_survive_json_and_keep_their_digest():
    terms = terms_of(500, neighbors=400, clipping_range=0.1)
    again = Terms.from_plain(json.loads(json.dumps(terms.to_plain())))
    assert again == terms
    assert again.digest == terms.digest
    # A whole number as the range is the same as its float.
    assert terms_of(clipping_range=1).digest == terms_of(clipping_range=1.0).digest


def test_every_field_is_in_the_digest():
    base = terms_of(100)
    changes = {
        "run": "other", "round": 4, "size": 17, "clients": 99, "threshold": 53, "neighbors": 99,
        "bits": 64, "clipping_range": 1.0000000001,
    }  # fmt: skip
    assert set(changes) == set(base.to_plain())
    digests = {
        terms_of(**({"clients": 100} | {name: value})).digest for name, value in changes.items()
    }
    assert len(digests | {base.digest}) == len(changes) + 1


@pytest.mark.parametrize("change", [{"extra": 1}, None])
def test_fields_too_many_or_too_few_are_refused(change):
    plain = dict(terms_of().to_plain())
    plain = plain | change if change else {k: v for k, v in plain.items() if k != "bits"}
    with raises(SecureTermsError, "terms: expected"):
        Terms.from_plain(plain)


def test_as_many_neighbors_as_there_are_others_is_everyone():
    terms = terms_of(6, neighbors=50)
    assert terms.neighbors_of(2) == (0, 1, 3, 4, 5)
    assert terms.holders_of(2) == (0, 1, 2, 3, 4, 5)
    assert terms.share_threshold == terms.threshold == 4


@pytest.mark.parametrize("index", [-1, 5, 1.0, "0", True])
def test_a_client_that_is_none_of_the_cohort_is_refused(index):
    with raises(SecureTermsError, "index: expected a client's place, 0 to 4"):
        terms_of(5).neighbors_of(index)
