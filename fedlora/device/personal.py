"""A device owner's own adapter: trained on their data, judged on what was held out, and kept if it
is better than what is served.

Everything stays in the state folder: the adapter, and the numbers that it was judged by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from fedlora.adapter import Adapter
from fedlora.data import draw_batches
from fedlora.device.buckets import Batch
from fedlora.device.owner_data import OwnerData
from fedlora.device.scoring import Scored, evaluate
from fedlora.store import Store
from fedlora.training import TrainConfig, TrainResult

__all__ = ["Personalized", "Swapped", "Trains", "evaluate_all", "personalize"]

Measures: TypeAlias = Mapping[str, float]


class Swapped(Scored, Protocol):
    """A `fedlora.device.Session`."""

    def swap(self, adapter: Adapter | None) -> object:
        """Serve another adapter; None is the base."""


class Trains(Protocol):
    """A `fedlora.device.Trainer`."""

    def fit(
        self,
        batches: Iterable[Batch],
        config: TrainConfig,
        *,
        init: Adapter | None = None,
        seed: int = 0,
        num_examples: int | None = None,
        progress: Callable[[int, float], None] | None = None,
    ) -> TrainResult:
        """Train an adapter."""


@dataclass(frozen=True, slots=True)
class Personalized:
    """What a personalization did."""

    kept: bool  # whether the new adapter is served now; False: what was there stays
    replaced: str  # what was served before: "personal", "global" or "base"
    before: Measures  # of that on the held-out examples
    after: Measures  # of the new adapter on the same
    train_loss: float  # mean over the steps
    steps: int
    train_examples: int
    held_out_examples: int


def personalize(
    store: Store,
    session: Swapped,
    trainer: Trains,
    data: OwnerData,
    config: TrainConfig,
    *,
    from_base: bool = False,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> Personalized:
    """Train from the installed global adapter, or from the base, and keep what is better.

    The new adapter is committed when its held-out loss is below that of what is served now: an
    older personal adapter if there is one, whose own training may have seen examples that are held
    out this time. The state is locked throughout. The session is left with what is then served.

    Raises what `Store`, `Trainer.fit` and `evaluate` do; the state then stays as it was.
    """
    with store.lock():
        status = store.status()
        replaced = "personal" if status.personal else "global" if status.installed else "base"
        served = store.serving()
        session.swap(served)
        before = evaluate(session, data.held_out, "personalize")
        result = trainer.fit(
            draw_batches(data.train, config, seed, "owner", "personal"),
            config,
            init=None if from_base else store.global_adapter(),
            seed=seed,
            num_examples=len(data.train),
            progress=progress,
        )
        session.swap(result.adapter)
        after = evaluate(session, data.held_out, "personalize")
        done = Personalized(
            kept=after["loss"] < before["loss"],
            replaced=replaced,
            before=before,
            after=after,
            train_loss=result.loss,
            steps=result.steps,
            train_examples=len(data.train),
            held_out_examples=len(data.held_out),
        )
        if done.kept:
            metrics = {
                "before": dict(before),
                "after": dict(after),
                "train_loss": result.loss,
                "steps": result.steps,
                "train_examples": done.train_examples,
                "held_out_examples": done.held_out_examples,
            }
            store.commit_personal(result.adapter, metrics, from_base=from_base)
        else:
            session.swap(served)
        return done


def evaluate_all(store: Store, session: Swapped, data: OwnerData) -> dict[str, Measures]:
    """Return the held-out measures of the base, and of the adapters that there are.

    The session is left with what the state serves.
    """
    adapters = {
        "base": None,
        "global": store.global_adapter(),
        "personal": store.personal_adapter(),
    }
    found: dict[str, Measures] = {}
    for name, adapter in adapters.items():
        if name == "base" or adapter is not None:
            session.swap(adapter)
            found[name] = evaluate(session, data.held_out, f"evaluate, {name}")
    session.swap(store.serving())
    return found
