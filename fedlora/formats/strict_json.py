"""JSON from strangers: one meaning or none.

Duplicate keys, NaN and infinities, numbers beyond float64, halves of surrogate pairs and deep
nesting are refused, since two readers may understand them differently or fall over them.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from typing import Any, NoReturn

from fedlora.errors import FormatError

__all__ = [
    "canonical_json",
    "is_digest",
    "is_label",
    "is_text",
    "parse_json",
    "pretty_json",
    "shown",
]

# Counted before parsing, in strings too; they keep a file of a megabyte from costing a second.
_LIMITS = (
    ("lists", b"[", 20_000),
    ("objects", b"{", 10_000),
    ("keys", b":", 45_000),
    ("values", b",", 60_000),
)
MAX_INTEGER = 1 << 64
_REPR = reprlib.Repr()
_REPR.maxlist = _REPR.maxdict = _REPR.maxtuple = 10
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80
_REPR.maxlevel = 3
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SURROGATE = re.compile(rb"\\u[dD][89abAB]", re.IGNORECASE)


def parse_json(data: bytes, where: str, *, max_depth: int | None = 8) -> Any:
    """Return the value that UTF-8 `data` holds; `where` opens the text of an error.

    `max_depth` counts nested lists and objects; with None the caller checks the structure and the
    numbers itself. Raises `FormatError`.
    """
    for what, sign, limit in _LIMITS:
        if data.count(sign) > limit:
            raise FormatError(
                f"{where}: expected at most {limit:,} {what}, found {data.count(sign):,}"
            )
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
        )
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        too_deep = max_depth is not None and not _check_values(value, max_depth)
    except UnicodeError:
        raise FormatError(f"{where}: expected UTF-8 text, found bytes that are not") from None
    except RecursionError:
        too_deep = True
    except ValueError as error:
        raise FormatError(f"{where}: expected JSON, found {_short(error)}") from None
    if too_deep:
        depth = "few" if max_depth is None else f"at most {max_depth}"
        raise FormatError(f"{where}: expected JSON of {depth} levels of nesting, found more")
    return value


def canonical_json(value: Any) -> bytes:
    """Return the one way in which fedlora writes `value`: sorted keys, no spaces, UTF-8.

    Raises `FormatError` on what JSON cannot hold.
    """
    return _dump(value, separators=(",", ":"))


def pretty_json(value: Any) -> bytes:
    """As `canonical_json`, for people: two spaces of indentation and a last newline."""
    return _dump(value, indent=2) + b"\n"


def _dump(value: Any, **layout: Any) -> bytes:
    try:
        text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, **layout)
        return text.encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"cannot be written as JSON: {_short(error)}") from None


def is_label(value: Any) -> bool:
    """Whether a value is None or a short text that can be shown, such as a fingerprint."""
    return value is None or (isinstance(value, str) and len(value) <= 256 and value.isprintable())


def is_text(value: Any) -> bool:
    """Whether a value is a short text that can be shown, and not empty."""
    return isinstance(value, str) and bool(value) and is_label(value)


def is_digest(value: Any) -> bool:
    """Whether a value is a SHA-256 in hexadecimal digits."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def shown(value: Any) -> str:
    """Return ``repr(value)``, shortened without forming the whole of it, for an error's text."""
    return _REPR.repr(value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:80]!r} twice")
            seen.add(key)
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name}, which is no JSON number")


def _check_values(value: Any, max_depth: int) -> bool:
    """Return whether the nesting is at most `max_depth`; raise `ValueError` on a number."""
    level: list[Any] = [value]
    for _ in range(max_depth + 1):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
            elif isinstance(item, float) and not math.isfinite(item):
                raise ValueError("a number beyond float64")
            elif isinstance(item, int) and abs(item) > MAX_INTEGER:
                raise ValueError("an integer beyond 64 bits")
        level = inner
    return not level


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 120 else f"{text[:119]}…"
