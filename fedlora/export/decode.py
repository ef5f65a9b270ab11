"""The graph that writes: the next token's logits, with the keys and values of what came before."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.errors import UnsupportedError
from fedlora.export.capture import capture
from fedlora.export.layers import set_factors, with_factors
from fedlora.export.plain import additive, plain_forms
from fedlora.export.trace import BATCH, PAST, TIME, Subject, by_path, factor_inputs
from fedlora.export.traced import Traced
from fedlora.nn.llama import Llama

__all__ = ["decode_graph"]

Cache = list[tuple[Tensor, Tensor]]  # keys and values (batch, heads, past, size) of each layer


def decode_graph(subject: Subject) -> Traced:
    """Trace the next tokens (batch, time) and a cache, which may be empty, to the last logits.

    Rows have no padding: all of a batch have the same number of tokens. Raises `UnsupportedError`
    for a model without a cache that is known here.
    """
    model, factors = subject.model, factor_inputs(subject)
    if subject.task != "next-token":
        raise UnsupportedError(
            f"export: expected a language model for a decode graph, found {type(model).__name__} "
            f"for {subject.task}; leave --decode out"
        )
    sizes = _cache_sizes(model)
    examples = {"inputs": torch.ones((BATCH, TIME), dtype=torch.int64)}
    axes = {"inputs": {0: "batch", 1: "time"}}
    outputs = ["logits"]
    for i, (heads, size) in enumerate(sizes):
        for part in ("key", "value"):
            examples[f"past_key_values.{i}.{part}"] = torch.zeros((BATCH, heads, PAST, size))
            axes[f"past_key_values.{i}.{part}"] = {0: "batch", 2: "past"}
            outputs.append(f"present.{i}.{part}")
    count = 2 * len(sizes)
    step = _step_llama if isinstance(model, Llama) else _step_transformers
    with with_factors(model, subject.layers) as wrappers, plain_forms(model):

        @torch.no_grad()
        def function(inputs: Tensor, *values: Tensor) -> list[Tensor]:
            set_factors(wrappers, [by_path(subject, values[count:])])
            past = list(zip(values[:count:2], values[1:count:2], strict=True))
            logits, present = step(model, inputs, past)
            return [logits, *(tensor for pair in present for tensor in pair)]

        return capture(
            function,
            model,
            subject.names,
            examples | dict(factors.examples),
            axes | dict(factors.axes),
            outputs,
            factors.defaults,
        )


def _step_llama(model: Any, inputs: Tensor, past: Cache) -> tuple[Tensor, Cache]:
    logits, present = model.step(inputs, past)
    return logits, present


def _step_transformers(model: Any, inputs: Tensor, past: Cache) -> tuple[Tensor, Cache]:
    rows, time = inputs.shape
    before = past[0][0].shape[2]
    # Mask and positions are given, since transformers would look at numbers to make them.
    places = torch.arange(before, before + time, device=inputs.device)
    visible = torch.arange(before + time, device=inputs.device)[None, :] <= places[:, None]
    visible = visible[None, None].expand(rows, 1, time, before + time)
    cache = _cache_of(past)
    found = model(
        inputs,
        attention_mask=additive(visible),
        position_ids=places[None, :],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return found.logits[:, -1], [(layer.keys, layer.values) for layer in cache.layers]


def _cache_of(past: Sequence[tuple[Tensor, Tensor]]) -> Any:
    from transformers.cache_utils import DynamicCache, DynamicLayer

    kind: Any = DynamicLayer
    cache = DynamicCache()
    for keys, values in past:
        layer = kind()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def _cache_sizes(model: nn.Module) -> list[tuple[int, int]]:
    """Return (heads, size) of each layer's keys and values."""
    if isinstance(model, Llama):
        config = model.config
        return [(config.num_key_value_heads, config.head_size)] * config.num_hidden_layers
    arguments = inspect.signature(type(model).forward).parameters
    wanted = {"past_key_values", "position_ids", "attention_mask", "logits_to_keep"}
    if not wanted <= arguments.keys():
        raise UnsupportedError(
            f"export: {type(model).__name__} takes no cache of keys and values that is known here "
            "(past_key_values of transformers); leave --decode out"
        )
    ids = torch.ones((1, 2), dtype=torch.int64, device=next(model.parameters()).device)
    with torch.no_grad():
        found: Any = model(ids, use_cache=True).past_key_values
    layers = getattr(found, "layers", [])
    if not layers or any(type(layer).__name__ != "DynamicLayer" for layer in layers):
        raise UnsupportedError(
            f"export: expected {type(model).__name__} to keep the keys and values of all positions "
            f"of each layer, found {type(found).__name__}; leave --decode out"
        )
    return [(layer.keys.shape[1], layer.keys.shape[3]) for layer in layers]
