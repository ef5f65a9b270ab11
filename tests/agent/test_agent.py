"""The agent: what it commits, what it rejects, what it tells, and how it comes back."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedlora as fl
from fedlora.agent import Limits, Turn
from fedlora.agent.health import bucket_of, judge
from fedlora.agent.report import keep, report_bytes, send_kept
from fedlora.device.session import Session
from fedlora.errors import ConfigError, DataError, DownloadError, FormatError, StoreError
from fedlora.training import TrainConfig
from tests.agent.device import Fleet, make_fleet
from tests.matching import raises
from tests.ota.web import status


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    found = make_fleet(tmp_path)
    yield found
    found.web.close()


def served(fleet: Fleet) -> int | None:
    entry = fleet.world.store.status().installed
    return None if entry is None else entry.release


def test_a_better_release_is_tried_committed_and_served(fleet: Fleet) -> None:
    agent = fleet.agent()
    session, probe = agent.session(), fleet.data.train.inputs[:5]
    assert agent.update().outcome == "nothing"
    base = session.run(probe)

    fleet.publish(0.5)
    turn = agent.update()
    assert (turn.outcome, turn.release, served(fleet)) == ("committed", 1, 1)
    health = turn.health
    assert health is not None
    assert health.loss_before is not None
    assert health.loss_after is not None
    assert health.loss_after < 0.9 * health.loss_before
    assert (health.bucket, health.examples) == ("much-better", 80)
    assert turn.personalized is None  # nobody asked for one
    # The session that serves has it; it was not swapped while the release was on trial.
    assert not np.array_equal(session.run(probe), base)
    assert session.adapter is not None
    assert session.adapter == fleet.adapter(0.5)
    assert agent.session() is session

    assert agent.update().outcome == "nothing"
    assert agent.log.read()[-1]["event"] == "committed"


def test_a_release_that_is_worse_here_is_rejected_for_good(fleet: Fleet) -> None:
    fleet.publish(0.5)
    fleet.agent().update()
    fleet.publish(-0.5)
    turn = fleet.agent().update()
    assert (turn.outcome, turn.release, served(fleet)) == ("rejected", 2, 1)
    assert turn.health is not None
    assert turn.health.bucket == "much-worse"
    assert "held-out loss" in turn.reason
    assert fleet.agent().update().outcome == "nothing"
    assert fleet.world.store.status().rejected == (2,)

    fleet.publish(0.6)
    assert fleet.agent().update().release == 3


def test_the_margin_and_the_least_number_of_examples_decide(fleet: Fleet) -> None:
    fleet.publish(0.5)
    fleet.agent().update()
    fleet.publish(0.4)  # a little worse
    losses = fleet.agent(limits=Limits(margin=10.0, slower=1e6)).update().health
    assert losses is not None
    assert losses.healthy
    assert losses.loss_after > losses.loss_before  # type: ignore[operator]
    fleet.publish(-0.5)
    few = Limits(min_examples=81, slower=1e6)
    assert fleet.agent(limits=few).update().outcome == "committed"


@pytest.mark.parametrize("share", [1e36, 1e20])
def test_outputs_that_are_not_finite_are_never_committed(fleet: Fleet, share: float) -> None:
    """Either a factor overflows once its scaling is multiplied in, or the products do."""
    layers = {
        path: fl.LoraLayer(layer.A * np.float32(1e20), layer.B * np.float32(share), 1.0)
        for path, layer in fleet.adapter(1.0).layers.items()
    }
    adapter = fl.Adapter(layers, fleet.adapter(1.0).config, fleet.made.manifest.base)
    fl.save_adapter(adapter, fleet.world.folder / "big.safetensors")
    fleet.world.publisher.publish(fleet.world.folder / "big.safetensors")
    turn = fleet.agent(data=None).update()
    assert turn.outcome == "rejected"
    assert "finite" in turn.reason
    assert turn.health is not None
    assert turn.health.bucket == "broken"
    assert served(fleet) is None


def test_a_release_that_is_too_slow_is_rejected(fleet: Fleet) -> None:
    session, old, new = Session(fleet.made.folder), fleet.adapter(0.5), fleet.adapter(0.9)
    probe = fleet.data.train.inputs[:4]
    now = [0.0]

    def clock() -> float:
        return now[0]

    run = session.run

    def slow(inputs: Any) -> Any:
        now[0] += 0.03 if session.adapter is new else 0.01
        return run(inputs)

    session.run = slow  # type: ignore[method-assign]
    found = judge(session, old, new, probe, None, Limits(slower=2.5), clock=clock)
    assert not found.healthy
    assert found.reason == "a run takes 30.0 ms, expected at most 2.5 times the 10.0 ms of now"
    assert judge(session, old, new, probe, None, Limits(slower=3.0), clock=clock).healthy
    assert judge(session, new, old, probe, None, Limits(slower=1.0), clock=clock).healthy


def test_without_data_a_release_is_judged_without_a_loss(fleet: Fleet) -> None:
    def unreadable(bundle: Any) -> Any:
        raise DataError("messages.txt: expected a file, found none")

    fleet.publish(-0.5)
    turn = fleet.agent(data=unreadable).update()
    assert turn.outcome == "committed"
    assert turn.health is not None
    assert (turn.health.bucket, turn.health.loss_after) == ("unknown", None)
    assert [row["event"] for row in fleet.agent().log.read()] == ["no-data", "committed"]


def test_a_base_that_computes_something_else_stops_everything(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlora.agent.health.drift", lambda session, canaries: float("nan"))
    fleet.publish(0.5)
    agent = fleet.agent()
    with raises(FormatError, "expected the base to compute what it did"):
        agent.update()
    found = fleet.world.store.status()
    # It is not the release's fault: staged still, no trial counted, none rejected.
    assert (found.tries, found.rejected, served(fleet)) == (0, (), None)
    assert found.pending is not None
    assert agent.log.read()[-1]["error"] == "FormatError"
    monkeypatch.undo()
    assert agent.update().outcome == "committed"


def test_three_starts_without_a_verdict_revert_by_themselves(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    fleet.publish(0.5)
    fleet.agent().update()
    fleet.publish(0.9)
    with monkeypatch.context() as patched:
        patched.setattr("fedlora.agent.agent.judge", die)
        for tries in (1, 2, 3):
            with pytest.raises(Killed):
                fleet.agent().update()
            assert (fleet.world.store.status().tries, served(fleet)) == (tries, 1)
    turn = fleet.agent().update()  # the fourth start does not try it
    assert (turn.outcome, served(fleet)) == ("rejected", 1)
    assert "3 trials" in turn.reason
    assert fleet.agent().update().outcome == "nothing"


def test_the_personal_adapter_is_trained_anew_on_a_new_global_one(fleet: Fleet) -> None:
    fleet.publish(0.2)
    first = fleet.agent(personalize=True).update()
    assert first.personalized is not None
    assert first.personalized.kept
    store = fleet.world.store
    old = store.personal_adapter()
    fleet.publish(0.9)
    turn = fleet.agent().update()  # there is one now, so nobody has to ask
    assert turn.outcome == "committed"
    assert turn.personalized is not None
    assert turn.personalized.kept
    assert turn.personalized.after["loss"] < turn.personalized.before["loss"]
    found = store.status()
    assert found.personal is not None
    assert found.installed is not None
    assert (found.personal.stale, found.personal.started_from) == (
        False, found.installed.fingerprint,
    )  # fmt: skip
    assert store.personal_adapter() != old
    # The global adapter was compared with the global one: beside the personal one it was worse.
    assert turn.health is not None
    assert turn.health.loss_after is not None
    assert turn.health.loss_after > turn.personalized.after["loss"]


def test_a_training_that_did_not_help_is_not_done_again(fleet: Fleet) -> None:
    fleet.publish(0.9)
    hopeless = TrainConfig(local_steps=1, learning_rate=1e-12, batch_size=4)
    first = fleet.agent(personalize=True, training=hopeless).update()
    assert first.personalized is not None
    assert not first.personalized.kept
    # Another process, the same global adapter.
    assert fleet.agent(personalize=True, training=hopeless).update().personalized is None
    fleet.publish(0.95)
    assert fleet.agent(personalize=True).update().personalized is not None


def test_republishing_brings_everyone_back_also_who_liked_the_bad_one(fleet: Fleet) -> None:
    fleet.publish(0.2)
    fleet.agent().update()
    fleet.publish(0.9)  # much better here, and worse elsewhere
    fleet.agent().update()
    fleet.world.publisher.halt(2)
    fleet.world.publisher.republish(1)
    turn = fleet.agent().update()
    assert (turn.outcome, turn.release) == ("committed", 3)
    assert turn.health is not None
    assert turn.health.bucket == "much-worse"  # it says so, and follows
    assert fleet.world.store.global_adapter() == fleet.adapter(0.2)
    # A device that never had the bad one has the old digest already: no trial, no download.
    assert turn.received < 20_000


def test_who_skipped_the_good_release_comes_back_too(fleet: Fleet) -> None:
    fleet.publish(0.2, rollout=0.0)
    fleet.publish(0.9)
    fleet.agent().update()
    assert served(fleet) == 2
    fleet.world.publisher.halt(2)
    fleet.world.publisher.republish(1)
    assert fleet.agent().update().outcome == "committed"
    assert fleet.world.store.global_adapter() == fleet.adapter(0.2)


def test_the_served_adapter_as_a_newer_release_is_not_tried(fleet: Fleet) -> None:
    fleet.publish(0.5)
    fleet.agent().update()
    fleet.world.publisher.republish(1)
    fleet.web.forget()
    turn = fleet.agent(limits=Limits(margin=0.0)).update()
    assert (turn.outcome, turn.release) == ("committed", 2)
    assert not [path for path in fleet.web.paths() if path.endswith(".safetensors")]


def test_a_poll_without_news_is_two_small_requests(fleet: Fleet) -> None:
    fleet.publish(0.5)
    agent = fleet.agent()
    agent.update()
    fleet.web.forget()
    turn = agent.update()
    assert turn.outcome == "nothing"
    assert len(fleet.web.log) == turn.requests == 2
    print("a poll without news", fleet.web.sent, fleet.web.received)
    assert fleet.web.sent + fleet.web.received <= 3000  # with all headers, both directions


def test_a_second_agent_is_refused_with_words(fleet: Fleet) -> None:
    agent, other = fleet.agent(), fleet.agent()
    with agent.alone(), raises(StoreError, "another agent keeps this device up to date already"):
        other.update()
    assert other.update().outcome == "nothing"


def test_it_runs_until_it_is_stopped_and_survives_failures(fleet: Fleet) -> None:
    stop, seen = threading.Event(), []
    fleet.web.rules["metadata/timestamp.json"] = status(500)

    def watch(turn: Any) -> None:
        seen.append(turn)
        fleet.web.rules.clear()
        if isinstance(turn, Turn):
            stop.set()

    agent = fleet.agent()
    agent.run(every=0.01, stop=stop, on_turn=watch)
    assert isinstance(seen[0], DownloadError)
    assert [turn.outcome for turn in seen[1:]] == ["nothing"]
    assert agent.log.read()[0]["event"] == "failed"


# Reports.


def listen() -> tuple[str, list[bytes], threading.Thread]:
    """Take one connection, keep every byte of its request, and answer 204."""
    server = socket.create_server(("127.0.0.1", 0))
    found: list[bytes] = []

    def take() -> None:
        connection, _ = server.accept()
        with connection, server:
            data = b""
            while b"\r\n\r\n" not in data or not data.endswith(b"}"):
                data += connection.recv(4096)
            found.append(data)
            connection.sendall(b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n")

    thread = threading.Thread(target=take)
    thread.start()
    return f"127.0.0.1:{server.getsockname()[1]}", found, thread


def test_a_report_is_these_bytes_and_no_others(fleet: Fleet) -> None:
    host, found, thread = listen()
    fleet.publish(0.5)
    fleet.agent(report=f"http://{host}/reports").update()
    thread.join(5)
    body = b'{"healthy":true,"metric":"much-better","version":1}'
    assert found == [
        b"POST /reports HTTP/1.1\r\nHost: " + host.encode() + b"\r\n"
        b"Content-Type: application/json\r\nContent-Length: " + str(len(body)).encode()
        + b"\r\n\r\n" + body
    ]  # fmt: skip


def test_nothing_is_reported_unless_the_owner_says_where(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlora.agent.agent.send_kept", lambda *_: pytest.fail("sent"))
    fleet.publish(0.5)
    fleet.agent().update()
    assert not (fleet.world.store.cache / "agent" / "report.json").exists()


def test_a_report_that_could_not_be_sent_is_sent_with_the_next_turn(fleet: Fleet) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    server.close()
    fleet.publish(-0.5)
    agent = fleet.agent(report=f"http://127.0.0.1:{port}/")
    assert agent.update().outcome == "rejected"  # the update does not depend on it
    assert agent.log.read()[-1]["event"] == "report-not-sent"
    host, found, thread = listen()
    assert fleet.agent(report=f"http://{host}/").update().outcome == "nothing"
    thread.join(5)
    assert found[0].endswith(b'{"healthy":false,"metric":"much-worse","version":1}')
    assert not (fleet.world.store.cache / "agent" / "report.json").exists()


def test_what_somebody_wrote_into_the_kept_report_is_not_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[bytes] = []
    monkeypatch.setattr("fedlora.agent.report.send", lambda url, body: sent.append(body))
    path = tmp_path / "report.json"
    for odd in (b"{", b'{"version":"secret","healthy":true,"metric":"same"}',
                b'{"version":1,"healthy":true,"metric":"my messages"}'):  # fmt: skip
        keep(path, odd)
        assert send_kept("http://h/", path)
    keep(path, b'{"version":1,"healthy":true,"metric":"same","more":"secret"}')
    send_kept("http://h/", path)
    assert sent == [report_bytes(1, True, "same")]
    assert not send_kept("http://h/", path)


@pytest.mark.parametrize("url", ["ftp://h/", "http:///x", "reports", "http://user:pw@h/"])
def test_a_place_for_reports_must_be_a_plain_url(fleet: Fleet, url: str) -> None:
    with raises(ConfigError, "report: expected a URL"):
        fleet.agent(report=url)


@pytest.mark.parametrize(
    ("before", "after", "word"),
    [
        (1.0, 1.009, "same"), (1.0, 0.991, "same"), (1.0, 1.02, "worse"), (1.0, 1.06, "much-worse"),
        (1.0, 0.98, "better"), (1.0, 0.5, "much-better"), (1.0, None, "unknown"),
        (None, 1.0, "unknown"), (1.0, float("inf"), "broken"),
    ],
)  # fmt: skip
def test_a_loss_becomes_one_of_seven_words(
    before: float | None, after: float | None, word: str
) -> None:
    assert bucket_of(before, after) == word


# The log.


def test_the_log_stays_small_and_keeps_the_newest(fleet: Fleet) -> None:
    log = fleet.agent().log
    log.max_bytes = 2000
    for number in range(200):
        log.add("event", number=number, text="x" * 5000 if number == 199 else "")
    rows = log.read()
    assert log.path.stat().st_size <= 2000
    assert rows[-1]["number"] == 199
    assert len(rows[-1]["text"]) == 500
    numbers = [row["number"] for row in rows]
    assert numbers == list(range(numbers[0], 200))
    assert log.path.stat().st_mode & 0o777 == 0o600


def test_forgetting_erases_the_log_too(fleet: Fleet) -> None:
    fleet.publish(0.5)
    agent = fleet.agent(personalize=True)
    agent.update()
    assert agent.log.read()
    assert fleet.world.store.forget()
    assert not agent.log.path.exists()
    assert fleet.agent().update().outcome == "nothing"


def test_a_torn_line_of_the_log_is_passed_over(fleet: Fleet) -> None:
    log = fleet.agent().log
    log.add("first")
    with log.path.open("ab") as file:
        file.write(b'{"time": "20')
    log.add("second")
    assert [row["event"] for row in log.read()] == ["first", "second"]
    assert [row["event"] for row in log.read(1)] == ["second"]
    assert json.loads(log.path.read_bytes().splitlines()[0])["time"].endswith("Z")


def test_limits_that_make_no_sense_are_refused() -> None:
    with raises(ConfigError, "agent: slower: expected a number of at least 1, found 0.5"):
        Limits(slower=0.5)
    with raises(ConfigError, "agent: margin: expected a number of at least 0, found nan"):
        Limits(margin=float("nan"))
