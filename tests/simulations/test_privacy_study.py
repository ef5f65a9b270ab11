"""The privacy study: its runs are valid, it goes on where it was, and its page is true."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlora.adapter import Adapter, LoraConfig, LoraLayer
from fedlora.data.chitchat import ending, read_messages
from fedlora.data.text import load_tokenizer
from fedlora.errors import DataError
from fedlora.files import write_atomic
from fedlora.nn import load_base
from simulations.studies.privacy import endings
from simulations.studies.privacy import study as module
from simulations.studies.privacy.page import Results, page, write_page
from simulations.studies.privacy.plan import (
    DELTA,
    EPSILONS,
    METHODS,
    NONE,
    TASKS,
    Settings,
    Task,
    Trial,
)
from simulations.studies.privacy.runs import Multipliers, config_of, product_noise
from simulations.studies.privacy.study import OutOfTime, Study, best


def tiny(**changes: Any) -> Task:
    """The watch task with thirty users, two rounds and one budget."""
    task = TASKS["watch"].as_quick()
    overrides = {**task.overrides, "federation.rounds": 2, "federation.cohort": 6}
    return replace(task, overrides=overrides, users=(30,), tuned=((30, 3.0),), people=2, **changes)


def known(folder: Path, task: Task) -> Multipliers:
    """Multipliers that need not be calibrated."""
    config = config_of(task, trial(task, epsilon=NONE), Multipliers(folder / "none"))
    federation = config.federation
    table = {
        f"{epsilon:g}/{DELTA:g}/{federation.cohort / users:g}/{federation.rounds}": 2.0
        for epsilon in EPSILONS
        for users in task.users
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "multipliers.json", json.dumps(table).encode())
    return Multipliers(folder / "multipliers.json")


def trial(task: Task, epsilon: float = 3.0, method: str = "fedit", seed: int = 0) -> Trial:
    norm = None if epsilon == NONE else 1.0
    return Trial("final", task.name, max(task.users), method, epsilon, Settings(1e-2, norm), seed)


@pytest.mark.parametrize("name", TASKS)
def test_every_run_is_a_valid_experiment(tmp_path: Path, name: str) -> None:
    task = TASKS[name]
    multipliers = known(tmp_path, task)
    finals = [final for block in task.blocks() for final in task.finals(*block)]
    assert len(set(finals)) == len(finals) == task.counts()[1]
    # All budgets at both sizes of population, and no privacy once.
    assert len(finals) == task.seeds * len(METHODS) * (2 * (len(task.epsilons) - 1) + 1)
    for method in METHODS:
        for epsilon in task.epsilons:
            config = config_of(task, trial(task, epsilon, method), multipliers)
            assert config.federation.method == method
            assert (config.privacy is None) == (epsilon == NONE)
            if config.privacy is not None:
                assert config.privacy.noise_multiplier == 2.0
                assert config.federation.sampling == "poisson"


def test_it_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny(methods=("ffa-lora",))
    known(tmp_path, task)
    with pytest.raises(OutOfTime):
        Study(task, tmp_path, until=0.0).run()
    Study(task, tmp_path).run()
    rows = [json.loads(line) for line in (tmp_path / "watch.jsonl").read_text().splitlines()]
    assert len(rows) == sum(task.counts())
    assert not [row["failed"] for row in rows if "failed" in row]
    private = next(r for r in rows if r["stage"] == "final" and r["epsilon"] == 3.0)
    assert private["noise_multiplier"] == 2.0
    assert 0 < private["epsilon_of_ledger"] < 10  # two rounds at 2.0, a fifth of thirty users
    assert private["uploaded"] == 284  # B of two layers
    assert set(private["scores"]) == {"base", "own", "global", "personal"}

    def nothing(*_: Any) -> None:
        raise AssertionError("ran again")

    monkeypatch.setattr(module, "carry_out", nothing)
    Study(task, tmp_path).run()
    assert not (tmp_path / "watch-run").exists()


def test_the_best_settings_are_of_the_lowest_loss() -> None:
    def row(norm: float, loss: float) -> dict[str, Any]:
        scores = {"global": (0.5, loss)}
        return {"learning_rate": 0.1, "clipping_norm": norm, "scores": scores}

    # One lucky run is not the best mean, and one that fails is out with all its others.
    lucky = [row(1.0, 0.5), row(1.0, 2.0)]
    diverged = [row(3.0, 0.1), {**row(3.0, 0.1), "failed": "diverged"}]
    rows = [*lucky, row(0.3, 1.0), row(0.3, 1.1), *diverged]
    assert best(rows) == Settings(0.1, 0.3)
    with pytest.raises(DataError, match="widen its grid"):
        best(diverged)


def test_noise_of_a_product_is_what_drawn_noise_gives() -> None:
    random = np.random.default_rng(5)
    draw = random.standard_normal
    layer = LoraLayer(A=draw((3, 40)), B=draw((30, 3)), scaling=0.5)
    adapter = Adapter({"layer": layer}, LoraConfig(rank=3))
    once, twice = product_noise(adapter, {"A": 0.04, "B": 0.25})
    told_once, told_twice = [], []
    for _ in range(400):
        N, M = 0.2 * draw((3, 40)), 0.5 * draw((30, 3))
        told_once.append(float(np.sum((0.5 * (M @ layer.A + layer.B @ N)) ** 2)))
        told_twice.append(float(np.sum((0.5 * M @ N) ** 2)))
    # Of 400 draws the mean is known to a hundredth: a draw spreads by about a seventh.
    assert once == pytest.approx(float(np.mean(told_once)), rel=0.03)
    assert twice == pytest.approx(float(np.mean(told_twice)), rel=0.03)
    assert product_noise(adapter, {"A": 0.0, "B": 0.25})[1] == 0.0


NOISE = {
    "noise_length": 0.5, "noise_multiplier": 1.25,
    "noise_once": 3.0, "noise_twice": 1.0, "adapter_squared": 16.0,
}  # fmt: skip


def made_up(seeds: int = 3) -> list[dict[str, Any]]:
    """Rows in which privacy costs fedit 0.2 and ffa-lora 0.1, and personal training gives half."""
    rows = []
    for seed in range(seeds):
        for method, cost in (("fedit", 0.2), ("ffa-lora", 0.1)):
            for epsilon in (None, 3.0):
                lost = (cost if epsilon else 0.0) + 0.001 * seed
                rows.append(
                    {
                        "stage": "final", "task": "watch", "users": 1000 if epsilon else 10_000,
                        "method": method, "epsilon": epsilon, "learning_rate": 0.1,
                        "clipping_norm": 1.0 if epsilon else None, "seed": seed,
                        "metric": "accuracy", "higher_is_better": True, "cpu_seconds": 1.0,
                        "scores": {
                            "base": (0.2, 3.0), "own": (0.4, 2.0),
                            "global": (0.8 - lost, 1.0), "personal": (0.9 - lost / 2, 0.5),
                        },
                        **(NOISE if epsilon else {}),
                    }
                )  # fmt: skip
    return rows


def test_page_says_what_the_rows_say() -> None:
    found = Results("watch", made_up())
    about = found.difference(1000, "ffa-lora", 3.0, "global")
    assert about is not None
    assert about.interval.mean == pytest.approx(0.1)
    assert found.lost(1000, "fedit", 3.0, "global") == pytest.approx(dict.fromkeys(range(3), 0.2))
    spared = found.spared(1000, "ffa-lora", 3.0, "global")
    assert spared is not None
    assert spared.interval.mean == pytest.approx(0.1)
    text = page({"watch": found}, {"what follows": "Written."})
    assert "| ffa-lora | +0.0000 (+0.0000 to +0.0000) | **+0.1000" in text
    assert "+0.2000 → +0.1000; 50% back" in text
    assert "0.50 (C 1, z 1.25)" in text
    assert "| fedit | 0.50 (25%) |" in text
    assert "<!-- by hand: what follows -->\nWritten.\n<!-- end -->" in text
    assert "The search is not paid for" in text
    assert "**Not finished: watch has 12 of" in text


def test_no_interval_is_claimed_of_one_seed() -> None:
    found = Results("watch", made_up(seeds=1))
    assert found.difference(1000, "ffa-lora", 3.0, "global") is None
    assert "0.6000 (one seed)" in page({"watch": found}, {})


def test_page_is_written_from_the_rows_and_keeps_what_is_by_hand(tmp_path: Path) -> None:
    write_page(tmp_path)
    assert not (tmp_path / "RESULTS.md").exists()
    (tmp_path / "results").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in made_up())
    (tmp_path / "results" / "watch.jsonl").write_text(lines)
    write_page(tmp_path)
    place = tmp_path / "RESULTS.md"
    empty = "<!-- by hand: watch -->\n<!-- end -->"
    assert empty in place.read_text()
    place.write_text(place.read_text().replace(empty, empty.replace("\n", "\nMine.\n")))
    write_page(tmp_path)
    assert "Mine." in place.read_text()


def test_an_ending_is_told_from_the_state_of_a_messages_last_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(endings, "MESSAGES", 10)
    people = endings.data.__wrapped__()
    assert len(people) == 117
    name, mine = next(iter(people.items()))
    found = load_base("tiny-chat", num_classes=5)
    messages = read_messages("chitchat_117x1000.jsonl.gz")[name][:10]
    text, label = ending(messages[0])  # the first one is trained on
    ids = load_tokenizer(found.tokenizer).encode(text, add_special_tokens=False).ids
    with torch.no_grad():
        states = found.model.model(torch.tensor([[0, *ids]]))
    # Beside other rows, padded, sums are taken in another order.
    assert mine.train.inputs[0] == pytest.approx(states[0, -1].numpy(), abs=1e-4)
    assert mine.train.targets[0] == label
    with torch.no_grad():
        assert not endings.base()(torch.from_numpy(mine.test.inputs.copy())).any()
