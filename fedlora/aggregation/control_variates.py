"""SCAFFOLD: control variates against the drift of clients whose data differ. NumPy only.

Algorithm 1 of arXiv:1910.06378, option II. With x what a round starts from, y_k what client k made
of it in K steps at the learning rate lr, c the server's control variate and c_k the client's:

    each step   y = y - lr (gradient + c - c_k)
    client      c_k' = c_k - c + (x - y_k) / (K lr)       its mean gradient of this round
    server      c' = c + (participants / N) mean(c_k' - c_k)

A client whose own optimum lies elsewhere is pulled there by c_k's expectation of itself, and the
correction takes that out: where FedAvg stops between its clients' optima at a place that depends on
the number of local steps, this does not.

The paper weights clients equally. Here ``p = weight / total weight`` stands for 1 / N, so that c
stays the mean of all c_k under the weights that the factors are averaged with:
``c' = c + sum p_k (c_k' - c_k)``. With equal weights that is the line above.

c is a flat row a factor in `ServerState.method_state`, and moves in rounds that upload the factor.
c has to stay the mean of all c_k: what is missing from it pulls x away for good. A reply that is
lost on its way leaves c behind by that client's share of the change, which is small once a run has
settled; clients that have lost their c_k begin at zero, and then c has to, too (`without_control`).

c_k never leaves its client; only its change does. That is ``(x - y_k) / (K lr) - c``: it tells the
server nothing that the factors, the steps and the learning rate do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from fedlora.adapter import Array
from fedlora.aggregation.method import Broadcast, ClientProfile, Method, ServerState, Update
from fedlora.errors import ConfigError, FederationError, RunError
from fedlora.flat import Segment, segments_of

__all__ = ["PREFIX", "with_control_variates", "without_control"]

PREFIX = "control."  # of its keys in the state's method_state: PREFIX + "A"


def with_control_variates(method: Method) -> Method:
    """Return `method` with SCAFFOLD's control variates: twice the bytes up, and more down.

    Its broadcasts have `control`, its local rule says how to use it, and its aggregate needs
    `Update.control` of every update. Clients have to train by plain SGD (`require_plain_sgd`).

    Raises `ConfigError` unless the clients go on from the mean of all that they train; the returned
    aggregate raises `FederationError` for an update without a row of the right size, and `RunError`
    for a state of another adapter.
    """
    shares_all = all(method.trained(round) <= method.shared for round in (1, 2))
    if not method.continues or not method.linear or not shares_all:
        raise ConfigError(
            "control variates: expected a method whose clients go on from the plain mean of all "
            f"that they train, such as fedit, ffa-lora or rolora, found {method.name}; remove "
            "control_variates, or choose one of these"
        )

    def broadcast(state: ServerState, profile: ClientProfile) -> Broadcast:
        sent = method.broadcast(state, profile)
        segments = segments_of(sent.trainable, method.uploaded(state.round + 1))
        return replace(sent, control=_read(state, segments))

    def aggregate(state: ServerState, updates: Iterable[Update]) -> ServerState:
        segments = segments_of(state.trainable, method.uploaded(state.round + 1))
        changes = _Changes(sum(segment.size for segment in segments))
        after = method.aggregate(state, changes.passing(updates))
        moved = _read(state, segments) + changes.share_of(state.total_weight)
        kept = dict(after.method_state) | {
            PREFIX + factor: moved[places].astype("<f4")
            for factor, places in _places(segments).items()
        }
        return replace(after, method_state=kept)

    return replace(
        method,
        name=f"{method.name}+scaffold",
        aggregate=aggregate,
        broadcast=broadcast,
        local=replace(method.local, correction="scaffold"),
    )


def without_control(state: ServerState) -> ServerState:
    """Return a state whose control variate is zero again, as those of clients that begin anew."""
    kept = {k: v for k, v in state.method_state.items() if not k.startswith(PREFIX)}
    return replace(state, method_state=kept)


class _Changes:
    """The weighted sum of the clients' changes, taken while the method reads their updates."""

    def __init__(self, size: int) -> None:
        self._sum: npt.NDArray[np.float64] = np.zeros(size)
        self._weight = 0.0

    def passing(self, updates: Iterable[Update]) -> Iterator[Update]:
        for update in updates:
            if update.control is None or update.control.shape != self._sum.shape:
                found = "none" if update.control is None else str(update.control.shape)
                raise FederationError(
                    f"client {update.client_id!r}: expected the change of its control variate as "
                    f"a row of {self._sum.shape}, found {found}"
                )
            yield update
            # After the method has looked at the update: its weight is a number over 0 then.
            self._sum += update.control.astype(np.float64) * update.num_examples
            self._weight += update.num_examples

    def share_of(self, total: float) -> npt.NDArray[np.float64]:
        """Return the sum over the weight of all clients; of those seen, where it is not known."""
        return self._sum / max(total, self._weight)


def _places(segments: Sequence[Segment]) -> dict[str, npt.NDArray[np.bool_]]:
    """Return by factor which numbers of a row are its."""
    return {
        factor: np.concatenate([np.full(s.size, s.factor == factor) for s in segments])
        for factor in sorted({segment.factor for segment in segments})
    }


def _read(state: ServerState, segments: Sequence[Segment]) -> Array:
    """Return the server's control variate as a row; it starts at zero."""
    row = np.zeros(sum(segment.size for segment in segments), np.float32)
    for factor, places in _places(segments).items():
        found = state.method_state.get(PREFIX + factor)
        if found is None:
            continue
        expected = int(places.sum())
        if found.shape != (expected,):
            raise RunError(
                f"control variate {PREFIX + factor!r}: expected ({expected},), found "
                f"{found.shape}; it belongs to another adapter"
            )
        row[places] = found
    return row
