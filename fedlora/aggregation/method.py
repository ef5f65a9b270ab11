"""What a federated method is: a frozen value of pure functions, state in, state out. NumPy only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from fedlora.adapter import Adapter, Array, LoraLayer, stack
from fedlora.errors import FederationError, UnsupportedError
from fedlora.training import Factor, LocalRule

__all__ = ["Broadcast", "ClientProfile", "Method", "ServerState", "Update", "checked"]


@dataclass(frozen=True, slots=True)
class Update:
    """What one client returns in one round: what it trained, never the frozen part."""

    adapter: Adapter
    num_examples: float  # the client's weight in the mean
    client_id: str


@dataclass(frozen=True, slots=True)
class ServerState:
    """Everything that a server needs to go on after a crash."""

    round: int  # rounds done; 0 at the start
    trainable: Adapter  # what clients train on
    frozen: Adapter | None = None  # the part of the global adapter that they do not train
    method_state: Mapping[str, Array] = field(default_factory=dict)  # moments, control variates

    @classmethod
    def start(cls, adapter: Adapter) -> ServerState:
        """Return the state before round 1."""
        return cls(0, adapter)

    @property
    def adapter(self) -> Adapter:
        """The whole global adapter: this is evaluated, saved and released."""
        return self.broadcast.whole

    @property
    def broadcast(self) -> Broadcast:
        """What a client of the global adapter's own rank receives."""
        return Broadcast(self.trainable, self.frozen)


@dataclass(frozen=True, slots=True)
class ClientProfile:
    """What the server knows of a client before a round."""

    client_id: str
    rank: int | None = None  # None: the global adapter's
    num_examples: float | None = None


@dataclass(frozen=True, slots=True)
class Broadcast:
    """What a client receives: ``stack([trainable, frozen])`` is the state's adapter."""

    trainable: Adapter
    frozen: Adapter | None = None

    @property
    def whole(self) -> Adapter:
        """The adapter that a client serves with: trainable and frozen part together."""
        return self.trainable if self.frozen is None else stack([self.trainable, self.frozen])


@dataclass(frozen=True, slots=True)
class Method:
    """A federated LoRA method.

    `aggregate` consumes its updates once, in one pass; it never changes its arguments.
    """

    name: str
    trained: Callable[[int], frozenset[Factor]]  # by round, 1-based
    shared: frozenset[Factor]  # what leaves the device
    aggregate: Callable[[ServerState, Iterable[Update]], ServerState]
    broadcast: Callable[[ServerState, ClientProfile], Broadcast]
    local: LocalRule
    exact: bool  # the result equals Σ p_k s_k B_k A_k
    linear: bool  # a sum of client vectors suffices: secure aggregation and central DP allowed
    # The next trainable adapter is the mean of what clients made of this one, in the same factors,
    # and nothing else of the state hangs on it. Only then is "mean minus this one" a direction in
    # which a server optimizer may go further. False for methods that factor anew, begin anew, or
    # keep a residual that fits their mean alone; a method has to claim it.
    continues: bool = False

    def rule(self, round: int) -> LocalRule:
        """Return what a trainer is told in `round`."""
        return replace(self.local, trained=self.trained(round))

    def uploaded(self, round: int) -> frozenset[Factor]:
        """Return the factors that leave a device in `round`: those trained and shared."""
        return self.trained(round) & self.shared


def checked(state: ServerState, updates: Iterable[Update], method: str) -> Iterator[Update]:
    """Yield `updates`, each with the global adapter's layout and a positive weight.

    Raises `LayerMismatchError`, `ShapeMismatchError`, `FederationError` or `UnsupportedError`, each
    naming the client.
    """
    for update in updates:
        if not 0 < update.num_examples < float("inf"):
            raise FederationError(
                f"client {update.client_id!r}: expected num_examples > 0 and finite, found "
                f"{update.num_examples!r}"
            )
        if update.adapter.config.uses_dora:
            raise UnsupportedError(
                f"client {update.client_id!r}: {method} averages A and B alone, DoRA has a "
                "magnitude; use variant 'lora'"
            )
        made_of = update.adapter.made_of
        # What was made of a row in the form of the global adapter has its layout and scalings.
        if made_of is None or made_of[0].like is not state.trainable:
            who = f"client {update.client_id!r}"
            state.trainable.require_same_layout(update.adapter, who)
            for path, layer in update.adapter.layers.items():
                _require_same_scaling(state.trainable[path], layer, f"{who}, layer {path!r}")
        yield update


def _require_same_scaling(expected: LoraLayer, found: LoraLayer, where: str) -> None:
    if found.scaling != expected.scaling:
        raise FederationError(
            f"{where}: expected scaling {expected.scaling:g} as the server has, found "
            f"{found.scaling:g}; factors can only be averaged under one scaling"
        )
