"""The ClientApp as it is shipped declines before anything is opened, and always says who it is."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest
from flwr.app import Context, RecordDict

import clients.app
from fedlora.federation._flower_private import identify_process
from fedlora.federation.limits import read_declined
from tests.federation.fakes import FakeTrainer
from tests.federation.test_client import query_message, train_message

identify_process()


def other_hours() -> str:
    """An hour of the day that begins in two hours."""
    start = datetime.now() + timedelta(hours=2)
    return f"{start.hour}-{(start + timedelta(hours=1)).hour}"


def context(**node_config: Any) -> Context:
    config = {key.replace("_", "-"): value for key, value in node_config.items()}
    return Context(run_id=1, node_id=1001, node_config=config, state=RecordDict(), run_config={})


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []

    def fake(setup: Any, context: Context) -> FakeTrainer:
        found.append("opened")
        return FakeTrainer(1, 17)

    monkeypatch.setattr(clients.app, "_open", fake)
    return found


def test_a_device_declines_before_base_and_data_are_opened(opened: list[str]) -> None:
    reply = clients.app.app(train_message(), context(hours=other_hours()))
    assert read_declined(reply.content) == "hours"
    assert opened == []


def test_a_device_that_may_not_train_says_who_it_is(opened: list[str]) -> None:
    reply = clients.app.app(query_message(), context(hours=other_hours()))
    assert reply.content["client"]["client_id"] == "c1"


def test_examples_are_counted_once_the_data_is_open(opened: list[str]) -> None:
    reply = clients.app.app(train_message(), context(min_examples=18))
    assert read_declined(reply.content) == "examples"
    assert opened == ["opened"]
    reply = clients.app.app(train_message(), context(min_examples=17))
    assert set(reply.content) == {"factors", "layout", "metrics"}


def test_a_limit_that_cannot_be_understood_is_an_error_and_nothing_is_trained(
    opened: list[str],
) -> None:
    reply = clients.app.app(train_message(), context(min_battery="half"))
    assert reply.error.reason == (
        "ConfigError: node config min-battery: expected a number from 0 to 100, found 'half'"
    )
    assert opened == []
