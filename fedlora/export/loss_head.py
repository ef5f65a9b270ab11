"""The loss of a model with many classes, and its gradient, without a one-hot matrix.

A language model's logits (n, classes) are the largest tensor of a training step, and autograd makes
several of their size: the logarithms of the probabilities, a one-hot matrix of the targets, their
products. With weights w (n, 1), a target's row of the frozen head W and p = softmax(z),

    d loss / d hidden = w * (p @ W - W[target])
    -log p[target]    = max z - log max p - z[target]

needs the logits and the probabilities only. (The largest probability is at least 1 / classes, so
that its logarithm is finite where that of the target's might not be.)
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["without_one_hot"]

aten = torch.ops.aten


def without_one_hot(graph: fx.Graph, weights: Collection[str]) -> None:
    """Rewrite each cross-entropy whose gradient goes through a frozen head and nowhere else."""
    for node in list(graph.nodes):
        if node.target is aten.sub.Tensor and (found := _matched(node)) is not None:
            products = _products(node, weights)
            if products:
                _rewrite(graph, *found, products)


def _matched(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """Recognize ``g - exp(y) * sum(g)`` for y = log_softmax(z), g = scatter(0, target, -1) * w.

    Return y, the targets (n, 1) and w (n, 1).
    """
    gradient: Any
    product: Any
    gradient, product = node.args
    if not _is(gradient, aten.mul.Tensor) or not _is(product, aten.mul.Tensor):
        return None
    one_hot, weight = gradient.args
    likely, total = product.args
    fits = (
        _is(one_hot, aten.scatter.value)
        and one_hot.args[1:] == (1, one_hot.args[2], -1.0)
        and _is(one_hot.args[0], aten.full_like.default, aten.full.default)
        and one_hot.args[0].args[1] == 0
        and _is(likely, aten.exp.default)
        and _is(likely.args[0], aten._log_softmax.default)
        and _is(total, aten.sum.dim_IntList)
        and total.args == (gradient, [1], True)
        and isinstance(weight, fx.Node)
    )
    if not fits:
        return None
    log_likely, targets = likely.args[0], one_hot.args[2]
    rows, classes = _shape(log_likely)
    if not isinstance(rows, int) or not isinstance(classes, int):
        return None
    if log_likely.args[1] not in (1, -1) or {_shape(targets), _shape(weight)} != {(rows, 1)}:
        return None
    return log_likely, targets, weight


def _products(node: fx.Node, weights: Collection[str]) -> list[fx.Node] | None:
    """The products with frozen weights that read the gradient; None if anything else does."""
    found: list[fx.Node] = []
    for user in node.users:
        if _is(user, aten.view.default, aten._unsafe_view.default):
            below = _products(user, weights)
            if below is None:
                return None
            found += below
            continue
        if not _is(user, aten.mm.default) or user.args[0] is not node:
            return None
        frozen = _untransposed(user.args[1])
        if frozen.op != "get_attr" or str(frozen.target) not in weights:
            return None
        found.append(user)
    return found


def _rewrite(
    graph: fx.Graph, y: fx.Node, targets: fx.Node, weight: fx.Node, products: list[fx.Node]
) -> None:
    logits, rows = y.args[0], _shape(y)[0]
    wide, narrow = y.meta["val"], _like(y, (rows, 1))

    def call(target: Any, like: Tensor, *args: Any) -> fx.Node:
        made = graph.call_function(target, args)
        made.meta["val"] = like
        return made

    with graph.inserting_before(y):
        likely = call(aten._softmax.default, wide, logits, 1, False)
        most = call(aten.amax.default, narrow, likely, [1], True)
        largest = call(aten.amax.default, narrow, logits, [1], True)
        total = call(aten.sub.Tensor, narrow, largest, call(aten.log.default, narrow, most))
    for user in list(y.users):
        if _is(user, aten.gather.default) and user.args[1] == 1:
            like = user.meta["val"]
            with graph.inserting_before(user):
                taken = call(aten.gather.default, like, logits, 1, user.args[2])
                user.replace_all_uses_with(call(aten.sub.Tensor, like, taken, total))
        elif _is(user, aten.exp.default):
            user.replace_all_uses_with(likely)
    for product in products:
        like, frozen = product.meta["val"], _untransposed(product.args[1])
        with graph.inserting_before(product):
            flat = call(aten.view.default, _like(targets, (rows,)), targets, [rows])
            expected = call(aten.mm.default, like, likely, frozen)
            wanted = call(aten.embedding.default, like, frozen, flat)
            difference = call(aten.sub.Tensor, like, expected, wanted)
            product.replace_all_uses_with(call(aten.mul.Tensor, like, difference, weight))


def _untransposed(node: Any) -> fx.Node:
    """What a matrix is after two transpositions, as autograd leaves them, or the matrix."""
    twice = [node, node.args[0]] if _is(node, aten.permute.default) else []
    if twice and all(_is(one, aten.permute.default) and one.args[1] == [1, 0] for one in twice):
        return _untransposed(twice[1].args[0])
    found: fx.Node = node
    return found


def _is(node: Any, *targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in targets


def _shape(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _like(node: fx.Node, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=node.meta["val"].dtype, device="meta")
