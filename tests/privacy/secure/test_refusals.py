"""Attacks of a server, and of clients: each is refused by its name, and costs what it should."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fedlora.errors import (
    ForgedKeyError,
    PhaseOrderError,
    RevealError,
    SecureSumError,
    SecureTermsError,
    ShapeMismatchError,
    ShareError,
    ThresholdError,
)
from fedlora.privacy.secure import ClientSession, Identity, ServerSession
from fedlora.privacy.secure.agreement import tag_of
from fedlora.privacy.secure.keys import new_secret
from fedlora.privacy.secure.shares import KEY, SELF
from tests.matching import raises
from tests.privacy.secure.rounds import Round, assert_total, terms_of, vectors_of

DRAWS = np.random.default_rng(0)
TERMS = terms_of(5)
VECTOR = np.zeros(TERMS.size)
EVERYONE = range(5)


def after_keys(terms=TERMS):
    """(session of client 0, directory) after the first phase."""
    found = Round(terms).keys()
    return found.clients[0], found.server.directory()


def after_shares(terms=TERMS, **kind):
    """The round after the second phase."""
    return Round(terms, **kind).keys().shares()


def after_masked(terms=TERMS, lost=()):
    """The round after the third phase."""
    return after_shares(terms, lost={"masked": set(lost)}).masked(vectors_of(terms))


# The directory ---------------------------------------------------------------------------------


def other_terms(directory):
    directory[2] = ClientSession.begin(terms_of(5, round=4), 2)[1]


def anothers_keys(directory):
    directory[2] = directory[3]


def renamed_keys(directory):
    directory[2] = replace(directory[3], index=2)


def own_keys_back(directory):
    directory[2] = replace(directory[0], index=2)


def own_replaced(directory):
    directory[0] = ClientSession.begin(TERMS, 0)[1]


def own_missing(directory):
    del directory[0]


def small_order(directory):
    directory[2] = replace(directory[2], share_key=bytes(32))


def one_key_twice(directory):
    directory[2] = replace(directory[2], share_key=directory[2].mask_key)


def too_many(directory):
    directory.update(dict.fromkeys(range(5, 20), directory[1]))


def too_few(directory):
    for index in (2, 3, 4):
        del directory[index]


DIRECTORIES = [
    (other_terms, SecureTermsError, "client 2: expected them made under the terms of round 3"),
    (anothers_keys, ForgedKeyError, "client 2: expected its own, found those of 3"),
    (renamed_keys, ForgedKeyError, "keys of its own for every client"),
    (own_keys_back, ForgedKeyError, "keys of its own for every client"),
    (own_replaced, ForgedKeyError, "keys that client 0 sent, found others"),
    (own_missing, ForgedKeyError, "keys that client 0 sent, found none"),
    (small_order, ForgedKeyError, "client 2", "small order"),
    (one_key_twice, ForgedKeyError, "client 2: expected two keys, found one twice"),
    (too_many, ForgedKeyError, "keys of 5 clients at most, found 20"),
    (too_few, ThresholdError, "3 or more holders", "found 2"),
]


@pytest.mark.parametrize("row", DIRECTORIES, ids=lambda row: row[0].__name__)
def test_a_directory_that_is_not_the_clients_own_keys_is_refused(row):
    change, error, *texts = row
    session, directory = after_keys()
    change(directory)
    with raises(error, *texts):
        session.share(directory)
    assert session.phase == "keys"


@pytest.fixture(scope="module")
def identities():
    return {i: Identity(ec.generate_private_key(ec.SECP256R1())) for i in EVERYONE}


@pytest.mark.parametrize("forger", ["server", "nobody", "neighbor"])
def test_keys_not_signed_by_a_trusted_identity_are_refused_by_server_and_clients(
    identities, forger
):
    found = Round(TERMS, identities=identities).keys()
    directory = found.server.directory()
    signers = {
        "server": Identity(ec.generate_private_key(ec.SECP256R1())),
        "nobody": None,
        "neighbor": identities[3],
    }
    forged = ClientSession.begin(TERMS, 2, signers[forger])[1]
    directory[2] = forged
    with raises(ForgedKeyError, "client 2: expected the signature of its identity"):
        found.clients[0].share(directory, found.known)
    with raises(ForgedKeyError, "client 2: expected the signature of its identity"):
        ServerSession(TERMS, found.known).add_advertisement(2, forged)


def test_an_invented_client_is_refused_where_identities_are_known(identities):
    found = Round(TERMS, identities=identities).keys()
    known = {i: who for i, who in found.known.items() if i != 4}
    with raises(ForgedKeyError, "client 4: expected an identity that this device trusts"):
        found.clients[0].share(found.server.directory(), known)
    with raises(ForgedKeyError, "client 4: expected an identity that is registered"):
        ServerSession(TERMS, known).add_advertisement(4, found.server.directory()[4])
    with raises(ForgedKeyError, "one twice"):
        one = Identity(ec.generate_private_key(ec.SECP256R1()))
        twins = dict.fromkeys(EVERYONE, one)
        twice = Round(TERMS, identities=twins).keys()
        twice.clients[0].share(twice.server.directory(), twice.known)


def test_a_replayed_advertisement_is_refused(identities):
    old = Round(terms_of(5, round=2), identities=identities).keys().server.directory()
    with raises(SecureTermsError, "client 1", "round 3"):
        ServerSession(TERMS, None).add_advertisement(1, old[1])


def test_a_client_cannot_take_the_keys_of_another():
    server = ServerSession(TERMS)
    ad = ClientSession.begin(TERMS, 1)[1]
    server.add_advertisement(1, ad)
    with raises(ForgedKeyError, "client 2", "one of client 1"):
        server.add_advertisement(2, replace(ad, index=2))


# The shares ------------------------------------------------------------------------------------


def replayed(messages, found):
    other = Round(TERMS).keys()
    other.clients[0] = found.clients[0]
    other.shares()
    messages[2] = other.server.shares_for(1)[2]


def for_another(messages, found):
    messages[2] = found.server.shares_for(3)[2]


def of_another(messages, found):
    messages[2] = messages[3]


def reflected(messages, found):
    messages[2] = found.server.shares_for(2)[0]


def cut(messages, found):
    messages[2] = messages[2][:-1]


def missing(messages, found):
    del messages[2]


def additional(messages, found):
    messages[17] = messages[2]


MESSAGES = [
    (replayed, "shares of client 2 for 0: expected a message of round 3"),
    (for_another, "shares of client 2 for 0: expected a message of round 3"),
    (of_another, "shares of client 2 for 0: expected a message of round 3"),
    (reflected, "shares of client 2 for 0: expected a message of round 3"),
    (cut, "expected 158 bytes, found 157"),
    (missing, "found none from client 2"),
    (additional, "found one too many, from client 17"),
]


@pytest.mark.parametrize("row", MESSAGES, ids=lambda row: row[0].__name__)
def test_shares_that_are_not_this_clients_of_this_round_are_refused(row):
    change, text = row
    found = after_shares()
    messages = found.server.shares_for(0)
    change(messages, found)
    with raises(ShareError, text):
        found.clients[0].mask(VECTOR, messages, EVERYONE, DRAWS)
    assert found.clients[0].phase == "shares"


def test_the_server_refuses_shares_for_too_few_too_many_or_of_another_length():
    found = Round(TERMS).keys()
    messages = found.clients[0].share(found.server.directory())
    rows = [
        ({i: m for i, m in messages.items() if i != 3}, "none for client 3"),
        (messages | {9: b""}, "one too many, for client 9"),
        (messages | {3: b""}, "expected 158 bytes, found 0"),
    ]
    for wrong, text in rows:
        with raises(ShareError, text):
            found.server.add_shares(0, wrong)
    found.server.add_shares(0, messages)


def test_shares_from_or_for_a_client_without_keys_or_shares_are_refused():
    found = Round(TERMS, {"keys": {4}, "shares": {3}}).keys()
    found.server.directory()
    with raises(ShareError, "client 4: expected keys before"):
        found.server.add_shares(4, {})
    found.shares()
    with raises(ShareError, "client 3", "one that did not"):
        found.server.shares_for(3)
    found.masked(vectors_of(TERMS))
    with raises(ShareError, "client 3: expected shares before"):
        found.server.add_masked(3, np.zeros(TERMS.size + 1, np.uint32))


# Who shared ------------------------------------------------------------------------------------

SHARING = [
    ((1, 2, 3, 4), SecureTermsError, "expected client 0 among them"),
    ((0, 1), ThresholdError, "expected 3 or more, found 2"),
    ((0, 1, 2, 2, 3), SecureTermsError, "every client once"),
    ((0, 1, 2, 9), SecureTermsError, "place, 0 to 4, found 9"),
    (range(100_000), SecureTermsError, "5 clients at most, found 100000"),
]


@pytest.mark.parametrize("row", SHARING, ids=lambda row: row[2])
def test_a_list_of_who_shared_that_isolates_a_client_is_refused(row):
    survivors, error, text = row
    found = after_shares()
    with raises(error, text):
        found.clients[0].mask(VECTOR, found.server.shares_for(0), survivors, DRAWS)


def test_masks_are_not_put_against_clients_whose_keys_were_not_seen():
    found = Round(TERMS).keys().shares(seen=lambda i, ads: {k: ads[k] for k in ads if k != 4 or i})
    session = found.clients[0]
    assert session.phase == "shares"
    with raises(ForgedKeyError, "in the directory, found 4"):
        session.mask(VECTOR, {}, EVERYONE, DRAWS)


def test_a_client_whose_neighborhood_is_gone_sends_no_vector():
    terms = terms_of(60, 31, neighbors=46)
    found = Round(terms).keys().shares()
    session = found.clients[0]
    near = terms.neighbors_of(0)
    left = set(range(60)) - set(near[terms.share_threshold - 2 :])
    with raises(ThresholdError, f"{terms.share_threshold} or more holders"):
        session.mask(np.zeros(terms.size), {}, left, DRAWS)


@pytest.mark.parametrize(
    "vector",
    [np.zeros(15), np.zeros((16, 1)), np.zeros(16, np.float32)],
    ids=lambda v: str(v.shape),
)
def test_a_vector_of_another_shape_is_refused(vector):
    found = after_shares()
    with raises(ShapeMismatchError, "client 0", "(16,) float64"):
        found.clients[0].mask(vector, found.server.shares_for(0), EVERYONE, DRAWS)


@pytest.mark.parametrize(
    "vector", [np.zeros(17), np.zeros(16, np.uint32), np.zeros(17, np.uint64), [0] * 17]
)
def test_a_masked_vector_of_another_shape_is_refused(vector):
    found = after_shares()
    assert found.server.survivors_of_sharing == (0, 1, 2, 3, 4)
    with raises(ShapeMismatchError, "client 1", "(17,) uint32"):
        found.server.add_masked(1, vector)


# Revealing -------------------------------------------------------------------------------------

LISTS = [
    ((0, 1, 2, 3), (3, 4), RevealError, "client 3: expected it among survivors or dropouts"),
    ((0, 1, 2), (3,), RevealError, "client 4", "in neither"),
    ((0, 1, 2, 3, 4), (), None, ""),
    ((1, 2, 3, 4), (0,), RevealError, "client 0: expected itself among the survivors"),
    ((0, 1), (2, 3, 4), ThresholdError, "3 or more, found 2"),
    ((0, 1, 2, 3, 4, 4), (), SecureTermsError, "at most, found 6"),
    ((0, 1, 2, 4, 4), (3,), SecureTermsError, "every client once"),
    ((0, 1, 2, 7), (3, 4), SecureTermsError, "found 7"),
]


@pytest.mark.parametrize("row", LISTS, ids=lambda row: str(row[:2]))
def test_lists_that_would_unmask_someone_are_refused(row):
    survivors, dropouts, error, *texts = row
    session = after_masked().clients[0]
    if error is None:
        assert sorted(session.agree(survivors, dropouts)) == [1, 2, 3, 4]
        return
    with raises(error, *texts):
        session.agree(survivors, dropouts)
    assert session.phase == "masked"


def test_a_client_that_did_not_share_is_no_dropout_to_reveal_for():
    found = Round(TERMS, {"shares": {4}}).keys().shares().masked(vectors_of(TERMS))
    with raises(RevealError, "client 4", "one more"):
        found.clients[0].agree((0, 1, 2, 3), (4,))


@pytest.mark.parametrize("stored", [False, True])
def test_the_other_share_is_never_revealed_later(stored):
    found = after_masked().agree()
    session = found.clients[0]
    # It is forgotten before anything is revealed, and so is all else once that is done.
    assert {data[0] for data in session._state["revealed"].values()} == {SELF}
    assert "held" not in session._state
    if stored:
        session = ClientSession.from_bytes(session.to_bytes())
    with raises(PhaseOrderError, "after the phase 'masked', found it after 'agreed'"):
        session.agree((0, 1, 2, 3), (4,))
    first = session.reveal(found.server.tags_for(0))
    assert {data[0] for data in first.values()} == {SELF}
    if stored:
        session = ClientSession.from_bytes(session.to_bytes())
    with raises(PhaseOrderError, "after the phase 'agreed', found it after 'revealed'"):
        session.reveal(found.server.tags_for(0))
    assert session._state == {}


# What the clients were told ----------------------------------------------------------------------


def told_apart(told, terms=TERMS, sharing=None, lost=()):
    """Let a server tell every client other lists; return what each reveals, or its refusal.

    told: dropouts by client; the others that shared are told to be left. sharing: who shared, by
    client. The server passes on whatever tags it has got.
    """
    found = after_shares(terms)
    everyone = set(range(terms.clients))
    sharing = {i: (sharing or {}).get(i, everyone) for i in everyone}
    for index in everyone - set(lost):
        messages = found.server.shares_for(index)
        shares = {sender: messages[sender] for sender in sharing[index]}
        found.clients[index].mask(VECTOR, shares, sharing[index], DRAWS)
    tags = {i: found.clients[i].agree(sharing[i] - told[i], told[i]) for i in told}
    answers = {}
    for index in told:
        mine = {sender: tags[sender][index] for sender in tags if index in tags[sender]}
        try:
            answers[index] = found.clients[index].reveal(mine)
        except RevealError as error:
            answers[index] = str(error)
    return answers


def test_a_client_that_is_told_of_fewer_others_is_not_opened_alone():
    # Client 0 hides behind 1 and 2 alone; the others are told that these are lost, as far as the
    # threshold lets them. Three shares of 0's own mask and of both keys would be revealed.
    told = {0: set(), 1: {2}, 2: {1}, 3: {1, 2}, 4: {1, 2}}
    answers = told_apart(told, sharing={0: {0, 1, 2}})
    assert all(isinstance(answer, str) for answer in answers.values())
    assert "3 or more clients that were told the same" in answers[0]
    assert "found 1;" in answers[0]
    assert "found 2;" in answers[3]


def test_told_the_same_they_reveal_and_one_that_was_told_otherwise_does_not():
    told = {0: {4}, 1: {4}, 2: {4}, 3: set()}
    answers = told_apart(told, lost={4})
    assert [isinstance(answers[i], str) for i in range(4)] == [False, False, False, True]
    assert {answers[i][4][0] for i in range(3)} == {KEY}


def test_of_all_lies_about_one_client_no_two_answers_differ():
    # The others are told what the server likes of client 0, in all ways: those alone reveal that
    # were told what more than half of all were told.
    for lies in itertools.product((False, True), repeat=4):
        told = {i: {0} if lie else set() for i, lie in enumerate(lies, start=1)}
        answers = told_apart({0: set(), **told})
        kinds = {answer[0][0] for answer in answers.values() if not isinstance(answer, str)}
        assert len(kinds) <= 1
        assert (KEY in kinds) == (sum(lies) >= TERMS.threshold)


def test_clients_that_saw_other_keys_of_one_reveal_nothing():
    # Two clients are at one place, and each half of the others is shown one of them.
    found = Round(TERMS).keys()
    twin, ad = ClientSession.begin(TERMS, 4)
    directories = [found.server.directory(), found.server.directory() | {4: ad}]
    half = {0: 0, 1: 0, 2: 1, 3: 1}
    shares = {i: found.clients[i].share(directories[half[i]]) for i in half}
    of_four = [
        four.share(seen) for four, seen in zip((found.clients[4], twin), directories, strict=True)
    ]
    for i, side in half.items():
        messages = {sender: shares[sender][i] for sender in half} | {4: of_four[side][i]}
        found.clients[i].mask(VECTOR, messages, EVERYONE, DRAWS)
    tags = {i: found.clients[i].agree((0, 1, 2, 3), (4,)) for i in half}
    for i in half:
        with raises(RevealError, "the same survivors, dropouts and keys, found 2;"):
            found.clients[i].reveal({sender: tags[sender][i] for sender in half if sender != i})


@pytest.mark.parametrize(
    "change",
    [
        lambda tags: {},
        lambda tags: {i: bytes(32) for i in tags},
        lambda tags: {1: tags[2], 2: tags[1], 3: tags[4], 4: tags[3]},
        lambda tags: {i: tag[:-1] for i, tag in tags.items()},
    ],
    ids=["none", "zeros", "exchanged", "cut"],
)
def test_tags_that_are_not_the_neighbors_count_as_none(change):
    found = after_masked().agree()
    with raises(RevealError, "client 0: expected 3 or more", "found 1;"):
        found.clients[0].reveal(change(found.server.tags_for(0)))
    assert found.clients[0].phase == "agreed"


def test_tags_of_another_round_or_sent_back_count_as_none():
    one, other = after_masked().agree(), after_masked().agree()
    reflected = {i: one.clients[0]._state["agreement"][i] for i in (1, 2, 3, 4)}
    lists = one.clients[0]._state["lists"]
    sent_back = {i: tag_of(key, 0, i, lists) for i, key in reflected.items()}
    for tags in (other.server.tags_for(0), sent_back):
        with raises(RevealError, "found 1;"):
            one.clients[0].reveal(tags)


def test_the_server_refuses_tags_that_are_missing_too_many_or_cut():
    found = after_masked(lost={4})
    tags = found.clients[0].agree(found.server.survivors, found.server.dropouts)
    rows = [
        ({1: tags[1]}, "none for client 2"),
        (tags | {4: tags[1]}, "one too many, for client 4"),
        (tags | {1: b""}, "expected 32 bytes each"),
    ]
    for wrong, text in rows:
        with raises(RevealError, text):
            found.server.add_agreement(0, wrong)
    with raises(RevealError, "client 4: expected its vector before"):
        found.server.add_agreement(4, {})
    found.server.add_agreement(0, tags)
    with raises(ThresholdError, "agreed on who is left", "found 1"):
        found.server.tags_for(0)
    with raises(ThresholdError, "agreed on who is left", "found 1"):
        found.server.add_reveal(0, {})


def test_the_server_refuses_what_is_not_to_be_revealed():
    found = after_masked(lost={4})
    left, lost = found.server.survivors, found.server.dropouts
    assert (left, lost) == ((0, 1, 2, 3), (4,))
    found.agree()
    revealed = {i: found.clients[i].reveal(found.server.tags_for(i)) for i in left}
    right = revealed[0]
    rows = [
        ({i: d for i, d in right.items() if i != 2}, "none of client 2"),
        (right | {8: right[2]}, "one too many, of client 8"),
        (
            right | {4: bytes([SELF]) + right[4][1:]},
            "client 4 from 0: expected one of its pairwise",
        ),
        (right | {2: bytes([KEY]) + right[2][1:]}, "client 2 from 0: expected one of its own mask"),
        (right | {2: revealed[1][2]}, "client 2 from 0: expected the one that 2 gave it"),
        (right | {2: b""}, "client 2: expected 34 bytes, found 0"),
        (right | {2: b"\2" + right[2][1:]}, "client 2", "neither"),
    ]
    for wrong, *texts in rows:
        with raises(RevealError, *texts):
            found.server.add_reveal(0, wrong)
    with raises(RevealError, "client 4: expected its tags before"):
        found.server.add_reveal(4, right)
    # The refused client may be lost: three of five are enough.
    for index in (1, 2, 3):
        found.server.add_reveal(index, revealed[index])
    assert_total(found, vectors_of(TERMS), {0, 1, 2, 3})


# Clients that lie ------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "lost"), [("seed", ()), ("mask_secret", (1,))])
def test_a_client_that_shares_another_secret_than_it_uses_is_named(name, lost):
    found = Round(TERMS, {"masked": set(lost)}).keys()
    liar = found.clients[1]
    used = dict(liar._state)
    liar._state[name] = new_secret()
    found.shares()
    liar._state[name] = used[name]
    found.masked(vectors_of(TERMS)).unmask()
    with raises(SecureSumError, "client 1: expected shares of the secret that it advertised"):
        found.server.total()


def test_a_client_that_puts_other_masks_is_noticed_by_the_count():
    found = after_shares()
    found.clients[2]._state["seed"] = new_secret()
    found.masked(vectors_of(TERMS)).unmask()
    # The count is then a uniform number of 32 bits.
    with raises(SecureSumError, "expected 5 vectors in it, found"):
        found.server.total()


def test_a_client_that_counts_itself_twice_is_noticed():
    def twice(index, vector):
        vector[-1] += index == 3
        return vector

    found = after_shares().masked(vectors_of(TERMS), changed=twice).unmask()
    with raises(SecureSumError, "expected 5 vectors in it, found 6"):
        found.server.total()


# Order -----------------------------------------------------------------------------------------


def test_phases_of_a_client_come_once_and_in_order():
    found = Round(TERMS).keys()
    session = found.clients[0]
    with raises(PhaseOrderError, "after the phase 'shares', found it after 'keys'"):
        session.mask(VECTOR, {}, EVERYONE, DRAWS)
    with raises(PhaseOrderError, "after the phase 'masked', found it after 'keys'"):
        session.agree(EVERYONE, ())
    with raises(PhaseOrderError, "after the phase 'agreed', found it after 'keys'"):
        session.reveal({})
    found.shares()
    with raises(PhaseOrderError, "after the phase 'keys', found it after 'shares'"):
        session.share(found.server.directory())
    found.masked(vectors_of(TERMS))
    with raises(PhaseOrderError, "after the phase 'shares', found it after 'masked'"):
        session.mask(VECTOR, found.server.shares_for(0), EVERYONE, DRAWS)


def test_what_is_late_or_comes_twice_at_the_server_is_refused():
    found = Round(TERMS).keys()
    server = found.server
    ad = ClientSession.begin(TERMS, 1)[1]
    with raises(PhaseOrderError, "client 1", "a second"):
        server.add_advertisement(1, ad)
    found.shares()
    with raises(PhaseOrderError, "expected a message of the phase 'shares', found one of 'keys'"):
        server.add_advertisement(1, ad)
    messages = server._shares[1]
    with raises(PhaseOrderError, "client 1", "a second"):
        server.add_shares(1, messages)
    vector = np.zeros(17, np.uint32)
    with raises(PhaseOrderError, "'shares', found one of 'masked'"):
        server.add_masked(1, vector)
    found.masked(vectors_of(TERMS))
    with raises(PhaseOrderError, "'masked', found one of 'shares'"):
        server.add_shares(1, messages)
    with raises(PhaseOrderError, "client 1", "a second"):
        server.add_masked(1, vector)
    found.unmask()
    with raises(PhaseOrderError, "'unmask', found one of 'masked'"):
        server.add_masked(1, vector)
    with raises(PhaseOrderError, "client 1", "a second"):
        server.add_reveal(1, {})
    server.total()
    with raises(PhaseOrderError, "'total', found one of 'unmask'"):
        server.add_reveal(1, {})
    with raises(PhaseOrderError, "found one of 'total'"):
        server.total()


def test_nothing_is_asked_for_below_the_threshold():
    found = Round(TERMS, {"keys": {0, 1, 2}}).keys()
    with raises(ThresholdError, "clients with keys: expected 3 or more of 5, found 2"):
        found.server.directory()
    found = Round(TERMS, {"shares": {0, 1, 2}}).keys().shares()
    with raises(ThresholdError, "clients that shared their secrets", "found 2"):
        _ = found.server.survivors_of_sharing
    found = after_masked(lost={0, 1, 2})
    with raises(ThresholdError, "vectors: expected 3 or more of 5, found 2"):
        found.server.add_reveal(3, {})
    with raises(ThresholdError, "vectors"):
        found.server.total()
