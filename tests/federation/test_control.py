"""Control variates through a whole federation of quadratics, whose optimum is known."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedlora.adapter import Adapter
from fedlora.aggregation import Broadcast, ServerState, Update, method, with_control_variates
from fedlora.errors import (
    ConfigError,
    FederationError,
    NonFiniteError,
    RunError,
    ShapeMismatchError,
)
from fedlora.experiment import ExperimentConfig
from fedlora.federation import ClientSetup, handle_query, handle_train, run_federation
from fedlora.federation.buffers import BufferForm
from fedlora.federation.checkpoint import read_checkpoint, read_rounds
from fedlora.federation.control import (
    next_control,
    put_control,
    read_own_control,
    write_own_control,
)
from fedlora.federation.device_state import DeviceState
from fedlora.federation.guard import check_reply
from fedlora.federation.own_rows import ContextRows
from fedlora.federation.records import BOTH, TrainOrder, to_record
from fedlora.federation.replies import ReplyForm, decode_reply, encode_reply_row, reply_bytes
from fedlora.flat import RowForm, pack, segments_of
from fedlora.randomness import rng
from fedlora.simulation.grid import InProcessGrid
from fedlora.training import LocalRule, TrainConfig, TrainResult
from tests.federation.fakes import experiment, raises, run, start_adapter
from tests.reference.scaffold import fedavg, quadratics, scaffold

CLIENTS, STEPS, RATE = 5, 10, 0.1
CURVATURES = (0.2, 0.5, 1.0, 2.0, 4.0)
# Float32 factors of size 1 in 60 rounds against float64; c_k divides their rounding by K lr = 1.
CLOSE = 2e-5


@dataclass
class Quadratic:
    """Client k: trained factors as one vector x, and the loss ``h_k / 2 |x - m_k|^2``."""

    number: int
    num_examples: int = 10
    rank: int | None = None
    gradient: Callable[[np.ndarray], np.ndarray] = field(default=lambda x: x)

    @property
    def client_id(self) -> str:
        return f"c{self.number}"

    @property
    def initial(self) -> Adapter:
        return start_adapter(scaffold_config())

    def train(
        self,
        broadcast: Broadcast,
        config: TrainConfig,
        rule: LocalRule,
        round: int,
        seed: int,
        correction: np.ndarray | None = None,
    ) -> TrainResult:
        start = broadcast.trainable
        x = begin = pack(start, segments_of(start, rule.trained)).astype(float)
        for _ in range(config.local_steps or 0):
            gradient = self.gradient(x) + rule.proximal_weight * (x - begin)
            x = x - config.learning_rate * (gradient + (0 if correction is None else correction))
        adapter = RowForm.of(start, rule.trained).read(x.astype(np.float32).tobytes())
        return TrainResult(replace(adapter), self.num_examples, 1.0, config.local_steps or 0)


@dataclass
class Spied(InProcessGrid):
    """A grid that keeps every reply, and every client's state."""

    def __init__(self, app: ClientApp) -> None:
        super().__init__(app, CLIENTS)
        self.received: list[Message] = []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        for reply in super().send_and_receive(messages, timeout=timeout):
            self.received.append(reply)
            yield reply

    def state_of(self, number: int) -> RecordDict:
        return self._states[1000 + number]


def scaffold_config(**overrides: Any) -> ExperimentConfig:
    return experiment(
        **{
            "federation__control_variates": True,
            "federation__optimizer": "sgd",
            "federation__learning_rate": RATE,
            "federation__local_steps": STEPS,
            "federation__cohort": CLIENTS,
            "federation__weights": "equal",
            **overrides,
        }
    )


def problem(size: int) -> Any:
    centres = [rng(0, "centre", k).normal(size=size) for k in range(CLIENTS)]
    return quadratics(centres, CURVATURES)


def spied(
    config: ExperimentConfig,
    out: Path,
    examples: tuple[int, ...] = (10,) * CLIENTS,
    states: Path | None = None,
    forgets: int | None = None,
) -> tuple[ServerState, Spied]:
    """Run a federation; states: where each client has a folder of its own, but one that forgets."""
    start = start_adapter(config)
    factors = config.federation.build_method().uploaded(1)
    gradients, _ = problem(RowForm.of(start, factors).size)
    app = ClientApp()

    def opener(context: Context) -> Callable[[ClientSetup], Quadratic]:
        k = int(context.node_config["partition-id"])
        return lambda setup: Quadratic(k, examples[k], gradient=gradients[k])

    def device(context: Context) -> DeviceState | None:
        k = context.node_config["partition-id"]
        return None if states is None or k == forgets else DeviceState(states / str(k))

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return handle_query(message, opener(context), device(context))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return handle_train(message, opener(context), context.state, device(context))

    grid = Spied(app)
    return run_federation(grid, config, out, initial=start), grid


def row_of(adapter: Adapter, factors: frozenset = BOTH) -> np.ndarray:
    return pack(adapter, segments_of(adapter, factors)).astype(float)


def control_of(state: ServerState) -> np.ndarray:
    sent = with_control_variates(method("fedit")).broadcast(state, None)  # type: ignore[arg-type]
    return sent.control.astype(float)


def test_the_reference_finds_the_optimum_where_fedavg_does_not() -> None:
    gradients, centre = problem(7)
    optimum = centre(CURVATURES)
    everyone = [range(CLIENTS)] * 300
    x, c, own = scaffold(gradients, np.zeros(7), everyone, STEPS, RATE)
    np.testing.assert_allclose(x, optimum, rtol=0, atol=1e-12)
    np.testing.assert_allclose(c, 0, rtol=0, atol=1e-12)
    for mine, gradient in zip(own, gradients, strict=True):
        np.testing.assert_allclose(mine, gradient(optimum), rtol=0, atol=1e-12)
    # FedAvg stops where the clients' moves cancel: each goes 1 - (1 - lr h)^K of its way.
    weights = [1 - (1 - RATE * h) ** STEPS for h in CURVATURES]
    biased = fedavg(gradients, np.zeros(7), 300, STEPS, RATE)
    np.testing.assert_allclose(biased, centre(weights), rtol=0, atol=1e-12)
    assert np.abs(biased - optimum).max() > 0.1


def test_a_federation_reaches_the_optimum_that_fedit_misses(tmp_path: Path) -> None:
    config = scaffold_config(federation__rounds=60)
    start = row_of(start_adapter(config))
    gradients, centre = problem(len(start))
    state, _ = spied(config, tmp_path / "scaffold")
    np.testing.assert_allclose(row_of(state.adapter), centre(CURVATURES), rtol=0, atol=CLOSE)
    plain, _ = spied(
        scaffold_config(federation__rounds=60, federation__control_variates=False),
        tmp_path / "fedit",
    )
    biased = fedavg(gradients, start, 60, STEPS, RATE)
    np.testing.assert_allclose(row_of(plain.adapter), biased, rtol=0, atol=CLOSE)
    assert np.abs(biased - centre(CURVATURES)).max() > 0.1


@pytest.mark.parametrize("weights", ["equal", "examples"])
def test_cohorts_of_two_follow_the_reference(tmp_path: Path, weights: str) -> None:
    config = scaffold_config(
        federation__rounds=25, federation__cohort=2, federation__weights=weights
    )
    examples = (10, 20, 30, 5, 35)
    state, grid = spied(config, tmp_path, examples)
    start = row_of(start_adapter(config))
    gradients, _ = problem(len(start))
    cohorts = [[int(c[1:]) for c in record.cohort] for record in read_rounds(tmp_path)]
    assert len({tuple(cohort) for cohort in cohorts}) > 5
    shares = [n / sum(examples) for n in examples] if weights == "examples" else None
    x, c, own = scaffold(gradients, start, cohorts, STEPS, RATE, shares)
    np.testing.assert_allclose(row_of(state.adapter), x, rtol=0, atol=CLOSE)
    np.testing.assert_allclose(control_of(state), c, rtol=0, atol=CLOSE)
    form = BufferForm.of(segments_of(state.trainable, BOTH))
    for k in range(CLIENTS):
        mine = read_own_control(form, ContextRows(grid.state_of(k)), 100)
        np.testing.assert_allclose(mine, own[k], rtol=0, atol=CLOSE)


def test_weights_by_examples_lead_to_their_optimum(tmp_path: Path) -> None:
    examples = (10, 20, 30, 5, 35)
    config = scaffold_config(federation__rounds=60, federation__weights="examples")
    state, _ = spied(config, tmp_path, examples)
    _, centre = problem(len(row_of(state.adapter)))
    expected = centre([n * h for n, h in zip(examples, CURVATURES, strict=True)])
    np.testing.assert_allclose(row_of(state.adapter), expected, rtol=0, atol=CLOSE)


def test_ffa_lora_has_a_variate_of_b_alone(tmp_path: Path) -> None:
    config = scaffold_config(federation__rounds=4, federation__method="ffa-lora")
    start, B = start_adapter(config), frozenset({"B"})
    gradients, _ = problem(len(row_of(start, B)))
    state, _ = spied(config, tmp_path)
    x, c, _ = scaffold(gradients, row_of(start, B), [range(CLIENTS)] * 4, STEPS, RATE)
    np.testing.assert_allclose(row_of(state.adapter, B), x, rtol=0, atol=CLOSE)
    np.testing.assert_array_equal(state.adapter["conv"].A, start["conv"].A)
    assert set(state.method_state) == {"control.B"}
    np.testing.assert_allclose(state.method_state["control.B"], c, rtol=0, atol=CLOSE)


def test_what_goes_up_is_the_change_and_never_the_variate(tmp_path: Path) -> None:
    """Of every row that leaves, in whatever record."""
    config = scaffold_config(federation__rounds=3)
    _, grid = spied(config, tmp_path)
    trained = [reply for reply in grid.received if "factors" in reply.content]
    assert len(trained) == 3 * CLIENTS
    sent: dict[int, list[np.ndarray]] = {k: [] for k in range(CLIENTS)}
    for reply in trained:
        content = reply.content
        assert set(content) == {"factors", "layout", "metrics", "control", "control-digest"}
        assert list(content["control"]) == ["factors"]
        assert set(content["control-digest"]) == {"digest"}
        row = content["control"]["factors"].numpy()
        sent[reply.metadata.src_node_id - 1000].append(row)
    form = BufferForm.of(segments_of(start_adapter(config), BOTH))
    for k, changes in sent.items():
        own = read_own_control(form, ContextRows(grid.state_of(k)), 4)
        np.testing.assert_allclose(np.sum(changes, axis=0), own, rtol=0, atol=1e-6)
        # In its first round the change is the variate, and never again.
        for number in (2, 3):
            kept = read_own_control(form, ContextRows(grid.state_of(k)), number + 1)
            assert np.abs(kept - changes[number - 1]).max() > 0.1


def test_twice_the_factors_go_up_and_down(tmp_path: Path) -> None:
    two = {}
    for controlled in (False, True):
        config = scaffold_config(
            federation__rounds=1, federation__control_variates=controlled, lora__rank=64
        )
        spied(config, tmp_path / str(controlled))
        two[controlled] = read_rounds(tmp_path / str(controlled))[0]
    form = BufferForm.of(segments_of(start_adapter(config), BOTH))
    row = len(form.header) + 4 * form.size
    extra = two[True].bytes_up - two[False].bytes_up
    names = len("factors") + len("digest") + 64  # keys and the digest's text
    # and what Flower counts for an array's type and shape
    assert CLIENTS * (row + names) <= extra <= CLIENTS * (row + names + 100)
    assert two[True].bytes_up / two[False].bytes_up == pytest.approx(2, abs=0.1)
    # Down goes the digest alike, and the order says so.
    extra = two[True].bytes_down - two[False].bytes_down
    assert CLIENTS * row <= extra <= CLIENTS * (row + names + 200)


def test_without_control_variates_messages_know_nothing_of_them(tmp_path: Path) -> None:
    config = scaffold_config(federation__rounds=1, federation__control_variates=False)
    state, grid = spied(config, tmp_path)
    assert state.method_state == {}
    for reply in grid.received:
        assert set(reply.content) in ({"client"}, {"factors", "layout", "metrics"})
    order = TrainOrder(1, 0, config.federation.train, BOTH)
    # The whole order, key by key, as it was before there were control variates.
    assert set(to_record(order)) == {
        "round", "seed", "uploaded", "train/local_steps", "train/batch_size",
        "train/learning_rate", "train/optimizer", "train/weight_decay", "train/momentum",
        "rule/trained", "rule/proximal_weight",
    }  # fmt: skip


def form_and_reply(controlled: bool = True) -> tuple[ReplyForm, RecordDict]:
    sent = start_adapter(scaffold_config())
    form = ReplyForm.of(sent, BOTH, 3, controlled=controlled)
    row = np.arange(form.rows.size, dtype=np.float32)
    metrics = {"loss": 1.0, "steps": 2, "num-examples": 5}
    return form, encode_reply_row(form, row, metrics, row + 1 if controlled else None)


def _row(content: RecordDict, row: np.ndarray) -> None:
    form, _ = form_and_reply()
    put_control(content, form.buffer, row.astype(np.float32))


def _numbers(*values: float) -> Callable[[RecordDict], None]:
    form, _ = form_and_reply()
    row = np.zeros(form.rows.size)
    row[: len(values)] = values
    return lambda content: _row(content, row)


def _flipped(content: RecordDict) -> None:
    array = content["control"]["factors"]
    array.data = array.data[:-1] + bytes([array.data[-1] ^ 1])


def _short(content: RecordDict) -> None:
    content["control"] = ArrayRecord({"factors": FlowerArray(np.zeros(3, np.float32))})


# What may be wrong with a control variate that arrives, and what the server says of it.
BAD: dict[str, tuple[Callable[[RecordDict], None], type[Exception], str]] = {
    "none": (
        lambda content: content.pop("control") and None,
        FederationError,
        "client 'm', control: expected one array 'factors', found something else",
    ),
    "no digest": (
        lambda content: content.pop("control-digest") and None,
        FederationError,
        "client 'm', control: expected a record 'control-digest' with digest",
    ),
    "a flipped bit": (
        _flipped,
        FederationError,
        "client 'm', control: the factors are not those that their digest was made of",
    ),
    "too short": (
        _short,
        ShapeMismatchError,
        "client 'm', control: expected a buffer of (64,) float32, found (3,) float32",
    ),
    "NaN": (_numbers(0, float("nan")), NonFiniteError, "client 'm', control: "),
    "infinite": (_numbers(float("inf")), NonFiniteError, "client 'm', control: "),
    "absurd": (
        _numbers(-2e6),
        NonFiniteError,
        "client 'm', control: layer 'body.0.fc', A: expected numbers up to 1e+06, found 2e+06",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_control_variate_is_refused_and_named(case: str) -> None:
    change, kind, text = BAD[case]
    form, content = form_and_reply()
    change(content)
    with pytest.raises(kind) as caught:
        decode_reply(content, form, "client 'm'")
    assert str(caught.value).startswith(text)


def test_a_reply_is_read_back_and_counted() -> None:
    form, content = form_and_reply()
    reply = decode_reply(content, form, "client 'm'")
    np.testing.assert_array_equal(reply.control, np.arange(form.rows.size) + 1)
    assert reply_bytes(content, form) == sum(r.count_bytes() for r in content.values())
    digest = hashlib.sha256("\n".join(form.buffer.texts).encode())
    digest.update(reply.control.tobytes())
    assert content["control-digest"]["digest"] == digest.hexdigest()


def test_a_control_variate_that_was_not_asked_for_is_refused_on_both_sides() -> None:
    plain, _ = form_and_reply(controlled=False)
    _, content = form_and_reply()
    with raises(
        FederationError,
        "refused to send 'control' in the reply: only factors, layout, metrics may leave this "
        "client",
    ):
        check_reply(content, plain.buffer, share_num_examples=True)
    with raises(FederationError, "client 'm': expected no control variate, found one"):
        decode_reply(content, plain, "client 'm'")


def _second_array(content: RecordDict) -> None:
    content["control"]["own"] = FlowerArray(np.zeros(3, np.float32))


# What a client's own code may get wrong, and what the guard says before anything leaves.
GUARDED: dict[str, tuple[Callable[[RecordDict], None], str]] = {
    "no variate": (
        lambda content: content.pop("control") and None,
        "refused to send: record 'control' is missing or of another kind",
    ),
    "its own beside it": (
        _second_array,
        "refused to send 'own' in record control: only factors may leave this client",
    ),
    "its state": (
        lambda content: content.__setitem__("own-control-AB", ArrayRecord()),
        "refused to send 'own-control-AB' in the reply: only control, control-digest, factors, "
        "layout, metrics may leave this client",
    ),
    "another size": (_short, "refused to send control: their number is not that of the layout"),
    "words": (
        lambda content: content["control-digest"].__setitem__("text", "hello"),
        "refused to send 'text' in record control-digest: only digest may leave this client",
    ),
    "no digest": (
        lambda content: content.__setitem__("control-digest", ArrayRecord()),
        "refused to send: record 'control-digest' is missing or of another kind",
    ),
}


@pytest.mark.parametrize("case", GUARDED)
def test_the_guard_knows_what_may_leave_beside_the_factors(case: str) -> None:
    change, text = GUARDED[case]
    form, content = form_and_reply()
    check_reply(content, form.buffer, share_num_examples=True, control=form.buffer)
    change(content)
    with raises(FederationError, text):
        check_reply(content, form.buffer, share_num_examples=True, control=form.buffer)


def test_a_round_that_runs_again_reads_what_it_read_before() -> None:
    form, _ = form_and_reply()
    state = RecordDict()
    kept = ContextRows(state)
    rows = [np.full(form.rows.size, number, np.float32) for number in range(4)]
    np.testing.assert_array_equal(read_own_control(form.buffer, kept, 1), rows[0])
    write_own_control(form.buffer, kept, 2, rows[1])
    write_own_control(form.buffer, kept, 5, rows[2])
    assert read_own_control(form.buffer, kept, 5)[0] == 1  # the server was killed in round 5
    write_own_control(form.buffer, kept, 5, rows[3])
    assert [read_own_control(form.buffer, kept, n)[0] for n in (2, 3, 5, 6)] == [0, 1, 1, 3]
    assert len(state["own-control-AB"]) == 2
    state["own-control-AB-layout"] = ConfigRecord({"segments": ["other|A|1x1"]})
    with pytest.raises(FederationError, match="own rows: expected the layers and ranks of this"):
        read_own_control(form.buffer, kept, 6)


def test_a_variate_that_explodes_is_neither_sent_nor_kept() -> None:
    own, far = np.zeros(2, np.float32), np.float32([0, 3e7])
    config = TrainConfig(local_steps=1, learning_rate=1.0, optimizer="sgd")
    with raises(
        FederationError,
        "control variate: expected changes up to 1e+06, found 3e+07; lower learning_rate, or set "
        "max_grad_norm",
    ):
        next_control(own, own, own, far, 1, config)
    with pytest.raises(FederationError, match="found nan"):
        next_control(own, own, own, far * np.float32(np.nan), 1, config)
    following, change = next_control(own + 5, own, own, far, 0, config)  # nobody took a step
    assert following.tolist() == [5, 5]
    assert change.tolist() == [0, 0]


# What does not go with control variates, and what is said of it.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "adamw": (
        {"federation__optimizer": "adamw"},
        "federation.control_variates: control variates: expected optimizer = 'sgd' without "
        "momentum, found 'adamw'; a client's control variate is its mean gradient, read off its "
        "factors as (before - after) / (steps * learning_rate), which holds for plain steps only",
    ),
    "momentum": ({"federation__momentum": 0.9}, "found 'sgd' with momentum 0.9; "),
    "fedsa-lora": ({"federation__method": "fedsa-lora"}, "such as fedit, ffa-lora or rolora, "),
    "flora": ({"federation__method": "flora"}, "found flora; remove control_variates"),
    "hetlora": ({"federation__method": "hetlora"}, "found hetlora; "),
    "a robust rule": (
        {"federation__robust": "median"},
        "federation.robust: robust rule 'median': expected a method without control variates, "
        "found fedit+scaffold; ",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_with_control_variates_is_refused(case: str) -> None:
    changes, text = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        scaffold_config(**changes)
    assert text in str(caught.value)


def test_a_trainer_that_knows_no_correction_fails_and_trains_nothing(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="3 rounds in a row"):
        run(scaffold_config(federation__rounds=3), tmp_path, clients=CLIENTS)
    assert "TypeError at client.py" in str(read_rounds(tmp_path)[0])


def test_a_state_or_an_update_of_another_size_is_refused() -> None:
    built = with_control_variates(method("fedit"))
    start = start_adapter(scaffold_config())
    bad = replace(ServerState.start(start), method_state={"control.A": np.zeros(3, np.float32)})
    with pytest.raises(RunError, match="belongs to another adapter"):
        built.broadcast(bad, None)  # type: ignore[arg-type]
    for control in (None, np.zeros(3, np.float32)):
        with pytest.raises(FederationError, match="client 'c1': expected the change of its"):
            built.aggregate(ServerState.start(start), [Update(start, 1.0, "c1", control)])


def test_a_run_that_goes_on_is_a_run_in_one_go(tmp_path: Path) -> None:
    """The server's part; clients' states are tested with the engine that has them on disk."""
    whole, _ = spied(scaffold_config(federation__rounds=2), tmp_path)
    kept = read_checkpoint(tmp_path).state
    assert kept.adapter == whole.adapter
    assert set(kept.method_state) == {"control.A", "control.B"}
    for name, value in whole.method_state.items():
        np.testing.assert_array_equal(kept.method_state[name], value)


def test_clients_that_forgot_begin_anew_together_with_the_server(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In memory, as Flower keeps it for one of its runs; the optimum is found all the same."""
    spied(scaffold_config(federation__rounds=5), tmp_path)
    assert np.abs(control_of(read_checkpoint(tmp_path).state)).max() > 0.01
    before = row_of(read_checkpoint(tmp_path).state.adapter)
    state, grid = spied(scaffold_config(federation__rounds=7), tmp_path)
    assert "control variates begin at zero" in caplog.text
    gradients, _ = problem(len(before))
    x, c, own = scaffold(gradients, before, [range(CLIENTS)] * 2, STEPS, RATE)
    np.testing.assert_allclose(row_of(state.adapter), x, rtol=0, atol=CLOSE)
    np.testing.assert_allclose(control_of(state), c, rtol=0, atol=CLOSE)
    form = BufferForm.of(segments_of(state.trainable, BOTH))
    np.testing.assert_allclose(
        read_own_control(form, ContextRows(grid.state_of(1)), 8), own[1], rtol=0, atol=CLOSE
    )


def test_devices_that_remember_go_on_where_they_were(tmp_path: Path) -> None:
    """With state folders a resumed run is a run in one go, variates and all."""
    whole, _ = spied(scaffold_config(federation__rounds=6), tmp_path / "whole")
    for rounds in (4, 6):
        config = scaffold_config(federation__rounds=rounds)
        resumed, _ = spied(config, tmp_path / "run", states=tmp_path / "states")
    np.testing.assert_array_equal(row_of(resumed.adapter), row_of(whole.adapter))
    np.testing.assert_array_equal(control_of(resumed), control_of(whole))


def test_one_that_forgot_makes_all_begin_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also those that remember: the server's variate is the mean of everyone's."""
    states = tmp_path / "states"
    spied(scaffold_config(federation__rounds=5), tmp_path, states=states)
    run_before = read_checkpoint(tmp_path).run
    before = row_of(read_checkpoint(tmp_path).state.adapter)
    config = scaffold_config(federation__rounds=7)
    state, _ = spied(config, tmp_path, states=states, forgets=2)
    assert "control variates begin at zero" in caplog.text
    assert read_checkpoint(tmp_path).run != run_before
    gradients, _ = problem(len(before))
    x, c, _ = scaffold(gradients, before, [range(CLIENTS)] * 2, STEPS, RATE)
    np.testing.assert_allclose(row_of(state.adapter), x, rtol=0, atol=CLOSE)
    np.testing.assert_allclose(control_of(state), c, rtol=0, atol=CLOSE)


def test_a_server_optimizer_goes_behind_control_variates(tmp_path: Path) -> None:
    options = {"learning_rate": 1.0, "beta1": 0.0}  # the plain mean
    config = scaffold_config(
        federation__rounds=2,
        federation__server_optimizer="momentum",
        federation__server_options=options,
    )
    with_optimizer, _ = spied(config, tmp_path / "with")
    plain, _ = spied(scaffold_config(federation__rounds=2), tmp_path / "plain")
    assert with_optimizer.adapter == plain.adapter
    np.testing.assert_array_equal(control_of(with_optimizer), control_of(plain))


def test_fedprox_from_an_experiment_holds_clients_near_their_start(tmp_path: Path) -> None:
    """Written out: each step adds mu (y - x); the bias of FedAvg gets smaller."""
    off = {"federation__control_variates": False, "federation__rounds": 3}
    config = scaffold_config(**off, federation__proximal_weight=2.0)
    assert config.federation.build_method().rule(1).proximal_weight == 2.0
    state, _ = spied(config, tmp_path)
    start = row_of(start_adapter(config))
    gradients, _ = problem(len(start))
    x = start
    for _ in range(3):
        ends = []
        for gradient in gradients:
            y = x
            for _ in range(STEPS):
                y = y - RATE * (gradient(y) + 2.0 * (y - x))
            ends.append(y)
        x = np.mean(ends, axis=0)
    np.testing.assert_allclose(row_of(state.adapter), x, rtol=0, atol=CLOSE)
    with pytest.raises(ConfigError, match=r"^federation: proximal_weight: expected a finite"):
        scaffold_config(federation__proximal_weight=-1.0)
