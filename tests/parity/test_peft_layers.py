"""Every layer kind and variant against PEFT: outputs and gradients, with the same factors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedlora.adapter import Adapter, LoraConfig, LoraLayer
from fedlora.nn import extract_adapter, inject_lora, load_adapter_into
from fedlora.nn.inject import lora_modules

TOLERANCE = 1e-6  # of the largest value, or of one: the order of a few float32 roundings

VARIANTS = ("lora", "rslora", "dora", "rsdora")


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()


def ids(rows: int) -> Tensor:
    return torch.randint(0, rows, (4, 5), generator=torch.Generator().manual_seed(1))


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(6, 5), lambda: floats(2, 3, 6)),
    "linear-no-bias": (lambda: nn.Linear(6, 5, bias=False), lambda: floats(4, 6)),
    "linear-one-out": (lambda: nn.Linear(6, 1), lambda: floats(4, 6)),
    "Conv1D": (lambda: Conv1D(5, 6), lambda: floats(2, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 5, 4, stride=2, padding=1), lambda: floats(2, 3, 11)),
    "conv1d-no-bias": (lambda: nn.Conv1d(3, 5, 2, bias=False), lambda: floats(2, 3, 7)),
    "conv2d": (
        lambda: nn.Conv2d(3, 5, (3, 2), stride=(1, 2), padding=(2, 1)),
        lambda: floats(2, 3, 6, 7),
    ),
    "conv2d-pointwise": (lambda: nn.Conv2d(3, 5, 1), lambda: floats(2, 3, 4, 4)),
    "conv2d-same": (lambda: nn.Conv2d(3, 5, 3, padding="same"), lambda: floats(2, 3, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), lambda: floats(2, 2, 3, 4, 3)),
    "embedding": (lambda: nn.Embedding(11, 6), lambda: ids(11)),
    "embedding-padded": (lambda: nn.Embedding(11, 6, padding_idx=3), lambda: ids(11)),
    "embedding-max-norm": (lambda: nn.Embedding(11, 6, max_norm=0.5), lambda: ids(11)),
}


class One(nn.Module):
    """A model of a single layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.fc = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x)
        return out


def made(layer: Callable[[], nn.Module]) -> One:
    torch.manual_seed(0)
    model = One(layer()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model


def ours_and_pefts(
    layer: Callable[[], nn.Module], variant: str, dropout: float = 0.0
) -> tuple[One, One]:
    """The same layer with the same random factors, in fedlora and in PEFT."""
    config = LoraConfig(
        rank=4, lora_alpha=6, target_modules=("fc",), variant=variant, lora_dropout=dropout
    )
    ours = made(layer)
    inject_lora(ours, config, seed=0)
    adapter = randomized(extract_adapter(ours))
    load_adapter_into(ours, adapter)
    theirs = made(layer)
    peft.inject_adapter_in_model(
        peft.LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=["fc"],
            use_rslora=config.uses_rslora,
            use_dora=config.uses_dora,
            lora_dropout=dropout,
            fan_in_fan_out=isinstance(ours.fc.base_layer, Conv1D),
        ),
        theirs,
    )
    for name, tensor in pefts_factors(theirs).items():
        value = getattr(adapter["fc"], name)
        with torch.no_grad():
            tensor.copy_(torch.tensor(value).view(tensor.shape))
    return ours, theirs.eval()


def randomized(adapter: Adapter) -> Adapter:
    """Factors of order one, so that the base does not hide a wrong one."""
    random = np.random.default_rng(3)

    def fill(layer: LoraLayer) -> LoraLayer:
        return dataclasses.replace(
            layer,
            A=random.normal(size=layer.A.shape),
            B=random.normal(size=layer.B.shape),
            magnitude=None
            if layer.magnitude is None
            else layer.magnitude * random.uniform(0.5, 2, layer.magnitude.shape),
        )

    return adapter.map(fill)


def pefts_factors(model: One) -> dict[str, Tensor]:
    fc = model.fc
    if fc.lora_embedding_A:
        found = {"A": fc.lora_embedding_A["default"], "B": fc.lora_embedding_B["default"]}
    else:
        found = {"A": fc.lora_A["default"].weight, "B": fc.lora_B["default"].weight}
    if fc.lora_magnitude_vector:
        found["magnitude"] = fc.lora_magnitude_vector["default"].weight
    return found


def our_factors(model: One) -> dict[str, Tensor]:
    module = lora_modules(model)["fc"]
    found = {"A": module.lora_A, "B": module.lora_B, "magnitude": module.magnitude}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def assert_same_output_and_gradients(ours: One, theirs: One, x: Tensor) -> None:
    y, expected = forward(ours, x), forward(theirs, x)
    assert_close(y, expected, "output")
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    mine, others = our_factors(ours), pefts_factors(theirs)
    assert mine.keys() == others.keys()
    wanted = [x] if x.is_floating_point() else []
    found = torch.autograd.grad((y * weights).sum(), [*mine.values(), *wanted])
    truth = torch.autograd.grad((expected * weights).sum(), [*others.values(), *wanted])
    for name, gradient, true in zip([*mine, "input"], found, truth, strict=False):
        assert_close(gradient, true, f"gradient of {name}")


def forward(model: One, x: Tensor) -> Tensor:
    torch.manual_seed(5)
    out: Tensor = model(x)
    return out


def assert_close(found: Tensor, expected: Tensor, what: str) -> None:
    difference = float((found - expected.view(found.shape)).detach().abs().max())
    largest = max(1.0, float(expected.detach().abs().max()))
    assert difference <= TOLERANCE * largest, f"{what}: {difference:.1e} of {largest:.1e}"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_and_gradients_are_pefts(kind: str, variant: str) -> None:
    layer, inputs = LAYERS[kind]
    ours, theirs = ours_and_pefts(layer, variant)
    assert_same_output_and_gradients(ours, theirs, inputs())


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_is_pefts_under_the_same_seed(kind: str, variant: str) -> None:
    layer, inputs = LAYERS[kind]
    ours, theirs = ours_and_pefts(layer, variant, dropout=0.4)
    assert_same_output_and_gradients(ours.train(), theirs.train(), inputs())
    x = inputs()
    if x.is_floating_point():  # embeddings have no dropout, as in PEFT
        assert not torch.equal(forward(ours.train(), x), forward(ours.eval(), x))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", LAYERS)
def test_injection_starts_with_the_magnitude_that_peft_starts_with(kind: str, variant: str) -> None:
    layer, inputs = LAYERS[kind]
    ours, theirs, base = made(layer), made(layer), made(layer)
    config = LoraConfig(rank=2, target_modules=("fc",), variant=variant)
    inject_lora(ours, config)
    x = inputs()
    if kind != "embedding-max-norm":  # whose norms change as soon as it is used
        assert_close(ours(x), base(x), "output at B = 0")
    if not config.uses_dora:
        return
    peft.inject_adapter_in_model(
        peft.LoraConfig(
            r=2,
            target_modules=["fc"],
            use_dora=True,
            fan_in_fan_out=isinstance(theirs.fc, Conv1D),
        ),
        theirs,
    )
    assert_close(our_factors(ours)["magnitude"], pefts_factors(theirs)["magnitude"], "magnitude")
