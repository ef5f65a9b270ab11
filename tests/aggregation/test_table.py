"""The table of methods is current, and the guide's worked example is a method that works."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

from fedlora import aggregation
from fedlora.aggregation import ClientProfile, Method, ServerState, Update, method, methods
from fedlora.aggregation.table import BEGIN, END, methods_table, traffic, with_table
from fedlora.errors import ConfigError, FormatError
from tests.aggregation.rounds import assert_products, products, random_adapter, trained
from tests.matching import raises
from tests.reference import methods as slow

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "methods.md"


@pytest.mark.parametrize("name", ["docs/methods.md", "README.md"])
def test_the_table_is_current(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert with_table(text, methods_table()) == text, "run python -m fedlora.aggregation.table"


def test_every_method_has_a_row_with_its_paper_and_use() -> None:
    rows = [line for line in methods_table().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == sorted(methods())
    assert all(re.search(r"\[\d{4}\.\d{5}\]\(https://arxiv", row) for row in rows)
    assert all(rule.summary for rule in methods().values())


def test_what_travels_is_counted() -> None:
    """In adapters a client: half of one is a factor of a square layer."""
    found = {name: traffic(rule) for name, rule in methods().items()}
    assert found["fedit"] == ((1, 1), (1, 1))
    assert found["rolora"] == ((0.5, 1), (0.5, 1))
    assert found["flora"] == ((1, 1), (1, 1 + 5))  # a stack of five
    assert found["fedex-lora"] == ((1, 1), (1, 1 + 4))  # K - 1
    assert traffic(method("flora", rank=8))[1] == (1, 2)


def test_the_marks_are_needed() -> None:
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert with_table(text, "new\n") == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    for wrong in ("", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{BEGIN}{END}"):
        with raises(FormatError, BEGIN):
            with_table(wrong, "new\n")


@pytest.fixture
def blockwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Method:
    """The guide's example, read from the guide, in a file of its own and in the registry."""
    found = re.findall(r"<!-- example -->\n```python\n(.*?)```", GUIDE.read_text("utf-8"), re.S)
    (code,) = found
    (tmp_path / "blockwise.py").write_text(code)
    spec = importlib.util.spec_from_file_location("blockwise", tmp_path / "blockwise.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(aggregation._METHODS, "blockwise", module.blockwise)
    return method("blockwise", period=2)


def test_the_guides_example_takes_turns_and_is_exact(blockwise: Method) -> None:
    turns = ["".join(sorted(blockwise.uploaded(number))) for number in range(1, 7)]
    assert turns == ["B", "B", "A", "A", "B", "B"]
    rng = np.random.default_rng(0)
    state = ServerState.start(random_adapter(rng, [(6, 5), (4, 7)], 3, zero_b=True))
    for number in range(5):
        updates = [
            Update(trained(blockwise, state, ClientProfile(""), rng), 1.0 + k, f"c{k}")
            for k in range(3)
        ]
        expected = slow.exact(state, updates)
        state = blockwise.aggregate(state, updates)
        assert state.round == number + 1
        assert_products(products(state.adapter), expected, 100.0)  # the factors' norms at most


def test_the_guides_example_is_in_the_registry_and_in_the_table(blockwise: Method) -> None:
    assert "| `blockwise` | yes | yes | equal | B | P | an example | – |" in methods_table()
    assert blockwise.name in methods()
    with raises(ConfigError, "method 'blockwise'", "unexpected keyword argument 'perod'"):
        method("blockwise", perod=2)
