"""The frozen prefix: what lies below the first adapted block is computed once for each example.

When only the last blocks carry LoRA, the activations that enter the first of them depend on the
example and never on an adapter. They are kept, and every later step starts at that block. Nothing
has to be asked for: `cached_prefix` finds the blocks, tries at the first batch whether a pass from
kept activations gives the same losses and gradients as a plain one, and does nothing where it
cannot, or where the prefix is too small to be worth it.

Activations are kept by the row's own content, and not by a client's name and an index: train and
test parts, other seeds or lengths cannot be mixed up, a user's own batches need no further key, and
clients that were resampled share. Each example is computed alone, at its own length, so that what
is kept does not depend on which batch came first: a resumed run has the bits of an uninterrupted
one, and so have several threads, which share what is kept. A first visit therefore takes up to
twice as long as a plain pass; from about the third on an example is cheaper.

Against a plain pass the logits are bit-equal for a batch of one row of that length, and for others
within float32's order of summation, as those of a plain batch of another shape are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fedlora.nn.inject import kept_activations, lora_modules
from fedlora.nn.layers import LoraModule
from fedlora.nn.rows import NOT_COUNTED, Batch

__all__ = ["Measure", "cached_prefix"]

# Below this many frozen parameters a step is overhead, and looking rows up is as slow as computing.
LEAST_PARAMETERS = 100_000
# What may differ between a cached and a plain pass, relative to the largest value: sums in another
# order, through a few blocks. Reading something else from below differs by the order of 1.
TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-3}
COARSE = 0.1  # the same in bfloat16 and float16

Key = tuple[Any, ...]
Measure = Callable[[Sequence[Batch]], Sequence[Tensor]]
_log = logging.getLogger(__name__)


@contextmanager
def cached_prefix(
    model: nn.Module, measure: Measure
) -> Iterator[Callable[[Sequence[Batch]], None]]:
    """Start each pass of an injected model at its first adapted block, in this block.

    Yields a function that has to be called with the batches of each step before the model is.
    `measure` returns losses and gradients of the factors for one or two batches, as new tensors; it
    is asked twice, before the first step that this model ever takes. The model is in evaluation
    mode. Calls that cannot be served (other arguments, no kept rows possible) are plain ones.
    """
    prefix = _Prefix.of(model) if kept_activations(model).enabled else None
    if prefix is None:
        yield _ignored
        return
    with prefix.installed():
        yield lambda batches: prefix.expect(batches, measure)


def _ignored(batches: Sequence[Batch]) -> None:
    """Stand in where there is nothing to keep."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """A run of positions of one row whose activations are kept together."""

    row: int
    start: int
    stop: int
    key: Key


class _Reached(Exception):
    """The last frozen block has been computed: no error, but the end of a pass."""


class _Prefix:
    """The frozen blocks of one model, and how its next call treats them."""

    def __init__(self, model: nn.Module, path: str, blocks: list[nn.Module]) -> None:
        self.model, self.path, self.blocks = model, path, blocks
        self.kept = kept_activations(model)
        parameter = next(p for block in blocks for p in block.parameters())
        self.dtype = parameter.dtype
        self.where: Key = (path, len(blocks), str(self.dtype))
        self.mode: Literal["plain", "fill", "cached"] = "plain"
        self.serving = False  # whether calls may be served at all
        self.lengths: dict[bytes, int] = {}
        self.wrapped = 0  # values in the last block's output, when that is a tuple
        self.value: Tensor | None = None  # what the last block is to give

    @classmethod
    def of(cls, model: nn.Module) -> _Prefix | None:
        """Return the prefix with the most parameters; None where there is none worth keeping."""
        best: tuple[int, str, list[nn.Module]] = (LEAST_PARAMETERS - 1, "", [])
        for path, blocks in model.named_modules():
            if not isinstance(blocks, nn.ModuleList | nn.Sequential):
                continue
            below: list[nn.Module] = []
            for block in blocks:
                if any(isinstance(module, LoraModule) for module in block.modules()):
                    break
                below.append(block)
            size = sum(p.numel() for block in below for p in block.parameters())
            if size > best[0] and len(blocks) > 1:
                best = (size, path, below)
        return cls(model, best[1], best[2]) if best[2] else None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Put the model's and the blocks' forward aside while this block runs."""
        # A causal model of transformers may be called by its body alone.
        body = getattr(self.model, getattr(self.model, "base_model_prefix", "") or "-", None)
        entries = [self.model, *([body] if isinstance(body, nn.Module) else [])]
        forwards: list[tuple[nn.Module, Any]] = [(m, self._entry(m)) for m in entries]
        forwards += [(block, self._block(n)) for n, block in enumerate(self.blocks)]
        before = [(module, vars(module).get("forward")) for module, _ in forwards]
        try:
            for module, forward in forwards:
                object.__setattr__(module, "forward", forward)
            yield
        finally:
            for module, own in before:
                vars(module).pop("forward", None)
                if own is not None:
                    object.__setattr__(module, "forward", own)

    def expect(self, batches: Sequence[Batch], measure: Measure) -> None:
        """Take note of how long each row of these batches is; at first, try the cache on them."""
        self.serving = False
        verdict = self.kept.verdicts.get(self.where)
        if verdict is None:
            verdict = self._tried(batches, measure)
        if verdict is True:
            self._expect(batches)
            self.serving = True

    def _expect(self, batches: Sequence[Batch]) -> None:
        self.lengths.clear()
        for batch in batches:
            inputs, targets = batch["inputs"], batch.get("targets")
            if not _is_text(inputs) or targets is None or targets.shape != inputs.shape:
                continue
            # An id 0 may be a token of its own at the end of a row; its target says so.
            used = _used(inputs != 0)
            needed = np.maximum(used, _used(targets != NOT_COUNTED))
            for row, end, length in zip(inputs, used, needed, strict=True):
                key = row[:end].tobytes()
                self.lengths[key] = max(self.lengths.get(key, 1), int(length))

    def _tried(self, batches: Sequence[Batch], measure: Measure) -> bool | None:
        """Compare cached with plain passes on a small batch; None when that is undecided."""
        reason: str | None = None
        touched: list[str] = []

        def touch(path: str) -> Callable[..., None]:
            return lambda *_: touched.append(path) if self.mode == "fill" else None

        hooks = [m.register_forward_pre_hook(touch(p)) for p, m in lora_modules(self.model).items()]
        try:
            small = [_ragged(batch) for batch in batches[:2]]
            plain = measure(small)
            self._expect(small)
            self.serving, served = True, self.kept.served
            cached = measure(small)
            if not all(torch.isfinite(value).all() for value in plain):
                return None  # a client that diverges at once says nothing about the model
            if self.kept.served == served:
                reason = "the model's calls or the blocks' outputs are of a kind that is not kept"
            elif not self._close(plain, cached):
                reason = "starting from them gives another result"
        except Exception as error:
            reason = f"trying it failed: {type(error).__name__}: {error}"
        finally:
            if touched:
                reason = f"layer {touched[0]!r} is adapted and comes before them"
            self.serving = False
            for hook in hooks:
                hook.remove()
        what = f"activations below block {len(self.blocks)} of {self.path!r}"
        if reason is None:
            _log.info("%s are kept, up to %d MB", what, self.kept.limit >> 20)
        else:
            _log.info("%s are computed in every step: %s", what, reason)
        self.kept.verdicts[self.where] = reason is None
        return reason is None

    def _close(self, plain: Sequence[Tensor], cached: Sequence[Tensor]) -> bool:
        tolerance = TOLERANCES.get(self.dtype, COARSE)
        return len(plain) == len(cached) and all(
            bool((a - b).abs().max() <= tolerance * a.abs().max() + 1e-9)
            for a, b in zip(plain, cached, strict=True)
            if a.numel()
        )

    def _entry(self, module: nn.Module) -> Callable[..., Any]:
        forward = module.forward

        def served(*args: Any, **kwargs: Any) -> Any:
            pieces = self._pieces(args, kwargs) if self.serving and self.mode == "plain" else None
            if pieces is None:
                return forward(*args, **kwargs)
            values = self._values(pieces, forward, args[0], kwargs)
            if values is None:
                return forward(*args, **kwargs)
            self.value, self.mode = _assembled(pieces, values, args[0]), "cached"
            try:
                return forward(*args, **kwargs)
            finally:
                self.value, self.mode = None, "plain"

        return served

    def _block(self, number: int) -> Callable[..., Any]:
        forward, is_last = self.blocks[number].forward, number == len(self.blocks) - 1

        def stepped_over(*args: Any, **kwargs: Any) -> Any:
            if self.mode == "cached":
                if not is_last:
                    return args[0] if args else kwargs["hidden_states"]
                return (
                    self.value if not self.wrapped else (self.value, *[None] * (self.wrapped - 1))
                )
            out = forward(*args, **kwargs)
            if self.mode == "fill" and is_last:
                first, *rest = out if isinstance(out, tuple) else (out,)
                self.wrapped = len(out) if isinstance(out, tuple) else 0
                alone = isinstance(first, Tensor) and all(value is None for value in rest)
                raise _Reached(first if alone else None)
            return out

        return stepped_over

    def _pieces(self, args: Any, kwargs: dict[str, Any]) -> list[_Piece] | None:
        """What this call needs; None for a call whose other arguments might matter below."""
        if len(args) != 1 or not isinstance(args[0], Tensor) or args[0].ndim < 2:
            return None
        given = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
        mask, segments = given.pop("attention_mask", None), given.pop("segments", None)
        inputs = args[0].detach().cpu().numpy()
        if given or not _plain_values(kwargs):
            return None
        if not _is_text(inputs):
            if mask is not None or segments is not None:
                return None
            return [
                _Piece(n, 0, 1, (*self.where, row.shape, row.tobytes()))
                for n, row in enumerate(inputs)
            ]
        if mask is not None and not np.array_equal(mask.cpu().numpy(), inputs != 0):
            return None
        if segments is not None:
            return self._runs(inputs, segments.cpu().numpy())
        pieces = []
        width = inputs.shape[1]
        for n, (row, end) in enumerate(zip(inputs, _used(inputs != 0), strict=True)):
            # Behind the last id there is padding. A mask hides it; without one the model is causal
            # and the targets say what is looked at. Of rows that nobody announced, everything is.
            length = int(end)
            if mask is None:
                length = min(self.lengths.get(row[:end].tobytes(), width), width)
            length = max(length, 1)
            key = (*self.where, mask is not None, row[:length].tobytes())
            pieces.append(_Piece(n, 0, length, key))
        return pieces

    def _runs(self, inputs: npt.NDArray[Any], segments: npt.NDArray[Any]) -> list[_Piece]:
        """The texts that share rows: runs of one number, of which -1 is padding."""
        pieces = []
        for n, (row, numbers) in enumerate(zip(inputs, segments, strict=True)):
            edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
            for start, stop in pairwise(edges):
                if numbers[start] >= 0:
                    key = (*self.where, False, row[start:stop].tobytes())
                    pieces.append(_Piece(n, start, stop, key))
        return pieces

    def _values(
        self, pieces: list[_Piece], forward: Any, inputs: Tensor, kwargs: dict[str, Any]
    ) -> list[Tensor] | None:
        """The activations of each piece, kept or computed; None where they cannot be kept."""
        values = []
        text = _is_text(inputs)
        for piece in pieces:
            value = self.kept.get(piece.key)
            if value is None:
                rows = slice(piece.row, piece.row + 1)
                row = inputs[rows, piece.start : piece.stop] if text else inputs[rows]
                rest = {name: v for name, v in kwargs.items() if name != "segments"}
                if rest.get("attention_mask") is not None:
                    rest["attention_mask"] = rest["attention_mask"][rows, piece.start : piece.stop]
                value = self._filled(forward, row, rest)
                if value is None or (text and value.shape[1:2] != row.shape[1:2]):
                    return None
                value = value[0].clone()
                self.kept.put(piece.key, value)
            values.append(value)
        self.kept.served += 1
        return values

    @torch.no_grad()
    def _filled(self, forward: Any, row: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """Run one row up to the last frozen block: (1, ...) activations."""
        self.mode = "fill"
        try:
            forward(row, **kwargs)
        except _Reached as reached:
            value: Tensor | None = reached.args[0]
            return value if value is not None and len(value) == 1 else None
        finally:
            self.mode = "plain"
        return None


def _assembled(pieces: list[_Piece], values: list[Tensor], inputs: Tensor) -> Tensor:
    """Put kept activations where the call has their rows; zeros where there is only padding.

    Zeros are exact: what is behind a mask, or ahead of a causal model, is multiplied by zero.
    """
    first = values[0]
    if not _is_text(inputs):
        return torch.stack(values)
    rows, width = inputs.shape
    if len(values) == rows and all(len(value) == width for value in values):
        return torch.stack(values)
    whole = first.new_zeros(rows, width, *first.shape[1:])
    for piece, value in zip(pieces, values, strict=True):
        whole[piece.row, piece.start : piece.stop] = value
    return whole


def _ragged(batch: Batch) -> Batch:
    """The batch's first row twice; of text the second time only the first half."""
    small = {name: np.concatenate([value[:1], value[:1]]) for name, value in batch.items()}
    if _is_text(batch["inputs"]):
        length = int(_used(small["inputs"][:1] != 0)[0])
        small["inputs"][1, (length + 1) // 2 :] = 0
        if small["targets"].shape == small["inputs"].shape:
            small["targets"][1, (length + 1) // 2 :] = NOT_COUNTED
    return small


def _used(used: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """(rows,) the number of positions up to the last one that is used."""
    last = used.shape[1] - np.argmax(used[:, ::-1], axis=1)
    return np.where(used.any(axis=1), last, 0).astype(np.int64)


def _is_text(inputs: Tensor | npt.NDArray[Any]) -> bool:
    """Whether an array or a tensor holds token ids (rows, positions)."""
    return bool(inputs.ndim == 2) and "float" not in str(inputs.dtype)


def _plain_values(kwargs: dict[str, Any]) -> bool:
    return all(
        v is None or isinstance(v, bool | int | float | str | Tensor) for v in kwargs.values()
    )
