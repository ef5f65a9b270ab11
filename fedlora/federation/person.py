"""What a client does in a run's last stage: `fedlora.personalization` on a device, by any trainer.

It trains its own adapter from zero and its personal one on top of the global adapter, evaluates
base, own, global and personal on its held-out examples, and keeps the global and the personal one
in its state. Batches, steps and rules are those of a simulation, so a client in torch has its
numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from fedlora.adapter import Adapter, LoraLayer
from fedlora.aggregation import Broadcast
from fedlora.errors import FederationError, NonFiniteError, UnsupportedError
from fedlora.federation.evaluate import EvaluateTask, Scores
from fedlora.federation.kept_factors import KIND
from fedlora.federation.own_rows import OwnRows
from fedlora.flat import RowForm
from fedlora.training import LocalRule, TrainConfig, TrainResult

__all__ = ["Part", "Person", "PersonTrainer", "compare_adapters", "provenance_of"]

Part = Literal["validation", "test"]


class PersonTrainer(Protocol):
    """What of a `fedlora.federation.Trainer` this needs."""

    @property
    def rank(self) -> int | None: ...

    @property
    def initial(self) -> Adapter: ...

    def train(
        self,
        broadcast: Broadcast,
        config: TrainConfig,
        rule: LocalRule,
        round: int | str,
        seed: int,
    ) -> TrainResult: ...

    def evaluate(self, adapter: Adapter, part: Part) -> Mapping[str, float] | None: ...


@dataclass(frozen=True, slots=True)
class Person:
    """One client's result: `scores` has each adapter's measures on held-out examples."""

    scores: Scores | None  # None: there are no held-out examples
    shared: Adapter  # the global adapter, whole
    personal: Adapter  # whole
    kept_global: bool | None = None  # whether it serves the global one; None: not asked

    def metrics(self) -> dict[str, Any]:
        """Return what the device notes beside its personal adapter."""
        return {
            "scores": {name: dict(values) for name, values in (self.scores or {}).items()},
            "kept_global": self.kept_global,
        }


def compare_adapters(
    task: EvaluateTask, trainer: PersonTrainer, own_rows: OwnRows | None = None
) -> Person:
    """Train the own and the personal adapter of this client, and evaluate all four.

    own_rows: where the client keeps what it has trained and not shared; the personal adapter goes
    on from that.

    Raises `NonFiniteError` when a training or an evaluation diverges, `UnsupportedError` for a kind
    of personalization that a device cannot serve, `FederationError` for ranks over the client's.
    """
    order, seed = task.order, task.order.seed
    if order.kind != "personal":
        raise UnsupportedError(
            f"personalization.kind: expected 'personal' on devices, found {order.kind!r}, which "
            "needs both adapters in every request"
        )
    initial, start = _limited(trainer.initial, trainer.rank), _start(task, own_rows)
    require_rank(start, trainer.rank)
    shared, frozen = task.broadcast.whole, task.broadcast.frozen
    longer = replace(order.train, local_steps=order.own_steps)
    own = trainer.train(Broadcast(initial), longer, LocalRule(), "own", seed).adapter
    rule = LocalRule(proximal_weight=order.proximal_weight)
    trained = trainer.train(Broadcast(start, frozen), order.train, rule, "personal", seed).adapter
    personal = Broadcast(trained, frozen).whole
    kept_global = _is_worse(trainer, personal, shared) if order.keep_better else None
    if kept_global:
        personal = shared
    adapters = {"base": initial, "own": own, "global": shared, "personal": personal}
    scores: dict[str, Mapping[str, float]] = {}
    for name, adapter in adapters.items():
        found = trainer.evaluate(adapter, "test")
        if found is None:
            return Person(None, shared, personal, kept_global)
        scores[name] = found
    return Person(scores, shared, personal, kept_global)


def provenance_of(task: EvaluateTask) -> dict[str, Any]:
    """Return what is noted beside the global adapter, as the server notes it."""
    order = task.order
    return {"run": order.name, "round": order.round, "method": order.method}


def require_rank(adapter: Adapter, rank: int | None) -> None:
    """Raise `FederationError` when an adapter to train is of a higher rank than this client's."""
    if rank is not None and max(adapter.ranks) > rank:
        raise FederationError(
            f"expected an adapter of rank {rank} at most, which this client can train, found rank "
            f"{max(adapter.ranks)}; use a method for mixed ranks, or raise the node config's rank"
        )


def _start(task: EvaluateTask, own_rows: OwnRows | None) -> Adapter:
    """Return what the personal adapter begins with: with the client's own factors, if it has any.

    Somebody who never took part has none.
    """
    if not task.order.kept or own_rows is None:
        return task.start
    form = RowForm.of(task.start, task.order.kept)
    row = own_rows.read(KIND, form.segments, task.order.round + 1)
    return task.start if row is None else form.read(row.tobytes())


def _is_worse(trainer: PersonTrainer, personal: Adapter, shared: Adapter) -> bool:
    """Whether the global adapter serves this client better on its validation examples.

    Without any, or with a tie, the personal adapter stays.
    """
    before, after = _loss(trainer, shared), _loss(trainer, personal)
    return before is not None and after is not None and after > before


def _loss(trainer: PersonTrainer, adapter: Adapter) -> float | None:
    try:
        found = trainer.evaluate(adapter, "validation")
    except NonFiniteError:
        return math.inf
    return None if found is None else found["loss"]


def _limited(adapter: Adapter, rank: int | None) -> Adapter:
    """Return the first `rank` directions of A₀: what a client of that rank begins with."""
    if rank is None or max(adapter.ranks) <= rank:
        return adapter

    def cut(layer: LoraLayer) -> LoraLayer:
        return replace(layer, A=layer.A[:rank], B=layer.B[:, :rank])

    return adapter.map(cut)
