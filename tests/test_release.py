"""From a run to a release: every gate refuses with its numbers, and what passes is on a device."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedlora as fl
from fedlora.aggregation import ServerState
from fedlora.errors import ConfigError, GateError, PublishError
from fedlora.experiment import ExperimentConfig, find_experiment
from fedlora.federation.checkpoint import Checkpoint, RoundRecord, append_round, write_checkpoint
from fedlora.ota import Keys, Publisher
from fedlora.release import Gates, publish_run
from server.publish import main
from tests.matching import raises
from tests.ota.world import World, make_world
from tests.store.states import adapter


def write_run(folder: Path, scale: float = 0.01, **about: Any) -> Path:
    """Write what a finished run has that a release needs."""

    def means(base: float, new: float) -> dict[str, Any]:
        return {"base": {"mean": base, "loss": 1.0}, "global": {"mean": new, "loss": 1.0}}

    summary = {
        "name": "toy",
        "metric": "accuracy",
        "higher_is_better": True,
        "clients": 9,
        **means(0.5, 0.9),
        "held_out": means(0.5, 0.6),
        "extra": {"held_out_clients": 3},
        "privacy": None,
        **about,
    }
    folder.mkdir()
    provenance = {"run": "toy", "round": 20, "method": "fedit"}
    fl.save_adapter(adapter(1).scaled(scale), folder / "adapter.safetensors", provenance=provenance)
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


def test_a_run_that_passes_is_a_release_with_its_facts(world: World, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", privacy={"epsilon": 4.0, "delta": 1e-5})
    release, found = publish_run(run, world.publisher, rollout=1.0)
    assert dict(release.provenance) == {
        "run": "toy", "round": 20, "method": "fedit", "evaluated": "3 held-out clients",
        "metric": "accuracy", "base": 0.5, "global": 0.6, "epsilon": 4.0, "delta": 1e-5,
    }  # fmt: skip
    assert (found["base"], found["global"], found["num_bytes"]) == (0.5, 0.6, release.num_bytes)
    layers = adapter(1).scaled(0.01).layers
    rms = max(float(np.sqrt(np.square(layer.delta_weight).mean())) for layer in layers.values())
    assert found["largest_rms"] == pytest.approx(rms, rel=1e-5)  # by Gram matrices in float64
    assert world.publisher.releases() == [release]
    assert world.publisher.channel("stable").stage(1).percent == 1.0  # type: ignore[union-attr]


def held_out(base: float, new: float, metric: str = "accuracy", higher: bool = True) -> Any:
    about = {"base": {"mean": base}, "global": {"mean": new}}
    return {"metric": metric, "higher_is_better": higher, "held_out": about}


@pytest.mark.parametrize(
    ("about", "gates", "text"),
    [
        (
            {"about": held_out(0.5, 0.49)}, Gates(),
            "gate evaluation: accuracy of 3 held-out clients: expected the global adapter to be "
            "at most 0.0% worse than the base's 0.5000, found 0.4900",
        ),
        (
            {"about": held_out(2.0, 2.2, "loss", False)}, Gates(worse=0.05),
            "gate evaluation: loss of 3 held-out clients: expected the global adapter to be at "
            "most 5.0% worse than the base's 2.0000, found 2.2000",
        ),
        ({"about": held_out(0.5, float("nan"))}, Gates(), "found nan"),
        (
            {"scale": 10.0}, Gates(),
            "gate norm: layer 'b': expected weights to change by at most 0.5 (root mean square), "
            "found ",
        ),
        ({}, Gates(num_bytes=100), "gate size: expected at most 100 bytes, found 1,"),
    ],
)  # fmt: skip
def test_each_gate_refuses_with_its_numbers(
    world: World, tmp_path: Path, about: dict[str, Any], gates: Gates, text: str
) -> None:
    run = write_run(tmp_path / "run", about.get("scale", 0.01), **about.get("about", {}))
    with pytest.raises(GateError) as caught:
        publish_run(run, world.publisher, gates=gates)
    assert text in str(caught.value)
    assert world.publisher.releases() == []


def test_a_margin_lets_a_slightly_worse_one_through(world: World, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", **held_out(0.5, 0.49))
    assert publish_run(run, world.publisher, gates=Gates(worse=0.05))[0].version == 1


def test_without_held_out_clients_those_who_took_part_are_asked(
    world: World, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", held_out=None)
    release, _ = publish_run(run, world.publisher)
    assert release.provenance["evaluated"] == "9 clients, none of them held out"
    assert release.provenance["global"] == 0.9


def test_a_run_that_is_not_finished_is_released_on_demand_only(
    world: World, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    config = ExperimentConfig.from_toml(find_experiment("watch"), {"name": "toy"})
    current = adapter(4).scaled(0.01)
    state = dataclasses.replace(ServerState.start(current), round=7)
    append_round(folder, RoundRecord(7, "updated", ("a",), 1.0, 1.0, 1, 1))
    write_checkpoint(folder, Checkpoint(state, ()), config)
    with raises(PublishError, "this run is not finished"):
        publish_run(folder, world.publisher)
    release, _ = publish_run(folder, world.publisher, unevaluated=True, codec="fp32")
    assert release.provenance["evaluated"] is None
    assert (release.provenance["round"], release.provenance["run"]) == (7, "toy")
    path = world.repository / "targets" / "stable" / f"{release.digest}.1.safetensors"
    assert fl.load_adapter(path) == current


@pytest.mark.parametrize("content", ["{", "[]", '{"metric": "accuracy"}'])
def test_a_summary_of_something_else_is_refused(world: World, tmp_path: Path, content: str) -> None:
    run = write_run(tmp_path / "run")
    (run / "summary.json").write_text(content, encoding="utf-8")
    with raises(PublishError, "expected what fedlora simulate writes"):
        publish_run(run, world.publisher)
    with raises(PublishError, "expected a run with summary.json or a checkpoint"):
        publish_run(tmp_path, world.publisher)


def test_gates_that_make_no_sense_are_refused() -> None:
    with raises(ConfigError, "gates: worse: expected a number of at least 0, found -1"):
        Gates(worse=-1.0)


def test_a_server_publishes_by_itself(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    run = write_run(tmp_path / "run")
    assert main([str(run)]) == 2
    assert "FEDLORA_OTA_REPOSITORY" in capfd.readouterr().err
    monkeypatch.setenv("FEDLORA_OTA_REPOSITORY", str(world.repository))
    monkeypatch.setenv("FEDLORA_OTA_KEYS", str(world.folder / "keys"))
    assert main([str(run)]) == 0
    assert capfd.readouterr().out.startswith("release 1 of stable: ")
    assert main([str(tmp_path)]) == 1
    publisher = Publisher(world.repository, Keys(world.folder / "keys"))
    assert publisher.channel("stable").stage(1).percent == 1.0  # type: ignore[union-attr]


# Sizes.


def smollm2_adapter(rank: int = 8) -> fl.Adapter:
    """A random adapter of q and v of SmolLM2-135M: 30 layers, 576 wide, 3 of 9 heads for v."""
    generator = np.random.default_rng(0)
    layers = {}
    for number in range(30):
        for name, out in (("q_proj", 576), ("v_proj", 192)):
            layers[f"model.layers.{number}.self_attn.{name}"] = fl.LoraLayer(
                generator.normal(0, 0.02, (rank, 576)).astype(np.float32),
                generator.normal(0, 0.02, (out, rank)).astype(np.float32),
                2.0,
            )
    config = fl.LoraConfig(rank=rank, lora_alpha=2 * rank, target_modules=("q_proj", "v_proj"))
    return fl.Adapter(layers, config, "5c" * 32)


@pytest.mark.parametrize(("codec", "most"), [("fp16", 950_000), ("int8", 500_000)])
def test_a_release_for_smollm2_is_small(
    world: World, tmp_path: Path, codec: str, most: int
) -> None:
    adapter = smollm2_adapter()
    assert adapter.num_parameters == 460_800
    run = write_run(tmp_path / "run")
    fl.save_adapter(adapter, run / "adapter.safetensors", provenance={"run": "keyboard-smollm2"})
    release, _ = publish_run(run, world.publisher, codec=codec)
    print(f"SmolLM2 q, v, rank 8, {codec}: {release.num_bytes:,} bytes")
    assert release.num_bytes <= most
