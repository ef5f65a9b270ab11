"""Run the study, or go on with it, and write its page.

    python -m simulations.studies.privacy --out DIR              about an hour on two cores
    python -m simulations.studies.privacy --out DIR --quick      under two minutes, in DIR/quick
    python -m simulations.studies.privacy --out DIR --task watch --minutes 20
    python -m simulations.studies.privacy --out DIR --page       no runs: the page again

Calling it again goes on where it was stopped. Every run is a line in DIR/<task>.jsonl; the page is
made of those alone and written beside this file, or in DIR/quick for a quick study. Two tasks may
run at once, each in a process of its own.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from simulations.studies.privacy.page import write_page
from simulations.studies.privacy.plan import TASKS, Task
from simulations.studies.privacy.study import OutOfTime, Study

__all__ = ["main"]

CORES = 1.6  # of two, that the runs keep busy


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen tasks. Returns 3 when the minutes were over before they were finished."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.studies.privacy", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--quick", action="store_true", help="few rounds, budgets and methods")
    parser.add_argument("--task", action="append", choices=list(TASKS), help="again for more")
    parser.add_argument("--minutes", type=float, help="stop then, between two runs")
    parser.add_argument("--results", type=Path, help="folder of RESULTS.md and results/")
    parser.add_argument("--page", action="store_true", help="write the page and run nothing")
    options = parser.parse_args(arguments)
    out: Path = options.out / "quick" if options.quick else options.out
    results: Path = options.results or (out if options.quick else Path(__file__).parent)
    chosen = [task for name, task in TASKS.items() if not options.task or name in options.task]
    if options.quick:
        chosen = [task.as_quick() for task in chosen]
    until = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    studies = [Study(task, out, until) for task in chosen]
    print(_plan(studies), file=sys.stderr, flush=True)
    logging.disable(logging.WARNING)  # of each reply of the runs that diverge in a search
    try:
        for study in [] if options.page else studies:
            study.run()
    except OutOfTime:
        print("the minutes are over; the same command goes on", file=sys.stderr)
        return 3
    finally:
        logging.disable(logging.NOTSET)
        _keep([study.file for study in studies], results / "results")
        write_page(results, quick=options.quick)
    return 0


def _plan(studies: Iterable[Study]) -> str:
    """Return what will be run, and how long it should take on two cores."""
    lines, seconds = [], 0.0
    for study in studies:
        task: Task = study.task
        searched, reported = task.counts()
        left = searched + reported - len(study.rows)
        seconds += left * task.cpu_seconds / CORES
        lines.append(
            f"{task.name}: {searched} runs to search settings, {reported} reported ones "
            f"({len(task.methods)} methods, {len(task.epsilons)} budgets, {task.seeds} seeds); "
            f"{left} to do, about {task.cpu_seconds:.0f} CPU seconds each"
        )
    return "\n".join([*lines, f"expected: about {seconds / 60:.0f} minutes on two free cores"])


def _keep(files: Iterable[Path], folder: Path) -> None:
    """Copy the rows beside the page, so that it can be made again without the runs' folder."""
    for file in files:
        if file.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / file.name)


if __name__ == "__main__":
    sys.exit(main())
