"""What one client's single update says of its inputs, as linear algebra.

Of a linear layer with ``y = W x + s B A x`` and the loss's gradients g at its outputs, one step
changes the factors by

    dA ~ sum_i (B' g_i) x_i'        (rank, in)
    dB ~ sum_i g_i (A x_i)'         (out, rank)

So after one step on one input the top right singular vector of dA *is* that input, up to its length
and sign; with as many inputs as the rank or fewer, all of them lie in its row space. While B is
zero, dA is zero. Where A is frozen (FFA-LoRA), dB says ``A x`` and no more: of x the part in the
row space of A, about ``sqrt(rank / in)`` of its length. So an update that is seen alone needs
secure aggregation, or noise of its own.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedlora.low_rank import Matrix

__all__ = ["best_match", "leading_inputs", "seen_through", "share_in_span"]

_Array = npt.NDArray[np.floating]


def leading_inputs(change: _Array, count: int = 1) -> Matrix:
    """Return the top `count` right singular vectors ``(count, in)`` of a change of a factor.

    Fewer, if its rank is less; none of a zero one. The first is the reconstruction of an input.
    """
    values, right = np.linalg.svd(np.asarray(change, np.float64), full_matrices=False)[1:]
    found: Matrix = right[: min(count, int(_nonzero(values).sum()))]
    return found


def seen_through(A: _Array, seen: _Array) -> Matrix:
    """Return the shortest inputs ``(n, in)`` that a frozen `A` makes ``seen (n, rank)`` of."""
    found: Matrix = np.asarray(seen, np.float64) @ np.linalg.pinv(np.asarray(A, np.float64)).T
    return found


def best_match(recovered: _Array, inputs: _Array) -> float:
    """Return the largest absolute cosine between `recovered` ``(n, in)`` and `inputs` ``(m, in)``.

    0.0 where one of them has no direction.
    """
    cosines = np.abs(_units(recovered) @ _units(inputs).T)
    return float(cosines.max(initial=0.0))


def share_in_span(change: _Array, inputs: _Array) -> float:
    """Return how much of the inputs ``(m, in)`` lies in the row space of ``change (r, in)``.

    The mean over inputs of the length of their projection over their own; `chance` is
    ``sqrt(r / in)`` for a change that has nothing to do with them.
    """
    span = leading_inputs(change, min(change.shape))
    units = _units(inputs)
    return float(np.linalg.norm(units @ span.T, axis=1).mean()) if len(units) else 0.0


def _units(rows: _Array) -> Matrix:
    """Return the rows with length one; rows of zeros are left out."""
    wide = np.asarray(rows, np.float64)
    lengths = np.linalg.norm(wide, axis=1)
    found: Matrix = wide[lengths > 0] / lengths[lengths > 0, None]
    return found


def _nonzero(values: Matrix) -> npt.NDArray[np.bool_]:
    """Whether each singular value, the largest first, is more than float32's rounding."""
    found: npt.NDArray[np.bool_] = values > 1e-6 * values[:1].max(initial=0.0)
    return found
