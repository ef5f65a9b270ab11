"""The batched layer against its twin: one client after another, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import transformers.pytorch_utils
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedlora.adapter import Array, LoraConfig, LoraLayer
from fedlora.errors import ConfigError, ShapeMismatchError
from fedlora.nn import inject_lora, merge_lora
from fedlora.nn.batched import LayerStack, batched_layers, why_not_batched
from fedlora.nn.inject import lora_modules
from fedlora.nn.layers import LoraEmbedding, LoraLinear, LoraModule
from fedlora.training import Factor
from tests.matching import raises
from tests.nn.models import Many, Mlp, seeded
from tests.reference import batched_layer as twin

CPU = torch.device("cpu")
BOTH: frozenset[Factor] = frozenset({"A", "B"})
# Sums of at most 12 products of numbers of about 1, in float32 against float64.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


@dataclass(frozen=True)
class Case:
    """Sizes from 1 up; `scalings` of one number are the group's, else one a client."""

    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    rows: int  # of one client
    inner: tuple[int, ...]  # dimensions between rows and features
    size_in: int
    size_out: int
    bias: bool
    seed: int

    def layers(self) -> list[LoraLayer]:
        random = np.random.default_rng(self.seed)
        return [
            LoraLayer(
                random.normal(size=(rank, self.size_in)),
                random.normal(size=(self.size_out, rank)),
                self.scalings[k % len(self.scalings)],
            )
            for k, rank in enumerate(self.ranks)
        ]

    def tensor(self, *sizes: int) -> Tensor:
        torch.manual_seed(self.seed)
        return torch.randn(len(self.ranks) * self.rows, *self.inner, *sizes)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    few = st.integers(1, 4)
    ranks = tuple(draw(st.lists(few, min_size=1, max_size=5)))
    scalings = draw(st.sampled_from([(1.0,), (0.5,), (2.0, 0.25), (0.0, 1.5)]))
    inner = tuple(draw(st.lists(few, max_size=2)))
    size = st.integers(1, 7)
    return Case(ranks, scalings, draw(few), inner, draw(size), draw(size), draw(st.booleans()), 3)


def leaves(layers: list[LoraLayer]) -> list[twin.Client]:
    def leaf(array: Array) -> Tensor:
        return torch.tensor(array).double().requires_grad_()

    return [(leaf(layer.A), leaf(layer.B), layer.scaling) for layer in layers]


def linear_base(case: Case, kind: str) -> nn.Module:
    torch.manual_seed(case.seed)
    if kind == "conv1d":
        base: nn.Module = transformers.pytorch_utils.Conv1D(case.size_out, case.size_in)
        nn.init.normal_(base.weight)
    else:
        base = nn.Linear(case.size_in, case.size_out, bias=case.bias)
    return base.requires_grad_(False)


def check_gradients(stack: LayerStack, clients: list[twin.Client], layers: list[LoraLayer]) -> None:
    for k, ((A, B, _), layer) in enumerate(zip(clients, layers, strict=True)):
        got_A, got_B = stack.gradients["A"][k], stack.gradients["B"][k].T
        torch.testing.assert_close(got_A[: layer.rank].double(), A.grad, **CLOSE)
        torch.testing.assert_close(got_B[:, : layer.rank].double(), B.grad, **CLOSE)
        assert not got_A[layer.rank :].any()  # the padding of a smaller rank
        assert not got_B[:, layer.rank :].any()


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("wants_input", [True, False])
@given(case=cases())
@settings(max_examples=40, deadline=None)
def test_a_linear_layer_is_its_twin(kind: str, wants_input: bool, case: Case) -> None:
    base, layers, clients = linear_base(case, kind), case.layers(), leaves(case.layers())
    module = LoraLinear(base, layers[0], 0.0)
    stack = LayerStack(layers, BOTH, CPU)
    x = case.tensor(case.size_in).requires_grad_(wants_input)
    back = case.tensor(case.size_out)
    with batched_layers({"fc": module}, {"fc": stack}):
        y = module(x)
        y.backward(back)
    weight = base.weight.double()
    twin_x = x.detach().double().requires_grad_(wants_input)
    bias = None if base.bias is None else base.bias.double()
    expected = twin.linear(twin_x, weight.T if kind == "conv1d" else weight, bias, clients)
    expected.backward(back.double())
    torch.testing.assert_close(y.double(), expected, **CLOSE)
    check_gradients(stack, clients, layers)
    if wants_input:
        assert x.grad is not None
        torch.testing.assert_close(x.grad.double(), twin_x.grad, **CLOSE)


@pytest.mark.parametrize("padding", [None, 0])
@given(case=cases())
@settings(max_examples=40, deadline=None)
def test_an_embedding_is_its_twin(padding: int | None, case: Case) -> None:
    torch.manual_seed(0)
    base = nn.Embedding(case.size_in, case.size_out, padding_idx=padding).requires_grad_(False)
    layers = [LoraLayer(a.A, a.B, a.scaling, None, "embedding") for a in case.layers()]
    clients, module = leaves(layers), LoraEmbedding(base, layers[0], 0.0)
    stack = LayerStack(layers, BOTH, CPU)
    ids = case.tensor().abs().mul(100).long() % case.size_in
    back = case.tensor(case.size_out)
    with batched_layers({"e": module}, {"e": stack}):
        y = module(ids)
        y.backward(back)
    expected = twin.embedding(ids, base.weight.double(), clients, padding)
    expected.backward(back.double())
    torch.testing.assert_close(y.double(), expected, **CLOSE)
    check_gradients(stack, clients, layers)


CASE = Case((2, 3), (0.5, 2.0), 2, (4,), 5, 5, True, 0)


def test_a_scaled_embedding_scales_its_adapter_too() -> None:
    """Gemma multiplies after the look-up."""
    layer = LoraLayer(np.ones((1, 3)), np.ones((2, 1)), 0.5, None, "embedding")
    base = nn.Embedding.from_pretrained(torch.zeros(3, 2))
    base.embed_scale = torch.tensor(4.0)  # type: ignore[assignment]
    module = LoraEmbedding(base, layer, 0.0)
    with batched_layers({"e": module}, {"e": LayerStack([layer], BOTH, CPU)}):
        assert module(torch.tensor([[0, 2]])).tolist() == [[[2.0, 2.0], [2.0, 2.0]]]


@pytest.mark.parametrize("steps", [1, 2])
def test_a_layer_that_is_called_twice_adds_its_gradients(steps: int) -> None:
    base, layers, clients = linear_base(CASE, "linear"), CASE.layers(), leaves(CASE.layers())
    module, stack = LoraLinear(base, layers[0], 0.0), LayerStack(layers, BOTH, CPU)
    x = CASE.tensor(5)
    with batched_layers({"fc": module}, {"fc": stack}):
        for _ in range(steps):  # the next step's gradients replace these
            stack.next_step(2)
            module(module(x).tanh()).square().sum().backward()
    weight, bias = base.weight.double(), base.bias.double()
    inner = twin.linear(x.double(), weight, bias, clients).tanh()
    twin.linear(inner, weight, bias, clients).square().sum().backward()
    for k, (A, B, _) in enumerate(clients):
        rank = layers[k].rank
        # Sums of squares: compared with their own size.
        close = {"rtol": 0, "atol": 1e-5 * float(B.grad.abs().max())}
        np.testing.assert_allclose(stack.gradients["A"][k, :rank], A.grad, **close)
        np.testing.assert_allclose(stack.gradients["B"][k, :rank].T, B.grad, **close)


LAYOUTS: dict[str, Any] = {
    "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "expanded": lambda t: t[:, :1].expand(t.shape),
    "strided": lambda t: t.repeat(1, 2, 1)[:, ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts_of_inputs_and_gradients_do_not_matter(layout: str) -> None:
    case = Case((2, 3), (0.5,), 1, (4,), 5, 5, True, 0)
    base, layers = linear_base(case, "linear"), case.layers()
    x, back = (LAYOUTS[layout](t) for t in (case.tensor(5), case.tensor(5) + 1))
    found = []
    for a, b in ((x, back), (x.contiguous(), back.contiguous())):
        module, stack = LoraLinear(base, layers[0], 0.0), LayerStack(layers, BOTH, CPU)
        a = a.detach().requires_grad_()
        with batched_layers({"fc": module}, {"fc": stack}):
            y = module(a)
            (gradient,) = torch.autograd.grad(y, a, b)
        found.append([y, gradient, stack.gradients["A"].clone(), stack.gradients["B"].clone()])
    for odd, plain in zip(*found, strict=True):
        torch.testing.assert_close(odd, plain, **CLOSE)


@pytest.mark.parametrize("trained", ["A", "B"])
def test_only_trained_factors_get_gradients(trained: Factor) -> None:
    base, layers, clients = linear_base(CASE, "linear"), CASE.layers(), leaves(CASE.layers())
    module, stack = LoraLinear(base, layers[0], 0.0), LayerStack(layers, frozenset({trained}), CPU)
    x = CASE.tensor(5).requires_grad_()
    with batched_layers({"fc": module}, {"fc": stack}):
        module(x).backward(CASE.tensor(5))
    assert stack.trained == (trained,)
    assert set(stack.gradients) == {trained}
    twin_x = x.detach().double().requires_grad_()
    out = twin.linear(twin_x, base.weight.double(), base.bias.double(), clients)
    out.backward(CASE.tensor(5).double())
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), twin_x.grad, **CLOSE)
    for k, (A, B, _) in enumerate(clients):
        gradient, rank = stack.gradients[trained][k], layers[k].rank
        expected = A.grad if trained == "A" else B.grad.T
        torch.testing.assert_close(gradient[:rank].double(), expected, **CLOSE)


def test_clients_that_are_done_leave_the_stack() -> None:
    base, layers = linear_base(CASE, "linear"), CASE.layers()
    module, stack = LoraLinear(base, layers[0], 0.0), LayerStack(layers, BOTH, CPU)
    x = CASE.tensor(5)[:2]
    stack.next_step(1)
    with batched_layers({"fc": module}, {"fc": stack}):
        y = module(x)
    expected = twin.linear(x.double(), base.weight.double(), base.bias.double(), leaves(layers)[:1])
    torch.testing.assert_close(y.double(), expected, **CLOSE)
    assert stack.values["A"].shape[0] == stack.gradients["B"].shape[0] == 1


def test_a_stack_gives_every_clients_factors_back_bit_for_bit() -> None:
    stack = LayerStack(CASE.layers(), BOTH, CPU)
    for k, layer in enumerate(CASE.layers()):
        np.testing.assert_array_equal(stack.of_client(k, "A"), layer.A)
        np.testing.assert_array_equal(stack.of_client(k, "B"), layer.B)


@pytest.mark.parametrize("shape", [(3, 5), (1, 4, 5), ()])
def test_what_cannot_be_the_clients_rows_is_refused(shape: tuple[int, ...]) -> None:
    module = LoraLinear(linear_base(CASE, "linear"), CASE.layers()[0], 0.0)
    with (
        batched_layers({"a.fc": module}, {"a.fc": LayerStack(CASE.layers(), BOTH, CPU)}),
        raises(
            ConfigError,
            "layer 'a.fc': expected the rows of 2 clients in dimension 0, found shape "
            f"{shape}; train one client at a time",
        ),
    ):
        module(torch.zeros(shape))


def test_layers_of_another_shape_are_not_broadcast() -> None:
    layers = [LoraLayer(np.ones((2, 5)), np.ones((5, 2)), 1.0)]
    for A, B in (((2, 1), (5, 2)), ((2, 5), (1, 2))):
        other = LoraLayer(np.ones(A), np.ones(B), 1.0)
        with raises(ShapeMismatchError, "expected (5,) -> 5 as of the first client", "of client 1"):
            LayerStack([*layers, other], BOTH, CPU)


def test_a_model_has_its_own_layers_back_after_an_error() -> None:
    model = seeded(Mlp)
    inject_lora(model, LoraConfig(rank=2))
    x = torch.ones(2, 6)
    expected = model(x)
    modules = lora_modules(model)
    stacks = {path: LayerStack([module.layer()] * 2, BOTH, CPU) for path, module in modules.items()}
    with pytest.raises(ZeroDivisionError), batched_layers(modules, stacks):
        _ = 1 / 0
    assert not any("forward" in vars(module) for module in modules.values())
    assert torch.equal(model(x), expected)


def merged(model: nn.Module) -> None:
    merge_lora(model)


def limited(model: nn.Module) -> None:
    embedding = LoraEmbedding(
        nn.Embedding(3, 2, max_norm=1.0),
        LoraLayer(np.ones((1, 3)), np.ones((2, 1)), 1.0, None, "embedding"),
        0.0,
    )
    lora_modules(model)["first"] = embedding  # type: ignore[index]


WHY: dict[str, tuple[type[nn.Module], dict[str, Any], Any, str | None]] = {
    "linear": (Mlp, {}, None, None),
    "dora": (Mlp, {"variant": "dora"}, None, "layer 'first' has DoRA, whose norms"),
    "merged": (Mlp, {}, merged, "layer 'first' is merged into the base"),
    "convolution": (
        Many,
        {"target_modules": ("conv",)},
        None,
        "layer 'conv' is a conv, and only linear and embedding are batched",
    ),
    "max_norm": (Mlp, {}, limited, "layer 'first' is an embedding with max_norm"),
}


@pytest.mark.parametrize("case", WHY)
def test_layers_that_cannot_be_batched_say_why(case: str) -> None:
    kind, options, then, reason = WHY[case]
    model = seeded(kind)
    inject_lora(model, LoraConfig(rank=2, **options))
    if then is not None:
        then(model)
    modules: dict[str, LoraModule] = dict(lora_modules(model))
    found = why_not_batched(modules)
    assert (found is None) if reason is None else (found or "").startswith(reason)
