"""Looking at privacy from the outside: what an attack finds, beside what the ledger promises.

    one_run     a lower bound on epsilon from guesses about many canaries in one run
    canaries    canary clients: an estimate of epsilon from one run, and no bound
    inversion   what one client's single update says of its inputs

None of it is a proof that nothing leaks: an attack that finds nothing may be a weak one.
"""

from __future__ import annotations

from fedlora.privacy.audit.canaries import Canaries, Estimate, Trace, estimate_epsilon
from fedlora.privacy.audit.inversion import (
    best_match,
    leading_inputs,
    seen_through,
    share_in_span,
)
from fedlora.privacy.audit.one_run import audited_epsilon

__all__ = [
    "Canaries",
    "Estimate",
    "Trace",
    "audited_epsilon",
    "best_match",
    "estimate_epsilon",
    "leading_inputs",
    "seen_through",
    "share_in_span",
]
