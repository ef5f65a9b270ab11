"""Private rounds: the sum, the noise, what is charged, and that every way to break it is caught."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, MetricRecord

from fedlora.adapter import Adapter
from fedlora.aggregation import ServerState, Update, method
from fedlora.errors import ConfigError, FederationError, RunError
from fedlora.experiment import ExperimentConfig
from fedlora.federation import private_sum, read_checkpoint, read_rounds, server
from fedlora.federation.asked import ASKED, read_asked
from fedlora.federation.checkpoint import Checkpoint, ClientRecord
from fedlora.federation.private_sum import NOISE_KEY, CohortSum, PrivateRounds
from fedlora.federation.results import run_table
from fedlora.flat import RowForm
from fedlora.formats import read_info
from fedlora.privacy import PrivacyEvent
from fedlora.privacy.central import CentralMechanism
from fedlora.privacy.ledger import LEDGER, Ledger
from fedlora.randomness import rng
from fedlora.simulation.grid import InProcessGrid
from fedlora.targets import LayerSpec, initial_adapter
from fedlora.training import Factor, TrainResult
from tests.federation.fakes import (
    FakeTrainer,
    FaultyGrid,
    experiment,
    fake_app,
    run,
    start_adapter,
)
from tests.matching import raises
from tests.reference.private_sum import as_row, clipped_sum

LINEAR = ("fedit", "ffa-lora", "fedsvd", "rolora", "fedsa-lora")
CLIP, Z, COHORT = 0.5, 1.5, 10
SECRET = bytes(range(32))


def keyed(out: Path, secret: bytes = SECRET) -> Path:
    """Put a key where a run is to begin, so that its cohorts and its noise are known."""
    (out / "checkpoint").mkdir(parents=True)
    (out / NOISE_KEY).write_bytes(secret)
    (out / NOISE_KEY).chmod(0o600)
    return out


def private(**overrides: Any) -> ExperimentConfig:
    """A small experiment with central privacy; overrides as in `experiment`."""
    # rdp: pld takes seconds for every other probability, and has tests of its own.
    table = {"clipping_norm": CLIP, "noise_multiplier": Z, "accountant": "rdp"}
    table |= overrides.pop("privacy", {})
    return experiment(federation__weights="equal", privacy=table, **overrides)


def rounds_of(
    folder: Path, config: ExperimentConfig, clients: int = 1000, secret: bytes = SECRET
) -> PrivateRounds:
    """The privacy of a run that begins, with a secret that is no secret."""
    keyed(folder, secret)
    state = ServerState.start(start_adapter(config))
    people = tuple(ClientRecord(f"c{i:04d}") for i in range(clients))
    return PrivateRounds.open(config, folder, Checkpoint(state, people))


# One layer whose B has 100,000 numbers, all of them zero at the start.
WIDE = {"wide": LayerSpec("linear", (2,), 50_000)}
Run = Callable[[Sequence[tuple[np.ndarray, float]]], np.ndarray]


def runner(folder: Path) -> Run:
    """What a round makes of updates with their num_examples: the change of the global B.

    Each call is the first round of a run of its own.
    """
    config = private(federation__method="ffa-lora", federation__cohort=COHORT)
    start = initial_adapter(WIDE, replace(config.lora, target_modules=("wide",)), 0, "ba5e" * 16)
    chosen, state, number = method("ffa-lora"), ServerState.start(start), iter(range(1000))
    form = RowForm.of(start, frozenset({"B"}))

    def one_round(updates: Sequence[tuple[np.ndarray, float]]) -> np.ndarray:
        count = next(number)
        rounds = rounds_of(folder / str(count), config, secret=bytes([count] * 32))
        rounds.begin(1, [f"c{i:04d}" for i in range(1000)])
        sent = (
            Update(form.read(row.astype("<f4").tobytes()), examples, f"c{i:04d}")
            for i, (row, examples) in enumerate(updates)
        )
        after = rounds.release(chosen, state, sent)
        return as_row(after.trainable, frozenset({"B"}))

    return one_round


def broken_parts(one_round: Run) -> set[str]:
    """What of a private round does not hold, by nothing but what goes in and what comes out."""
    size, std = 100_000, Z * CLIP / COHORT
    zero = (np.zeros(size, np.float32), 1.0)
    along = np.zeros(size, np.float32)
    along[:100] = 0.1  # of length 1
    found = set()
    full = one_round([zero] * COHORT)
    # The standard error of a standard deviation of 1e5 numbers is 0.22 %.
    if not abs(full.std() / std - 1) < 0.01:
        found.add("noise")
    some = one_round([zero] * (COHORT * 7 // 10))
    if full.std() and not abs(some.std() / full.std() - 1) < 0.01:
        found.add("denominator")
    # Of a sum, along one direction, the noise is z C: an update of a thousand times C is seen.
    moved = COHORT * float(one_round([(1000 * CLIP * along, 1.0), *[zero] * (COHORT - 1)]) @ along)
    if moved > CLIP + 5 * Z * CLIP:
        found.add("clipping")
    heavy = [(0.9 * CLIP * along, 1000.0), *[zero] * (COHORT - 1)]
    if COHORT * float(one_round(heavy) @ along) > CLIP + 5 * Z * CLIP:
        found.add("weights")
    return found


def test_the_mechanism_holds_in_every_part(tmp_path: Path) -> None:
    assert broken_parts(runner(tmp_path)) == set()


def _without_noise(self: CentralMechanism, total: Any, round: int, bits: Any = None) -> Any:
    return total / self.denominator


def _by_examples(self: PrivateRounds, method: Any, state: Any, updates: Any) -> CohortSum:
    total, replies = np.zeros(100_000), 0
    for update in updates:
        row = as_row(update.adapter, frozenset({"B"}))
        total += update.num_examples * self.mechanism.clip(row)
        replies += 1
    return CohortSum(total, replies)


def _by_replies(self: PrivateRounds, method: Any, state: Any, found: CohortSum) -> ServerState:
    mean = self.mechanism.release(found.total, 1) * COHORT / found.replies
    form = RowForm.of(state.trainable, frozenset({"B"}))
    return replace(state, trainable=form.read(mean.astype("<f4").tobytes()))


BROKEN: dict[str, tuple[str, type, str, Any]] = {
    "noise is forgotten": ("noise", CentralMechanism, "release", _without_noise),
    "clipping is forgotten": (
        "clipping", CentralMechanism, "clip", lambda self, row: np.asarray(row, np.float64)
    ),
    "weights are unequal": ("weights", PrivateRounds, "add_up", _by_examples),
    "the noise is divided by the replies": (
        "denominator", PrivateRounds, "release_sum", _by_replies
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_mechanism_is_caught(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, owner, attribute, broken = BROKEN[name]
    monkeypatch.setattr(owner, attribute, broken)
    assert broken_parts(runner(tmp_path)) == {part}


@pytest.mark.parametrize("name", LINEAR)
def test_the_sum_is_that_of_the_plain_loop(name: str, tmp_path: Path) -> None:
    config, chosen = private(federation__method=name), method(name)
    start, uploaded = start_adapter(config), chosen.uploaded(1)
    draws = rng(0, "updates")

    def moved(size: float) -> Adapter:
        def move(value: np.ndarray, factor: Factor) -> np.ndarray:
            if factor not in uploaded:
                return value
            return value + np.float32(size) * draws.normal(size=value.shape).astype(np.float32)

        layers = {
            path: replace(layer, A=move(layer.A, "A"), B=move(layer.B, "B"))
            for path, layer in start.layers.items()
        }
        return replace(start, layers=layers)

    # Far over the norm, well below it, and nothing at all.
    adapters = [moved(1.0), moved(0.01), moved(30.0), start, moved(0.001)]
    rounds = rounds_of(tmp_path, config)
    updates = (Update(adapter, 1.0, f"c{i}") for i, adapter in enumerate(adapters))
    found = rounds.add_up(chosen, ServerState.start(start), updates)
    expected = clipped_sum(start, adapters, uploaded, CLIP)
    assert found.replies == 5
    # Sums of some hundred float64 products, in another order.
    np.testing.assert_allclose(found.total, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("sampling", ["poisson", "fixed"])
def test_a_private_run_of_every_linear_method(name: str, sampling: str, tmp_path: Path) -> None:
    config = private(federation__method=name, federation__sampling=sampling)
    tmp_path = keyed(tmp_path / "run")
    state, records = run(config, tmp_path)
    assert state.round == 3
    assert [record.status for record in records] == ["updated"] * 3
    assert [record.loss for record in records] == [None] * 3
    assert all(record.clients == {} for record in records)
    lines = Ledger.read(tmp_path).lines
    assert [line.round for line in lines] == [1, 2, 3]
    assert all(line.event.sampling == sampling for line in lines)
    assert all(line.event.noise_multiplier == Z for line in lines)
    epsilons = [record.epsilon for record in records]
    assert 0 < epsilons[0] < epsilons[1] < epsilons[2]
    assert read_checkpoint(tmp_path).clients[0].steps == 0


def test_nothing_but_factors_is_on_the_wire(tmp_path: Path) -> None:
    seen: list[set[str]] = []

    def look(reply: Message, client: str) -> list[Message]:
        seen.append(set(reply.content))
        return [reply]

    run(private(federation__rounds=1, federation__cohort=8), tmp_path, grid=FaultyGrid(look))
    assert seen == [{"client"}] * 8 + [{"factors", "layout"}] * 8


def test_a_client_that_tells_metrics_all_the_same_is_dropped(tmp_path: Path) -> None:
    def tell(reply: Message, client: str) -> list[Message]:
        if client == "c3" and "factors" in reply.content:
            reply.content["metrics"] = MetricRecord({"loss": 0.5, "steps": 5})
        return [reply]

    config = private(federation__rounds=1, federation__cohort=8)
    _, (record,) = run(config, tmp_path, grid=FaultyGrid(tell))
    assert [(d.client, d.reason) for d in record.dropped] == [
        ("c3", "client 'c3': expected no metrics in a run with privacy, found some")
    ]


def test_who_does_not_clip_is_clipped_by_the_server(tmp_path: Path) -> None:
    """One client sends a million times too much; the global adapter moves by noise and C / m."""

    def shout(result: TrainResult, round: Any) -> TrainResult:
        layers = {p: replace(a, B=a.B + 1e5) for p, a in result.adapter.layers.items()}
        return replace(result, adapter=replace(result.adapter, layers=layers))

    config = private(federation__rounds=1, federation__cohort=8, federation__method="ffa-lora")
    state, (record,) = run(config, tmp_path, {2: FakeTrainer(2, change=shout)})
    assert record.dropped == ()
    start = as_row(start_adapter(config), frozenset({"B"}))
    moved = as_row(state.trainable, frozenset({"B"})) - start
    # Eight clients of norm 0.5 at most, and the noise of 60 numbers with the deviation 0.75.
    assert np.linalg.norm(moved) * 8 < 8 * CLIP + 1.5 * Z * CLIP * len(moved) ** 0.5


def test_rounds_without_anyone_release_noise_and_are_charged(tmp_path: Path) -> None:
    def silent(reply: Message, client: str) -> list[Message]:
        return [reply] if "client" in reply.content else []

    config = private(federation__rounds=2, federation__method="ffa-lora")
    state, records = run(config, tmp_path, grid=FaultyGrid(silent))
    assert [record.status for record in records] == ["failed", "failed"]
    assert [line.round for line in Ledger.read(tmp_path).lines] == [1, 2]
    changed = as_row(state.trainable, frozenset({"B"}))
    # Two rounds of noise with z C / m = 0.1875 on each of 30 numbers that were zero.
    assert 0.1 < changed.std() < 0.5
    lonely = private(federation__rounds=1, federation__cohort=1, federation__sampling="poisson")
    for number in range(20):
        out = keyed(tmp_path / str(number), bytes([number] * 32))
        state, (record,) = run(lonely, out)
        if record.status == "empty":
            break
    # Cohorts of Binomial(8, 1/8), of which a third are empty.
    assert record.cohort == ()
    assert len(Ledger.read(out).lines) == 1
    assert not np.array_equal(
        as_row(state.trainable, frozenset({"B"})), as_row(start_adapter(lonely), frozenset({"B"}))
    )


def test_a_declined_round_does_not_come_again_and_the_next_one_waits(tmp_path: Path) -> None:
    from fedlora.federation.limits import declined_content

    pauses: list[float] = []

    def decline(reply: Message, client: str) -> list[Message]:
        if "factors" in reply.content:
            reply.content = declined_content("battery")
        return [reply]

    config = private(federation__rounds=5, federation__cohort=3)
    state, records = run(config, tmp_path, grid=FaultyGrid(decline), pause=pauses.append)
    # More rounds than may fail in a row: who declines does not end a run.
    assert [record.status for record in records] == ["declined"] * 5
    assert [record.round for record in records] == [1, 2, 3, 4, 5]
    assert state.round == len(Ledger.read(tmp_path).lines) == 5
    assert pauses == [60, 120, 240, 480, 900]


def test_the_run_ends_before_max_epsilon_is_passed(tmp_path: Path) -> None:
    config = private(federation__rounds=50, privacy={"max_epsilon": 6.0}, federation__cohort=2)
    state, records = run(config, tmp_path, evaluate=True)
    assert 0 < state.round < 50
    assert records[-1].epsilon <= 6.0
    summary = json.loads((tmp_path / "summary.json").read_text())["privacy"]
    assert summary["stopped"] == "max_epsilon"
    assert summary["rounds"] == state.round
    assert summary["epsilon"] == pytest.approx(records[-1].epsilon, abs=1e-6)
    with_one_more = [line.event for line in Ledger.read(tmp_path).lines]
    from fedlora.privacy.accounting import epsilon_of

    assert epsilon_of([*with_one_more, with_one_more[0]], 1e-5, "rdp") > 6.0
    # Started again it stays where it is.
    again, records = run(config, tmp_path, evaluate=True)
    assert (again.round, records) == (state.round, [])


def test_noise_is_calibrated_once_and_a_longer_run_keeps_it(tmp_path: Path) -> None:
    config = private(privacy={"noise_multiplier": None, "epsilon": 4.0}, federation__rounds=3)
    state, records = run(config, tmp_path)
    z = read_checkpoint(tmp_path).privacy.noise_multiplier
    assert state.round == 3
    # Calibration ends a little below its goal, and never above.
    assert 3.9 < records[-1].epsilon <= 4.0
    longer = private(privacy={"noise_multiplier": None, "epsilon": 4.0}, federation__rounds=9)
    state, records = run(longer, tmp_path)
    assert (state.round, records) == (3, [])
    assert read_checkpoint(tmp_path).privacy.noise_multiplier == z


def test_summary_table_and_adapter_say_the_guarantee(tmp_path: Path) -> None:
    config = private(federation__sampling="poisson", privacy={"accountant": "pld"})
    _, records = run(config, tmp_path, evaluate=True)
    summary = json.loads((tmp_path / "summary.json").read_text())
    found = summary["privacy"]
    assert found == {
        "mechanism": "central",
        "epsilon": pytest.approx(records[-1].epsilon, abs=1e-6),
        "delta": 1e-5,
        "unit": "user",
        "neighboring_relation": "add-or-remove-one",
        "accountant": "pld",
        "clipping_norm": CLIP,
        "noise_multiplier": Z,
        "sampling": "poisson",
        "sampling_probability": 0.5,
        "rounds": 3,
        "stopped": None,
        "secure_aggregation": False,
        "notes": [],
    }
    provenance = read_info(tmp_path / "adapter.safetensors").provenance["privacy"]
    assert provenance == {
        key: found[key] for key in ("epsilon", "delta", "unit", "neighboring_relation")
    }
    table = run_table(tmp_path)
    shown = math.ceil(100 * found["epsilon"]) / 100  # never less than what it is
    assert (
        f"privacy: (epsilon {shown:.2f}, delta 1e-05) for each person (user), "
        "add-or-remove-one, by pld; noise by the server, multiplier 1.5, clipping norm 0.5, "
        "Poisson 0.5; 3 rounds"
    ) in table
    # People have personalized, and nobody has told how.
    assert summary["clients"] == 8
    assert summary["global"] is None
    assert "tell nothing of it" in table


def test_the_last_stage_tells_nothing_and_people_keep_their_adapters(tmp_path: Path) -> None:
    from fedlora.store import Store

    seen: list[dict[str, Any]] = []

    class Watching(InProcessGrid):
        def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
            for reply in super().send_and_receive(messages, timeout=timeout):
                if "scores" in reply.content:
                    seen.append(dict(reply.content["scores"]))
                yield reply

    config = private(federation__rounds=1)
    grid = Watching(fake_app(states=tmp_path / "states"), 8)
    run(config, tmp_path / "run", grid=grid, evaluate=True)
    assert seen == [{}] * 8
    kept = Store.open(tmp_path / "states" / "3").status()
    assert kept.personal is not None


def test_an_adaptive_norm_goes_into_the_checkpoint_and_the_ledger(tmp_path: Path) -> None:
    config = private(
        privacy={"target_quantile": 0.5, "noise_multiplier": 0.5}, federation__cohort=8,
        federation__rounds=3,
    )  # fmt: skip
    run(config, tmp_path)
    lines = Ledger.read(tmp_path).lines
    norms = [line.clipping_norm for line in lines if line.mechanism == "central"]
    assert [(line.mechanism, line.noise_std) for line in lines[1::2]] == [("count", 0.4)] * 3
    # Both together cost what the experiment says.
    multipliers = [event.noise_multiplier for event in Ledger.read(tmp_path).events()]
    assert multipliers == pytest.approx([0.5] * len(multipliers), rel=1e-12)
    assert norms[0] == CLIP
    assert len(set(norms)) == 3
    assert read_checkpoint(tmp_path).privacy.clipping_norm not in norms
    # Nearly all fakes move by more than 0.5: the norm grows, by exp(0.1) a round at most.
    assert all(b <= a * math.exp(0.1) * 1.0001 for a, b in itertools.pairwise(norms))


class _Stop(Exception):
    pass


def _folder_of(out: Path) -> dict[str, bytes]:
    """What must be the same after a resume; rounds.jsonl holds seconds."""
    adapter = read_checkpoint(out).state.trainable
    return {
        "ledger": (out / LEDGER).read_bytes(),
        "key": (out / NOISE_KEY).read_bytes(),
        "adapter": as_row(adapter, frozenset({"A", "B"})).tobytes(),
        "privacy": repr(read_checkpoint(out).privacy).encode(),
    }


@pytest.mark.parametrize("at", ["ledger", "rounds", "checkpoint"])
def test_a_run_cut_off_anywhere_in_a_round_goes_on_bit_for_bit(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = private(
        privacy={"target_quantile": 0.5, "noise_multiplier": 0.5}, federation__cohort=6,
        federation__sampling="poisson",
    )  # fmt: skip
    keyed(tmp_path / "cut")
    run(config, keyed(tmp_path / "whole"))

    with monkeypatch.context() as patch:
        owner, name = {
            "ledger": (Ledger, "append"),
            "rounds": (server, "append_round"),
            "checkpoint": (server, "write_checkpoint"),
        }[at]
        real, calls = getattr(owner, name), iter(range(100))
        # Of round 2: its first line of two, its record, its checkpoint (one is at the start).
        last = {"ledger": 2, "rounds": 1, "checkpoint": 2}[at]

        def cut(*args: Any) -> Any:
            found = real(*args)
            if next(calls) == last:
                raise _Stop
            return found

        patch.setattr(owner, name, cut)
        with pytest.raises(_Stop):
            run(config, tmp_path / "cut")
    assert {line.round for line in Ledger.read(tmp_path / "cut").lines} == {1, 2}
    run(config, tmp_path / "cut")
    assert _folder_of(tmp_path / "cut") == _folder_of(tmp_path / "whole")
    assert [record.round for record in read_rounds(tmp_path / "cut")] == [1, 2, 3]
    assert [record.epsilon for record in read_rounds(tmp_path / "cut")] == [
        record.epsilon for record in read_rounds(tmp_path / "whole")
    ]


CHILD = """
import os, signal, sys
from pathlib import Path
from fedlora.privacy.ledger import LEDGER, Ledger
from tests.federation.fakes import run
from tests.federation.test_private_sum import private
append, lines = Ledger.append, []
def killed(self, line):
    found = append(self, line)
    lines.append(line)
    if len(lines) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return found
Ledger.append = killed
run(private(), Path(sys.argv[1]))
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_kill_9_neither_doubles_nor_shortens_the_ledger(tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(out)], cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}, capture_output=True,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    assert [line.round for line in Ledger.read(out).lines] == [1, 2]
    assert read_checkpoint(out).state.round == 1
    run(private(), out)
    assert [line.round for line in Ledger.read(out).lines] == [1, 2, 3]


def test_what_a_run_cannot_go_on_without_is_named(tmp_path: Path) -> None:
    config, longer = private(federation__rounds=1), private(federation__rounds=2)
    run(config, tmp_path)
    ledger = (tmp_path / LEDGER).read_bytes()
    (tmp_path / LEDGER).unlink()
    with raises(RunError, "expected lines of all 1 rounds, found 0", "cannot go on"):
        run(longer, tmp_path)
    (tmp_path / LEDGER).write_bytes(ledger)
    (tmp_path / NOISE_KEY).unlink()
    with raises(RunError, "noise.key", "released twice, with two noises", "start a new run"):
        run(longer, tmp_path)


def test_a_quorum_cannot_shut_a_reply_out(tmp_path: Path) -> None:
    with raises(ConfigError, "quorum.share: expected 1.0 with [privacy], found 0.5"):
        private(quorum={"share": 0.5})


def test_local_privacy_noises_on_the_device_and_charges_the_busiest(tmp_path: Path) -> None:
    replies: list[np.ndarray] = []

    def look(reply: Message, client: str) -> list[Message]:
        if "factors" in reply.content:
            replies.append(reply.content["factors"]["factors"].numpy().copy())
        return [reply]

    config = private(
        privacy={"mechanism": "local", "noise_multiplier": 20.0}, federation__method="ffa-lora",
        federation__rounds=4, federation__cohort=3,
    )  # fmt: skip
    state, records = run(config, tmp_path, grid=FaultyGrid(look))
    assert state.round == 4
    noise = np.concatenate(replies[:3])  # of round 1, where B was zero
    # 90 numbers of the deviation z C = 10: its standard error is 7.5 %; updates are 0.5 long.
    assert noise.std() == pytest.approx(10, rel=0.3)
    asked = [name for record in records for name in record.cohort]
    busiest = max(map(asked.count, asked))
    lines = Ledger.read(tmp_path).lines
    assert sum(line.event.count for line in lines) == busiest
    assert {line.event.neighboring_relation for line in lines} == {"replace-one"}
    assert not (tmp_path / NOISE_KEY).exists()
    mean = as_row(state.trainable, frozenset({"B"}))
    assert np.isfinite(mean).all()


def test_local_noise_is_never_the_same_twice(tmp_path: Path) -> None:
    config = private(privacy={"mechanism": "local"}, federation__rounds=1)
    one, other = (run(config, tmp_path / name)[0].trainable for name in "ab")
    assert not np.array_equal(
        as_row(one, frozenset({"A", "B"})), as_row(other, frozenset({"A", "B"}))
    )


def test_a_local_round_that_was_cut_off_is_charged_twice_and_a_resume_alone_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = private(privacy={"mechanism": "local"}, federation__rounds=2, federation__cohort=8)

    with monkeypatch.context() as patch:

        def cut(*args: Any) -> None:
            raise _Stop

        patch.setattr(server, "append_round", cut)
        with pytest.raises(_Stop):
            run(config, tmp_path)
    run(config, tmp_path)
    # Devices have sent in round 1, once more in round 1, and in round 2.
    lines = Ledger.read(tmp_path).lines
    assert [(line.round, line.event.count) for line in lines] == [(1, 2), (2, 1)]
    for rounds in (2, 3):
        run(replace(config, federation=replace(config.federation, rounds=rounds)), tmp_path)
    lines = Ledger.read(tmp_path).lines
    assert [(line.round, line.event.count) for line in lines] == [(1, 2), (2, 1), (3, 1)]


def test_a_cut_off_local_round_of_others_than_the_busiest_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = private(privacy={"mechanism": "local"}, federation__rounds=3, federation__cohort=8)
    cohorts = iter([["c0"], ["c1"], ["c1"], ["c1"]])  # the second and third are of one round

    with monkeypatch.context() as patch:
        patch.setattr(private_sum, "draw_cohort", lambda *_: tuple(next(cohorts)))
        with monkeypatch.context() as inner:
            append = server.append_round

            def cut(out: Path, record: Any) -> None:
                if record.round == 2:
                    raise _Stop
                append(out, record)

            inner.setattr(server, "append_round", cut)
            with pytest.raises(_Stop):
                run(config, tmp_path)
        # Of a line that was begun nobody was asked.
        with open(tmp_path / ASKED, "ab") as file:
            file.write(b'{"round": 2, "coh')
        run(config, tmp_path)
    # c1 has sent three times, c0 once.
    assert read_asked(tmp_path) == ({"c0": 1, "c1": 3}, {1, 2, 3})
    lines = Ledger.read(tmp_path).lines
    assert [(line.round, line.event.count) for line in lines] == [(1, 1), (2, 1), (3, 1)]
    (tmp_path / ASKED).unlink()
    with raises(RunError, "what devices have sent is not known"):
        run(config, tmp_path)


def test_a_local_run_of_which_a_part_was_lost_or_put_back_does_not_go_on(tmp_path: Path) -> None:
    config = private(privacy={"mechanism": "local"}, federation__rounds=1, federation__cohort=8)
    out, before = tmp_path / "run", tmp_path / "before"

    def up_to(rounds: int) -> None:
        run(replace(config, federation=replace(config.federation, rounds=rounds)), out)

    up_to(1)
    shutil.copytree(out / "checkpoint", before)
    up_to(3)
    lines = (out / ASKED).read_bytes().splitlines(keepends=True)
    # What is missing would otherwise be sent once more, and charged to nobody.
    for kept in (lines[:2], lines[1:]):
        (out / ASKED).write_bytes(b"".join(kept))
        with raises(RunError, "what devices have sent is not known"):
            up_to(4)
    shutil.rmtree(out / "checkpoint")
    shutil.copytree(before, out / "checkpoint")
    with raises(RunError, "what devices have sent is not known"):
        up_to(4)


def test_a_local_run_that_was_cut_off_between_its_two_files_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = private(privacy={"mechanism": "local"}, federation__rounds=2, federation__cohort=8)
    cohorts = iter([[], ["c0"], ["c0"]])  # the last two are of one round
    monkeypatch.setattr(private_sum, "draw_cohort", lambda *_: tuple(next(cohorts)))
    append = private_sum.append_asked
    with monkeypatch.context() as patch:

        def cut(out: Path, round: int, cohort: Sequence[str]) -> None:
            if round == 2:
                raise _Stop
            append(out, round, cohort)

        patch.setattr(private_sum, "append_asked", cut)
        with pytest.raises(_Stop):
            run(config, tmp_path)
    run(config, tmp_path)
    # Nobody was asked before the end: c0 has sent once, and is charged once.
    assert [(line.round, line.event.count) for line in Ledger.read(tmp_path).lines] == [(2, 1)]


def test_a_device_keeps_its_own_ledger_and_its_owners_limits(tmp_path: Path) -> None:
    from fedlora.federation.client import handle_train
    from fedlora.privacy.local import NoiseLimits

    config = private(privacy={"mechanism": "local", "noise_multiplier": 1.0}, federation__cohort=8)
    grid = InProcessGrid(fake_app(states=tmp_path / "states"), 8)
    run(config, tmp_path / "run", grid=grid)
    lines = Ledger.read(tmp_path / "states" / "3").lines
    assert [line.round for line in lines] == [1, 2, 3]
    assert lines[0].event == PrivacyEvent(1.0, "fixed", 1.0, 1, 1)

    asked: list[Message] = []

    class Asking(InProcessGrid):
        def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
            kept = list(messages)
            asked.extend(m for m in kept if m.metadata.message_type == "train")
            return super().send_and_receive(kept, timeout=timeout)

    for mechanism in ("local", "central"):
        run(
            private(privacy={"mechanism": mechanism}, federation__rounds=1, federation__cohort=8),
            tmp_path / mechanism, grid=Asking(fake_app(), 8),
        )  # fmt: skip
    local, central = asked[0], asked[-1]
    strict = NoiseLimits(min_noise_multiplier=1000.0, max_clipping_norm=0.4)
    reply = handle_train(local, lambda setup: FakeTrainer(0), noise=strict)
    told = reply.content["factors"]["factors"].numpy()
    # Its deviation is 1000 times 0.4, where the server ordered 1.5 times 0.5.
    assert 200 < told.std() < 600
    # Nothing that has no noise leaves beside what has.
    for key in ("share_metrics", "share_num_examples"):
        content: Any = local.content
        before, content["setup"][key] = content["setup"][key], True
        open_too = handle_train(local, lambda setup: FakeTrainer(0), noise=strict)
        assert open_too.has_error()
        assert "expected nothing beside an update with local noise" in open_too.error.reason
        content["setup"][key] = before
    refused = handle_train(central, lambda setup: FakeTrainer(0), noise=strict)
    assert refused.has_error()
    assert "this device's owner demands local noise" in refused.error.reason


def test_metrics_do_not_leave_a_client_whatever_its_trainer_tells() -> None:
    from flwr.app import RecordDict

    from fedlora.federation.buffers import BufferForm
    from fedlora.federation.guard import check_reply
    from fedlora.federation.replies import ReplyForm, encode_reply_row
    from fedlora.flat import pack

    start = start_adapter(experiment())
    form = ReplyForm.of(start, frozenset({"B"}), 1, measured=False)
    content = encode_reply_row(form, pack(start, form.segments), {"loss": 1.0, "steps": 2})
    assert set(content) == {"factors", "layout"}
    buffer: BufferForm = form.wire
    check_reply(content, buffer, share_num_examples=False, share_metrics=False)
    more = RecordDict({**content, "metrics": MetricRecord({"loss": 1.0})})
    with raises(FederationError, "refused to send 'metrics' in the reply"):
        check_reply(more, buffer, share_num_examples=False, share_metrics=False)
