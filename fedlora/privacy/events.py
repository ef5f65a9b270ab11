"""What was released of people's data, as data: the accountant reads it, and so can anyone else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedlora.errors import ConfigError

__all__ = ["PrivacyEvent"]


@dataclass(frozen=True, slots=True)
class PrivacyEvent:
    """A Gaussian mechanism on the sum of a sampled cohort, `count` times over.

    Its noise has the standard deviation ``noise_multiplier`` times the norm that each client's part
    is clipped to, whatever the neighboring relation.
    """

    noise_multiplier: float
    # poisson: everyone alone with sampling_probability; neighbors differ by one person more or less
    # fixed: `cohort` of `population` without replacement; neighbors differ in one person's data
    # all: everyone; neighbors differ by one person more or less
    sampling: Literal["poisson", "fixed", "all"]
    sampling_probability: float = 1.0  # for fixed: cohort / population
    cohort: int | None = None  # fixed only
    population: int | None = None  # fixed only
    count: int = 1

    def __post_init__(self) -> None:
        if not self.noise_multiplier >= 0:
            raise ConfigError(
                f"noise_multiplier: expected a number >= 0, found {self.noise_multiplier!r}"
            )
        if not 0 <= self.sampling_probability <= 1:
            raise ConfigError(
                "sampling_probability: expected a probability in [0, 1], found "
                f"{self.sampling_probability!r}"
            )
        if self.count < 0:
            raise ConfigError(f"count: expected a whole number >= 0, found {self.count!r}")
        sizes = self.cohort, self.population
        if self.sampling == "fixed" and (None in sizes or not 0 < self.cohort <= self.population):  # type: ignore[operator]
            raise ConfigError(
                f"cohort, population: expected 0 < cohort <= population, found {sizes}"
            )

    @property
    def neighboring_relation(self) -> Literal["add-or-remove-one", "replace-one"]:
        """Between which data sets the guarantee holds."""
        return "replace-one" if self.sampling == "fixed" else "add-or-remove-one"
