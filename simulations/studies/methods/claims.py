"""What papers agree on, as contrasts that the runs can contradict."""

from __future__ import annotations

from dataclasses import dataclass

from simulations.studies.methods.evidence import Contrast, Term
from simulations.studies.methods.parts import MIDDLE, RANKS, SKEWS, map_point

__all__ = ["CLAIMS", "Claim"]

_TASKS = ("watch", "authors")
_STRONG = SKEWS[-1]


@dataclass(frozen=True, slots=True)
class Claim:
    """A sentence, who says so (arXiv numbers), and what follows from it for the runs."""

    title: str
    papers: str
    contrasts: tuple[Contrast, ...]


def _minus(method: str, other: str, point: str) -> tuple[Term, Term]:
    return (1.0, method, point), (-1.0, other, point)


def _growth(method: str, other: str, to: str, since: str) -> tuple[Term, ...]:
    """How much more `method` is ahead of `other` at `to` than at `since`."""
    return (*_minus(method, other, to), *_minus(other, method, since))


def _alternating(task: str) -> list[Contrast]:
    part, low, high = f"map-{task}", min(RANKS), max(RANKS)
    many, few = map_point(MIDDLE, _STRONG, clients=60)[0], map_point(MIDDLE, _STRONG)[0]
    orders = [map_point(rank, skew)[0] for skew in SKEWS for rank in RANKS]
    orders += [many]
    grows = [
        (f"at {skew}, rank {low} against rank {high}", low, skew, high, skew) for skew in SKEWS
    ] + [(f"at rank {r}, {_STRONG} against iid", r, _STRONG, r, "iid") for r in RANKS]
    return [
        *(
            Contrast(part, f"rolora − fedit, {p}", _minus("rolora", "fedit", p))
            for p in orders
        ),
        *(
            Contrast(
                part,
                f"growth of rolora − fedit {words}",
                _growth("rolora", "fedit", map_point(r, s)[0], map_point(other, t)[0]),
            )
            for words, r, s, other, t in grows
        ),
        Contrast(
            part,
            "growth of rolora − fedit from 20 to 60 clients",
            _growth("rolora", "fedit", many, few),
        ),
    ]  # fmt: skip


def _skewed(task: str) -> list[Contrast]:
    points = [map_point(rank, _STRONG)[0] for rank in RANKS]
    points += [map_point(MIDDLE, _STRONG, steps=32)[0], map_point(MIDDLE, _STRONG, clients=60)[0]]
    return [
        Contrast(f"map-{task}", f"{method} − {other}, {point}", _minus(method, other, point))
        for method, other in (("flexlora", "fedit"), ("fedit", "ffa-lora"))
        for point in points
    ]


def _padded(task: str) -> list[Contrast]:
    return [
        Contrast(f"mixed-{task}", f"{method} − hetlora, {skew}", _minus(method, "hetlora", skew))
        for method in ("flora", "flexlora")
        for skew in SKEWS
    ]


def _conflict() -> list[Contrast]:
    return [
        Contrast("conflict", f"{method} − fedit, {point}", _minus(method, "fedit", point), tie)
        for point, tie in (
            ("labels permuted", False), ("axes flipped", False),
            ("agreeing", True), ("agreeing, dirichlet:0.1", True),
        )
        for method in ("fedsa-lora", "ditto 0.1", "ditto 1", "feddpa")
    ]  # fmt: skip


def _calm(task: str) -> list[Contrast]:
    point = map_point(MIDDLE, "iid", steps=1)[0]
    return [
        Contrast(f"map-{task}", f"{method} − fedit, {point}", _minus(method, "fedit", point), True)
        for method in ("rolora", "flexlora", "ffa-lora")
    ]


CLAIMS = (
    Claim(
        "Alternating is no worse than averaging, and the gap grows as rank falls and skew rises",
        "2502.01755, 2410.22815",
        (
            *(c for task in _TASKS for c in _alternating(task)),
            Contrast("keyboard", "rolora − fedit", _minus("rolora", "fedit", "rank 2")),
        ),
    ),
    Claim(
        "At strong label skew FlexLoRA is better than FedIT, and FedIT than FFA-LoRA",
        "2402.11505, 2410.22815",
        (
            *(c for task in _TASKS for c in _skewed(task)),
            Contrast("keyboard", "flexlora − fedit", _minus("flexlora", "fedit", "rank 2")),
        ),
    ),
    Claim(
        "With mixed client ranks stacking and SVD are better than padding",
        "2409.05976, 2402.11505",
        tuple(c for task in _TASKS for c in _padded(task)),
    ),
    Claim(
        "Where clients contradict one another, personal parts are better than FedIT's personal "
        "adapter; where they do not, they tie",
        "2410.01463, 2012.04221, 2403.19211",
        tuple(_conflict()),
    ),
    Claim(
        "With little drift all tie",
        "2305.05644, 2402.11505",
        tuple(c for task in _TASKS for c in _calm(task)),
    ),
)
