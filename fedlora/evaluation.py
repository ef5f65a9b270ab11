"""How well adapters do on clients' held-out examples, one at a time or many at once.

`evaluate_many` gains by two things. An adapter that is asked for on enough data is added to the
weights for the time being (`fedlora.nn.serving`). And where a client has only a few examples, many
clients share a pass, each with its own adapter (`fedlora.nn.batched`).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from fedlora.adapter import Adapter
from fedlora.data import Examples, collate, eval_batches
from fedlora.errors import ConfigError, DataError, NonFiniteError
from fedlora.metrics import means_of
from fedlora.nn import Batch, Task, load_adapter_into
from fedlora.nn.batched import LayerStack, batched_layers, why_not_batched
from fedlora.nn.inject import lora_modules
from fedlora.nn.local import evaluating
from fedlora.nn.serving import serving
from fedlora.nn.tasks import scored_positions

__all__ = [
    "FEATURE_POSITIONS",
    "TEXT_POSITIONS",
    "Trial",
    "evaluate",
    "evaluate_many",
    "measured",
    "require_examples",
]

# Positions in one forward pass. Texts share a row there, and attention grows with its square; more
# rows than 512 gain nothing on tiny-chat, and with 2048 the activations leave the cache.
TEXT_POSITIONS, FEATURE_POSITIONS = 512, 8192
SPARE = 1.3  # a group's passes may be this much larger than its data, by padding


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """An adapter and the examples to evaluate it on; `who` opens an error's text."""

    adapter: Adapter
    examples: Examples
    who: str


def evaluate(
    model: nn.Module, adapter: Adapter, examples: Examples, task: Task, who: str
) -> dict[str, float]:
    """Return the task's measures of `adapter` on `examples`; the model is left with that adapter.

    Always ``loss`` (nats per counted target). Next-token: ``perplexity``, ``bits_per_character``,
    ``top1`` and ``top3`` (share of word starts whose next token is the likeliest, or one of the
    three likeliest). Classification: ``accuracy``. `who` opens an error's text.

    Raises `DataError` without examples, `NonFiniteError` when the loss is not finite, and
    `ConfigError` when a task of the user's own does not score what it has to.
    """
    require_examples(examples, who)
    load_adapter_into(model, adapter)
    return measured(_scored(model, examples, task), examples, task, who)


def evaluate_many(
    model: nn.Module, trials: Sequence[Trial], task: Task, *, together: bool = True
) -> list[dict[str, float] | NonFiniteError]:
    """Return what `evaluate` returns for each trial up to rounding, or the error it raises.

    Trials with the same adapter (the same object) are evaluated together, wherever they stand. The
    model's factors are left as any of the adapters. Without `together`, with a task that has no
    `scores`, and for few examples of different adapters on layers that cannot be batched, no pass
    holds examples of two trials.

    Raises `DataError` and `ConfigError` as `evaluate` does.
    """
    for trial in trials:
        require_examples(trial.examples, trial.who)
    found: dict[int, Mapping[str, float]] = {}
    single: list[int] = []  # few examples, and an adapter that no other trial has
    for same in _by_adapter(trials):
        few, many = _by_size(same, trials, model, task, together)
        if not many and len(few) == 1:
            single += few
            continue
        with serving(model, trials[same[0]].adapter):
            found |= {k: _scored(model, trials[k].examples, task) for k in many}
            found |= _scored_together(model, few, trials, task)
    modules = lora_modules(model)
    if why_not_batched(modules) is None:
        for group in _groups(single, trials, model):
            device = next(iter(modules.values())).lora_A.device
            stacks = {
                path: LayerStack([trials[k].adapter[path] for k in group], frozenset(), device)
                for path in modules
            }
            with evaluating(model), batched_layers(modules, stacks):
                found |= _scored_at_once(model, group, trials, task)
    else:
        for k in single:
            with serving(model, trials[k].adapter):
                found[k] = _scored(model, trials[k].examples, task)
    return [_measured_or_error(found[k], trial, task) for k, trial in enumerate(trials)]


def _measured_or_error(
    sums: Mapping[str, float], trial: Trial, task: Task
) -> dict[str, float] | NonFiniteError:
    try:
        return measured(sums, trial.examples, task, trial.who)
    except NonFiniteError as error:
        return error


def require_examples(examples: Examples, who: str) -> None:
    """Raise `DataError` without examples; `who` opens its text."""
    if len(examples) == 0:
        raise DataError(f"{who}: expected held-out examples to evaluate on, found none")


def _by_adapter(trials: Sequence[Trial]) -> list[list[int]]:
    groups: dict[int, list[int]] = defaultdict(list)
    for k, trial in enumerate(trials):
        groups[id(trial.adapter)].append(k)
    return list(groups.values())


def _by_size(
    indices: Sequence[int],
    trials: Sequence[Trial],
    model: nn.Module,
    task: Task,
    together: bool,
) -> tuple[list[int], list[int]]:
    """Divide trials into those that can share a pass and those that fill one by themselves."""
    few: list[int] = []
    many: list[int] = []
    for k in indices:
        examples = trials[k].examples
        is_small = 2 * _positions(examples) <= _most(examples, model)
        can_share = is_small and together and task.scores is not None
        (few if can_share else many).append(k)
    return few, many


def _positions(examples: Examples) -> int:
    """Positions of all examples in one batch, padding included."""
    return len(examples) * int(examples.lengths.max())


def _most(examples: Examples, model: nn.Module) -> int:
    """Positions that one pass may have."""
    if not examples.is_text:
        return FEATURE_POSITIONS
    return min(TEXT_POSITIONS, scored_positions(model))


def _groups(
    indices: Sequence[int], trials: Sequence[Trial], model: nn.Module
) -> Iterator[list[int]]:
    """Divide trials into groups of one pass, in which each has as many rows, and those as wide.

    Sorted by size, so that little of a pass is padding.
    """
    group: list[int] = []
    rows = width = data = 0
    for k in sorted(indices, key=lambda k: (_positions(trials[k].examples), k)):
        examples = trials[k].examples
        mine = len(examples), int(examples.lengths.max())
        size = max(rows, mine[0]) * max(width, mine[1]) * (len(group) + 1)
        total = data + mine[0] * mine[1]
        if group and (size > _most(examples, model) or size > SPARE * total):
            yield group
            group, rows, width, total = [], 0, 0, mine[0] * mine[1]
        group.append(k)
        rows, width, data = max(rows, mine[0]), max(width, mine[1]), total
    if group:
        yield group


def _scored_together(
    model: nn.Module, indices: Sequence[int], trials: Sequence[Trial], task: Task
) -> dict[int, Mapping[str, float]]:
    """Sums of trials with one adapter, which the model serves already."""
    found: dict[int, Mapping[str, float]] = {}
    for group in _groups(indices, trials, model):
        found |= _scored_at_once(model, group, trials, task)
    return found


def _scored_at_once(
    model: nn.Module, group: Sequence[int], trials: Sequence[Trial], task: Task
) -> dict[int, Mapping[str, float]]:
    """Sums of a group's trials from one pass."""
    assert task.scores is not None  # asked for by `_by_size`
    batches = [_whole(trials[k].examples) for k in group]
    return dict(zip(group, task.scores(model, batches), strict=True))


def _whole(examples: Examples) -> Batch:
    return collate(examples, np.arange(len(examples)))


def _scored(model: nn.Module, examples: Examples, task: Task) -> Mapping[str, float]:
    """Sums of one client's examples with what the model carries."""
    sums: Counter[str] = Counter()
    positions = TEXT_POSITIONS if examples.is_text else FEATURE_POSITIONS
    for batch in eval_batches(examples, positions):
        sums.update(task.score(model, batch))
    return sums


def measured(
    sums: Mapping[str, float], examples: Examples, task: Task, who: str
) -> dict[str, float]:
    """Turn a task's sums over `examples` into its measures; raises as `evaluate` does."""
    if "nats" not in sums or not {"tokens", "examples"} & sums.keys():
        raise ConfigError(
            f"task {task.name!r}: expected its score to return 'nats' and 'tokens' or 'examples', "
            f"found {', '.join(sorted(sums)) or 'nothing'}"
        )
    characters = None if examples.characters is None else int(examples.characters.sum())
    values = means_of(sums, characters)
    if not math.isfinite(values["loss"]):
        raise NonFiniteError(
            f"{who}: the held-out loss is {values['loss']}; lower the learning rate"
        )
    if task.metric not in values:
        raise ConfigError(
            f"task {task.name!r}: expected its score to give its metric {task.metric!r}, found "
            f"{', '.join(sorted(values))}"
        )
    return values
