"""RESULTS.md: what privacy costs, whose method bears it best, what personal training gives back.

Made anew from results/*.jsonl each time, but for the sections between ``<!-- by hand: NAME -->``
and ``<!-- end -->``, which are taken over from the page that is there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora.files import write_atomic
from fedlora.metrics import interval
from fedlora.simulation.comparison.statistics import Paired, paired
from simulations.studies.methods.page import by_hand
from simulations.studies.privacy.plan import COHORT, DELTA, NONE, TASKS

__all__ = ["Results", "page", "write_page"]

PAGE, RESULTS = "RESULTS.md", "results"
REFERENCE = "fedit"
Row = Mapping[str, Any]


def write_page(folder: Path, *, quick: bool = False) -> None:
    """Write `folder`/RESULTS.md from `folder`/results/*.jsonl; nothing without any."""
    tasks = {}
    for name in TASKS:
        file = folder / RESULTS / f"{name}.jsonl"
        if file.is_file():
            lines = file.read_text(encoding="utf-8").splitlines()
            tasks[name] = Results(name, [json.loads(line) for line in lines])
    if not tasks:
        return
    place = folder / PAGE
    kept = by_hand(place.read_text(encoding="utf-8")) if place.is_file() else {}
    write_atomic(place, page(tasks, kept, quick=quick).encode())


class Results:
    """One task's rows, as the page asks for them."""

    def __init__(self, name: str, rows: Sequence[Row]) -> None:
        self.name, self.rows = name, rows
        self.finals = [row for row in rows if row["stage"] == "final"]
        done = [row for row in rows if "failed" not in row]
        self.metric = done[0]["metric"] if done else "metric"
        self.sign = 1.0 if not done or done[0]["higher_is_better"] else -1.0
        private = [row for row in self.finals if row["epsilon"] is not None]
        self.users = sorted({row["users"] for row in private or self.finals})
        self.methods = list(dict.fromkeys(row["method"] for row in self.finals))
        told = {_epsilon(row) for row in self.finals}
        self.epsilons = sorted(told, reverse=True)

    def scores(self, users: int, method: str, epsilon: float, adapter: str) -> dict[int, float]:
        """Return an adapter's mean metric by seed. Without privacy, users do not matter."""
        return {
            row["seed"]: row["scores"][adapter][0]
            for row in self.finals
            if (row["users"] == users or epsilon == NONE)
            and (row["method"], _epsilon(row)) == (method, epsilon)
            and "failed" not in row
        }

    def noised(self, users: int, method: str, epsilon: float) -> list[Row]:
        """Return the private runs that have not failed."""
        wanted = (users, method, epsilon)
        return [
            row
            for row in self.finals
            if (row["users"], row["method"], _epsilon(row)) == wanted and "noise_length" in row
        ]

    def difference(self, users: int, method: str, epsilon: float, adapter: str) -> Paired | None:
        """Return `method` minus the reference, positive where it is better; None: under 2 seeds."""
        mine = self.scores(users, method, epsilon, adapter)
        theirs = self.scores(users, REFERENCE, epsilon, adapter)
        both = sorted(mine.keys() & theirs.keys())
        if len(both) < 2:
            return None
        return paired([self.sign * (mine[seed] - theirs[seed]) for seed in both])

    def lost(self, users: int, method: str, epsilon: float, adapter: str) -> dict[int, float]:
        """Return what privacy has cost by seed, positive where it has cost something."""
        free = self.scores(users, method, NONE, adapter)
        priced = self.scores(users, method, epsilon, adapter)
        return {s: self.sign * (free[s] - priced[s]) for s in sorted(free.keys() & priced.keys())}

    def spared(self, users: int, method: str, epsilon: float, adapter: str) -> Paired | None:
        """Return what privacy has cost the reference more than `method`; None: under 2 seeds."""
        mine = self.lost(users, method, epsilon, adapter)
        theirs = self.lost(users, REFERENCE, epsilon, adapter)
        both = sorted(mine.keys() & theirs.keys())
        return paired([theirs[seed] - mine[seed] for seed in both]) if len(both) > 1 else None


def page(tasks: Mapping[str, Results], kept: Mapping[str, str], *, quick: bool = False) -> str:
    """Return the page: tasks by name, `kept` sections by name."""
    lines = [*_head(tasks, quick=quick), *_section("what follows", kept)]
    for name, found in tasks.items():
        lines += [f"## {name}", "", *_about(found)]
        for users in found.users:
            lines += [f"### {name}, {users:,} virtual users", ""]
            for adapter in ("global", "personal"):
                lines += _utility(found, users, adapter)
            lines += _contrasts(found, users)
            lines += _given_back(found, users)
            lines += _noise(found, users)
            lines += _product(found, users)
        lines += _section(name, kept)
    return "\n".join(lines).rstrip() + "\n"


def _head(tasks: Mapping[str, Results], *, quick: bool) -> list[str]:
    rows = [row for found in tasks.values() for row in found.rows]
    failed = sum("failed" in row for row in rows)
    cpu = sum(row["cpu_seconds"] for row in rows)
    missing = [
        f"{name} has {len(found.rows)} of {sum(TASKS[name].counts())} runs"
        for name, found in tasks.items()
        if len(found.rows) < sum(TASKS[name].counts())
    ]
    missing += [f"{name} is not run" for name in TASKS if name not in tasks]
    return [
        "# What privacy costs", "",
        f"Written by `python -m simulations.studies.privacy --out DIR{' --quick' * quick}` from",
        "`results/*.jsonl`; only sections marked \"by hand\" are kept when it is written again.",
        *(["", "**A quick study: few rounds, budgets and methods. It shows that the study runs, no "
           "more.**"] * quick),
        *(["", f"**Not finished: {'; '.join(missing)}.**"] * bool(missing and not quick)),
        "",
        f"{len(rows)} runs, {cpu / 60:.0f} CPU minutes, {failed} failed. User-level central "
        f"differential privacy, delta {DELTA:g}, add or remove one user, Poisson sampling of "
        f"{COHORT} expected users a round, epsilon by PLD over each run's own ledger.", "",
        "**The users are virtual**: few people, copied with replacement. The guarantee is for one "
        "copy, so that these epsilons say nothing of the real people in the data; what is measured "
        "is how methods bear the noise that such a population would need. Each person is evaluated "
        "once, and not each copy.", "",
        "**The search is not paid for**: learning rate and clipping norm were chosen on people's "
        "validation parts, as the mean over seeds that are not reported, per method and budget, "
        "and no epsilon here counts that. All methods had the same grids.", "",
        "*own*: personal training alone, without any federation; *personal*: the same steps on top "
        "of the global adapter. Neither costs budget: nothing of it leaves a device. Intervals are "
        "95 % Student over seeds, in pairs where they are differences; they are not adjusted for "
        "their number.", "",
    ]  # fmt: skip


def _about(found: Results) -> list[str]:
    better = "higher is better" if found.sign > 0 else "lower is better"
    means = {}
    for adapter in ("base", "own"):
        values = [r["scores"][adapter][0] for r in found.finals if "failed" not in r]
        means[adapter] = f"{adapter} {interval(values).mean:.4f}" if values else ""
    told = f"Metric: {found.metric}, {better}. {', '.join(filter(None, means.values()))}."
    return [TASKS[found.name].about, told, ""]


def _utility(found: Results, users: int, adapter: str) -> list[str]:
    def cell(method: str, epsilon: float) -> str:
        values = list(found.scores(users, method, epsilon, adapter).values())
        if not values:
            return "–"
        about = interval(values)
        half = (about.high - about.low) / 2
        return f"{about.mean:.4f}" + (f" ± {half:.4f}" if math.isfinite(half) else " (one seed)")

    return _table(f"{adapter} adapter", found, found.epsilons, cell)


def _contrasts(found: Results, users: int) -> list[str]:
    methods = [method for method in found.methods if method != REFERENCE]

    def table(
        title: str, epsilons: Sequence[float], about: Callable[..., Paired | None]
    ) -> list[str]:
        def cell(method: str, epsilon: float) -> str:
            pairs = about(users, method, epsilon, "global")
            if pairs is None:
                return "–"
            low, high = pairs.interval.low, pairs.interval.high
            shown = f"{pairs.interval.mean:+.4f} ({low:+.4f} to {high:+.4f})"
            return f"**{shown}**" if pairs.verdict != "no evidence" else shown

        return _table(title, found, epsilons, cell, methods)

    return [
        *table(
            f"global adapter: better than {REFERENCE} by (bold: the interval leaves out 0)",
            found.epsilons, found.difference,
        ),
        *table(
            f"global adapter: privacy has cost it less than {REFERENCE} by (bold: as above)",
            [e for e in found.epsilons if e != NONE], found.spared,
        ),
    ]  # fmt: skip


def _given_back(found: Results, users: int) -> list[str]:
    def cell(method: str, epsilon: float) -> str:
        before = found.lost(users, method, epsilon, "global")
        after = found.lost(users, method, epsilon, "personal")
        if not before:
            return "–"
        one, two = interval([*before.values()]), interval([*after.values()])
        # Of a loss that may be none, no share can be told.
        share = f"; {1 - two.mean / one.mean:.0%} back" if one.low > 0 else ""
        return f"{one.mean:+.4f} → {two.mean:+.4f}{share}" + " (one seed)" * (len(before) < 2)

    title = (
        "lost to privacy in the global adapter → in the personal one (a minus: gained); the share "
        "given back where the interval of the loss leaves out 0"
    )
    return _table(title, found, [e for e in found.epsilons if e != NONE], cell)


def _noise(found: Results, users: int) -> list[str]:
    """Say how much noise a round's mean has, and which settings were found."""

    def cell(method: str, epsilon: float) -> str:
        rows = found.noised(users, method, epsilon)
        if not rows:
            return "–"
        row = rows[-1]  # of a search that was widened since, the last
        edge = "*" if row["clipping_norm"] in _edges(found.name) else ""
        ratio = row["noise_length"] / row["clipping_norm"]
        return f"{ratio:.2f} (C {row['clipping_norm']:g}{edge}, z {row['noise_multiplier']:.2f})"

    title = (
        "length of the noise of a round's mean over C, the most that a cohort can move it "
        "(* C at the edge of its grid)"
    )
    return _table(title, found, [e for e in found.epsilons if e != NONE], cell)


def _product(found: Results, users: int) -> list[str]:
    """Say how much noise is in the product B A, and how much of it was multiplied by noise."""

    def cell(method: str, epsilon: float) -> str:
        rows = found.noised(users, method, epsilon)
        if not rows:
            return "–"
        squared = [row["noise_once"] + row["noise_twice"] for row in rows]
        ratio = interval(
            [math.sqrt(n / row["adapter_squared"]) for n, row in zip(squared, rows, strict=True)]
        ).mean
        twice = interval([row["noise_twice"] / n for n, row in zip(squared, rows, strict=True)])
        return f"{ratio:.2f} ({twice.mean:.0%})"

    title = (
        "expected length of all rounds' noise in the product B A over the length of the product "
        "itself, noise included (of its square, the share that is noise multiplied by noise)"
    )
    return _table(title, found, [e for e in found.epsilons if e != NONE], cell)


def _edges(name: str) -> tuple[float, float]:
    norms = TASKS[name].norms
    return min(norms), max(norms)


def _table(
    title: str,
    found: Results,
    epsilons: Sequence[float],
    cell: Callable[[str, float], str],
    methods: Sequence[str] | None = None,
) -> list[str]:
    head = ["no privacy" if epsilon == NONE else f"ε = {epsilon:g}" for epsilon in epsilons]
    lines = [
        f"{title[0].upper()}{title[1:]}:", "",
        f"| method | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|",
    ]  # fmt: skip
    for method in found.methods if methods is None else methods:
        lines.append(f"| {method} | {' | '.join(cell(method, e) for e in epsilons)} |")
    return [*lines, ""]


def _section(name: str, kept: Mapping[str, str]) -> list[str]:
    words = kept.get(name, "")
    return [f"<!-- by hand: {name} -->", *([words] if words else []), "<!-- end -->", ""]


def _epsilon(row: Row) -> float:
    return NONE if row["epsilon"] is None else float(row["epsilon"])
