"""The device's benchmark: sides that do the same, fair turns, tables that tell the truth."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlora.adapter import LoraConfig
from fedlora.errors import ConfigError
from fedlora.targets import LayerSpec
from simulations.bench.device_cases import BASES, DEFAULT, QUICK, device_case, random_adapter
from simulations.bench.device_measure import by_turns, paired
from simulations.bench.device_tables import device_tables, ratio

ROOT = Path(__file__).resolve().parents[2]


def test_a_name_that_is_no_case_is_refused_with_the_form() -> None:
    for name in (*DEFAULT, *QUICK):
        assert device_case(name).base.id
    with pytest.raises(ConfigError, match="expected <kind>-<base> with a kind of train, infer"):
        device_case("train-gpt5")


@pytest.mark.parametrize("name", BASES)
def test_both_sides_are_given_the_same_full_batch(name: str) -> None:
    base = BASES[name]
    one, other = base.batch(3, 7), base.batch(3, 7)
    assert one["inputs"].shape == (3, 7)
    assert one["targets"].shape == ((3,) if base.classes else (3, 7))
    np.testing.assert_array_equal(one["inputs"], other["inputs"])
    assert 1 <= one["inputs"].min() <= one["inputs"].max() < base.vocabulary


def test_the_adapter_changes_the_base() -> None:
    specs = {"fc": LayerSpec("linear", (6,), 4)}
    adapter = random_adapter(specs, LoraConfig(rank=2, target_modules=("fc",)), 1, "base")
    assert adapter.base == "base"
    assert np.abs(adapter.delta_weight("fc")).max() > 1e-3
    again = random_adapter(specs, LoraConfig(rank=2, target_modules=("fc",)), 1, "base")
    assert adapter == again  # the process that exports and the one that measures both make it


def test_sides_take_turns_and_change_places() -> None:
    called: list[str] = []
    times, calls = by_turns(
        {"a": lambda: called.append("a"), "b": lambda: called.append("b")}, turns=3, calls=2
    )
    assert calls == 2
    assert called[4:] == ["a"] * 2 + ["b"] * 4 + ["a"] * 4 + ["b"] * 2  # after two to warm up each
    assert all(len(values) == 3 for side in times.values() for values in side.values())


def test_ratios_are_of_the_same_turn() -> None:
    times = {"fast": {"cpu": [1.0, 9.0]}, "torch": {"cpu": [2.0, 18.0]}}
    assert ratio(times, "fast", "torch") == [0.5, 0.5]


def test_what_is_not_reached_is_said() -> None:
    def side(seconds: float) -> dict[str, list[float]]:
        return {"wall": [seconds] * 2, "cpu": [seconds] * 2}

    result: dict[str, Any] = {
        "case": "train-minilm", "kind": "train", "base": "minilm", "threads": 1, "load": 7.0,
        "shape": (8, 32), "sides": {"torch": side(0.1), "fast": side(0.12), "low": side(0.13)},
        "memory": {
            name: {"peak": peak, "anonymous": peak // 2}
            for name, peak in (("torch", 500_000_000), ("fast", 300_000_000), ("low", 250_000_000))
        },
    }  # fmt: skip
    lines = device_tables([result]).splitlines()
    (time,) = [line for line in lines if "fast: CPU time / torch's" in line]
    assert time.endswith("| ≤ 1 | 1.2 | **not reached** |")
    (memory,) = [line for line in lines if "low memory: peak RSS / torch's" in line]
    assert memory.endswith("| ≤ 0.6 | 0.5 |  |")
    assert any("Load average while measuring: 7.0 to 7.0" in line for line in lines)


def test_changed_predictions_are_counted_pair_by_pair() -> None:
    targets = np.array([0, 0, 0, 0, 0, 0, 0, 0])
    one = np.array([0, 0, 0, 0, 1, 1, 1, 2])
    other = np.array([0, 0, 0, 1, 0, 0, 2, 2])
    found = paired(one, other, targets)
    assert (found["changed"], found["better"], found["worse"]) == (4, 2, 1)
    # The changes of single rows: two of +1, one of -1, five of 0, around their mean 1/8.
    changes = np.array([0, 0, 0, -1, 1, 1, 0, 0])
    assert found["error"] == pytest.approx(changes.std() / np.sqrt(8), rel=1e-12)


def test_a_comparison_of_bases_says_on_how_much_it_rests() -> None:
    result: dict[str, Any] = {
        "case": "metric-minilm", "kind": "metric", "base": "minilm", "threads": 1,
        "scores": {"fp32": {"accuracy": 0.66}, "int8": {"accuracy": 0.653}},
        "steps": 600, "examples": 10_000, "most_frequent": 0.57,
        "paired": {"changed": 150, "better": 20, "worse": 90, "error": 0.001},
    }  # fmt: skip
    text = device_tables([result])
    assert "600 steps on many persons' messages, 10,000 held-out messages" in text
    assert "0.5700 of them; int8 changed 150 predictions, 20 to right and 90 to wrong" in text
    assert "| metric-minilm: change of accuracy, points | ≤ 0.5 | 0.7 | **not reached** |" in text


@pytest.mark.slow
def test_the_quick_run_measures_every_side(tmp_path: Path) -> None:
    file = tmp_path / "device.json"
    done = subprocess.run(
        [sys.executable, "-m", "simulations.bench", "device", "--quick", "--json", str(file)],
        cwd=ROOT, env=os.environ | {"FEDLORA_HOME": str(tmp_path)}, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    train, infer, adapters = json.loads(file.read_text("utf-8"))["results"]
    assert set(train["sides"]) == set(train["memory"]) == {"torch", "fast", "low"}
    assert train["memory"]["torch"]["torch_loaded"]
    assert not train["memory"]["fast"]["torch_loaded"]  # what a device without it would take
    # One step from the same adapter on the same batch; sums in another order.
    assert max(train["losses"].values()) - min(train["losses"].values()) <= 5e-5
    for rows in ("1", "8"):
        found = infer["differences"][rows]
        assert found["adapter"] <= 1e-5 * max(1.0, found["largest logit"])
    assert adapters["us"]["swap of a loaded one"][0] > 0
    assert "| tiny-chat 8x32 | device, low memory |" in done.stdout
