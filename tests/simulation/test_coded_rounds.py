"""Codecs in the engines of a simulation, and what int8 costs people who chat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlora.adapter import Adapter
from fedlora.evaluation import Trial, evaluate_many
from fedlora.experiment import ExperimentConfig, find_experiment
from fedlora.federation.checkpoint import read_rounds
from fedlora.federation.results import codec_bytes
from fedlora.flat import pack, segments_of
from fedlora.nn.cohort import client_job, train_cohort
from fedlora.simulation.rounds import run_rounds
from fedlora.simulation.simulate import simulate
from fedlora.training import TrainConfig
from fedlora.world import shared_world
from tests.simulation.small import PEOPLE, config
from tests.simulation.test_cohort_grid import CLOSE, difference


def coded(up: str = "int8", down: str = "int8", **changes: Any) -> ExperimentConfig:
    return config(federation__upload_codec=up, federation__download_codec=down, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"federation__method": "fedsa-lora"},  # keeps B on the clients
        {"federation__method": "flora"},  # sends a frozen part
        {"federation__control_variates": True},
    ],
    ids=lambda changes: ",".join(map(str, changes.values())) or "fedit",
)
def test_the_same_rounds_as_one_client_after_another(tmp_path: Path, changes: Any) -> None:
    changes = changes | {"federation__rounds": 2}
    together = run_rounds(coded(**changes), tmp_path / "cohort", PEOPLE)
    alone = run_rounds(coded(**changes, engine__kind="sequential"), tmp_path / "alone", PEOPLE)
    # A ClientApp also tells its seconds: the name's 7 bytes and a float.
    seconds = 15 * sum(client.rounds for client in alone.clients)
    assert (together.bytes_up, together.bytes_down) == (alone.bytes_up - seconds, alone.bytes_down)
    for name in ("cohort", "alone"):
        assert all(record.dropped == () for record in read_rounds(tmp_path / name))
    mine, theirs = together.state.adapter, alone.state.adapter
    # Engines differ by CLOSE at most, and both draw the same numbers. A change that lies as near
    # to its draw as that may be rounded up by one and down by the other: one number of one client
    # is then a step off, which is a 127th of its component's largest change, here below 0.1.
    assert difference(mine, theirs) <= 0.1 / 127
    apart = [
        np.abs(getattr(mine[path], name) - getattr(theirs[path], name)).ravel()
        for path in mine
        for name in ("A", "B")
    ]
    assert (np.concatenate(apart) > CLOSE).mean() < 0.05


def test_the_summary_tells_what_fp32_would_have_cost(tmp_path: Path) -> None:
    short = {"federation__rounds": 1, "personalization__steps": 1}
    plain = simulate(config(**short), out=tmp_path / "plain").summary
    found = simulate(coded("int8", "fp32", **short), out=tmp_path / "int8").summary
    assert "codecs" not in plain["extra"]
    assert found["extra"]["codecs"]["up"] == {
        "codec": "int8",
        "bytes": found["bytes_up"],
        "fp32_bytes": plain["bytes_up"],
        "share": round(found["bytes_up"] / plain["bytes_up"], 4),
    }
    assert found["bytes_up"] < plain["bytes_up"]
    # Nothing but the order's two words more.
    assert found["bytes_down"] - plain["bytes_down"] == 8 * len("upload_codec" + "int8")


def test_rounding_downwards_does_not_drift(tmp_path: Path) -> None:
    changes = {"federation__rounds": 5, "federation__cohort": PEOPLE}
    plain, found = (
        run_rounds(coded("fp32", down, **changes), tmp_path / down, PEOPLE).state.adapter
        for down in ("fp32", "int4")
    )
    factors = segments_of(plain, {"A", "B"})
    before, after = pack(plain, factors), pack(found, factors)
    # Measured: 0.002 to 0.004. Were the rounded adapter what changes are added to, 0.09.
    assert 0 < np.linalg.norm(after - before) <= 0.01 * np.linalg.norm(before)


def test_the_servers_variate_stays_the_mean_of_the_clients(tmp_path: Path) -> None:
    """Variates travel in fp32: what the server adds is what every client has added to its own."""
    changes = {"federation__method": "ffa-lora", "federation__control_variates": True}
    end = run_rounds(coded("int4", "int8", **changes), tmp_path, PEOPLE)
    folder = next((tmp_path / "private").glob("control-*"))
    rounds = np.fromfile(folder / "rounds.int64", np.int64).reshape(PEOPLE, 2)
    kept = np.fromfile(folder / "rows.float32", np.float32).reshape(PEOPLE, 2, -1)
    own = kept[np.arange(PEOPLE), rounds.argmax(1)].astype(float)
    examples = np.array([client.num_examples for client in end.clients], float)
    (found,) = (v for name, v in end.state.method_state.items() if "control" in name)
    # Float32 variates of size 1, rounded once a round.
    np.testing.assert_allclose(found, examples @ own / examples.sum(), rtol=0, atol=1e-6)
    assert np.abs(found).max() > 1e-3


def keyboard(up: str, down: str, out: Path, clients: int = 12, rounds: int = 3) -> dict[str, Any]:
    """A short run of the bundled keyboard experiment: its bytes, and what people get of it.

    Global and personal are means over all clients, on 48 messages each: loss in nats, and the share
    of next tokens that are the first guess.
    """
    overrides = {
        "federation.upload_codec": up,
        "federation.download_codec": down,
        "federation.rounds": rounds,
        "federation.cohort": clients // 2,
        "data.clients": clients,
        "data.held_out_clients": 0.0,
    }
    experiment = ExperimentConfig.from_toml(find_experiment("keyboard"), overrides)
    end = run_rounds(experiment, out, clients)
    world = shared_world(experiment.base, experiment.data, experiment.lora, experiment.seed)
    people = [world.data.client(name) for name in world.data.client_ids]
    train = TrainConfig(local_steps=8, batch_size=8, learning_rate=2e-3)
    start = end.state.adapter
    jobs = [
        client_job(data.train, data.client_id, start, train, seed=0, round="personal")
        for data in people
    ]
    personal = [trained.adapter() for trained in train_cohort(world.model, jobs, world.task)]

    def mean(adapters: list[Adapter]) -> dict[str, float]:
        trials = [
            Trial(adapter, data.test.take(range(min(48, len(data.test)))), data.client_id)
            for adapter, data in zip(adapters, people, strict=True)
        ]
        scores: list[Any] = evaluate_many(world.model, trials, world.task)
        return {key: float(np.mean([score[key] for score in scores])) for key in ("loss", "top1")}

    rounds_done = read_rounds(out)
    return {
        "bytes_up": end.bytes_up,
        "bytes_down": end.bytes_down,
        "told": codec_bytes(experiment.federation, rounds_done),
        "global": mean([start] * len(people)),
        "personal": mean(personal),
    }


@pytest.mark.slow
def test_int8_costs_people_who_chat_nothing_that_they_notice(tmp_path: Path) -> None:
    plain = keyboard("fp32", "fp32", tmp_path / "plain")
    found = keyboard("int8", "int8", tmp_path / "int8")
    assert found["bytes_up"] <= 0.28 * plain["bytes_up"]
    assert found["bytes_down"] <= 0.28 * plain["bytes_down"]
    for who in ("global", "personal"):
        # Half a point of a hundred; of the loss, what makes a token half a percent less likely.
        assert abs(found[who]["top1"] - plain[who]["top1"]) <= 0.005
        assert abs(found[who]["loss"] - plain[who]["loss"]) <= 0.005
