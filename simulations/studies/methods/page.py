"""RESULTS.md: a table a claim, the map of methods, and what a person has written in between.

The page is made anew each time, but for the sections between ``<!-- by hand: NAME -->`` and
``<!-- end -->``, which are taken over from the page that is there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedlora.errors import MissingExtraError
from fedlora.files import write_atomic
from fedlora.metrics import Interval
from fedlora.simulation.comparison.statistics import Paired
from simulations.studies.methods.claims import CLAIMS, Claim
from simulations.studies.methods.evidence import TIE, Finding, Reduced, examine, paired_scores
from simulations.studies.methods.figures import draw_claim, draw_map

__all__ = ["by_hand", "page", "write_page"]

PAGE, RESULTS = "RESULTS.md", "results"
_BY_HAND = re.compile(r"<!-- by hand: (.+?) -->\n(.*?)<!-- end -->", re.DOTALL)


def write_page(folder: Path, *, quick: bool = False) -> None:
    """Write `folder`/RESULTS.md, and its figures, from `folder`/results/*.json."""
    files = sorted((folder / RESULTS).glob("*.json"))
    parts = {f.stem: json.loads(f.read_text(encoding="utf-8")) for f in files}
    if not parts:
        return
    images = {f"claim-{n}.svg": draw_claim for n in range(1, len(CLAIMS) + 1)}
    shown = []
    try:
        for number, (name, draw) in enumerate(images.items()):
            findings = [examine(c, parts) for c in CLAIMS[number].contrasts]
            if image := draw(findings):
                write_atomic(folder / RESULTS / name, image)
                shown.append(name)
        for name in (n for n in parts if n.startswith("map-")):
            if image := draw_map(parts[name]):
                write_atomic(folder / RESULTS / f"{name}.svg", image)
                shown.append(f"{name}.svg")
    except MissingExtraError:
        pass  # the page is complete without figures
    place = folder / PAGE
    kept = by_hand(place.read_text(encoding="utf-8")) if place.is_file() else {}
    write_atomic(place, page(parts, kept, shown, quick=quick).encode())


def by_hand(text: str) -> dict[str, str]:
    """Return the sections of a page that a person has written, by name."""
    return {name: words.strip("\n") for name, words in _BY_HAND.findall(text)}


def page(
    parts: Mapping[str, Reduced],
    kept: Mapping[str, str],
    images: Sequence[str] = (),
    *,
    quick: bool = False,
) -> str:
    """Return the page: `parts` by name, `kept` sections by name, `images` in results/."""
    found = [(claim, [examine(c, parts) for c in claim.contrasts]) for claim in CLAIMS]
    lines = [*_head(parts, quick=quick), *_section("which method when", kept), *_summary(found)]
    for number, (claim, findings) in enumerate(found, 1):
        lines += [f"## {number}. {claim.title}", "", f"Papers: {_papers(claim)}.", ""]
        lines += _image(f"claim-{number}.svg", images)
        lines += _tables(findings)
        lines += _section(f"claim {number}", kept)
    for name, part in parts.items():
        if name in ("keyboard",):
            continue
        lines += [f"## Who leads: {part['title']}", "", *_image(f"{name}.svg", images)]
        lines += [*_leaders(part), ""]
    return "\n".join([*lines, *_failures(parts)]).rstrip() + "\n"


def _head(parts: Mapping[str, Reduced], *, quick: bool) -> list[str]:
    runs = [run for part in parts.values() for run in part["runs"]]
    seconds = sum(run.get("seconds", 0) for run in runs)
    seeds = sorted({len(part["seeds"]) for part in parts.values()})
    return [
        "# Which method when", "",
        f"Written by `python -m simulations.studies.methods --out DIR{' --quick' * quick}` from",
        "`results/*.json`; only the sections marked \"by hand\" are kept when it is written again.",
        *(["", "**A quick study: few points and seeds. It shows that the study runs, no more.**"]
          * quick),
        "",
        f"{len(runs)} runs with {' or '.join(map(str, seeds))} seeds a method and point, "
        f"{seconds / 60:.0f} minutes without tuning.",
        "The learning rate is tuned for each method and point on the clients' validation parts, "
        "with a seed that is not reported.", "",
        "A difference is in the task's metric, mean over clients (accuracy, of which 0.01 is one "
        "point; for the keyboard nats, positive where the first has fewer), with its 95 % Student "
        "interval over seeds, each of which is a pair; d is Cohen's, "
        "of pairs; *loss* is the same difference in nats, positive where the first has less. "
        f"**yes**: the interval is over 0. **tie** (where one is claimed): within ±{TIE:g}. "
        "**no evidence**: it contains 0, and what is claimed may be so or not. Intervals are not "
        "adjusted for their number: of twenty without any effect, one leaves out 0 by chance.",
        "",
    ]  # fmt: skip


def _summary(found: Sequence[tuple[Claim, Sequence[Finding]]]) -> list[str]:
    lines = [
        "## In short", "",
        "| claim | yes or tie | no evidence | the contrary | not run |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for number, (claim, findings) in enumerate(found, 1):
        verdicts = [f.verdict for f in findings]
        counts = [
            verdicts.count("yes") + verdicts.count("tie"), verdicts.count("no evidence"),
            verdicts.count("no, the contrary"), verdicts.count("not run"),
        ]  # fmt: skip
        lines.append(f"| {number}. {claim.title} | {' | '.join(map(str, counts))} |")
    return [*lines, ""]


def _tables(findings: Sequence[Finding]) -> list[str]:
    lines = []
    for part in dict.fromkeys(f.contrast.part for f in findings):
        mine = [f for f in findings if f.contrast.part == part and f.verdict != "not run"]
        if not mine:
            lines += [f"`{part}`: not run.", ""]
            continue
        lines += [
            f"`--part {part}`", "",
            "| contrast | claimed | difference | 95 % interval | d | loss | verdict |",
            "|---|---|---|---|---|---|---|",
            *map(_row, mine), "",
        ]  # fmt: skip
    return lines


def _row(finding: Finding) -> str:
    assert finding.metric is not None
    assert finding.loss is not None
    notes = [f"{finding.lost} seeds lost"] * bool(finding.lost)
    notes += ["learning rate at an edge"] * bool(finding.edges)
    verdict = f"**{finding.verdict}**" + "".join(f"; {note}" for note in notes)
    cells = [
        finding.contrast.words, "tie" if finding.contrast.tie else "> 0",
        f"{finding.metric.interval.mean:+.3f}", _interval(finding.metric.interval),
        _effect(finding.metric), f"{finding.loss.interval.mean:+.3f}", verdict,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _leaders(part: Reduced) -> list[str]:
    """Return a table of means, the best in bold, and who is not told apart from it marked."""
    methods, adapter = part["methods"], part["adapter"]
    sign = 1 if part["higher_is_better"] else -1
    lines = [
        f"{part['metric']} of the {adapter} adapter. Bold: the best; ≈: its difference from the "
        "best has an interval with 0 in it, or too few seeds.", "",
        f"| point | base | {' | '.join(methods)} |", "|---" * (len(methods) + 2) + "|",
    ]  # fmt: skip
    for point in part["points"]:
        means = {name: _mean(part, name, point, adapter) for name in methods}
        known = {name: value for name, value in means.items() if value is not None}
        base = next((v for m in methods if (v := _mean(part, m, point, "base")) is not None), None)
        cells = [point, "–" if base is None else f"{base:.3f}"]
        best = max(known, key=lambda name: sign * known[name]) if known else ""
        for name in methods:
            if name not in known:
                cells.append("failed")
            elif name == best:
                cells.append(f"**{known[name]:.3f}**")
            else:
                behind = paired_scores(part, best, name, point)
                tied = behind is None or behind.verdict == "no evidence"
                cells.append(f"{known[name]:.3f}{' ≈' * tied}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines  # fmt: skip


def _mean(part: Reduced, method: str, point: str, adapter: str) -> float | None:
    values = [
        run[adapter][0]
        for run in part["runs"]
        if (run["method"], run["point"]) == (method, point) and adapter in run
    ]
    return sum(values) / len(values) if values else None


def _failures(parts: Mapping[str, Reduced]) -> list[str]:
    failed = [
        (name, run) for name, part in parts.items() for run in part["runs"] if "failed" in run
    ]
    if not failed:
        return []
    lines = ["## Runs that came to nothing", ""]
    return lines + [
        f"- {name}: {run['method']}, {run['point']}, seed {run['seed']}: {run['failed'][:160]}"
        for name, run in failed
    ]


def _section(name: str, kept: Mapping[str, str]) -> list[str]:
    words = kept.get(name, "Not written yet.")
    return [f"<!-- by hand: {name} -->", words, "<!-- end -->", ""]


def _papers(claim: Claim) -> str:
    return ", ".join(f"[{n}](https://arxiv.org/abs/{n})" for n in claim.papers.split(", "))


def _image(name: str, images: Sequence[str]) -> list[str]:
    return [f"![{name}]({RESULTS}/{name})", ""] if name in images else []


def _interval(found: Interval) -> str:
    return f"{found.low:+.3f} to {found.high:+.3f}"


def _effect(found: Paired) -> str:
    return "–" if found.effect is None else f"{found.effect:+.1f}"
