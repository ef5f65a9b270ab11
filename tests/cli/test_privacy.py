"""`fedlora privacy`: an epsilon, the noise for one, and what a run has spent."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedlora.cli import privacy
from fedlora.errors import ConfigError, RunError
from fedlora.experiment import find_experiment
from fedlora.privacy import PrivacyEvent
from fedlora.privacy.accounting import epsilon_of
from fedlora.privacy.ledger import Ledger, LedgerLine

EXACT = ("--accountant", "exact", "--sampling-probability", "1")


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def run(*words: str) -> str:
    result = CliRunner().invoke(privacy.app, words)
    if result.exception:
        raise result.exception
    return result.stdout


def epsilon(*words: str) -> str:
    return run("epsilon", "--delta", "1e-5", *words)


def a_run(out: Path, *, table: bool = True) -> Path:
    """Write a run's folder of three rounds with the bit of adaptive clipping, and its ledger."""
    out.mkdir()
    text = find_experiment("watch").read_text()
    text = text.replace("[federation]\n", "[federation]\nweights = 'equal'\n")
    if table:
        text += "\n[privacy]\nclipping_norm = 0.5\nnoise_multiplier = 5\ndelta = 1e-4\n"
    (out / "experiment.toml").write_text(text)
    ledger = Ledger.read(out)
    for round in (1, 2, 3):
        ledger = ledger.append(LedgerLine(round, PrivacyEvent(6.0, "all"), 0.5, 3.0))
        event = PrivacyEvent(20.0, "all")
        ledger = ledger.append(LedgerLine(round, event, 0.5, 10.0, "count", ("a bit",)))
    return out


def test_epsilon_as_json_names_what_it_is_of() -> None:
    words = ("--sampling-probability", "0.1", "--noise-multiplier", "2", "--rounds", "100")
    found = json.loads(epsilon(*words, "--json"))
    assert found.pop("epsilon") == pytest.approx(2.337400192580119, abs=1e-4)
    assert found == {
        "delta": 1e-5, "accountant": "pld", "neighboring_relation": "add-or-remove-one",
        "unit": "user", "rounds": 100, "noise_multiplier": 2.0, "sampling": "poisson",
        "sampling_probability": 0.1, "cohort": None, "population": None,
    }  # fmt: skip


def test_epsilon_in_words_is_rounded_up() -> None:
    text = epsilon(*EXACT, "--noise-multiplier", "10", "--rounds", "100")
    assert text.splitlines() == [
        "epsilon 4.3772 at delta 1e-05, after 100 rounds",
        "unit: user, add-or-remove-one (with or without any one person)",
        "accountant: exact",
    ]
    # 4.377178 is rounded up, and so is what is only a little above four digits
    assert privacy._words({"epsilon": 1.00001, "delta": 1e-5}).startswith("epsilon 1.0001 ")


def test_a_fixed_cohort_says_that_it_protects_a_replacement_and_who_counted() -> None:
    words = ("--cohort", "100", "--population", "1000", "--noise-multiplier", "2")
    found = json.loads(epsilon(*words, "--rounds", "100", "--json"))
    assert found["epsilon"] == pytest.approx(14.053750225346512, abs=1e-4)
    assert (found["accountant"], found["neighboring_relation"]) == ("rdp", "replace-one")
    assert (found["cohort"], found["population"]) == (100, 1000)
    text = epsilon(*words, "--rounds", "100")
    assert "replace-one" in text
    assert "two clipping norms" in text
    assert "accountant: rdp" in text


def test_no_noise_has_no_bound() -> None:
    words = ("--sampling-probability", "0.5", "--noise-multiplier", "0", "--rounds", "1")
    assert epsilon(*words).startswith("no bound on epsilon at delta 1e-05")
    assert json.loads(epsilon(*words, "--json"))["epsilon"] is None


def test_calibrate_prints_noise_that_keeps_the_promise() -> None:
    words = ("calibrate", *EXACT, "--epsilon", "3", "--rounds", "10", "--delta", "1e-5")
    found = json.loads(run(*words, "--json"))
    assert 3 * (1 - 2e-4) < found["epsilon"] <= 3
    printed = float(run(*words).splitlines()[0].removeprefix("noise multiplier "))
    assert found["noise_multiplier"] <= printed < found["noise_multiplier"] + 1e-5
    assert epsilon_of([PrivacyEvent(printed, "all", count=10)], 1e-5, "exact") <= 3


def test_ledger_tells_what_a_run_spent_with_its_own_delta(tmp_path: Path) -> None:
    out = a_run(tmp_path / "run")
    found = json.loads(run("ledger", str(out), "--accountant", "exact", "--json"))
    both = PrivacyEvent((1 / 36 + 1 / 400) ** -0.5, "all", count=3)
    assert found["epsilon"] == pytest.approx(epsilon_of([both], 1e-4, "exact"), rel=1e-9)
    assert found["delta"] == 1e-4
    assert (found["rounds"], found["releases"]) == (3, 6)
    assert [event["count"] for event in found["events"]] == [3]
    assert (found["unit"], found["neighboring_relation"]) == ("user", "add-or-remove-one")
    assert (found["mechanisms"], found["notes"]) == (["central", "count"], ["a bit"])


def test_ledger_prints_grouped_events_and_the_guarantee(tmp_path: Path) -> None:
    text = run("ledger", str(a_run(tmp_path / "run")), "--accountant", "exact", "--delta", "1e-6")
    assert "6 releases" in text
    assert "5.7470" in text.replace("5.747 ", "5.7470")  # the multiplier of both together
    assert "at delta 1e-06, after round 3" in text
    assert "unit: user, add-or-remove-one" in text
    assert "note: a bit" in text


def test_a_run_without_a_ledger_or_a_delta_is_refused(tmp_path: Path) -> None:
    out = a_run(tmp_path / "run", table=False)
    with pytest.raises(ConfigError, match=r"--delta: .* has no"):
        run("ledger", str(out))
    (out / "privacy.jsonl").unlink()
    with pytest.raises(RunError, match="found none; a run without it gives no guarantee"):
        run("ledger", str(out), "--delta", "1e-5")


REFUSED: dict[str, tuple[list[str], str]] = {
    "no sampling": ([], "found neither"),
    "both": (
        ["--sampling-probability", "1", "--cohort", "1", "--population", "2"], "found both",
    ),
    "cohort alone": (["--cohort", "1"], "expected --population beside it"),
    "too large": (["--cohort", "3", "--population", "2"], "at most the population of 2"),
    "exact": (["--sampling-probability", "0.1", "--accountant", "exact"], "expected pld or rdp"),
    "delta": (["--sampling-probability", "1", "--delta", "2"], "delta: expected"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_do_not_fit_are_wrong_usage(name: str) -> None:
    words, said = REFUSED[name]
    with pytest.raises(ConfigError, match=said) as caught:
        epsilon("--noise-multiplier", "1", "--rounds", "1", *words)
    assert caught.value.exit_code == 2


def whole_command(code: str, *words: str) -> subprocess.CompletedProcess[Any]:
    start = f"import sys; {code}; from fedlora.cli.main import main; main()"
    return subprocess.run([sys.executable, "-c", start, *words], capture_output=True, text=True)


def test_without_the_extra_it_says_how_to_get_it() -> None:
    words = ("--sampling-probability", "0.1", "--noise-multiplier", "1", "--rounds", "1")
    done = whole_command(
        "sys.modules['dp_accounting'] = None", "privacy", "epsilon", "--delta", "1e-5", *words
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.endswith(": run pip install 'fedlora[privacy]'\n")
    assert done.stderr.count("\n") == 1


def test_a_damaged_ledger_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    out = a_run(tmp_path / "run")
    with open(out / "privacy.jsonl", "ab") as file:
        file.write(b"{}\n")
    done = whole_command("0", "privacy", "ledger", str(out))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "privacy.jsonl, line 7: not a release" in done.stderr
