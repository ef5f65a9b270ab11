"""Gradient checkpointing (arXiv:1604.06174): less memory for activations, a second forward pass.

Each block of a model (a decoder or encoder layer) keeps its input only, and is computed once more
when the backward pass gets to it. The results are the same bits, LoRA's dropout included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fedlora.errors import ConfigError
from fedlora.nn.llama import LlamaLayer

__all__ = ["checkpoint_blocks"]


def checkpoint_blocks(model: nn.Module) -> int:
    """Make each block of `model` keep its input only, from now on; return how many blocks.

    Blocks are those that Hugging Face's transformers checkpoints, and those of fedlora's `Llama`.
    transformers does it for blocks in training mode only, and a frozen base stays in evaluation
    mode; setting the mode of the block alone would switch on the dropout that some blocks apply
    themselves. So the block's `forward` is replaced on the instance. A deep copy of the model is
    checkpointed as well. Raises `ConfigError` for a model without such blocks, or that is
    checkpointed already.
    """
    blocks = list(_blocks(model))
    if any(isinstance(vars(block).get("forward"), partial) for block in blocks):
        raise ConfigError("engine.checkpointing: this model is checkpointed already")
    if not blocks:
        raise ConfigError(
            f"engine.checkpointing: expected a model with blocks that can be computed twice (of "
            f"transformers, or fedlora's Llama), found {type(model).__name__}; leave the key out"
        )
    for block in blocks:
        # A partial of a bound method, and no closure: deepcopy then binds it to the copy.
        block.forward = partial(_computed_again, block.forward)
    return len(blocks)


def _computed_again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost blocks."""
    if _is_block(module):
        yield module
        return
    for child in module.children():
        yield from _blocks(child)


def _is_block(module: nn.Module) -> bool:
    # By name, so that transformers need not be installed.
    names = {kind.__name__ for kind in type(module).__mro__}
    return isinstance(module, LlamaLayer) or "GradientCheckpointingLayer" in names
