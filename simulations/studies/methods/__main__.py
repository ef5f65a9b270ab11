"""Run the study, or a part of it, and write its page.

    python -m simulations.studies.methods --out DIR            all parts, about two hours
    python -m simulations.studies.methods --out DIR --quick    a point or two a claim, in DIR/quick
    python -m simulations.studies.methods --out DIR --part conflict --minutes 20
    python -m simulations.studies.methods --out DIR --page     no runs: the page again

Calling it again goes on where it was stopped. A part that is finished is reduced to what the page
needs, in RESULTS/<part>.json; the page is made of those alone. RESULTS and the page are beside this
file, or in DIR/quick for a quick study.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fedlora.files import write_atomic
from fedlora.simulation import compare
from simulations.studies.methods.evidence import reduced
from simulations.studies.methods.page import write_page
from simulations.studies.methods.parts import PARTS, Part

__all__ = ["main", "run_part"]


class OutOfTime(Exception):
    """The minutes are over; what is done is kept."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen parts. Returns 3 when the minutes were over before they were finished."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.studies.methods", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="folder of the comparisons")
    parser.add_argument("--quick", action="store_true", help="few points and seeds")
    parser.add_argument("--part", action="append", choices=list(PARTS), help="again for more")
    parser.add_argument("--minutes", type=float, help="stop then, between two runs")
    parser.add_argument("--results", type=Path, help="folder of RESULTS.md and results/")
    parser.add_argument("--page", action="store_true", help="write the page and run nothing")
    options = parser.parse_args(arguments)
    out: Path = options.out / "quick" if options.quick else options.out
    results: Path = options.results or (out if options.quick else Path(__file__).parent)
    chosen = [part for name, part in PARTS.items() if not options.part or name in options.part]
    if options.quick:
        chosen = [part.as_quick() for part in chosen if part.quick]
    logging.disable(logging.WARNING)  # of each reply of the runs that diverge in tuning
    until = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    try:
        for part in [] if options.page else chosen:
            run_part(part, out / part.name, results / "results", until)
    except OutOfTime:
        print("the minutes are over; the same command goes on", file=sys.stderr)
        return 3
    finally:
        logging.disable(logging.NOTSET)
        write_page(results, quick=options.quick)
    return 0


def run_part(part: Part, folder: Path, results: Path, until: float | None = None) -> None:
    """Run a part, or go on with it, and write its reduced results. Raises `OutOfTime`."""
    started = time.monotonic()
    comparison = compare(
        part.config(),
        part.methods,
        seeds=part.seeds,
        grid=list(part.points.values()),
        overrides=part.settings,
        only="global" if part.adapter == "global" else None,
        tune=part.adapter,
        out=folder,
        progress=_progress(part, until),
    )
    minutes = (time.monotonic() - started) / 60
    print(f"\n{part.name}: done in {minutes:.1f} minutes", file=sys.stderr)
    results.mkdir(parents=True, exist_ok=True)
    found = json.dumps(reduced(part, comparison), indent=None, separators=(",", ":"))
    # A line a run, so that a diff shows which have changed.
    text = found.replace('{"method"', '\n{"method"')
    write_atomic(results / f"{part.name}.json", (text + "\n").encode())


def _progress(part: Part, until: float | None) -> Callable[[str, int, int, str], None]:
    last = 0, ""

    def report(stage: str, done: int, total: int, words: str) -> None:
        nonlocal last
        if (done, stage) == last:
            return
        last = done, stage
        print(f"{part.name}, {stage} {done}/{total}: {words}", file=sys.stderr, flush=True)
        if until is not None and time.monotonic() > until:  # between two runs
            raise OutOfTime

    return report


if __name__ == "__main__":
    sys.exit(main())
