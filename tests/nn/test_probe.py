"""The probe names the module through which clients of one pass would reach one another."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.adapter import LoraConfig
from fedlora.nn import Batch, Task, extract_adapter, get_task, inject_lora
from fedlora.nn.llama import Llama, LlamaConfig
from fedlora.nn.probe import find_leak
from tests.nn.models import Mlp, TiedLm, same_state, state

CLASSES = get_task("classification")
TOKENS = get_task("next-token")


def features(rows: int = 3, seed: int = 0) -> Batch:
    random = np.random.default_rng(seed)
    return {
        "inputs": random.normal(size=(rows, 6)).astype(np.float32),
        "targets": random.integers(0, 3, rows),
    }


def texts(rows: int = 2, width: int = 9, seed: int = 0, vocabulary: int = 11) -> Batch:
    random = np.random.default_rng(seed)
    inputs = random.integers(1, vocabulary, (rows, width))
    inputs[-1, width - 3 :] = 0
    targets = np.where(inputs == 0, -100, random.integers(1, vocabulary, (rows, width)))
    return {"inputs": inputs, "targets": targets}


def labelled(rows: int = 2, width: int = 9, seed: int = 0) -> Batch:
    batch = texts(rows, width, seed, vocabulary=23)
    return {"inputs": batch["inputs"], "targets": np.arange(rows) % 3}


class BetweenTwo(nn.Module):
    """(b, 6) features to 3 logits, with a module under test between two adapted layers."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.middle = middle
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.middle(self.first(x)).relu())
        return out


class Written(nn.Module):
    """A layer that is one function of its input."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class BatchStatistics(nn.Module):
    """A norm that uses the batch's own mean and variance, and counts on in its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("variance", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.variance, training=True)


class Bypass(Mlp):
    """One adapted layer is called, the other's weight is read."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(F.linear(self.first(x).relu(), self.second.weight).relu())
        return out


class OnceABatch(TiedLm):
    """An adapted embedding of positions, which is called once for all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(16, 8)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1])[None]
        out: Tensor = self.lm_head(self.mix(self.embed(ids) + self.positions(places)).tanh())
        return out


class TimeFirst(TiedLm):
    """An adapted layer that gets (time, batch, features)."""

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.lm_head(self.mix(self.embed(ids).transpose(0, 1)).transpose(0, 1))
        return out


class Merged(nn.Module):
    """Texts without their padding, one behind another in one row."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.unpad = Unpad()
        self.mix = nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 11)

    def forward(self, ids: Tensor) -> Tensor:
        flat = self.mix(self.unpad(self.embed(ids), ids))
        hidden = flat.new_zeros(*ids.shape, 8).masked_scatter((ids != 0)[..., None], flat)
        out: Tensor = self.lm_head(hidden)
        return out


class Unpad(nn.Module):
    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return x[ids != 0]


class SharedMemory(nn.Module):
    """Another result at every call, without torch's generator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * (1 + 0.1 * self.calls)


class OneRowOnly(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 3:
            raise ValueError("expected at most 3 rows\nand this line is not shown")
        return x


def sorted_rows(x: Tensor) -> Tensor:
    return x[x.detach().sum(1).argsort(descending=True)]


def mixed_losses(model: nn.Module, batches: Any) -> Tensor:
    """A loss between the rows of all clients."""
    assert CLASSES.losses is not None
    losses = CLASSES.losses(model, batches)
    return losses * losses.mean()


def between(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: BetweenTwo(make())


def in_writing(function: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: BetweenTwo(Written(function))


ANOTHER = "lets one client's data change another client's output"
DRAWS = "draws from torch's one generator, which clients would share"
LEAKS: dict[str, tuple[Callable[[], nn.Module], str, str | tuple[str, ...]]] = {
    "batch norm without running statistics": (
        between(lambda: nn.BatchNorm1d(8, track_running_stats=False)),
        "classification",
        f"layer 'middle' (BatchNorm1d) {ANOTHER}",
    ),
    "batch norm that trains in evaluation": (
        between(BatchStatistics),
        "classification",
        f"layer 'middle' (BatchStatistics) {ANOTHER}",
    ),
    "centring over rows": (
        in_writing(lambda x: x - x.mean(0)),
        "classification",
        f"layer 'middle' (Written) {ANOTHER}",
    ),
    "mixing with the batch's mean": (
        in_writing(lambda x: x + 1e-3 * x.mean(0)),
        "classification",
        f"layer 'middle' (Written) {ANOTHER}",
    ),
    "nested": (
        between(lambda: nn.Sequential(nn.Tanh(), nn.BatchNorm1d(8, track_running_stats=False))),
        "classification",
        f"layer 'middle.1' (BatchNorm1d) {ANOTHER}",
    ),
    "cumulative sum over rows": (
        in_writing(lambda x: x + 0.1 * x.cumsum(0)),
        "classification",
        f"layer 'middle' (Written) {ANOTHER}",
    ),
    "sorting rows": (
        in_writing(sorted_rows),
        "classification",
        "layer 'middle' (Written)",  # by chance already in order, or not
    ),
    "reversing rows": (
        in_writing(lambda x: x.flip(0)),
        "classification",
        f"layer 'middle' (Written) {ANOTHER}",
    ),
    "dropout of the model's own": (
        in_writing(lambda x: F.dropout(x, 0.3, training=True)),
        "classification",
        f"layer 'middle' (Written) {DRAWS}",
    ),
    "another result at every call": (
        between(SharedMemory),
        "classification",
        "layer 'middle' (SharedMemory) gives another output each time for the same input",
    ),
    "a weight read past its layer": (
        Bypass,
        "classification",
        "the weight of layer 'second' (Linear) is read without calling the layer, so that its "
        "adapter has no effect",
    ),
    "dropping rows": (
        in_writing(lambda x: x[: max(3, len(x) - 1)]),
        "classification",
        "a batch of two clients raises ValueError: Expected input batch_size (3) to match target "
        "batch_size (4).; layer 'middle' (Written) does not keep each client's rows in their place "
        "in dimension 0",
    ),
    "raising": (
        between(OneRowOnly),
        "classification",
        "in a batch of two clients layer 'middle' (OneRowOnly) raises ValueError: expected at "
        "most 3 rows",
    ),
    "positions of the whole batch": (
        OnceABatch,
        "next-token",
        "in a batch of two clients layer 'positions' (Embedding) raises ConfigError: layer "
        "'positions': expected the rows of 2 clients in dimension 0, found shape (1, 9); train "
        "one client at a time",
    ),
    "time first": (TimeFirst, "next-token", "layer 'mix' (Linear)"),
    "merging rows": (Merged, "next-token", "layer 'mix' (Linear)"),
}


def injected(make: Callable[[], nn.Module], targets: Any = "all-linear") -> nn.Module:
    torch.manual_seed(0)
    model = make().eval()
    inject_lora(model, LoraConfig(rank=2, lora_alpha=4, target_modules=targets))
    return model


def leak(model: nn.Module, task: Task, batches: list[Batch] | None = None) -> str | None:
    made = texts if task is TOKENS else features
    batches = batches or [made(seed=1), made(seed=2)]
    return find_leak(model, task, batches, extract_adapter(model))


@pytest.mark.parametrize("case", LEAKS)
def test_a_leak_is_named(case: str) -> None:
    make, task, reason = LEAKS[case]
    targets = ("positions", "mix") if make is OnceABatch else "all-linear"
    found = leak(injected(make, targets), get_task(task))
    assert found is not None
    assert "\n" not in found
    assert reason in found


@pytest.mark.parametrize("seed", range(10))
def test_a_sort_is_found_whatever_the_order_of_the_probed_rows(seed: int) -> None:
    """Rows that happen to be in order already would not move."""
    model = injected(in_writing(sorted_rows))
    batches = [features(seed=2 * seed), features(seed=2 * seed + 1)]
    assert "layer 'middle' (Written)" in (leak(model, CLASSES, batches) or "")


def test_a_loss_that_mixes_clients_is_named() -> None:
    task = Task("mixed", "loss", False, CLASSES.loss, CLASSES.score, mixed_losses)
    assert leak(injected(Mlp), task) == (
        "one client's data changes another client's gradients in the losses of task 'mixed', or in "
        "the backward pass of Mlp"
    )


def test_losses_of_another_scale_than_the_loss_are_named() -> None:
    def doubled(model: nn.Module, batches: Any) -> Tensor:
        assert CLASSES.losses is not None
        return 2 * CLASSES.losses(model, batches)

    task = Task("double", "loss", False, CLASSES.loss, CLASSES.score, doubled)
    assert leak(injected(Mlp), task) == (
        "task 'double': `losses` of one client has other gradients than `loss`"
    )


def test_losses_of_another_number_are_named() -> None:
    task = Task("sum", "loss", False, CLASSES.loss, CLASSES.score, lambda m, b: torch.zeros(1))
    reason = leak(injected(Mlp), task)
    assert reason is not None
    assert "ValueError: task 'sum': expected 2 losses, found shape (1,)" in reason


def test_padding_that_is_not_masked_is_named() -> None:
    """A mean over all positions is another one when a client's texts are padded to a longer one."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(23, 8)
            self.head = nn.Linear(8, 3)

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.head(self.embed(ids)).mean(1)
            return out

    assert leak(injected(Pooled, ("embed",)), CLASSES, [labelled(), labelled(seed=1)]) == (
        "a client's gradients change when its batch is filled up to the length or the rows of "
        "another client's: is padding masked?"
    )


def tiny_llama() -> nn.Module:
    return Llama(LlamaConfig(23, 16, 2, 2, 1, 24))


def bert() -> nn.Module:
    shape = {"vocab_size": 23, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = transformers.BertConfig(**shape, num_attention_heads=2, num_labels=3)
    return transformers.BertForSequenceClassification(config)


def llama() -> nn.Module:
    shape = {"vocab_size": 23, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, num_attention_heads=2))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=23, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


CLEAN: dict[str, tuple[Callable[[], nn.Module], Any, Task, Callable[..., Batch]]] = {
    "mlp": (Mlp, "all-linear", CLASSES, features),
    "batch norm with running statistics": (
        between(lambda: nn.BatchNorm1d(8)), "all-linear", CLASSES, features,
    ),
    "sorted and put back": (
        in_writing(lambda x: sorted_rows(x)[x.detach().sum(1).argsort(descending=True).argsort()]),
        "all-linear", CLASSES, features,
    ),
    "tied": (TiedLm, "all-linear", TOKENS, texts),
    "tied, embedding": (TiedLm, ("embed", "mix"), TOKENS, texts),
    "own llama": (tiny_llama, "all-linear", TOKENS, texts),
    "own llama, head": (tiny_llama, ("lm_head", "q_proj"), TOKENS, texts),
    "bert": (bert, "all-linear", CLASSES, labelled),
    "llama": (llama, "all-linear", TOKENS, texts),
    "gpt2": (gpt2, "all-linear", TOKENS, texts),
}  # fmt: skip


@pytest.mark.parametrize("case", CLEAN)
def test_a_model_whose_rows_are_apart_passes(case: str) -> None:
    make, targets, task, batch = CLEAN[case]
    assert leak(injected(make, targets), task, [batch(seed=1), batch(3, seed=2)]) is None


def test_a_clients_nan_is_no_leak() -> None:
    bad = dict(features())
    bad["inputs"] = np.full_like(bad["inputs"], np.nan)
    assert leak(injected(Mlp), CLASSES, [bad, features()]) is None


@pytest.mark.parametrize("make", [Mlp, between(BatchStatistics), between(SharedMemory), Bypass])
def test_the_model_is_left_as_it_was(make: Callable[[], nn.Module]) -> None:
    model = injected(make).train()
    before, factors = state(model), [p for p in model.parameters() if p.requires_grad]
    modules, config = dict(model.named_modules()), extract_adapter(model).config
    for parameter in factors:
        parameter.grad = torch.ones_like(parameter)
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    leak(model, CLASSES)
    assert torch.equal(torch.rand(2), expected)
    assert same_state(model, before)
    assert [p for p in model.parameters() if p.requires_grad] == factors
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in factors)
    assert dict(model.named_modules()) == modules
    assert extract_adapter(model).config is config
    for module in modules.values():
        assert module.training
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)


def test_the_answer_is_the_same_every_time() -> None:
    model = injected(between(lambda: nn.BatchNorm1d(8, track_running_stats=False)))
    assert leak(model, CLASSES) == leak(copy.deepcopy(model), CLASSES)
