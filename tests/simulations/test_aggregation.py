"""The benchmark of aggregation, small: it runs, and its two ways to FlexLoRA's cut agree."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from simulations.bench.__main__ import ALONE
from simulations.bench.__main__ import main as bench
from simulations.bench.aggregation import main


def test_it_measures_every_linear_method_and_both_ways_to_a_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    options = ["--clients", "20", "--distinct", "3", "--width", "256", "--repeat", "1"]
    assert main([*options, "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    figures = json.loads(file.read_text())
    methods = figures["linear"]["methods"]
    assert set(methods) == {"fedit", "fedsa-lora", "fedsvd", "ffa-lora", "rolora"}
    assert methods["fedit"]["mb_a_client"] == pytest.approx(4 * 460_800 / 1e6)
    assert all(name in shown for name in methods)
    # Both are rounded to float32 on one side, where the factors are stored.
    assert figures["flexlora"]["difference"] < 1e-6


def test_it_runs_by_the_name_of_all_benchmarks(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    options = ["--clients", "4", "--distinct", "2", "--width", "64", "--repeat", "1"]
    assert bench(["aggregation", *options, "--json", str(file)]) == 0
    assert json.loads(file.read_text())["linear"]["clients"] == 4


def test_a_name_that_reads_its_own_arguments_is_a_module() -> None:
    for name in ALONE:
        assert find_spec(f"simulations.bench.{name.replace('-', '_')}") is not None
