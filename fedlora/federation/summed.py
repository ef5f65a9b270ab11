"""Go on from the sum of a cohort alone, as a noised or secure sum gives it.

A linear method's result depends on nothing but the mean of what its clients trained. So one made-up
update that is that mean gives the same result, and whatever the method does with it is
post-processing.
"""

from __future__ import annotations

from fedlora.adapter import Array
from fedlora.aggregation import Method, ServerState, Update
from fedlora.errors import UnsupportedError
from fedlora.flat import RowForm, pack
from fedlora.low_rank import Matrix
from fedlora.training import Factor

__all__ = ["aggregate_mean", "sent_row"]


def sent_row(method: Method, state: ServerState) -> Array:
    """Return the factors that the next round uploads, as they are sent: ``(n,)`` float32."""
    return pack(state.trainable, RowForm.of(state.trainable, _uploaded(method, state)).segments)


def aggregate_mean(method: Method, state: ServerState, difference: Matrix) -> ServerState:
    """Return the state after a round whose clients differ from `sent_row` by this on average.

    difference: ``(n,)`` float64. Raises `UnsupportedError` for a method that is not linear, and
    `NonFiniteError` for numbers that are not finite.
    """
    if not method.linear:
        raise UnsupportedError(
            f"method {method.name!r}: expected a linear one, which needs no more than a sum"
        )
    form = RowForm.of(state.trainable, _uploaded(method, state))
    row = sent_row(method, state) + difference
    adapter = form.read(row.astype("<f4").tobytes())
    return method.aggregate(state, [Update(adapter, 1.0, "the cohort's mean")])


def _uploaded(method: Method, state: ServerState) -> frozenset[Factor]:
    return method.uploaded(state.round + 1)
