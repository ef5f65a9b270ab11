"""Who did not count: clients left out, replies that were dropped, devices that declined."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from fedlora.report.blocks import Block, Cell, Section, Table, Words
from fedlora.report.folder import RunFolder
from fedlora.report.rounds import round_rows
from fedlora.report.words import count, one_line

__all__ = ["losses_section"]

MOST = 30  # rows of a table


def losses_section(run: RunFolder) -> Section:
    """Return what is known of replies that did not count."""
    rows = round_rows(run)
    asked = sum(row["asked"] for row in rows)
    dropped = sum(row["dropped"] for row in rows)
    declined = sum(row["declined"] for row in rows)
    late = sum(row["late"] for row in rows)
    if not dropped and not declined and not late:
        words = f"Each of {count(asked, 'message')} to clients brought an update that counted."
        return Section("losses", "Who did not count", (Words(words if asked else "Nobody yet."),))
    counted = asked - dropped - declined
    text = f"Of {count(asked, 'message')} to clients, {counted} brought an update that counted."
    if dropped:
        text += f" {count(dropped, 'reply', 'replies').capitalize()} did not count or never came."
    if declined:
        text += f" {count(declined, 'time')} a device declined."
    if late:
        text += f" {count(late, 'reply', 'replies').capitalize()} came too late and went unread."
    lost = [item for record in run.rounds for item in record.get("dropped", ())]
    blocks: list[Block] = [
        Words(text),
        _counted("reason", (_reason(i["client"], i["reason"]) for i in lost), "Reasons."),
        _counted("client", (one_line(i["client"]) for i in lost), "Clients."),
    ]
    return Section("losses", "Who did not count", tuple(blocks))


def _counted(what: str, found: Iterable[str], caption: str) -> Table:
    common = Counter(found).most_common()
    rows: list[tuple[Cell, ...]] = list(common[:MOST])
    if len(common) > MOST:
        rest = sum(times for _, times in common[MOST:])
        rows.append((f"{len(common) - MOST} others", rest))
    return Table((what, "times"), tuple(rows), caption)


def _reason(client: object, reason: object) -> str:
    """Return a reason without the client's own name in front, so that equal ones are counted."""
    text = one_line(reason).removeprefix(f"client {client!r}: ")
    return text if len(text) <= 160 else text[:159] + "…"
