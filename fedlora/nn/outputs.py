"""What a model says at the positions that count: its logits, or the nats of its targets.

The head of a language model is by far its largest product, and few positions need it. So where a
model can be divided there, the head reads the hidden states of the counted positions alone.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.nn.cross_entropy import head_cross_entropy
from fedlora.nn.layers import LoraModule, is_bare_linear
from fedlora.nn.rows import arguments_of, packed, packs_texts

__all__ = ["counted_logits", "hidden_and_head", "logits_at", "logits_of", "nats_at"]


def logits_of(model: nn.Module, inputs: Tensor, *, masked: bool) -> Tensor:
    """Call the model on a batch's inputs; masked: give it a mask over the padding if it takes one.

    Return logits (rows, ..., classes) float32.
    """
    out = model(inputs, **_options(model, inputs, masked))
    logits: Tensor = out if isinstance(out, Tensor) else out.logits
    return logits.float()


def logits_at(model: nn.Module, inputs: Tensor, counted: Tensor) -> Tensor:
    """Logits (n, vocabulary) at the n counted positions of the flattened batch.

    Half of a batch of short texts is padding: where texts can share a row (`segments`), none of it
    is computed.
    """
    rows: dict[str, Tensor] = {}
    if packs_texts(model):
        inputs, counted, rows = packed(inputs, counted)
    return counted_logits(model, inputs, counted, rows)


def nats_at(
    model: nn.Module, inputs: Tensor, counted: Tensor, wanted: Tensor, rows: dict[str, Tensor]
) -> Tensor:
    """Nats (n,) of the targets (n,) at the counted positions of the flattened batch."""
    split = hidden_and_head(model, inputs, rows)
    if split is None:
        logits = _at(logits_of(model, inputs, masked=False), counted)
        return F.cross_entropy(logits, wanted, reduction="none")
    hidden, head = split
    if is_bare_linear(head) and not any(p.requires_grad for p in head.parameters()):
        states = _at(hidden, counted)
        return head_cross_entropy(states, head, wanted)  # type: ignore[arg-type]  # an nn.Linear
    return F.cross_entropy(_head_logits(hidden, head, counted), wanted, reduction="none")


def counted_logits(
    model: nn.Module, inputs: Tensor, counted: Tensor, rows: dict[str, Tensor]
) -> Tensor:
    """Logits (n, vocabulary) at the counted positions of rows; `rows`: of `client_rows`."""
    split = hidden_and_head(model, inputs, rows)
    if split is None:
        # Padding is on the right, where a causal model does not look: no mask.
        return _at(logits_of(model, inputs, masked=False), counted)
    return _head_logits(*split, counted)


def hidden_and_head(
    model: nn.Module, inputs: Tensor, rows: dict[str, Tensor]
) -> tuple[Tensor, nn.Module] | None:
    """Hidden states (rows, time, features), and the head that would read them.

    The head is by far the largest product of a small language model, and few positions need it.
    None where a model cannot be divided there: it has neither `hidden_only` nor what transformers'
    causal models have in public, a body at `base_model_prefix` and `get_output_embeddings`.
    """
    if "hidden_only" in arguments_of(model):
        return model(inputs, hidden_only=True, **rows), model.lm_head  # type: ignore[return-value]
    if not _is_divided(model, inputs):
        return None
    body, head = _body_and_head(model)
    return body(inputs, **_options(body, inputs, masked=False)).last_hidden_state, head


def _head_logits(hidden: Tensor, head: nn.Module, counted: Tensor) -> Tensor:
    """Logits at the counted positions of hidden states (rows, time, features)."""
    logits: Tensor
    if isinstance(head, LoraModule):
        # Clients have different numbers of counted targets: their rows are equal only in whole.
        logits = _at(head(hidden), counted)
    else:
        logits = head(_at(hidden, counted))
    return logits.float()


def _at(values: Tensor, counted: Tensor) -> Tensor:
    """(rows, time, n) at the counted positions; as it is, without a copy, where all are."""
    flat = values.flatten(0, 1)
    return flat if bool(counted.all()) else flat[counted]


def _body_and_head(model: nn.Module) -> tuple[Any, Any]:
    get_head = getattr(model, "get_output_embeddings", None)
    prefix = getattr(model, "base_model_prefix", "")
    body = getattr(model, prefix, None) if prefix else None
    return body, get_head() if callable(get_head) else None


_DIVIDED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@torch.no_grad()
def _is_divided(model: nn.Module, inputs: Tensor) -> bool:
    """Whether the model is its body and then its head, and nothing between, before or after.

    Some models scale or bend the head's logits, so this is tried once, on one position a row: the
    logits have to be equal, bit for bit, since the same operations would have made them.
    """
    known = _DIVIDED.get(model)
    if known is None:
        body, head = _body_and_head(model)
        known = isinstance(body, nn.Module) and isinstance(head, nn.Module)
        if known:
            first = inputs[:, :1]
            options = _options(model, first, masked=False)
            hidden = body(first, **_options(body, first, masked=False))
            logits, found = model(first, **options), getattr(hidden, "last_hidden_state", None)
            whole = getattr(logits, "logits", None)
            known = found is not None and whole is not None and torch.equal(head(found), whole)
        _DIVIDED[model] = known
    return known


def _options(model: nn.Module, inputs: Tensor, masked: bool) -> dict[str, Any]:
    """Arguments that transformers' models want: no cache, and a mask over the padding.

    Batches are padded with 0, so only a model whose padding is 0 can be given a mask.
    """
    arguments = arguments_of(model)
    options: dict[str, Any] = {}
    if "use_cache" in arguments:
        options["use_cache"] = False
    if masked and "attention_mask" in arguments:
        config = getattr(model, "config", None)
        if getattr(config, "pad_token_id", None) == 0 and not inputs.is_floating_point():
            options["attention_mask"] = (inputs != 0).long()
    return options
