"""Small traces to emit from, and ONNX Runtime to run what came out; the product has its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedlora.adapter import LoraConfig
from fedlora.export.emit import emit
from fedlora.export.traced import Traced
from fedlora.export.weights import BaseWeights
from fedlora.nn.inject import inject_lora, lora_modules

TRACED_RANK = 11  # no other axis of the models here has it
Arrays = dict[str, npt.NDArray[Any]]


@cache  # torch takes longer to make it than most traces here
def _table() -> dict[Any, Callable[..., Any]]:
    return dict(torch._decomp.core_aten_decompositions())


def decompositions() -> dict[Any, Callable[..., Any]]:
    """torch's decompositions to core aten, as a dict of its own."""
    return dict(_table())


def with_lora(model: nn.Module, targets: Any, rank: int = TRACED_RANK, seed: int = 0) -> nn.Module:
    """Put LoRA with a B that is not zero on a model, without scaling."""
    inject_lora(model, LoraConfig(rank=rank, lora_alpha=rank, target_modules=targets))
    generator = torch.Generator().manual_seed(seed)
    for module in lora_modules(model).values():
        module.lora_B.data.normal_(0, 0.1, generator=generator)
    return model.eval()


def factors(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}


def input_name(parameter: str) -> str:
    return f"{parameter}.weight"


def drawn_factors(model: nn.Module, rank: int, seed: int = 1) -> Arrays:
    """Factors of another rank for all layers, by input name."""
    random = np.random.default_rng(seed)
    drawn = {}
    for name, factor in factors(model).items():
        shape = list(factor.shape)
        shape[0 if name.endswith("lora_A") else 1] = rank
        scale = 1 / np.sqrt(np.prod(shape[1:])) if name.endswith("lora_A") else 0.1
        drawn[input_name(name)] = (random.standard_normal(shape) * scale).astype(np.float32)
    return drawn


def logits_of(model: nn.Module, values: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        out = torch.func.functional_call(model, dict(values), (inputs,))
    return out if isinstance(out, Tensor) else out.logits


def step_of(
    model: nn.Module,
    names: Sequence[str],
    inputs: Tensor,
    targets: Tensor,
    values: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """The mean loss over counted targets and the factors' gradients."""
    leaves = [value.detach().requires_grad_() for value in values]
    with torch.enable_grad():
        logits = logits_of(model, dict(zip(names, leaves, strict=True)), inputs)
        loss = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())
    return (loss, *torch.autograd.grad(loss, leaves))


def traced_forward(
    model: nn.Module, inputs: Tensor, free: Mapping[int, str], *, symbolic: bool = True
) -> Traced:
    names = list(factors(model))
    values = [factor.detach().clone() for factor in factors(model).values()]

    def forward(x: Tensor, *given: Tensor) -> tuple[Tensor]:
        with torch.no_grad():
            return (logits_of(model, dict(zip(names, given, strict=True)), x),)

    module = make_fx(
        forward,
        decomposition_table=decompositions(),
        tracing_mode="symbolic" if symbolic else "real",
        _allow_non_fake_inputs=True,
    )(inputs, *values)
    return _traced(model, module, {"inputs": inputs}, ("logits",), {"inputs": free})


def traced_step(model: nn.Module, inputs: Tensor, targets: Tensor) -> Traced:
    names = list(factors(model))
    values = [factor.detach().clone() for factor in factors(model).values()]

    def step(x: Tensor, y: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        return step_of(model, names, x, y, given)

    module = make_fx(step, decomposition_table=decompositions())(inputs, targets, *values)
    outputs = ("loss", *(f"{name}.grad" for name in names))
    return _traced(model, module, {"inputs": inputs, "targets": targets}, outputs, {})


def _traced(
    model: nn.Module,
    module: fx.GraphModule,
    data: Mapping[str, Tensor],
    outputs: tuple[str, ...],
    axes: Mapping[str, Mapping[int, str]],
) -> Traced:
    by_pointer = {
        (parameter.data_ptr(), parameter.shape): name for name, parameter in base(model).items()
    }
    weights = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value = getattr(module, node.target)
            place = (value.data_ptr(), value.shape)
            if place in by_pointer:
                weights[node.target] = by_pointer[place]
    found = factors(model)
    examples = {input_name(name): factor.detach() for name, factor in found.items()}
    ranks = {input_name(name): {0 if name.endswith("lora_A") else 1: "rank"} for name in found}
    defaults = {}
    for name, factor in found.items():
        shape = list(factor.shape)
        shape[0 if name.endswith("lora_A") else 1] = 1
        defaults[input_name(name)] = torch.zeros(shape)
    return Traced(
        module=module,
        inputs=(*data, *examples),
        outputs=outputs,
        weights=weights,
        examples={**data, **examples},
        axes={**axes, **ranks},
        defaults=defaults,
    )


def base(model: nn.Module) -> dict[str, Tensor]:
    """The frozen tensors by their names without LoRA."""
    tensors = model.state_dict(keep_vars=True)
    return {
        name.replace(".base_layer.", "."): tensor.detach()
        for name, tensor in tensors.items()
        if ".lora_" not in name and tensor.is_floating_point()
    }


def base_weights(model: nn.Module) -> BaseWeights:
    return BaseWeights({name: tensor.numpy() for name, tensor in base(model).items()})


def emitted(model: nn.Module, traced: Traced, folder: Path, **options: Any) -> Path:
    """Emit and write a model with its weights; return the model's file."""
    weights = base_weights(model)
    proto = emit(traced, weights, **options)
    folder.mkdir(parents=True, exist_ok=True)
    weights.write(folder)
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString(deterministic=True))
    onnx.checker.check_model(path)
    return path


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # one warning for every optional input
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def emitted_function(
    function: Callable[..., Any], *arguments: Tensor, folder: Path, symbolic: bool = False
) -> Callable[..., list[npt.NDArray[Any]]]:
    """Trace and emit a plain function; return one that runs it in ONNX Runtime."""

    def flat(*given: Tensor) -> tuple[Tensor, ...]:
        result = function(*given)
        return result if isinstance(result, tuple) else (result,)

    mode = "symbolic" if symbolic else "real"
    module = make_fx(flat, decomposition_table=decompositions(), tracing_mode=mode)(*arguments)
    names = tuple(f"x{place}" for place in range(len(arguments)))
    axes = {
        name: {axis: f"{name}_{axis}" for axis in range(argument.ndim)}
        for name, argument in zip(names, arguments, strict=True)
    }
    outputs = tuple(f"y{place}" for place in range(len(flat(*arguments))))
    traced = Traced(
        module, names, outputs, {}, dict(zip(names, arguments, strict=True)),
        axes if symbolic else {},
    )  # fmt: skip
    proto = emit(traced, BaseWeights({}))
    onnx.checker.check_model(proto)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "function.onnx"
    path.write_bytes(proto.SerializeToString(deterministic=True))
    running = session(path)

    def run(*given: Tensor) -> list[npt.NDArray[Any]]:
        feed = {name: value.numpy() for name, value in zip(names, given, strict=True)}
        return running.run(None, feed)

    return run
