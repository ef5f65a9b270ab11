"""What an owner allows: when a device declines, what it says, and what the server makes of it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from datetime import datetime, time
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedlora.errors import ConfigError, FederationError
from fedlora.federation import handle_query, handle_train, read_checkpoint, read_rounds
from fedlora.federation import limits as limits_module
from fedlora.federation import strategy as strategy_module
from fedlora.federation._flower_private import identify_process
from fedlora.federation.client import handle_declined
from fedlora.federation.guard import check_declined
from fedlora.federation.limits import (
    REASONS,
    Limits,
    Power,
    declined_content,
    is_metered,
    owners_limits,
    read_declined,
    read_power,
    reason_to_decline,
)
from fedlora.federation.sampling import draw_cohort
from fedlora.federation.server import run_federation
from fedlora.simulation.grid import InProcessGrid
from tests.federation.fakes import FakeTrainer, experiment, run, start_adapter
from tests.federation.test_client import train_message

identify_process()

Files = Mapping[str, Mapping[str, str]]

MAINS_ON = {"type": "Mains", "online": "1"}
MAINS_OFF = {"type": "Mains", "online": "0"}


def battery(capacity: str, status: str = "Discharging", **more: str) -> dict[str, str]:
    return {"type": "Battery", "capacity": capacity, "status": status} | more


# What Linux says, and what it means.
POWER: dict[str, tuple[Files, Power]] = {
    "a desktop": ({}, Power(100.0, True)),
    "a desktop with a mouse": ({"m": battery("7", scope="Device")}, Power(100.0, True)),
    "a desktop behind a UPS": ({"u": {"type": "UPS", "online": "1"}}, Power(100.0, True)),
    "a laptop on its cable": ({"AC": MAINS_ON, "B": battery("41", "Charging")}, Power(41.0, True)),
    "a laptop on battery": ({"AC": MAINS_OFF, "B": battery("41\n")}, Power(41.0, False)),
    "a tablet on one of two plugs": (
        {"AC": MAINS_OFF, "U": {"type": "USB", "online": "1"}, "B": battery("9")},
        Power(9.0, True),
    ),
    "a phone that lists no plug, charging": ({"B": battery("80", "Full")}, Power(80.0, True)),
    "a phone that lists no plug, not charging": ({"B": battery("80")}, Power(80.0, False)),
    "a phone that knows nothing": ({"B": battery("", "Unknown")}, Power(None, None)),
    "two batteries": (
        {"AC": MAINS_OFF, "B0": battery("20"), "B1": battery("60")}, Power(40.0, False),
    ),
    "an empty bay": (
        {"AC": MAINS_OFF, "B0": battery("20"), "B1": battery("0", present="0")}, Power(20.0, False),
    ),
    "one of two cannot be read": (
        {"AC": MAINS_OFF, "B0": battery("20"), "B1": battery("?")}, Power(None, False),
    ),
}  # fmt: skip


def supplies(folder: Path, files: Files) -> Path:
    folder.mkdir()
    for name, values in files.items():
        (folder / name).mkdir()
        for key, value in values.items():
            (folder / name / key).write_text(value)
    return folder


@pytest.mark.parametrize("name", POWER)
def test_power_is_read_from_linux(name: str, tmp_path: Path) -> None:
    files, expected = POWER[name]
    assert read_power(supplies(tmp_path / "power", files)) == expected


def test_a_system_that_lists_no_supplies_says_nothing(tmp_path: Path) -> None:
    assert read_power(tmp_path / "none") == Power(None, None)


LAPTOP = {"AC": MAINS_OFF, "B": battery("41")}

# Node config, the device's power, local time, and the word.
CASES: dict[str, tuple[dict[str, Any], Files | None, str, str | None]] = {
    "no limits": ({}, LAPTOP, "12:00", None),
    "enough charge": ({"min-battery": 41}, LAPTOP, "12:00", None),
    "too little charge": ({"min-battery": 42}, LAPTOP, "12:00", "battery"),
    "too little charge, charging": (
        {"min-battery": 42}, {"AC": MAINS_ON, "B": battery("41", "Charging")}, "12:00", "battery",
    ),
    "no cable": ({"on-power": "true"}, LAPTOP, "12:00", "power"),
    "a cable": ({"on-power": "true"}, {"AC": MAINS_ON, "B": battery("1")}, "12:00", None),
    "a desktop": ({"on-power": True, "min-battery": 99}, {}, "12:00", None),
    "power unknown": ({"on-power": "true"}, None, "12:00", "power"),
    "charge unknown": ({"min-battery": 1}, None, "12:00", "battery"),
    "nothing asked of the battery": ({"min-battery": 0, "on-power": "false"}, None, "12:00", None),
    "at its hour": ({"hours": "22-7"}, LAPTOP, "22:00", None),
    "past midnight": ({"hours": "22-7"}, LAPTOP, "06:59", None),
    "at its end": ({"hours": "22-7"}, LAPTOP, "07:00", "hours"),
    "before its hour": ({"hours": "22-7"}, LAPTOP, "21:59", "hours"),
    "by day": ({"hours": "8:30-17"}, LAPTOP, "08:30", None),
    "by day, too early": ({"hours": "8:30-17"}, LAPTOP, "08:29", "hours"),
    "until midnight": ({"hours": "18-24"}, LAPTOP, "23:59", None),
    "until midnight, after it": ({"hours": "18-24"}, LAPTOP, "00:00", "hours"),
    "many examples": ({"min-examples": 10**6}, LAPTOP, "12:00", None),  # known only later
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_device_declines_by_what_its_owner_allows(name: str, tmp_path: Path) -> None:
    node_config, files, clock, word = CASES[name]
    folder = tmp_path / "power" if files is None else supplies(tmp_path / "power", files)
    now = datetime.fromisoformat(f"2026-03-01 {clock}")
    assert reason_to_decline(owners_limits(node_config), now=now, power_supply=folder) == word


def test_all_limits_are_read() -> None:
    told = {
        "min-battery": 30, "on-power": "true", "unmetered": "True", "hours": "22-7",
        "metered-file": "/run/metered", "min-examples": "20", "trainer": "onnx",
    }  # fmt: skip
    assert owners_limits(told) == Limits(
        30.0, True, True, Path("/run/metered"), (time(22), time(7)), 20
    )


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("min-battery", "full", "a number from 0 to 100"),
        ("min-battery", 101, "a number from 0 to 100"),
        ("min-battery", "nan", "a number from 0 to 100"),
        ("min-examples", -1, "a number from 0 to 9007199254740992"),
        ("min-examples", True, "a number from 0 to 9007199254740992"),
        ("on-power", "yes please", "true or false"),
        ("unmetered", "", "true or false"),
        ("hours", "22", "two times as in '22-7' or '8:30-17'"),
        ("hours", "7-7", "two times as in '22-7' or '8:30-17'"),
        ("hours", "22-25", "two times as in '22-7' or '8:30-17'"),
        ("hours", "24:30-7", "two times as in '22-7' or '8:30-17'"),
    ],
)
def test_a_limit_that_makes_no_sense_is_refused(key: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        owners_limits({key: value})
    assert str(error.value) == f"node config {key}: expected {expected}, found {value!r}"


@pytest.mark.parametrize(
    ("word", "metered"),
    [("yes", True), ("TRUE\n", True), ("no\n", False), ("0", False), ("maybe", None)],
)
def test_an_owners_file_says_whether_the_network_is_metered(
    word: str, metered: bool | None, tmp_path: Path
) -> None:
    file = tmp_path / "metered"
    file.write_text(word)
    assert is_metered(file) is metered
    allowed = owners_limits({"unmetered": "true", "metered-file": str(file)})
    assert reason_to_decline(allowed) == (None if metered is False else "metered")
    file.unlink()
    assert reason_to_decline(allowed) == "metered"


@pytest.mark.parametrize(
    ("printed", "code", "metered"),
    [
        ("u 1\n", 0, True), ("u 3\n", 0, True), ("u 2\n", 0, False), ("u 4\n", 0, False),
        ("u 0\n", 0, None), ("", 1, None), ("u 2\n", 1, None),
    ],
)  # fmt: skip
def test_network_manager_says_whether_the_network_is_metered(
    printed: str, code: int, metered: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(command: list[str], **options: Any) -> Any:
        assert command[0] == "busctl"
        assert command[3] == "/org/freedesktop/NetworkManager"
        return subprocess.CompletedProcess(command, code, printed, "")

    monkeypatch.setattr(limits_module.subprocess, "run", answer)
    assert is_metered() is metered


def test_without_network_manager_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(command: list[str], **options: Any) -> Any:
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(limits_module.subprocess, "run", missing)
    assert is_metered() is None
    assert reason_to_decline(Limits(unmetered=True)) == "metered"


# ------------------------------------------------------------------------- what a device says


@pytest.mark.parametrize("word", REASONS)
def test_a_device_that_declines_says_one_word_and_nothing_else(word: str) -> None:
    reply = handle_declined(train_message(), word)
    assert {name: dict(r.items()) for name, r in reply.content.items()} == {
        "declined": {"reason": word}
    }
    assert read_declined(reply.content) == word


OTHERS: dict[str, RecordDict] = {
    "another word": RecordDict({"declined": ConfigRecord({"reason": "at home"})}),
    "more words": RecordDict({"declined": ConfigRecord({"reason": "power", "where": "home"})}),
    "a list": RecordDict({"declined": ConfigRecord({"reason": ["power"]})}),
    "another record": RecordDict(
        {"declined": ConfigRecord({"reason": "power"}), "more": ConfigRecord()}
    ),
    "nothing": RecordDict(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_guard_lets_only_the_fixed_words_through(name: str) -> None:
    assert read_declined(OTHERS[name]) is None
    with pytest.raises(FederationError) as error:
        check_declined(OTHERS[name])
    assert str(error.value) == (
        "refused to send: a device that declines says one of battery, power, metered, hours, "
        "examples and nothing else"
    )


def test_a_word_of_its_own_does_not_leave_a_device() -> None:
    with pytest.raises(ValueError, match="expected one of battery"):
        declined_content("asleep")
    assert handle_declined(train_message(), "asleep").has_error()


@pytest.mark.parametrize(("count", "declines"), [(19, True), (20, False)])
def test_a_device_with_too_few_examples_declines_before_it_trains(
    count: int, declines: bool
) -> None:
    reply = handle_train(train_message(), lambda setup: FakeTrainer(1, count), min_examples=20)
    assert read_declined(reply.content) == ("examples" if declines else None)
    assert ("factors" in reply.content) is not declines


# ------------------------------------------------------------------- what the server makes of it

Says = Callable[[int, int], str | None]  # client number, its how many-th message: a word or None


def app_of(says: Says, broken: frozenset[int] = frozenset()) -> ClientApp:
    """Client i declines by `says`; those in `broken` fail instead of training."""
    app, asked = ClientApp(), dict.fromkeys(range(1000), 0)

    def fake(context: Context) -> FakeTrainer:
        number = int(context.node_config["partition-id"])
        return FakeTrainer(number, 10 + number)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return handle_query(message, lambda setup: fake(context))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        asked[number] += 1
        word = says(number, asked[number])
        if word is not None:
            return handle_declined(message, word)
        if number in broken:
            raise ValueError("broken")
        return handle_train(message, lambda setup: fake(context), context.state)

    return app


def declining(
    says: Says, out: Path, broken: frozenset[int] = frozenset(), clients: int = 8, **changes: Any
) -> tuple[Any, list[float]]:
    """Run a federation of devices that may decline; return its state and the pauses."""
    pauses: list[float] = []
    config = experiment(**{"federation__cohort": 4} | changes)
    grid = InProcessGrid(app_of(says, broken), clients)
    state = run_federation(grid, config, out, initial=start_adapter(config), pause=pauses.append)
    return state, pauses


def test_who_declines_is_noted_apart_and_the_round_goes_on(tmp_path: Path) -> None:
    def says(number: int, time: int) -> str | None:
        return {2: "battery", 5: "hours"}.get(number)

    state, pauses = declining(says, tmp_path, federation__cohort=8, federation__rounds=1)
    (record,) = read_rounds(tmp_path)
    assert record.status == "updated"
    assert record.declined == ("c2", "c5")
    assert [(d.client, d.reason) for d in record.dropped] == [
        ("c2", "declined: battery"), ("c5", "declined: hours"),
    ]  # fmt: skip
    assert pauses == []
    checkpoint = read_checkpoint(tmp_path)
    assert {c.client_id: c.rounds for c in checkpoint.clients} == {
        f"c{i}": int(i not in (2, 5)) for i in range(8)
    }
    assert record.bytes_up > 0
    # As it would be without the two.
    config = experiment(federation__cohort=8, federation__rounds=1)
    people = {i: FakeTrainer(i, 10 + i, change=_fails if i in (2, 5) else _same) for i in range(8)}
    other, _ = run(config, tmp_path / "other", people)
    assert state.adapter == other.adapter


def _same(result: Any, round: int) -> Any:
    return result


def _fails(result: Any, round: int) -> Any:
    raise ValueError("no")


def test_a_round_that_all_decline_is_tried_again_with_others_after_a_pause(tmp_path: Path) -> None:
    # 24 devices, of which each declines its first three messages: a night, and then a morning.
    state, pauses = declining(
        lambda number, time: "power" if time <= 3 else None,
        tmp_path, clients=24, federation__rounds=2,
    )  # fmt: skip
    records = read_rounds(tmp_path)
    assert state.round == 2
    assert [r.round for r in records if r.status == "updated"] == [1, 2]
    night = [record for record in records if record.status == "declined"]
    assert len(night) == len(pauses) >= 6
    assert pauses[:6] == [60.0, 120.0, 240.0, 480.0, 900.0, 900.0]
    ids = [f"c{i}" for i in range(24)]
    assert [r.cohort for r in night[:3]] == [
        draw_cohort(ids, 4, 1, 0, again=again) for again in (0, 1, 2)
    ]
    assert len({record.cohort for record in night}) == len(night)
    assert read_checkpoint(tmp_path).failed_in_a_row == 0


def test_a_night_of_declining_neither_ends_a_run_nor_hides_that_all_others_fail(
    tmp_path: Path,
) -> None:
    # Two of four decline for ever, and nobody else can train: as many decline as fail.
    half = frozenset(range(4, 8))
    with pytest.raises(FederationError) as error:
        declining(lambda number, time: "hours" if number < 4 else None, tmp_path / "a", half)
    records = read_rounds(tmp_path / "a")
    # Cohorts of three or four that failed count, the others come again; both leave a line.
    assert {record.status for record in records} == {"failed", "declined"}
    for record in records:
        failed = len(record.dropped) - len(record.declined)
        assert (record.status == "declined") == (len(record.declined) >= failed)
    assert str(error.value).startswith("round 3: 3 rounds in a row without one valid update")
    assert sum(record.status == "failed" for record in records) == 3


def test_a_week_of_nothing_but_declining_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert strategy_module.MOST_PAUSES == 7 * 24 * 3600
    monkeypatch.setattr(strategy_module, "MOST_PAUSES", 3600.0)  # every round writes to the disk
    pauses: list[float] = []
    config = experiment(federation__cohort=4)
    grid = InProcessGrid(app_of(lambda number, time: "metered"), 8)
    with pytest.raises(FederationError) as error:
        run_federation(grid, config, tmp_path, initial=start_adapter(config), pause=pauses.append)
    assert str(error.value) == (
        "round 1: for 1 hours every device that was asked has declined; look at the limits in "
        "their node configs"
    )
    assert 3600 <= sum(pauses) < 3600 + 900
    assert read_checkpoint(tmp_path).state.round == 0


def test_a_stranger_that_declines_in_words_of_its_own_is_dropped_as_any_wrong_reply(
    tmp_path: Path,
) -> None:
    app = app_of(lambda number, time: None)

    class Talking(InProcessGrid):
        def replies(self, messages: Any) -> Any:
            for reply in super().replies(messages):
                train = reply.metadata.message_type == "train"
                if train and reply.metadata.src_node_id == 1003:
                    reply.content = OTHERS["another word"]
                yield reply

    config = experiment(federation__cohort=8, federation__rounds=1)
    _, (record,) = run(config, tmp_path, grid=Talking(app, 8))
    assert record.declined == ()
    assert [(d.client, d.reason[:30]) for d in record.dropped] == [
        ("c3", "client 'c3': expected a record")
    ]
