"""Whether clients of a model can share a pass: a look at gradients before a cohort is trained.

Some models mix the rows of a batch: a norm over the batch, a loss between its rows, a sort, dropout
from one generator. Then a client in a group would not get what it gets alone, and nothing would
raise. `find_leak` trains nothing: it takes two small batches, and compares gradients of two clients
in one pass with those of each alone, and with those after the other client's data has changed. Only
when they differ does it look for the module, with forward hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fedlora.adapter import Adapter, LoraLayer
from fedlora.nn.batched import LayerStack, batched_layers
from fedlora.nn.inject import keeping_adapter, load_adapter_into, lora_modules
from fedlora.nn.local import evaluating, seeded
from fedlora.nn.rows import NOT_COUNTED, Batch
from fedlora.nn.tasks import Task
from fedlora.nn.traced import (
    Call,
    first_difference,
    generator_state,
    named,
    near,
    remove,
    rows_of,
    traced,
)
from fedlora.randomness import rng
from fedlora.targets import initial_A
from fedlora.training import Factor

__all__ = ["find_leak"]

WIDTH = 64  # columns of a probed text at most: a leak does not need more
# Of a factor's largest gradient. Another order of summation moves it by 1e-6 in float32 and by some
# percent in half precision; rows that got another client's adapter move it by about itself.
CLOSE = {torch.float32: 1e-3, torch.float64: 1e-3}
CLOSE_HALF = 0.1
# With the same shapes a CPU sums every row in the same order, whatever the other rows hold. Other
# devices add with atomics, in any order.
SAME_ELSEWHERE = 1e-5

MOVES = "does not keep each client's rows in their place in dimension 0"

Gradients = dict[tuple[str, Factor], Tensor]


def find_leak(
    model: nn.Module, task: Task, batches: Sequence[Batch], adapter: Adapter
) -> str | None:
    """Return why clients of this model and task cannot share a pass, and None if they can.

    model: with LoRA injected that fits `adapter`, of which only ranks and scalings are used: the
    factors are drawn, since with B = 0 no gradient of A would tell anything. batches: one of each
    of two clients, or of one alone. A reason is part of a sentence and names the module by path
    and type where it can.

    The model is left as it was, buffers and torch's generator included. Raises what
    `load_adapter_into` raises for an adapter that does not fit.
    """
    assert task.losses is not None  # asked for by `why_alone`
    device = next(iter(lora_modules(model).values())).lora_A.device
    with keeping_adapter(model), _keeping_state(model), evaluating(model), torch.enable_grad():
        probe = _Probe(model, task, (_drawn(adapter, 0), _drawn(adapter, 1)), device)
        small = [_small(batch) for batch in batches[:2]]
        return probe.reason(small if len(small) == 2 else [small[0], _changed(small[0])])


@dataclass(frozen=True, slots=True)
class _Probe:
    model: nn.Module
    task: Task
    adapters: tuple[Adapter, Adapter]
    device: torch.device

    def reason(self, batches: list[Batch]) -> str | None:
        """Compare gradients; on a difference look for the module."""
        try:
            batches, alone = self._all_alone(batches)
        except Exception as error:  # whatever a model may raise is the answer
            return f"the batch of a single client raises {_one_line(error)}"
        bypassed = self._bypassed(batches[0])
        if bypassed is not None:
            return bypassed
        if not all(g.isfinite().all() for found in alone for g in found.values()):
            return "gradients of single clients are not finite, so that nothing can be compared"
        if not all(map(_any, alone)):
            return "gradients of single clients are zero, so that nothing can be compared"
        try:
            drew, pair, others, swapped = self._passes(batches)
        except Exception as error:  # here too
            return self._who_raises(batches, error)
        if drew:
            return self._who_draws(batches)
        if not all(map(self._same, pair, others)):
            return self._who_leaks(batches)
        if not all(map(self._close, (*pair, *swapped), (*alone, *alone))):
            return self._who_reorders(batches[0])
        return None

    def _passes(
        self, batches: list[Batch]
    ) -> tuple[bool, list[Gradients], list[Gradients], list[Gradients]]:
        """Two clients in one pass: whether it drew random numbers, and gradients by client.

        These are of both clients, of each with other data for its neighbour, and of the two in the
        other order: a sort might find rows in order by chance.
        """
        with seeded(self.device, 0):
            before = generator_state(self.device)
            pair = self._pass((0, 1), batches)
            drew = not torch.equal(before, generator_state(self.device))
        changed = self._neighbours_changed(batches)
        others = [self._together((0, 1), both)[k] for k, both in enumerate(changed)]
        swapped = self._together((1, 0), batches[::-1])
        return drew, pair, others, swapped[::-1]

    def _neighbours_changed(self, batches: list[Batch]) -> list[list[Batch]]:
        first, second = batches
        return [[first, _changed(second, first)], [_changed(first, second), second]]

    # Gradients

    def _all_alone(self, batches: list[Batch]) -> tuple[list[Batch], list[Gradients]]:
        """Each client's gradients alone, on texts of two lengths where the model takes such."""
        narrow = [_cut(batches[0], WIDTH), _cut(batches[1], WIDTH // 2, share=0.5)]
        try:
            found = [self._alone(k, batch) for k, batch in enumerate(narrow)]
            if all(map(_any, found)):
                return narrow, found
        except Exception:  # then the number of columns means something to it
            pass
        return batches, [self._alone(k, batch) for k, batch in enumerate(batches)]

    def _alone(self, k: int, batch: Batch) -> Gradients:
        """As `train_local` would get them."""
        load_adapter_into(self.model, self.adapters[k])
        with seeded(self.device, 0):
            loss = self.task.loss(self.model, batch)
        leaves = {
            (path, name): getattr(module, f"lora_{name}")
            for path, module in lora_modules(self.model).items()
            for name in _FACTORS
        }
        for leaf in leaves.values():
            leaf.requires_grad_(True)
        if not loss.requires_grad:
            return {key: torch.zeros_like(leaf) for key, leaf in leaves.items()}
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        return {
            key: torch.zeros_like(leaf) if gradient is None else gradient
            for (key, leaf), gradient in zip(leaves.items(), found, strict=True)
        }

    def _together(self, order: tuple[int, ...], batches: list[Batch]) -> list[Gradients]:
        """Gradients of several clients in one pass, by their place in it."""
        with seeded(self.device, 0):
            return self._pass(order, batches)

    def _pass(self, order: tuple[int, ...], batches: list[Batch]) -> list[Gradients]:
        modules = lora_modules(self.model)
        both: frozenset[Factor] = frozenset(_FACTORS)
        stacks = {
            path: LayerStack([self.adapters[k][path] for k in order], both, self.device)
            for path in modules
        }
        with batched_layers(modules, stacks):
            assert self.task.losses is not None
            losses = self.task.losses(self.model, batches)
            if losses.shape != (len(batches),):
                raise ValueError(
                    f"task {self.task.name!r}: expected {len(batches)} losses, "
                    f"found shape {tuple(losses.shape)}"
                )
            if losses.requires_grad:
                losses.sum().backward()  # type: ignore[no-untyped-call]
        return [
            {
                (path, name): (gradient if name == "A" else gradient.transpose(1, 2))[place]
                for path, stack in stacks.items()
                for name, gradient in stack.gradients.items()
            }
            for place in range(len(order))
        ]

    def _same(self, one: Gradients, other: Gradients) -> bool:
        if self.device.type == "cpu":
            return all(torch.equal(one[key], other[key]) for key in one)
        return all(near(one[key], other[key], SAME_ELSEWHERE) for key in one)

    def _close(self, one: Gradients, other: Gradients) -> bool:
        # A factor whose gradient is next to nothing in both is all rounding.
        floor = 1e-6 * max(float(gradient.abs().max()) for gradient in other.values())
        share = self._share()
        return all(near(one[key], other[key], share, floor) for key in one)

    def _share(self) -> float:
        weights = (module.base_layer.weight for module in lora_modules(self.model).values())
        return max(CLOSE.get(weight.dtype, CLOSE_HALF) for weight in weights)

    # Who it was

    def _bypassed(self, batch: Batch) -> str | None:
        """Name an adapted layer that is not called, and whose weight matters all the same."""
        called: set[str] = set()
        modules = lora_modules(self.model)
        handles = [
            module.register_forward_pre_hook(lambda *_, path=path: called.add(path))
            for path, module in modules.items()
        ]
        try:
            with torch.no_grad(), seeded(self.device, 0):
                self.task.loss(self.model, batch)
        finally:
            remove(handles)
        silent = {
            path: module.base_layer.weight
            for path, module in modules.items()
            if path not in called and module.base_layer.weight.is_floating_point()
        }
        if not silent:
            return None
        flags = [weight.requires_grad for weight in silent.values()]
        try:
            for weight in silent.values():
                weight.requires_grad_(True)
            with seeded(self.device, 0):
                loss = self.task.loss(self.model, batch)
            if loss.requires_grad:
                found = torch.autograd.grad(loss, list(silent.values()), allow_unused=True)
                for path, gradient in zip(silent, found, strict=True):
                    if gradient is not None:
                        return (
                            f"the weight of {named(path, modules[path])} is read without calling "
                            "the layer, so that its adapter has no effect"
                        )
        finally:
            for weight, flag in zip(silent.values(), flags, strict=True):
                weight.requires_grad_(flag)
        return None

    def _who_draws(self, batches: list[Batch]) -> str:
        calls, _ = self._traced((0, 1), batches)
        name = next((call.name for call in calls if call.drew), f"task {self.task.name!r}")
        return f"{name} draws from torch's one generator, which clients would share"

    def _who_leaks(self, batches: list[Batch]) -> str:
        before, _ = self._traced((0, 1), batches)
        again, _ = self._traced((0, 1), batches)
        name = first_difference(before, again, self._equal_parts(None))
        if name is not None:
            return f"{name} gives another output each time for the same input"
        # Gradients flow back the other way: look at both.
        for k, changed in enumerate(self._neighbours_changed(batches)):
            after, _ = self._traced((0, 1), changed)
            name = first_difference(before, after, self._equal_parts(k))
            if name is not None:
                return f"{name} lets one client's data change another client's output"
        return (
            f"one client's data changes another client's gradients in the losses of task "
            f"{self.task.name!r}, or in the backward pass of {type(self.model).__name__}"
        )

    def _who_reorders(self, batch: Batch) -> str:
        """Two clients together are not what each is alone, whatever the data: see where."""
        alone = self._alone(0, batch)
        if not self._close(self._together((0,), [batch])[0], alone):
            return (
                f"task {self.task.name!r}: `losses` of one client has other gradients than `loss`"
            )
        twin = _changed(batch)
        whole, _ = self._traced((0,), [batch])
        for place, order in enumerate(((0, 1), (1, 0))):
            pair = [batch, twin] if place == 0 else [twin, batch]
            if self._close(self._together(order, pair)[place], alone):
                continue
            calls, _ = self._traced(order, pair)
            name = first_difference(whole, calls, self._half_is_whole(place))
            if name is not None:
                return f"{name} {MOVES}"
            return (
                "a client's gradients in a batch of two differ from those alone, and no module's "
                f"output does: look at the losses of task {self.task.name!r}"
            )
        return (
            "a client's gradients change when its batch is filled up to the length or the rows of "
            "another client's: is padding masked?"
        )

    def _who_raises(self, batches: list[Batch], error: Exception) -> str:
        _, inside = self._traced((0, 1), batches)
        if inside:
            return f"in a batch of two clients {inside} raises {_one_line(error)}"
        whole, _ = self._traced((0,), batches[:1])
        pair, _ = self._traced((0, 1), [batches[0], _changed(batches[0])])
        name = first_difference(whole, pair, self._half_is_whole(0))
        because = "" if name is None else f"; {name} {MOVES}"
        return f"a batch of two clients raises {_one_line(error)}{because}"

    def _traced(self, order: tuple[int, ...], batches: list[Batch]) -> tuple[list[Call], str]:
        return traced(self.model, lambda: self._together(order, batches), self.device)

    def _equal_parts(self, k: int | None) -> Callable[[Tensor, Tensor], bool]:
        """Whether client k's rows, or all if None, are the same in two passes of two clients."""

        def same(one: Tensor, other: Tensor) -> bool:
            if one.shape != other.shape or one.dtype != other.dtype:
                return False
            one, other = (t if k is None else rows_of(t, k) for t in (one, other))
            if self.device.type == "cpu" or not one.is_floating_point():
                return torch.equal(one, other)
            return near(one, other, SAME_ELSEWHERE)

        return same

    def _half_is_whole(self, place: int) -> Callable[[Tensor, Tensor], bool]:
        """Whether what one client has alone is its half of two clients', or not of clients."""
        share = self._share()

        def same(alone: Tensor, pair: Tensor) -> bool:
            if alone.ndim == 0 or alone.shape == pair.shape:
                return alone.shape == pair.shape and near(pair.float(), alone.float(), share)
            if pair.shape != (2 * alone.shape[0], *alone.shape[1:]):
                return False
            return near(rows_of(pair, place).float(), alone.float(), share)

        return same


_FACTORS: tuple[Factor, ...] = ("A", "B")


def _any(gradients: Gradients) -> bool:
    return any(bool(gradient.any()) for gradient in gradients.values())


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextmanager
def _keeping_state(model: nn.Module) -> Iterator[None]:
    """Give back all buffers and gradients after this block: a norm may count what it sees."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _drawn(adapter: Adapter, k: int) -> Adapter:
    """A client's adapter of the same ranks and scalings, both factors random, keyed."""

    def layer(path: str, like: LoraLayer) -> LoraLayer:
        B = rng(k, "probe", path).normal(0.0, 0.05, like.B.shape)
        A = initial_A(path, like.rank, like.in_shape, k)
        return replace(like, A=A, B=B.astype(np.float32))

    return replace(adapter, layers={path: layer(path, a) for path, a in adapter.layers.items()})


# Batches


def _small(batch: Batch) -> Batch:
    """Its first two rows, without NaN: a client's bad data is no leak."""
    rows = len(batch["inputs"])
    small = {key: value[:2] if len(value) == rows else value for key, value in batch.items()}
    inputs = small["inputs"]
    return small | {"inputs": np.nan_to_num(inputs) if inputs.dtype.kind == "f" else inputs}


def _cut(batch: Batch, width: int, share: float = 1.0) -> Batch:
    """Keep the first columns of texts, at most `width`; with a share below 1 one row only."""
    inputs = batch["inputs"]
    if inputs.ndim != 2 or inputs.dtype.kind != "i":
        columns, shape = None, inputs.shape[:1]
    else:
        columns, shape = max(1, min(width, round(share * inputs.shape[1]))), inputs.shape
    rows = len(inputs) if share == 1.0 else 1
    cut: dict[str, npt.NDArray[Any]] = {}
    for key, value in batch.items():
        if columns is not None and value.shape[:2] == shape:
            cut[key] = value[:rows, :columns]
        else:
            cut[key] = value[:rows] if len(value) == shape[0] else value
    return cut


def _changed(batch: Batch, other: Batch | None = None) -> Batch:
    """Other data of the same shapes, padding in the same places; ids are those of the batches."""
    return dict(batch) | {
        key: _other_values(batch[key], None if other is None else other[key], ignored)
        for key, ignored in (("inputs", 0), ("targets", NOT_COUNTED))
        if key in batch
    }


def _other_values(
    values: npt.NDArray[Any], others: npt.NDArray[Any] | None, ignored: int
) -> npt.NDArray[Any]:
    if values.dtype.kind == "f":
        flipped: npt.NDArray[Any] = np.flip(values, tuple(range(1, values.ndim)))
        return (0.5 * flipped + 0.25).astype(values.dtype)  # within most ranges, none as it was
    known = values if others is None else np.concatenate([values.ravel(), others.ravel()])
    known = np.unique(known[known != ignored])
    if len(known) == 0:
        return values
    following = np.roll(known, -1)[np.searchsorted(known, values) % len(known)]
    return np.where(values == ignored, values, following)
