"""From rows to summary.json and the table."""

import json

from fedlora.federation.results import cross_matrix, results, table


def row(client, base, own, shared, personal, *, held_out=False):
    values = {"base": base, "own": own, "global": shared, "personal": personal}
    scores = {name: {"loss": 1 - value, "accuracy": value} for name, value in values.items()}
    return {"client": client, "held_out": held_out, "rounds": 1, "scores": scores}


ROWS = [
    row("a", 0.5, 0.6, 0.7, 0.8),
    row("b", 0.4, 0.5, 0.6, 0.6),
    row("c", 0.1, 0.2, 0.3, 0.4, held_out=True),
]


def test_held_out_clients_are_reported_apart():
    found = results(ROWS, metric="accuracy", higher_is_better=True)
    assert found["clients"] == 2
    assert round(found["base"]["mean"], 12) == 0.45
    assert found["base"]["worst_tenth"] == 0.4
    assert found["held_out"]["personal"]["mean"] == 0.4
    assert found["share_improved"] == 0.5
    assert round(found["extra"]["gain_global_over_base"]["mean"], 12) == 0.2
    json.dumps(found)


def test_without_held_out_clients_the_entry_is_null():
    assert results(ROWS[:2], metric="accuracy", higher_is_better=True)["held_out"] is None


def test_the_metric_decides_what_worst_means():
    found = results(ROWS[:2], metric="loss", higher_is_better=False)
    assert found["base"]["worst_tenth"] == 0.6


def test_own_beats_others_compares_with_the_mean_of_the_others():
    values = [[1.0, 3.0, 5.0], [2.0, 2.9, 4.0], [3.0, 2.5, 4.4]]
    # losses; column a: 1.0 < 2.5 yes; b: 2.9 > 2.75 no; c: 4.4 < 4.5 yes
    found = cross_matrix(["a", "b", "c"], values, higher_is_better=False)
    assert found["own_beats_others"] == 2
    assert found["values"] == values


def test_table_has_a_line_an_adapter_and_the_paired_gains():
    summary = results(ROWS, metric="accuracy", higher_is_better=True)
    lines = table(summary).splitlines()
    assert lines[0].split() == [
        "2", "clients", "accuracy", "mean", "median", "worst", "tenth", "loss",
    ]  # fmt: skip
    assert lines[1].split() == ["base", "0.4500", "0.4500", "0.4000", "0.5500"]
    assert lines[4].split() == ["personal", "0.7000", "0.7000", "0.6000", "0.3000"]
    assert lines[6].startswith("1 held-out clients")
    assert "global better than base by: +0.2000 accuracy (95 % interval +0.2000 to" in lines[12]
    assert lines[14] == "personal better than global for 50.0% of the clients"


def test_table_ends_with_the_notes():
    summary = results(ROWS, metric="accuracy", higher_is_better=True)
    summary["extra"]["notes"] = ["2 replies did not count; the last: node lost"]
    assert table(summary).splitlines()[-1] == "note: 2 replies did not count; the last: node lost"


def test_who_keeps_the_global_adapter_is_counted_where_that_was_asked():
    kept = [r | {"kept_global": r["client"] != "a"} for r in ROWS]
    summary = results(kept, metric="accuracy", higher_is_better=True)
    assert summary["extra"]["kept_global"] == 1
    assert summary["extra"]["held_out_kept_global"] == 1
    assert "did better in validation, for 1 of 2 clients" in table(summary).splitlines()[-1]
    assert "kept_global" not in results(ROWS, metric="accuracy", higher_is_better=True)["extra"]
