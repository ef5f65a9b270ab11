"""Client processes forked from a waiting one: one for each launch, and nothing is left over."""

from __future__ import annotations

import json
import os
import select
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedlora.federation import _flower_private as private
from fedlora.federation.deploy import prestarted
from fedlora.federation.deploy.superexec import sleep_until_woken
from fedlora.federation.deploy.supernode import Pace, SuperNodeWaits

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks client processes")


class Waiting:
    """A waiting process whose clients write what they got, and their own id, into a pipe."""

    def __init__(self) -> None:
        self.ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.reader, writer = os.pipe()
        self.pid = prestarted._fork()
        if self.pid == 0:
            self.ours.close()
            launch = prestarted.serve(theirs)
            os.write(writer, json.dumps([launch, os.getpid(), os.getppid()]).encode() + b"\n")
            os._exit(0)
        theirs.close()
        os.close(writer)

    def ask(self, launch: dict[str, Any]) -> Any:
        self.ours.send(json.dumps(launch).encode())
        assert select.select([self.reader], [], [], 10)[0], "no client process"
        return json.loads(os.read(self.reader, 1 << 16))


@pytest.fixture
def waiting() -> Iterator[Waiting]:
    process = Waiting()
    yield process
    process.ours.close()
    os.close(process.reader)


def test_each_launch_gets_a_process_of_its_own(waiting: Waiting) -> None:
    answers = [waiting.ask({"token": f"t{number}", "insecure": True}) for number in range(3)]
    assert [launch for launch, _, _ in answers] == [
        {"token": f"t{number}", "insecure": True} for number in range(3)
    ]
    assert len({pid for _, pid, _ in answers} | {waiting.pid}) == 4
    assert {parent for _, _, parent in answers} == {waiting.pid}
    waiting.ours.close()
    os.waitpid(waiting.pid, 0)


def test_the_waiting_process_ends_with_its_superexec_and_leaves_no_dead_ones(
    waiting: Waiting,
) -> None:
    _, pid, _ = waiting.ask({"token": "t"})
    for _ in range(200):  # reaped by its parent: its entry is gone, it is no zombie
        if not Path(f"/proc/{pid}").exists():
            break
        select.select([], [], [], 0.01)
    assert not Path(f"/proc/{pid}").exists()
    waiting.ours.close()
    assert os.waitpid(waiting.pid, 0)[1] == 0


def test_a_superexec_whose_waiting_process_is_gone_lets_flower_start_the_client(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(prestarted, "CLIENT_MODULES", ())
    monkeypatch.setattr(prestarted, "_fork", lambda: 1)  # only the SuperExec's side
    launch = prestarted.prestart()
    assert launch is not None
    assert not launch({"token": "t"})
    assert "the waiting process is gone" in caplog.text
    assert not launch({"token": "t"})


def test_elsewhere_than_on_linux_flower_starts_the_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert prestarted.prestart() is None


def test_a_superexec_sleeps_until_it_is_woken_and_plainly_once_the_pipe_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    reader, writer = os.pipe()
    sleep = sleep_until_woken(reader)
    os.write(writer, b"!!")
    sleep(60.0)  # would be stopped by the suite's time limit
    assert not select.select([reader], [], [], 0)[0]
    os.close(writer)
    sleep(60.0)
    assert slept == []
    sleep(60.0)
    assert slept == [60.0]
    os.close(reader)
    sleep_until_woken(None)(1.0)
    assert slept == [60.0, 1.0]


@pytest.mark.parametrize(
    ("quiet", "pause"), [(0.0, 0.2), (1.0, 0.2), (10.0, 1.0), (30.0, 3.0), (1e6, 3.0)]
)
def test_questions_become_rarer_and_never_rarer_than_flowers(quiet: float, pause: float) -> None:
    pace = Pace(0.2, 3.0, iter([5.0, 5.0 + quiet]).__next__)
    assert pace.pause() == pytest.approx(pause, rel=1e-12)


def test_a_supernode_wakes_its_superexec_once_a_message_and_asks_soon_after_it() -> None:
    now, slept, woken = [0.0], [], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    waits = SuperNodeWaits(lambda: woken.append(now[0]), sleep, lambda: now[0])
    now[0] = 100.0
    waits(3.0)  # nothing for a long time
    waits(0.5)  # a message: its client is at work
    waits(0.5)
    waits(3.0)  # answered; nothing more
    waits(0.5)  # the next one
    assert slept == pytest.approx([3.0, 0.05, 0.05, 0.2, 0.05], abs=1e-9)
    assert woken == pytest.approx([103.0, 103.3], abs=1e-9)


def test_a_flower_with_other_names_gets_its_supernode_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from fedlora.federation.deploy import supernode

    def moved(*_: object) -> None:
        raise AttributeError("no attribute 'time'")

    started: list[list[str]] = []
    monkeypatch.setattr(private, "with_sleep_in_supernode", moved)
    monkeypatch.setattr(private, "run_supernode", lambda: started.append(sys.argv[1:]))
    monkeypatch.setattr(sys, "argv", ["pytest"])
    supernode.main(["--insecure"])
    assert started == [["--insecure"]]
    assert "started as it is, and waits longer: no attribute 'time'" in caplog.text
