"""Regular expressions on module paths, as PEFT's rank_pattern and alpha_pattern use them.

A pattern matches a path when it matches the whole of it, or all of it after a dot. Most patterns
are plain names or whole paths, one for each layer, so those are looked up instead of tried one by
one. Patterns also come in files from strangers: `match_cost` bounds the work before any is tried.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

from fedlora.errors import ConfigError

__all__ = [
    "PatternTable",
    "compile_regex",
    "is_plain",
    "literal_pattern",
    "match_cost",
    "pattern_table",
    "suffixes",
    "total_cost",
]

MAX_PATTERN = 2048  # characters
MAX_NESTING = 16  # groups in groups
_PLAIN = re.compile(r"\^?(?:[\w\-/:@ .]|\\[^\w])*")
_PLAIN_PARTS = re.compile(r"\\(.)|(.)", re.DOTALL)

Shape: TypeAlias = tuple[int, tuple[int, ...], bool]  # length, where "." stands, anchored by "^"


@dataclass(frozen=True, slots=True)
class PatternTable:
    """Patterns in order; made by `pattern_table`."""

    # Plain patterns by shape; their dots match any character, as PEFT's do.
    plain: Mapping[int, Mapping[Shape, Mapping[str, int]]]
    regexes: tuple[tuple[int, re.Pattern[str]], ...]

    def find(self, path: str) -> int | None:
        """Return the index of the first pattern that matches `path`."""
        best = self._find_plain(path)
        for index, regex in self.regexes:
            if best is not None and index > best:
                break
            if regex.fullmatch(path):
                return index
        return best

    def _find_plain(self, path: str) -> int | None:
        hits = []
        for part in suffixes(path):
            for shape, indices in self.plain.get(len(part), {}).items():
                _, dots, anchored = shape
                masked = _mask(part, dots)
                if masked in indices and (not anchored or part == path):
                    hits.append(indices[masked])
        return min(hits, default=None)


@lru_cache(maxsize=64)
def pattern_table(patterns: tuple[str, ...]) -> PatternTable:
    """Compile patterns for many look-ups. Raises `ConfigError`."""
    plain: dict[int, dict[Shape, dict[str, int]]] = {}
    regexes = []
    for index, pattern in enumerate(patterns):
        if is_plain(pattern):
            shape, text = _plain_shape(pattern)
            plain.setdefault(shape[0], {}).setdefault(shape, {}).setdefault(text, index)
        else:
            regexes.append((index, _compile(rf"(.*\.)?({pattern})", pattern)))
    return PatternTable(plain, tuple(regexes))


def is_plain(pattern: str) -> bool:
    """Whether the pattern is a name or path, escaped or not, rather than a regular expression."""
    return _PLAIN.fullmatch(pattern) is not None


def _plain_shape(pattern: str) -> tuple[Shape, str]:
    anchored = pattern.startswith("^")
    parts = _PLAIN_PARTS.findall(pattern.removeprefix("^"))
    dots = tuple(index for index, (_, bare) in enumerate(parts) if bare == ".")
    text = "".join(escaped or bare for escaped, bare in parts)
    return (len(text), dots, anchored), text


def _mask(text: str, dots: tuple[int, ...]) -> str:
    if all(text[index] == "." for index in dots):
        return text
    characters = list(text)
    for index in dots:
        characters[index] = "."
    return "".join(characters)


def compile_regex(pattern: str) -> re.Pattern[str]:
    """Compile a regular expression for a whole path. Raises `ConfigError`."""
    return _compile(pattern, pattern)


def literal_pattern(path: str) -> str:
    """Return the pattern that matches `path` and nothing else."""
    return f"^{re.escape(path)}"


def suffixes(path: str) -> list[str]:
    """Return the path and what follows each of its dots.

    >>> suffixes("h.0.fc")
    ['h.0.fc', '0.fc', 'fc']
    """
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def match_cost(pattern: str, length: int) -> float:
    """Bound the ways in which a pattern can be tried on a path of `length` characters.

    Every ``*``, ``+`` and ``{m,n}`` counts as `length` ways, ``?`` as two, ``a|b|c`` as three, and
    they multiply. Infinite for what can go exponential or is not understood here: a repetition
    of something that has more than one way, a backreference, too long or too deep a pattern.
    """
    if len(pattern) > MAX_PATTERN:
        return math.inf
    tokens = _TOKENS.findall(pattern)
    ways = 1.0
    stack: list[float] = []  # ways at each opened group
    bars = [1]
    group: float | None = None  # ways inside the group that has just been closed
    for token in tokens:
        closed, group = group, None
        if token.startswith("("):
            if token != "(" and not token.startswith(("(?:", "(?=", "(?!", "(?P<")):
                return math.inf
            stack.append(ways)
            bars.append(1)
        elif token == ")":
            if not stack:
                return math.inf
            ways *= bars.pop()
            group = ways / stack.pop()
        elif token == "|":
            bars[-1] += 1
        elif token[0] in "*+?" or (token[0] == "{" and len(token) > 1):
            if token[0] == "?":
                ways *= 2
            elif (token[0] == "{" and not _SMALL_COUNT.fullmatch(token)) or (
                closed is not None and closed > 1
            ):
                return math.inf
            else:
                ways *= length + 1
        elif re.fullmatch(r"\\\d", token):
            return math.inf
        if len(stack) > MAX_NESTING or ways > 1e15:
            return math.inf
    return math.inf if stack else ways * bars[0]


_SMALL_COUNT = re.compile(r"\{\d{0,2}(,\d{0,2})?\}[?+]?")
# An escape, a set, the opening of a group, a quantifier with its lazy mark, any other character.
_TOKENS = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?P<\w+>|\(\?P=|\(\?.|[()|]|[*+?][?+]?|\{[\d,]+\}[?+]?|.",
    re.DOTALL,
)


def total_cost(patterns: Sequence[str], paths: Sequence[str]) -> float:
    """Bound the work of trying every pattern on every path."""
    longest = max(map(len, paths), default=0)
    shapes = {_plain_shape(pattern)[0] for pattern in patterns if is_plain(pattern)}
    costs = [match_cost(pattern, longest) for pattern in patterns if not is_plain(pattern)]
    return len(paths) * (len(shapes) + sum(costs))


def _compile(wrapped: str, pattern: str) -> re.Pattern[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sets whose meaning a later Python may change
            return re.compile(wrapped)
    except (re.error, RecursionError, OverflowError) as error:
        text = getattr(error, "msg", error)
        raise ConfigError(f"{pattern!r} is not a valid regular expression: {text}") from None
