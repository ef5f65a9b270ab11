"""What is learned: the loss that training follows and the sums that evaluation adds up.

A batch is a dict of NumPy arrays, "inputs", "targets" and whatever else a task needs. A model takes
the inputs as its first argument and returns logits, or an object that has them as `.logits`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.errors import ConfigError, unknown_name
from fedlora.imports import import_function, is_function
from fedlora.nn.cross_entropy import head_cross_entropy
from fedlora.nn.layers import LoraModule, is_bare_linear

__all__ = [
    "NOT_COUNTED",
    "Batch",
    "Task",
    "get_task",
    "hidden_and_head",
    "logits_of",
    "packs_texts",
    "scored_positions",
]

Batch: TypeAlias = Mapping[str, npt.NDArray[Any]]

NOT_COUNTED = -100  # a target that is no part of the loss
PACKED_TOKENS = 512  # of a batch, or of a client in a group, that is packed at all
ROW_TOKENS = 96  # that texts share a row up to: attention grows with the square of a row
SCORED_LOGITS = 1 << 24  # at most about this many logits exist at once while scoring: 64 MB


@dataclass(frozen=True, slots=True)
class Task:
    """A loss to train with and a score to report.

    `loss` returns a scalar tensor, the mean over the batch's counted targets. `score` returns sums
    that may be added over batches: "nats" with "tokens" or "examples", and what the task counts.

    `losses` takes a batch of each of K clients and returns their K losses, in one pass through the
    model in which the rows are client-major, in K blocks of equal size: what `loss` would return
    for each. A task without it is trained one client at a time. `scores` is to `score` what
    `losses` is to `loss`.
    """

    name: str
    metric: Literal["loss", "accuracy"]
    higher_is_better: bool
    loss: Callable[[nn.Module, Batch], Tensor]
    score: Callable[[nn.Module, Batch], dict[str, float]]
    losses: Callable[[nn.Module, Sequence[Batch]], Tensor] | None = None
    scores: Callable[[nn.Module, Sequence[Batch]], list[dict[str, float]]] | None = None


def get_task(name: str) -> Task:
    """Return the task "next-token" or "classification", or what "module:function" returns.

    Raises `UnknownNameError` for another name, and `ConfigError` when the function cannot be
    imported or returns no `Task`.
    """
    if name in TASKS:
        return TASKS[name]
    if not is_function(name):
        raise unknown_name("task", name, (*TASKS, "module:function"))
    task = import_function(name, "task")()
    if not isinstance(task, Task):
        raise ConfigError(
            f"task: expected {name!r} to return a fedlora.nn.Task, found {type(task).__name__}"
        )
    return task


def next_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean nats over the targets that are not -100; 0 for a batch without any."""
    inputs, targets = _tensors(model, batch)
    counted = (targets != NOT_COUNTED).reshape(-1)
    wanted = targets.reshape(-1)[counted]
    rows: dict[str, Tensor] = {}
    if packs_texts(model):
        inputs, counted, rows = _packed(inputs, counted)
    return _nats(model, inputs, counted, wanted, rows).sum() / max(len(wanted), 1)


@torch.no_grad()
def next_token_score(model: nn.Module, batch: Batch) -> dict[str, float]:
    """Sums over counted targets: nats; at word starts, right first and top three guesses."""
    inputs, targets = _tensors(model, batch)
    starts = batch.get("word_starts", np.zeros(targets.shape, bool))
    word_starts = torch.tensor(starts, device=targets.device)
    sums = dict.fromkeys(("nats", "tokens", "top1", "top3", "word_starts"), 0.0)
    for rows in _row_chunks(model, inputs):
        counted = (targets[rows] != NOT_COUNTED).reshape(-1)
        wanted = targets[rows].reshape(-1)[counted]
        at_start = word_starts[rows].reshape(-1)[counted]
        logits = _logits_at(model, inputs[rows], counted)
        nats = F.cross_entropy(logits, wanted, reduction="none").double()
        best = logits[at_start].topk(min(3, logits.shape[-1])).indices
        hits = best == wanted[at_start, None]
        sums["nats"] += float(nats.sum())
        sums["tokens"] += len(wanted)
        sums["top1"] += int(hits[:, :1].sum())
        sums["top3"] += int(hits.sum())
        sums["word_starts"] += int(at_start.sum())
    return sums


def next_token_losses(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """(K,) `next_token_loss` of each client's batch.

    Where texts can share a row, each client has one: half of a batch of short texts is padding.
    """
    inputs, counted, wanted, owner, rows = _client_rows(model, batches)
    nats = _nats(model, inputs, counted, wanted, rows)
    counts = torch.bincount(owner, minlength=len(batches)).clamp(min=1)
    return nats.new_zeros(len(batches)).index_add(0, owner, nats) / counts


@torch.no_grad()
def next_token_scores(model: nn.Module, batches: Sequence[Batch]) -> list[dict[str, float]]:
    """Return `next_token_score` of each client's batch, from one pass; see `scored_positions`."""
    inputs, counted, wanted, owner, rows = _client_rows(model, batches)
    logits = _counted_logits(model, inputs, counted, rows)
    # In the order of the counted targets, which packing and padding leave as it is.
    marked = [
        np.broadcast_to(batch.get("word_starts", np.False_), batch["targets"].shape)[
            batch["targets"] != NOT_COUNTED
        ]
        for batch in batches
    ]
    at_start = torch.from_numpy(np.concatenate(marked)).to(owner.device)
    nats = F.cross_entropy(logits, wanted, reduction="none").double()
    best = logits[at_start].topk(min(3, logits.shape[-1])).indices
    hits = best == wanted[at_start, None]
    starting = owner[at_start]
    sums = {
        "nats": _by_client(owner, nats, len(batches)),
        "tokens": torch.bincount(owner, minlength=len(batches)),
        "top1": _by_client(starting, hits[:, :1].sum(1), len(batches)),
        "top3": _by_client(starting, hits.sum(1), len(batches)),
        "word_starts": torch.bincount(starting, minlength=len(batches)),
    }
    return _rows(sums)


def classification_losses(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """(K,) `classification_loss` of each client's batch."""
    inputs, targets = _stacked(batches)
    device = next(model.parameters()).device
    inputs, targets = inputs.to(device), targets.to(device)
    logits = logits_of(model, inputs, masked=True)
    nats = F.cross_entropy(logits, targets, reduction="none", ignore_index=NOT_COUNTED)
    counts = (targets != NOT_COUNTED).view(len(batches), -1).sum(1)
    return nats.view(len(batches), -1).sum(1) / counts


@torch.no_grad()
def classification_scores(model: nn.Module, batches: Sequence[Batch]) -> list[dict[str, float]]:
    """Return `classification_score` of each client's batch, from one pass."""
    inputs, targets = _stacked(batches)
    device = next(model.parameters()).device
    inputs, targets = inputs.to(device), targets.to(device)
    logits = logits_of(model, inputs, masked=True)
    nats = F.cross_entropy(logits, targets, reduction="none", ignore_index=NOT_COUNTED)
    correct = logits.argmax(-1) == targets  # a filled-up row has no class
    return _rows(
        {
            "nats": nats.double().view(len(batches), -1).sum(1),
            "examples": (targets != NOT_COUNTED).view(len(batches), -1).sum(1),
            "correct": correct.view(len(batches), -1).sum(1),
        }
    )


def classification_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean nats over the batch's examples."""
    inputs, targets = _tensors(model, batch)
    return F.cross_entropy(logits_of(model, inputs, masked=True), targets)


@torch.no_grad()
def classification_score(model: nn.Module, batch: Batch) -> dict[str, float]:
    """Sums of nats, examples and examples whose most probable class is the right one."""
    inputs, targets = _tensors(model, batch)
    logits = logits_of(model, inputs, masked=True)
    nats = F.cross_entropy(logits, targets, reduction="none").double()
    correct = logits.argmax(-1) == targets
    return {
        "nats": float(nats.sum()),
        "examples": float(len(targets)),
        "correct": float(correct.sum()),
    }


TASKS = {
    "next-token": Task(
        "next-token",
        "loss",
        False,
        next_token_loss,
        next_token_score,
        next_token_losses,
        next_token_scores,
    ),
    "classification": Task(
        "classification",
        "accuracy",
        True,
        classification_loss,
        classification_score,
        classification_losses,
        classification_scores,
    ),
}


def scored_positions(model: nn.Module) -> int:
    """Return how many positions `scores` may be given at once: about `SCORED_LOGITS` logits."""
    return max(1, SCORED_LOGITS // _vocabulary(model))


def _client_rows(
    model: nn.Module, batches: Sequence[Batch]
) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Put K clients' texts below one another, client-major, in equal blocks.

    Return the inputs; which positions of them, flattened, are counted; the targets at these; whose
    they are; and the model's further arguments. Where texts can share a row, each client has one.
    """
    rows: dict[str, Tensor] = {}
    device = next(model.parameters()).device
    if packs_texts(model):
        inputs, targets, segments = _rows_of_texts(batches)
        if segments is not None:
            rows = {"segments": segments.to(device)}
    else:
        inputs, targets = _stacked(batches)
    inputs, targets = inputs.to(device), targets.to(device)
    counted = (targets != NOT_COUNTED).reshape(-1)
    clients = torch.arange(len(batches), device=device)
    owner = clients.repeat_interleave(targets.numel() // len(batches))[counted]
    return inputs, counted, targets.reshape(-1)[counted], owner, rows


def _by_client(owner: Tensor, values: Tensor, clients: int) -> Tensor:
    return values.new_zeros(clients).index_add(0, owner, values)


def _rows(sums: Mapping[str, Tensor]) -> list[dict[str, float]]:
    """Turn a column per sum into a dictionary per client."""
    columns = {name: column.tolist() for name, column in sums.items()}
    return [
        {name: float(column[k]) for name, column in columns.items()}
        for k in range(len(next(iter(columns.values()))))
    ]


def _tensors(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    device = next(model.parameters()).device
    return _tensor(batch["inputs"], device), _tensor(batch["targets"], device)


def _tensor(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Share the array's memory where torch allows that; it warns about read-only arrays."""
    if not array.flags.writeable:
        array = array.copy()
    return torch.from_numpy(array).to(device)


def logits_of(model: nn.Module, inputs: Tensor, *, masked: bool) -> Tensor:
    """Call the model on a batch's inputs; masked: give it a mask over the padding if it takes one.

    Return logits (rows, ..., classes) float32.
    """
    out = model(inputs, **_options(model, inputs, masked))
    logits: Tensor = out if isinstance(out, Tensor) else out.logits
    return logits.float()


def _logits_at(model: nn.Module, inputs: Tensor, counted: Tensor) -> Tensor:
    """Logits (n, vocabulary) at the n counted positions of the flattened batch.

    Half of a batch of short texts is padding: where texts can share a row (`segments`), none of it
    is computed.
    """
    rows: dict[str, Tensor] = {}
    if packs_texts(model):
        inputs, counted, rows = _packed(inputs, counted)
    return _counted_logits(model, inputs, counted, rows)


def _counted_logits(
    model: nn.Module, inputs: Tensor, counted: Tensor, rows: dict[str, Tensor]
) -> Tensor:
    split = hidden_and_head(model, inputs, rows)
    if split is None:
        # Padding is on the right, where a causal model does not look: no mask.
        return _at(logits_of(model, inputs, masked=False), counted)
    return _head_logits(*split, counted)


def _nats(
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


def hidden_and_head(
    model: nn.Module, inputs: Tensor, rows: dict[str, Tensor]
) -> tuple[Tensor, nn.Module] | None:
    """Hidden states (rows, time, features), and the head that would read them.

    The head is by far the largest product of a small language model, and few positions need it.
    None where a model cannot be divided there: it has neither `hidden_only` nor what transformers'
    causal models have in public, a body at `base_model_prefix` and `get_output_embeddings`.
    """
    if "hidden_only" in _arguments(type(model).forward):
        return model(inputs, hidden_only=True, **rows), model.lm_head  # type: ignore[return-value]
    if not _is_divided(model, inputs):
        return None
    body, head = _body_and_head(model)
    return body(inputs, **_options(body, inputs, masked=False)).last_hidden_state, head


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


def _packed(inputs: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Put a small batch's texts in few rows with little padding, each a segment of its own.

    Return inputs (rows, n), counted (rows * n,) and the model's argument `segments` (rows, n); a
    larger batch comes back as it is. A text ends with its last counted target, behind which a
    causal model has nothing to say. Counted positions keep their order.
    """
    by_row = counted.view(inputs.shape)
    needed = by_row.flip(1).cumsum(1).flip(1) > 0
    lengths = needed.sum(1).tolist()
    if not 0 < sum(lengths) <= PACKED_TOKENS:
        return inputs, counted, {}
    rows, starts, width = _places(lengths)
    text, column = needed.nonzero(as_tuple=True)
    place = (torch.tensor(rows) * width + torch.tensor(starts)).to(inputs.device)[text] + column
    size = (rows[-1] + 1) * width
    ids, segments = inputs.new_zeros(size), inputs.new_full((size,), -1)
    ids[place], segments[place] = inputs[text, column], text
    is_counted = counted.new_zeros(size)
    is_counted[place] = by_row[text, column]
    return ids.view(-1, width), is_counted, {"segments": segments.view(-1, width)}


def _places(lengths: Sequence[int]) -> tuple[list[int], list[int], int]:
    """Return each text's row, where it starts there, and the width of the rows."""
    rows, starts, row, end, width = [], [], 0, 0, 1
    for length in lengths:
        if end and end + length > ROW_TOKENS:
            row, end = row + 1, 0
        rows.append(row)
        starts.append(end)
        end += length
        width = max(width, end)
    return rows, starts, width


def packs_texts(model: nn.Module) -> bool:
    """Whether several texts can share a row of this model."""
    return {"hidden_only", "segments"} <= _arguments(type(model).forward)


def _rows_of_texts(batches: Sequence[Batch]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Put each client's texts in one row: inputs, targets and segments (K, n).

    Where a row would be longer than `PACKED_TOKENS`, the texts keep their own and segments is None.
    A text ends with its last counted target, behind which a causal model has nothing to say.
    """
    parts = []
    for batch in batches:
        inputs, targets = batch["inputs"], batch["targets"]
        if len(inputs) == 1 and targets[0, -1] != NOT_COUNTED:
            parts.append((inputs[0], targets[0], np.zeros(inputs.shape[1], np.int64)))
            continue
        needed = (targets != NOT_COUNTED)[:, ::-1].cumsum(1)[:, ::-1] > 0
        parts.append((inputs[needed], targets[needed], needed.nonzero()[0]))
    width = max(1, *(len(part[0]) for part in parts))
    if width > PACKED_TOKENS:
        return *_stacked(batches), None
    rows = [np.full((len(batches), width), fill) for fill in (0, NOT_COUNTED, -1)]
    for k, part in enumerate(parts):
        for row, values in zip(rows, part, strict=True):
            row[k, : len(values)] = values
    ids, wanted, segments = (torch.from_numpy(row) for row in rows)
    one_text = all(len(batch["inputs"]) == 1 for batch in batches)
    return ids, wanted, None if one_text else segments


def _stacked(batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """Put the batches below one another, client-major, in blocks of equal size.

    Text is padded on the right. A smaller batch is filled up with its own first row, not counted:
    zeros might become NaN in a model that divides by a norm.
    """
    rows = max(len(batch["inputs"]) for batch in batches)
    first = batches[0]
    is_text = first["inputs"].ndim == 2 and first["inputs"].dtype.kind == "i"
    width = max(batch["inputs"].shape[1] for batch in batches)
    shape = (width,) if is_text else first["inputs"].shape[1:]
    inputs = np.zeros((len(batches), rows, *shape), first["inputs"].dtype)
    targets_shape = (width,) if first["targets"].ndim == 2 else ()
    targets = np.full((len(batches), rows, *targets_shape), NOT_COUNTED)
    for k, batch in enumerate(batches):
        found, wanted = batch["inputs"], batch["targets"]
        if is_text:
            inputs[k, : len(found), : found.shape[1]] = found
            inputs[k, len(found) :, : found.shape[1]] = found[:1]
        else:
            inputs[k, : len(found)] = found
            inputs[k, len(found) :] = found[:1]
        if wanted.ndim == 2:
            targets[k, : len(wanted), : wanted.shape[1]] = wanted
        else:
            targets[k, : len(wanted)] = wanted
    return torch.from_numpy(inputs).flatten(0, 1), torch.from_numpy(targets).flatten(0, 1)


def _options(model: nn.Module, inputs: Tensor, masked: bool) -> dict[str, Any]:
    """Arguments that transformers' models want: no cache, and a mask over the padding.

    Batches are padded with 0, so only a model whose padding is 0 can be given a mask.
    """
    arguments = _arguments(type(model).forward)
    options: dict[str, Any] = {}
    if "use_cache" in arguments:
        options["use_cache"] = False
    if masked and "attention_mask" in arguments:
        config = getattr(model, "config", None)
        if getattr(config, "pad_token_id", None) == 0 and not inputs.is_floating_point():
            options["attention_mask"] = (inputs != 0).long()
    return options


@lru_cache(maxsize=64)
def _arguments(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def _row_chunks(model: nn.Module, inputs: Tensor) -> list[slice]:
    """Cut a batch by rows so that about `SCORED_LOGITS` logits exist at once, at least one row."""
    rows = max(1, scored_positions(model) // inputs.shape[1])
    return [slice(start, start + rows) for start in range(0, inputs.shape[0], rows)]


def _vocabulary(model: nn.Module) -> int:
    head = getattr(model, "lm_head", None)
    if size := getattr(head, "out_features", None):
        return int(size)
    config = getattr(model, "config", None)
    return int(getattr(config, "vocab_size", None) or 1 << 16)
