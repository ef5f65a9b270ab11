"""A group of unlike clients in one pass, against real PEFT, one client at a time.

Ranks, alphas, rsLoRA, numbers of steps (up to 10), rows, lengths, learning rates and clipping
differ from client to client, all in one group. PEFT's clients run with torch's plain optimizers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.adapter import Adapter, Array, LoraConfig, LoraLayer
from fedlora.nn import Batch, get_task, inject_lora
from fedlora.nn.cohort import Job, train_group, why_alone
from fedlora.nn.inject import lora_modules
from fedlora.nn.llama import Llama, LlamaConfig
from fedlora.training import Factor, TrainConfig

VOCABULARY = 61


@dataclass(frozen=True)
class Client:
    """What one client's training is made of."""

    rank: int
    alpha: float
    steps: int
    rows: int
    width: int  # tokens of its longest text
    rate: float = 1.0  # times the case's learning rate
    max_grad_norm: float | None = None
    rslora: bool = False


CLIENTS = (
    Client(rank=8, alpha=16, steps=10, rows=4, width=9),
    Client(rank=2, alpha=4, steps=10, rows=1, width=12, rate=0.5, max_grad_norm=0.05),
    Client(rank=4, alpha=4, steps=7, rows=3, width=5, rslora=True),
    Client(rank=1, alpha=2, steps=3, rows=2, width=7, max_grad_norm=1.0),
    Client(rank=8, alpha=8, steps=10, rows=2, width=12, rate=0.25, rslora=True),
)


def tiny() -> nn.Module:
    return bert(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)


def minilm() -> nn.Module:
    """all-MiniLM-L6's shape, but for the vocabulary."""
    return bert(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12
    )


def bert(**shape: int) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, max_position_embeddings=32, num_labels=3, **shape
    )
    return transformers.BertForSequenceClassification(config).eval()


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def own_llama() -> nn.Module:
    torch.manual_seed(0)
    model = Llama(LlamaConfig(VOCABULARY, 32, 2, 4, 2, 64)).eval()
    with torch.no_grad():  # as Hugging Face's: torch's own embedding of size 1 means losses of 30
        model.model.embed_tokens.weight.mul_(0.02)
    return model


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=32,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], str, Any]] = {
    "tiny transformer": (tiny, "classification", "all-linear"),
    "llama": (llama, "next-token", "all-linear"),
    "llama, embedding": (llama, "next-token", ("embed_tokens", "q_proj", "v_proj")),
    "own llama, texts in one row": (own_llama, "next-token", "all-linear"),
    "gpt2": (gpt2, "next-token", "all-linear"),  # its layers are Conv1D
    "minilm": (minilm, "classification", ("query", "value")),
}


def batches_of(client: Client, task: str, seed: int) -> list[Batch]:
    random = np.random.default_rng(seed)
    found = []
    for _ in range(client.steps):
        inputs = random.integers(1, VOCABULARY, (client.rows, client.width))
        for row in range(1, client.rows):  # the first is the longest
            inputs[row, random.integers(2, client.width + 1) :] = 0
        targets = np.where(inputs == 0, -100, random.integers(1, VOCABULARY, inputs.shape))
        if task == "classification":
            targets = random.integers(0, 3, client.rows)
        found.append({"inputs": inputs, "targets": targets})
    return found


def start_of(client: Client, model: nn.Module, seed: int) -> Adapter:
    """A of PEFT's size, and a small random B, as in a later round."""
    config = LoraConfig(
        rank=client.rank,
        lora_alpha=client.alpha,
        target_modules=tuple(lora_modules(model)),
        variant="rslora" if client.rslora else "lora",
    )
    random = np.random.default_rng(seed)
    layers = {}
    for path, module in lora_modules(model).items():
        like = module.layer()
        bound = 1 / np.sqrt(like.in_shape[0])
        layers[path] = LoraLayer(
            random.uniform(-bound, bound, (client.rank, *like.in_shape)),
            random.normal(0, 0.02, (like.out_features, client.rank)),
            config.scaling_of(path),
            None,
            like.kind,
        )
    return Adapter(layers, config)


def peft_client(
    base: nn.Module, one: Job, task: str, dtype: torch.dtype = torch.float32
) -> dict[tuple[str, Factor], Array]:
    """Train with PEFT's layers, torch's optimizers and a plain loop."""
    model, config, start = copy.deepcopy(base).to(dtype), one.config, one.start
    model.requires_grad_(False)
    peft.inject_adapter_in_model(
        peft.LoraConfig(
            r=start.config.rank,
            lora_alpha=start.config.lora_alpha,
            use_rslora=start.config.uses_rslora,
            target_modules=list(start.layers),
            fan_in_fan_out=isinstance(base, transformers.GPT2LMHeadModel),
        ),
        model,
    )
    model.eval().to(dtype)
    factors = {
        (path, name): factor
        for path in start
        for name, factor in zip(("A", "B"), peft_factors(model.get_submodule(path)), strict=True)
    }
    with torch.no_grad():
        for (path, name), factor in factors.items():
            factor.copy_(torch.tensor(getattr(start[path], name)))
    parameters = list(factors.values())
    if config.optimizer == "adamw":
        optimizer: Any = torch.optim.AdamW(parameters, config.learning_rate, weight_decay=0.0)
    else:
        optimizer = torch.optim.SGD(parameters, config.learning_rate)
    for batch in one.batches:
        inputs, targets = torch.tensor(batch["inputs"]), torch.tensor(batch["targets"])
        masked = {"attention_mask": (inputs != 0).long()} if task == "classification" else {}
        out = model(inputs, **masked)
        logits = out if isinstance(out, Tensor) else out.logits
        F.cross_entropy(logits.flatten(0, -2), targets.flatten()).backward()
        if config.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return {key: factor.detach().numpy() for key, factor in factors.items()}


def peft_factors(module: Any) -> tuple[nn.Parameter, nn.Parameter]:
    if "default" in module.lora_embedding_A:
        return module.lora_embedding_A["default"], module.lora_embedding_B["default"]
    return module.lora_A["default"].weight, module.lora_B["default"].weight


def jobs_of(model: nn.Module, task: str, config: TrainConfig) -> list[Job]:
    jobs = []
    for k, client in enumerate(CLIENTS):
        mine = TrainConfig(
            local_steps=client.steps,
            learning_rate=client.rate * config.learning_rate,
            optimizer=config.optimizer,
            max_grad_norm=client.max_grad_norm,
        )
        batches = batches_of(client, task, k)
        jobs.append(Job(f"c{k}", start_of(client, model, k), batches, client.steps, mine))
    return jobs


def largest(one: Any, other: Any) -> float:
    return max(float(np.abs(one[key] - other[key]).max()) for key in other)


# Largest difference of any weight. Measured: SGD 1.5e-8, which is the last bit of a weight of 0.2,
# and both sides are within 5.2e-8 of PEFT in float64; AdamW 4e-7, and 7.8e-6 for MiniLM, where PEFT
# in float32 is itself 1.7e-5 from float64, since first steps are as large for a tiny gradient as
# for any other.
RATES = {"sgd": (0.1, 1e-7), "adamw": (1e-3, 2e-5)}


# That the head is tied to the embedding: it stays the base's on both sides.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("optimizer", RATES)
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n == "minilm" else n for n in MODELS],
)
def test_each_client_of_a_group_ends_where_pefts_does(name: str, optimizer: Any) -> None:
    make, task, targets = MODELS[name]
    rate, tolerance = RATES[optimizer]
    base, ours = make(), make()
    inject_lora(ours, LoraConfig(rank=2, target_modules=targets))
    config = TrainConfig(local_steps=10, learning_rate=rate, optimizer=optimizer)
    jobs = jobs_of(ours, task, config)
    firsts = [job.batches[0] for job in jobs[:2]]
    assert why_alone(ours, get_task(task), firsts, jobs[0].start) is None
    for job, trained in zip(jobs, train_group(ours, jobs, get_task(task)), strict=True):
        found = trained.factors
        start = {(path, factor): getattr(job.start[path], factor) for path, factor in found}
        assert largest(found, start) > 1e-4
        assert largest(found, peft_client(base, job, task)) <= tolerance


def test_sums_are_as_near_to_float64_as_pefts() -> None:
    make, task, targets = MODELS["llama"]
    base, ours = make(), make()
    inject_lora(ours, LoraConfig(rank=2, target_modules=targets))
    config = TrainConfig(local_steps=10, learning_rate=0.1, optimizer="sgd")
    jobs = jobs_of(ours, task, config)
    together = train_group(ours, jobs, get_task(task))
    exact = [peft_client(base, job, task, torch.float64) for job in jobs]
    plain = [peft_client(base, job, task) for job in jobs]
    mine = max(largest(t.factors, e) for t, e in zip(together, exact, strict=True))
    theirs = max(largest(p, e) for p, e in zip(plain, exact, strict=True))
    assert mine <= 1.5 * theirs <= 1e-7
