"""What a list of `PrivacyEvent` costs: ε at a δ, and the noise for an ε.

Three accountants:

    pld    privacy loss distributions of `dp-accounting`, on a grid of 1e-4; the default
    rdp    Rényi divergences of `dp-accounting`, at its default orders; never below pld by more
           than rounding, and the only one for a fixed cohort drawn without replacement
    exact  the closed form of `fedlora.privacy.exact`, where everyone takes part in every round

`pld` asked for events with a fixed cohort answers by `rdp` (and by `exact` beyond all guarantees,
where ε is in the millions): `accountant_used` says which, and its answer belongs beside an ε.

**Noise and sensitivity.** An event's noise multiplier z is the noise's standard deviation over the
clipping norm C. Adding or removing a person moves the sum by C at the most. Replacing one (a fixed
cohort) moves it by 2 C, so the noise is only z/2 of the sensitivity. `dp-accounting` does not do
this halving: the multiplier of its `SampledWithoutReplacementDpEvent` is "the ratio of the standard
deviation to the l2-sensitivity of the function" (its `_compute_rdp_sample_wor_gaussian`), and its
cost of one Gaussian is order/(2 multiplier²) under replace-one as under add-or-remove-one. So we
hand it z/2. Its own n = 1000, k = 100, multiplier 1, T = 100, δ = 1e-5 → ε = 14.05 is therefore our
z = 2; our z = 1 costs 83.94. (It is no slack of the bound alone: at z = 1 two data sets exist, all
others at +C and one at +C or −C, between which ε is at least 31.37; see the tests.)

Events are grouped before they are composed, so a thousand equal rounds take one composition.
"""

from __future__ import annotations

import functools
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from fedlora.errors import ConfigError, MissingExtraError
from fedlora.privacy.events import PrivacyEvent
from fedlora.privacy.exact import gaussian_delta, gaussian_epsilon

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

__all__ = [
    "ACCOUNTANTS",
    "Accountant",
    "accountant_used",
    "calibrate",
    "delta_of",
    "epsilon_of",
    "grouped",
    "neighboring_relation",
    "rounded_up",
]

Accountant = Literal["pld", "rdp", "exact"]
ACCOUNTANTS: tuple[Accountant, ...] = ("pld", "rdp", "exact")

INTERVAL = 1e-4  # of the grid on which pld keeps privacy losses
# Of that grid at the most, two seconds' work: a coarser one still bounds ε from above.
POINTS = 1_000_000
# At an interval beyond it ε is in the millions. pld's arithmetic ends there, and the closed form
# answers, without what sampling gains.
COARSEST = 100.0
RELATIVE = 1e-4  # how closely `calibrate` comes to the least noise


def epsilon_of(events: Iterable[PrivacyEvent], delta: float, accountant: str = "pld") -> float:
    """Return the ε that `events` cost together at `delta`; infinite where there is no noise.

    Raises `ConfigError` for an unknown accountant, a delta outside (0, 1), events of different
    neighboring relations, and "exact" where not everyone takes part.
    """
    return _epsilon(events, delta, accountant, INTERVAL)


def delta_of(events: Iterable[PrivacyEvent], epsilon: float, accountant: str = "pld") -> float:
    """Return the δ that `events` cost together at `epsilon` >= 0. Raises as `epsilon_of` does."""
    if not 0 <= epsilon < math.inf:
        raise ConfigError(f"epsilon: expected a finite number >= 0, found {epsilon!r}")
    groups, used = _prepared(events, accountant)
    if not groups:
        return 0.0
    if any(group.noise_multiplier == 0 for group in groups):
        return 1.0
    if used == "exact":
        return gaussian_delta(_mu(groups), epsilon)
    if used == "rdp":
        from dp_accounting.rdp.rdp_privacy_accountant import compute_delta

        orders, divergences = _divergences(groups)
        return float(compute_delta(orders, divergences, epsilon)[0])
    return float(_losses(groups, INTERVAL).get_delta_for_epsilon(epsilon))


def accountant_used(events: Iterable[PrivacyEvent], accountant: str = "pld") -> Accountant:
    """Return the accountant that answers for `events` when `accountant` is asked.

    Raises as `epsilon_of` does.
    """
    return _prepared(events, accountant)[1]


def neighboring_relation(events: Iterable[PrivacyEvent]) -> str:
    """Return the one relation of all events ("add-or-remove-one" of none), or raise ConfigError."""
    found = {event.neighboring_relation for event in events}
    if len(found) > 1:
        raise ConfigError(
            "events: expected one neighboring relation, found add-or-remove-one and replace-one "
            "(fixed cohorts beside others), which do not add up; account for them apart"
        )
    return found.pop() if found else "add-or-remove-one"


def rounded_up(epsilon: float, decimals: int) -> float:
    """Return an ε to show, with so many decimals: never less than what it is.

    >>> rounded_up(8.0001, 2)
    8.01
    """
    return math.ceil(epsilon * 10**decimals) / 10**decimals if math.isfinite(epsilon) else epsilon


def grouped(events: Iterable[PrivacyEvent]) -> tuple[PrivacyEvent, ...]:
    """Return the events with equal ones merged into one `count`, in an order of their own.

    Those that cost nothing (no count, nobody sampled, infinite noise) are left out.
    """
    counts: Counter[PrivacyEvent] = Counter()
    for event in events:
        if event.count and _probability(event) and event.noise_multiplier < math.inf:
            counts[replace(event, count=1)] += event.count
    merged = (replace(event, count=count) for event, count in counts.items())
    return tuple(sorted(merged, key=_place))


def calibrate(
    epsilon: float,
    delta: float,
    rounds: int,
    event_with_multiplier: Callable[[float], PrivacyEvent],
    accountant: str = "pld",
) -> float:
    """Return the least noise multiplier at which `rounds` such events cost at most `epsilon`.

    It is found by bisection (with secant steps) to a relative 1e-4, and from above: the result
    never costs more. event_with_multiplier: the event of one round, by its noise multiplier.

    Raises `ConfigError` when no amount of noise is enough, and as `epsilon_of` does.
    """
    if not 0 < epsilon < math.inf:
        raise ConfigError(f"epsilon: expected a finite number > 0, found {epsilon!r}")
    if rounds < 1:
        raise ConfigError(f"rounds: expected a whole number >= 1, found {rounds!r}")

    def cost(multiplier: float, interval: float = INTERVAL) -> float:
        event = event_with_multiplier(multiplier)
        whole = replace(event, count=event.count * rounds)
        return _epsilon([whole], delta, accountant, interval)

    start, step = 1.0, 2.0
    if accountant_used([event_with_multiplier(1.0)], accountant) == "pld":
        # A grid ten times coarser takes a tenth of the time and comes close: what is left for the
        # fine one is to step over the border there.
        start = _least(lambda z: cost(z, 10 * INTERVAL), epsilon, start, step)
        step = 1 + RELATIVE * 0.8
    return _least(cost, epsilon, start, step)


def _least(cost: Callable[[float], float], epsilon: float, start: float, step: float) -> float:
    """Return the least multiplier of a cost <= epsilon, to RELATIVE and from above.

    cost falls with the multiplier. The search begins at `start` with steps of the factor `step`,
    squared each time, until the border lies between two points.
    """
    low = high = (start, cost(start))
    while high[1] > epsilon:
        if high[0] > 1e6:
            raise ConfigError(
                f"epsilon: {epsilon!r} cannot be kept by any noise; raise it or delta, or take "
                "fewer rounds"
            )
        low, high = high, (high[0] * step, cost(high[0] * step))
        step = min(step * step, 8.0)
    while low[1] <= epsilon:
        if low[0] < 1e-3:  # that costs a million, where it costs anything: no guarantee is asked
            return low[0]
        high, low = low, (low[0] / step, cost(low[0] / step))
        step = min(step * step, 8.0)
    wide = 0  # steps since the bracket last halved
    while high[0] > low[0] * (1 + RELATIVE):
        before = math.log(high[0] / low[0])
        multiplier = _between(low, high, epsilon) if wide < 2 else math.sqrt(low[0] * high[0])
        found = (multiplier, cost(multiplier))
        low, high = (found, high) if found[1] > epsilon else (low, found)
        wide = wide + 1 if math.log(high[0] / low[0]) > before / 2 else 0
    return high[0]


def _epsilon(
    events: Iterable[PrivacyEvent], delta: float, accountant: str, interval: float
) -> float:
    """Return `epsilon_of`; interval: of the grid of pld."""
    _require_delta(delta)
    groups, used = _prepared(events, accountant)
    if not groups:
        return 0.0
    if any(group.noise_multiplier == 0 for group in groups):
        return math.inf
    if used == "exact":
        return gaussian_epsilon(_mu(groups), delta)
    if used == "rdp":
        orders, divergences = _divergences(groups)
        return float(_dp_accounting().rdp.compute_epsilon(orders, divergences, delta)[0])
    return max(0.0, float(_losses(groups, interval).get_epsilon_for_delta(delta)))


def _prepared(
    events: Iterable[PrivacyEvent], accountant: str
) -> tuple[tuple[PrivacyEvent, ...], Accountant]:
    """Return the groups and the accountant for them."""
    if accountant not in ACCOUNTANTS:
        raise ConfigError(
            f"accountant: expected one of {', '.join(ACCOUNTANTS)}, found {accountant!r}"
        )
    events = tuple(events)
    neighboring_relation(events)
    groups = grouped(events)
    if accountant == "exact":
        if sampled := [group for group in groups if not _everyone(group)]:
            raise ConfigError(
                "accountant: expected pld or rdp where a cohort is drawn, found exact, which holds "
                f"only if everyone takes part (here the probability is "
                f"{_probability(sampled[0]):g})"
            )
        return groups, "exact"
    if accountant == "rdp" or any(g.sampling == "fixed" and not _everyone(g) for g in groups):
        return groups, "rdp"
    noisy = all(group.noise_multiplier for group in groups)
    return groups, "exact" if noisy and _interval(groups) > COARSEST else "pld"


def _probability(event: PrivacyEvent) -> float:
    if event.sampling == "all":
        return 1.0
    if event.cohort is not None and event.population is not None and event.sampling == "fixed":
        return event.cohort / event.population
    return event.sampling_probability


def _everyone(event: PrivacyEvent) -> bool:
    return _probability(event) == 1


def _relative(event: PrivacyEvent) -> float:
    """Return the noise's standard deviation over the sensitivity (see the module's text)."""
    halved = event.neighboring_relation == "replace-one"
    return event.noise_multiplier / 2 if halved else event.noise_multiplier


def _place(event: PrivacyEvent) -> tuple[Any, ...]:
    sizes = (event.population or 0, event.cohort or 0)
    return event.sampling, event.noise_multiplier, event.sampling_probability, *sizes


def _mu(groups: Sequence[PrivacyEvent]) -> float:
    """Return the root of the sum of (sensitivity / standard deviation)²."""
    return math.sqrt(math.fsum(group.count / _relative(group) ** 2 for group in groups))


def _losses(groups: Sequence[PrivacyEvent], interval: float) -> PrivacyLossDistribution:
    """Return the privacy loss distribution of all groups on a grid of `interval`, or a coarser."""
    everyone = [group for group in groups if _everyone(group)]
    drawn = [group for group in groups if not _everyone(group)]
    interval = max(interval, _interval(groups))
    parts = []
    if everyone:  # Gaussians compose to a Gaussian
        parts.append(_loss(1 / _mu(everyone), 1.0, interval))
    for group in drawn:
        one = _loss(_relative(group), _probability(group), interval)
        parts.append(one.self_compose(group.count))
    return functools.reduce(lambda left, right: left.compose(right), parts)


@functools.lru_cache(maxsize=4)  # up to 16 MB each
def _loss(deviation: float, probability: float, interval: float) -> PrivacyLossDistribution:
    """Return the privacy loss distribution of one release; most of what an ε takes is this."""
    build = _dp_accounting().pld.privacy_loss_distribution.from_gaussian_mechanism
    return build(
        standard_deviation=deviation,
        sampling_prob=probability,
        value_discretization_interval=interval,
    )


def _interval(groups: Sequence[PrivacyEvent]) -> float:
    """Return INTERVAL, or a coarser one where the losses would need more than POINTS of a grid.

    That is where ε is large: a composed loss lies about ten deviations around its mean.
    """
    spread = square = 0.0
    for group in groups:
        z, q = _relative(group), _probability(group)
        many = 1 / z**2
        if q < 1:
            spread = max(spread, 1 / (2 * z * z) + 10 / z)  # of one round
            # arXiv:1911.11607: many rounds tend to a Gaussian of this μ².
            many = min(many, q * q * math.expm1(1 / z**2)) if z > 0.05 else many
        square += many * group.count
    spread = max(spread, square / 2 + 10 * math.sqrt(square))
    return max(INTERVAL, 2 * spread / POINTS)


def _divergences(groups: Sequence[PrivacyEvent]) -> tuple[Any, Any]:
    """Return (orders, Rényi divergences of all groups at them)."""
    found = [(_divergence(replace(group, count=1)), group.count) for group in groups]
    orders = found[0][0][0]
    return orders, sum(one * count for (_, one), count in found)


@functools.lru_cache(maxsize=64)
def _divergence(event: PrivacyEvent) -> tuple[Any, Any]:
    """Return (orders, Rényi divergences of one release at them)."""
    import numpy as np

    dp = _dp_accounting()
    gaussian = dp.GaussianDpEvent(_relative(event))
    relation = dp.NeighboringRelation.ADD_OR_REMOVE_ONE
    release: Any = gaussian
    if event.sampling == "fixed" and not _everyone(event):
        relation = dp.NeighboringRelation.REPLACE_ONE
        release = dp.SampledWithoutReplacementDpEvent(event.population, event.cohort, gaussian)
    elif not _everyone(event):
        release = dp.PoissonSampledDpEvent(event.sampling_probability, gaussian)
    accountant = dp.rdp.RdpAccountant(neighboring_relation=relation)
    # It warns of every order at which its series did not converge, and gives infinity there.
    log = logging.getLogger("absl")
    before, log.disabled = log.disabled, True
    try:
        accountant.compose(release)
    finally:
        log.disabled = before
    found = np.asarray(accountant.rdp, dtype=np.float64)
    # dp-accounting takes a negative divergence (rounding, where the order is high and the noise
    # small) as an ε of zero. What is not a divergence must not decide: that order is left out.
    return accountant.orders, np.where(found >= 0, found, np.inf)


def _between(low: tuple[float, float], high: tuple[float, float], epsilon: float) -> float:
    """Return a multiplier between the two, near where the line through them reaches epsilon.

    Each is (multiplier, cost), and the line is straight in both logarithms. The point lies a third
    of RELATIVE to the side of the end that is farther, so that both ends close in.
    """
    x, y = math.log(low[0]), math.log(high[0])
    if not (math.isfinite(low[1]) and high[1] > 0):
        return math.exp((x + y) / 2)
    part = math.log(low[1] / epsilon) / math.log(low[1] / high[1])
    at = x + part * (y - x)
    at += RELATIVE / 3 if at - x < y - at else -RELATIVE / 3
    margin = RELATIVE / 10
    return math.exp(min(max(at, x + margin), y - margin))


def _require_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ConfigError(f"delta: expected a number in (0, 1), found {delta!r}")


@functools.cache
def _dp_accounting() -> Any:
    """Import `dp-accounting` where it is needed: it brings SciPy, and takes two seconds."""
    try:
        import dp_accounting
        import dp_accounting.pld
        import dp_accounting.rdp
    except ModuleNotFoundError:
        raise MissingExtraError("accounting for privacy", "privacy") from None
    return dp_accounting
