"""The study of methods: parts are valid, run and go on, and the page says what they found."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlora.data import load_data
from fedlora.data.watch import client_ids, read_client
from fedlora.errors import DataError
from fedlora.nn import load_base
from fedlora.simulation.comparison.plan import Plan, grid_points
from simulations.studies.methods import authors, conflict, wearers
from simulations.studies.methods.__main__ import OutOfTime, main, run_part
from simulations.studies.methods.claims import CLAIMS
from simulations.studies.methods.evidence import Contrast, examine, paired_scores
from simulations.studies.methods.page import by_hand, page, write_page
from simulations.studies.methods.parts import PARTS

TINY = {
    "federation.rounds": 1,
    "federation.local_steps": 1,
    "data.clients": 4,
    "federation.cohort": 4,
}


def _configs(name: str) -> list[Any]:
    part = PARTS[name]
    plan = Plan(
        experiment=part.config().to_table(),
        methods=part.methods,
        seeds=(0, 1),
        against=next(iter(part.methods)),
        points=grid_points(list(part.points.values())),
        settings=part.settings,
    )
    return [plan.config(m, plan.points[p], seed=0) for p, m in plan.cells()]


@pytest.mark.parametrize("name", PARTS)
def test_every_run_of_a_part_is_a_valid_experiment(name: str) -> None:
    configs = _configs(name)
    assert len(configs) == len(PARTS[name].methods) * len(PARTS[name].points)
    assert len({c.to_toml() for c in configs}) == len(configs)  # no two cells are the same


def test_claims_speak_of_points_and_methods_that_there_are() -> None:
    for claim in CLAIMS:
        for contrast in claim.contrasts:
            part = PARTS[contrast.part]
            for _, method, point in contrast.terms:
                assert method in part.methods
                assert point in part.points
            assert sum(factor for factor, _, _ in contrast.terms) == 0
    quick = {name: part.as_quick() for name, part in PARTS.items()}
    for claim in CLAIMS:  # a quick study says something of each
        assert any(
            all(point in quick[c.part].points for _, _, point in c.terms) for c in claim.contrasts
        )


def test_wearers_are_what_the_whole_network_sees() -> None:
    data, head = wearers.data(), wearers.base()
    whole = load_base("watch-cnn").model.eval()
    for client in client_ids("clients")[:2]:
        raw = read_client(client, wearers.TEST_SHARE, wearers.VALIDATION_SHARE)
        for part in ("train", "validation", "test"):
            windows, seen = getattr(raw, part), getattr(data[client], part)
            assert np.array_equal(windows.targets, seen.targets)
            with torch.no_grad():
                expected = whole(torch.from_numpy(windows.inputs.copy()))
                found = head(torch.from_numpy(seen.inputs.copy()))
            # The same products of the same rows.
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_turn_is_the_same_for_everybody_and_undone_by_itself() -> None:
    plain, turned = wearers.data(), wearers.turned()
    for client in plain:
        raw = read_client(client, wearers.TEST_SHARE, wearers.VALIDATION_SHARE)
        twice = wearers.pooled(wearers._upside_down(wearers._upside_down(raw)))
        assert np.array_equal(twice.test.inputs, plain[client].test.inputs)
        assert np.array_equal(turned[client].test.targets, plain[client].test.targets)
        assert not np.array_equal(turned[client].test.inputs, plain[client].test.inputs)


def test_authors_are_cut_by_time_and_the_base_knows_others() -> None:
    data = authors.data()
    assert len(data) == authors.AUTHORS
    assert list(data) == list(load_data(f"{authors.__name__}:data").client_ids)
    for label, client in enumerate(data.values()):
        sizes = [len(client.train), len(client.validation), len(client.test)]
        assert sizes == [authors.TRAIN, authors.VALIDATION, authors.TEST]
        assert set(client.train.targets) | set(client.test.targets) == {label}
        # float32 rounding of 512 squares
        np.testing.assert_allclose(np.square(client.test.inputs).sum(axis=1), 1, atol=1e-5)
    inputs = torch.from_numpy(np.concatenate([c.test.inputs for c in data.values()]))
    targets = torch.from_numpy(np.concatenate([c.test.targets for c in data.values()]))
    first, second = authors.base(), authors.base()
    with torch.no_grad():
        assert torch.equal(first(inputs), second(inputs))
        right = (first(inputs).argmax(dim=1) == targets).float().mean()
    assert right < 0.15  # by chance 0.05: its classes are other people's
    assert not set(authors._rows_of(0)) & set(authors._rows_of(authors.AUTHORS))
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert one.data_ptr() != other.data_ptr()  # LoRA is put on each by itself


def test_conflicts_keep_everything_but_what_they_change() -> None:
    plain, permuted, flipped = conflict.agreeing(), conflict.labels(), conflict.axes()
    moved = []
    for client in plain:
        names: dict[int, int] = {}
        for part in ("train", "validation", "test"):
            before, after = getattr(plain[client], part), getattr(permuted[client], part)
            assert np.array_equal(before.inputs, after.inputs)
            for old, new in zip(before.targets.tolist(), after.targets.tolist(), strict=True):
                assert names.setdefault(old, new) == new  # the same name in every part
            turned = getattr(flipped[client], part)
            assert np.array_equal(before.targets, turned.targets)
        assert sorted(names.values()) == sorted(names)
        moved.append(tuple(names[label] for label in sorted(names)))
    assert len(set(moved)) > 5  # people who contradict one another
    changed = [not np.array_equal(plain[c].test.inputs, flipped[c].test.inputs) for c in plain]
    assert sum(changed) > 5
    assert all(set(data.train.targets) == set(range(7)) for data in plain.values())


def test_a_part_runs_stops_goes_on_and_makes_a_page(tmp_path: Path) -> None:
    part = PARTS["map-watch"].as_quick()
    name = next(iter(part.points))
    part = replace(
        part, points={name: {k: v for k, v in part.points[name].items() if k not in TINY}},
        methods={m: part.methods[m] for m in ("fedit", "rolora")}, seeds=2, settings=TINY,
    )  # fmt: skip
    with pytest.raises(OutOfTime):
        run_part(part, tmp_path / "runs", tmp_path / "results", until=time.monotonic())
    assert not (tmp_path / "results").exists()
    run_part(part, tmp_path / "runs", tmp_path / "results")
    found = json.loads((tmp_path / "results" / "map-watch.json").read_text())
    assert len(found["runs"]) == 4
    for run in found["runs"]:
        saved = (
            json.loads(path.read_text())
            for path in (tmp_path / "runs" / "runs").glob(f"**/{run['method']}/seed-*/result.json")
            if path.parent.name == f"seed-{run['seed']}"
        )
        (result,) = saved
        assert run["global"][0] == round(result["scores"]["global"]["mean"], 6)
        assert run["global"][1] == round(result["scores"]["global"]["loss"], 6)
    write_page(tmp_path)
    text = (tmp_path / "RESULTS.md").read_text()
    assert f"| rolora − fedit, {name} | > 0 |" in text
    assert (tmp_path / "results" / "claim-1.svg").read_bytes().startswith(b"<?xml")


def _fixture(differences: list[float | None], *, higher_is_better: bool = True) -> dict[str, Any]:
    """One point at which rolora is `differences` over fedit, seed by seed; None: it diverged."""
    point = "rank 2, iid"
    runs: list[dict[str, Any]] = []
    for seed, difference in enumerate(differences):
        row = {"method": "fedit", "point": point, "seed": seed, "seconds": 1.0}
        runs.append(row | {"base": [0.4, 1.0], "global": [0.5, 0.9]})
        row = {"method": "rolora", "point": point, "seed": seed}
        if difference is None:
            runs.append(row | {"failed": "diverged: NaN"})
        else:
            more = {"base": [0.4, 1.0], "global": [0.5 + difference, 0.8], "seconds": 1.0}
            runs.append(row | more)
    return {
        "part": "map-watch", "title": "watch", "adapter": "global", "metric": "accuracy",
        "higher_is_better": higher_is_better, "methods": ["fedit", "rolora"],
        "points": {point: {"lora.rank": 2}}, "seeds": list(range(len(differences))),
        "tuned": [{"method": "rolora", "point": point, "learning_rate": 0.5, "at_edge": True}],
        "runs": runs,
    }  # fmt: skip


def _contrast(*, tie: bool = False) -> Contrast:
    terms = ((1.0, "rolora", "rank 2, iid"), (-1.0, "fedit", "rank 2, iid"))
    return Contrast("map-watch", "rolora − fedit, rank 2, iid", terms, tie)


@pytest.mark.parametrize(
    ("differences", "order", "tie"),
    [
        ([0.10, 0.11, 0.12], "yes", "no, the contrary"),
        ([-0.10, -0.11, -0.12], "no, the contrary", "no, the contrary"),
        ([0.10, -0.10, 0.02], "no evidence", "no evidence"),
        ([0.001, -0.001, 0.000], "no evidence", "tie"),
        ([0.010, 0.011, 0.012], "yes", "tie"),  # real, and too small to choose by
        ([0.10, None, None], "not run", "not run"),
    ],
)
def test_verdicts_say_what_the_interval_says(
    differences: list[float | None], order: str, tie: str
) -> None:
    parts = {"map-watch": _fixture(differences)}
    assert examine(_contrast(), parts).verdict == order
    assert examine(_contrast(tie=True), parts).verdict == tie


def test_a_contrast_is_the_paired_difference_by_hand() -> None:
    found = examine(_contrast(), {"map-watch": _fixture([0.1, 0.3, None, 0.2])})
    assert found.metric is not None
    assert found.loss is not None
    interval = found.metric.interval
    # t(0.975, 2) = 4.3027; standard deviation 0.1 of three pairs
    half = 4.302653 * 0.1 / np.sqrt(3)
    assert interval.mean == pytest.approx(0.2)
    assert (interval.low, interval.high) == pytest.approx((0.2 - half, 0.2 + half), rel=1e-5)
    assert found.metric.effect == pytest.approx(2.0)
    assert found.loss.interval.mean == pytest.approx(0.1)  # a lower loss is better
    assert (found.lost, found.edges) == (1, 1)
    lower = examine(_contrast(), {"map-watch": _fixture([0.1, 0.3], higher_is_better=False)})
    assert lower.metric is not None
    assert lower.metric.interval.mean == pytest.approx(-0.2)


def test_a_growth_is_the_difference_of_differences() -> None:
    part = _fixture([0.1, 0.2, 0.3])
    other = json.loads(json.dumps(part).replace("rank 2, iid", "rank 16, iid"))
    for run in other["runs"]:
        if run["method"] == "rolora":
            run["global"][0] = 0.5 + 0.05
    part["runs"] += other["runs"]
    part["points"] |= other["points"]
    terms = (
        (1.0, "rolora", "rank 2, iid"), (-1.0, "fedit", "rank 2, iid"),
        (1.0, "fedit", "rank 16, iid"), (-1.0, "rolora", "rank 16, iid"),
    )  # fmt: skip
    found = examine(Contrast("map-watch", "growth", terms), {"map-watch": part})
    assert found.metric is not None
    assert found.metric.interval.mean == pytest.approx(0.15)


def test_a_missing_run_is_named() -> None:
    part = _fixture([0.1, 0.2])
    del part["runs"][-1]
    with pytest.raises(DataError, match=r"expected a run of .*rolora.*found none"):
        paired_scores(part, "rolora", "fedit", "rank 2, iid")


def test_the_page_has_the_numbers_and_keeps_what_was_written_by_hand() -> None:
    parts = {"map-watch": _fixture([0.1, 0.3, None, 0.2])}
    first = page(parts, {})
    row = "| rolora − fedit, rank 2, iid | > 0 | +0.200 | -0.048 to +0.448 | +2.0 | +0.100 |"
    assert f"{row} **no evidence**; 1 seeds lost; learning rate at an edge |" in first
    assert "| rank 2, iid | 0.400 | 0.500 ≈ | **0.700** |" in first
    assert "`conflict`: not run." in first
    assert "- map-watch: rolora, rank 2, iid, seed 2: diverged: NaN" in first
    written = first.replace("Not written yet.", "Words of\n\nsomebody.", 1)
    kept = by_hand(written)
    assert kept["which method when"] == "Words of\n\nsomebody."
    assert kept["claim 1"] == "Not written yet."
    assert page(parts, kept) == written
    assert page(parts, by_hand(page(parts, kept))) == written


def test_a_part_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--part", "keyboards"])


def test_the_page_alone_needs_no_runs(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    text = json.dumps(_fixture([0.1, 0.2]))
    (tmp_path / "results" / "map-watch.json").write_text(text)
    assert main(["--out", str(tmp_path / "out"), "--results", str(tmp_path), "--page"]) == 0
    assert "+0.150" in (tmp_path / "RESULTS.md").read_text()
    assert not (tmp_path / "out").exists()
