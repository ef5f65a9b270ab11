"""What a run cost: bytes and time, in all and by client."""

from __future__ import annotations

from collections.abc import Sequence

from fedlora.report.blocks import Block, Cell, Section, Table
from fedlora.report.folder import Row, RunFolder
from fedlora.report.rounds import phases_plot, round_rows
from fedlora.report.words import amount, duration

__all__ = ["costs_section"]


def costs_section(run: RunFolder) -> Section | None:
    """Return bytes and time; None before the first round."""
    rows = round_rows(run)
    if not rows:
        return None
    blocks: list[Block] = [_bytes(run, rows), _time(run, rows)]
    if (plot := phases_plot(rows)) is not None:
        blocks.append(plot)
    return Section("costs", "Bytes and time", tuple(blocks))


def _bytes(run: RunFolder, rows: Sequence[Row]) -> Table:
    extra = (run.summary or {}).get("extra", {})
    asked = sum(row["asked"] for row in rows)
    found: list[tuple[Cell, ...]] = []
    for way, words in (("up", "from clients"), ("down", "to clients")):
        total = sum(row[f"bytes_{way}"] for row in rows)
        line: list[Cell] = [words, amount(total), amount(total / asked) if asked else ""]
        if codec := extra.get("codecs", {}).get(way):
            share = "" if codec["share"] is None else f"{codec['share']:.1%}"
            line += [codec["codec"], share]
        else:
            line += ["fp32", "100.0%"]
        found.append(tuple(line))
    caption = "Bytes of the rounds' messages."
    packed = run.path / "adapter.safetensors"
    if packed.is_file():
        caption += f" The finished global adapter is a file of {amount(packed.stat().st_size)}."
    head = ("way", "in all", "a client and round", "codec", "of fp32")
    return Table(head, tuple(found), caption)


def _time(run: RunFolder, rows: Sequence[Row]) -> Table:
    rounds = sum(row["seconds"] for row in rows)
    found: list[tuple[Cell, ...]] = [("rounds", duration(rounds))]
    phases: dict[str, float] = {}
    for row in rows:
        for name, seconds in row["phases"].items():
            phases[name] = phases.get(name, 0.0) + seconds
    found += [(f"of these, {name}", duration(seconds)) for name, seconds in phases.items()]
    if run.summary is not None:
        whole = float(run.summary["seconds"])
        rest = max(0.0, whole - rounds)
        found.append(("start, everyone's own and personal adapters, evaluation", duration(rest)))
        found.append(("the whole run", duration(whole)))
    return Table(("part", "wall time"), tuple(found), "Summed over resumes.")
