"""Where a round's time goes: each second belongs to one phase."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlora.federation import RoundRecord, read_rounds, round_words
from fedlora.federation.checkpoint import Dropped
from fedlora.federation.phases import PHASES, PhaseClock, slowest_and_median
from tests.federation.fakes import experiment, run


class Watch:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def taking(self, seconds: float, items: Any) -> Any:
        for item in items:
            self.now += seconds
            yield item


def test_time_inside_a_phase_is_not_counted_twice() -> None:
    watch = Watch()
    clock = PhaseClock(save=7.0, clock=watch)
    watch.now += 1  # drawing the cohort
    messages = clock.within("prepare", watch.taking(2, "abc"))
    clock.enter("send")
    watch.now += 0.5
    clock.enter("aggregate")
    # A lazy grid reads a message and computes its reply when the next reply is asked for.
    for _ in clock.within("wait", watch.taking(10, messages)):
        watch.now += 3
    assert clock.seconds() == {
        "prepare": 1 + 3 * 2, "send": 0.5, "wait": 3 * 10, "aggregate": 3 * 3, "save": 7.0,
    }  # fmt: skip


def test_the_phases_of_a_run_add_up_and_clients_tell_their_seconds(tmp_path: Path) -> None:
    run(experiment(), tmp_path)
    for record in read_rounds(tmp_path):
        assert tuple(record.phases) == PHASES
        parts = sum(record.phases[phase] for phase in PHASES if phase != "save")
        assert parts == pytest.approx(record.seconds, abs=1e-6)  # which is rounded to that
        assert 0 <= record.clients["median"] <= record.clients["slowest"] < 60
    first, second, _ = read_rounds(tmp_path)
    assert first.phases["save"] == 0 < second.phases["save"]


def test_a_line_says_what_there_is_to_say() -> None:
    record = RoundRecord(3, "updated", ("a", "b"), 0.41, 3.21, 5, 6)
    assert round_words(record) == "loss 0.4100 3.2 s"
    phases, clients = {"wait": 2.61}, slowest_and_median([1.5, 0.5, 0.9])
    assert clients == {"slowest": 1.5, "median": 0.9}
    record = RoundRecord(3, "updated", ("a", "b"), 0.41, 3.21, 5, 6, phases=phases, clients=clients)
    assert round_words(record) == "loss 0.4100 3.2 s (wait 2.6, clients 0.9)"
    lost = (Dropped("b", "gone"),)
    record = RoundRecord(3, "failed", ("b",), None, 3.21, 5, 6, lost, phases=phases, late=2)
    assert round_words(record) == "3.2 s (wait 2.6) 1 dropped 2 late"
    assert slowest_and_median([]) == {}
    # An epsilon that is shown is never less than the round's.
    record = RoundRecord(3, "updated", ("a",), None, 3.21, 5, 6, epsilon=8.0001)
    assert round_words(record) == "epsilon 8.01 3.2 s"
