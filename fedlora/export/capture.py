"""Record what a function of a model computes as a graph of core aten operations.

The model's weights become arguments for the time of the recording: fake tensors, which have a shape
and no numbers, so that recording a base of any size costs no memory. Free axes have symbolic sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._decomp import core_aten_decompositions
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from fedlora.errors import UnsupportedError
from fedlora.export.traced import Traced

__all__ = ["capture", "tensors_of"]

aten = torch.ops.aten
MARK = 10_007  # a prime: neither a size of a model nor a factor of one
IDENTITIES = {
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
}


def _permuted(node: fx.Node) -> tuple[Any, tuple[Any, ...]]:
    """Write t and transpose as a permutation."""
    x, *exchanged = cast(tuple[Any, ...], node.args)
    order = list(range(node.meta["val"].ndim))
    if exchanged or len(order) == 2:
        one, other = exchanged or (0, 1)
        order[one], order[other] = order[other], order[one]
    return aten.permute.default, (x, order)


# Decomposing these while recording would take longer than all the rest.
RENAMED: dict[Any, Callable[[fx.Node], Any]] = {
    aten.t.default: _permuted,
    aten.transpose.int: _permuted,
    aten._unsafe_view.default: lambda node: (aten.view.default, node.args),
}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers by name, tied ones under each of theirs."""
    parameters = model.named_parameters(remove_duplicate=False)
    buffers = model.named_buffers(remove_duplicate=False)
    return {name: tensor.detach() for name, tensor in (*parameters, *buffers)}


def capture(
    function: Callable[..., Sequence[Tensor]],
    model: nn.Module,
    names: Mapping[int, str],
    examples: Mapping[str, Tensor],
    axes: Mapping[str, Mapping[int, str]],
    outputs: Sequence[str],
    defaults: Mapping[str, Tensor],
) -> Traced:
    """Record ``function(*inputs)``, which calls `model`.

    names: of each tensor of the model, by its id; the graph reads weights under these names.
    examples: an input each; a size on a free axis should be no other size of the model, so that
    the recording does not take the two for the same. Axes of `defaults` are ranks. Raises
    `UnsupportedError` where an axis that should be free was fixed by the model, or two were found
    to be one.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False), allow_non_fake_inputs=True)

    def fake(tensor: Tensor, label: str, free: Mapping[int, str]) -> Tensor:
        sizes = [
            DimDynamic.DYNAMIC if axis in free else DimDynamic.STATIC for axis in range(tensor.ndim)
        ]
        context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
        source = ConstantSource(label)
        return mode.from_tensor(tensor.detach(), source=source, symbolic_context=context)

    fakes = {
        name: fake(tensor, f"input_{i}", axes.get(name, {}))
        for i, (name, tensor) in enumerate(examples.items())
    }
    marked = _marked(mode, examples, axes, defaults)
    with _as_arguments(model, lambda tensor, i: fake(tensor, f"weight_{i}", {})) as weights:
        tensors = [tensor for tensor, _ in weights]

        def flat(*arguments: Tensor) -> tuple[Tensor, ...]:
            return tuple(function(*arguments[len(tensors) :]))

        def record(inputs: Mapping[str, Tensor]) -> fx.GraphModule:
            with enable_python_dispatcher(), mode:
                recorder = make_fx(flat, decomposition_table=dict(_decompositions()))
                return recorder(*(one for _, one in weights), *inputs.values())

        module = record(fakes | marked)
        if not _unmark(module, mode, fakes, marked, axes, len(tensors)):
            module = record(fakes)
    _check_axes(fakes, axes)
    stored = _weights_as_attributes(module, tensors, names)
    _clean(module)
    return Traced(
        module=module,
        inputs=tuple(examples),
        outputs=tuple(outputs),
        weights=stored,
        examples=dict(examples),
        axes={name: dict(free) for name, free in axes.items() if free},
        defaults=dict(defaults),
    )


def _marked(
    mode: FakeTensorMode,
    examples: Mapping[str, Tensor],
    axes: Mapping[str, Mapping[int, str]],
    defaults: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Return fakes of the factors, each rank `MARK` instead of a symbol.

    Reasoning about hundreds of symbols takes most of a recording's time, and a product of matrices
    does not ask for the rank. So it is recorded as a number that is nothing else's size, and
    `_unmark` puts the symbols back.
    """
    with mode:
        return {
            name: torch.empty(
                [MARK if axis in axes[name] else size for axis, size in enumerate(tensor.shape)]
            )
            for name, tensor in examples.items()
            if name in defaults
        }


def _unmark(
    module: fx.GraphModule,
    mode: FakeTensorMode,
    fakes: Mapping[str, Tensor],
    marked: Mapping[str, Tensor],
    axes: Mapping[str, Mapping[int, str]],
    weights: int,
) -> bool:
    """Put each rank's symbol where `MARK` is in a node's shape; False where it went elsewhere.

    A layer's ranks meet no other's, so that a node has the symbol of the first argument with one.
    """
    symbols: dict[str, Any] = {}
    ranks: dict[fx.Node, Any] = {}
    values: dict[Any, Tensor] = {}
    names = iter(fakes)
    for i, node in enumerate(module.graph.nodes):
        if node.op == "placeholder":
            name = next(names) if i >= weights else ""
            if name in marked:
                ((axis, label),) = axes[name].items()
                ranks[node] = symbols.setdefault(label, fakes[name].shape[axis])
        elif any(_is_marked(argument) for argument in pytree.tree_leaves((node.args, node.kwargs))):
            return False
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not any(_is_marked(size) for size in value.shape):
            continue
        if node not in ranks:
            ranks[node] = next(ranks[one] for one in node.all_input_nodes if one in ranks)
        shape = [ranks[node] if _is_marked(size) else size for size in value.shape]
        if any(_is_marked(size) and size != MARK for size in value.shape):
            return False
        key = (str(ranks[node]), str(shape), value.dtype)
        if key not in values:
            with mode:
                values[key] = torch.empty(shape, dtype=value.dtype)
        node.meta["val"] = values[key]
    return True


def _is_marked(value: Any) -> bool:
    return isinstance(value, int) and value != 0 and value % MARK == 0


@contextmanager
def _as_arguments(
    model: nn.Module, fake: Callable[[Tensor, int], Tensor]
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Put fakes in the place of the model's tensors for this block; yield (tensor, fake) each."""
    pairs: dict[int, tuple[Tensor, Tensor]] = {}
    held: list[tuple[dict[str, Any], str, Tensor]] = []
    for module in model.modules():
        holders: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for holder in holders:
            for name, tensor in holder.items():
                if tensor is None:
                    continue
                if id(tensor) not in pairs:
                    pairs[id(tensor)] = (tensor, fake(tensor, len(pairs)))
                held.append((holder, name, tensor))
    try:
        for holder, name, tensor in held:
            holder[name] = pairs[id(tensor)][1]
        yield list(pairs.values())
    finally:
        for holder, name, tensor in held:
            holder[name] = tensor


def _check_axes(fakes: Mapping[str, Tensor], axes: Mapping[str, Mapping[int, str]]) -> None:
    found: dict[Any, str] = {}
    for name, free in axes.items():
        for axis, label in free.items():
            size: Any = fakes[name].shape[axis]
            expression = size.node.expr if isinstance(size, torch.SymInt) else size
            if isinstance(size, int) or expression.is_number:
                raise UnsupportedError(
                    f"export: expected {label} of {name!r} to be free, the model fixes it to "
                    f"{expression}; does its forward compare sizes or turn them into numbers?"
                )
            if found.setdefault(expression, label) != label:
                raise UnsupportedError(
                    f"export: expected {label} of {name!r} to be free, the model wants it to be "
                    f"equal to {found[expression]}"
                )


def _weights_as_attributes(
    module: fx.GraphModule, tensors: Sequence[Tensor], names: Mapping[int, str]
) -> dict[str, str]:
    """Turn the leading placeholders into attributes; return the tensor's name of each."""
    graph, stored = module.graph, {}
    placeholders = graph.find_nodes(op="placeholder")
    for i, (node, tensor) in enumerate(zip(placeholders, tensors, strict=False)):
        if node.users:
            attribute = f"weight_{i}"
            module.register_buffer(attribute, tensor.detach(), persistent=False)
            with graph.inserting_before(placeholders[len(tensors)]):
                read = graph.get_attr(attribute)
            read.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(read)
            stored[attribute] = names[id(tensor)]
        graph.erase_node(node)
    # Inputs come first, as in the signature; attributes were put before them.
    first = next(iter(graph.nodes))
    for node in placeholders[len(tensors) :]:
        first.prepend(node)
    return stored


def _clean(module: fx.GraphModule) -> None:
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "get_attr" and "val" not in node.meta:
            node.meta["val"] = getattr(module, node.target)
        elif node.op == "call_function" and node.target in IDENTITIES:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.op == "call_function" and node.target in RENAMED:
            node.target, node.args = RENAMED[node.target](node)
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()


@cache  # torch looks through all of its operations to make the table, longer than a layer takes
def _decompositions() -> dict[Any, Callable[..., Any]]:
    """To core aten, and further where a plain form is known."""
    table: dict[Any, Callable[..., Any]] = dict(core_aten_decompositions())
    kept = {*RENAMED, aten.roll.default}
    table = {op: form for op, form in table.items() if op not in kept}
    return table | {
        aten.native_group_norm.default: _group_norm,
        aten.native_group_norm_backward.default: _group_norm_backward,
        aten._native_batch_norm_legit_no_training.default: _batch_norm,
        aten.native_batch_norm_backward.default: _batch_norm_backward,
    }


def _group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None,
    batch: int, channels: int, size: int, groups: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grouped = x.view(batch, groups, -1)
    mean = grouped.mean(-1, keepdim=True)
    centred = grouped - mean
    inverse = ((centred * centred).mean(-1, keepdim=True) + eps).rsqrt()
    y = (centred * inverse).view(x.shape)
    shape = (-1, *(1,) * (x.ndim - 2))
    y = y if weight is None else y * weight.view(shape)
    y = y if bias is None else y + bias.view(shape)
    return y, mean[..., 0], inverse[..., 0]


def _group_norm_backward(
    gradient: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor | None,
    batch: int, channels: int, size: int, groups: int, wanted: Sequence[bool],
) -> Any:  # fmt: skip
    """Of a frozen norm: the gradient of the input alone."""
    if wanted[1] or wanted[2]:
        return NotImplemented
    if weight is not None:
        gradient = gradient * weight.view(-1, *(1,) * (x.ndim - 2))
    grouped, factor = gradient.view(batch, groups, -1), inverse[..., None]
    normalized = (x.view(batch, groups, -1) - mean[..., None]) * factor
    along = (grouped * normalized).mean(-1, keepdim=True)
    by_input = (grouped - grouped.mean(-1, keepdim=True) - normalized * along) * factor
    return by_input.view(x.shape), None, None


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """With the running statistics, as a frozen base has it: a factor and a shift a channel."""
    scale = (variance + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias
    shape = (-1, *(1,) * (x.ndim - 2))
    return x * scale.view(shape) + shift.view(shape), x.new_zeros(0), x.new_zeros(0)


def _batch_norm_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_variance: Tensor | None,
    saved_mean: Tensor | None,
    saved_inverse: Tensor | None,
    train: bool,
    eps: float,
    wanted: Sequence[bool],
) -> Any:
    if train or wanted[1] or wanted[2] or running_variance is None:
        return NotImplemented
    scale = (running_variance + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    return gradient * scale.view(-1, *(1,) * (x.ndim - 2)), None, None
