"""How well an adapter does on one client's held-out examples."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from torch import nn

from fedlora.adapter import Adapter
from fedlora.data import Examples, eval_batches
from fedlora.errors import ConfigError, DataError, NonFiniteError
from fedlora.nn import Task, load_adapter_into

__all__ = ["evaluate"]

# Positions in one forward pass. Texts share a row there, and attention grows with its square: on
# tiny-chat 256 is 1.6 times as fast as 2048.
TEXT_POSITIONS, FEATURE_POSITIONS = 256, 8192


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
    if len(examples) == 0:
        raise DataError(f"{who}: expected held-out examples to evaluate on, found none")
    load_adapter_into(model, adapter)
    sums: Counter[str] = Counter()
    positions = TEXT_POSITIONS if examples.is_text else FEATURE_POSITIONS
    for batch in eval_batches(examples, positions):
        sums.update(task.score(model, batch))
    if "nats" not in sums or not {"tokens", "examples"} & sums.keys():
        raise ConfigError(
            f"task {task.name!r}: expected its score to return 'nats' and 'tokens' or 'examples', "
            f"found {', '.join(sorted(sums)) or 'nothing'}"
        )
    characters = None if examples.characters is None else int(examples.characters.sum())
    values = _measures(sums, characters)
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


def _measures(sums: Mapping[str, float], characters: int | None) -> dict[str, float]:
    """Turn sums into means; a sum that is not known here is divided by the number of targets."""
    rest = dict(sums)
    nats, word_starts = rest.pop("nats"), rest.pop("word_starts", 0)
    targets = rest.pop("tokens") if "tokens" in rest else rest.pop("examples")
    values = {"loss": nats / targets}
    if "tokens" in sums:
        values["perplexity"] = math.exp(min(values["loss"], 700.0))
        for name in ("top1", "top3"):
            if name in rest:
                values[name] = rest.pop(name) / word_starts if word_starts else 0.0
        if characters:
            values["bits_per_character"] = nats / math.log(2) / characters
    if "correct" in rest:
        values["accuracy"] = rest.pop("correct") / targets
    return values | {name: value / targets for name, value in rest.items()}
