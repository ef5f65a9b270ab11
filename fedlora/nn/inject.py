"""Put LoRA on a model, take the adapter out, put one in, and leave the base as it was.

Injection replaces each chosen module by a wrapper that keeps it as `base_layer`, wherever in the
model the module is used. The base is frozen and never written to; `merge_lora` swaps in new weight
tensors and keeps the old ones, so that `unmerge_lora` and `remove_lora` give it back bit for bit.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.adapter import Adapter, LoraConfig, LoraLayer
from fedlora.errors import (
    BaseMismatchError,
    ConfigError,
    LayerMismatchError,
    NonFiniteError,
    ShapeMismatchError,
    UnsupportedError,
)
from fedlora.nn.kept import HalfWeights, KeptActivations, SummedWeights
from fedlora.nn.layers import LoraModule, spec_of, wrap
from fedlora.targets import LayerSpec, initial_A, select_targets

__all__ = [
    "base_fingerprint",
    "extract_adapter",
    "findings_of",
    "frozen_linears",
    "half_weights",
    "inject_lora",
    "keeping_adapter",
    "kept_activations",
    "layer_specs",
    "load_adapter_into",
    "lora_modules",
    "merge_lora",
    "remove_lora",
    "replace_frozen",
    "require_fitting",
    "summed_weights",
    "unmerge_lora",
]

STATE = "_fedlora_injection"  # the attribute of an injected model that holds its `_Injection`
QUANTIZED = "_fedlora_quantized"  # the attribute that holds the fingerprint of weights now gone
OUTPUT_NAMES = ("lm_head", "classifier", "head", "score")


@dataclass
class _Injection:
    """What an injected model remembers, so that everything can be undone."""

    config: LoraConfig
    base: str
    layers: dict[str, LoraModule]
    required_grad: list[tuple[nn.Parameter, bool]]
    fast_paths: list[tuple[nn.Module, Any]] = field(default_factory=list)
    originals: dict[str, Tensor] | None = None  # weights of the base while merged
    findings: dict[Any, Any] = field(default_factory=dict)  # see `findings_of`
    kept: KeptActivations = field(default_factory=KeptActivations)
    halves: HalfWeights = field(default_factory=HalfWeights)
    sums: SummedWeights = field(default_factory=SummedWeights)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Injection:
        """Let an injected model be deep-copied: the config and what is derived are shared."""
        parts = (self.layers, self.required_grad, self.fast_paths, self.originals)
        copied = copy.deepcopy(parts, memo)
        shared = (self.findings, self.kept, self.halves, self.sums)
        return _Injection(self.config, self.base, *copied, *shared)


def inject_lora(
    model: nn.Module, config: LoraConfig, seed: int = 0, base: str | None = None
) -> None:
    """Freeze `model` and put trainable LoRA on the layers that `config` chooses, in place.

    A is drawn from (seed, layer) as on a server without torch, B is zero, DoRA's magnitude is the
    norms of the base's weights: the outputs stay what they were. `base` is the model's
    `base_fingerprint` where that is already known (hashing takes about a second for 500 MB).

    Raises `ConfigError` when the model has LoRA already or `config` fits none of its layers, and
    `UnsupportedError` for a layer that cannot carry it.
    """
    if hasattr(model, STATE):
        raise ConfigError(
            f"{_name(model)} has LoRA already: call remove_lora first, or load_adapter_into to "
            "continue from another adapter"
        )
    modules = dict(_base_modules(model))
    paths = _chosen(model, modules, config)
    base = base if base is not None else base_fingerprint(model)
    layers = {
        path: wrap(
            path,
            modules[path],
            initial_A(path, config.rank_of(path), _spec(modules[path]).in_shape, seed),
            config.scaling_of(path),
            dora=config.uses_dora,
            dropout=config.lora_dropout,
        )
        for path in paths
    }
    injection = _Injection(config, base, layers, [])
    for parameter in model.parameters():
        injection.required_grad.append((parameter, parameter.requires_grad))
        parameter.requires_grad_(False)
    _replace(model, {layer.base_layer: layer for layer in layers.values()})
    for layer in layers.values():
        for factor in (layer.lora_A, layer.lora_B, layer.magnitude):
            if factor is not None:
                factor.requires_grad_(True)
    for module in modules.values():
        # In evaluation torch's own encoder layer reads its children's weights past their forward.
        if isinstance(module, nn.TransformerEncoderLayer):
            injection.fast_paths.append((module, module.activation_relu_or_gelu))
            module.activation_relu_or_gelu = 0
    setattr(model, STATE, injection)


def extract_adapter(model: nn.Module) -> Adapter:
    """Return a copy of the adapter that `model` carries, float32, bound to its base's fingerprint.

    Raises `NonFiniteError`, which names the layer, when training has left NaN or infinity.
    """
    injection = _injection(model)
    layers = {path: _layer(path, module) for path, module in injection.layers.items()}
    return Adapter(layers, injection.config, injection.base)


def load_adapter_into(model: nn.Module, adapter: Adapter) -> None:
    """Put an adapter's factors, scalings, ranks and dropout into an injected model, in place.

    The layers must be the injected ones; ranks may differ from them. Raises `LayerMismatchError`,
    `ShapeMismatchError`, `BaseMismatchError` when the adapter names another base, and
    `UnsupportedError` when one of the two is DoRA and the other is not.
    """
    injection = _injection(model)
    _require_unmerged(injection, "load_adapter_into")
    require_fitting(model, adapter, "load_adapter_into")
    for path, module in injection.layers.items():
        module.set_layer(adapter[path], adapter.config.lora_dropout)
    injection.config = adapter.config


def require_fitting(model: nn.Module, adapter: Adapter, who: str) -> None:
    """Raise what `load_adapter_into` raises of an adapter; `who` opens the text."""
    injection = _injection(model)
    if adapter.base is not None and adapter.base != injection.base:
        raise BaseMismatchError(
            f"{who}: the adapter was made for base {adapter.base[:12]}, this model is "
            f"{injection.base[:12]}; load it on its own base"
        )
    if adapter.config.uses_dora != injection.config.uses_dora:
        raise UnsupportedError(
            f"{who}: the adapter's variant is {adapter.config.variant!r}, the model "
            f"was injected with {injection.config.variant!r}; inject it with the adapter's config"
        )
    _require_same_layers(injection.layers, adapter, who)


@contextmanager
def keeping_adapter(model: nn.Module) -> Iterator[None]:
    """Give the model its adapter back after this block: the same parameters with their gradients.

    Inside, the model has copies of them to load and train.
    """
    injection = _injection(model)
    kept = [
        (module, dict(module._parameters), module.scaling, module.dropout)
        for module in injection.layers.values()
    ]
    config = injection.config
    try:
        for module, factors, *_ in kept:
            for name, factor in factors.items():
                if factor is not None:
                    copied = nn.Parameter(factor.detach().clone(), factor.requires_grad)
                    module._parameters[name] = copied
        yield
    finally:
        for module, factors, scaling, dropout in kept:
            module._parameters.update(factors)
            module.scaling, module.dropout = scaling, dropout
        injection.config = config


def remove_lora(model: nn.Module) -> None:
    """Take LoRA off again: modules, weights and `requires_grad` flags are what they were."""
    injection = _injection(model)
    if injection.originals is not None:
        unmerge_lora(model)
    _replace(model, {layer: layer.base_layer for layer in injection.layers.values()})
    for parameter, flag in injection.required_grad:
        parameter.requires_grad_(flag)
    for module, activation in injection.fast_paths:
        module.activation_relu_or_gelu = activation
    delattr(model, STATE)


def merge_lora(model: nn.Module) -> None:
    """Put the adapter into the base's weights until `unmerge_lora`; outputs agree within 1e-5.

    Nothing is changed when it raises: `UnsupportedError` for a weight that is tied to another
    module's, which would change too, and for a quantized base; `NonFiniteError` for a merged weight
    that is not finite.
    """
    injection = _injection(model)
    _require_unmerged(injection, "merge_lora")
    if hasattr(model, QUANTIZED):
        raise UnsupportedError(
            "merge_lora: the base is quantized, and the sum would have to be rounded again; merge "
            "the adapter into the full base"
        )
    tied = _tied_paths(model)
    merged = {}
    for path, module in injection.layers.items():
        others = tied.get(id(module.base_layer.weight), [path])
        if len(others) > 1:
            raise UnsupportedError(
                f"merge_lora, layer {path!r}: its weight is tied to that of "
                f"{', '.join(repr(other) for other in others if other != path)}, which would "
                "change too; serve the adapter unmerged, or untie the weights"
            )
        merged[path] = module.merged_weight()
        if not torch.isfinite(merged[path]).all():
            raise NonFiniteError(
                f"merge_lora, layer {path!r}: the merged {merged[path].dtype} weight is not finite"
            )
    injection.originals = {}
    for path, module in injection.layers.items():
        injection.originals[path] = module.base_layer.weight.data
        module.base_layer.weight.data = merged[path]
        module.merged = True


def unmerge_lora(model: nn.Module) -> None:
    """Give the base its own weights back, bit for bit. Raises `ConfigError` if not merged."""
    injection = _injection(model)
    if injection.originals is None:
        raise ConfigError(f"{_name(model)} is not merged: call merge_lora first")
    for path, module in injection.layers.items():
        module.base_layer.weight.data = injection.originals[path]
        module.merged = False
    injection.originals = None


def layer_specs(model: nn.Module) -> dict[str, LayerSpec]:
    """Describe every layer that can carry LoRA, by its path in the model without LoRA.

    A module that is used at two paths is listed once, at the first. `is_output` is the module at
    `model.output_path` if the model defines that; else what `model.get_output_embeddings()`
    returns; else every module called lm_head, classifier, head or score.
    """
    modules = dict(_base_modules(model))
    outputs, refused = _output_paths(model, modules), _refused(modules)
    return {
        path: replace(spec, is_output=path in outputs)
        for path, module in modules.items()
        if path and path not in refused and (spec := spec_of(module)) is not None
    }


def base_fingerprint(model: nn.Module) -> str:
    """SHA-256, in hex, over the base's parameters and persistent buffers, LoRA left out.

    For each, sorted by name: name, dtype and shape as text, then its bytes in memory order. Names
    are those without LoRA; tied parameters count once, under the first name. The same before,
    during (merged too) and after injection, and when the base is quantized (see `quantize_base`).
    """
    if (before := getattr(model, QUANTIZED, None)) is not None:
        return str(before)
    injection: _Injection | None = getattr(model, STATE, None)
    originals = (injection.originals if injection else None) or {}
    tensors: dict[str, Tensor] = {}
    for path, module in _base_modules(model):
        own: dict[str, Tensor | None] = dict(module._parameters)
        own |= {
            name: buffer
            for name, buffer in module._buffers.items()
            if name not in module._non_persistent_buffers_set
        }
        for name, tensor in own.items():
            if tensor is not None:
                tensors[f"{path}.{name}" if path else name] = tensor
    digest, seen = hashlib.sha256(), set()
    for name, tensor in sorted(tensors.items()):
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        path, _, last = name.rpartition(".")
        value = originals[path] if last == "weight" and path in originals else tensor
        dtype = str(value.dtype).removeprefix("torch.")
        digest.update(f"{name}\n{dtype}\n{tuple(value.shape)}\n".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def lora_modules(model: nn.Module) -> Mapping[str, LoraModule]:
    """Return the wrappers of an injected model by the paths of what they wrap."""
    return _injection(model).layers


def findings_of(model: nn.Module) -> dict[Any, Any]:
    """Return what is remembered of an injected model until `remove_lora`; its copies share it."""
    return _injection(model).findings


def frozen_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers of the base, under LoRA too, by path.

    Those of the output, and those whose weight another module shares, are left out. Raises
    `ConfigError` while an adapter is merged into them.
    """
    injection: _Injection | None = getattr(model, STATE, None)
    if injection is not None:
        _require_unmerged(injection, "frozen_linears")
    modules, tied = dict(_base_modules(model)), _tied_paths(model)
    return {
        path: modules[path]
        for path, spec in layer_specs(model).items()
        if spec.kind == "linear"
        and not spec.is_output
        and len(tied.get(id(modules[path].weight), ())) == 1
    }


def replace_frozen(model: nn.Module, by: Mapping[nn.Module, nn.Module]) -> None:
    """Exchange modules of the base wherever they are, under LoRA too; the old ones are let go."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is None or child not in by:
                continue
            if isinstance(parent, LoraModule):
                parent.set_base(by[child])
            else:
                parent._modules[name] = by[child]
    injection: _Injection | None = getattr(model, STATE, None)
    if injection is not None:
        left = {id(parameter) for parameter in model.parameters()}
        injection.required_grad = [pair for pair in injection.required_grad if id(pair[0]) in left]


def half_weights(model: nn.Module) -> HalfWeights:
    """Return the bfloat16 weights of an injected model; copies of the model share them."""
    return _injection(model).halves


def kept_activations(model: nn.Module) -> KeptActivations:
    """Return what is kept of an injected model's frozen part; copies of the model share it."""
    return _injection(model).kept


def summed_weights(model: nn.Module) -> SummedWeights:
    """Return an injected model's weights with a frozen adapter in them; its copies share them."""
    return _injection(model).sums


def _injection(model: nn.Module) -> _Injection:
    injection: _Injection | None = getattr(model, STATE, None)
    if injection is None:
        raise ConfigError(f"{_name(model)} has no LoRA: call inject_lora first")
    return injection


def _base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, by its first path, as if LoRA were not there."""
    seen: set[int] = set()

    def visit(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        if isinstance(module, LoraModule):
            module = module.base_layer
        if id(module) in seen:
            return
        seen.add(id(module))
        yield path, module
        for name, child in module._modules.items():
            if child is not None:
                yield from visit(child, f"{path}.{name}" if path else name)

    yield from visit(model, "")


def _chosen(
    model: nn.Module, modules: Mapping[str, nn.Module], config: LoraConfig
) -> tuple[str, ...]:
    """Paths that `config` selects. Refuses those that it names but that cannot carry LoRA."""
    specs = layer_specs(model)
    if config.target_modules == "all-linear":
        return select_targets(specs, config)
    reasons = _refused(modules)
    # A refused module takes part in the selection, so that naming it is an error and not a silence.
    known = specs | {path: LayerSpec("linear", (1,), 1) for path in reasons}
    paths = select_targets(known, config)
    for path in paths:
        if path in reasons:
            raise UnsupportedError(
                f"layer {path!r}: {reasons[path]}; leave it out of target_modules"
            )
    return paths


def _refused(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Paths of modules that look like layers, but cannot carry LoRA, with the reason."""
    reasons = {}
    for path, module in modules.items():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups > 1:
            reasons[path] = f"a convolution in {module.groups} groups cannot carry LoRA"
        elif isinstance(module, nn.MultiheadAttention):
            reasons[path] = (
                "torch's attention cannot carry LoRA, since it keeps q, k, v in one weight"
            )
            if isinstance(module.out_proj, nn.Linear):
                reasons[f"{path}.out_proj"] = (
                    "torch's attention reads this weight past the module's forward, so that LoRA "
                    "would have no effect"
                )
        elif isinstance(module, nn.modules.conv._ConvTransposeNd | nn.Bilinear | nn.EmbeddingBag):
            reasons[path] = f"{type(module).__name__} cannot carry LoRA"
    return reasons


def _output_paths(model: nn.Module, modules: Mapping[str, nn.Module]) -> set[str]:
    named = getattr(model, "output_path", None)
    if isinstance(named, str):
        if named not in modules:
            raise ConfigError(
                f"{_name(model)}.output_path: expected the path of a module, found {named!r}"
            )
        return {named}
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    if output is not None:
        output = output.base_layer if isinstance(output, LoraModule) else output
        return {path for path, module in modules.items() if module is output}
    return {path for path in modules if path.rpartition(".")[2] in OUTPUT_NAMES}


def _replace(model: nn.Module, by: Mapping[nn.Module, nn.Module]) -> None:
    """Exchange modules wherever a parent in `model` holds them."""
    for parent in list(model.modules()):
        if isinstance(parent, LoraModule):
            continue
        for name, child in parent._modules.items():
            if child is not None and child in by:
                parent._modules[name] = by[child]


def _require_same_layers(layers: Mapping[str, LoraModule], adapter: Adapter, who: str) -> None:
    missing, extra = layers.keys() - adapter.layers.keys(), adapter.layers.keys() - layers.keys()
    if missing or extra:
        parts = [
            f"{len(paths)} {word} ({', '.join(sorted(paths)[:3])}{', …' if len(paths) > 3 else ''})"
            for word, paths in (("missing", missing), ("unexpected", extra))
            if paths
        ]
        raise LayerMismatchError(
            f"{who}: expected the {len(layers)} layers that the model was injected "
            f"with, found {' and '.join(parts)}; inject it with the adapter's target_modules"
        )
    for path, module in layers.items():
        layer, A, B = adapter[path], module.lora_A.shape, module.lora_B.shape
        if (layer.kind, layer.A.shape[1:], len(layer.B)) != (module.kind, A[1:], B[0]):
            raise ShapeMismatchError(
                f"{who}, layer {path!r}: expected {module.kind} {tuple(A[1:])} -> "
                f"{B[0]}, found {layer.kind} {layer.in_shape} -> "
                f"{layer.out_features}; the adapter is of another base"
            )


def _require_unmerged(injection: _Injection, what: str) -> None:
    if injection.originals is not None:
        raise ConfigError(f"{what}: the adapter is merged into the base; call unmerge_lora first")


def _tied_paths(model: nn.Module) -> dict[int, list[str]]:
    """By the id of each parameter, the paths of the modules that hold it."""
    holders: dict[int, list[str]] = {}
    for path, module in _base_modules(model):
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(path)
    return holders


def _layer(path: str, module: LoraModule) -> LoraLayer:
    try:
        return module.layer()
    except NonFiniteError as error:
        raise NonFiniteError(
            f"layer {path!r}, {error}; lower learning_rate or set max_grad_norm"
        ) from None


def _spec(module: nn.Module) -> LayerSpec:
    spec = spec_of(module)
    if spec is None:  # cannot be: only modules with a spec are chosen
        raise UnsupportedError(f"{type(module).__name__} cannot carry LoRA")
    return spec


def _name(model: nn.Module) -> str:
    return type(model).__name__
