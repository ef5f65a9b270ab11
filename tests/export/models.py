"""What the tests of fedlora.export trace: small models of every kind, adapters and batches.

Of a kind of model one case has several blocks, another only one: tracing takes its time by block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM
from transformers import LlamaConfig as HFLlamaConfig

from fedlora.adapter import Adapter, LoraConfig, LoraLayer
from fedlora.device.manifest import factors_of
from fedlora.export.trace import Subject, subject_of
from fedlora.export.traced import Traced
from fedlora.nn import layer_specs, load_base
from fedlora.nn.classifier import Classifier
from fedlora.targets import select_targets
from tests.nn.models import Many, Mlp, TiedLm, seeded

WATCH = ("conv1", "conv2", "conv3", "hidden", "classifier")


@dataclass(frozen=True)
class Case:
    """A model to trace and the layers that take factors."""

    make: Callable[[], nn.Module]
    targets: str | tuple[str, ...]
    task: str
    shape: tuple[int, ...] = ()
    vocabulary: int = 0  # of text

    def subject(self) -> Subject:
        model = self.make().eval().requires_grad_(False)
        config = LoraConfig(target_modules=self.targets)
        paths = select_targets(layer_specs(model), config)
        return subject_of(model, paths, self.task, self.shape)  # type: ignore[arg-type]


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    classifier = Classifier(BertModel(config).eval(), 3)
    classifier.zero_head.weight.data.normal_()  # a head that is zero would hide every difference
    return classifier


def gpt2(layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=layers, n_head=2, n_positions=64)
    model = GPT2LMHeadModel(config)
    model.config.use_cache = False
    return model


def hf_llama() -> nn.Module:
    torch.manual_seed(0)
    config = HFLlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.config.use_cache = False
    return model


def causal_classifier() -> nn.Module:
    classifier = Classifier(hf_llama().eval(), 3)
    torch.manual_seed(1)
    classifier.zero_head.weight.data.normal_()
    return classifier


CASES = {
    "mlp": Case(lambda: seeded(Mlp), ("first", "second", "head"), "classification", (6,)),
    "many": Case(
        lambda: seeded(Many), ("conv", "twice", "classifier"), "classification", (2, 8, 8)
    ),
    "tied": Case(lambda: seeded(TiedLm), ("embed", "mix"), "next-token", (), 11),
    "head": Case(lambda: seeded(TiedLm), ("mix", "lm_head"), "next-token", (), 11),
    "watch-cnn": Case(lambda: load_base("watch-cnn").model, WATCH, "classification", (6, 100)),
    "tiny-chat": Case(lambda: load_base("tiny-chat").model, "all-linear", "next-token", (), 2048),
    "bert": Case(bert, "all-linear", "classification", (), 40),
    "gpt2": Case(gpt2, "all-linear", "next-token", (), 40),
    "hf-llama": Case(hf_llama, "all-linear", "next-token", (), 40),
    "causal-classifier": Case(causal_classifier, "all-linear", "classification", (), 40),
}


def random_adapter(subject: Subject, rank: int, seed: int, size: float = 0.3) -> Adapter:
    """An adapter whose effect is of the order of the base's own outputs."""
    generator = np.random.default_rng(seed)
    layers = {}
    for path, spec in subject.layers.items():
        A = generator.normal(size=(rank, *spec.in_shape)) / np.sqrt(np.prod(spec.in_shape))
        B = generator.normal(size=(spec.out_features, rank)) * size / np.sqrt(rank)
        layers[path] = LoraLayer(A, B, scaling=2.0, kind=spec.kind)
    config = LoraConfig(rank=rank, lora_alpha=2.0 * rank, target_modules=tuple(subject.layers))
    return Adapter(layers, config)


def random_inputs(case: Case, rows: int, time: int, seed: int = 0) -> Tensor:
    """Rows of different lengths, padded with 0 on the right, or normal features."""
    generator = np.random.default_rng(seed)
    if case.shape:
        return torch.from_numpy(generator.normal(size=(rows, *case.shape)).astype(np.float32))
    ids = generator.integers(1, case.vocabulary, (rows, time))
    lengths = generator.integers(1, time + 1, rows)
    lengths[0] = time
    return torch.from_numpy(np.where(np.arange(time) < lengths[:, None], ids, 0))


def random_targets(case: Case, inputs: Tensor, classes: int, seed: int = 1) -> Tensor:
    """The next token, or a class a row; a part is not counted."""
    generator = np.random.default_rng(seed)
    if case.task == "classification":
        targets = generator.integers(0, classes, len(inputs))
        targets[-1] = -100 if len(inputs) > 1 else targets[-1]
        return torch.from_numpy(targets)
    shifted = torch.cat((inputs[:, 1:], torch.zeros_like(inputs[:, :1])), 1)
    return torch.where(shifted == 0, -100, shifted)


def run(
    traced: Traced,
    inputs: Mapping[str, Tensor],
    adapters: Sequence[tuple[Adapter, bool]] = (),
) -> dict[str, Tensor]:
    """Run a traced module in torch; adapters with whether each is the frozen one."""
    values = dict(traced.defaults) | dict(inputs)
    for adapter, frozen in adapters:
        values |= {
            name: torch.from_numpy(np.array(factor))
            for name, factor in factors_of(adapter, frozen=frozen)
        }
    assert set(values) == set(traced.inputs)
    with torch.no_grad():
        found = traced.module(*(values[name] for name in traced.inputs))
    return dict(zip(traced.outputs, found, strict=True))
