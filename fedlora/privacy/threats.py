"""Who could learn what from a run, as sentences that follow from what the run did.

A report and the documentation show the same ones. They are about people who follow the protocol
and look at all that they get; nothing here is about a server or a device that lies.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from fedlora.privacy.accounting import rounded_up

__all__ = ["Facts", "Threat", "threats"]


@dataclass(frozen=True, slots=True)
class Facts:
    """What of a run decides who learns what; `mechanism` None: no differential privacy."""

    uploaded: Collection[str]  # factors that leave a device, in any round
    kept: Collection[str] = ()  # factors that are trained and stay on the device
    mechanism: Literal["central", "local"] | None = None
    epsilon: float | None = None
    delta: float | None = None
    secure_aggregation: bool = False
    personalized: bool = True  # whether people train an adapter of their own


@dataclass(frozen=True, slots=True)
class Threat:
    """One observer, and what it could learn or not."""

    who: Literal["server", "another client", "thief of the device"]
    learns: tuple[str, ...]
    does_not: tuple[str, ...]


def threats(facts: Facts) -> tuple[Threat, ...]:
    """Return what an honest but curious server, another client, and a thief could learn.

    >>> [found.who for found in threats(Facts(uploaded="AB"))]
    ['server', 'another client', 'thief of the device']
    """
    return _server(facts), _client(facts), _thief(facts)


def _server(facts: Facts) -> Threat:
    learns = ["Who takes part in which round, and when their devices are reachable."]
    does_not = ["The examples themselves: they never leave a device."]
    if facts.mechanism == "local":
        learns.append(
            f"From each update, no more than {_budget(facts)} allows: the device has clipped and "
            "noised it before it was sent."
        )
    elif facts.secure_aggregation:
        learns.append("The sum of each cohort's updates, before any noise is added to it.")
        does_not.append(
            "Any single update: updates are masked, and only their sum can be opened, as long as "
            "fewer clients than the threshold work together with the server."
        )
    else:
        learns.append(
            "Each client's update in every round, in clear"
            + (
                "; the noise is added after it has seen them, so it has to be trusted."
                if facts.mechanism == "central"
                else "."
            )
        )
        learns.append(_read_off(facts))
    if facts.kept:
        does_not.append(
            f"The factors {', '.join(sorted(facts.kept))} that people train and keep to themselves."
        )
    return Threat("server", tuple(learns), tuple(does_not))


def _client(facts: Facts) -> Threat:
    learns = ["Every round's global adapter that it is sent, and the one that is released."]
    does_not = ["Any other client's update, or who else takes part."]
    if facts.mechanism is None:
        learns.append(
            "What these say of others' data, without any limit that could be stated: with few "
            "clients a round's change is nearly one person's update."
        )
    else:
        learns.append(
            f"Of any one person no more than {_budget(facts)} allows, all rounds together, "
            "whatever else it knows."
        )
    return Threat("another client", tuple(learns), tuple(does_not))


def _thief(facts: Facts) -> Threat:
    learns = [
        "Whatever lies on the device in clear: the owner's examples, where the application keeps "
        "them, and the global adapter."
    ]
    does_not = ["Other people's data, beyond what the global adapter says of them."]
    if facts.personalized:
        learns.append(
            "The owner's personal adapter, which was trained on the owner's data alone and without "
            "noise, and may repeat parts of it word for word; no budget covers it, since it is "
            "meant for the owner. Keep the storage encrypted."
        )
    if facts.kept:
        learns.append(
            f"The owner's private factors {', '.join(sorted(facts.kept))}, for the same reason."
        )
    return Threat("thief of the device", tuple(learns), tuple(does_not))


def _read_off(facts: Facts) -> str:
    if "A" in facts.uploaded:
        return (
            "From an update of A after one step on one example, the input of the adapted layer "
            "itself, exactly; with more examples and steps, mixtures of inputs."
        )
    return (
        "From an update of B after one step on one example, the input of the adapted layer as the "
        "frozen A lets it through: a part of it, about the root of rank over inputs."
    )


def _budget(facts: Facts) -> str:
    epsilon = (
        "its epsilon" if facts.epsilon is None else f"epsilon {rounded_up(facts.epsilon, 2):.6g}"
    )
    return epsilon if facts.delta is None else f"{epsilon} at delta {facts.delta:g}"
