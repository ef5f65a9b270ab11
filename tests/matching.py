"""Assert an error's type and what its one line says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def raises(kind: type[Exception], *texts: str) -> Iterator[None]:
    """Expect exactly `kind` with a message of one line that holds all `texts`."""
    with pytest.raises(kind) as caught:
        yield
    message = str(caught.value)
    assert caught.type is kind
    assert "\n" not in message
    for text in texts:
        assert text in message
