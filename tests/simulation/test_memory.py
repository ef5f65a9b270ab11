"""A run that saves memory: by computing blocks twice the same bits, by fewer bits the same base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlora.bases import load_card
from fedlora.errors import ConfigError
from fedlora.simulation import Run, simulate

SHORT: dict[str, Any] = {
    "data.clients": 2,
    "data.held_out_clients": 0.0,
    "data.max_length": 16,
    "federation.cohort": 2,
    "federation.local_steps": 1,
    "federation.rounds": 1,
    "personalization.steps": 1,
    "personalization.cross": 0,  # what everyone's adapter does on others' data takes half the time
}


def run(out: Path, **more: Any) -> Run:
    overrides = SHORT | {key.replace("__", "."): value for key, value in more.items()}
    return simulate("keyboard", overrides=overrides, out=out)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(tmp_path_factory.mktemp("runs") / "plain")


def test_checkpointing_changes_no_bit_of_a_run(plain: Run, tmp_path: Path) -> None:
    twice = run(tmp_path / "twice", engine__checkpointing=True)
    assert twice.adapter == plain.adapter
    for name in ("base", "own", "global", "personal"):
        assert twice.summary[name] == plain.summary[name]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_run_is_for_the_base_that_everyone_has(
    kind: str, plain: Run, tmp_path: Path
) -> None:
    small = run(tmp_path / "small", base__quantize=kind)
    assert small.adapter.base == plain.adapter.base == load_card("tiny-chat").fingerprint
    assert small.adapter != plain.adapter
    lost = small.summary["base"]["loss"] - plain.summary["base"]["loss"]
    # Nats per token of the base alone; what rounding costs depends on the weights.
    assert 0 < abs(lost) < {"nf4": 0.1, "int8": 0.01}[kind]


def test_a_base_without_blocks_is_refused_before_the_first_round(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine\.checkpointing: .* found WatchCNN"):
        simulate("watch", overrides={"engine.checkpointing": True}, out=tmp_path / "run")
    assert not (tmp_path / "run" / "rounds.jsonl").exists()
