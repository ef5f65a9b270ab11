"""Numbers as words: units, shares, intervals, and texts of strangers on one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = [
    "amount",
    "cell",
    "count",
    "duration",
    "interval",
    "measure_label",
    "measure_words",
    "one_line",
    "short",
    "signed",
]

# What a number of each measure is a number of; a loss is of tokens or of examples.
_UNITS = {
    "accuracy": "share of examples",
    "bits_per_character": "bits",
    "perplexity": "exp(nats per token)",
    "top1": "share of words",
    "top3": "share of words",
}


def amount(count: float | None) -> str:
    """Return bytes in a unit that leaves three digits or so.

    >>> amount(112416000)
    '112 MB'
    """
    if count is None:
        return ""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB" if count < 1000 else f"{count:.0f} GB"


def duration(seconds: float) -> str:
    """Return a time in the units that one would say it in.

    >>> duration(0.25), duration(95), duration(7384)
    ('250 ms', '1 min 35 s', '2 h 3 min')
    """
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def count(number: int, what: str, many: str | None = None) -> str:
    """Return a number with its noun.

    >>> count(1, "client"), count(12, "client"), count(2, "reply", "replies")
    ('1 client', '12 clients', '2 replies')
    """
    return f"{number} {what if number == 1 else many or what + 's'}"


def cell(value: Any) -> str:
    """Return a table's cell: four digits after the point, or four in all where that is nothing.

    >>> cell(3.72904575), cell(0.000012345), cell(12), cell(None)
    ('3.7290', '1.234e-05', '12', '')
    """
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4f}" if value == 0 or abs(value) >= 0.001 else f"{value:.4g}"
    return str(value)


def signed(value: float) -> str:
    """Return a number with its sign.

    >>> signed(0.02090)
    '+0.0209'
    """
    return f"{value:+.4f}"


def interval(found: Mapping[str, Any]) -> str:
    """Return the 95 % interval of a gain in words."""
    if found["low"] is None:
        return "one client: no interval"
    words = f"95 % interval {signed(found['low'])} to {signed(found['high'])}"
    return words if found["low"] > 0 or found["high"] < 0 else f"{words}, which includes 0"


def measure_label(measure: str, task: str) -> str:
    """Return a measure with its unit, as an axis has it.

    >>> measure_label("loss", "next-token"), measure_label("accuracy", "classification")
    ('loss (nats per token)', 'accuracy (share of examples)')
    """
    unit = _UNITS.get(measure)
    if measure == "loss":
        unit = {"next-token": "nats per token", "classification": "nats per example"}.get(task)
    words = measure_words(measure)
    return f"{words} ({unit})" if unit else words


def measure_words(measure: str) -> str:
    """Return a measure's name as one would write it.

    >>> measure_words("bits_per_character"), measure_words("top1")
    ('bits per character', 'top-1')
    """
    words = one_line(measure).replace("_", " ")
    return {"top1": "top-1", "top3": "top-3"}.get(words, words)


def one_line(text: object) -> str:
    """Return a stranger's text on one line of printable characters."""
    words = " ".join(str(text).split())
    return "".join(c if c.isprintable() else "�" for c in words)


def short(text: object, most: int = 18) -> str:
    """Return the beginning of `one_line`, for a label."""
    line = one_line(text)
    return line if len(line) <= most else line[: most - 1] + "…"
