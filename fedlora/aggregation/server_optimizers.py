"""Server optimizers: go on from the clients' mean as if it were a gradient. NumPy only.

The pseudo-gradient of a round is ``D = mean - x``: the method's new trainable adapter minus the one
that it started from, on the factors that this round uploads. With moments m and v that stay on the
server, coordinate by coordinate:

    momentum   m = b1 m + D                       x = x + lr m                arXiv:1909.06335
    adagrad    v = v + D^2                        x = x + lr m / (sqrt(v) + tau)
    adam       v = b2 v + (1 - b2) D^2            x = x + lr m / (sqrt(v) + tau)
    yogi       v = v - (1 - b2) D^2 sign(v - D^2) x = x + lr m / (sqrt(v) + tau)

The last three are FedAdagrad, FedAdam and FedYogi (arXiv:2003.00295, algorithm 2), where
``m = b1 m + (1 - b1) D``; m starts at 0 and v at tau^2, and there is no correction of their bias.

Only where the next trainable adapter is the mean of what clients made of the last one
(`Method.continues`) does D point anywhere. A method that factors anew (FedSVD, FlexLoRA) turns the
basis of its factors every round, so that moments would add up coordinates of different things; one
that begins anew (FLoRA) or pads (HetLoRA) has no x to go on from; and FedEx-LoRA's residual belongs
to the mean itself. All these are refused.

On LoRA, D is that of A and of B apart, as the methods themselves average them. Moments of a factor
move only in rounds that upload it: RoLoRA's A does not decay while B is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedlora.adapter import Array
from fedlora.aggregation.method import Method, ServerState, Update
from fedlora.aggregation.options import build_named, require_number
from fedlora.errors import ConfigError, NonFiniteError, RunError
from fedlora.flat import RowForm, pack
from fedlora.training import Factor

__all__ = ["PREFIX", "SERVER_OPTIMIZERS", "with_server_optimizer"]

PREFIX = "server_optimizer."  # of its keys in the state's method_state: PREFIX + "m.A"

_Row: TypeAlias = npt.NDArray[np.float64]
# (x, mean, moments before) to (x after, moments after), all rows in float64
_Step: TypeAlias = Callable[[_Row, _Row, Mapping[str, _Row]], tuple[_Row, dict[str, _Row]]]


@dataclass(frozen=True, slots=True)
class _Optimizer:
    start: Mapping[str, float]  # of each moment, in every coordinate
    step: _Step


def with_server_optimizer(
    method: Method,
    name: str,
    *,
    share_in: Callable[[int], float] = lambda round: 1.0,
    **options: Any,
) -> Method:
    """Return `method` with a server optimizer behind its mean.

    share_in: of the learning rate that a round has, by its number from 1: a schedule.

    name: "momentum" (learning_rate=1.0, beta1=0.9), "adam" or "yogi" (learning_rate=0.01,
    beta1=0.9, beta2=0.99, tau=1e-3), or "adagrad" (learning_rate=0.01, beta1=0, tau=1e-3). Rates
    are per round. An adaptive step is about ``learning_rate`` in every coordinate whose changes are
    well over ``tau``, whatever their size: set it to what a round should change, and ``tau`` to
    what counts as no change.

    The moments are flat rows in `ServerState.method_state`, float32, one a factor; they are read
    and written with the checkpoint, so that a resumed run takes the same steps bit for bit.
    "momentum" with learning_rate 1 and beta1 0 is the plain method, bit for bit.

    Raises `UnknownNameError`, and `ConfigError` for an option or a method that does not go with it;
    the returned aggregate raises `RunError` for moments of another adapter, and `NonFiniteError`
    when a step leaves the range of float32.
    """
    optimizer = build_named("server optimizer", SERVER_OPTIMIZERS, name, options)
    if not method.continues:
        raise ConfigError(
            f"server optimizer {name!r}: expected a method whose clients go on from the mean of "
            f"their factors, such as fedit, ffa-lora or rolora, found {method.name}, which factors "
            "or begins anew every round; remove the server optimizer"
        )

    def aggregate(state: ServerState, updates: Iterable[Update]) -> ServerState:
        after = method.aggregate(state, updates)
        round = state.round + 1
        return _moved(state, after, method.uploaded(round), optimizer, name, share_in(round))

    return replace(method, name=f"{method.name}+{name}", aggregate=aggregate, exact=False)


def momentum(learning_rate: float = 1.0, beta1: float = 0.9) -> _Optimizer:
    """FedAvgM (arXiv:1909.06335): the mean keeps going where it went before."""
    _check(learning_rate, beta1)

    def step(x: _Row, mean: _Row, before: Mapping[str, _Row]) -> tuple[_Row, dict[str, _Row]]:
        change = mean - x
        kept = beta1 * before["m"]
        # x + lr (kept + change), written from the mean, so that lr = 1 and beta1 = 0 leave it as
        # it is to the last bit.
        after = mean + (learning_rate - 1.0) * change + learning_rate * kept
        return after, {"m": kept + change}

    return _Optimizer({"m": 0.0}, step)


def adam(
    learning_rate: float = 0.01, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3
) -> _Optimizer:
    """FedAdam (arXiv:2003.00295, algorithm 2)."""
    return _adaptive(
        learning_rate, beta1, beta2, tau, lambda v, square: beta2 * v + (1 - beta2) * square
    )


def yogi(
    learning_rate: float = 0.01, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3
) -> _Optimizer:
    """FedYogi (arXiv:2003.00295, algorithm 2): v moves by the size of D^2, not by its ratio."""
    return _adaptive(
        learning_rate,
        beta1,
        beta2,
        tau,
        lambda v, square: v - (1 - beta2) * square * np.sign(v - square),
    )


def adagrad(learning_rate: float = 0.01, beta1: float = 0.0, tau: float = 1e-3) -> _Optimizer:
    """FedAdagrad (arXiv:2003.00295, algorithm 2): v only grows. beta1 = 0 is plain Adagrad."""
    return _adaptive(learning_rate, beta1, 0.0, tau, lambda v, square: v + square)


SERVER_OPTIMIZERS: Mapping[str, Callable[..., _Optimizer]] = {
    "adagrad": adagrad,
    "adam": adam,
    "momentum": momentum,
    "yogi": yogi,
}


def _adaptive(
    learning_rate: float,
    beta1: float,
    beta2: float,
    tau: float,
    second: Callable[[_Row, _Row], _Row],
) -> _Optimizer:
    _check(learning_rate, beta1)
    require_number("beta2", beta2, 0.0, 1.0, "a number in [0, 1)")
    require_number("tau", tau, np.nextafter(0, 1), np.inf, "a finite number > 0")

    def step(x: _Row, mean: _Row, before: Mapping[str, _Row]) -> tuple[_Row, dict[str, _Row]]:
        change = mean - x
        m = beta1 * before["m"] + (1.0 - beta1) * change
        v = second(before["v"], np.square(change))
        return x + learning_rate * m / (np.sqrt(v) + tau), {"m": m, "v": v}

    return _Optimizer({"m": 0.0, "v": tau**2}, step)


def _check(learning_rate: float, beta1: float) -> None:
    positive = np.nextafter(0, 1)
    require_number("learning_rate", learning_rate, positive, np.inf, "a finite number > 0")
    require_number("beta1", beta1, 0.0, 1.0, "a number in [0, 1)")


def _moved(
    before: ServerState,
    after: ServerState,
    factors: frozenset[Factor],
    optimizer: _Optimizer,
    name: str,
    share: float,
) -> ServerState:
    """Return `after` with the step of `optimizer` in place of the mean in each of `factors`.

    share: of the step that is taken; the moments move by all of it.
    """
    trainable, kept = after.trainable, dict(after.method_state)
    for factor in sorted(factors):
        form = RowForm.of(before.trainable, [factor])
        if not form.size:  # without DoRA there is no magnitude
            continue
        x, mean = (
            pack(adapter, form.segments).astype(np.float64)
            for adapter in (before.trainable, after.trainable)
        )
        moment = partial(_moment, before, factor=factor, size=form.size, optimizer=name)
        moments = {key: moment(key, start=start) for key, start in optimizer.start.items()}
        row, moments = optimizer.step(x, mean, moments)
        if share != 1.0:
            row = x + share * (row - x)
        # What was computed in float64 is kept in float32, as the adapter itself.
        kept |= {_key(key, factor): _rounded(value) for key, value in moments.items()}
        like = RowForm.of(trainable, [factor])
        try:
            moved = like.read(_rounded(row).tobytes())
        except NonFiniteError as error:
            raise NonFiniteError(
                f"round {after.round}: server optimizer {name!r} left the range of float32, "
                f"{error}; lower its learning_rate"
            ) from None
        # A copy does not say what it was made of: else it would keep all rounds' adapters alive.
        trainable = replace(moved)
    return replace(after, trainable=trainable, method_state=kept)


def _moment(
    state: ServerState, key: str, *, factor: Factor, size: int, start: float, optimizer: str
) -> _Row:
    found = state.method_state.get(_key(key, factor))
    if found is None:
        return np.full(size, start)
    if found.shape != (size,):
        raise RunError(
            f"server optimizer {optimizer!r}: expected moment {_key(key, factor)!r} of ({size},), "
            f"found {found.shape}; it belongs to another adapter"
        )
    return found.astype(np.float64)


def _key(moment: str, factor: Factor) -> str:
    return f"{PREFIX}{moment}.{factor}"


def _rounded(row: _Row) -> Array:
    with np.errstate(over="ignore"):  # an infinity is refused when it is read
        return row.astype("<f4")
