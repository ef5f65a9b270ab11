"""The benchmark compares like with like: the same work, counted right, on all sides."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlora.data import load_data
from fedlora.errors import ConfigError
from fedlora.nn import get_task, inject_lora
from fedlora.world import _last_world
from simulations.bench.__main__ import main
from simulations.bench.bases import tiny
from simulations.bench.cases import DEFAULT, LENGTH, Case, case_named
from simulations.bench.compare import compare
from simulations.bench.population import FUNCTION, Shape
from simulations.bench.profiling import kind_of
from simulations.bench.scale import measure
from simulations.bench.tables import ratio_table, scale_table, spread, time_table
from simulations.bench.work import work_of

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["tiny-b4-all-top1-mixed"]  # "tiny-b1-qv" is run by --quick


@pytest.fixture
def one_case(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what `compare` needs of a process of its own."""
    monkeypatch.setenv("FEDLORA_BENCH_POPULATION", "")
    _last_world.cache_clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    _last_world.cache_clear()


@pytest.mark.usefixtures("one_case")
@pytest.mark.parametrize(
    "name",
    [*SMALL, pytest.param("minilm-b1-qv-top1", marks=pytest.mark.slow)],
)
def test_all_sides_end_where_peft_ends(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_named(name, clients=3)
    for variable, value in case.shape.environment().items():
        monkeypatch.setenv(variable, value)
    result = compare(case, repeat=1, with_ray=False)
    assert {"peft", "sequential", "engine"} <= set(result["sides"])
    # AdamW divides by gradients near zero, where sums in another order differ by themselves.
    assert max(result["largest_difference_from_peft"].values()) <= 1e-4
    assert result["client_steps"] == 3 * case.steps
    for side in result["sides"].values():
        assert len(side["wall"]) == len(side["cpu"]) == 1
        assert min(*side["wall"], *side["cpu"]) > 0
    assert name in time_table([result])
    assert name in ratio_table([result])


@pytest.mark.parametrize("name", [*DEFAULT, *SMALL])
def test_a_case_is_an_experiment(name: str) -> None:
    case = case_named(name)
    config = case.experiment("sequential", 2)
    assert config.federation.cohort == case.clients
    assert config.federation.train.batch_size == case.rows
    assert config.lora.layers == (None if case.top is None else f"last:{case.top}")
    assert case.client_steps == case.clients * case.steps


@pytest.mark.parametrize("name", ["huge-b1-qv", "tiny-b3-qv", "tiny-b1", "tiny-b1-qv-top"])
def test_another_case_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="expected <base>-b<1"):
        case_named(name)


def test_a_population_has_the_shape_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(5, rows=6, length=16, mixed=True, vocabulary=50)
    for variable, value in shape.environment().items():
        monkeypatch.setenv(variable, value)
    data = load_data(FUNCTION)
    assert len(data) == 5
    client = data.client("c000004")
    assert client.train.inputs.shape == (6, 16)
    assert len(client.test) == 1
    assert client.train.inputs.max() < 50
    for inputs, targets, length in zip(
        client.train.inputs, client.train.targets, client.train.lengths, strict=True
    ):
        assert 4 <= length <= 16
        assert (inputs[:length] > 0).all()
        assert not inputs[length:].any()
        assert np.array_equal(targets[: length - 1], inputs[1:length])
        assert (targets[length:] == -100).all()
    again = load_data(FUNCTION).client("c000004")
    assert np.array_equal(again.train.inputs, client.train.inputs)


def work(case: Case) -> dict[str, int]:
    model = tiny()
    inject_lora(model, case.experiment("sequential", 1).lora, base="x")
    ids = np.ones((case.rows, LENGTH), np.int64)
    batch = {"inputs": ids, "targets": ids}
    return work_of(model, get_task("next-token"), batch, case.base.attention).as_dict()


def test_work_is_the_formula_of_the_docstring() -> None:
    positions, width, vocabulary, rank = 2 * LENGTH, 64, 256, 8
    block = 2 * positions * (4 * width**2 + 2 * 4 * width**2)
    head = 2 * positions * width * vocabulary
    qv = 2 * positions * 2 * width**2
    lora = 2 * positions * rank * (2 * (width + width) + width + width)

    def of(name: str) -> dict[str, int]:
        case = case_named(name)
        found = work(case)
        return {key: value * 2 // case.rows for key, value in found.items()}

    all_blocks, top = of("tiny-b4-qv"), of("tiny-b4-qv-top1")
    assert all_blocks["frozen_forward"] == top["frozen_forward"] == 2 * block + head
    # q, k and v of the lowest adapted block read what nothing trained has touched.
    assert all_blocks["frozen_backward"] == 2 * block + head - qv - qv // 2
    assert top["frozen_backward"] == block + head - qv - qv // 2
    inputs_of_two = 2 * positions * rank * 2 * width
    assert all_blocks["lora"] == 4 * lora - inputs_of_two
    assert top["lora"] == 2 * lora - inputs_of_two
    per_block = positions * LENGTH * width
    assert all_blocks["attention"] == 24 * per_block
    assert top["attention"] == 16 * per_block
    assert of("tiny-b1-qv") == all_blocks


@pytest.mark.parametrize(
    ("name", "shapes", "kind"),
    [
        ("aten::mm", [[96, 64], [64, 256]], "GEMM frozen"),
        ("aten::addmm", [[256], [96, 64], [64, 256]], "GEMM frozen"),
        ("aten::bmm", [[16, 32, 64], [16, 64, 8]], "GEMM LoRA"),
        ("aten::baddbmm_", [[16, 32, 64], [16, 32, 8], [16, 8, 64]], "GEMM LoRA"),
        ("aten::bmm", [[64, 32, 16], [64, 16, 32]], "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", [[1, 4, 32, 16]], "attention"),
        ("aten::native_layer_norm_backward", [[96, 64]], "normalization"),
        ("aten::gelu_backward", [[96, 256]], "activation"),
        ("aten::_fused_adamw_", [], "optimizer"),
        ("aten::_log_softmax", [[96, 256]], "loss"),
        ("aten::copy_", [[96, 64]], "copies"),
        ("aten::add_", [[96, 64]], "elementwise"),
        ("aten::transpose", [[96, 64]], "other"),
        ("AddmmBackward0", [[96, 64]], "other"),
    ],
)
def test_an_operation_is_put_under_its_kind(name: str, shapes: list[list[int]], kind: str) -> None:
    assert kind_of(name, shapes) == kind


def test_a_ratio_is_taken_repetition_by_repetition() -> None:
    sides = {
        "peft": {"threads": 1, "wall": [4.0, 8.0], "cpu": [4.0, 8.0]},
        "engine": {"threads": 1, "wall": [1.0, 4.0], "cpu": [2.0, 2.0]},
    }
    result = {
        "case": "tiny-b1-qv",
        "sides": sides,
        "largest_difference_from_peft": {"engine": 1e-8},
        "other_cores": 0.0,
    }
    row = ratio_table([result]).splitlines()[-1]
    assert row == "| tiny-b1-qv | 3.00 (2.00–4.00) | 3.00 (2.00–4.00) | 1.0e-08 | 0.0 |"
    assert spread([0.0123, 150.0, 15.0]) == "15.0 (0.0123–150)"


@pytest.fixture
def bench(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run the command in this process, which starts one of its own for a case; its stdout."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(*arguments: str) -> str:
        code = main(list(arguments))
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return run


def test_quick_prints_two_tables_and_writes_json(bench: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "quick.json"
    printed = bench("cohort", "--quick", "--no-ray", "--json", str(file))
    assert printed.count("| case |") == 2
    (result,) = json.loads(file.read_text())["results"]
    assert max(result["largest_difference_from_peft"].values()) <= 1e-4  # AdamW, as above
    assert result["case"] == "tiny-b1-qv"
    assert result["clients"] == 8
    assert "flower" not in result["sides"]


@pytest.mark.usefixtures("one_case")
@pytest.mark.parametrize(("side", "clients"), [("engine", 66), ("sequential", 6)])
def test_scale_measures_every_round(
    side: str, clients: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in Shape(clients, rows=1, test_rows=0).environment().items():
        monkeypatch.setenv(variable, value)
    result = measure(side, clients)
    assert len(result["wall"]) == len(result["cpu"]) == 2
    assert result["rss_peak"] >= result["rss_before"] > 0
    cells = [cell.strip() for cell in scale_table([result]).splitlines()[-1].split("|")]
    assert cells[1:3] == [side, str(clients)]
    assert cells[6] == f"{clients / result['cpu'][1]:,.0f}"


@pytest.mark.slow
def test_flowers_simulation_ends_where_peft_ends(bench: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "quick.json"
    bench("cohort", "--quick", "--json", str(file))
    (result,) = json.loads(file.read_text())["results"]
    assert result["largest_difference_from_peft"]["flower"] <= 1e-6
    assert len(result["sides"]["flower"]["wall"]) == 1
