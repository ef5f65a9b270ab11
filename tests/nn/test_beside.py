"""A model that computes beside a frozen adapter: as the stack of both, and its base untouched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedlora.adapter import Adapter, LoraConfig, stack
from fedlora.errors import (
    BaseMismatchError,
    ConfigError,
    LayerMismatchError,
    UnsupportedError,
)
from fedlora.nn import (
    base_fingerprint,
    beside,
    extract_adapter,
    inject_lora,
    load_adapter_into,
    merge_lora,
)
from fedlora.nn.checkpointing import checkpoint_blocks
from fedlora.nn.cohort import train_cohort, train_group, why_alone
from fedlora.nn.inject import (
    half_weights,
    kept_activations,
    lora_modules,
    summed_weights,
)
from fedlora.nn.kept import SummedWeights
from fedlora.nn.quantize import quantize_base
from tests.matching import raises
from tests.nn import test_prefix
from tests.nn.models import Many, Mlp, TiedLm, seeded
from tests.nn.test_cohort import (
    ADAMW,
    CLASSES,
    SGD,
    TOKENS,
    TinyLlama,
    alone,
    check,
    features,
    injected,
    job,
    largest_difference,
    started,
    texts,
)
from tests.nn.test_serving import INPUTS

KINDS: dict[type[nn.Module], tuple[str, ...] | str] = {
    Mlp: "all-linear",
    Many: ("conv", "twice", "classifier"),
    TiedLm: ("embed", "mix", "lm_head"),
}


def with_lora(kind: type[nn.Module]) -> nn.Module:
    return injected(kind, target_modules=KINDS[kind])


def frozen_of(model: nn.Module, seed: int = 7, rank: int = 5) -> Adapter:
    """An adapter of another rank and scaling than the trained one, and of some weight."""
    return started(model, seed, rank=rank, lora_alpha=4.0 * rank)


def quantized() -> nn.Module:
    model = with_lora(Mlp)
    quantize_base(model, "int8")
    return model


@pytest.mark.parametrize("limit", [1 << 24, 0], ids=["in the weights", "in the pass"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_the_stack(kind: type[nn.Module], limit: int) -> None:
    model = with_lora(kind)
    summed_weights(model).limit = limit
    own, frozen = started(model, 1), frozen_of(model)
    weights = {path: m.base_layer.weight.clone() for path, m in lora_modules(model).items()}
    with torch.no_grad():
        load_adapter_into(model, stack([own, frozen]))
        expected = model(INPUTS[kind])
        load_adapter_into(model, own)
        before = model(INPUTS[kind])
        with beside(model, frozen):
            found = model(INPUTS[kind])
            assert extract_adapter(model) == own
        after = model(INPUTS[kind])
    # float32: the same sum in another order, of outputs of size 1 to 10
    torch.testing.assert_close(found, expected, atol=5e-6, rtol=1e-5)
    assert not torch.allclose(found, before, atol=1e-2)
    assert torch.equal(after, before)
    for path, module in lora_modules(model).items():
        assert torch.equal(module.base_layer.weight, weights[path])


def test_nothing_frozen_is_nothing_changed() -> None:
    model = with_lora(Mlp)
    bases = [module.base_layer for module in lora_modules(model).values()]
    with beside(model, None):
        assert [module.base_layer for module in lora_modules(model).values()] == bases
    assert summed_weights(model).made == 0


SETTINGS: dict[str, tuple[Callable[[], nn.Module], Any, Any]] = {
    "linear, in the weights": (lambda: with_lora(Mlp), CLASSES, features),
    "int8, in the pass": (quantized, CLASSES, features),
    "embedding and head": (lambda: with_lora(TiedLm), TOKENS, texts),
    "texts sharing rows": (lambda: injected(TinyLlama), TOKENS, texts),
}


@pytest.mark.parametrize("config", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_group_beside_a_frozen_adapter_is_each_client_alone(name: str, config: Any) -> None:
    make, task, data = SETTINGS[name]
    model = make()
    # Ranks and steps differ from client to client.
    jobs = [
        job(started(model, k, rank=1 + k, lora_alpha=2.0), data(4 + k, seed=k), config)
        for k in range(3)
    ]
    plain = train_group(model, jobs, task)
    with beside(model, frozen_of(model)):
        firsts = [one.batches[0] for one in jobs[:2]]  # type: ignore[index]
        assert why_alone(model, task, firsts, jobs[0].start) is None  # the probe works inside
        found = check(model, jobs, task)
    for one, without in zip(found, plain, strict=True):
        assert largest_difference(one.adapter(), without.adapter()) > 1e-3


def test_a_client_alone_starts_from_what_the_stack_computes() -> None:
    model = with_lora(Many)  # convolutions are not batched
    own, frozen = started(model, 1), frozen_of(model)
    random = np.random.default_rng(0)
    inputs = random.normal(size=(4, 2, 8, 8)).astype(np.float32)
    batches = [{"inputs": inputs, "targets": np.arange(4) % 3}] * 2
    with beside(model, frozen):
        found = alone(model, job(own, batches))
    first = alone(model, job(own, batches[:1]))
    whole = alone(model, job(stack([own, frozen]), batches[:1]))
    with beside(model, frozen):
        mine = alone(model, job(own, batches[:1]))
    assert mine.loss == pytest.approx(whole.loss, rel=1e-6)
    assert abs(mine.loss - first.loss) > 1e-3
    # The gradient of B is the same as in the stack, of which the frozen rows are left out.
    for path, layer in mine.adapter.layers.items():
        scale = own[path].scaling
        step = (layer.B - own[path].B) / scale
        rows = (whole.adapter[path].B - stack([own, frozen])[path].B)[:, : own[path].rank]
        np.testing.assert_allclose(step, rows, atol=2e-6)
    assert found.steps == 2


@pytest.mark.parametrize("name", ["BERT", "our Llama, texts sharing rows", "Sequential"])
def test_kept_activations_stay_good_when_the_frozen_adapter_changes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_prefix.prefix, "LEAST_PARAMETERS", 1)
    make, task, examples = test_prefix.MODELS[name]
    model, plain = make(), make()
    kept_activations(plain).enabled = False
    rounds: list[list[np.ndarray]] = [[], []]
    for k, one in enumerate((model, plain)):
        work = test_prefix.jobs(one, examples)
        for seed in (None, 1, 2):  # the same examples in every round
            frozen = None if seed is None else frozen_of(one, seed).scaled(0.1)
            with beside(one, frozen):
                rounds[k].append(test_prefix.rows(one, work, task))
    kept = kept_activations(model)
    assert list(kept.verdicts.values()) == [True]
    assert kept.served > 6
    for found, expected in zip(*rounds, strict=True):
        np.testing.assert_allclose(found, expected, atol=5e-5)  # AdamW, as in test_prefix
    assert np.abs(rounds[0][1] - rounds[0][2]).max() > 1e-3


def test_checkpointing_gives_the_same_bits() -> None:
    model = injected(TinyLlama)
    twice = injected(TinyLlama)
    assert checkpoint_blocks(twice) == 2
    found = []
    for one in (model, twice):
        work = [job(started(one, k), texts(3, seed=k)) for k in range(2)]
        with beside(one, frozen_of(one)):
            found.append([trained.row for trained in train_group(one, work, TOKENS)])
    for mine, theirs in zip(*found, strict=True):
        assert np.array_equal(mine, theirs)


def test_bfloat16_points_where_float32_does_and_drops_its_twins() -> None:
    make, task, examples = test_prefix.MODELS["BERT"]
    model = make()
    work = test_prefix.jobs(model, examples)
    updates = {}
    for precision in ("fp32", "bf16"):
        with beside(model, frozen_of(model).scaled(0.1)):
            trained = train_group(model, work, task, precision=precision)  # type: ignore[arg-type]
        updates[precision] = np.concatenate([one.row for one in trained])
    start = np.concatenate(
        [part.reshape(-1) for layer in work[0].start.layers.values() for part in (layer.A, layer.B)]
    )
    exact, coarse = (update - np.tile(start, len(work)) for update in updates.values())
    cosine = exact @ coarse / np.linalg.norm(exact) / np.linalg.norm(coarse)
    assert 0.9 < cosine < 1.0  # as without a frozen adapter, see test_precision
    # One round's sums at a time, and their bfloat16 twins with them.
    counts = []
    summed_weights(model).limit = sum(
        module.base_layer.weight.numel() for module in lora_modules(model).values()
    )
    for seed in range(3):
        with beside(model, frozen_of(model, seed).scaled(0.1)):
            train_group(model, work, task, precision="bf16")
        counts.append(len(half_weights(model)))
    assert counts[0] == counts[1] == counts[2]


def test_the_sums_are_made_once_for_all_groups_and_copies() -> None:
    model = with_lora(Mlp)
    frozen = frozen_of(model)
    work = [job(started(model, k), features(2, seed=k)) for k in range(3)]
    for again in (frozen, frozen, Adapter(dict(frozen.layers), frozen.config, frozen.base)):
        with beside(model, again):
            train_cohort(model, work, CLASSES)
    assert summed_weights(model).made == 2  # layers: the head is not adapted

    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    copies = [copy.deepcopy(model, dict(shared)) for _ in range(2)]

    def train(one: nn.Module) -> list[np.ndarray]:
        with beside(one, frozen):
            return [trained.row for trained in train_group(one, work, CLASSES)]

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(train, copies)
    assert all(map(np.array_equal, first, second))
    assert summed_weights(model).made == 2
    with beside(model, frozen_of(model, 8)):
        pass
    assert summed_weights(model).made == 4


def test_sums_that_were_used_longest_ago_make_room() -> None:
    sums = SummedWeights(limit=10)
    weight, other = torch.zeros(4), torch.zeros(4)

    def get(name: str, of: torch.Tensor = weight) -> torch.Tensor:
        return sums.of(name, "path", of, lambda: torch.ones(4))

    first, _, again = get("a"), get("b"), get("a")
    assert again is first
    assert sums.made == 2
    get("c")  # in place of b
    assert get("a") is first
    assert sums.made == 3
    assert get("a", other) is not first  # the same adapter on another base
    assert sums.made == 4
    large = sums.of("d", "path", weight, lambda: torch.ones(100))
    assert sums.of("d", "path", weight, lambda: torch.ones(100)) is large


def test_everything_is_put_back_after_an_error() -> None:
    model = with_lora(Mlp)
    before = base_fingerprint(model)
    with pytest.raises(KeyError), beside(model, frozen_of(model)):
        raise KeyError
    assert base_fingerprint(model) == before
    assert all(type(m.base_layer) is nn.Linear for m in lora_modules(model).values())


def test_an_adapter_that_does_not_fit_is_refused_before_anything_changes() -> None:
    model = with_lora(Mlp)
    frozen = frozen_of(model)
    bases = [module.base_layer for module in lora_modules(model).values()]
    one = Adapter({"first": frozen["first"]}, frozen.config, frozen.base)
    cases = [
        (replace(frozen, base="0" * 64), BaseMismatchError, "the frozen adapter: the adapter was"),
        (one, LayerMismatchError, "the frozen adapter: expected the 2 layers"),
    ]
    for wrong, error, text in cases:
        with pytest.raises(error, match=f"^{text}"), beside(model, wrong):
            pass
    assert [module.base_layer for module in lora_modules(model).values()] == bases
    merge_lora(model)
    with (
        raises(
            ConfigError,
            "the frozen adapter: the model's own is merged into the base; call unmerge_lora first",
        ),
        beside(model, frozen),
    ):
        pass


def test_dora_and_embeddings_with_a_max_norm_are_refused() -> None:
    model = injected(Mlp, variant="dora")
    with (
        pytest.raises(UnsupportedError, match="DoRA normalizes"),
        beside(model, extract_adapter(model)),
    ):
        pass
    model = seeded(TiedLm)
    model.embed.max_norm = 1.0
    inject_lora(model, LoraConfig(rank=2, target_modules=("embed",)))
    with pytest.raises(UnsupportedError, match="max_norm"), beside(model, extract_adapter(model)):
        pass
