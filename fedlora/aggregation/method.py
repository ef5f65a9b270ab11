"""What a federated method is: a frozen value of pure functions, state in, state out. NumPy only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from fedlora.adapter import Adapter, Array, stack
from fedlora.errors import FederationError, ShapeMismatchError, UnsupportedError
from fedlora.training import Factor, LocalRule

__all__ = ["Broadcast", "ClientProfile", "Method", "ServerState", "Update", "checked"]


@dataclass(frozen=True, slots=True)
class Update:
    """What one client returns in one round: what it trained, never the frozen part."""

    adapter: Adapter
    num_examples: float  # the client's weight in the mean
    client_id: str
    # Only with control variates: how the client's own has changed, ``(n,)`` float32, as the
    # uploaded factors lie in a row (`fedlora.flat`).
    control: Array | None = None


@dataclass(frozen=True, slots=True)
class ServerState:
    """Everything that a server needs to go on after a crash."""

    round: int  # rounds done; 0 at the start
    trainable: Adapter  # what clients train on
    frozen: Adapter | None = None  # the part of the global adapter that they do not train
    method_state: Mapping[str, Array] = field(default_factory=dict)  # moments, control variates
    # Of all clients that may be sampled, as updates are weighted; 0: not known. It is told anew
    # whenever a run starts or is resumed.
    total_weight: float = field(default=0.0, compare=False)

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
    rank: int | None = None  # that it trains at most; None: the global adapter's
    num_examples: float | None = None


@dataclass(frozen=True, slots=True)
class Broadcast:
    """What a client receives: ``stack([trainable, frozen])`` is the state's adapter."""

    trainable: Adapter
    frozen: Adapter | None = None
    # The server's control variate, ``(n,)`` float32, as the round's uploaded factors lie in a row.
    control: Array | None = field(default=None, compare=False)

    @property
    def whole(self) -> Adapter:
        """The adapter that a client serves with: trainable and frozen part together."""
        return self.trainable if self.frozen is None else stack([self.trainable, self.frozen])


@dataclass(frozen=True, slots=True)
class Method:
    """A federated LoRA method.

    `aggregate` consumes its updates once, in one pass; it never changes its arguments. The last
    fields have defaults, so that a method of one's own needs none of them.
    """

    name: str
    trained: Callable[[int], frozenset[Factor]]  # by round, 1-based
    shared: frozenset[Factor]  # what leaves the device
    aggregate: Callable[[ServerState, Iterable[Update]], ServerState]
    broadcast: Callable[[ServerState, ClientProfile], Broadcast]
    local: LocalRule
    exact: bool  # the result equals Σ p_k s_k B_k A_k
    linear: bool  # a sum of client vectors suffices: secure aggregation and central DP allowed
    any_rank: bool = False  # clients may differ in rank and scaling
    summary: str = ""  # when to use it, for the table of methods
    paper: str = ""  # arXiv number
    # Keys of `method_state`, a number a layer each, whose largest goes into the round's record.
    noted: tuple[str, ...] = ()
    # Whether `broadcast` looks at more of a profile than its rank. If not, it is asked once a round
    # and rank, and all clients of that rank share what it gives.
    broadcasts_by_client: bool = False
    # The next trainable adapter is the mean of what clients made of this one, in the same factors,
    # and nothing else of the state hangs on it. Only then is "mean minus this one" a direction in
    # which a server optimizer may go further. False for methods that factor anew, begin anew, or
    # keep a residual that fits their mean alone; a method has to claim it.
    continues: bool = False

    def rule(self, round: int) -> LocalRule:
        """Return what a trainer is told in `round`."""
        return replace(self.local, trained=self.trained(round))

    def kept(self, round: int) -> frozenset[Factor]:
        """Return the factors that clients train in `round` and keep to themselves."""
        return self.trained(round) - self.shared - {"magnitude"}

    def uploaded(self, round: int) -> frozenset[Factor]:
        """Return the factors that leave a device in `round`: those trained and shared."""
        return self.trained(round) & self.shared


def checked(
    state: ServerState, updates: Iterable[Update], method: str, *, any_rank: bool = False
) -> Iterator[Update]:
    """Yield `updates`, each with the global adapter's layout and a positive weight.

    With `any_rank` ranks may differ, and scalings too as long as they are over 0. Raises
    `LayerMismatchError`, `ShapeMismatchError`, `FederationError` or `UnsupportedError`, each naming
    the client.
    """
    for update in updates:
        who = f"client {update.client_id!r}"
        if not 0 < update.num_examples < float("inf"):
            raise FederationError(
                f"{who}: expected num_examples > 0 and finite, found {update.num_examples!r}"
            )
        if update.adapter.config.uses_dora or state.trainable.config.uses_dora:
            raise UnsupportedError(
                f"{who}: {method} averages A and B alone, DoRA has a magnitude; use variant 'lora'"
            )
        made_of = update.adapter.made_of
        # What was made of a row in the form of the global adapter has its layout and scalings.
        if made_of is None or made_of[0].like is not state.trainable:
            _require_layout(state.trainable, update.adapter, who, method, any_rank)
        yield update


def _require_layout(
    expected: Adapter, found: Adapter, who: str, method: str, any_rank: bool
) -> None:
    expected.require_same_layout(found, who, ranks=False)
    for path, layer in found.layers.items():
        mine, where = expected[path], f"{who}, layer {path!r}"
        if any_rank:
            if min(layer.scaling, mine.scaling) <= 0:
                raise FederationError(
                    f"{where}: expected scalings > 0, found {layer.scaling:g}, and "
                    f"{mine.scaling:g} on the server"
                )
        elif layer.rank != mine.rank:
            raise ShapeMismatchError(
                f"{where}: expected A {mine.A.shape} and B {mine.B.shape}, found A "
                f"{layer.A.shape} and B {layer.B.shape}; {method} needs equal ranks, {_MIXED}"
            )
        elif layer.scaling != mine.scaling:
            raise FederationError(
                f"{where}: expected scaling {mine.scaling:g} as the server has, found "
                f"{layer.scaling:g}; factors can only be averaged under one scaling, {_MIXED}"
            )


# Named here and not looked up: the registry imports this module. A test holds them together.
_MIXED = "use flexlora, flora or hetlora for mixed ones"
