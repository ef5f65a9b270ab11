"""The last stage of a run on devices: what is asked, what comes back, and what the folder gets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from fedlora.aggregation import Broadcast
from fedlora.errors import ConfigError, FederationError, NonFiniteError, RunError, UnsupportedError
from fedlora.experiment import ExperimentConfig
from fedlora.federation import read_checkpoint
from fedlora.federation._flower_private import identify_process
from fedlora.federation.client import handle_evaluate
from fedlora.federation.evaluate import (
    EvaluateOrder,
    EvaluateTask,
    answer_scores,
    decode_scores,
    evaluate_content,
    read_evaluate,
)
from fedlora.federation.folder import read_rows
from fedlora.federation.guard import check_scores
from fedlora.federation.person import compare_adapters
from fedlora.federation.records import BOTH, ClientSetup, encode_adapter, to_record
from fedlora.federation.results import run_table
from fedlora.formats import load_adapter
from fedlora.simulation.grid import InProcessGrid
from fedlora.training import TrainConfig
from tests.federation.fakes import (
    FakeTrainer,
    FaultyGrid,
    experiment,
    fake_app,
    raises,
    run,
    start_adapter,
)

identify_process()
SCORES = {
    adapter: {"loss": 1.0 - k / 8, "accuracy": k / 8}
    for k, adapter in enumerate(("base", "own", "global", "personal"))
}


def staged(config: ExperimentConfig, out: Path, **options: Any) -> dict[str, Any]:
    run(config, out, evaluate=True, **options)
    return json.loads((out / "summary.json").read_text())


def test_the_folder_is_that_of_a_simulation(tmp_path: Path) -> None:
    config = experiment(data__held_out_clients=0.25, personalization__steps=7)
    summary = staged(config, tmp_path)
    state = read_checkpoint(tmp_path).state
    for name in ("adapter", "adapter.safetensors"):
        assert load_adapter(tmp_path / name) == state.adapter
    assert ExperimentConfig.from_toml(tmp_path / "experiment.toml") == config
    rows = read_rows(tmp_path / "clients.jsonl")
    assert [row["client"] for row in rows] == [f"c{k}" for k in range(8)]
    assert {row["global"] for row in rows} == {state.adapter.fingerprint()}
    assert sum(row["held_out"] for row in rows) == 2
    assert (summary["clients"], summary["extra"]["held_out_clients"]) == (6, 2)
    assert (summary["metric"], summary["higher_is_better"]) == ("accuracy", True)
    assert summary["base"]["mean"] == 0  # of B alone, which is zero
    assert 0 < summary["global"]["mean"] < summary["personal"]["mean"]
    assert summary["seconds"] >= rows[-1]["seconds"] > 0
    table = run_table(tmp_path).splitlines()
    assert table[0].startswith("6 clients")
    assert table[6].startswith("2 held-out clients")


def test_a_summary_has_the_keys_of_a_simulations(tmp_path: Path) -> None:
    documented = {
        "name", "metric", "higher_is_better", "clients", "rounds", "base", "own", "global",
        "personal", "held_out", "share_improved", "bytes_up", "bytes_down", "seconds", "seed",
        "fedlora_version", "privacy", "extra",
    }  # fmt: skip
    assert staged(experiment(federation__rounds=1), tmp_path).keys() == documented


def test_own_takes_the_steps_of_the_rounds_and_of_the_personalization(tmp_path: Path) -> None:
    trainers = {k: FakeTrainer(k) for k in range(4)}
    config = experiment(personalization__steps=7, federation__cohort=2)
    staged(config, tmp_path, trainers=trainers, clients=4)
    for client in read_checkpoint(tmp_path).clients:
        trained = trainers[int(client.client_id[1:])].trained
        assert client.steps == 5 * client.rounds == 5 * (len(trained) - 2)
        assert (trained["own"], trained["personal"]) == (client.steps + 7, 7)


def test_without_steps_the_personal_adapter_is_the_global_one(tmp_path: Path) -> None:
    """The fake moves at each call, so that a trainer of no steps stands in here."""

    class Idle(FakeTrainer):
        def train(self, broadcast: Any, config: Any, *rest: Any) -> Any:
            result = super().train(broadcast, config, *rest)
            return result if result.steps else replace(result, adapter=broadcast.trainable)

    trainers = {k: Idle(k) for k in range(8)}
    summary = staged(experiment(personalization__steps=0), tmp_path, trainers=trainers)
    assert summary["personal"] == summary["global"] != summary["base"]


def test_rows_that_are_there_are_not_asked_for_again(tmp_path: Path) -> None:
    asked: list[str] = []

    def fault(reply: Message, client: str) -> list[Message]:
        if reply.metadata.message_type == "evaluate":
            asked.append(client)
        return [reply]

    whole = staged(experiment(), tmp_path / "whole", grid=FaultyGrid(fault))
    assert len(asked) == 8
    file = tmp_path / "whole" / "clients.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:3]) + lines[3][:20])  # killed in the middle of a row
    (tmp_path / "whole" / "summary.json").unlink()
    asked.clear()
    again = staged(experiment(), tmp_path / "whole", grid=FaultyGrid(fault))
    assert asked == [f"c{k}" for k in range(3, 8)]
    timeless = {"seconds": 0}
    assert again | timeless == whole | timeless
    asked.clear()
    longer = staged(experiment(federation__rounds=4), tmp_path / "whole", grid=FaultyGrid(fault))
    assert (len(asked), longer["rounds"]) == (8, 4)
    assert len(read_rows(file)) == 8


def test_a_client_that_fails_is_noted_and_asked_again(tmp_path: Path) -> None:
    def fault(reply: Message, client: str) -> list[Message]:
        if reply.metadata.message_type != "evaluate":
            return [reply]
        if client == "c2":
            return []
        if client == "c3":
            reply.content = RecordDict({"declined": ConfigRecord({"reason": "battery"})})
        if client == "c4":
            reply.content["scores"]["personal.loss"] = float("nan")
        return [reply, reply]

    def diverges(result: Any, round: Any) -> Any:
        if round == "own":
            raise NonFiniteError("step 3: expected a finite loss")
        return result

    app = fake_app({5: FakeTrainer(5, 15, change=diverges)})

    class Grid(FaultyGrid):
        def __init__(self) -> None:
            super().__init__(fault)
            self._app = app

    summary = staged(experiment(), tmp_path, grid=Grid())
    reasons = [
        "client 'c3': declined: battery",
        "client 'c4': personal.loss: expected a number from 0 to 1e+305, found nan",
        "client 'c5': NonFiniteError: step 3: expected a finite loss",
        "client 'c2': no reply in time",
    ]
    rows = read_rows(tmp_path / "clients.jsonl")
    assert [row["failed"] for row in rows if "failed" in row] == reasons
    assert sorted(summary["extra"]["notes"]) == sorted(f"not in the means: {r}" for r in reasons)
    assert summary["clients"] == 4
    again = staged(experiment(), tmp_path)
    assert (again["clients"], again["extra"]["notes"]) == (8, [])
    assert len(read_rows(tmp_path / "clients.jsonl")) == 8


def test_a_client_that_is_gone_is_noted(tmp_path: Path) -> None:
    run(experiment(), tmp_path)
    summary = staged(experiment(), tmp_path, clients=6)
    assert summary["extra"]["notes"][-2:] == [
        "not in the means: client 'c6': not connected",
        "not in the means: client 'c7': not connected",
    ]


def test_a_client_without_held_out_examples_takes_part_and_has_no_row_of_scores(
    tmp_path: Path,
) -> None:
    trainers = {3: FakeTrainer(3, 13, parts=())}
    summary = staged(experiment(), tmp_path, trainers=trainers)
    assert summary["clients"] == 7
    assert summary["extra"]["notes"] == ["1 clients without held-out examples are not evaluated"]
    assert read_rows(tmp_path / "clients.jsonl")[3]["untested"]


def test_when_nobody_answers_the_adapter_is_there_all_the_same(tmp_path: Path) -> None:
    def fault(reply: Message, client: str) -> list[Message]:
        return [] if reply.metadata.message_type == "evaluate" else [reply]

    with raises(
        FederationError,
        "none of 8 clients has results of its adapters: client 'c0': no reply in time; the global "
        f"adapter is in {tmp_path}, and starting the run again asks them again",
    ):
        staged(experiment(), tmp_path, grid=FaultyGrid(fault))
    assert load_adapter(tmp_path / "adapter") == read_checkpoint(tmp_path).state.adapter
    with pytest.raises(RunError, match="no results of a finished run"):
        run_table(tmp_path)
    assert staged(experiment(), tmp_path)["clients"] == 8


def test_mixed_is_refused_before_the_rounds_and_on_the_device(tmp_path: Path) -> None:
    text = (
        "personalization.kind: expected 'personal' on devices, found 'mixed', which needs both "
        "adapters in every request"
    )
    with raises(ConfigError, f"{text}; change it, or simulate this experiment"):
        staged(experiment(personalization__kind="mixed"), tmp_path)
    assert list(tmp_path.iterdir()) == []
    with raises(UnsupportedError, text):
        compare_adapters(task(kind="mixed"), FakeTrainer(1))


def order(**changes: Any) -> EvaluateOrder:
    return replace(EvaluateOrder(3, 0, TrainConfig(local_steps=2), 9, "test", "fedit"), **changes)


def task(**changes: Any) -> EvaluateTask:
    config = experiment()
    sent = start_adapter(config)
    return EvaluateTask(ClientSetup.of(config), order(**changes), Broadcast(sent), sent)


def message(changed: EvaluateOrder | None = None, **setup: Any) -> Message:
    config = experiment(**setup)
    content = evaluate_content(
        to_record(ClientSetup.of(config)),
        to_record(changed or order()),
        encode_adapter(start_adapter(config), BOTH, 3),
    )
    return Message(content, 1001, "evaluate")


def test_a_reply_holds_declared_measures_and_nothing_else() -> None:
    reply = handle_evaluate(message(federation__weights="equal"), lambda setup: FakeTrainer(1, 77))
    assert set(reply.content) == {"scores"}
    assert set(reply.content["scores"]) == {
        f"{adapter}.{measure}"
        for adapter in ("base", "own", "global", "personal")
        for measure in ("loss", "accuracy")
    }
    assert 77.0 not in reply.content["scores"].values()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (
            RecordDict({"scores": MetricRecord({"global.secret": 1.0})}),
            "refused to send 'global.secret' in the scores: only ",
        ),
        (
            RecordDict({"scores": MetricRecord({"num-examples": 3})}),
            "refused to send 'num-examples' in the scores: only ",
        ),
        (
            RecordDict({"scores": MetricRecord({"global.loss": [1.0, 2.0]})}),
            "refused to send score 'global.loss': it is not one number",
        ),
        (
            RecordDict({"scores": MetricRecord({}), "text": ConfigRecord({"a": "b"})}),
            "refused to send 'text' in the reply: only scores may leave this client",
        ),
    ],
)
def test_the_guard_stops_what_is_not_declared(content: RecordDict, text: str) -> None:
    with pytest.raises(FederationError) as caught:
        check_scores(content)
    assert str(caught.value).startswith(text)


def _scores(change: Any) -> RecordDict:
    content = answer_scores(SCORES)
    change(content["scores"])
    return content


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (RecordDict(), "c: expected a record 'scores' and nothing else"),
        (
            _scores(lambda scores: scores.pop("own.loss")),
            "c: expected the same measures of base, own, global, personal, the loss among them, "
            "found base.accuracy, base.loss, global.accuracy, global.loss, own.accuracy, "
            "personal.a",
        ),
        (
            _scores(lambda scores: scores.__setitem__("own.accuracy", 1.5)),
            "c: own.accuracy: expected a number from 0 to 1, found 1.5",
        ),
        (
            _scores(lambda scores: scores.__setitem__("own.loss", 1)),
            "c: own.loss: expected a number from 0 to 1e+305, found 1",
        ),
        (
            _scores(lambda scores: scores.__setitem__("kept-global", 1)),
            "c: kept-global: expected none, found 1",
        ),
    ],
)
def test_a_senseless_answer_is_refused(content: RecordDict, text: str) -> None:
    with raises(FederationError, text):
        decode_scores(content, "c", keep_better=False)


def test_an_answer_is_read_back_as_it_was() -> None:
    assert decode_scores(answer_scores(SCORES), "c", keep_better=False) == (SCORES, None)
    assert decode_scores(answer_scores(SCORES, True), "c", keep_better=True) == (SCORES, True)
    assert decode_scores(answer_scores(None), "c", keep_better=False) == (None, None)


def test_an_order_is_read_back_as_it_was() -> None:
    sent = order(keep_better=True, proximal_weight=0.5, kept=frozenset({"B"}))
    found = read_evaluate(message(sent).content)
    assert found.order == sent
    assert found.start is found.broadcast.trainable == start_adapter(experiment())


def test_who_does_worse_in_validation_keeps_the_global_adapter(tmp_path: Path) -> None:
    trainers = {2: FakeTrainer(2, 12, overfitted=("validation",)), 3: FakeTrainer(3, 13, parts=())}
    keeping = {"personalization__keep_better": True, "data__validation_share": 0.1}
    summary = staged(experiment(**keeping), tmp_path, trainers=trainers)
    rows = read_rows(tmp_path / "clients.jsonl")
    assert [row["kept_global"] for row in rows] == [False, False, True] + [False] * 5
    assert rows[2]["scores"]["personal"] == rows[2]["scores"]["global"]
    assert rows[1]["scores"]["personal"] != rows[1]["scores"]["global"]
    assert summary["extra"]["kept_global"] == 1


def test_a_device_of_a_smaller_rank_trains_no_more_than_that(tmp_path: Path) -> None:
    seen: dict[Any, int] = {}

    def change(result: Any, round: Any) -> Any:
        seen[round] = max(result.adapter.ranks)
        return result

    trainers = {1: FakeTrainer(1, 11, rank=1, change=change), 2: FakeTrainer(2, 12, rank=9)}
    config = experiment(federation__method="flexlora", federation__cohort=8)
    summary = staged(config, tmp_path, trainers=trainers)
    assert seen == {1: 1, 2: 1, 3: 1, "own": 1, "personal": 1}
    assert summary["clients"] == 8
    assert [c.rank for c in read_checkpoint(tmp_path).clients][1:3] == [1, 9]


def test_a_method_for_equal_ranks_does_not_overrule_a_devices_rank(tmp_path: Path) -> None:
    trainers = {1: FakeTrainer(1, 11, rank=1)}
    _, records = run(experiment(federation__cohort=8), tmp_path, trainers, evaluate=True)
    reason = (
        "FederationError: expected an adapter of rank 1 at most, which this client can train, "
        "found rank 2; use a method for mixed ranks, or raise the node config's rank"
    )
    assert [(d.client, d.reason) for d in records[0].dropped] == [("c1", reason)]
    assert read_rows(tmp_path / "clients.jsonl")[1]["failed"] == f"client 'c1': {reason}"


def test_own_factors_are_gone_on_from(tmp_path: Path) -> None:
    """FedSA-LoRA: the personal adapter begins with a client's own B, where it has one."""
    starts: dict[str, float] = {}

    class Watched(FakeTrainer):
        def train(self, broadcast: Any, config: Any, rule: Any, round: Any, seed: int) -> Any:
            if round == "personal":
                starts[self.client_id] = max(
                    float(np.abs(layer.B).max()) for layer in broadcast.trainable.layers.values()
                )
            return super().train(broadcast, config, rule, round, seed)

    trainers = {k: Watched(k) for k in range(4)}
    config = experiment(federation__method="fedsa-lora", federation__cohort=2)
    staged(config, tmp_path, grid=InProcessGrid(fake_app(trainers), 4))
    took_part = {c.client_id for c in read_checkpoint(tmp_path).clients if c.rounds}
    assert {client for client, size in starts.items() if size > 0} == took_part
    assert len(starts) == 4
