"""What the canaries of a finished run say of it, beside what its ledger promises. NumPy only.

OUT/audit.json   what `fedlora privacy audit` has found
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora.errors import RunError
from fedlora.experiment import ExperimentConfig
from fedlora.federation.checkpoint import read_checkpoint
from fedlora.federation.folder import EXPERIMENT
from fedlora.federation.private_sum import NOISE_KEY, canaries_of
from fedlora.files import write_atomic
from fedlora.privacy.audit import Estimate, Trace, estimate_epsilon
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.noise import read_key

__all__ = ["AUDIT", "audit_canaries", "canary_words", "save_audit"]

AUDIT = "audit.json"


def audit_canaries(out: Path) -> dict[str, Any] | None:
    """Return what is left of a run's canaries; None for a run without any.

    ``{"estimate", "spread", "low", "distance", "k", "d", "delta", "epsilon", "rounds",
    "exceeds_ledger", "words"}``. estimate: of epsilon, no bound. epsilon: the ledger's.
    exceeds_ledger: whether the estimate is over it by two of its deviations, which a mechanism that
    keeps its promise does in one of forty runs, and only where it is audited at its very limit.

    Raises `RunError` for a folder that is no run, or a run without a round.
    """
    if not (out / EXPERIMENT).is_file():
        raise RunError(f"{out}: expected a run's folder, found no {EXPERIMENT} in it")
    privacy = ExperimentConfig.from_toml(out / EXPERIMENT).privacy
    if privacy is None or not privacy.canaries or privacy.mechanism == "local":
        return None
    state = read_checkpoint(out).state
    if not state.round:
        raise RunError(f"{out}: expected a run with a round at least, found none; run it first")
    canaries = canaries_of(privacy, read_key(out / NOISE_KEY))
    found = estimate_epsilon(canaries, Trace.of_state(state.method_state), privacy.delta)
    promised = Ledger.read(out).spent(privacy.delta, privacy.accountant)
    exceeds = found.low > promised
    return {
        "estimate": found.epsilon,
        "spread": found.spread,
        "low": found.low,
        "distance": found.distance,
        "k": found.canaries,
        "d": found.size,
        "delta": found.delta,
        "epsilon": promised if math.isfinite(promised) else None,
        "rounds": state.round,
        "exceeds_ledger": exceeds,
        "words": canary_words(found, promised, exceeds=exceeds),
    }


def canary_words(found: Estimate, promised: float, *, exceeds: bool) -> str:
    """Say what an estimate is and is not, in one paragraph."""
    text = (
        f"{found.canaries} canary clients among {found.size} numbers: epsilon is estimated at "
        f"{found.epsilon:.2f} (plus or minus {found.spread:.2f}) at delta {found.delta:g}; the "
        f"ledger says at most {promised:.2f}. This is an estimate of one attack and no bound: it "
        "looks for each canary in the sum of all rounds, and a better attack may find more. "
    )
    if exceeds:
        return text + (
            "The estimate is over the ledger by more than two of its deviations: the mechanism "
            "does not keep its promise. Do not release this adapter before the reason is known."
        )
    return text + (
        "It is below the ledger by design where cohorts are sampled, since it does not use who was "
        "drawn when, and where the clients' own updates are long beside the noise. It gives no "
        "reason to call the ledger too high."
    )


def save_audit(out: Path, found: Mapping[str, Any]) -> None:
    """Write audit.json in a run's folder."""
    write_atomic(out / AUDIT, json.dumps(found, indent=2).encode())
