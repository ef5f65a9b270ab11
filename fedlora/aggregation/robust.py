"""Robust rules: what a few clients send does not decide what all of them get. NumPy only.

A rule changes a round's updates before the method aggregates them:

    median         coordinate-wise median                     arXiv:1803.01498, definition 1
    trimmed-mean   coordinate-wise mean without the ends      arXiv:1803.01498, definition 2
    multi-krum     the updates nearest to their neighbours    arXiv:1703.02757
    norm-bound     changes scaled down to a bound             arXiv:1911.07963
    max-share      no client weighs more than a share

Malformed updates (NaN, other shapes, absurd numbers) never come here: a server drops each with its
reason. Rules are for updates that look like others. They hold all updates of a round in memory, all
but "norm-bound" with a number and without `max_share`, and they read single updates, so that a
method under a rule is not linear: secure aggregation hides what a rule must see.

**Factors or products.** An update changes s B A, and different A, B can have the same product.
"norm-bound" and "multi-krum" measure changes of the product by its factors
(`fedlora.aggregation.product_space`), and go in front of every method. The median and the trimmed
mean are taken coordinate by coordinate of A and of B, since the product's coordinates would need
matrices of (out, in). This means something only where a mean of factors does: all clients started
from the same factors, so that coordinate (i, j) is the same thing for all of them. Methods that are
not a mean of factors refuse the two. Their limits: the product of two medians is not the median of
the products, a rotation of the rank changes the result, and where clients differ by nature (few
examples of each class) the median leaves out what only a few of them know.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedlora.adapter import Adapter, Array
from fedlora.aggregation.method import ClientProfile, Method, ServerState, Update, checked
from fedlora.aggregation.options import build_named, require_number, require_whole
from fedlora.aggregation.product_space import Reach, moved_by, reach, squared_distances
from fedlora.errors import ConfigError, TooFewUpdatesError
from fedlora.flat import RowForm, RowReader
from fedlora.training import Factor

__all__ = ["RULES", "fewest_updates", "with_rule"]

_COLUMNS = 1 << 16  # coordinates that are sorted at a time

_Received: TypeAlias = tuple[Adapter, Update]  # what was sent to a client, what it made of it
# (state, uploaded factors, what was received) to the updates that the method aggregates
_Change: TypeAlias = Callable[
    [ServerState, frozenset[Factor], Iterable[_Received]], Iterable[Update]
]


@dataclass(frozen=True, slots=True)
class _Rule:
    change: _Change
    of_factors: bool = False  # needs a method that is a mean of factors
    fewest: int = 1  # updates in a round


def with_rule(method: Method, name: str, **options: Any) -> Method:
    """Return `method` with a robust rule in front of its aggregation; see each rule's function.

    The rule's result does not depend on the order in which updates come in, where it holds them
    all. Options that change nothing (share 0, a huge bound, max_share 1) give the plain method's
    bits. Combines with `with_server_optimizer`, which goes around it.

    Raises `UnknownNameError`, and `ConfigError` for an option or a method that does not go with it;
    the returned aggregate raises `TooFewUpdatesError` when a round cannot keep the rule's promise.
    """
    rule = build_named("robust rule", RULES, name, options)
    if method.local.correction is not None:
        raise ConfigError(
            f"robust rule {name!r}: expected a method without control variates, found "
            f"{method.name}; the rule looks at factors, and one client's control variate would "
            "move everyone's next round past it"
        )
    if rule.of_factors and not method.linear:
        raise ConfigError(
            f"robust rule {name!r}: expected a method that averages factors, such as fedit, "
            f"ffa-lora or rolora, found {method.name}; use 'norm-bound' or 'multi-krum', which "
            "measure products"
        )

    def aggregate(state: ServerState, updates: Iterable[Update]) -> ServerState:
        uploaded = method.uploaded(state.round + 1)
        changed = rule.change(state, uploaded, _received(method, state, updates))
        return method.aggregate(state, changed)

    return replace(
        method, name=f"{method.name}+{name}", aggregate=aggregate, exact=False, linear=False
    )


def fewest_updates(name: str, **options: Any) -> int:
    """Return the updates that a round must bring for a rule; raises as `with_rule` does."""
    return build_named("robust rule", RULES, name, options).fewest


def median() -> _Rule:
    """Coordinate-wise median of the uploaded factors (arXiv:1803.01498, definition 1).

    Of an even number of clients it is the mean of the middle two. The clients' weights are not
    looked at: they are what clients say of themselves. Bounded by the honest clients' values as
    long as these are more than half.
    """

    def change(
        state: ServerState, factors: frozenset[Factor], received: Iterable[_Received]
    ) -> list[Update]:
        return _column_by_column(state, factors, received, lambda rows: np.median(rows, axis=0))

    return _Rule(change, of_factors=True)


def trimmed_mean(share: float = 0.2) -> _Rule:
    """Coordinate-wise mean without the `share` largest and the `share` smallest values.

    arXiv:1803.01498, definition 2. Of K clients ``ceil(share K)`` are left out at each end, at most
    so many that one or two remain. The clients' weights are not looked at, as in the paper. Bounded
    by the honest clients' values as long as the others are at most that share.
    """
    require_number("share", share, 0.0, 0.5, "a number in [0, 0.5)")

    def change(
        state: ServerState, factors: frozenset[Factor], received: Iterable[_Received]
    ) -> list[Update]:
        held = _held(received)
        count = len(held)
        # 0.1 * 30 is a little over 3.
        cut = max(0, min(math.ceil(share * count - 1e-9), (count - 1) // 2))
        if not cut:  # the method's own mean, which may go on from float64 (FedSVD)
            return [replace(update, num_examples=1.0) for _, update in held]

        def mean(rows: Array) -> npt.NDArray[np.float64]:
            rows = np.partition(rows, (cut, count - cut - 1), axis=0)[cut : count - cut]
            # In float64, as the methods' own mean is.
            return np.asarray(np.sum(rows, axis=0, dtype=np.float64) / len(rows))

        return _column_by_column(state, factors, held, mean)

    return _Rule(change, of_factors=True)


def multi_krum(attackers: int = 1, keep: int | None = None) -> _Rule:
    """Keep the `keep` updates that lie nearest to their neighbours (arXiv:1703.02757).

    An update's score is the sum of its squared distances to the ``K - attackers - 2`` nearest
    others (`product_space.squared_distances`); the `keep` lowest scores remain (default: ``K -
    attackers``) and count alike, whatever their weight. A round needs ``K >= 2 attackers + 3``
    updates, and is given up with `TooFewUpdatesError` when it has fewer: choose a cohort with room
    for clients that fail or are dropped, or attackers end the run by sending nothing. Time and
    memory grow as K^2. An attacker that stays near the others is kept: the rule bounds its
    distance, not its direction.
    """
    require_whole("attackers", attackers, 0)
    if keep is not None:
        require_whole("keep", keep, 1)
    fewest = max(2 * attackers + 3, keep or 1)

    def change(
        state: ServerState, factors: frozenset[Factor], received: Iterable[_Received]
    ) -> list[Update]:
        held = _held(received)
        count = len(held)
        if 0 < count < fewest:
            raise TooFewUpdatesError(
                f"round {state.round + 1}: expected at least {fewest} updates for multi-krum with "
                f"attackers = {attackers}, found {count}"
            )
        if not held:
            return []
        squares = squared_distances([(sent, update.adapter) for sent, update in held])
        near = np.sort(squares, axis=1)[:, 1 : count - attackers - 1]  # the first is its own, 0
        best = np.argsort(near.sum(axis=1), kind="stable")[: keep or count - attackers]
        return [replace(held[place][1], num_examples=1.0) for place in sorted(best)]

    return _Rule(change, fewest=fewest)


def norm_bound(bound: float | str = "median", max_share: float | None = None) -> _Rule:
    """Scale changes down until none can move the product by more than `bound`.

    Norm clipping of updates (arXiv:1911.07963), for factors. An update that is out of
    bounds is drawn back on the line to what its client was sent, ``A0 + t (A - A0)`` and ``B0 + t
    (B - B0)``, and never towards zero. The bound is on its `product_space.Reach`, which is no less
    than its own change of s B A, and chosen so that the global product moves by at most `bound`
    too, for a mean of products and for a product of means. A norm of A's and B's change together
    would not do: the product of a small change with a large adapter is large.

    bound: in units of the Frobenius norm of s B A over all layers, or "median": of the reaches in
    this round, those of updates that change nothing left out.
    max_share: as of the rule "max-share". Without it an update in bounds counts with the weight
    that its client claims, which can be all.
    """
    if bound != "median":
        words = "'median' or a finite number > 0"
        require_number("bound", bound, np.nextafter(0, 1), np.inf, words)
    if max_share is not None:
        _require_share(max_share)

    def change(
        state: ServerState, factors: frozenset[Factor], received: Iterable[_Received]
    ) -> Iterator[Update]:
        if max_share is not None:
            held = _held(received)
            capped = _capped([update for _, update in held], max_share)
            received = [(sent, update) for (sent, _), update in zip(held, capped, strict=True)]
        if not isinstance(bound, str):
            for sent, update in received:
                yield _bounded(sent, update, reach(sent, update.adapter), bound)
            return
        held = _held(received)
        reaches = [reach(sent, update.adapter) for sent, update in held]
        positive = [found.whole for found in reaches if found.whole > 0]
        limit = float(np.median(positive)) if positive else 0.0
        for (sent, update), found in zip(held, reaches, strict=True):
            yield _bounded(sent, update, found, limit)

    return _Rule(change)


def max_share(share: float = 0.2) -> _Rule:
    """Cap weights so that no client has more than `share` of the round's sum.

    The largest weights are lowered to one common value. Where ``share K <= 1`` all weigh the same.
    It bounds what a client gains by claiming many examples, and nothing else.
    """
    _require_share(share)

    def change(
        state: ServerState, factors: frozenset[Factor], received: Iterable[_Received]
    ) -> list[Update]:
        return _capped([update for _, update in _held(received)], share)

    return _Rule(change)


RULES: Mapping[str, Callable[..., _Rule]] = {
    "max-share": max_share,
    "median": median,
    "multi-krum": multi_krum,
    "norm-bound": norm_bound,
    "trimmed-mean": trimmed_mean,
}


def _received(method: Method, state: ServerState, updates: Iterable[Update]) -> Iterator[_Received]:
    """Yield what each client was sent with its update, which must have the same layout."""
    for update in updates:
        ranks = update.adapter.ranks
        rank = None if ranks == state.trainable.ranks else max(ranks)
        profile = ClientProfile(update.client_id, rank, update.num_examples)
        sent = method.broadcast(state, profile).trainable
        yield from (
            (sent, right)
            for right in checked(replace(state, trainable=sent), [update], method.name)
        )


def _held(received: Iterable[_Received]) -> list[_Received]:
    """Hold a round's updates, sorted: sums of them do not depend on who answered first."""
    return sorted(received, key=lambda item: item[1].client_id)


def _column_by_column(
    state: ServerState,
    factors: frozenset[Factor],
    received: Iterable[_Received],
    reduce: Callable[[Array], npt.NDArray[Any]],
) -> list[Update]:
    """Return one update: `reduce`, (K, columns) to (columns,), of the clients' factors."""
    row_of = RowReader(state.trainable, factors)
    rows = np.array([row_of(update.adapter) for _, update in _held(received)])
    if not len(rows):
        return []
    # The methods' mean of this one update, of weight 1, is that update to the last bit.
    middle = np.empty(row_of.size, dtype="<f4")
    for start in range(0, row_of.size, _COLUMNS):
        part = slice(start, start + _COLUMNS)
        middle[part] = reduce(rows[:, part])
    adapter = replace(RowForm.of(state.trainable, factors).read(middle.tobytes()))
    return [Update(adapter, 1.0, f"{len(rows)} clients together")]


def _bounded(sent: Adapter, update: Update, found: Reach, bound: float) -> Update:
    share = found.share_within(bound)
    if share == 1.0:
        return update
    return replace(update, adapter=moved_by(sent, update.adapter, share))


def _capped(updates: Sequence[Update], share: float) -> list[Update]:
    """Lower the largest weights to the one value c for which ``c = share sum(min(w, c))``."""
    weights = sorted((update.num_examples for update in updates), reverse=True)
    if share * len(weights) <= 1.0:
        return [replace(update, num_examples=1.0) for update in updates]
    cap = math.inf
    for lowered, weight in enumerate(weights):
        rest = math.fsum(weights[lowered:])
        # With `lowered` of them at c and the others as they are, c is this; if it holds, done.
        if share * lowered < 1.0:
            cap = share * rest / (1.0 - share * lowered)
            if weight <= cap:
                break
    return [
        replace(update, num_examples=cap) if update.num_examples > cap else update
        for update in updates
    ]


def _require_share(value: object) -> None:
    positive = np.nextafter(0, 1)
    require_number("max_share", value, positive, np.nextafter(1, 2), "a share in (0, 1]")
