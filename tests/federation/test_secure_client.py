"""One client against a server that does what it should not: nothing is told out of order."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fedlora.aggregation import ServerState
from fedlora.errors import (
    ConfigError,
    FederationError,
    ForgedKeyError,
    FormatError,
    PhaseOrderError,
    RevealError,
    SecureTermsError,
)
from fedlora.federation.deploy.keys import make_node_key
from fedlora.federation.guard import check_advertised, check_masked, check_parts
from fedlora.federation.records import (
    BOTH,
    ClientSetup,
    TrainOrder,
    encode_adapter,
    to_record,
    train_content,
)
from fedlora.federation.secure.client import (
    ContextSessions,
    Kept,
    MemorySessions,
    answer_agree,
    answer_keys,
    answer_masked,
    answer_shares,
    answer_unmask,
    require_masking,
)
from fedlora.federation.secure.handlers import handle_keys, owners_trusted, read_trusted_keys
from fedlora.federation.secure.once import answer_once, answers_of
from fedlora.federation.secure.records import (
    PhaseOrder,
    keys_content,
    masked_record,
    parts_record,
    phase_record,
    read_advertisement,
    read_keys,
    read_masked,
    read_parts,
    read_phase,
    training_records,
)
from fedlora.federation.tasks import TrainTask, read_task
from fedlora.flat import pack
from fedlora.plain import to_plain
from fedlora.privacy.clipping import norm_of
from fedlora.privacy.secure import Advertisement, Identity, ServerSession, Terms
from tests.federation.fakes import FakeTrainer, experiment, raises, start_adapter

CONFIG = experiment(federation__weights="equal", secure_aggregation__clipping_range=4.0)
SETUP = to_record(ClientSetup.of(CONFIG))


def task(round: int = 1) -> TrainTask:
    order = TrainOrder(round, 0, CONFIG.federation.train, BOTH)
    start = encode_adapter(ServerState.start(start_adapter(CONFIG)).trainable, BOTH, round)
    return read_task(train_content(SETUP, to_record(order), start))


TASK = task()
SIZE = TASK.reply.rows.size
TERMS = Terms("run", 1, SIZE, 4, 3, None, 32, 4.0)


def order(terms: Terms = TERMS, **more: Any) -> ConfigRecord:
    return phase_record(PhaseOrder(terms.run, terms.round, **more))


class Round:
    """Four clients and a server's session, phase by phase; each step can be done otherwise."""

    def __init__(self, terms: Terms = TERMS, identities: dict[int, Identity] | None = None) -> None:
        self.terms, self.server = terms, ServerSession(terms)
        self.states = [RecordDict() for _ in range(terms.clients)]
        self.signers: dict[int, bytes] = {}
        for place in range(terms.clients):
            self.advertise(place, (identities or {}).get(place))

    def sessions(self, place: int) -> ContextSessions:
        # A device gets its context back as records alone, in a process of its own.
        return ContextSessions(self.states[place])

    def advertise(self, place: int, identity: Identity | None) -> None:
        content = keys_content(self.terms, place, SETUP)
        reply = answer_keys(content, self.sessions(place), identity)
        data, signer = read_advertisement(reply, "client")
        self.server.add_advertisement(place, Advertisement.from_bytes(data))
        if signer is not None:
            self.signers[place] = signer

    def directory(self) -> RecordDict:
        found = {p: ad.to_bytes() for p, ad in self.server.directory().items()}
        content = RecordDict({"secure": order(self.terms), "directory": parts_record(found)})
        if self.signers:
            content["signers"] = parts_record(self.signers)
        return content

    def share(self, places: tuple[int, ...] = (0, 1, 2, 3)) -> None:
        for place in places:
            reply = answer_shares(self.directory(), self.sessions(place))
            self.server.add_shares(place, read_parts(reply, "shares", "client"))

    def masking(self, place: int, **more: Any) -> RecordDict:
        return RecordDict(
            {
                "secure": order(self.terms, survivors=self.server.survivors_of_sharing, **more),
                "shares": parts_record(self.server.shares_for(place)),
            }
        )

    def mask(self, place: int, row: np.ndarray, **more: Any) -> None:
        reply = answer_masked(
            self.masking(place, **more), self.sessions(place), TASK, row, f"c{place}"
        )
        length, bits = self.terms.size + 1, self.terms.bits
        self.server.add_masked(place, read_masked(reply, length, bits, "client"))

    def agree(self, place: int, survivors: tuple[int, ...], dropouts: tuple[int, ...]) -> Any:
        content = RecordDict({"secure": order(self.terms, survivors=survivors, dropouts=dropouts)})
        return read_parts(answer_agree(content, self.sessions(place)), "tags", "client")

    def unmask(self, place: int, tags: dict[int, bytes]) -> Any:
        content = RecordDict({"secure": order(self.terms), "tags": parts_record(tags)})
        return answer_unmask(content, self.sessions(place))


def rows(scale: float = 1.0) -> list[np.ndarray]:
    sent = pack(TASK.reply.sent, TASK.reply.segments)
    generator = np.random.default_rng(0)
    return [(sent + scale * generator.normal(size=SIZE)).astype(np.float32) for _ in range(4)]


def masked_round() -> Round:
    found = Round()
    found.share()
    for place, row in enumerate(rows()):
        found.mask(place, row)
    return found


def test_a_round_by_hand_gives_the_sum_of_the_changes() -> None:
    found = masked_round()
    for place in range(4):
        found.server.add_agreement(place, found.agree(place, (0, 1, 2, 3), ()))
    for place in range(4):
        reply = found.unmask(place, found.server.tags_for(place))
        found.server.add_reveal(place, read_parts(reply, "revealed", "client"))
    total = found.server.total()
    sent = pack(TASK.reply.sent, TASK.reply.segments).astype(np.float64)
    expected = sum(np.clip(row - sent, -4.0, 4.0) for row in rows())
    assert np.abs(total.sum - expected).max() <= TERMS.quantizer.error_bound(4)
    assert total.count == 4


# What a server asks at a wrong time, after a masked round of four, and what the client says.
OUT_OF_ORDER: dict[str, tuple[Callable[[Round], Any], type[Exception], str]] = {
    "shares again": (
        lambda r: answer_shares(r.directory(), r.sessions(0)), PhaseOrderError, "",
    ),
    "a second update": (
        lambda r: answer_masked(r.masking(0), r.sessions(0), TASK, rows()[0], "c0"),
        PhaseOrderError, "",
    ),
    "a second training": (
        lambda r: require_masking(r.masking(0), r.sessions(0)), PhaseOrderError,
        "message from the server: expected what follows the phase 'masked' of round 1, found "
        "train.masked",
    ),
    "the same round once more": (
        lambda r: answer_keys(keys_content(TERMS, 0, SETUP), r.sessions(0)), FederationError,
        "message from the server: expected the phases of round 1 once, found a second beginning",
    ),
    "an older round": (
        lambda r: answer_keys(keys_content(replace(TERMS, round=0), 0, SETUP), r.sessions(0)),
        FederationError, "message from the server: expected a round after 1, found 0",
    ),
    "unmasking before the others agree": (
        lambda r: r.unmask(0, {}), PhaseOrderError,
        "client 0: expected to be after the phase 'agreed', found it after 'masked'",
    ),
    "lists of another round": (
        lambda r: answer_agree(
            RecordDict({"secure": order(replace(TERMS, round=2), survivors=(0, 1, 2, 3))}),
            r.sessions(0),
        ),
        PhaseOrderError,
        "message from the server: expected a phase of a round that this client has begun, which is "
        "round 1 of 'run', found one of round 2 of 'run'",
    ),
    "lists of another run": (
        lambda r: answer_agree(
            RecordDict({"secure": order(replace(TERMS, run="x"), survivors=(0, 1, 2, 3))}),
            r.sessions(0),
        ),
        PhaseOrderError,
        "message from the server: expected a phase of a round that this client has begun, which is "
        "round 1 of 'run', found one of round 1 of 'x'",
    ),
    "a client on both lists": (
        lambda r: r.agree(0, (0, 1, 2, 3), (3,)), RevealError, "",
    ),
    "a client on neither list": (lambda r: r.agree(0, (0, 1, 2), ()), RevealError, ""),
    "too few survivors": (lambda r: r.agree(0, (0, 1), (2, 3)), FederationError, ""),
    "itself as a dropout": (lambda r: r.agree(0, (1, 2, 3), (0,)), RevealError, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", OUT_OF_ORDER)
def test_what_is_out_of_order_is_refused_and_changes_nothing(name: str) -> None:
    ask, error, text = OUT_OF_ORDER[name]
    found = masked_round()
    before: Any = dict(found.states[0]["secure-session"])  # type: ignore[arg-type]
    with pytest.raises(error) as caught:
        ask(found)
    assert str(caught.value).startswith(text)
    assert dict(found.states[0]["secure-session"]) == before  # type: ignore[arg-type]


def test_other_lists_and_a_second_unmask_are_refused() -> None:
    found = masked_round()
    tags = {place: found.agree(place, (0, 1, 2), (3,)) for place in range(3)}
    with raises(
        PhaseOrderError,
        "client 0: expected to be after the phase 'masked', found it after 'agreed'; the phases "
        "are keys, shares, masked, agreed, revealed, each once",
    ):
        found.agree(0, (0, 1, 2, 3), ())
    mine = {place: tags[place][0] for place in (1, 2)}
    with pytest.raises(RevealError, match="expected 3 or more clients that were told the same"):
        found.unmask(0, {1: mine[1]})
    found.unmask(0, mine)
    for again in (mine, {}):
        with raises(
            PhaseOrderError,
            "message from the server: expected nothing more of round 1, in which this client has "
            "revealed its shares, found another phase",
        ):
            found.unmask(0, again)


def test_a_client_that_has_begun_nothing_answers_nothing() -> None:
    with raises(
        PhaseOrderError,
        "message from the server: expected a phase of a round that this client has begun, which is "
        "no round, found one of round 1 of 'run'",
    ):
        answer_agree(
            RecordDict({"secure": order(survivors=(0, 1, 2))}), ContextSessions(RecordDict())
        )


def test_another_task_than_the_terms_say_is_refused() -> None:
    found = Round()
    found.share()
    with raises(FederationError, "message from the server: expected a task of round 1, found 2"):
        answer_masked(found.masking(0), found.sessions(0), task(2), rows()[0], "c0")
    other = Round(replace(TERMS, size=SIZE - 1))
    other.share()
    with raises(
        FederationError,
        f"message from the server: expected {SIZE - 1} trained numbers as its terms say, found "
        f"{SIZE}",
    ):
        answer_masked(other.masking(0), other.sessions(0), TASK, rows()[0], "c0")


def test_an_update_stays_within_the_norm_after_its_rounding() -> None:
    """With 24 clients and few levels rounding is coarse; the norm holds all the same."""
    norm = 3.0
    found = Round(replace(TERMS, clipping_range=norm))
    quantizer = found.terms.quantizer
    found.share()
    for place, row in enumerate(rows(10.0)):
        sessions = found.sessions(place)
        seen: list[np.ndarray] = []
        session: Any = sessions.read().session  # type: ignore[union-attr]
        mask = session.mask
        session.mask = lambda vector, *rest, seen=seen, mask=mask: (
            seen.append(vector), mask(vector, *rest),
        )[1]  # fmt: skip
        memory = MemorySessions({place: Kept("run", 1, session)}, place)
        answer_masked(found.masking(place, clipping_norm=norm), memory, TASK, row, f"c{place}")
        (vector,) = seen
        margin = quantizer.step * np.sqrt(SIZE)
        assert norm - 2 * margin <= norm_of(vector) <= norm - margin + 1e-12
        rounded = quantizer.quantize(vector, np.random.default_rng(1))
        assert norm_of(quantizer.dequantize(rounded, 1)) <= norm


def test_a_norm_without_room_for_rounding_is_refused() -> None:
    found = Round()
    found.share()
    with pytest.raises(SecureTermsError, match="expected room for rounding in a clipping_norm"):
        answer_masked(
            found.masking(0, clipping_norm=1e-12), found.sessions(0), TASK, rows()[0], "c0"
        )


def test_processes_at_the_same_time_answer_one_phase_once(tmp_path: Path) -> None:
    # A server sends two messages at once: each process has a copy of the context of before.
    folder = tmp_path / "user" / "device"
    found = masked_round()
    reply = "found it answered by another process of this device"

    def copy(state: RecordDict) -> ContextSessions:
        return ContextSessions(RecordDict(dict(state)), folder)

    before = found.states[0]
    lists = [RecordDict({"secure": order(survivors=(0, 1, 2), dropouts=(3,))}),
             RecordDict({"secure": order(survivors=(0, 1, 2, 3))})]  # fmt: skip
    answer_agree(lists[0], copy(before))
    with pytest.raises(PhaseOrderError, match=reply):
        answer_agree(lists[1], copy(before))
    other = Round()
    other.share()
    before, ask = other.states[1], other.masking(1)
    for number, row in enumerate(rows()[:2]):
        if number == 0:
            answer_masked(ask, ContextSessions(RecordDict(dict(before)), folder), TASK, row, "c1")
        else:
            with pytest.raises(PhaseOrderError, match=reply):
                answer_masked(ask, copy(before), TASK, row, "c1")
    # Nothing is in the files; another round, and another device, are others.
    assert [path.read_bytes() for path in folder.iterdir()] == [b"", b""]
    answer_once(folder, "run", 2, "masked")
    answer_once(tmp_path / "user" / "other", "run", 1, "masked")


def test_notes_of_a_week_ago_are_deleted_and_a_strangers_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "user" / "device"
    answer_once(folder, "run", 1, "keys")
    (old,) = folder.iterdir()
    os.utime(old, (0, 0))
    answer_once(folder, "run", 2, "keys")
    assert old not in folder.iterdir()
    folder.parent.chmod(0o755)
    with pytest.raises(ConfigError, match="expected a folder of this user alone"):
        answer_once(folder, "run", 3, "keys")
    assert answers_of(Path("/a")) != answers_of(Path("/b"))


def test_a_device_whose_owner_demands_noise_takes_no_part_in_a_secure_sum() -> None:
    message = Message(keys_content(TERMS, 0, SETUP), 1001, "train.keys")
    reply = handle_keys(
        message, lambda setup: FakeTrainer(0), RecordDict(), node_config={"min-noise-multiplier": 1}
    )
    assert "this device's owner demands local noise" in reply.error.reason


# Identities: who has signed an advertisement, and whom a device trusts.


@pytest.fixture(scope="module")
def keys(tmp_path_factory: Any) -> list[Path]:
    folder = tmp_path_factory.mktemp("keys")
    found = [folder / f"device{number}" for number in range(5)]
    for path in found:
        make_node_key(path)
    return found


def trusting(keys: list[Path], tmp_path: Path) -> dict[bytes, bytes]:
    """The file of public keys that a device's owner names, read."""
    path = tmp_path / "trusted"
    lines = [Path(f"{key}.pub").read_text() for key in keys]
    path.write_text("# our devices\n\n" + "".join(lines))
    return read_trusted_keys(path)


def signed(keys: list[Path], who: tuple[int | None, ...] = (0, 1, 2, 3)) -> Round:
    """A round in which place p signs with key who[p]; the keys are those that register a node."""
    return Round(
        identities={
            place: Identity.from_pem_file(keys[number])
            for place, number in enumerate(who)
            if number is not None
        }
    )


def test_devices_that_trust_each_other_share(keys: list[Path], tmp_path: Path) -> None:
    trusted = trusting(keys[:4], tmp_path)
    assert len(trusted) == 4
    found = signed(keys)
    for place in range(4):
        reply = answer_shares(found.directory(), found.sessions(place), trusted)
        assert read_parts(reply, "shares", "client").keys() == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("who", "text"),
    [
        ((0, 1, 2, 4), "keys of client 3: expected an identity that this device trusts"),
        ((0, 1, 2, None), "keys of client 3: expected an identity that this device trusts"),
        ((0, 1, 2, 2), "known: expected an identity for every client, found one twice"),
    ],
)
def test_a_stranger_or_a_device_twice_is_refused(
    who: tuple[int | None, ...], text: str, keys: list[Path], tmp_path: Path
) -> None:
    found = signed(keys, who)
    with pytest.raises(ForgedKeyError, match=f"^{text}"):
        answer_shares(found.directory(), found.sessions(0), trusting(keys[:4], tmp_path))


def test_a_server_that_names_a_trusted_signer_needs_its_signature(
    keys: list[Path], tmp_path: Path
) -> None:
    trusted = trusting(keys[:4], tmp_path)
    found = signed(keys, (0, 1, 2, 4))
    found.signers[3] = next(digest for digest in trusted if digest not in found.signers.values())
    with pytest.raises(ForgedKeyError, match="expected the signature of its identity, found anoth"):
        answer_shares(found.directory(), found.sessions(0), trusted)


def test_an_owner_who_trusts_names_an_identity(tmp_path: Path) -> None:
    assert owners_trusted({}) is None
    assert owners_trusted({"identity": "a", "trusted-keys": "b"}) == Path("b")
    with raises(
        ConfigError,
        "node config trusted-keys: expected this device's own signing key beside it, found none; "
        "name it as identity='…'",
    ):
        owners_trusted({"trusted-keys": "b"})


def test_a_file_of_something_else_than_keys_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("ssh-rsa AAAA\n")
    with raises(
        FormatError,
        f"{path}, line 1: expected a public key in OpenSSH's format, as in a device's KEY.pub, "
        "found something else",
    ):
        read_trusted_keys(path)
    with pytest.raises(FormatError, match="no file of public keys"):
        read_trusted_keys(tmp_path / "none")


# Records: what is read, and what the guard lets go.


def test_terms_and_orders_travel_as_they_are() -> None:
    sparse = replace(TERMS, clients=100, threshold=60, neighbors=76)
    for terms in (TERMS, sparse):
        found = read_keys(keys_content(terms, 2, SETUP))
        assert (found.terms, found.place) == (terms, 2)
    orders = [
        PhaseOrder("r", 3),
        PhaseOrder("r", 3, (0, 2), (1,)),
        PhaseOrder("r", 3, (0, 2), clipping_norm=0.5),
    ]
    for one in orders:
        assert read_phase(RecordDict({"secure": phase_record(one)})) == one
    values = np.array([0, 1, 2**32 - 1], np.uint32)
    read = read_masked(masked_record(values, 32), 3, 32, "c")
    assert read.dtype == np.uint32
    assert read.tolist() == values.tolist()


BAD_ORDERS: dict[str, tuple[dict[str, Any], str]] = {
    "no run": ({"round": 1}, "expected run, round and some of survivors"),
    "an unknown key": ({"run": "r", "round": 1, "x": 1}, "expected run, round and some of"),
    "a text for a round": ({"run": "r", "round": "1"}, "expected run, round and some of"),
    "a norm of zero": ({"run": "r", "round": 1, "clipping_norm": 0.0}, "expected a clipping_norm"),
    "an infinite norm": (
        {"run": "r", "round": 1, "clipping_norm": float("inf")}, "expected a clipping_norm",
    ),
    "a negative place": ({"run": "r", "round": 1, "survivors": [-1]}, "expected places >= 0"),
    "a place twice": ({"run": "r", "round": 1, "survivors": [1, 1]}, "expected each place once"),
    "places that are texts": ({"run": "r", "round": 1, "survivors": ["1"]}, "expected places"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ORDERS)
def test_a_bad_order_is_refused(name: str) -> None:
    record, text = BAD_ORDERS[name]
    with pytest.raises(FederationError, match=f"^message from the server, secure: {text}"):
        read_phase(RecordDict({"secure": ConfigRecord(record)}))


@pytest.mark.parametrize(
    "changes",
    [{"place": 4}, {"place": -1}, {"place": True}, {"threshold": 2}, {"bits": 16}, {"more": 1}],
)
def test_bad_terms_are_refused(changes: dict[str, Any]) -> None:
    content: Any = keys_content(TERMS, 0, SETUP)
    content["secure"].update(changes)
    with pytest.raises(FederationError, match=r"^message from the server, secure: "):
        read_keys(content)


def test_the_ordinary_part_of_a_masked_message_is_the_same_objects() -> None:
    start = encode_adapter(start_adapter(CONFIG), BOTH, 1)
    order_ = to_record(TrainOrder(1, 0, CONFIG.federation.train, BOTH))
    content = train_content(SETUP, order_, start)
    both = RecordDict({**content, "secure": order(), "shares": parts_record({1: b"x"})})
    assert dict(training_records(both).items()) == dict(content.items())


def test_the_guard_lets_nothing_else_go() -> None:
    row = masked_record(np.zeros(3, np.uint32), 32)
    check_masked(row, 3, 32)
    check_advertised(RecordDict({"advertisement": ConfigRecord({"bytes": b"x"})}))
    check_parts(RecordDict({"shares": parts_record({1: b"x"})}), "shares", (0, 1))
    bad: list[Callable[[], None]] = [
        lambda: check_masked(row, 4, 32),
        lambda: check_masked(row, 3, 64),
        lambda: check_masked(RecordDict({**row, "metrics": ConfigRecord({})}), 3, 32),
        lambda: check_masked(RecordDict({"masked": row["masked"]}), 3, 32),
        lambda: check_masked(RecordDict({**row, "masked": ArrayRecord()}), 3, 32),
        lambda: check_advertised(RecordDict({"advertisement": ConfigRecord({"bytes": "x"})})),
        lambda: check_advertised(
            RecordDict({"advertisement": ConfigRecord({"bytes": b"x", "secret": b"y"})})
        ),
        lambda: check_parts(RecordDict({"shares": parts_record({2: b"x"})}), "shares", (0, 1)),
        lambda: check_parts(RecordDict({"shares": ConfigRecord({"1": 5})}), "shares", (0, 1)),
        lambda: check_parts(RecordDict({"revealed": parts_record({1: b"x"})}), "shares", (0, 1)),
    ]
    for check in bad:
        with pytest.raises(FederationError, match=r"^refused to send"):
            check()


def test_the_experiment_refuses_what_does_not_go_together() -> None:
    plain = to_plain(CONFIG)
    assert plain["secure_aggregation"]["clipping_range"] == 4.0
    secure = {"federation__weights": "equal", "secure_aggregation__clipping_range": 4.0}
    with raises(
        ConfigError,
        "quorum.share: expected at least secure_aggregation.threshold = 0.6, found 0.5: with fewer "
        "clients a round is given up",
    ):
        experiment(**secure, quorum__share=0.5)
    with raises(
        ConfigError,
        "privacy.mechanism: expected 'central' with [secure_aggregation], found 'local', whose "
        "noise would not fit into the range of a secure sum; choose one of the two",
    ):
        experiment(
            **secure, privacy__mechanism="local", privacy__clipping_norm=1.0,
            privacy__noise_multiplier=1.0,
        )  # fmt: skip
