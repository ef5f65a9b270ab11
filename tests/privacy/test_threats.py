"""Who could learn what: the sentences follow from the run's facts."""

from __future__ import annotations

from fedlora.privacy.threats import Facts, threats


def said(facts: Facts, who: str) -> tuple[str, str]:
    (found,) = (threat for threat in threats(facts) if threat.who == who)
    return " ".join(found.learns), " ".join(found.does_not)


def test_a_plain_run_shows_the_server_every_update_and_its_inputs() -> None:
    learns, _ = said(Facts(uploaded={"A", "B"}), "server")
    assert "Each client's update in every round, in clear." in learns
    assert "the input of the adapted layer itself, exactly" in learns
    assert "without any limit" in said(Facts(uploaded={"A", "B"}), "another client")[0]


def test_a_frozen_a_shows_a_part_of_the_input() -> None:
    learns, _ = said(Facts(uploaded={"B"}), "server")
    assert "as the frozen A lets it through" in learns
    assert "exactly" not in learns


def test_central_noise_does_not_hide_updates_from_the_server() -> None:
    facts = Facts(uploaded={"B"}, mechanism="central", epsilon=7.94, delta=1e-5)
    learns, _ = said(facts, "server")
    assert "it has to be trusted" in learns
    assert "epsilon 7.94 at delta 1e-05" in said(facts, "another client")[0]


def test_secure_aggregation_leaves_the_sum() -> None:
    facts = Facts(uploaded={"A", "B"}, mechanism="central", epsilon=3.0, secure_aggregation=True)
    learns, does_not = said(facts, "server")
    assert "The sum of each cohort's updates, before any noise" in learns
    assert "Any single update" in does_not
    assert "in clear" not in learns


def test_local_noise_is_there_before_the_server() -> None:
    facts = Facts(uploaded={"A"}, mechanism="local", epsilon=20.0, delta=1e-6)
    learns, _ = said(facts, "server")
    assert "From each update, no more than epsilon 20 at delta 1e-06" in learns
    assert "in clear" not in learns


def test_a_thief_gets_what_is_personal() -> None:
    facts = Facts(uploaded={"A"}, kept={"B"}, mechanism="central", epsilon=1.0)
    learns, _ = said(facts, "thief of the device")
    assert "no budget covers it" in learns
    assert "private factors B" in learns
    assert "personal adapter" not in said(Facts(uploaded={"A"}, personalized=False),
                                          "thief of the device")[0]  # fmt: skip
    assert "The factors B" in said(facts, "server")[1]
