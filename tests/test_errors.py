"""The tree of errors."""

from __future__ import annotations

import re

import pytest

from fedlora import errors
from fedlora.errors import FedloraError, MissingExtraError, UsageError, nearest, unknown_name

KINDS = [value for value in vars(errors).values()
         if isinstance(value, type) and issubclass(value, FedloraError)]  # fmt: skip


def test_docstring_draws_the_tree_as_it_is():
    drawn: dict[str, str] = {}
    above: list[str] = []
    for line in errors.__doc__.splitlines():
        if match := re.match(r"    ([│├└─ ]*)(\w+Error)\b", line):
            depth = len(match[1]) // 4
            above[depth:] = [match[2]]
            drawn[match[2]] = above[depth - 1] if depth else ""
    kinds = [kind for kind in KINDS if kind is not FedloraError]
    actual = {kind.__name__: kind.__bases__[0].__name__ for kind in kinds}
    assert drawn == {"FedloraError": "", **actual}
    assert {kind.__name__ for kind in KINDS} <= set(errors.__all__)


@pytest.mark.parametrize("kind", KINDS)
def test_exit_code_tells_wrong_usage_from_failure(kind):
    assert kind.exit_code == (2 if issubclass(kind, UsageError) else 1)


def test_missing_extra_has_the_pip_line_and_is_an_import_error():
    error = MissingExtraError("the cohort engine", "train")
    assert isinstance(error, ImportError)
    assert str(error) == (
        "the cohort engine needs packages that are not installed: run pip install 'fedlora[train]'"
    )


def test_unknown_name_says_the_nearest_or_all():
    assert str(unknown_name("method", "fedti", ["fedit", "flora"])) == (
        "unknown method 'fedti'; did you mean 'fedit'?"
    )
    assert nearest("zzz", ["b", "a"]) == "; known: a, b"
    assert nearest("zzz", []) == ""
