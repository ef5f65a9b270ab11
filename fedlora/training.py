"""What a trainer is told and what it returns, the same for torch, the cohort engine and ONNX."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from fedlora.adapter import Adapter, Array
from fedlora.errors import ConfigError, NonFiniteError

__all__ = [
    "Correction",
    "Factor",
    "LocalRule",
    "Optimizer",
    "TrainConfig",
    "TrainResult",
    "not_finite",
    "require_correction",
    "require_plain_sgd",
]

Factor = Literal["A", "B", "magnitude"]
Optimizer = Literal["adamw", "sgd"]
Correction = Literal["scaffold"]


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How one client trains in one round; exactly one of local_steps and local_epochs is set."""

    local_steps: int | None = None  # optimizer steps
    local_epochs: int | None = None  # passes over the client's examples
    batch_size: int = 8  # examples
    learning_rate: float = 1e-3
    optimizer: Optimizer = "adamw"
    weight_decay: float = 0.0  # decoupled for adamw, added to the gradient for sgd
    momentum: float = 0.0  # sgd only
    max_grad_norm: float | None = None  # L2 norm of one step's whole gradient; None: not clipped

    def __post_init__(self) -> None:
        if (self.local_steps is None) == (self.local_epochs is None):
            raise ConfigError(
                "expected exactly one of local_steps and local_epochs, found "
                f"local_steps={self.local_steps!r} and local_epochs={self.local_epochs!r}"
            )
        for name in ("local_steps", "local_epochs"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not _is_int(value, at_least=0)):
                raise ConfigError(f"{name}: expected a whole number >= 0, found {value!r}")
        if not _is_int(self.batch_size, at_least=1):
            raise ConfigError(
                f"batch_size: expected a whole number >= 1, found {self.batch_size!r}"
            )
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(
                f"learning_rate: expected a finite number > 0, found {self.learning_rate!r}"
            )
        if self.optimizer not in get_args(Optimizer):
            raise ConfigError(f"optimizer: expected 'adamw' or 'sgd', found {self.optimizer!r}")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(f"weight_decay: expected a number >= 0, found {self.weight_decay!r}")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum: expected a number in [0, 1), found {self.momentum!r}")
        if self.momentum and self.optimizer != "sgd":
            raise ConfigError("momentum is sgd's: set optimizer = 'sgd', or remove momentum")
        if self.max_grad_norm is not None and not 0 < self.max_grad_norm < math.inf:
            raise ConfigError(
                f"max_grad_norm: expected a finite number > 0, found {self.max_grad_norm!r}"
            )

    def steps_for(self, num_examples: int) -> int:
        """Return the optimizer steps for a client that has `num_examples`; 0 without examples."""
        if num_examples == 0:
            return 0
        if self.local_steps is not None:
            return self.local_steps
        return (self.local_epochs or 0) * math.ceil(num_examples / self.batch_size)


@dataclass(frozen=True, slots=True)
class LocalRule:
    """What a method changes in local training. Data, so that every trainer runs it alike."""

    # The other factors stay as they came. Without DoRA there is no magnitude to train.
    trained: frozenset[Factor] = frozenset({"A", "B", "magnitude"})
    # mu of FedProx (arXiv:1812.06127, equation 2): mu / 2 times the squared distance of the trained
    # factors from where they started is added to the loss; the reported loss is without it.
    proximal_weight: float = 0.0
    # "scaffold" (arXiv:1910.06378): a row c - c_k over the trained factors, which comes with each
    # round, is added to the gradient of every step, after clipping. None and not a flag, so that
    # an order without it has no such key.
    correction: Correction | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.proximal_weight < math.inf:
            raise ConfigError(
                f"proximal_weight: expected a finite number >= 0, found {self.proximal_weight!r}"
            )
        unknown = self.trained - set(get_args(Factor))
        if unknown or not self.trained:
            raise ConfigError(f"trained: expected some of A, B, magnitude, found {self.trained!r}")


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What one local training gives."""

    adapter: Adapter  # all factors, trained or not
    num_examples: int  # examples that the client has
    loss: float  # mean over the steps, each before its update; NaN when there was no step
    steps: int
    metrics: Mapping[str, float] = field(default_factory=dict)


def require_plain_sgd(config: TrainConfig) -> None:
    """Raise `ConfigError` unless control variates can correct this training."""
    found = repr(config.optimizer)
    if config.optimizer == "sgd":
        if not config.momentum:
            return
        found += f" with momentum {config.momentum:g}"
    raise ConfigError(
        "control variates: expected optimizer = 'sgd' without momentum, found "
        f"{found}; a client's control variate is its mean gradient, read off its factors as "
        "(before - after) / (steps * learning_rate), which holds for plain steps only"
    )


def require_correction(
    who: str, rule: LocalRule, config: TrainConfig, correction: Array | None
) -> None:
    """Raise `ConfigError` unless a correction is there if, and only if, the rule asks for one."""
    if (rule.correction is None) != (correction is None):
        asked = "none" if rule.correction is None else f"one for {rule.correction!r}"
        found = "none" if correction is None else "one"
        raise ConfigError(f"{who}: expected {asked} as its rule's correction, found {found}")
    if correction is not None:
        try:
            require_plain_sgd(config)
        except ConfigError as error:
            raise ConfigError(f"{who}: {error}") from None


def not_finite(who: str, loss: float, step: int) -> NonFiniteError:
    """Return the error of a client whose loss at a step (1-based) is not finite."""
    return NonFiniteError(
        f"{who}, step {step}: expected a finite loss, found {loss}; lower learning_rate, "
        "set max_grad_norm, or look for NaN in the client's data"
    )


def _is_int(value: object, *, at_least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least
