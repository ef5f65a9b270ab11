"""Patterns on module paths: the look-up against the expression that PEFT writes out."""

from __future__ import annotations

import math
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.patterns import literal_pattern, match_cost, pattern_table, suffixes, total_cost

PARTS = st.sampled_from(["a", "b", "ab", "0", "1", "10", "."])
PATHS = st.lists(PARTS, min_size=1, max_size=5).map("".join)
PATTERNS = st.one_of(
    PATHS,
    PATHS.map(re.escape),
    PATHS.map(lambda path: f"^{path}"),
    PATHS.map(literal_pattern),
    st.sampled_from([r"a\.\d+", "(a|b)", ".*b", r"[ab]\.0", "a+"]),
)


@settings(deadline=None)
@given(st.lists(PATTERNS, max_size=5, unique=True), PATHS)
def test_first_match_is_that_of_peft(patterns, path):
    # The slow twin: get_pattern_key of PEFT 0.21.
    hits = [i for i, p in enumerate(patterns) if re.match(rf"(.*\.)?({p})$", path)]
    assert pattern_table(tuple(patterns)).find(path) == min(hits, default=None)


@settings(deadline=None)
@given(PATHS, PATHS)
def test_literal_pattern_matches_only_its_path(path, other):
    assert (pattern_table((literal_pattern(path),)).find(other) == 0) is (path == other)


def test_suffixes_begin_after_dots():
    assert suffixes("h.0.fc") == ["h.0.fc", "0.fc", "fc"]


COSTS = {
    "fc": 1, r"a\.b": 1, ".": 1, "[*+]": 1, r"\*": 1, "(?:a)": 1, "{": 1, "a{,x": 1,
    "a*": 11, "a+?": 11, "[a-z]*": 11, "a{2}": 11, "a{1,}": 11, "(ab)*": 11,
    "a?": 2, "a|b|c": 3, "(a|b)(c|d)": 4, "a*b*": 121,
    "(a*)*": math.inf, "(a|b)+": math.inf, "(a?){3}": math.inf, "((a)|b)*": math.inf,
    r"(a)\1": math.inf, "(?P<n>a)(?P=n)": math.inf, "(?<=a)b": math.inf, "(?i:a)": math.inf,
    "(?#x)a": math.inf, "(" * 17 + ")" * 17: math.inf, "a*" * 40: math.inf,
    "a" * 2049 + "*": math.inf, "(?:){100}": math.inf, "a{2,1000}": math.inf,
}  # fmt: skip


@pytest.mark.parametrize("pattern", COSTS, ids=lambda pattern: pattern[:20])
def test_cost_bounds_the_ways(pattern):
    assert match_cost(pattern, 10) == COSTS[pattern]


@pytest.mark.parametrize(
    "pattern", [".*.*.*a", "(?:a|aa)?(?:a|aa)?.*b", "a?a?a?a?a?a?a?a?a?a?b", "[a-z]*[a-z]*[a-z]*x"]
)
def test_pattern_within_the_bound_is_fast(pattern):
    path = "a" * 60
    assert match_cost(pattern, len(path)) <= 1e6
    before = time.thread_time()
    pattern_table((pattern,)).find(path)
    assert time.thread_time() - before < 0.1


def test_total_cost_counts_shapes_of_plain_patterns_once():
    assert total_cost(["a.b", "c.d", "e"], ["x" * 10] * 4) == 4 * 2
    assert total_cost(["a*"], ["x" * 10, "y"]) == 2 * 11
    assert total_cost([], ["x"]) == 0
