"""A whole private simulation: what it promises is in every place where a reader looks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from fedlora.federation import read_checkpoint, read_rounds
from fedlora.privacy.ledger import Ledger
from fedlora.simulation import simulate
from fedlora.simulation.cohort_grid import CohortGrid
from tests.simulation.small import PEOPLE, config


def private(**overrides: object) -> object:
    return config(
        federation__weights="equal",
        federation__sampling="poisson",
        personalization__steps=2,
        privacy={"clipping_norm": 0.5, "noise_multiplier": 1.0},
        **overrides,
    )


@pytest.mark.parametrize("kind", ["cohort", "sequential"])
def test_a_private_simulation_says_its_guarantee(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[str]] = []
    replies = CohortGrid.replies

    def look(self: CohortGrid, messages: object) -> object:
        for reply in replies(self, messages):
            seen.append(set(reply.content))
            yield reply

    monkeypatch.setattr(CohortGrid, "replies", look)
    done = simulate(private(engine__kind=kind), out=tmp_path / "run")
    if kind == "cohort":
        assert {"client"} in seen
        assert all(records in ({"client"}, {"factors", "layout"}) for records in seen)
    records = read_rounds(tmp_path / "run")
    assert [record.loss for record in records] == [None] * 3
    privacy = done.summary["privacy"]
    assert privacy["epsilon"] == pytest.approx(records[-1].epsilon, abs=1e-6)
    assert (privacy["unit"], privacy["sampling"], privacy["rounds"]) == ("user", "poisson", 3)
    assert privacy["sampling_probability"] == pytest.approx(8 / PEOPLE)
    assert "for each person (user), add-or-remove-one" in done.table()
    assert "outside the guarantee" in done.table()
    assert len(done.clients) == PEOPLE
    assert [line.round for line in Ledger.read(tmp_path / "run").lines] == [1, 2, 3]


def test_both_engines_release_the_same_but_for_the_order_of_sums(tmp_path: Path) -> None:
    """The noise depends on the exact sum; with next to none the engines can be compared."""
    adapters = []
    for kind in ("cohort", "sequential"):
        out = tmp_path / kind
        (out / "checkpoint").mkdir(parents=True)
        (out / "checkpoint" / "noise.key").write_bytes(bytes(32))
        (out / "checkpoint" / "noise.key").chmod(0o600)
        from fedlora.simulation.rounds import run_rounds

        tiny = config(
            engine__kind=kind,
            federation__weights="equal",
            privacy={"clipping_norm": 0.5, "noise_multiplier": 1e-9, "accountant": "rdp"},
        )
        adapters.append(run_rounds(tiny, out, PEOPLE).state.trainable)
    for path in adapters[0]:
        np.testing.assert_allclose(adapters[0][path].B, adapters[1][path].B, atol=1e-6)


def test_own_takes_the_steps_that_clients_do_not_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules[simulate.__module__]
    asked: dict[str, int] = {}
    evaluate = module.evaluate_clients

    def look(*args: object, took_part: object, **others: object) -> object:
        asked.update({client.client_id: client.steps for client in took_part})
        return evaluate(*args, took_part=took_part, **others)

    monkeypatch.setattr(module, "evaluate_clients", look)
    simulate(private(), out=tmp_path)
    told = {client.client_id: client for client in read_checkpoint(tmp_path).clients}
    for number in range(PEOPLE):
        # Two passes over 1 + number examples in batches of four, for each of its rounds.
        name = f"c{number:02}"
        assert told[name].steps == 0
        assert asked[name] == told[name].rounds * 2 * -(-(1 + number) // 4)


def test_of_a_person_with_many_copies_one_is_evaluated(tmp_path: Path) -> None:
    more = private(data__clients=20, personalization__every_copy=False, federation__rounds=1)
    done = simulate(more, out=tmp_path)
    ids = [row["client"] for row in done.clients]
    people = {client.client_id.partition("#")[0] for client in read_checkpoint(tmp_path).clients}
    assert len(ids) == len({name.partition("#")[0] for name in ids}) == len(people)
    notes = json.loads((tmp_path / "summary.json").read_text())
    assert (
        f"{20 - len(people)} copies of people are not evaluated: one of each is"
        in (notes["extra"]["notes"])
    )
    assert f"20 virtual users are copies of {len(people)} people" in notes["privacy"]["notes"][0]
