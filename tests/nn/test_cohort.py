"""Many clients in one pass: each gets what it would have got alone, whatever the others do."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.adapter import Adapter, LoraConfig
from fedlora.errors import (
    BaseMismatchError,
    ConfigError,
    LayerMismatchError,
    NonFiniteError,
    UnsupportedError,
)
from fedlora.nn import (
    Batch,
    Task,
    cohort,
    extract_adapter,
    get_task,
    inject_lora,
    load_adapter_into,
    merge_lora,
    remove_lora,
    train_local,
)
from fedlora.nn.cohort import (
    Job,
    Trained,
    _Group,
    group_jobs,
    train_alone,
    train_cohort,
    train_group,
    why_alone,
)
from fedlora.nn.inject import lora_modules
from fedlora.nn.llama import Llama, LlamaConfig
from fedlora.training import Factor, LocalRule, TrainConfig, TrainResult
from tests.matching import raises
from tests.nn.models import Many, Mlp, TiedLm, same_state, seeded, state

CLASSES, TOKENS = get_task("classification"), get_task("next-token")
SGD = TrainConfig(local_steps=10, learning_rate=0.1, optimizer="sgd")
ADAMW = TrainConfig(local_steps=10, learning_rate=1e-2)
# Float32 sums in another order, in models whose weights are of size 1 and losses up to 14. AdamW's
# steps are as large for a small gradient, rounding included.
CLOSE = {"sgd": 5e-6, "adamw": 2e-5}


class TinyLlama(Llama):
    """Two blocks, whose texts can share a row."""

    def __init__(self) -> None:
        super().__init__(LlamaConfig(11, 16, 2, 2, 1, 24))


class Twice(Mlp):
    """A layer that is called twice in one pass."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.second(self.second(self.first(x).relu()).tanh()).relu())
        return out


class Dropping(Mlp):
    """Dropout that is on in evaluation too, from torch's one generator."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(F.dropout(self.second(self.first(x).relu()), 0.3, training=True))
        return out


class Normed(Mlp):
    """A batch norm of the batch's own statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.first(x)).relu())
        return out


def features(count: int, rows: int = 4, seed: int = 0) -> list[Batch]:
    random = np.random.default_rng(seed)
    return [
        {
            "inputs": random.normal(size=(rows, 6)).astype(np.float32),
            "targets": random.integers(0, 3, rows),
        }
        for _ in range(count)
    ]


def texts(count: int, rows: int = 2, seed: int = 0, width: int = 6) -> list[Batch]:
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        inputs = random.integers(1, 11, (rows, width))
        inputs[-1, 1 + width // 2 :] = 0
        targets = np.where(inputs == 0, -100, random.integers(0, 11, (rows, width)))
        found.append({"inputs": inputs, "targets": targets})
    return found


def injected(kind: type[nn.Module] = Mlp, **changes: Any) -> nn.Module:
    model = seeded(kind)
    inject_lora(model, replace(LoraConfig(rank=2, lora_alpha=3), **changes), seed=3)
    return model


def started(model: nn.Module, seed: int = 0, **changes: Any) -> Adapter:
    """An adapter for the model with random B; other ranks and scalings by `changes`."""
    mine = extract_adapter(model)
    config = replace(mine.config, **changes)
    random = np.random.default_rng(seed)
    layers = {}
    for path, layer in mine.layers.items():
        rank = config.rank_of(path)
        A = random.normal(size=(rank, *layer.in_shape)) / math.sqrt(math.prod(layer.in_shape))
        B = random.normal(0, 0.1, (layer.out_features, rank))
        layers[path] = replace(layer, A=A, B=B, scaling=config.scaling_of(path))
    return Adapter(layers, config, mine.base)


def job(
    start: Adapter,
    batches: Sequence[Batch],
    config: TrainConfig = SGD,
    name: str = "c",
    **options: Any,
) -> Job:
    examples = sum(len(batch["inputs"]) for batch in batches)
    options["positions"] = max((batch["inputs"][..., 0].size for batch in batches), default=1)
    return Job(name, start, batches, len(batches), config, num_examples=examples, **options)


def alone(model: nn.Module, one: Job, task: Task = CLASSES) -> TrainResult:
    load_adapter_into(model, one.start)
    return train_local(
        model, one.batches, one.config, task=task, rule=one.rule, num_examples=one.num_examples,
        seed=one.seed,
    )  # fmt: skip


def largest_difference(one: Adapter, other: Adapter) -> float:
    assert list(one) == list(other)
    return max(
        float(np.abs(getattr(one[path], name) - getattr(other[path], name)).max())
        for path in one
        for name in ("A", "B")
    )


def check(
    model: nn.Module, jobs: list[Job], task: Task = CLASSES, found: list[Trained] | None = None
) -> list[Trained]:
    """Train as a cohort, and compare each job with `train_local`."""
    found = train_cohort(model, jobs, task) if found is None else found
    assert [trained.job for trained in found] == jobs
    for one, trained in zip(jobs, found, strict=True):
        expected, result = alone(model, one, task), trained.result()
        tolerance = CLOSE[one.config.optimizer]
        assert largest_difference(result.adapter, expected.adapter) <= tolerance
        assert result.steps == expected.steps
        assert result.num_examples == expected.num_examples
        assert result.loss == pytest.approx(expected.loss, rel=2e-6, abs=1e-6, nan_ok=True)
        assert result.adapter.config == one.start.config
    return found


def adapters(found: list[Trained]) -> list[Adapter]:
    return [trained.adapter() for trained in found]


MIXED = [
    replace(SGD, learning_rate=0.05),
    replace(SGD, momentum=0.9, weight_decay=0.01),
    replace(SGD, max_grad_norm=0.05),
    ADAMW,
    replace(ADAMW, weight_decay=0.1, max_grad_norm=0.1),
    replace(ADAMW, learning_rate=1e-3),
]


@pytest.mark.parametrize("config", MIXED, ids=range(len(MIXED)))
def test_clients_with_one_setting(config: TrainConfig) -> None:
    model = injected()
    jobs = [job(started(model, k), features(10, seed=k), config) for k in range(4)]
    found = check(model, jobs)
    for one, trained in zip(jobs, found, strict=True):  # they did move, and apart
        assert largest_difference(one.start, trained.adapter()) > 1e-3
    assert largest_difference(found[0].adapter(), found[1].adapter()) > 1e-2


def mixed_jobs(model: nn.Module) -> list[Job]:
    """Every setting in one group: ranks, alphas, steps, rows, optimizers, limits, pulls."""
    ranks, steps = (1, 4, 2, 3, 2, 5), (3, 10, 0, 7, 10, 1)
    return [
        job(
            started(model, k, rank=ranks[k], lora_alpha=1.0 + k, variant=("lora", "rslora")[k % 2]),
            features(steps[k], rows=1 + k, seed=k),
            config,
            f"c{k}",
            rule=LocalRule(proximal_weight=(0.0, 0.5)[k % 2]),
        )
        for k, config in enumerate(MIXED)
    ]


def test_everything_may_differ_within_a_group() -> None:
    model = injected()
    jobs = mixed_jobs(model)
    assert group_jobs(jobs, 2048) != [[0, 1, 2, 3, 4, 5]]  # sorted by size and steps
    check(model, jobs, found=train_group(model, jobs, CLASSES))


def test_groups_do_not_change_results() -> None:
    model = injected()
    jobs = mixed_jobs(model)
    whole = train_group(model, jobs, CLASSES)
    for positions in (1, 4, 9):
        parts = train_cohort(model, jobs, CLASSES, positions=positions)
        for one, other in zip(adapters(whole), adapters(parts), strict=True):
            assert largest_difference(one, other) <= CLOSE["adamw"]


def test_the_order_of_jobs_does_not_change_results() -> None:
    model = injected()
    jobs = mixed_jobs(model)
    forward = train_group(model, jobs, CLASSES)
    backward = train_group(model, jobs[::-1], CLASSES)[::-1]
    assert [one.job for one in backward] == jobs
    for one, other in zip(adapters(forward), adapters(backward), strict=True):
        assert largest_difference(one, other) <= CLOSE["adamw"]


def test_results_are_bit_equal_every_time() -> None:
    model = injected()
    jobs = mixed_jobs(model)
    assert adapters(train_cohort(model, jobs, CLASSES)) == adapters(
        train_cohort(model, jobs, CLASSES)
    )


@given(
    clients=st.lists(
        st.tuples(st.integers(1, 3), st.integers(0, 3), st.integers(1, 4), st.booleans()),
        min_size=1, max_size=5,
    )
)  # fmt: skip
@settings(max_examples=10, deadline=None)
def test_any_cohort(clients: list[tuple[int, int, int, bool]]) -> None:
    model = injected()
    jobs = [
        job(started(model, k, rank=rank), features(steps, rows, k), ADAMW if adamw else SGD)
        for k, (rank, steps, rows, adamw) in enumerate(clients)
    ]
    check(model, jobs)


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        (TiedLm, "all-linear"),
        (TiedLm, ("embed", "mix")),
        (TinyLlama, "all-linear"),
        (TinyLlama, ("embed_tokens", "v_proj")),
        (TinyLlama, ("lm_head", "q_proj")),  # clients with unlike numbers of targets
        (TinyLlama, ("down_proj",)),  # whose input no adapter has touched
    ],
    ids=str,
)
def test_texts_of_mixed_lengths(kind: type[nn.Module], targets: Any) -> None:
    model = injected(kind, target_modules=targets)
    shapes = ((1, 3), (2, 6), (4, 9), (1, 8), (1, 1))
    jobs = [
        job(started(model, k), texts(5, rows, k, width), (SGD, ADAMW)[k % 2])
        for k, (rows, width) in enumerate(shapes)
    ]
    check(model, jobs, TOKENS, train_group(model, jobs, TOKENS))


def test_texts_that_are_too_long_to_share_a_row() -> None:
    model = injected(TinyLlama)
    jobs = [job(started(model, k), texts(2, 9, k, 60 + k)) for k in range(2)]
    check(model, jobs, TOKENS, train_group(model, jobs, TOKENS))


def test_a_layer_that_is_called_twice() -> None:
    model = injected(Twice)
    check(model, [job(started(model, k), features(10, seed=k), MIXED[k]) for k in range(4)])


@pytest.mark.parametrize("config", [SGD, replace(ADAMW, weight_decay=0.1)], ids=["sgd", "adamw"])
def test_a_layer_that_is_not_called_stays(config: TrainConfig) -> None:
    class Skipping(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.first(x).relu())
            return out

    model = injected(Skipping)
    jobs = [job(started(model, k), features(3, seed=k), config) for k in range(2)]
    for one, trained in zip(jobs, check(model, jobs), strict=True):
        np.testing.assert_array_equal(trained.adapter()["second"].B, one.start["second"].B)


@pytest.mark.parametrize("trained", ["A", "B"])
def test_factors_that_a_rule_does_not_train_stay_bit_equal(trained: Factor) -> None:
    model, rule = injected(), LocalRule(frozenset({trained}))
    jobs = [job(started(model, k, rank=1 + k), features(5, seed=k), rule=rule) for k in range(3)]
    other = "A" if trained == "B" else "B"
    for one, result in zip(jobs, check(model, jobs), strict=True):
        for path, layer in result.adapter().layers.items():
            np.testing.assert_array_equal(getattr(layer, other), getattr(one.start[path], other))
            assert not np.array_equal(getattr(layer, trained), getattr(one.start[path], trained))


def test_the_proximal_term_written_by_hand() -> None:
    """FedProx: mu / 2 times the squared distance from the start, of the trained factors."""
    mu, rate = 0.7, 0.2
    model = injected(target_modules=("first",))
    start, batches = started(model), features(3)
    A, B = (torch.tensor(getattr(start["first"], n)).double() for n in ("A", "B"))
    begin = A.clone(), B.clone()
    base = seeded(Mlp).double()
    for batch in batches:
        A, B = A.detach().requires_grad_(), B.detach().requires_grad_()
        x = torch.tensor(batch["inputs"]).double()
        h = base.first(x) + start["first"].scaling * x @ A.T @ B.T
        logits = base.head(base.second(h.relu()).relu())
        distance = (A - begin[0]).square().sum() + (B - begin[1]).square().sum()
        loss = F.cross_entropy(logits, torch.tensor(batch["targets"])) + mu / 2 * distance
        gradients = torch.autograd.grad(loss, (A, B))
        A, B = A - rate * gradients[0], B - rate * gradients[1]
    config = replace(SGD, learning_rate=rate)
    one = job(start, batches, config, rule=LocalRule(proximal_weight=mu))
    plain = job(start, batches, config)
    local = alone(model, one).adapter["first"]
    together = train_cohort(model, [one, plain], CLASSES)
    pulled, free = (trained.adapter()["first"] for trained in together)
    for found in (local, pulled):  # float32 against float64
        np.testing.assert_allclose(found.A, A.detach(), rtol=0, atol=1e-6)
        np.testing.assert_allclose(found.B, B.detach(), rtol=0, atol=1e-6)
    assert np.abs(free.B - pulled.B).max() > 1e-3


def poisoned(batches: list[Batch], at: int) -> list[Batch]:
    bad = dict(batches[at])
    bad["inputs"] = np.full_like(bad["inputs"], np.nan)
    return [*batches[:at], bad, *batches[at + 1 :]]


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("config", [replace(SGD, max_grad_norm=1.0), ADAMW], ids=["sgd", "adamw"])
def test_a_nan_client_is_named_and_changes_no_other_bit(at: int, config: TrainConfig) -> None:
    model = injected()
    rule = LocalRule(proximal_weight=0.1)
    jobs = [job(started(model, k), features(4, seed=k), config, rule=rule) for k in range(3)]
    bad = replace(jobs[1], batches=poisoned(features(4, seed=1), at))
    clean = train_cohort(model, jobs, CLASSES)
    first, broken, last = train_cohort(model, [jobs[0], bad, jobs[2]], CLASSES)
    assert first.adapter() == clean[0].adapter()
    assert last.adapter() == clean[2].adapter()
    assert (first.loss, last.loss) == (clean[0].loss, clean[2].loss)
    text = f"train_local, step {at + 1}: expected a finite loss, found nan"
    with raises(NonFiniteError, text):
        broken.adapter()
    with raises(NonFiniteError, text):
        alone(model, bad)


def test_factors_that_overflow_after_the_last_step_are_an_error() -> None:
    model = injected()
    jobs = [
        job(started(model, k), features(1, seed=k), replace(SGD, learning_rate=rate))
        for k, rate in enumerate((0.1, 1e38))
    ]
    for batch in jobs[1].batches:
        batch["inputs"][:] *= 1e3
    fine, broken = train_cohort(model, jobs, CLASSES)
    assert fine.error is None
    with raises(NonFiniteError, "train_local, step 1: the factors are not finite after it"):
        broken.adapter()


def test_a_cohort_of_none() -> None:
    model = injected()
    assert train_cohort(model, [], CLASSES) == []
    assert train_group(model, [], CLASSES) == []
    assert group_jobs([], 2048) == []


def test_a_cohort_of_one() -> None:
    model = injected()
    check(model, [job(started(model), features(10), ADAMW)])


def test_a_client_without_steps_comes_back_as_it_went() -> None:
    model = injected()
    jobs = [job(started(model, 0), []), job(started(model, 1), features(2))]
    idle, _ = check(model, jobs)
    assert idle.adapter() == jobs[0].start
    assert (idle.steps, idle.error) == (0, None)
    assert math.isnan(idle.loss)
    assert check(model, jobs[:1])[0].adapter() == jobs[0].start


def test_a_client_with_one_sample() -> None:
    model = injected()
    check(model, [job(started(model, k), features(5, rows, k)) for k, rows in enumerate((1, 8))])


def test_ranks_are_padded_with_zeros_that_stay_zero() -> None:
    model = injected()
    jobs = [
        job(started(model, k, rank=(1, 6, 2)[k]), features(10, seed=k), config)
        for k, config in enumerate((MIXED[1], MIXED[4], MIXED[4]))
    ]
    group = _Group(model, jobs, CLASSES)
    found = group.train()
    for k, rank in enumerate((1, 6, 2)):
        assert {layer.rank for layer in found[k].adapter().layers.values()} == {rank}
        for stack in group.stacks.values():
            for name in ("A", "B"):
                assert stack.all(name)[k, :rank].all()
                assert not stack.all(name)[k, rank:].any()


def test_results_are_rows_of_the_trained_factors_by_path() -> None:
    model = injected()
    trained = check(model, [job(started(model), features(2))])[0]
    parts = [part for layer in trained.adapter().layers.values() for part in (layer.A, layer.B)]
    np.testing.assert_array_equal(trained.row, np.concatenate([p.reshape(-1) for p in parts]))
    assert list(trained.factors)[:2] == [("first", "A"), ("first", "B")]


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("kind", [Mlp, Normed])  # in groups, and one at a time
def test_the_model_is_left_as_it_was(kind: type[nn.Module], mode: bool) -> None:
    model = injected(kind).train(mode)
    before, mine = state(model), dict(lora_modules(model))
    config, parameters = extract_adapter(model).config, list(model.parameters())
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    train_cohort(model, [job(started(model, k, rank=3), features(2)) for k in range(2)], CLASSES)
    assert torch.equal(torch.rand(3), expected)
    assert same_state(model, before)
    assert dict(lora_modules(model)) == mine
    assert extract_adapter(model).config == config
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        assert parameter.grad is None
    assert {module.training for module in model.modules()} == {mode}


def without_losses(task: Task) -> Task:
    return replace(task, losses=None)


ALONE: dict[str, tuple[type[nn.Module], dict[str, Any], Task, str]] = {
    "dora": (Mlp, {"variant": "dora"}, CLASSES, "layer 'first' has DoRA"),
    "dropout": (Mlp, {"lora_dropout": 0.3}, CLASSES, "lora_dropout draws from torch's one"),
    "task": (Mlp, {}, without_losses(CLASSES), "task 'classification' has no `losses`"),
    "batch norm": (
        Normed,
        {"target_modules": ("first", "head")},
        CLASSES,
        "layer 'norm' (BatchNorm1d) lets one client's data change another client's output",
    ),
    "model's dropout": (
        Dropping, {}, CLASSES, "the model itself (Dropping) draws from torch's one generator",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ALONE)
def test_clients_that_cannot_share_a_pass_are_trained_alone_and_the_log_says_why_once(
    case: str, caplog: pytest.LogCaptureFixture
) -> None:
    kind, changes, task, reason = ALONE[case]
    model = injected(kind, **changes)
    start = extract_adapter(model)
    jobs = [job(start, features(3, seed=k), ADAMW, f"c{k}", seed=k) for k in range(3)]
    bad = replace(jobs[1], batches=poisoned(features(3), 1))
    with caplog.at_level(logging.WARNING):
        found = train_cohort(model, [*jobs, bad], task)
        train_cohort(model, jobs, task)
    (record,) = caplog.records
    assert record.name == "fedlora.nn.cohort"
    assert record.getMessage().startswith(
        f"clients are trained one at a time, with the same results but slower: {reason}"
    )
    assert [trained.job for trained in found] == [*jobs, bad]
    for one, trained in zip(jobs, found, strict=False):
        assert trained.adapter() == alone(model, one, task).adapter  # bit for bit
        assert trained.result() == replace(alone(model, one, task), adapter=trained.adapter())
    with raises(NonFiniteError, "step 2: expected a finite loss, found nan"):
        found[3].adapter()


def test_one_client_of_a_model_that_draws_is_trained_alone_too() -> None:
    model = injected(Dropping)
    one = job(started(model), features(3), seed=4)
    assert train_cohort(model, [one], CLASSES)[0].adapter() == alone(model, one).adapter


def test_the_probe_takes_no_batch_away_and_runs_once() -> None:
    """Batches may be an iterator, which gives each of them once."""
    drawn: list[int] = []

    def stream(k: int) -> Iterator[Batch]:
        for batch in features(3, seed=k):
            drawn.append(k)
            yield batch

    model = injected()
    jobs = [replace(job(started(model, k), features(3, seed=k)), batches=stream(k)) for k in (0, 1)]
    found = train_cohort(model, jobs, CLASSES)
    assert sorted(drawn) == [0, 0, 0, 1, 1, 1]
    assert [trained.job for trained in found] == jobs
    lists = [job(started(model, k), features(3, seed=k)) for k in (0, 1)]
    assert adapters(found) == adapters(train_cohort(model, lists, CLASSES))

    calls = []

    def counted(model: nn.Module, batch: Batch) -> Tensor:
        calls.append(1)
        return CLASSES.loss(model, batch)

    task = replace(CLASSES, loss=counted)  # only the probe asks for the loss of one
    train_cohort(model, lists, task)
    once = len(calls)
    train_cohort(model, lists, task)
    assert 0 < once == len(calls)


def test_without_batches_only_the_layers_are_asked() -> None:
    model = injected(Normed, target_modules=("first", "head"))
    assert why_alone(model, CLASSES) is None
    reason = why_alone(model, CLASSES, features(2), extract_adapter(model))
    assert reason is not None
    assert "'norm' (BatchNorm1d)" in reason


def test_dora_keeps_its_magnitude_when_trained_alone() -> None:
    model = injected(variant="dora")
    one = job(extract_adapter(model), features(3))
    trained = train_alone(model, one, CLASSES)
    assert trained.adapter() == alone(model, one).adapter
    assert ("first", "magnitude") in trained.factors


def with_layer(adapter: Adapter, path: str) -> Adapter:
    return replace(adapter, layers={**adapter.layers, path: next(iter(adapter.layers.values()))})


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "too few batches": (
        lambda one: replace(one, steps=3),
        ConfigError,
        "train_group, client 'bad': expected 3 batches, one a step, found 2",
    ),
    "magnitude": (
        lambda one: replace(one, rule=LocalRule(frozenset({"magnitude"}))),
        ConfigError,
        "expected a rule that trains ['A', 'B', 'magnitude'] as the first client's does, found "
        "['magnitude']; form groups by group_jobs",
    ),
    "base": (
        lambda one: replace(one, start=replace(one.start, base="0" * 64)),
        BaseMismatchError,
        "train_group: the adapter was made for base 000000000000, this model is",
    ),
    "layers": (
        lambda one: replace(one, start=with_layer(one.start, "zzz")),
        LayerMismatchError,
        "train_group: expected the 2 layers that the model was injected with, found 1 unexpected",
    ),
    "dora": (
        lambda one: replace(one, start=extract_adapter(injected(variant="dora"))),
        UnsupportedError,
        "train_group: the adapter's variant is 'dora', the model was injected with 'lora'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_job_that_does_not_fit_is_refused(case: str) -> None:
    change, kind, text = REFUSED[case]
    model = injected()
    jobs = [job(started(model, k), features(2, seed=k)) for k in range(2)]
    with raises(kind, text):
        train_group(model, [jobs[0], change(replace(jobs[1], client_id="bad"))], CLASSES)


def test_a_rule_that_trains_nothing_is_refused() -> None:
    model = injected()
    rule = LocalRule(frozenset({"magnitude"}))
    with raises(ConfigError, "the rule trains magnitude only, and the adapter has none"):
        train_group(model, [job(started(model), features(1), rule=rule)], CLASSES)


def test_a_merged_model_is_not_trained() -> None:
    model = injected()
    one = job(started(model), features(1))
    merge_lora(model)
    with raises(ConfigError, "the adapter is merged into the base"):
        train_cohort(model, [one], CLASSES)


def test_a_model_that_is_injected_anew_is_probed_anew() -> None:
    model = injected()
    assert why_alone(model, CLASSES, features(2), extract_adapter(model)) is None
    remove_lora(model)
    model.second = nn.Sequential(nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 8))
    inject_lora(model, LoraConfig(rank=2))
    reason = why_alone(model, CLASSES, features(2), extract_adapter(model))
    assert reason is not None
    assert reason.startswith("layer 'second.0' (BatchNorm1d)")


def test_threads_that_start_at_once_probe_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two probes at a time would see one another seed torch's generator."""
    model = injected()
    copies, probed = [model, *(copy.deepcopy(model) for _ in range(3))], []

    def slow(probe: Any) -> Any:
        def find(*args: Any) -> Any:
            probed.append(1)
            time.sleep(0.05)
            return probe(*args)

        return find

    monkeypatch.setattr(cohort, "find_leak", slow(cohort.find_leak))
    adapter = extract_adapter(model)
    with ThreadPoolExecutor(4) as pool:
        reasons = list(pool.map(lambda m: why_alone(m, CLASSES, features(2), adapter), copies))
    assert reasons == [None] * 4
    assert len(probed) == 1


def test_groups_are_of_one_kind_and_fit() -> None:
    model = injected()
    start = extract_adapter(model)
    sizes = (1, 9, 2, 30, 2, 8, 100, 1)
    jobs = [
        replace(
            job(start, features(1 + k % 3)), positions=size,
            rule=LocalRule(frozenset({"A"} if k == 4 else {"A", "B"})),
            shape=(7,) if k == 5 else (6,),
        )
        for k, size in enumerate(sizes)
    ]  # fmt: skip
    groups = group_jobs(jobs, positions=20)
    assert sorted(index for group in groups for index in group) == list(range(8))
    for group in groups:
        members = [jobs[index] for index in group]
        assert len({(one.rule.trained, one.shape) for one in members}) == 1
        widest = max(one.positions for one in members)
        assert len(group) == 1 or widest * len(group) <= 20
    assert [6] in groups  # larger than a pass: alone


def test_the_first_round_starts_with_a_zero_b() -> None:
    """Then A has no gradient in the first step. Here a layer is also used at two paths."""
    model = injected(Many, target_modules=("twice", "classifier"))
    random = np.random.default_rng(0)
    pictures = random.normal(size=(4, 2, 2, 8, 8)).astype(np.float32)
    batches = [{"inputs": inputs, "targets": np.array([0, 2])} for inputs in pictures]
    check(model, [job(extract_adapter(model), batches[k:], ADAMW) for k in range(2)])
