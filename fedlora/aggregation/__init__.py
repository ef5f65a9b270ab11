"""Federated methods: how a server makes one adapter out of many. NumPy only.

A method is added by writing a function that returns a `Method` and naming it in `_METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedlora.aggregation.alternating import rolora
from fedlora.aggregation.averaging import fedit, ffa_lora
from fedlora.aggregation.control_variates import with_control_variates
from fedlora.aggregation.het import hetlora
from fedlora.aggregation.method import Broadcast, ClientProfile, Method, ServerState, Update
from fedlora.aggregation.private_factors import fedsa_lora
from fedlora.aggregation.robust import with_rule
from fedlora.aggregation.server_optimizers import with_server_optimizer
from fedlora.aggregation.stacking import fedex_lora, flora
from fedlora.aggregation.svd import fedsvd, flexlora
from fedlora.errors import ConfigError, unknown_name

__all__ = [
    "Broadcast",
    "ClientProfile",
    "Method",
    "ServerState",
    "Update",
    "method",
    "methods",
    "with_control_variates",
    "with_rule",
    "with_server_optimizer",
]

_METHODS: dict[str, Callable[..., Method]] = {
    "fedex-lora": fedex_lora,
    "fedit": fedit,
    "fedsa-lora": fedsa_lora,
    "fedsvd": fedsvd,
    "ffa-lora": ffa_lora,
    "flexlora": flexlora,
    "flora": flora,
    "hetlora": hetlora,
    "rolora": rolora,
}


def method(name: str, **options: Any) -> Method:
    """Return the method called `name`, built with its own options.

    >>> method("ffa-lora").exact
    True
    """
    if name not in _METHODS:
        raise unknown_name("method", name, _METHODS)
    try:
        return _METHODS[name](**options)
    except TypeError as error:
        raise ConfigError(f"method {name!r}: {error}") from None


def methods() -> dict[str, Method]:
    """Return every method with its default options, by name."""
    return {name: build() for name, build in sorted(_METHODS.items())}
